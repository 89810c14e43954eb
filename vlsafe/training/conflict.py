"""Two tasks in one step: rows ordered so that a micro-batch holds one task, and gradients that do not work against each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback


def shares(first: int, second: int, steps: int, batches: int) -> list[int]:
    """How many of a step's micro-batches hold the second task, so that over all steps it has its share of the rows.

    At least one in every step and never all, so that every step has both tasks.

    Shapes:   ->  [steps]
    Raises:   ValueError where a step has fewer than two micro-batches
    """
    if batches < 2:
        raise ValueError(f"two tasks need at least two micro-batches a step, not {batches}")
    due = np.round(np.arange(steps + 1) * batches * second / (first + second)).astype(int)
    return [int(n) for n in np.clip(np.diff(due), 1, batches - 1)]


def ordered(first: int, second: int, leading: Sequence[int], batches: int, size: int, rng: np.random.Generator) -> list[int]:
    """Row numbers in the order of training: in every step the micro-batches of the second task, then those of the first.

    Rows 0 … first - 1 are the first task's, the others the second's. A task's rows are all seen before one is seen again.

    Draws:    from `rng`
    Shapes:   ->  [steps * batches * size]
    """
    rows = {True: _endless(first, second, rng), False: _endless(0, first, rng)}
    return [next(rows[place < n]) for n in leading for place in range(batches) for _ in range(size)]


def _endless(start: int, n: int, rng: np.random.Generator) -> Iterator[int]:
    while True:
        yield from (start + rng.permutation(n)).tolist()


def combined(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], float]:
    """The sum of two tasks' gradients, each without its part that points against the other, and their cosine before.

    Source:   Yu et al. 2020, "Gradient Surgery for Multi-Task Learning" (PCGrad), algorithm 1: over all weights at once
    """
    inner, a, b = (sum(float((x * y).sum()) for x, y in zip(*pair, strict=True)) for pair in (
        (first, second), (first, first), (second, second)
    ))  # fmt: skip
    cosine = inner / (a * b) ** 0.5 if a > 0 and b > 0 else 0.0
    if cosine >= 0:
        return [x + y for x, y in zip(first, second, strict=True)], cosine
    return [(1 - inner / a) * x + (1 - inner / b) * y for x, y in zip(first, second, strict=True)], cosine


class ConflictFree(TrainerCallback):
    """Keep the gradient of a step's leading micro-batches, and combine it with that of the others before the step is taken.

    The gradient is clipped here, to the trainer's usual length: the trainer clips before this moment, and could not know
    what comes of it. Every step's cosine of the two gradients is logged as `task_cosine`.
    """

    def __init__(self, leading: Sequence[int], longest: float = 1.0) -> None:
        self.leading, self.longest, self.done, self.cosine = leading, longest, 0, 0.0
        self.second: list[torch.Tensor] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.done = 0

    def on_substep_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.done += 1
        if self.done == self.leading[state.global_step]:
            self.second = [_gradient(weight).clone() for weight in _moving(model)]

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        whole = [_gradient(weight) for weight in _moving(model)]
        first = [both - one for both, one in zip(whole, self.second, strict=True)]
        found, self.cosine = combined(first, self.second)
        for weight, gradient in zip(_moving(model), found, strict=True):
            weight.grad = gradient
        torch.nn.utils.clip_grad_norm_(list(_moving(model)), self.longest)
        self.second = []

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        state.log_history[-1]["task_cosine"] = self.cosine


def _moving(model: Any) -> Iterator[torch.nn.Parameter]:
    return (weight for weight in model.parameters() if weight.requires_grad)


def _gradient(weight: torch.Tensor) -> torch.Tensor:
    """A weight's gradient; zeros where no row of these used it, as the projector in text alone."""
    return torch.zeros_like(weight) if weight.grad is None else weight.grad
