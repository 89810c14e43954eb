"""The graph of the tiny loaded scale through Snakemake and papermill, from hub folders to claims; and the same under kills."""

import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import loaded
import pandas as pd
import pytest

from vlsafe.analysis import durability
from vlsafe.core import store
from vlsafe.publish import notebooks
from vlsafe.study.graph import left_out, planned, read_by
from vlsafe.study.study import Study

ROOT = Path(__file__).parents[2]
BACKBONE = next(iter(loaded.PARENTS))
MINUTES = 8  # on two cores that do nothing else
FURTHER = ("durability/adapted", "durability/sl-full", "worst/sl-full")  # of the grid "full"


def started(place, scale):
    """`make reproduce` at a scale file, in a folder of its own."""
    for name in ("Snakefile", "notebooks", "env"):
        if not (place / name).exists():
            (place / name).symlink_to(ROOT / name)
    common = f"--scale {scale} --seeds 0 --backbones {BACKBONE} --root runs"
    line = (
        f"vlsafe sweep {common} && exec vlsafe unlock --root . -- snakemake --cores 2 --rerun-incomplete "
        f"--rerun-triggers mtime params input --quiet rules --config scale={scale} seeds=0 backbones={BACKBONE} root=runs"
    )
    with open(place / "log", "a") as log:
        call = ["bash", "-c", line]
        return subprocess.Popen(call, cwd=place, env=environment(scale), stdout=log, stderr=log, start_new_session=True)


def environment(scale):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "VLSAFE_DATA": str(scale.parent / "data"), "OPENAI_API_KEY": "none"}


def computed():
    """Seconds that finished children have computed, on all cores together: a bound of theirs holds beside other work too."""
    of = resource.getrusage(resource.RUSAGE_CHILDREN)
    return of.ru_utime + of.ru_stime


def stages_of(study, state):
    return {name for name in planned(study) if store.status(study.run(name), deep=True) == state}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The scale, and its graph made without any disturbance: where, its study, how long it took and computed, what the endpoint
    was asked."""
    place = tmp_path_factory.mktemp("loaded")
    with loaded.endpoint() as (address, requests):
        scale = loaded.written(place / "outside", address)
        begin, idle = time.monotonic(), computed()
        code = started(place, scale).wait()
        seconds, busy = time.monotonic() - begin, computed() - idle
        assert code == 0, (place / "log").read_text()[-6000:]
        asked = list(requests)
        call = f"vlsafe stage {' '.join(FURTHER)} --scale {scale} --backbone {BACKBONE} --seed 0 --root runs"
        with open(place / "log", "a") as log:
            done = subprocess.run(["bash", "-c", call], cwd=place, env=environment(scale), stdout=log, stderr=log, check=False)
    assert done.returncode == 0, (place / "log").read_text()[-6000:]
    return place, Study.open(scale, BACKBONE, 0, place / "runs"), seconds, busy, asked


@pytest.mark.loaded
def test_the_default_grid_of_a_loaded_scale_comes_to_its_end(made, capsys):
    place, study, seconds, busy, _ = made
    names = planned(study)
    assert stages_of(study, "valid") == set(names)
    executed = place / "runs" / study.scale.name / BACKBONE / "seed0" / "notebooks"
    assert {path.stem for path in executed.glob("*.done")} == set(notebooks.NOTEBOOKS)
    figures = place / "figures" / f"{study.scale.name}-partial"
    assert all((figures / name).exists() for name in ("report.html", "T09_claims.csv", "T02_degradation.csv"))
    shown = ("parent/aligned", "instruct/filtered-full", "safety/sl-full")
    runs = [study.run(name) for name in shown]
    assert all(run.folder.with_name(f"{run.recipe}.card.md").exists() for run in runs)
    reasons = left_out(study)
    assert {"instruct/textonly-full", "instruct/dose-text-20"} <= set(reasons) and all(reasons.values())
    assert "instruct/clean-full" in left_out(study, "full")
    with capsys.disabled():
        stages = f"{len(names)} stages, 0 failed, 0 blocked, {len(reasons)} left out with a reason"
        print(f"\n{stages}, {seconds:.0f} s, {busy:.0f} CPU-seconds")
    assert busy < 2 * 60 * MINUTES


@pytest.mark.loaded
def test_models_are_fine_tuned_again_at_a_loaded_scale_and_judged_by_its_judges(made):
    _, study, *_ = made
    raw = pd.concat([study.frame(name) for name in FURTHER[:2]], ignore_index=True)
    attacks = {"start", "instructions", "text", "harmful"}
    assert set(raw["recipe"]) == {f"{model}/{rows}" for model in ("adapted", "sl-full") for rows in attacks}
    assert {"mm-safetybench-criteria", "llama-guard-3"} <= set(raw["judge"]) and set(raw["exam"]) == {"full"}
    lives = durability.curves(raw)
    assert {"text_asr", "multimodal_asr"} <= set(lives["measure"])
    lines = study.frame(FURTHER[2], "validation.parquet")
    assert lines["chosen"].sum() == 1 and study.frame(FURTHER[2])["step"].nunique() == 1


@pytest.mark.loaded
def test_no_judge_is_asked_twice_for_one_response_of_a_stage(made):
    """Every stage asks about each distinct response to an item once; the requests are as many as those."""
    _, study, _, _, requests = made
    distinct = 0
    for name in planned(study):
        file = study.run(name).folder / "judgements.jsonl"
        if file.exists():
            kept = pd.read_json(file, lines=True, dtype=False)
            assert not kept.duplicated(["id", "judge", "response"]).any()
            distinct += int((kept["judge"] == "mm-safetybench-criteria").sum())
    assert len(requests) == distinct > 0


@pytest.mark.soak
def test_a_loaded_graph_that_is_killed_three_times_has_the_same_tables(made, tmp_path, capsys):
    _, study, seconds, *_ = made
    rng, kills = random.Random(0), 0
    with loaded.endpoint() as (address, _):
        scale = loaded.written(tmp_path / "outside", address)
        while kills < 3:
            running = started(tmp_path, scale)
            try:
                running.wait(rng.uniform(0.05, 0.25) * seconds)  # three of these are less than the whole
            except subprocess.TimeoutExpired:
                os.killpg(running.pid, signal.SIGKILL)
                running.wait()
                kills += 1
            else:
                assert running.returncode == 0, (tmp_path / "log").read_text()[-6000:]
                pytest.fail(f"the graph came to its end after {kills} kills; kill it earlier")
        assert started(tmp_path, scale).wait() == 0, (tmp_path / "log").read_text()[-6000:]
    again = Study.open(scale, BACKBONE, 0, tmp_path / "runs")
    tables = read_by(study, "tables")
    for name in tables:
        one, other = (pd.DataFrame(of.rows(name, "raw.parquet")) for of in (study, again))
        pd.testing.assert_frame_equal(one, other)
    with capsys.disabled():
        print(f"\n3 kills of everything, {len(tables)} tables equal to those of an undisturbed run")
