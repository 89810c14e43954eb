"""How things are trained: the numbers of one training run, of adapters, and of safety tuning. A part of `core.scale`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

# Transformers' schedules that need nothing beside a warm-up.
Schedule = Literal[
    "constant", "constant_with_warmup", "cosine", "cosine_with_restarts", "inverse_sqrt", "linear", "polynomial"
]  # fmt: skip
Dtype = Literal["float32", "bfloat16", "float16"]


def positive(value: int, name: str) -> None:
    """Raises:   ValueError where a number is not at least 1"""
    if value < 1:
        raise ValueError(f"{name} must be at least 1, not {value}")


def share(value: float, name: str, above: bool = False) -> None:
    """Raises:   ValueError where a number lies outside of [0, 1), or with `above` of (0, 1]"""
    if not (0 < value <= 1 if above else 0 <= value < 1):
        raise ValueError(f"{name} is a share {'above 0 and at most 1' if above else 'from 0 to below 1'}, not {value}")


def later(default: Any = dataclasses.MISSING, **more: Any) -> Any:
    """A field that is newer than some results. At its default it is left out of digests, so that they stay valid."""
    value = more["default_factory"]() if "default_factory" in more else default
    return field(default=default, metadata={"later": value}, **more)


@dataclass(frozen=True)
class Fit:
    """One training run with AdamW. Units: steps; rows per step; 1/step for the rate.

    The rows of a step are split by length into `micro_batches`, whose gradients are accumulated. `projector_rate`: the
    projector's own (LLaVA's `mm_projector_lr`). `grouped`: every step has one modality, as in LLaVA's scripts. `launch`: an
    accelerate configuration whose processes train, else this one does. `saved`: the dtype of finished checkpoints. `dtype`: of
    weights that compute, their masters are float32. `autocast`: float32 weights compute in bfloat16 on a CPU too, as they do on
    any GPU. `rows`: what `steps` are for; with it, they follow a corpus, as epochs do.
    """

    steps: int
    batch_size: int
    learning_rate: float
    schedule: Schedule = "cosine"
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    max_length: int | None = None
    micro_batches: int = 2
    projector_rate: float | None = None
    grouped: bool = later(False)
    at_once: int | None = later(None)  # most rows that one process takes at a time; more micro-batches where needed
    launch: str = later("")
    saved: Dtype = later("float32")
    dtype: Literal["float32", "bfloat16"] = later("float32")
    rows: int | None = later(None)
    autocast: bool = later(False)

    def __post_init__(self) -> None:
        if self.steps < 1 or not 1 <= self.micro_batches <= self.batch_size or not 0 < self.learning_rate < 1:
            raise ValueError(f"a fit needs at least one step, one row per micro-batch and a rate in (0, 1): {self}")


@dataclass(frozen=True)
class LoraSpec:
    """Low-rank adapters. `rate` multiplies the learning rate of the full method, as in LLaVA's scripts (2e-4 against 2e-5)."""

    rank: int = 8
    alpha: int = 16
    dropout: float = 0.05
    rate: float = 10.0

    def __post_init__(self) -> None:
        positive(self.rank, "lora.rank")
        share(self.dropout, "lora.dropout")


@dataclass(frozen=True)
class Preference:
    """DPO: `fit` counts pairs as rows; `beta` as in DPO's paper and in SPA-VL's scripts."""

    fit: Fit
    beta: float = 0.1


@dataclass(frozen=True)
class Rollout:
    """GRPO: `fit` counts sampled answers as rows, of which `generations` answer one prompt. `reward` of an answer to a harmless
    prompt: 1 where it is the preferred one word for word ("exact"), or the share of words that both have in order ("overlap")."""

    fit: Fit
    generations: int = 8
    max_new_tokens: int = 12
    temperature: float = 1.0
    reward: Literal["exact", "overlap"] = later("exact")

    def __post_init__(self) -> None:
        if self.generations < 2 or self.fit.batch_size % self.generations:
            raise ValueError(f"a step of GRPO holds whole groups of at least two answers: {self}")


@dataclass(frozen=True)
class Tuning:
    """Safety tuning. The steps of a fit are for a recipe's first corpus; with more corpora they grow with the rows.

    `replay` is the number of general rows per safety row. `milestones` are fractions of a run at which a checkpoint is kept,
    beside its end; `pairs` is how many validation pairs of each modality choose among them. `task_batches` is the number of
    micro-batches of one task each that a step is split into where conflicting gradients are projected. `without` names recipes
    that are left out, with all that builds on them.
    """

    sft: Fit
    preference: Preference
    rollout: Rollout
    replay: float = 2.5  # VLGuard's post-hoc recipe: 5,000 rows of LLaVA's beside 2,000 of its own
    milestones: tuple[float, ...] = (0.25, 0.5, 0.75)
    pairs: int = 100
    task_batches: int = 8
    without: tuple[str, ...] = later(())


@dataclass(frozen=True)
class Durability:
    """Fine-tuning a safe model once more, on each of `rows`: visual instructions as in stage 2, such rows without a picture, more
    how-tos, some answers to harmful requests; `howtos` and `harmful` are their shares among rows that are harmless otherwise. It
    takes `share` of stage 2's steps, with checkpoints after `along` of them. Shares and bounds are assumed.

    The search for the worst case tries `trials` of all rows × `methods` × `rates` (multiples of stage 2's) at random, examines
    what lies after `searched` of the steps on validation items, and permits a loss of helpfulness of at most `loss`.
    """

    rows: tuple[Literal["instructions", "text", "howtos", "harmful"], ...] = (
        "instructions", "text", "howtos", "harmful"
    )  # fmt: skip
    share: float = 0.1
    along: tuple[float, ...] = (0.1, 0.2, 0.4, 1.0)
    howtos: float = 0.2
    harmful: float = 0.05
    methods: tuple[Literal["full", "lora"], ...] = ("full", "lora")
    rates: tuple[float, ...] = (0.3, 1.0, 3.0)
    trials: int = 12
    searched: tuple[float, ...] = (0.4, 1.0)
    loss: float = 0.05

    def __post_init__(self) -> None:
        for name in ("along", "searched"):
            for part in getattr(self, name) or (0.0,):
                share(part, f"durability.{name}", above=True)
        share(self.share, "durability.share", above=True)
        for name in ("howtos", "harmful", "loss"):
            share(getattr(self, name), f"durability.{name}")
        positive(self.trials, "durability.trials")
        if not self.rates or min(self.rates) <= 0:
            raise ValueError(f"durability.rates: one or more multiples above 0 of stage 2's rate, not {self.rates}")
