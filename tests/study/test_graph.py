"""The thin thread end to end at NANO, killed at random and run again."""

import dataclasses
import json
import multiprocessing
import os
import random
import shutil
import signal
import time

import pandas as pd
import pytest
from datasets.fingerprint import fingerprint_rng

from vlsafe import cli
from vlsafe.core import store
from vlsafe.core.presets import load_scale
from vlsafe.evaluation.benchmarks import BENCHMARKS
from vlsafe.publish import gallery, modelcards, results
from vlsafe.study import graph
from vlsafe.study.graph import planned
from vlsafe.study.study import Study

EACH_KIND = ("examination/instruct.filtered-full", "examination/safety.sl-full", "merge/sl-full")  # of a stage that is killed


def raw_tables(study):
    return {name: pd.DataFrame(study.rows(name, "raw.parquet")) for name in graph.read_by(study, "tables")}


def test_every_run_is_valid_and_a_second_pass_makes_nothing(study):
    before = {name: (study.run(name).folder / "manifest.json").stat().st_mtime_ns for name in planned(study)}
    for name in planned(study):
        study.folder(name)
        assert store.status(study.run(name), deep=True) == "valid", name
    assert before == {name: (study.run(name).folder / "manifest.json").stat().st_mtime_ns for name in planned(study)}


@pytest.mark.parametrize("scale, backbone", [("mini", "mini-chat"), ("paper", "tulu2")])
@pytest.mark.parametrize("grid", graph.GRIDS)
def test_jobs_make_every_stage_once_and_in_an_order_that_can_be_made(grid, scale, backbone, tmp_path):
    study = Study.open(scale, backbone, 0, tmp_path)
    jobs = graph.jobs(study, grid)
    assert sorted(name for job in jobs for name in job) == sorted(graph.planned(study, grid))
    for job in jobs:
        for place, name in enumerate(job):
            assert not set(study.inputs(name)) & set(job[place:]), f"{name} is made before what it needs"


@pytest.mark.parametrize("scale", ["paper", "small"])
@pytest.mark.parametrize("grid", graph.GRIDS)
def test_stages_of_one_gpu_are_never_inside_a_job_of_eight(grid, scale, tmp_path):
    study = Study.open(scale, next(iter(load_scale(scale).backbones)), 0, tmp_path)
    jobs = graph.jobs(study, grid)
    many = {name: graph.gpus(study, name) for name in graph.planned(study, grid)}
    assert set(many.values()) == ({0, 1, 8} if scale == "paper" else {0, 1})
    for job in jobs:
        assert len({many[name] for name in job}) == 1, f"{job} would hold GPUs that it does not use"
        assert many[job[0]] == 0 or len(job) == 1, f"one stage of {job} that fails would take the others with it"
        assert graph.needs(study, job).get("gpu", 0) == many[job[0]]


def test_stages_without_gpus_keep_together(tmp_path):
    """A start costs as much as a small stage. With verdicts apart, a model, its responses and their verdicts are one job."""
    mini, paper = Study.open("mini", "mini-chat", 0, tmp_path), Study.open("paper", "tulu2", 0, tmp_path)
    cpu = dataclasses.replace(paper, scale=dataclasses.replace(paper.scale, device="cpu"))
    cuda = dataclasses.replace(mini, scale=dataclasses.replace(mini.scale, device="cuda"))
    assert ("instruct/filtered-full", "examination/instruct.filtered-full") in graph.jobs(mini)
    assert ("examination/parent.aligned", "examination/confounds.parent", "probe/localisation") in graph.jobs(mini)
    model, merge = "instruct.filtered-full", ("responses/merge.sl-full", "merge/sl-full")
    assert ("instruct/filtered-full", f"responses/{model}", f"examination/{model}") in graph.jobs(cpu)
    assert merge in graph.jobs(cpu) and merge not in graph.jobs(paper)
    assert all(len(job) == 1 for job in graph.jobs(cuda))


def test_the_longest_chain_is_the_most_urgent_but_notebook_03_waits_for_nothing_else(tmp_path):
    study = Study.open("mini", "mini-chat", 0, tmp_path)
    urgency = graph.urgency(study)
    of = {name: urgent for job, urgent in urgency.items() for name in job}
    for job in urgency:
        for needed in {needed for name in job for needed in study.inputs(name) if needed not in job}:
            assert of[needed] > of[job[0]], f"{needed} waits behind {job[0]}, which waits for it"
    assert min(urgency.values()) > 0 and of["base/llm"] == max(of.values())
    degradation = graph.read_by(study, "degradation")
    assert min(of[name] for name in degradation) > max(urgent for name, urgent in of.items() if name.startswith("safety/"))


def test_raw_tables_have_one_row_per_item_model_and_judge(study):
    for name, raw in raw_tables(study).items():
        assert not raw.duplicated(["item", "model", "judge"]).any(), name
    full = raw_tables(study)["examination/instruct.filtered-full"].query("exam == 'full'")
    assert set(full["benchmark"]) == set(BENCHMARKS)
    assert full["model"].unique().tolist() == ["mini-chat/instruct/filtered-full"]
    text_only = raw_tables(study)["examination/parent.aligned"]
    assert set(text_only["benchmark"]) == {"sorry_bench", "wildjailbreak", "xstest", "capability"}


def test_text_answers_do_not_move_during_stage_1(study):
    raw = raw_tables(study)
    parent = raw["examination/parent.aligned"].query("benchmark == 'sorry_bench' and judge == 'world'")
    stage_1 = raw["examination/projector.filtered"].query("benchmark == 'sorry_bench' and judge == 'world' and exam == 'full'")
    both = parent.merge(stage_1, on="item")
    assert len(both) and (both["label_x"] == both["label_y"]).all()


def test_gallery_writes_every_artefact(study, figures, tmp_path):
    written = {path.name for path in figures.iterdir()}
    assert {"T01_filtering_audit.csv", "T01_guard_quality.md", "T02_degradation.csv", "F01_guard_scores.png"} <= written
    assert {"F02_dynamics.png", "F02_dynamics.pdf", "F02_dynamics.csv", "provenance.json"} <= written
    assert {"T05_safety_tuning.md", "T05_transfer.csv", "T05_checkpoints.csv", "F05_tradeoff.png"} <= written
    assert {"F06_exaggerated_refusal.png", "F06_exaggerated_refusal.csv"} <= written
    assert {"F07_layer_similarity.pdf", "F08_layers_over_steps.png", "F09_localisation.csv", "F10_transplants.png"} <= written
    assert {"F10_against_random.md", "F11_objectives.png", "F11_prediction.csv", "F04_doses.png"} <= written
    assert {"F03_categories.png", "F03_categories.pdf", "F03_categories.csv"} <= written
    assert {
        f"{name}.{kind}" for name in ("T03_arms", "T03_arms_over_seeds", "T04_confounds") for kind in ("csv", "md")
    } <= written
    noted = {(run["stage"], run["recipe"]) for run in json.loads((figures / "provenance.json").read_text())}
    assert noted == {tuple(name.split("/")) for name in planned(study)}
    graft = pd.read_csv(figures / "F02_dynamics.csv").query("stage == 'projector' and step == 0 and measure == 'multimodal_asr'")
    assert len(graft) == 1
    runs = results.made_by([study], planned(study))
    gallery.make(results.results([study]), "nano", tmp_path, runs, results.missing([study]), only=["F02_dynamics"])
    assert (tmp_path / "F02_dynamics.png").read_bytes() == (figures / "F02_dynamics.png").read_bytes()


def test_mistakes_on_the_command_line_end_in_one_line(capsys):
    assert cli.main(["stage", "instruct/filtered-ful"]) == 2
    assert cli.main(["status", "--scale", "mimi"]) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2 and "instruct/filtered-full" in told[0] and "did you mean 'mini'" in told[1]


def _work(root):
    fingerprint_rng.seed()  # a forked process would name its temporary files as its parent will: they share the folder
    study = Study.open("nano", "mini-chat", 0, root)
    for name in EACH_KIND:
        study.folder(name)
    os._exit(0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_killed_anywhere_it_finishes_with_the_same_tables(study, tmp_path):
    """Six kills at random moments, then a run to the end: the tables equal the undisturbed ones. `make soak` has the whole graph.

    A process that is done before its kill is no kill: its run store is emptied and the next one starts from nothing.
    """
    rng, context = random.Random(0), multiprocessing.get_context("fork")
    made = {before for name in EACH_KIND for before in (*modelcards.lineage(study, name), name)}
    total = sum(store.read_manifest(study.run(name))["seconds"] for name in made)
    root, kills = tmp_path / "store", 0
    for _ in range(20):
        process = context.Process(target=_work, args=(root,))
        process.start()
        time.sleep(rng.uniform(0.1, total / 4))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        if process.exitcode == 0:
            shutil.rmtree(root)
        if kills == 6:
            break
    process = context.Process(target=_work, args=(root,))
    process.start()
    process.join()
    assert kills == 6 and process.exitcode == 0
    again = Study.open("nano", "mini-chat", 0, root)
    for name in EACH_KIND:
        pd.testing.assert_frame_equal(study.frame(name), again.frame(name))
    assert len(results.read([again], EACH_KIND, "raw.parquet")) > 100


def test_a_stage_of_other_scales_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="probe/seeing does not exist at the scale 'mini': only scales that load their models"):
        Study.open("mini", "mini-chat", 0, tmp_path).folder("probe/seeing")
