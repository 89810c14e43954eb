"""bfloat16 weights that compute, float32 ones that AdamW moves; how many rows a GPU takes at once.

With float32 weights under autocast every weight is cast three times a micro-batch and the residual stream stays float32. Here
the weights themselves are bfloat16, and each has a float32 master that holds what a step of 1e-5 would lose in eight bits.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import TrainerCallback

from vlsafe.core.scale import Fit
from vlsafe.models.architectures import family_of, vision_part

LOW = torch.bfloat16
SHARDED = MixedPrecisionPolicy(param_dtype=LOW, reduce_dtype=torch.float32)  # accelerate's own sums gradients in bfloat16
STATE = 12  # bytes a trainable weight of master and AdamW's two moments, which are there from the first step on
MOST = 32  # rows at once that a trial goes up to
GAIN = 0.98  # of a row's seconds: twice the rows that do not save this much are not doubled again
MARGIN = 0.95  # of a GPU's memory that a trial may fill: later rows fragment it

Masters = dict[nn.Parameter, torch.Tensor]


def halve(model: nn.Module, trainable: bool = True) -> Masters:
    """Make weights bfloat16, in place, the frozen ones alone or the `trainable` ones as well; the float32 masters of the latter,
    whose gradients are summed in float32.

    Buffers stay as they are: the angles of rotary positions need float32. A `grad_dtype` of float32 would give the same sums,
    but write each micro-batch's gradient once more before it is added: 18 bytes a weight of traffic instead of 10.
    """
    masters: Masters = {}
    for weight in model.parameters():
        if weight.requires_grad and trainable:
            masters[weight] = weight.data.float()
        if not weight.requires_grad or trainable:
            weight.data = weight.data.to(LOW)
    for weight in masters:
        weight.grad_dtype = None  # any
        weight.register_post_accumulate_grad_hook(_widened)
    return masters


def _widened(weight: torch.Tensor) -> None:
    """Make a step's first gradient float32; the next ones are added to it as they are."""
    if weight.grad is not None and weight.grad.dtype == LOW:
        weight.grad = weight.grad.float()


class MasterAdamW(torch.optim.AdamW):
    """AdamW on the masters of the weights in `params`, which are rounded into these after every step.

    Its state holds the masters, so that a resumed training goes on with the same bits.
    """

    def __init__(self, params: list[dict[str, Any]], masters: Masters, **options: Any) -> None:
        self.pairs = [(weight, masters[weight]) for group in params for weight in group["params"]]
        super().__init__([{**group, "params": [masters[weight] for weight in group["params"]]} for group in params], **options)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Move the masters by the weights' gradients. Gradients are not kept here, so that `model.zero_grad` frees them."""
        for weight, master in self.pairs:
            master.grad = weight.grad
        super().step(closure)
        torch._foreach_copy_([weight.data for weight, _ in self.pairs], [master for _, master in self.pairs])
        for _, master in self.pairs:
            master.grad = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        for weight, _ in self.pairs:
            weight.grad = None

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "masters": [master for _, master in self.pairs]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Raises:   KeyError where the state is that of an AdamW without masters"""
        for (weight, master), stored in zip(self.pairs, state_dict["masters"], strict=True):
            master.copy_(stored)
            weight.data.copy_(master)
        super().load_state_dict({name: value for name, value in state_dict.items() if name != "masters"})


class FrozenTower(TrainerCallback):
    """Keep the backward pass out of the frozen tower: nothing in it is recomputed, and its inputs need no gradient (TRL asks
    for one under adapters, which only reentrant recomputation needs)."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        keep_out_of_tower(model)


def keep_out_of_tower(model: Any) -> None:
    base = getattr(model, "get_base_model", lambda: model)()
    for each in {model, base}:
        getattr(each, "disable_input_require_grads", lambda: None)()
    if family_of(base).vision:
        for part in vision_part(base).modules():
            if hasattr(part, "gradient_checkpointing"):
                part.gradient_checkpointing = False


class Found(NamedTuple):
    """Rows at once, whether blocks are recomputed, and seconds a row."""

    rows: int
    recompute: bool
    seconds: float


Batch = dict[str, Any]


def tried(model: Any, batch: Callable[[int], Batch], loss: Callable[[Batch], torch.Tensor], most: int) -> Found:
    """The fastest way that fits one GPU: forward and backward passes of growing numbers of rows, with and without recomputing.

    `batch` makes so many of the longest rows, which workers do beside a training, so it is not timed. `most` rows are tried at
    most. Recomputing is tried where memory ended the growth, from there on: it pays through more rows alone.

    Raises:   torch.OutOfMemoryError where not even one row fits
    """
    most = min(most, MOST)
    keep_out_of_tower(model)
    found, full = _grown(model, batch, loss, 1, most, recompute=False)
    if full:
        model.activation_checkpointing_enable()
        keep_out_of_tower(model)
        found += _grown(model, batch, loss, found[-1].rows if found else 1, most, recompute=True)[0]
        model.activation_checkpointing_disable()
    model.zero_grad()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    if not found:
        raise torch.OutOfMemoryError("not even one row fits this GPU with its model, gradients and optimiser")
    return min(found, key=lambda each: each.seconds)


def _grown(model: Any, batch: Callable[[int], Batch], loss: Callable[[Batch], torch.Tensor], rows: int, most: int,
           recompute: bool) -> tuple[list[Found], bool]:  # fmt: skip
    """What twice the rows take, again and again, while it saves time; and whether memory was what ended it."""
    found: list[Found] = []
    while rows <= most:
        seconds = _seconds(model, batch(rows), loss)
        if seconds is None:
            return found, True
        before = found[-1].seconds if found else float("inf")
        found.append(Found(rows, recompute, seconds / rows))
        logging.getLogger(__name__).info("tried %s, %.1f GB", found[-1], torch.cuda.max_memory_allocated() / 1e9)
        if found[-1].seconds > GAIN * before:
            break
        rows *= 2
    return found, False


def _seconds(model: Any, batch: Batch, loss: Callable[[Batch], torch.Tensor]) -> float | None:
    """Seconds of a second pass (the first one tunes kernels); None where it does not fit with what AdamW will need."""
    moving = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    masters = 4 * moving  # they are there already
    room = MARGIN * torch.cuda.get_device_properties().total_memory - STATE * moving + masters
    took = None
    try:
        torch.cuda.reset_peak_memory_stats()
        for _ in range(2):
            torch.cuda.synchronize()
            start = time.perf_counter()
            loss(dict(batch)).backward()
            torch.cuda.synchronize()
            took = time.perf_counter() - start
            if torch.cuda.max_memory_allocated() > room:
                return None
    except torch.OutOfMemoryError:
        took = None
    if took is None:  # outside the handler, whose traceback holds the activations
        model.zero_grad()
        torch.cuda.empty_cache()
    return took


def divisible(fit: Fit, rows: int) -> Fit:
    """The fit with at most so many rows at once, and evenly split."""
    while fit.batch_size % rows:
        rows -= 1
    return dataclasses.replace(fit, at_once=rows)
