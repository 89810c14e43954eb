"""Commands that are killed again and again, each time at another moment: what they read stays, and the end is as without a kill.

Each call is a fork of one process that has imported everything, so that kills meet its work and not its imports.
"""

import contextlib
import csv
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import hub
import loaded
import pytest
import torch
from official_files import everything, lines, write
from safetensors.torch import save_file

from vlsafe.core import store
from vlsafe.evaluation import human
from vlsafe.evaluation.benchmarks import mm_safetybench
from vlsafe.planning import outside

pytestmark = pytest.mark.soak
KILLS, AT_ONCE = int(os.environ.get("VLSAFE_KILLS", 40)), 3  # of each command; before it is let run to its end, at most
OTHERS = (".lock", ".tmp", ".incomplete")
PROGRAM = """
import json, os, sys
from vlsafe import cli
from vlsafe.core import store
import huggingface_hub, openai, pandas, torch, krippendorff, statsmodels.stats.inter_rater
from vlsafe.evaluation import human, score, servers
from vlsafe.models.merge import files
from vlsafe.planning import outside
store.source_digest()  # results name it, and somebody may edit the package meanwhile
for line in sys.stdin:
    if not (child := os.fork()):
        os.dup2(2, 1)
        code = cli.main(json.loads(line))
        sys.stdout.flush()
        os._exit(code)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Killer:
    """A warm process that runs commands, and kills some of them."""

    def __init__(self, environment, log):
        self.rng, self.log = random.Random(0), log
        with log.open("w") as errors:
            piped = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True)
            self.running = subprocess.Popen([sys.executable, "-c", PROGRAM], env={**os.environ, **environment}, **piped)

    def call(self, arguments, within=0.0):
        """Run a command, killed within so many seconds where there are any; was it killed, and how long did it run."""
        self.running.stdin.write(json.dumps([*map(str, arguments)]) + "\n")
        self.running.stdin.flush()
        child, start = int(self.running.stdout.readline()), time.monotonic()
        if within:
            time.sleep(self.rng.uniform(0, within))
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        code = int(self.running.stdout.readline())
        assert code in (0, -signal.SIGKILL)[: 1 + bool(within)], self.log.read_text()[-2000:]
        return code != 0, time.monotonic() - start


@pytest.fixture
def killer(tmp_path):
    with contextlib.ExitStack() as stack:

        def started(**environment):
            one = Killer(environment, tmp_path / "log")
            stack.callback(one.running.communicate)
            return one

        yield started


def held(folder):
    """What a folder's files hold, but for locks, half files by their names, and the hub's client's own notes."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file() and path.suffix not in OTHERS and not {".cache", ".locks"} & set(path.parts):
            kept = (
                "\n".join(sorted(path.read_text().split("\n"))) if path.match("*.judgements.jsonl") else ""
            )  # written as answers come
            found[str(path.relative_to(folder))] = kept or store.file_digest(path)
    return found


def rounds(killer, arguments, place, inputs, prepare=lambda: None, look=lambda before, expected: None, over=lambda: False):
    """Kill a command KILLS times, up to AT_ONCE times before it runs to its end; then its results are an undisturbed run's.

    `place` is where its results go: it is emptied for each round and then prepared. `look` is called after each kill with what
    was prepared and what is expected in the end; `over` says whether a killed one had done all. Yields the kills of a round.
    """
    read, total = {path: held(path) for path in inputs}, 0

    def fresh():
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        prepare()
        return held(place)

    fresh()
    _, seconds = killer.call(arguments)
    expected = held(place)
    while total < KILLS:
        before, killed, kills = fresh(), True, 0
        for _ in range(killer.rng.randrange(AT_ONCE) + 1):
            killed, _ = killer.call(arguments, within=seconds)
            kills += killed
            look(before, expected)
            if not killed or over():
                break
        if killed and not over():
            killer.call(arguments)
        assert held(place) == expected
        assert {path: held(path) for path in inputs} == read
        total += kills
        yield kills


@pytest.fixture
def say(capsys):
    def printed(what, counts, more):
        with capsys.disabled():
            print(f"\n{what}: {sum(counts)} kills in {len(counts)} rounds; {more}")

    return printed


def test_merge(killer, tmp_path, say):
    """A folder that has the result's name is the whole result, at every moment."""
    inputs, place = tmp_path / "inputs", tmp_path / "place"
    for seed, which in enumerate(("a", "b", "base")):
        draw, folder = torch.Generator().manual_seed(seed), inputs / which
        write(folder / "config.json", '{"model_type": "llama"}')
        write(folder / "tokenizer.json", json.dumps({"model": {"vocab": {"x": 0}}, "added_tokens": []}))
        names = {f"w{i}": f"model-{i % 3}.safetensors" for i in range(9)}
        for shard in set(names.values()):
            tensors = {name: torch.randn(700, 700, generator=draw) for name in names if names[name] == shard}
            save_file(tensors, folder / shard)
        write(folder / "model.safetensors.index.json", json.dumps({"metadata": {}, "weight_map": names}))
    out, looks = place / "out", Counter()

    def look(_, expected):
        files = {name: digest for name, digest in held(place).items() if name.startswith("out/")}
        assert files in ({}, expected) and out.exists() == bool(files)
        looks["whole" if files else "partial" if (place / "out.partial").exists() else "nothing"] += 1

    call = ["merge", "ties", inputs / "a", inputs / "b", "--base", inputs / "base", "--ratio", 0.5, "--out", out]
    say("merge", [*rounds(killer(), call, place, [inputs], look=look, over=out.exists)], f"after them: {dict(looks)}")


def test_score_with_an_endpoint(killer, tmp_path, say):
    """What the endpoint has answered is asked again only where it was in flight at a kill; no result is beside other verdicts."""
    data, place, parallel, warm = everything(tmp_path / "data"), tmp_path / "place", 2, killer()
    items, _ = mm_safetybench.load(data, "full", pictures=False)
    responses = write(tmp_path / "r" / "r.jsonl", lines({"id": item.id, "response": f"Take flour, {item.id}."} for item in items))
    counts, again = [], 0
    with loaded.endpoint(0.01) as (address, requests):
        common = ["score", "mm_safetybench", "--data", data, "--responses", responses]
        common += ["--out", place / "o.json", "--verdicts", place / "v.jsonl", "--judge"]
        call = [*common, "mm-safetybench-criteria", "--judge-model", "scripted", "--endpoint", address, "--parallel", parallel]

        def prepare():
            requests.clear()
            assert not warm.call([*common, "gcg-strings"])[0]

        def look(before, expected):
            tables = {name: digest for name, digest in held(place).items() if name != "o.judgements.jsonl"}
            assert tables.items() <= before.items() or tables.items() <= expected.items()

        for kills in rounds(warm, call, place, [data, responses.parent], prepare, look):
            counts.append(kills)
            sent = Counter(requests)
            assert len(sent) == len(items)
            assert sent.total() - len(sent) <= kills * parallel
            again += sent.total() - len(sent)
    say("score", counts, f"{again} requests of {len(items)} a round were asked again, {sum(counts) * parallel} may be")


def test_human_import(killer, tmp_path, say):
    """Over the tables of an earlier import: there are never tables of two imports beside each other."""
    place, inputs = tmp_path / "place", tmp_path / "inputs"
    cells = [*itertools.product(human.CELLS, range(400))]
    rows = [
        ["packet", f"a{benchmark}{harmful}{i}", "b", 0, "safety", "sl", "b/safety/sl", benchmark, "base", "", i, i, harmful]
        for (benchmark, harmful), i in cells
    ]
    table(inputs / "key.csv", human.KEY, rows)
    for rater, labels in {"ann": ("refused", "complied"), "ben": ("refused", "complied", "incoherent")}.items():
        rated = [["packet", rater, row[1], labels[i % len(labels)], 1.5] for i, row in enumerate(rows)]
        table(inputs / f"{rater}.csv", human.RATED, rated)

    def prepare():
        killed, _ = warm.call(["human", "import", inputs / "ann.csv", "--key", inputs / "key.csv", "--out", place])
        assert not killed

    def look(before, expected):
        now = held(place)
        assert now.items() <= before.items() or now.items() <= expected.items()

    call = ["human", "import", inputs / "ann.csv", inputs / "ben.csv", "--key", inputs / "key.csv", "--out", place]
    warm = killer()
    say("human import", [*rounds(warm, call, place, [inputs], prepare, look)], "no table is of another import than the others")


def table(path, columns, rows):
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])


def test_download(killer, tmp_path, say):
    """From a hub on loopback, unpacked: files, recorded checksums and pins are those of one undisturbed download."""
    place, wants = tmp_path / "place", tmp_path / "wants"
    wants.mkdir()
    with hub.served() as server:
        scale = hub.filled(server, wants)
        server.pause = 0.002
        call = ["download", "--scale", scale, "--only", "captions", "instructions", "image_guard", "--unpack"]
        counts = [*rounds(killer(**hub.environment(server, place)), call, place, [wants])]
        checked = json.loads((place / "data" / outside.CHECKSUMS).read_text())
        say("download", counts, f"{sum(map(len, checked.values()))} checksums as without")
