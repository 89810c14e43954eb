"""Training on two processors over gloo: the same training as on one, and a stop where it would silently be another."""

import dataclasses
import json
import os
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from vlsafe import launch, processes, train
from vlsafe.scales import LoraSpec
from vlsafe.stages import Study, checkpoints, examples

EMBEDDING = "model.language_model.embed_tokens.weight"
HERE = Path(__file__).parent
ALONE = {"num_machines": 1, "machine_rank": 0, "use_cpu": True, "mixed_precision": "no", "num_processes": 2}
DDP = {**ALONE, "distributed_type": "MULTI_GPU"}
FSDP = {
    **ALONE,
    "distributed_type": "FSDP",
    "fsdp_config": {
        "fsdp_version": 2, "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "fsdp_reshard_after_forward": True,
        "fsdp_state_dict_type": "FULL_STATE_DICT", "fsdp_cpu_ram_efficient_loading": False, "fsdp_offload_params": False,
        "fsdp_activation_checkpointing": False,
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def loopback(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A NANO study up to stage 1."""
    made = Study.open("nano", "mini-chat", 0, tmp_path_factory.mktemp("cellar"))
    made.folder("projector/filtered")
    return made


@pytest.fixture(scope="module")
def rows(begun):
    """Rows with pictures and rows without, enough for steps of each."""
    return train.chat_dataset(examples(begun, "screen/filtered", "instructions.parquet"), with_images=True)


def job(begun, folder, **changes):
    start = checkpoints(begun, "projector/filtered")[-1]
    fit = dataclasses.replace(begun.scale.instruct, steps=6, projector_rate=None, grouped=True, **changes)
    return launch.Job("sft", "full", str(start), str(folder), fit, LoraSpec(), 0, (3, 6))


def written(tmp_path, configuration):
    path = tmp_path / "accelerate.yaml"
    path.write_text(yaml.safe_dump(configuration))
    return str(path)


def trained(of, data, steps=None, home=Path("/")):
    """Losses and final weights; killed after `steps` where these are given."""

    def progress(step):
        if steps and step >= steps:
            raise KeyboardInterrupt

    history, _ = launch.trained(of, data, progress, home)
    return [line["loss"] for line in history], load_file(Path(of.folder) / f"checkpoint-{of.fit.steps}" / "model.safetensors")


def apart(one, other):
    return max(float((one[key] - other[key]).abs().max()) for key in one)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_train_as_one_and_go_on_with_the_same_bits(begun, rows, tmp_path, monkeypatch, kind):
    """Losses within 2e-6 of one process; one whole checkpoint; a resumed training ends with the bits of an undisturbed one."""
    monkeypatch.setattr(launch, "WORKER", (str(HERE / "sharded_worker.py"),) if kind == "fsdp2" else launch.WORKER)
    alone, weights = trained(job(begun, tmp_path / "one"), rows)
    configuration = written(tmp_path, FSDP if kind == "fsdp2" else DDP)
    losses, whole = trained(job(begun, tmp_path / "two", launch=configuration), rows)
    assert len(losses) == 6 and np.abs(np.subtract(losses, alone)).max() < 2e-6
    assert set(whole) - set(weights) <= {"lm_head.weight"} and apart(weights, whole) < 1e-4
    assert torch.equal(whole.get("lm_head.weight", whole[EMBEDDING]), whole[EMBEDDING])  # tied; sharded, it is written twice
    folder = tmp_path / "two" / "checkpoint-3"
    noted = json.loads((folder / train.COMPLETE).read_text())
    assert {"model.safetensors", "rng_state_0.pth", "rng_state_1.pth"} <= set(noted)
    again = tmp_path / "again"
    again.mkdir()
    os.rename(folder, again / "checkpoint-3")
    resumed, ended = trained(job(begun, again, launch=configuration), rows)
    assert resumed == losses and all(torch.equal(whole[key], ended[key]) for key in whole)
