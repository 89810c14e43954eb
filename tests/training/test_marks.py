"""Checkpoints are marked beside the next steps, and count as complete only when they are."""

import json
import threading
from types import SimpleNamespace

import pytest

from vlsafe.training import checkpoints

PARTS = ("model.safetensors", "optimizer.pt", "rng_state.pth")


def saved(folder, step):
    """A checkpoint as the trainer has written it, without a mark."""
    place = folder / f"checkpoint-{step}"
    place.mkdir(parents=True)
    for name in PARTS:
        (place / name).write_text(f"{name} {step}")
    return place


def at(folder, step):
    return SimpleNamespace(output_dir=folder), SimpleNamespace(global_step=step, is_world_process_zero=True), SimpleNamespace()


def test_steps_go_on_while_digests_are_taken_and_the_next_save_waits(tmp_path, monkeypatch):
    plain, begun, go, order = checkpoints.file_digests, threading.Event(), threading.Event(), []

    def slowly(paths):
        begun.set()
        assert go.wait(60)
        order.append("marked")
        return plain(paths)

    monkeypatch.setattr(checkpoints, "file_digests", slowly)
    training = checkpoints.Milestones(frozenset({1, 3}), order.append)
    training.on_step_end(*at(tmp_path, 1))
    place = saved(tmp_path, 1)
    training.on_save(*at(tmp_path, 1))
    assert begun.wait(60)
    training.on_step_end(*at(tmp_path, 2))
    assert order == [1, 2] and not (place / checkpoints.COMPLETE).exists(), "a step was made meanwhile"
    threading.Timer(0.2, go.set).start()
    training.on_step_end(*at(tmp_path, 3))
    assert order == [1, 2, "marked", 3] and set(json.loads((place / checkpoints.COMPLETE).read_text())) == set(PARTS)
    saved(tmp_path, 3)
    training.on_save(*at(tmp_path, 3))
    training.close()
    assert checkpoints.last_complete(tmp_path).name == "checkpoint-3"


def test_a_checkpoint_is_incomplete_until_it_is_marked(tmp_path, caplog):
    checkpoints._mark_last([saved(tmp_path, 1)])
    unmarked = saved(tmp_path, 2)
    assert checkpoints.last_complete(tmp_path).name == "checkpoint-1" and not unmarked.exists()
    assert "checkpoint-2 is incomplete" in caplog.text


def test_what_goes_wrong_with_a_mark_ends_the_training(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "_mark", lambda place: (_ for _ in ()).throw(OSError("disk")))
    training = checkpoints.Milestones(frozenset({1, 2}), lambda step: None)
    saved(tmp_path, 1)
    training.on_save(*at(tmp_path, 1))
    with pytest.raises(OSError, match="disk"):
        training.on_step_end(*at(tmp_path, 2))


def test_no_file_of_an_older_checkpoint_is_read_again(tmp_path, monkeypatch):
    """Each file's digest is taken once, also where the training state of older ones is removed."""
    plain, taken = checkpoints.file_digests, []
    monkeypatch.setattr(checkpoints, "file_digests", lambda paths: [taken.extend(paths), plain(paths)][1])
    places = []
    for step in (1, 2, 3, 4):
        places.append(saved(tmp_path, step))
        checkpoints._mark_last(places)
    assert len(taken) == len(set(taken)) == 4 * len(PARTS)
    kept = [set(json.loads((place / checkpoints.COMPLETE).read_text())) for place in places]
    assert kept == [{"model.safetensors"}] * 2 + [set(PARTS)] * 2
    assert [{path.name for path in place.iterdir()} - {checkpoints.COMPLETE} for place in places] == kept
    (places[0] / checkpoints.COMPLETE).unlink()  # as a kill between removing and marking leaves it
    checkpoints._mark_last(places)
    assert set(json.loads((places[0] / checkpoints.COMPLETE).read_text())) == kept[0]
