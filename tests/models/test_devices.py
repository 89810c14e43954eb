"""Where models compute: the CPU for models that are built, also beside a GPU, unless the scale says otherwise."""

import dataclasses
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import NANO

from vlsafe.core.presets import PAPER, load_scale
from vlsafe.data import guards
from vlsafe.evaluation import judging
from vlsafe.models import checkpoints, devices
from vlsafe.study import graph
from vlsafe.study.study import Stage, Study, _prepared
from vlsafe.training import launch, processes, trainers


@pytest.fixture
def gpu(monkeypatch):
    """A machine that says it has a GPU, or says it has none."""

    def said(here):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: here)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: int(here))

    said(True)
    return said


CASES = {("build", ""): ("cpu", "cpu"), ("build", "cpu"): ("cpu", "cpu"), ("build", "cuda"): ("cuda", None),
         ("load", ""): ("cuda", "cpu"), ("load", "cpu"): ("cpu", "cpu"), ("load", "cuda"): ("cuda", None)}  # fmt: skip


@pytest.mark.parametrize("source, wanted", CASES)
def test_a_stage_computes_where_its_scale_says(source, wanted, gpu, tmp_path):
    scale = dataclasses.replace(NANO if source == "build" else PAPER, device=wanted, threads=1)
    study, stage = Study(scale, next(iter(scale.backbones)), 0, tmp_path), Stage(lambda study, work: seen(), (), None, 0)

    def seen():
        return devices.device(), devices.gpus()

    for here, expected in zip((True, False), CASES[source, wanted], strict=True):
        gpu(here)
        if expected is None:
            with pytest.raises(ValueError, match="says `device: cuda` and there is no GPU here"):
                _prepared(stage, study, tmp_path)
        else:
            assert _prepared(stage, study, tmp_path) == (expected, int(expected == "cuda"))
        assert devices.VARIABLE not in os.environ, "a stage leaves nothing behind"


def test_every_place_that_computes_asks_the_one_that_decides(gpu, monkeypatch, tmp_path):
    """With a GPU that is not really there: going to it would raise."""
    put = []
    model = type("Model", (), {"to": lambda self, place: put.append(place) or self, "eval": lambda self: self})()
    monkeypatch.setattr(checkpoints, "load", lambda *a, **k: model)
    monkeypatch.setattr(checkpoints, "load_processor", lambda folder: type("Tokenizer", (), {"pad_token": "p"})())
    monkeypatch.setattr(guards.AutoModelForCausalLM, "from_pretrained", lambda *a, **k: put.append(k["dtype"]) or model)
    monkeypatch.setattr(guards.AutoTokenizer, "from_pretrained", lambda *a, **k: None)
    monkeypatch.setattr(guards, "LlamaGuard", lambda *a: None)
    monkeypatch.setattr("vlsafe.evaluation.engines.complete", lambda *a: [("yes", None)])
    (tmp_path / "config.json").write_text("{}")
    judge = next(judge for judge in judging.LLM_JUDGES.values() if judge.raw)
    guard = {"origin": {"repo": "r", "revision": "main"}, "labels": [], "threshold": None, "batch_size": 1}

    def places():
        put.clear()
        checkpoints.ready(tmp_path)
        guards.load_guard(guard)
        list(judging.weights(tmp_path).complete(judge, [(("item", "x"), None, "a prompt")]))
        return put

    with devices.chosen_by(NANO):
        assert places() == ["cpu", torch.float32, "cpu", "cpu"]
        arguments = trainers._arguments(trainers.SFTConfig, NANO.instruct, tmp_path, 0, {})
        assert (arguments.use_cpu, arguments.bf16, arguments.gradient_checkpointing) == (True, False, False)
    with devices.chosen_by(PAPER):
        assert places() == ["cuda", torch.bfloat16, "cuda", "cuda"]


def test_nothing_else_asks_whether_there_is_a_gpu():
    """The doctor does, who says what is here."""
    package = Path(devices.__file__).parents[1]
    asking = {path.name for path in package.rglob("*.py") if "cuda.is_available" in path.read_text(encoding="utf-8")}
    assert asking == {"devices.py", "doctor.py"}


def test_a_launched_training_goes_by_the_same(gpu):
    configuration = {"num_processes": 8}
    with devices.chosen_by(PAPER):
        assert launch.process_count(configuration, {}) == 1, "a recipe for eight on a machine with one"
    with devices.chosen_by(dataclasses.replace(PAPER, device="cpu")):
        with pytest.raises(ValueError, match="or the scale says `device: cpu`"):
            launch.process_count(configuration, {})
        assert launch.process_count({**configuration, "use_cpu": True}, {}) == 8


def test_one_process_that_sees_several_gpus_is_stopped():
    """The library would copy the model to all of them and put as many times the rows into a step, without a word."""
    with pytest.raises(RuntimeError, match=r"one process sees 8 GPUs .* `vlsafe stage --gpus 1`"):
        processes.Guards().on_train_begin(SimpleNamespace(world_size=1, n_gpu=8), None, None, torch.nn.Linear(1, 1))
    processes.Guards().on_train_begin(SimpleNamespace(world_size=1, n_gpu=1), None, None, torch.nn.Linear(1, 1))


def test_an_unknown_device_is_refused_before_any_work(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump({"extends": "mini", "device": "gpu"}))
    with pytest.raises(ValueError, match=r"unknown scale\.device 'gpu'"):
        Study.open(path, "mini-chat", 0, tmp_path)


@pytest.mark.parametrize("scale, many", [("mini", 0), ("mini cuda", 1), ("paper", 8), ("paper cpu", 0)])
def test_the_scheduler_is_asked_for_gpus_where_models_compute_on_them(scale, many, tmp_path):
    name, _, device = scale.partition(" ")
    of = dataclasses.replace(load_scale(name), device=device)
    study = Study(of, next(iter(of.backbones)), 0, tmp_path)
    assert graph.needs(study, ("instruct/filtered-full",)).get("gpu", 0) == many
