"""`make perf-sources`: the paper's corpora at full size, synthesised; peak memory has a bound. Ten minutes of a core at most.

A file in LLaVA-Instruct's shape and about its size (1 GB: text-only rows, several turns, pictures by name) is read, and read
into Parquet as a stage does it; then 1.2 million audit lines are written by a process that is killed half-way, and by another
one that goes on. Peak memory is that of a fresh process that does nothing else. Not collected by pytest.
"""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROWS, TURNS, BOUND = 665_298, 5, 500
LINES = 1_223_426  # both corpora
MANY, GROUP, SIDE = 24_000, 100, 560  # pictures, in a row group, pixels: about 140 kB each, 3.2 GiB in each file
OWN, HELD = 100, 1536  # MB that a screen, and that a dataset of pictures, may need beyond what is imported, torch and all
PEAK = "resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024"
READ = f"""
import resource, time
from vlsafe.core.presets import PAPER
from vlsafe.data.sources import instructions, place_of
before, start = {PEAK}, time.process_time()
place = place_of("instructions", PAPER.loaded.instructions)
rows = text_only = turns = 0
for row in instructions(place):
    rows, text_only, turns = rows + 1, text_only + (not row.images), turns + len(row.turns)
print(rows, text_only, turns, before, {PEAK}, round(time.process_time() - start))
"""
WRITE = f"""
import collections, os, resource, time
from pathlib import Path
from vlsafe.core import store
from vlsafe.core.schema import Example, to_row
from vlsafe.core.presets import PAPER
from vlsafe.data.sources import stream
from vlsafe.data import intake
from vlsafe.study import world
before, start = {PEAK}, time.process_time()
noticed = world.Defects(collections.Counter(), collections.Counter(), [])
rows = (to_row(row) for row in world._counting(stream("instructions", PAPER.loaded.instructions), noticed))
n = store.write_stream(Path(os.environ["VLSAFE_DATA"]) / "rows.parquet", rows, world.COLUMNS[Example])
print(n, noticed.pictures["missing"], noticed.pictures["all"], before, {PEAK}, round(time.process_time() - start))
"""
SCREEN = f"""
import os, resource, signal, sys, time
from pathlib import Path
from vlsafe.core.schema import Example, Turn
from vlsafe.data import intake
from vlsafe.study import world
from vlsafe.data.intake import audit
from vlsafe.data.guards import Assessment
turns, safe, seen = (Turn("user", "a"), Turn("assistant", "b")), Assessment(False, (), 0.1), [0]
before, start = {PEAK}, time.process_time()
def marked(rows):
    seen[0] += len(rows)
    if seen[0] > int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    return audit(rows, [safe] * len(rows), [None] * len(rows))
rows = (Example(f"row#{{i}}", "instructions", turns) for i in range({LINES}))
intake.append_lines(Path(os.environ["VLSAFE_DATA"]) / "lines.jsonl", rows, marked)
print(seen[0], 0, 0, before, {PEAK}, round(time.process_time() - start))
"""


PICTURES = f"""
import os, random, resource, sys, time
from pathlib import Path
import torch, transformers, trl
from vlsafe.core.schema import Example, Stored, Turn
from vlsafe.training import datasets
places, folder = sys.argv[1], Path(os.environ["VLSAFE_DATA"])
turns = (Turn("user", "a"), Turn("assistant", "b"))
before, start = {PEAK}, time.process_time()
rows = [Example(str(n), "captions", turns, (Stored(places.format(n)),)) for n in range({MANY})]
data = datasets.chat_dataset(rows, True)
order = random.Random(0).sample(range(len(data)), 1600)
pixels = sum(picture.size[0] for at in range(0, len(order), 16) for row in data[order[at : at + 16]]["images"] for picture in row)
size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
print(pixels, size, before, {PEAK}, round(time.process_time() - start))
"""


def synthesise_pictures(folder: Path) -> None:
    """More than 3 GiB of pictures in a zip file and as many in Parquet; neither makes noise smaller."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 3), np.uint8)).save(buffer, "JPEG", quality=90)
    jpeg = buffer.getvalue()
    with zipfile.ZipFile(folder / "images.zip", "w") as file:
        for number in range(MANY):
            file.writestr(f"{number}.jpg", jpeg)
    with pq.ParquetWriter(
        folder / "images.parquet", pa.schema({"image": pa.struct({"bytes": pa.binary(), "path": pa.string()})})
    ) as file:
        for _ in range(MANY // GROUP):
            cell = {"bytes": jpeg, "path": None}
            file.write_table(pa.Table.from_pylist([{"image": cell}] * GROUP, schema=file.schema), row_group_size=GROUP)


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


def child(program: str, folder: str, *arguments: str) -> list[int] | None:
    """The numbers that a fresh process prints, the last three its memory before, its peak, and its CPU seconds; None: killed."""
    environment = {**os.environ, "VLSAFE_DATA": folder}
    told = subprocess.run([sys.executable, "-c", program, *arguments], env=environment, capture_output=True, text=True)
    if told.returncode not in (0, -signal.SIGKILL):
        raise RuntimeError(told.stderr)
    return [int(word) for word in told.stdout.split()] or None


def line(what: str, before: int, peak: int, took: int, held: bool, bound: int = BOUND) -> bool:
    held = held and peak <= bound
    verdict = f"<= {bound} MB   {'ok' if held else 'MISSED'}"
    print(f"{what:<62} {took:4d} s CPU   peak {peak} MB, of which imports {before}   {verdict}", flush=True)
    return held


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "LLaVA-Instruct-150K" / "llava_v1_5_mix665k.json"
        path.parent.mkdir()
        synthesise(path)
        print(f"a file of {path.stat().st_size / 1e9:.2f} GB")
        rows, text_only, turns, *cost = child(READ, folder)
        held = [line(f"{rows:,} rows, {text_only:,} of them text only, {turns:,} turns", *cost, rows == ROWS)]
        rows, lost, pictures, *cost = child(WRITE, folder)
        held.append(line(f"{rows:,} rows into Parquet, {lost:,} of {pictures:,} pictures missing", *cost, rows == ROWS))
        killed = child(SCREEN, folder, str(LINES // 2)) is None
        rows, _, _, *cost = child(SCREEN, folder, str(LINES))
        with open(Path(folder) / "lines.jsonl", encoding="utf-8") as file:
            numbers = [int(json.loads(row)["id"].partition("#")[2]) for row in file]
        whole = killed and numbers == list(range(LINES))
        what = f"{len(numbers):,} audit lines, {rows:,} of them after a SIGKILL, none lost or twice"
        held.append(line(what, *cost, whole, cost[0] + OWN))
    with tempfile.TemporaryDirectory() as folder:
        synthesise_pictures(Path(folder))
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
        for places in ("images.zip!{}.jpg", "images.parquet!{}"):
            pixels, after, *cost = child(PICTURES, folder, places)
            what = f"1,600 of {MANY:,} pictures, {size / 2**31:.1f} GiB, from {places[:12].rstrip('!')}, at random"
            held.append(line(what, *cost, pixels == 1600 * SIDE and after == size, cost[0] + HELD))
    return 0 if all(held) else 1


if __name__ == "__main__":
    sys.exit(main())
