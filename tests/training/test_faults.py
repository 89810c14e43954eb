"""What goes wrong on real machines: each ends in a message that says what to do, and in a rerun with the same result."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from training.test_processes import DDP, job, trained, written

from vlsafe import cli
from vlsafe.core import store
from vlsafe.core.scale import as_plain
from vlsafe.study.study import Study
from vlsafe.training import checkpoints, datasets, launch


def workers(process):
    """The training processes below a process."""
    found = []
    for child in process.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            found += [child] if "vlsafe.training.launch" in child.cmdline() else []
    return found


@pytest.mark.processes
def test_a_killed_trainer_is_told_and_its_rerun_ends_with_the_same_bits(begun, rows, tmp_path, caplog):
    """One of two processes is killed after the first checkpoint; then what it left is cut short as well."""
    configuration = written(tmp_path, DDP)
    losses, whole = trained(job(begun, tmp_path / "whole", launch=configuration), rows)
    victims = []

    def kill(step):
        if step >= 4 and not victims and (running := workers(psutil.Process())):
            victims.append(running[-1].pid)
            os.kill(running[-1].pid, signal.SIGKILL)

    cut = job(begun, tmp_path / "cut", launch=configuration)
    with pytest.raises(
        ChildProcessError, match=r"2 training processes of accelerate.yaml ended with code .* resumes from the last"
    ):
        launch.trained(cut, rows, kill, Path("/"))
    assert victims
    resumed, ended = trained(cut, rows)
    assert resumed == losses and all(torch.equal(whole[key], ended[key]) for key in whole)


def test_a_checkpoint_that_was_cut_short_is_named_and_left_behind(begun, rows, tmp_path, caplog):
    of = job(begun, tmp_path / "cut")
    losses, whole = trained(of, rows)
    weights = tmp_path / "cut" / "checkpoint-6" / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    resumed, ended = trained(of, rows)
    assert "checkpoint-6 is incomplete" in caplog.text
    assert resumed == losses and all(torch.equal(whole[key], ended[key]) for key in whole)


@pytest.mark.processes
def test_one_process_of_two_looks_for_checkpoints_and_removes_what_is_incomplete(begun, rows, tmp_path, capfd):
    cut = job(begun, tmp_path / "cut", launch=written(tmp_path, DDP))
    (tmp_path / "cut" / "checkpoint-2").mkdir(parents=True)
    trained(cut, rows)
    assert capfd.readouterr().err.count("checkpoint-2 is incomplete") == 1


@pytest.mark.processes
def test_trainers_die_with_the_stage_that_started_them(begun, rows, tmp_path):
    """A stage that is killed must not leave processes behind that write into the folder of its successor."""
    of = job(begun, tmp_path / "x", launch=written(tmp_path, DDP))
    datasets.save(rows, tmp_path / "rows")
    (tmp_path / "of.json").write_text(json.dumps(as_plain(of)))
    code = (
        "import sys; from pathlib import Path; from vlsafe.training import datasets, launch; "
        f"launch.trained(launch.Job.read(Path(r'{tmp_path}/of.json')), datasets.load(r'{tmp_path}/rows'), print, Path('/'))"
    )
    stage = subprocess.Popen([sys.executable, "-u", "-c", code], stdout=subprocess.PIPE)  # else the step is told at the end
    stage.stdout.readline()  # a first step was made
    family = psutil.Process(stage.pid).children(recursive=True)
    assert len(workers(psutil.Process(stage.pid))) >= 2
    stage.kill()
    stage.communicate()
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive


@pytest.fixture
def small_disk(tmp_path):
    """A disk of its own that can be filled; it takes the right to mount."""
    place = tmp_path / "disk"
    place.mkdir()
    if shutil.which("mount") is None or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", place]).returncode:
        pytest.skip("a full disk: this user may not mount one")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_full_disk_is_told_and_a_rerun_with_room_completes(begun, small_disk, capsys):
    shutil.copytree(begun.root, small_disk / "runs", ignore=shutil.ignore_patterns("projector"), copy_function=shutil.copy2)
    filler = small_disk / "filler"
    with open(filler, "wb") as file, pytest.raises(OSError):
        while True:
            file.write(b"0" * 2**20)
    filler.write_bytes(b"0" * (filler.stat().st_size - 2**19))  # room for the graft, and not for all finished models
    arguments = ["stage", "projector/filtered", "--scale", "nano", "--root", str(small_disk / "runs")]
    assert cli.main(arguments) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "disk is full" in message and "projector/filtered stopped; make room and run the same command again" in message
    filler.unlink()
    assert cli.main(arguments) == 0
    again = Study.open("nano", "mini-chat", 0, small_disk / "runs")
    assert store.status(again.run("projector/filtered"), deep=True) == "valid"
    for name in ("step-000002", "step-000005"):
        files = [(study.folder("projector/filtered") / name / "model.safetensors").read_bytes() for study in (begun, again)]
        assert files[0] == files[1]


def test_older_checkpoints_keep_their_weights_alone_and_the_newest_can_be_gone_on_from(begun, rows, tmp_path):
    of = job(begun, tmp_path / "x")
    trained(dataclasses.replace(of, milestones=(1, 2, 3, 4, 6)), rows)
    kept = {p.name: {f.name for f in p.iterdir()} for p in checkpoints._checkpoints(tmp_path / "x")}
    able = [name for name, files in kept.items() if set(checkpoints.OPTIMISER) & files]
    assert able == ["checkpoint-4", "checkpoint-6"] and all("model.safetensors" in files for files in kept.values())
    assert checkpoints.last_complete(tmp_path / "x").name == "checkpoint-6"


@pytest.mark.parametrize("place", ["digests", "the last checkpoint", "all are settled"])
def test_a_stage_killed_after_its_training_does_not_train_again(begun, tmp_path, monkeypatch, place):
    def killed(*_):
        raise KeyboardInterrupt

    def strip_and_die(checkpoint, plain=checkpoints._strip):
        plain(checkpoint)
        if checkpoint == checkpoints._checkpoints(checkpoint.parent)[-1]:
            raise KeyboardInterrupt

    def settle_and_die(*arguments, plain=checkpoints.settle):
        plain(*arguments)
        raise KeyboardInterrupt

    shutil.copytree(begun.root, tmp_path / "runs", copy_function=shutil.copy2)
    study = Study.open("nano", "mini-chat", 0, tmp_path / "runs")
    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        if place == "digests":
            context.setattr(store, "_manifest", killed)
        elif place == "the last checkpoint":
            context.setattr(checkpoints, "_strip", strip_and_die)
        else:
            context.setattr(checkpoints, "settle", settle_and_die)
        study.folder("instruct/filtered-full")
    monkeypatch.setattr(launch, "trained", lambda *arguments: pytest.fail("it trained again"))
    study.folder("instruct/filtered-full")
    assert store.status(study.run("instruct/filtered-full"), deep=True) == "valid"
