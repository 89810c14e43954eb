"""Two tasks in one optimiser step (PCGrad): the order of their rows, and the projection of conflicting gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback


def shares(first: int, second: int, steps: int, batches: int) -> list[int]:
    """How many of each step's micro-batches hold the second task, in proportion to its rows, but at least one and never all.

    Shapes:   ->  [steps]
    Raises:   ValueError where a step has fewer than two micro-batches
    """
    if batches < 2:
        raise ValueError(f"two tasks need at least two micro-batches a step, not {batches}")
    due = np.round(np.arange(steps + 1) * batches * second / (first + second)).astype(int)
    return [int(n) for n in np.clip(np.diff(due), 1, batches - 1)]


def ordered(first: int, second: int, leading: Sequence[int], batches: int, size: int, rng: np.random.Generator) -> list[int]:
    """Row numbers in training order: in every step the micro-batches of the second task, then those of the first.

    Rows 0 … first - 1 are the first task's, the others the second's. No row is seen again before all of its task have been.

    Draws:    from `rng`
    Shapes:   ->  [steps * batches * size]
    """

    def endless(start: int, n: int) -> Iterator[int]:
        while True:
            yield from (start + rng.permutation(n)).tolist()

    rows = {True: endless(first, second), False: endless(0, first)}
    return [next(rows[batch < n]) for n in leading for batch in range(batches) for _ in range(size)]


def combined(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], float]:
    """The sum of two tasks' gradients, each without its component against the other, and their cosine before.

    Source:   Yu et al. 2020, "Gradient Surgery for Multi-Task Learning" (PCGrad), algorithm 1: over all weights at once
    """
    pairs = ((first, second), (first, first), (second, second))
    inner, a, b = (sum(float((x * y).sum()) for x, y in zip(*pair, strict=True)) for pair in pairs)
    cosine = inner / (a * b) ** 0.5 if a > 0 and b > 0 else 0.0
    if cosine >= 0:
        return [x + y for x, y in zip(first, second, strict=True)], cosine
    return [(1 - inner / a) * x + (1 - inner / b) * y for x, y in zip(first, second, strict=True)], cosine


class ConflictFree(TrainerCallback):
    """Store the gradient of a step's leading micro-batches and combine it with that of the others before the optimiser step.

    It clips to the trainer's default norm, because the trainer clips before, and logs the two gradients' `task_cosine`.
    """

    def __init__(self, leading: Sequence[int], max_norm: float = 1.0) -> None:
        self.leading, self.max_norm, self.done, self.cosine = leading, max_norm, 0, 0.0
        self.second: list[torch.Tensor] = []

    def on_substep_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.done += 1
        if self.done == self.leading[state.global_step]:
            self.second = [gradient.clone() for gradient in _gradients(model).values()]

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        both = _gradients(model)
        first = [total - second for total, second in zip(both.values(), self.second, strict=True)]
        gradients, self.cosine = combined(first, self.second)
        for weight, gradient in zip(both, gradients, strict=True):
            weight.grad = gradient
        torch.nn.utils.clip_grad_norm_(list(both), self.max_norm)
        self.second, self.done = [], 0

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        state.log_history[-1]["task_cosine"] = self.cosine


def _gradients(model: Any) -> dict[torch.nn.Parameter, torch.Tensor]:
    """Trainable weights with their gradients; zeros where no row used a weight, as with the projector on text alone."""
    return {w: torch.zeros_like(w) if w.grad is None else w.grad for w in model.parameters() if w.requires_grad}
