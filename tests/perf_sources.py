"""`make perf-sources`: the loader of a 665K-row instruction file, synthesised at full size; its peak memory has a bound.

The file has LLaVA-Instruct's shape and about its size (1 GB): text-only rows, several turns, pictures by name. Peak memory is
that of a fresh process which does nothing else, so that it is the loader's own. Not collected by pytest.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

ROWS, TURNS, BOUND = 665_298, 5, 500
CHILD = """
import resource, time
from vlsafe.scales import PAPER
from vlsafe.sources import llava_instruct, locate
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
place = locate(PAPER.loaded.instructions, llava_instruct.FOLDER)
rows = text_only = turns = 0
for row in llava_instruct.rows(place):
    rows, text_only, turns = rows + 1, text_only + (not row.images), turns + len(row.turns)
took = time.monotonic() - start
print(rows, text_only, turns, before // 1024, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, round(took, 1))
"""


def synthesise(path: Path) -> None:
    """A file of as many rows as the original, about 1.5 kB each; every sixteenth is text only."""
    rng = random.Random(0)
    words = [bytes(rng.choices(b"abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))).decode() for _ in range(2000)]
    with open(path, "w", encoding="utf-8") as file:
        for number in range(ROWS):
            said = [" ".join(rng.choices(words, k=22)) for _ in range(2 * TURNS)]
            row = {"id": f"{number:012d}"}
            if number % 16:
                row["image"], said[0] = f"coco/train2017/{number % 118_000:012d}.jpg", "<image>\n" + said[0]
            row["conversations"] = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(said)]
            file.write(("[" if not number else ", ") + json.dumps(row))
        file.write("]")


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "LLaVA-Instruct-150K" / "llava_v1_5_mix665k.json"
        path.parent.mkdir()
        synthesise(path)
        environment = {**os.environ, "VLSAFE_DATA": folder}
        told = subprocess.run([sys.executable, "-c", CHILD], env=environment, capture_output=True, text=True, check=True).stdout
        size = path.stat().st_size / 1e9
    rows, text_only, turns, before, peak, took = told.split()
    held = int(peak) <= BOUND and (int(rows), int(turns)) == (ROWS, 2 * TURNS * ROWS)
    print(f"{size:.2f} GB, {int(rows):,} rows ({int(text_only):,} text only), {int(turns):,} turns in {took} s")
    print(f"peak memory {peak} MB, of which imports {before} MB   <= {BOUND} MB   {'ok' if held else 'MISSED'}")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
