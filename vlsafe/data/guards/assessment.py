"""What every guard returns, how its threshold is chosen, and the reward that a guard gives.

Harm is rare (a per cent of a corpus), but guards are trained on data in which it is frequent. So a guard decides neither at
probability 0.5 nor by its most probable word, but at the threshold with the greatest F1 on labelled contents that it was not
trained on, weighted to the corpus's share of harm (`calibrate`). The threshold is stored with the guard.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from vlsafe.core.schema import Pair, Turn
from vlsafe.core.store import parts


class Assessment(NamedTuple):
    """A guard's result for one content. `unsafe` None: its answer could not be parsed (counted, never taken as safe).

    Units:    score in [0, 1]: odds of "unsafe" relative to the guard's threshold, so that the guard decides at 0.5
    """

    unsafe: bool | None
    categories: tuple[str, ...]
    score: float


def parse_guard(text: str) -> tuple[bool | None, tuple[str, ...]]:
    """Llama-Guard's answer: `safe`, or `unsafe` and on the next line comma-separated codes; anything else is None.

    Source:   Llama-Guard-3 model card
    """
    words = text.strip().replace(",", " ").split()
    if words == ["safe"]:
        return False, ()
    if words and words[0] == "unsafe" and all(re.fullmatch(r"S\d+", code) for code in words[1:]):
        return True, tuple(words[1:])
    return None, ()


def relative(probability: np.ndarray, threshold: float) -> np.ndarray:
    """Probabilities with their odds divided by the threshold's: 0.5 at the threshold, unchanged where that is 0.5."""
    above = probability * (1 - threshold)
    return above / (above + (1 - probability) * threshold)


def decided(label: bool | None, categories: tuple[str, ...], score: float) -> Assessment:
    """An assessment by its score. The parsed label only says whether the answer could be read, the categories what harm it is."""
    unsafe = score > 0.5 if label is not None else None
    return Assessment(unsafe, categories if unsafe else (), score)


def best_threshold(scores: Sequence[float], unsafe: Sequence[bool], prevalence: float) -> float:
    """The threshold with the greatest F1 if `prevalence` of all contents were unsafe; half-way between two scores."""
    score, truth = np.asarray(scores, float), np.asarray(unsafe, bool)
    if truth.all() or not truth.any():
        raise ValueError("a threshold needs labelled contents of both kinds")
    order = np.argsort(-score, kind="stable")
    score, truth = score[order], truth[order]
    hits = np.cumsum(truth) * prevalence / truth.sum()
    alarms = np.cumsum(~truth) * (1 - prevalence) / (~truth).sum()
    apart = np.append(score[:-1] > score[1:], False)  # no threshold separates equal scores; above all of them is never best
    best = int(np.where(apart, 2 * hits / (hits + alarms + prevalence), -1.0).argmax())
    return float(np.clip((score[best] + score[best + 1]) / 2, 1e-12, 1 - 1e-12))  # odds must be finite


def calibrate(guard: Any, contents: Sequence[Any], unsafe: Sequence[bool], prevalence: float) -> None:
    """Set the threshold of a guard from contents that it was not trained on."""
    guard.threshold = 0.5
    guard.threshold = best_threshold([one.score for one in guard.assess(contents)], unsafe, prevalence)


def length(turns: Sequence[Turn]) -> int:
    """The length of a conversation in characters."""
    return sum(len(turn.text) for turn in turns)


def assess_in_batches(
    assess: Callable[[list[Any]], list[Assessment]], conversations: Sequence[Sequence[Turn]], size: int
) -> list[Assessment]:
    """One assessment per conversation, in order; batches hold conversations of about the same length."""
    results: dict[int, Assessment] = {}
    for part in parts(sorted(range(len(conversations)), key=lambda i: length(conversations[i])), size):
        results |= zip(part, assess([conversations[i] for i in part]), strict=True)
    return [results[i] for i in range(len(conversations))]


def reward_by(guard: Any, pairs: Sequence[Pair]) -> Callable[..., list[float]]:
    """A reward for answers to the prompts of preference rows: safe where the prompt is harmful, right where it is not.

    On a harmful prompt it is one minus the guard's score, so that a group of equally unsafe answers still gives a gradient; an
    assessment that could not be parsed earns nothing. On a harmless prompt only the preferred answer counts, word for word.
    The result must not be judged by this guard: a model learns to write what the guard fails to detect.
    """

    def reward(completions: Sequence[Sequence[dict[str, str]]], number: Sequence[int], **_: Any) -> list[float]:
        rows, texts = [pairs[i] for i in number], [completion[-1]["content"].strip() for completion in completions]
        results = guard.assess([(*row.turns, Turn("assistant", text)) for row, text in zip(rows, texts, strict=True)])
        return [
            float(text == row.chosen) if row.category is None else 0.0 if result.unsafe is None else 1 - result.score
            for row, text, result in zip(rows, texts, results, strict=True)
        ]

    return reward
