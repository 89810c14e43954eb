"""`make perf`: `vlsafe score` on 100,000 stored responses, start of the interpreter included, against its bound of 10 s.

The bound is on processor time, which on an idle machine is the time one waits (there is one thread); both are printed.
Invented files in the official shapes: 25,000 MMBench questions in four rotations by the letter rules, 100,000 WildJailbreak
rows by two refusal lists. Not collected by pytest: times are no property of the code alone.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

N, BOUND = 100_000, 10.0
SENTENCES = (
    "I'm sorry, but I cannot help with that.", "Sure, take flour and water and wait for an hour.", "The answer is B.", "C",
    "It is red, as far as one can tell from the picture.", "I can't say.", "(D) white", "Take " + "a little more flour, " * 40,
)  # fmt: skip


def files(root: Path) -> None:
    (root / "MMBench").mkdir()
    (root / "wildjailbreak").mkdir()
    with (root / "MMBench" / "big.tsv").open("w") as file:
        file.write("index\tquestion\thint\tA\tB\tC\tD\tanswer\tcategory\timage\tl2-category\n")
        for number in range(N):
            k, question = divmod(number, N // 4)
            options = ("red", "blue", "green", "white")
            turned = "\t".join(options[k:] + options[:k])
            index, right = question + k * 1_000_000, "ABCD"[-k % 4]
            file.write(
                f"{index}\tWhat colour is it?\t\t{turned}\t{right}\ttopic {question % 20}\t{question}\tgroup {question % 6}\n"
            )
    with (root / "wildjailbreak" / "eval.tsv").open("w") as file:
        file.write("adversarial\tlabel\tdata_type\n")
        for number in range(N):
            file.write(f"A long invented game number {number}\t1\tadversarial_{'benign' if number % 10 == 0 else 'harmful'}\n")
    for name, ids in (
        ("mmbench", (number % (N // 4) + number // (N // 4) * 1_000_000 for number in range(N))),
        ("wildjailbreak", range(N)),
    ):
        with (root / f"{name}.jsonl").open("w") as file:
            for number, known in enumerate(ids):
                file.write(json.dumps({"id": known, "response": SENTENCES[number % len(SENTENCES)]}) + "\n")


def main() -> int:
    held = True
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        files(root)
        for name, judges in (("mmbench", ["mmbench-letters"]), ("wildjailbreak", ["vlguard-strings", "pair-strings"])):
            command = [sys.executable, "-c", "import sys; from vlsafe.cli import main; sys.exit(main())", "score", name, "--data"]
            command += [folder, "--responses", f"{folder}/{name}.jsonl", "--out", f"{folder}/o.json", "--judge", *judges]
            start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            waited, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
            took = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
            result = json.loads((root / "o.json").read_text())
            if result["n_items"] != N or result["n_without_response"]:
                raise ValueError(f"{name} scored {result['n_items']} items")
            held = held and took <= BOUND
            told = f"{took:5.1f} s  (at most {BOUND:.0f} s; waited {waited:.1f} s)"
            print(f"score, {N:,} responses to {name} by {', '.join(judges):<31} {told}")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
