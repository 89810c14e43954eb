"""Checkpoints of a training run: written at chosen steps, valid only when complete, resumable, at the end plain model folders."""

from __future__ import annotations

import functools
import json
import logging
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel
from safetensors.torch import load_file
from transformers import GenerationConfig, TrainerCallback

from vlsafe.core.store import file_digests, write_text
from vlsafe.models.checkpoints import in_memory_layout, load, save

Progress = Callable[[int], None]
COMPLETE = "complete.json"
MOVED = "moved.json"  # names of the weights that a checkpoint holds, where it holds those alone that were trained
AT_ONCE = "at-once.json"  # rows at once and recomputation that a trial has found on this GPU
OPTIMISER = ("optimizer.pt", "optimizer.bin")  # of full and of sharded weights; one of them is needed to resume
TRAINING_STATE = (*OPTIMISER, "pytorch_model_fsdp.bin", "scheduler.pt", "rng_state*.pth", "training_args.bin", COMPLETE)
RESUMABLE = 2  # newest checkpoints that keep their training state; at seven billion weights that is 90 GB each


class Milestones(TrainerCallback):
    """Report every step; at chosen ones save a checkpoint and mark it complete, with the digests of its files.

    Digests are taken beside the next steps, and none are left to be taken when the next checkpoint is written or training ends;
    of a training that is killed before, the checkpoint counts as incomplete.
    """

    def __init__(self, steps: frozenset[int], progress: Progress) -> None:
        self.steps, self.progress = steps, progress
        self.marking, self.mark = ThreadPoolExecutor(1), Future[None]()
        self.mark.set_result(None)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_save = state.global_step in self.steps
        if control.should_save:
            self.mark.result()
        self.progress(state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        PartialState().wait_for_everyone()  # each process writes its own random state
        if state.is_world_process_zero:
            self.mark = self.marking.submit(_mark_last, _checkpoints(Path(args.output_dir)))

    def close(self) -> None:
        """Wait for the last mark. Raises:   what went wrong with it"""
        self.marking.shutdown()
        self.mark.result()


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))


def _mark_last(checkpoints: Sequence[Path]) -> None:
    """Mark the last checkpoint; then remove the training state of those that nobody goes on from."""
    _mark(checkpoints[-1])
    for older in checkpoints[:-RESUMABLE]:
        if (mark := older / COMPLETE).exists():
            files = json.loads(mark.read_text(encoding="utf-8"))
            if set(OPTIMISER) & set(files):
                _strip(older)
                write_text(mark, json.dumps({name: digest for name, digest in files.items() if (older / name).exists()}))
        else:
            _mark(older)  # a kill came between the two lines above


def _mark(checkpoint: Path) -> None:
    files = [path for path in sorted(checkpoint.iterdir()) if path.is_file() and path.name != COMPLETE]
    write_text(checkpoint / COMPLETE, json.dumps({p.name: d for p, d in zip(files, file_digests(files), strict=True)}))


def _strip(checkpoint: Path) -> None:
    """Remove the training state. The mark goes first: a kill in between leaves no mark, never a wrong one."""
    for pattern in reversed(TRAINING_STATE):
        for file in checkpoint.glob(pattern):
            file.unlink()


def last_complete(folder: Path) -> Path | None:
    """The latest checkpoint from which training can resume, its files unchanged. Incomplete ones after it are removed."""
    for checkpoint in reversed(_checkpoints(folder)):
        mark = checkpoint / COMPLETE
        files = json.loads(mark.read_text(encoding="utf-8")) if mark.exists() else {}
        paths = [checkpoint / name for name in files]
        if files and all(path.exists() for path in paths) and file_digests(paths) == [*files.values()]:
            if set(OPTIMISER) & set(files):
                return checkpoint
            continue  # older: only its weights were kept
        message = "%s is incomplete (writing was interrupted, or a file has changed); resuming from the one before"
        logging.getLogger(__name__).warning(message, checkpoint.name)
        shutil.rmtree(checkpoint)
    return None


def moved_alone(model: Any) -> Any:
    """Make checkpoints of a model hold the weights that are trained and no others, which are those that it starts from."""
    model.save_pretrained = functools.partial(_save_moved, model, in_memory_layout(model).save_pretrained)
    return model


def _save_moved(model: Any, save_all: Callable[..., None], folder: str, state_dict: Any = None, **options: Any) -> None:
    weights = model.state_dict() if state_dict is None else state_dict
    moved = {name: weights[name] for name, weight in model.named_parameters() if weight.requires_grad}
    names = sorted(moved)
    save_all(folder, state_dict=moved, **options)  # which empties it
    write_text(Path(folder) / MOVED, json.dumps(names))


def _whole(checkpoint: Path, start: Path) -> Any:
    """The model of a checkpoint, of which adapters or the weights that moved may be all that it holds."""
    if (checkpoint / "adapter_config.json").exists():
        return PeftModel.from_pretrained(load(start), checkpoint).merge_and_unload()
    if not (checkpoint / MOVED).exists():
        return load(checkpoint)
    model, moved = load(start), load_file(checkpoint / "model.safetensors")
    if lost := set(json.loads((checkpoint / MOVED).read_text(encoding="utf-8"))) ^ set(moved):
        raise ValueError(f"{checkpoint.name} does not hold {min(lost)}, which was trained")
    model.load_state_dict(moved, strict=False)
    model.config = type(model.config).from_pretrained(checkpoint)  # the trainer notes tokens' ids in both
    model.generation_config = GenerationConfig.from_pretrained(checkpoint)
    return model


def settle(folder: Path, processor: Any, start: Path, saved: str = "float32") -> list[Path]:
    """Turn a finished training run's checkpoints into plain model folders `step-000025`, without training state.

    Adapters are merged into the model in the folder `start`, on which they were trained, and weights that moved alone are put
    into it. After a kill, the same call continues.
    """
    settled, beside = [], folder / "settling"
    for checkpoint in _checkpoints(folder):
        source, part = checkpoint, any((checkpoint / name).exists() for name in ("adapter_config.json", MOVED))
        if part or saved != "float32":  # written to another folder: the checkpoint stays until the result is complete
            shutil.rmtree(beside, ignore_errors=True)
            save(_whole(checkpoint, start).to(getattr(torch, saved)), source := beside)
        else:
            _strip(checkpoint)
        processor.save_pretrained(source)
        target = folder / f"step-{int(checkpoint.name.split('-')[1]):06d}"
        shutil.rmtree(target, ignore_errors=True)  # of an earlier attempt that was killed after this line
        settled.append(source.rename(target))
        if source is beside:
            shutil.rmtree(checkpoint)
    (folder / AT_ONCE).unlink(missing_ok=True)
    return settled
