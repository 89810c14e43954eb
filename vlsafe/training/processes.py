"""Training on several processes: the order of the rows, and what must hold before the first step.

The sharding is `accelerate`'s and the loop the trainer's. Several ways of getting it wrong on LLaVA end in no error, only in
another model; each of them is refused here by name. This room knows neither what a row is about nor where a run lies.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from accelerate.utils import fsdp_utils
from filelock import FileLock, Timeout
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from vlsafe.core.scale import Fit
from vlsafe.models.architectures import final_norm

ASKED, LAUNCH = "VLSAFE_PROCESSES", "VLSAFE_SHARDED"  # what a launched trainer was asked to be; absent in an ordinary process


def world_size() -> int:
    """How many processes train together, this one included."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def sharded() -> bool:
    """Whether this is a process of a training that asked for sharded weights."""
    return os.environ.get(LAUNCH) == "1"


def micro_batches(fit: Fit, processes: int) -> int:
    """Into how many parts one step's rows are cut, one after another, so that no process takes more than `at_once`."""
    least = -(-fit.batch_size // (processes * fit.at_once)) if fit.at_once else 1
    return max(fit.micro_batches, least)


def per_process(fit: Fit, processes: int) -> int:
    """Rows of one micro-batch of one process.

    Raises:   ValueError where a step's rows cannot be shared out evenly
    """
    parts = micro_batches(fit, processes)
    rows, rest = divmod(fit.batch_size, parts * processes)
    if not rows or (rest and (processes > 1 or fit.grouped)):
        raise ValueError(
            f"{fit.batch_size} rows a step cannot be dealt to {processes} processes in {parts} micro-batches; "
            "change micro_batches, at_once, or the number of processes"
        )
    return rows


def grouped_order(
    lengths: Sequence[int], pictured: Sequence[bool], fit: Fit, processes: int, rng: np.random.Generator
) -> list[int]:
    """The rows of a whole training in order: every step of one modality, its micro-batches by length, dealt to the processes.

    Which rows share a step does not depend on their length, nor on the number of processes. Rows of a modality that do not
    fill a step wait for the next round.

    Shapes:   [N], [N]  ->  [steps * batch_size]
    Draws:    from `rng` only
    Source:   LLaVA's group_by_modality_length, which sorts within a step as well
    """
    waiting: dict[bool, list[int]] = {False: [], True: []}
    order: list[int] = []
    while len(order) < fit.steps * fit.batch_size:
        steps: list[list[int]] = []
        for row in rng.permutation(len(lengths)).tolist():
            rows = waiting[bool(pictured[row])]
            rows.append(row)
            if len(rows) == fit.batch_size:
                steps.append(sorted(rows, key=lambda i: (-lengths[i], i)))
                rows.clear()
        for at in rng.permutation(len(steps)):
            order += _dealt(steps[at], per_process(fit, processes), processes)
    return order[: fit.steps * fit.batch_size]


def _dealt(step: Sequence[int], rows: int, processes: int) -> list[int]:
    """Each micro-batch's rows, longest first, given to the processes in turn, so that all of them pad to about one length."""
    blocks = (step[at : at + rows * processes] for at in range(0, len(step), rows * processes))
    return [row for block in blocks for process in range(processes) for row in block[process::processes]]


def refuse_mixed(pictured: Sequence[bool], together: int) -> None:
    """Every `together` rows in a row, those that all processes work on at one time, must be of one modality.

    A sharded tower is gathered by all processes or by none: with pictures on some of them only, collectives of different
    kinds meet, which is a crash at best.

    Raises:   ValueError that names the first such rows
    """
    for at in range(0, len(pictured), together):
        if len(set(pictured[at : at + together])) > 1:
            raise ValueError(
                f"rows {at} to {at + together - 1} of the order mix pictures and plain text between processes; "
                "set `grouped: true` in this fit, which gives every step one modality"
            )


@contextlib.contextmanager
def head_with_norm(model: Any) -> Iterator[None]:
    """Have the output head sharded together with the language model's last norm.

    `accelerate` looks for that norm among the base model's own children, where a LLaVA has none, and shards the head by
    itself. TRL's fused loss reads the head's weight outside its forward; its gradient is then never summed over processes.
    """
    norm = final_norm(model)
    with mock.patch.object(fsdp_utils, "_find_final_norm", lambda _: norm):
        yield


class Guards(TrainerCallback):
    """Is this the training that was asked for?"""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Raises:   RuntimeError, before the first step, that says what is wrong and what to do"""
        asked, wanted = int(os.environ.get(ASKED, "1")), sharded()
        if args.world_size != asked:
            raise RuntimeError(
                f"{asked} processes were asked for and {args.world_size} is training: its steps would hold another number of "
                "rows. On processors use distributed_type MULTI_GPU with use_cpu; `accelerate launch --cpu` starts one process"
            )
        if wanted != any(isinstance(weight, DTensor) for weight in model.parameters()):
            raise RuntimeError(
                "the weights are {}: accelerate has turned FSDP {} without a word. Its configuration asks for {}, which it "
                "does on GPUs only".format(*(("whole", "off", "FSDP") if wanted else ("sharded", "on", "whole weights")))
            )
        if wanted:
            refuse_unsound_shards(model)


def refuse_unsound_shards(model: Any) -> None:
    """What breaks a sharded LLaVA without an error.

    Raises:   RuntimeError naming the weight
    """
    moving = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    if towers := [name for name in moving if "vision_tower" in name]:
        raise RuntimeError(f"{towers[0]} may move: features come from an earlier layer, the last one never has a gradient, and "
                           "the training could not be resumed; freeze the tower")  # fmt: skip
    if low := [name for name, weight in moving.items() if weight.dtype != torch.float32]:
        raise RuntimeError(f"{low[0]} is {moving[low[0]].dtype}: master weights are float32, only computing is in bfloat16")
    head, norm = model.get_output_embeddings(), final_norm(model)
    if head.weight.requires_grad and _unit(head) is not _unit(norm):
        raise RuntimeError("the output head is sharded apart from the last norm: its gradient would not be summed over processes")


def _unit(module: Any) -> Any:
    return module._get_fsdp_state() if isinstance(module, FSDPModule) else None


@contextlib.contextmanager
def claimed(many: int, folder: Path) -> Iterator[None]:
    """Keep to GPUs that no other stage of this run store uses. A cluster has chosen them already and says so in the environment;
    on one machine the scheduler knows how many are free but not which.

    Raises:   ValueError where the machine has fewer; RuntimeError where too many are taken
    """
    if not many or "CUDA_VISIBLE_DEVICES" in os.environ:
        yield
        return
    if many > (here := torch.cuda.device_count()):
        raise ValueError(f"{many} GPUs are needed and {here} are here; give the profile's `gpu` the right number")
    with contextlib.ExitStack() as held:
        mine: list[str] = []
        for number in range(here):
            with contextlib.suppress(Timeout):
                if len(mine) < many:
                    held.enter_context(FileLock(str(folder / f".gpu{number}.lock")).acquire(blocking=False))
                    mine.append(str(number))
        if len(mine) < many:
            raise RuntimeError(f"{many} GPUs are needed and only {len(mine)} of {here} are free in this run store")
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(mine)
        try:
            yield
        finally:
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)


def die_with_parent() -> None:
    """Let the kernel end this process when the one that started it is gone, however it went (Linux; elsewhere nothing)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
