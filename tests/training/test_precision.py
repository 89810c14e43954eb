"""bfloat16 weights with float32 masters: the losses of plain float32, and after a kill the same bits."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from training.test_processes import DDP, FSDP, HERE, begun, loopback, rows, written  # noqa: F401

from vlsafe.core.scale import LoraSpec, Preference
from vlsafe.core.schema import Pair, from_row
from vlsafe.training import datasets, launch

STEPS = 50
LOW = {"dtype": "bfloat16", "saved": "bfloat16"}


def job(begun, folder, objective="sft", method="full", **changes):  # noqa: F811
    fit = dataclasses.replace(begun.scale.instruct, steps=STEPS, projector_rate=None, grouped=True, **changes)
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


@pytest.fixture(scope="module")
def pairs(begun):  # noqa: F811
    found = [from_row(Pair, row) for row in begun.rows("world/corpora", "spa_vl.parquet")]
    return datasets.pair_dataset(found[:64], with_images=True)


def apart(one, other):
    """The largest difference between losses, as a share of them."""
    return np.abs(np.subtract(one, other) / other).max()


@pytest.mark.parametrize("method", ["full", "lora", "projector"])
def test_losses_are_those_of_float32(begun, rows, tmp_path, method):  # noqa: F811
    """Steps of text and of pictures; the projector, which text does not reach, on pictures alone."""
    data = rows.filter(lambda row: row["pictures"]) if method == "projector" else rows
    plain = losses(job(begun, tmp_path / "plain", method=method), data)
    low = losses(job(begun, tmp_path / "low", method=method, **LOW), data)
    assert len(low) == STEPS and low[-1] != plain[-1] and apart(low, plain) < 0.01


def test_preferences_are_learned_as_in_float32(begun, pairs, tmp_path):  # noqa: F811
    """At the first step policy and reference are the same weights in both dtypes."""
    plain = losses(job(begun, tmp_path / "plain", "dpo", batch_size=8, micro_batches=1), pairs)
    low = losses(job(begun, tmp_path / "low", "dpo", batch_size=8, micro_batches=1, **LOW), pairs)
    assert plain[0] == low[0] == pytest.approx(np.log(2), abs=1e-6)
    assert min(plain) < 0.6 and np.abs(np.subtract(low, plain)).mean() < 0.01


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_train_as_one(begun, rows, tmp_path, monkeypatch, kind):  # noqa: F811
    """Whole weights with masters of their own (DDP), shards that are gathered in bfloat16 (FSDP2): within 1 % of float32."""
    monkeypatch.setattr(launch, "WORKER", (str(HERE / "sharded_worker.py"),) if kind == "fsdp2" else launch.WORKER)
    plain = losses(job(begun, tmp_path / "plain"), rows)
    configuration = written(tmp_path, FSDP if kind == "fsdp2" else DDP)
    low = losses(job(begun, tmp_path / "low", launch=configuration, **LOW), rows)
    assert low != plain and apart(low, plain) < 0.01


def test_a_killed_training_goes_on_with_the_same_bits(begun, rows, tmp_path):  # noqa: F811
    whole = losses(job(begun, tmp_path / "whole", **LOW), rows)
    again = losses(job(begun, tmp_path / "again", **LOW), rows, stop=30)
    assert again == whole
    one, other = (load_file(tmp_path / name / f"checkpoint-{STEPS}" / "model.safetensors") for name in ("whole", "again"))
    assert all(torch.equal(one[name], other[name]) and one[name].dtype == torch.bfloat16 for name in one)
    states = [
        torch.load(tmp_path / name / f"checkpoint-{STEPS}" / "optimizer.pt", weights_only=True) for name in ("whole", "again")
    ]
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(*(s["masters"] for s in states), strict=True))
