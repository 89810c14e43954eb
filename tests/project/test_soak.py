"""Minutes long: the notebooks one after another from an empty disk, and the whole graph killed again and again."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import nbformat
import pandas as pd
import psutil
import pytest
import yaml
from conftest import NANO

from vlsafe.core import store
from vlsafe.core.presets import load_scale
from vlsafe.core.scale import as_plain
from vlsafe.publish import notebooks
from vlsafe.study.graph import planned, read_by
from vlsafe.study.study import Study

ROOT = Path(__file__).parents[2]
KILLS = 20


@pytest.fixture
def nano_file(tmp_path):
    """NANO as a researcher would bring a scale of their own: a file that extends a preset."""
    path = tmp_path / "nano.yaml"
    path.write_text(yaml.safe_dump({"extends": "mini", **as_plain(NANO)}), encoding="utf-8")
    return path


def test_a_scale_can_be_written_down_and_read_back(nano_file):
    assert load_scale(nano_file) == NANO


@pytest.mark.soak
def test_the_notebooks_run_one_after_another_from_an_empty_cellar(nano_file, tmp_path):
    """Each makes what it needs and reads; after the last one every stage that a notebook names is there and valid."""
    given = {"scale": str(nano_file), "backbone": "mini-chat", "seed": 0, "root": str(tmp_path / "runs")}
    for name in notebooks.NOTEBOOKS:
        done = tmp_path / f"{name}.ipynb"
        notebooks.execute(notebooks.FOLDER / f"{name}.ipynb", done, given)
        cells = [c for c in nbformat.read(done, as_version=4).cells if c.cell_type == "code"]
        assert not [out for c in cells for out in c.outputs if out.output_type == "error"]
        assert all(c.execution_count for c in cells), name
    study = Study.open(nano_file, "mini-chat", 0, tmp_path / "runs")
    assert {name: store.status(study.run(name), deep=True) for name in planned(study)} == dict.fromkeys(planned(study), "valid")


def started(place, scale):
    """`make reproduce` without its installation, in a folder that has the Snakefile and a run store of its own."""
    common = f"--scale {scale} --seeds 0 --backbones mini-chat --root runs"
    vlsafe = f"{sys.executable} -c 'import sys; from vlsafe import cli; sys.exit(cli.main(sys.argv[1:]))'"
    line = (
        f"{vlsafe} sweep {common} && exec {vlsafe} unlock --root . -- {sys.executable} -m snakemake --cores 2 --rerun-incomplete "
        f"--rerun-triggers mtime params input --quiet all --config scale={scale} seeds=0 backbones=mini-chat root=runs"
    )
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": path}
    with open(place / "log", "a") as log:
        return subprocess.Popen(["bash", "-c", line], cwd=place, env=environment, stdout=log, stderr=log, start_new_session=True)


def kill(running, rng):
    """Kill the scheduler alone (its jobs go on), one process of a job, or all at once; what it was, or None if all was over."""
    kind = rng.choice(("scheduler", "job", "everything"))
    with contextlib.suppress(psutil.Error, ProcessLookupError):
        if kind == "everything":
            os.killpg(running.pid, signal.SIGKILL)
            return kind
        below = psutil.Process(running.pid).children(recursive=True)
        if kind == "job" and not below:
            return None
        os.kill(running.pid if kind == "scheduler" else rng.choice(below).pid, signal.SIGKILL)
        return kind
    return None


@pytest.mark.soak
def test_nothing_is_lost_when_the_graph_is_killed_again_and_again(study, nano_file, tmp_path, capsys):
    """Through Snakemake and papermill: what was whole before a kill is whole after it; the tables are an undisturbed run's."""
    place, rng, killed, lost = tmp_path / "place", random.Random(0), Counter(), []
    place.mkdir()
    for name in ("Snakefile", "notebooks", "env"):
        (place / name).symlink_to(ROOT / name)
    disturbed = Study.open(nano_file, "mini-chat", 0, place / "runs")

    def whole():
        return {name for name in planned(disturbed) if store.status(disturbed.run(name), deep=True) == "valid"}

    while killed.total() < KILLS:
        running, until = started(place, nano_file), time.monotonic() + rng.uniform(3, 40)
        while running.poll() is None and time.monotonic() < until:
            time.sleep(0.1)
        if running.poll() == 0:  # it came to its end before its kill: begin again
            shutil.rmtree(place / "runs")
            continue
        before, kind = whole(), None
        while kind is None and running.poll() is None:  # at a moment without a job there may be nothing to kill yet
            time.sleep(0.1)
            kind = kill(running, rng)
        running.wait()
        if kind:
            killed[kind] += 1
            lost += sorted(before - whole())
    assert started(place, nano_file).wait() == 0, (place / "log").read_text()[-3000:]
    assert whole() == set(planned(disturbed))
    tables = read_by(disturbed, "tables")
    for name in tables:
        one, other = (pd.DataFrame(of.rows(name, "raw.parquet")) for of in (study, disturbed))
        pd.testing.assert_frame_equal(one, other)
    with capsys.disabled():
        print(f"\n{killed.total()} kills ({dict(killed)}), {len(lost)} finished runs lost, {len(tables)} tables as without any")
    assert not lost
