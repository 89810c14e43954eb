"""Two gloo processes that share a model's weights: each has its part of them alone, and the training is that of one."""

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from training.test_precision import job
from training.test_processes import FSDP, HERE, written

from vlsafe.models import checkpoints
from vlsafe.training import checkpoints as training_checkpoints
from vlsafe.training import launch

PART = 0.6  # of a model that one of two processes may hold


def sharded(of, tmp_path, monkeypatch):
    """The job on two processes that share its weights and report what they hold."""
    monkeypatch.setattr(launch, "WORKER", (str(HERE / "sharded_worker.py"),))
    monkeypatch.setenv("REPORT", str(tmp_path))
    fit = dataclasses.replace(of.fit, launch=written(tmp_path, FSDP))
    preference = dataclasses.replace(of.preference, fit=fit) if of.preference else None
    return dataclasses.replace(of, fit=fit, preference=preference)


def reports(tmp_path):
    return [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]


def preferences(begun, folder, method="full"):
    of = job(begun, folder, "dpo", method, batch_size=8, micro_batches=1)
    return dataclasses.replace(of, fit=dataclasses.replace(of.fit, steps=6), milestones=(3, 6))


@pytest.mark.processes
@pytest.mark.parametrize(
    ("method", "kind"), [("full", "pictures"), ("lora", "pictures"), ("sppft", "pictures"), ("full", "text")]
)
def test_each_process_gets_its_part_and_the_reference_is_the_policy(
    begun, all_pairs, tmp_path, monkeypatch, method, kind, forked
):
    """One process has weights to begin with, and the policy's and the reference's answers are the same in each at step 0. Of text
    the reference answers before the training, in other batches."""
    data = all_pairs[kind]
    of = dataclasses.replace(preferences(begun, tmp_path / "two", method), band=(0, 1))
    alone, _ = launch.trained(dataclasses.replace(of, folder=str(tmp_path / "one")), data, lambda step: None, Path("/"))
    history, _ = launch.trained(sharded(of, tmp_path, monkeypatch), data, lambda step: None, Path("/"))
    one, two = ([record["loss"] for record in each] for each in (alone, history))
    assert two[0] == pytest.approx(np.log(2), abs=1e-6) and np.abs(np.subtract(one, two)).max() < 2e-6 and two[-1] != two[0]
    noted = reports(tmp_path)
    assert [[line["empty"] for line in each] for each in noted] == [[False, False], [True, True]]
    assert all(line["stored"] <= PART * line["whole"] for each in noted for line in each)
    for policy, reference in noted:
        assert policy["log_probs"] and (kind == "text" or policy["log_probs"] == reference["log_probs"])
        assert policy["buffers"] == reference["buffers"] == noted[0][1]["buffers"]
    assert noted[0][0]["log_probs"] != noted[1][0]["log_probs"], "each has rows of its own"
    assert noted[0][0]["buffers"] == buffers(checkpoints.load(Path(of.start)))


def buffers(model):
    return {name: hashlib.sha256(held.numpy().tobytes()).hexdigest() for name, held in model.named_buffers()}


@pytest.mark.processes
@pytest.mark.parametrize("method", ["full", "lora"])
def test_killed_processes_go_on_with_the_same_bits(begun, pairs, tmp_path, monkeypatch, method, forked):
    of = dataclasses.replace(preferences(begun, tmp_path / "whole", method), milestones=(3, 5, 6))
    history, _ = launch.trained(of := sharded(of, tmp_path, monkeypatch), pairs, lambda step: None, Path("/"))
    cut = dataclasses.replace(of, folder=str(tmp_path / "cut"))
    monkeypatch.setenv("KILL_AT", "6")
    with pytest.raises(ChildProcessError, match="resumes from the last complete checkpoint"):
        launch.trained(cut, pairs, lambda step: None, Path("/"))
    monkeypatch.delenv("KILL_AT")
    assert training_checkpoints.last_complete(tmp_path / "cut").name in ("checkpoint-3", "checkpoint-5")
    resumed, _ = launch.trained(cut, pairs, lambda step: None, Path("/"))
    assert [record["loss"] for record in resumed] == [record["loss"] for record in history]
    name = "adapter_model.safetensors" if method == "lora" else "model.safetensors"
    one, other = (load_file(tmp_path / each / "checkpoint-6" / name) for each in ("whole", "cut"))
    assert one and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.processes
def test_a_process_never_has_the_whole_model_in_memory(begun, rows, tmp_path, monkeypatch, forked):
    """Over 600 MB of weights, of which a process that does not read them takes its half and what one weight needs on its way."""
    start = tmp_path / "start"
    small = begun.checkpoints("projector/filtered")[-1]
    processor = checkpoints.load_processor(small)
    language = dataclasses.replace(begun.scale.language, width=768, mlp=3072, layers=16, heads=8, key_value_heads=8,
                                   vocabulary=len(processor.tokenizer))  # fmt: skip
    model = checkpoints.random_graft(language, begun.scale.vision, loaded=False, device="cpu")
    model.config.image_token_id = processor.tokenizer.image_token_id
    checkpoints.save(model, start, processor)
    of = dataclasses.replace(job(begun, tmp_path / "two", method="projector"), start=str(start), milestones=())
    of = dataclasses.replace(of, fit=dataclasses.replace(of.fit, steps=1))
    pictured = rows.select([at for at, n in enumerate(rows["pictures"]) if n])
    launch.trained(sharded(of, tmp_path, monkeypatch), pictured, lambda step: None, Path("/"))
    [[reading], [other]] = reports(tmp_path)
    assert reading["whole"] > 600e6
    assert other["grown"] < 0.9 * other["whole"] and reading["grown"] > reading["whole"]
    assert max(reading["held"], other["held"]) < PART * reading["whole"]
