"""Checkpoints of a training: at chosen steps, complete or not there at all, resumable, and in the end plain model folders."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel
from transformers import TrainerCallback

from vlsafe.core.store import file_digest, write_text
from vlsafe.models.checkpoints import load, save

COMPLETE = "complete.json"
OPTIMISER = ("optimizer.pt", "optimizer.bin")  # of whole and of sharded weights; the one is needed to go on
TRAINING_STATE = (*OPTIMISER, "pytorch_model_fsdp.bin", "scheduler.pt", "rng_state*.pth", "training_args.bin", COMPLETE)
RESUMABLE = 2  # newest checkpoints that keep what is needed to go on; at seven billion weights that is 90 GB each


class Milestones(TrainerCallback):
    """Ask for a checkpoint at chosen steps, and mark it complete, with digests, once it is whole."""

    def __init__(self, steps: frozenset[int]) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_save = state.global_step in self.steps

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        PartialState().wait_for_everyone()  # each process writes the state of its own random numbers
        if state.is_world_process_zero:
            _mark(Path(args.output_dir) / f"checkpoint-{state.global_step}")
            for older in _checkpoints(Path(args.output_dir))[:-RESUMABLE]:
                _strip(older)
                _mark(older)


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))


def _mark(checkpoint: Path) -> None:
    """Note that a checkpoint is whole, and what it is made of."""
    files = {p.name: file_digest(p) for p in sorted(checkpoint.iterdir()) if p.is_file() and p.name != COMPLETE}
    write_text(checkpoint / COMPLETE, json.dumps(files))


def _strip(checkpoint: Path) -> None:
    """Remove what only going on needs. The mark goes first: a kill in between leaves no mark, never a wrong one."""
    for pattern in reversed(TRAINING_STATE):
        for file in checkpoint.glob(pattern):
            file.unlink()


def last_complete(folder: Path) -> Path | None:
    """The latest checkpoint from which training can go on: all files as they were when it was finished. Broken ones are removed.

    Checkpoints that came before and have kept their weights alone are left; they are not looked into.
    """
    for checkpoint in reversed(_checkpoints(folder)):
        mark = checkpoint / COMPLETE
        files = json.loads(mark.read_text(encoding="utf-8")) if mark.exists() else {}
        if files and all((checkpoint / n).exists() and file_digest(checkpoint / n) == d for n, d in files.items()):
            if set(OPTIMISER) & set(files):
                return checkpoint
            continue
        logging.getLogger(__name__).warning(
            "%s is not whole (its writing was cut short, or it was changed); going on from the one before",
            checkpoint.name,
        )
        shutil.rmtree(checkpoint)
    return None


def settle(folder: Path, processor: Any, start: Path, saved: str = "float32") -> list[Path]:
    """Turn a finished training's checkpoints into plain model folders `step-000025`, without optimiser state.

    Checkpoints of adapters are merged into the model in the folder `start`, which they were trained on. Killed anywhere and
    called again, it loses none.
    """
    settled, beside = [], folder / "settling"
    for checkpoint in _checkpoints(folder):
        adapters, whole = (checkpoint / "adapter_config.json").exists(), checkpoint
        if adapters or saved != "float32":  # written beside: what it is made of is kept until it stands
            model = PeftModel.from_pretrained(load(start), checkpoint).merge_and_unload() if adapters else load(checkpoint)
            shutil.rmtree(beside, ignore_errors=True)
            save(model.to(getattr(torch, saved)), whole := beside)
        else:
            _strip(checkpoint)
        processor.save_pretrained(whole)
        target = folder / f"step-{int(checkpoint.name.split('-')[1]):06d}"
        shutil.rmtree(target, ignore_errors=True)  # of an earlier attempt that was killed after this line
        settled.append(whole.rename(target))
        if whole is beside:
            shutil.rmtree(checkpoint)
    return settled
