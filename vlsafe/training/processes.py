"""Training on several processes: the order of the rows, and what must hold before the first step.

`accelerate` shards and the trainer loops. Several mistakes on a LLaVA raise no error there and only train another model; each
of them is refused here by name.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any
from unittest import mock

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, fsdp_utils
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from vlsafe.core.scale import Fit
from vlsafe.models import devices
from vlsafe.models.architectures import block_names, final_norm, within

PROCESSES, SHARDED = "VLSAFE_PROCESSES", "VLSAFE_SHARDED"  # set for launched processes alone: how many, and whether sharded
OTHER_SHARDS = ("the weights are {}: accelerate has silently turned FSDP {}. Its configuration requests {}, which it does on "
                "GPUs only")  # fmt: skip
PATIENCE = timedelta(hours=1)  # that processes wait for each other: the first one reads and writes for all


def world_size() -> int:
    """How many processes train together, this one included."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def sharded() -> bool:
    """Whether this process was launched to train with sharded weights."""
    return os.environ.get(SHARDED) == "1"


def micro_batches(fit: Fit, processes: int) -> int:
    """Gradient accumulation steps: as many as the fit says; with `at_once`, so many more that no process takes over as many rows
    and none is left over."""
    parts = max(fit.micro_batches, -(-fit.batch_size // (processes * fit.at_once)) if fit.at_once else 1)
    while fit.at_once and parts * processes < fit.batch_size and fit.batch_size % (parts * processes):
        parts += 1
    return parts


def per_process(fit: Fit, processes: int) -> int:
    """Rows of one micro-batch of one process; ValueError where a step's rows cannot be split evenly."""
    parts = micro_batches(fit, processes)
    rows, rest = divmod(fit.batch_size, parts * processes)
    if not rows or rest:
        raise ValueError(f"{fit.batch_size} rows a step cannot be split over {processes} processes in {parts} micro-batches; "
                         "change micro_batches, at_once, or the number of processes")  # fmt: skip
    return rows


def grouped_order(lengths: Sequence[int], pictured: Sequence[bool], fit: Fit, processes: int,
                  rng: np.random.Generator) -> list[int]:  # fmt: skip
    """All rows of a training run in order: every step of one modality, its micro-batches by length, split over the processes.

    Which rows share a step depends neither on their length nor on the number of processes, only on `rng`. Rows of a modality
    that do not fill a step wait for the next epoch.

    Shapes:   [N], [N]  ->  [steps * batch_size]
    Source:   LLaVA's group_by_modality_length, which sorts within a step as well
    """
    order: list[int] = []
    waiting: dict[bool, list[int]] = {False: [], True: []}
    size = per_process(fit, processes) * processes
    while len(order) < fit.steps * fit.batch_size:
        steps: list[list[int]] = []
        for row in rng.permutation(len(lengths)).tolist():
            rows = waiting[bool(pictured[row])]
            rows.append(row)
            if len(rows) == fit.batch_size:
                steps.append(sorted(rows, key=lambda i: (-lengths[i], i)))
                rows.clear()
        for step in rng.permutation(len(steps)):
            for at in range(0, fit.batch_size, size):  # micro-batches, dealt out in turn: all pad to about one length
                order += [row for process in range(processes) for row in steps[step][at : at + size][process::processes]]
    return order[: fit.steps * fit.batch_size]


def refuse_mixed(pictured: Sequence[bool], together: int) -> None:
    """Refuse, by a ValueError, an order in which `together` successive rows, on which all processes work at one time, mix
    modalities: all gather a sharded tower or none, and with pictures on some only collectives do not match, a crash at best."""
    for at in range(0, len(pictured), together):
        if len(set(pictured[at : at + together])) > 1:
            raise ValueError(f"rows {at} to {at + together - 1} of the order mix pictures and plain text between processes; "
                             "set `grouped: true` in this fit, which gives every step one modality")  # fmt: skip


def head_with_norm(model: Any) -> contextlib.AbstractContextManager[Any]:
    """Shard the output head together with the language model's last norm. `accelerate` looks for that norm among the base model's
    own children, where a LLaVA has none, and shards the head by itself. TRL's fused loss reads the head's weight outside its
    forward; its gradient is then never summed over processes."""
    norm = final_norm(model)
    return mock.patch.object(fsdp_utils, "_find_final_norm", lambda _: norm)


def sharder(policy: MixedPrecisionPolicy | None) -> Callable[[Any], Any]:
    """Join the other processes; what makes every process keep its part of a model that is loaded after this.

    The first process of all needs the weights, from which the others get their parts, one weight at a time; theirs may be empty
    (device "meta"). The library computes the buffers that no checkpoint holds in them as well, once they have joined. A model
    that is not trained is sharded in the same way: TRL would gather the whole reference at once, with the empty weights.
    """
    fsdp_utils.enable_fsdp_ram_efficient_loading()
    patience = InitProcessGroupKwargs(timeout=PATIENCE)
    accelerator = Accelerator(cpu=devices.device() != "cuda", kwargs_handlers=[patience])
    if (plugin := getattr(accelerator.state, "fsdp_plugin", None)) is None:
        raise RuntimeError(OTHER_SHARDS.format("whole", "off", "FSDP"))
    os.environ["FSDP_AUTO_WRAP_POLICY"] = "NO_WRAP"  # for the trainer's own accelerator, which finds all sharded

    def shard(model: Any) -> Any:
        plugin.cpu_ram_efficient_loading, plugin.mixed_precision_policy = True, policy
        plugin.transformer_cls_names_to_wrap = block_names(getattr(model, "get_base_model", lambda: model)())
        with head_with_norm(model):
            model = fsdp_utils.fsdp2_prepare_model(accelerator, model)
        if empty := [name for name, held in (*model.named_parameters(), *model.named_buffers()) if held.is_meta]:
            raise RuntimeError(f"{empty[0]} has no value in process {accelerator.process_index} after the model was sharded")
        return model

    return shard


class Guards(TrainerCallback):
    """Refuse a training run before its first step where accelerate has not set up what the launch requested."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Compare processes and shards with what was requested. Raises RuntimeError where they differ."""
        requested, shards = int(os.environ.get(PROCESSES, "1")), sharded()
        if args.world_size != requested:
            raise RuntimeError(f"{requested} processes were requested and {args.world_size} is training: its steps would hold "
                               "another number of rows. On CPUs use distributed_type MULTI_GPU with use_cpu; `accelerate launch "
                               "--cpu` starts one process")  # fmt: skip
        if args.n_gpu > 1:
            raise RuntimeError(f"one process sees {args.n_gpu} GPUs and would put as many times the rows into a step; let it see "
                               "one: `vlsafe stage --gpus 1`, or CUDA_VISIBLE_DEVICES")  # fmt: skip
        if shards != any(isinstance(weight, DTensor) for weight in model.parameters()):
            raise RuntimeError(OTHER_SHARDS.format(*(("whole", "off", "FSDP") if shards else ("sharded", "on", "whole weights"))))
        if shards:
            refuse_unsound_shards(model)


def refuse_unsound_shards(model: Any) -> None:
    """Refuse, with a RuntimeError that names the weight, what breaks a sharded LLaVA without an error."""
    moving = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    if small := [name for name, weight in moving.items() if isinstance(weight, DTensor) and len(weight) < world_size()]:
        raise RuntimeError(f"{small[0]} has fewer rows than there are processes: the optimiser could not tell empty parts apart")
    if towers := [name for name in moving if within(name, "vision")]:
        raise RuntimeError(f"{towers[0]} is trainable: features come from an earlier layer, the last one never has a gradient, "
                           "and the training could not be resumed; freeze the tower")  # fmt: skip
    if low := [name for name, weight in moving.items() if weight.dtype != torch.float32]:
        raise RuntimeError(f"{low[0]} is {moving[low[0]].dtype}: master weights are float32, only computation is in bfloat16")
    head = model.get_output_embeddings()
    units = [part._get_fsdp_state() if isinstance(part, FSDPModule) else None for part in (head, final_norm(model))]
    if head.weight.requires_grad and units[0] is not units[1]:
        raise RuntimeError("the output head is sharded apart from the last norm: its gradient would not be summed over processes")


def die_with_parent() -> None:
    """Let the kernel kill this process when its parent has ended, however it ended (on Linux; elsewhere nothing)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
