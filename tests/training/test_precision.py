"""bfloat16 weights with float32 masters: the losses of plain float32, and after a kill the same bits."""

import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from training.test_processes import DDP, FSDP, HERE, written
from trl.trainer import utils as trl_utils

from vlsafe.core.scale import LoraSpec, Preference
from vlsafe.models import checkpoints, trainable
from vlsafe.models.architectures import within
from vlsafe.training import launch, precision, trainers

STEPS = 50
LOW = {"dtype": "bfloat16", "saved": "bfloat16"}


def job(begun, folder, objective="sft", method="full", **changes):
    fit = dataclasses.replace(begun.scale.instruct, steps=STEPS, projector_rate=None, **{"grouped": True, **changes})
    preference = Preference(dataclasses.replace(fit, learning_rate=1e-4)) if objective == "dpo" else None
    fit = preference.fit if preference else fit
    start = begun.checkpoints("projector/filtered")[-1]
    return launch.Job(objective, method, str(start), str(folder), fit, LoraSpec(), 0, (25, STEPS), preference=preference)


def losses(of, data, stop=None):
    """Losses; with `stop`, of a training that was killed there and went on."""

    def progress(step):
        if step == stop:
            raise KeyboardInterrupt

    if stop:
        with pytest.raises(KeyboardInterrupt):
            launch.trained(of, data, progress, Path("/"))
    history, _ = launch.trained(of, data, lambda step: None, Path("/"))
    return [record["loss"] for record in history]


def noted(what, low, plain):
    print(f"{what}: losses {apart(low, plain):.2%} apart at most")


def apart(one, other):
    """The largest difference between losses, as a share of them."""
    return np.abs(np.subtract(one, other) / other).max()


@pytest.mark.parametrize(
    ("method", "kind"),
    [("full", "steps of either"), ("lora", "steps of either"), ("projector", "pictures"), ("full", "text"), ("full", "mixed")],
)
def test_losses_are_those_of_float32(begun, rows, tmp_path, method, kind):
    """Steps of text and of pictures, of text alone, of both in a batch; the projector, which text does not reach, on pictures."""
    wanted = {"pictures": (True,), "text": (False,)}.get(kind, (True, False))
    data, grouped = rows.select([at for at, n in enumerate(rows["pictures"]) if bool(n) in wanted]), kind != "mixed"
    plain = losses(job(begun, tmp_path / "plain", method=method, grouped=grouped), data)
    low = losses(job(begun, tmp_path / "low", method=method, grouped=grouped, **LOW), data)
    noted(f"SFT {method}, {kind}, one process", low, plain)
    assert len(low) == STEPS and low[-1] != plain[-1] and apart(low, plain) < 0.01


@pytest.mark.parametrize("kind", ["pictures", "text", "mixed"])
def test_preferences_are_learned_as_in_float32(begun, all_pairs, tmp_path, kind):
    """At the first step policy and reference are the same weights in both dtypes."""
    plain = losses(job(begun, tmp_path / "plain", "dpo", batch_size=8, micro_batches=1), all_pairs[kind])
    low = losses(job(begun, tmp_path / "low", "dpo", batch_size=8, micro_batches=1, **LOW), all_pairs[kind])
    noted(f"DPO full, {kind}, one process", low, plain)
    assert plain[0] == low[0] == pytest.approx(np.log(2), abs=1e-6)
    assert min(plain) < 0.65 < plain[0] and low != plain and apart(low, plain) < 0.01


@pytest.mark.parametrize("objective", ["sft", "dpo"])
@pytest.mark.parametrize(("autocast", "bound"), [(False, 2e-6), (True, 0.01)])
def test_a_cpu_scores_labelled_tokens_alone(begun, rows, pairs, tmp_path, monkeypatch, objective, autocast, bound):
    """As a GPU does, where the vocabulary is large; the losses are those of a training that scores all."""
    kernel, flash = trl_utils._ChunkedLogProbFunction, torch.backends.cuda.flash_sdp_enabled
    found, scored, fused = {}, dict.fromkeys((10**6, 1), 0), {}
    for large in scored:

        def apply(hidden, *more, large=large):
            scored[large] += len(hidden)
            fused[large] = flash()
            return kernel.apply(hidden, *more)

        monkeypatch.setattr(trl_utils, "_ChunkedLogProbFunction", SimpleNamespace(apply=apply))
        monkeypatch.setattr(trainers, "LARGE", large)
        of = job(begun, tmp_path / str(large), objective, batch_size=8, micro_batches=1, autocast=autocast)
        of = dataclasses.replace(of, fit=dataclasses.replace(of.fit, steps=6), milestones=(6,))
        found[large] = losses(of, pairs if objective == "dpo" else rows)
    assert apart(found[1], found[10**6]) < bound and 0 < scored[1] < scored[10**6] / 2
    assert fused == {10**6: True, 1: not autocast} and flash()


@pytest.mark.processes
@pytest.mark.parametrize("objective", ["sft", "dpo"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_train_as_one(begun, rows, pairs, tmp_path, monkeypatch, kind, objective, forked):
    """Whole weights with masters of their own (DDP), shards that are gathered in bfloat16 (FSDP2): within 1 % of float32; what
    goes on from the checkpoint in the middle ends with the same bits."""
    monkeypatch.setattr(launch, "WORKER", (str(HERE / "sharded_worker.py"),) if kind == "fsdp2" else launch.WORKER)
    data, rest = (pairs, {"batch_size": 8, "micro_batches": 1}) if objective == "dpo" else (rows, {})
    plain = losses(job(begun, tmp_path / "plain", objective, **rest), data)
    rest |= {"launch": written(tmp_path, FSDP if kind == "fsdp2" else DDP), **LOW}
    low = losses(job(begun, tmp_path / "low", objective, **rest), data)
    noted(f"{objective.upper()} full, two processes ({kind})", low, plain)
    assert low != plain and apart(low, plain) < 0.01
    (tmp_path / "again").mkdir()
    shutil.copytree(tmp_path / "low" / "checkpoint-25", tmp_path / "again" / "checkpoint-25")
    assert losses(job(begun, tmp_path / "again", objective, **rest), data) == low
    one, other = (load_file(tmp_path / name / f"checkpoint-{STEPS}" / "model.safetensors") for name in ("low", "again"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.processes
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_gradients_of_head_and_projector_are_summed_over_micro_batches_and_processes(
    begun, rows, tmp_path, monkeypatch, kind, forked
):
    """AdamW's first moment after one step is a tenth of the gradient; the head is not tied to the embedding here."""
    monkeypatch.setattr(launch, "WORKER", (str(HERE / "sharded_worker.py"),) if kind == "fsdp2" else launch.WORKER)
    small = begun.checkpoints("projector/filtered")[-1]
    processor = checkpoints.load_processor(small)
    torch.manual_seed(0)
    language = dataclasses.replace(begun.scale.language, tied_head=False, vocabulary=len(processor.tokenizer))
    model = checkpoints.random_graft(language, begun.scale.vision, loaded=False, device="cpu")
    model.config.image_token_id = processor.tokenizer.image_token_id
    checkpoints.save(model, tmp_path / "start", processor)
    pictured, found = rows.select([at for at, n in enumerate(rows["pictures"]) if n]), {}
    for name, more in {"one": {}, "one low": LOW, "two": {}, "two low": LOW}.items():
        where = {"launch": written(tmp_path, FSDP if kind == "fsdp2" else DDP)} if name.startswith("two") else {}
        of = job(begun, tmp_path / name, micro_batches=2, **where, **more)
        of = dataclasses.replace(of, start=str(tmp_path / "start"), milestones=(1,), fit=dataclasses.replace(of.fit, steps=1))
        launch.trained(of, pictured, lambda step: None, Path("/"))
        found[name] = moments(tmp_path / name / "checkpoint-1", trainable.choose(model, "full", LoraSpec()))
    for part in ("lm_head.weight", "model.multi_modal_projector.linear_1.weight", "model.multi_modal_projector.linear_2.weight"):
        gradients = {name: each[part] for name, each in found.items()}
        assert gradients["one"].norm() > 0
        for name, bound in (("two", 1e-5), ("one low", 0.02), ("two low", 0.02)):
            off = (gradients[name] - gradients["one"]).norm() / gradients["one"].norm()
            print(f"{part}, {kind}, {name}: {off:.1e} of the gradient")
            assert off < bound, (part, name)


def moments(checkpoint, model):
    """AdamW's first moments by weight, of whole weights or of sharded ones, whose names are in the file."""
    [file] = [checkpoint / name for name in ("optimizer.pt", "optimizer.bin") if (checkpoint / name).exists()]
    state = torch.load(file, weights_only=True)["state"]
    moving = [name for name, weight in model.named_parameters() if weight.requires_grad]
    names = sorted(moving, key=lambda name: within(name, "projector"))  # as the optimiser's groups are
    return {name: (state[name] if name in state else state[at])["exp_avg"].float() for at, name in enumerate(names)}


@pytest.mark.parametrize(
    ("plain", "recomputed", "best", "tries"),
    [
        ({1: 10, 2: 12, 4: 24}, {}, (2, False), 3),  # four rows save nothing, memory is not short: nothing is recomputed
        ({1: 10, 2: 18, 4: None}, {2: 20, 4: 32, 8: 64}, (4, True), 6),  # recomputing begins where memory ended
        ({1: 10, 2: None}, {1: 14, 2: 25, 4: 50}, (1, False), 5),
        ({1: None}, {1: 14, 2: None}, (1, True), 3),
        ({1: 10, 2: 16, 4: 28, 8: 50}, {}, (8, False), 4),  # no more rows than there are
    ],
)
def test_a_trial_keeps_the_fastest_that_fits(monkeypatch, plain, recomputed, best, tries):
    tried, taken = [], {False: plain, True: recomputed}
    model = mock.MagicMock()
    model.activation_checkpointing_enable.side_effect = lambda: tried.append("recompute")
    monkeypatch.setattr(precision, "keep_out_of_tower", lambda model: None)
    for name in ("max_memory_allocated", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)

    def seconds(_, many, loss):
        tried.append(many)
        return taken["recompute" in tried][many]

    monkeypatch.setattr(precision, "_seconds", seconds)
    found = precision.tried(model, lambda many: many, None, 8)
    assert found[:2] == best and len([each for each in tried if each != "recompute"]) == tries


def test_nothing_fits(monkeypatch):
    monkeypatch.setattr(precision, "keep_out_of_tower", lambda model: None)
    monkeypatch.setattr(precision, "_seconds", lambda *_: None)
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)
    with pytest.raises(torch.OutOfMemoryError, match="not even one row"):
        precision.tried(mock.MagicMock(), lambda many: many, None, 8)


def test_gradients_are_summed_in_float32():
    """Every weight's sum over the micro-batches is the float32 sum of its bfloat16 gradients, the head and the projector too."""
    model = nn.ModuleDict({"projector": nn.Linear(8, 8), "lm_head": nn.Linear(8, 16)})
    masters = precision.halve(model)
    inputs = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    sums = {name: torch.zeros(weight.shape) for name, weight in model.named_parameters()}
    for part in inputs.split(1):
        loss = model["lm_head"](model["projector"](part)).float().logsumexp(1).sum() * 1e-3
        for (name, _), one in zip(sums.items(), torch.autograd.grad(loss, list(masters), retain_graph=True), strict=True):
            assert one.dtype == torch.bfloat16
            sums[name] += one.float()
        loss.backward()
    rounded = {name: total.bfloat16().float() for name, total in sums.items()}
    for name, weight in model.named_parameters():
        assert weight.grad.dtype == torch.float32 and torch.equal(weight.grad, sums[name])
    assert any(not torch.equal(rounded[name], sums[name]) for name in sums)


def test_a_killed_training_goes_on_with_the_same_bits(begun, rows, tmp_path):
    whole = losses(job(begun, tmp_path / "whole", **LOW), rows)
    again = losses(job(begun, tmp_path / "again", **LOW), rows, stop=30)
    assert again == whole
    one, other = (load_file(tmp_path / name / f"checkpoint-{STEPS}" / "model.safetensors") for name in ("whole", "again"))
    assert all(torch.equal(one[name], other[name]) and one[name].dtype == torch.bfloat16 for name in one)
    states = [
        torch.load(tmp_path / name / f"checkpoint-{STEPS}" / "optimizer.pt", weights_only=True) for name in ("whole", "again")
    ]
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(*(s["masters"] for s in states), strict=True))
