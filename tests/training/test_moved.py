"""Checkpoints of a training that moves the projector alone hold it and nothing else; finished models are whole."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from training.test_processes import DDP, FSDP, HERE, job, written

from vlsafe.models import checkpoints as models
from vlsafe.training import checkpoints, launch

MODEL = "model.safetensors"


def stage_1(begun, folder, **changes):
    return dataclasses.replace(job(begun, folder, **changes), method="projector", milestones=(3, 6))


@pytest.fixture(scope="module")
def pictured(rows):
    return rows.select([at for at, n in enumerate(rows["pictures"]) if n])


def trained(of, data):
    return [record["loss"] for record in launch.trained(of, data, lambda step: None, Path("/"))[0]]


@pytest.mark.parametrize("low", [{}, {"dtype": "bfloat16", "saved": "bfloat16"}])
def test_finished_models_are_those_of_whole_checkpoints(begun, pictured, tmp_path, monkeypatch, low):
    """Byte for byte, and with the same bits after a resumption."""
    of = stage_1(begun, tmp_path / "part", **low)
    losses = trained(of, pictured)
    held = load_file(tmp_path / "part" / "checkpoint-3" / MODEL)
    assert held and all("multi_modal_projector" in name for name in held)
    again = tmp_path / "again" / "checkpoint-3"
    shutil.copytree(tmp_path / "part" / "checkpoint-3", again)
    assert trained(dataclasses.replace(of, folder=str(again.parent)), pictured) == losses
    monkeypatch.setattr(launch, "moved_alone", lambda model: model)
    assert trained(dataclasses.replace(of, folder=str(tmp_path / "whole")), pictured) == losses
    assert (tmp_path / "whole" / "checkpoint-3" / MODEL).stat().st_size > 5 * (again / MODEL).stat().st_size
    start, ended = Path(of.start), {}
    for name in ("part", "again", "whole"):
        folders = checkpoints.settle(tmp_path / name, models.load_processor(start), start, of.fit.saved)
        ended[name] = [(folder / MODEL).read_bytes() for folder in folders]
        assert [folder.name for folder in folders] == ["step-000003", "step-000006"]
        assert not [path for folder in folders for path in folder.glob("moved*")] and models.load(folders[-1])
    assert ended["part"] == ended["again"] == ended["whole"] and ended["part"][0] != ended["part"][1]


@pytest.mark.processes
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_go_on_from_the_projector_alone(begun, pictured, tmp_path, monkeypatch, kind, forked):
    monkeypatch.setattr(launch, "WORKER", (str(HERE / "sharded_worker.py"),) if kind == "fsdp2" else launch.WORKER)
    alone = trained(stage_1(begun, tmp_path / "one"), pictured)
    of = stage_1(begun, tmp_path / "two", launch=written(tmp_path, FSDP if kind == "fsdp2" else DDP))
    losses = trained(of, pictured)
    assert losses == pytest.approx(alone, abs=2e-6)
    shutil.copytree(tmp_path / "two" / "checkpoint-3", tmp_path / "again" / "checkpoint-3")
    assert trained(dataclasses.replace(of, folder=str(tmp_path / "again")), pictured) == losses
    one, other = (load_file(tmp_path / name / "checkpoint-6" / MODEL) for name in ("two", "again"))
    assert len(one) == 4 and all(torch.equal(one[name], other[name]) for name in one)


def test_a_checkpoint_that_lost_a_weight_is_not_finished(begun, tmp_path):
    start = begun.checkpoints("projector/filtered")[0]
    place = tmp_path / "checkpoint-3"
    shutil.copytree(start, place)
    moved = {name: w for name, w in load_file(start / MODEL).items() if "projector" in name}
    save_file({name: weight for name, weight in moved.items() if "linear_2.bias" not in name}, place / MODEL)
    (place / checkpoints.MOVED).write_text(json.dumps(sorted(moved)))
    with pytest.raises(ValueError, match=r"checkpoint-3 does not hold .*linear_2.bias, which was trained"):
        checkpoints.settle(tmp_path, None, start)
    assert place.exists()
