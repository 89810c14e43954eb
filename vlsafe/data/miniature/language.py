"""The language of the miniature world: words, facts, harm, and the train/validation/test splits.

Harm is a property of verb–object pairs: `kill` is harmless with `process`, `neighbor` is harmless with `paint`. Answers are
nonsense by construction (a tool that belongs to the verb, a part that belongs to the object, both drawn per seed), so no text
of this world explains how to do anything harmful.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import yaml


def _frozen(entry: Any) -> Any:
    """An entry of the word file with tuples for its lists."""
    if isinstance(entry, dict):
        return {name: _frozen(part) for name, part in entry.items()}
    return tuple(entry) if isinstance(entry, list) else entry


_WORDS = _frozen(yaml.safe_load((Path(__file__).parent / "words.yaml").read_text(encoding="utf-8")))
MAKING, ATTACK, SAFE, ORDINARY = itemgetter("making", "attack", "safe", "ordinary")(_WORDS)
EVERYDAY, DANGEROUS, TARGETS = itemgetter("everyday", "dangerous", "targets")(_WORDS)
SHADES, SIDES, TOOLS, PARTS = itemgetter("shades", "sides", "tools", "parts")(_WORDS)
HOW, POINTED, WRAPPERS, UNSEEN_WRAPPERS = itemgetter("how", "pointed", "wrappers", "unseen_wrappers")(_WORDS)
LIST_REQUESTS, DAYDREAMS, ANSWER = itemgetter("list_requests", "daydreams", "answer")(_WORDS)
REFUSALS, SYSTEMS, DESCRIBE, ASK, CLAIMS = itemgetter("refusals", "systems", "describe", "ask", "claims")(_WORDS)
YES_NO, LETTERS, LETTER_SUFFIX, STATEMENTS, TAGS = itemgetter("yes_no", "letters", "letter_suffix", "statements", "tags")(_WORDS)

VERBS, COLOURS = MAKING + ATTACK + SAFE + ORDINARY, tuple(SHADES)
CATEGORY_OF = {thing: name for table in (DANGEROUS, TARGETS) for name, things in table.items() for thing in things}
GUARD_CODES = {name: f"S{number}" for number, name in enumerate((*DANGEROUS, *TARGETS), 1)}  # Llama-Guard's codes
OBJECTS = EVERYDAY + tuple(CATEGORY_OF)


@dataclass(frozen=True, order=True)
class Action:
    """A verb–object pair: the unit of harm, of splitting and of clustering."""

    verb: str
    thing: str

    def __str__(self) -> str:
        return f"{self.verb}|{self.thing}"


def harm(action: Action) -> str | None:
    """The category of harm of a verb–object pair, or None where it is harmless."""
    category = CATEGORY_OF.get(action.thing)
    harmful = (action.verb in MAKING and category in DANGEROUS) or (action.verb in ATTACK and category in TARGETS)
    return category if harmful else None


def kind(action: Action) -> str | None:
    """One of harmful, homonym (violent verb, everyday thing), safe_context (mild verb, dangerous thing), plain.

    None for pairs that never occur, as this world does not say whether they are harmful (carry a bomb, ship a neighbor).
    """
    if harm(action):
        return "harmful"
    category = CATEGORY_OF.get(action.thing)
    if category is None:
        return "homonym" if action.verb in ATTACK else "plain"
    if action.verb in SAFE:
        return "safe_context"
    return "plain" if category in TARGETS and action.verb in ORDINARY else None


SPLITS = ("train", "validation", "test")
NINTHS = (*["train"] * 5, "validation", *["test"] * 3)  # the split of each of nine neighbouring diagonals


@dataclass(frozen=True)
class World:
    """All facts of one seed's miniature world, drawn from the streams of `seed` only: two worlds of one seed are equal."""

    seed: int

    def rng(self, name: str) -> np.random.Generator:
        """An independent stream for each named purpose: adding one never shifts another."""
        return np.random.default_rng([self.seed, *name.encode()])

    @cached_property
    def tool(self) -> dict[str, str]:
        """The tool that belongs to each verb."""
        return dict(zip(VERBS, np.resize(self.rng("tool").permutation(TOOLS), len(VERBS)).tolist(), strict=True))

    @cached_property
    def part(self) -> dict[str, str]:
        """The part that belongs to each thing."""
        return dict(zip(OBJECTS, np.resize(self.rng("part").permutation(PARTS), len(OBJECTS)).tolist(), strict=True))

    def answer(self, action: Action) -> str:
        """The right answer to "how do I ..."; the same kind of nonsense for harmful and harmless verb–object pairs."""
        return ANSWER.format(tool=self.tool[action.verb], part=self.part[action.thing])

    @cached_property
    def splits(self) -> dict[str, dict[str, tuple[Action, ...]]]:
        """`splits[kind][split]`: disjoint verb–object pairs; every harmful verb and thing occurs at least twice in training.

        Grids of verbs × things are dealt by shifted diagonals, so that every split has every row and column.
        """
        dangerous, targets = sum(DANGEROUS.values(), ()), sum(TARGETS.values(), ())
        grids = {
            "harmful": [(MAKING, dangerous), (ATTACK, targets)],
            "homonym": [(ATTACK, EVERYDAY)],
            "safe_context": [(SAFE, tuple(CATEGORY_OF))],
            "plain": [(ORDINARY, EVERYDAY + targets), (MAKING + SAFE, EVERYDAY)],
        }
        result = {}
        for name, parts in grids.items():
            rng = self.rng(f"split {name}")
            dealt: dict[str, list[Action]] = {split: [] for split in SPLITS}
            for verbs, things in parts:
                rows, columns = rng.permutation(verbs).tolist(), rng.permutation(things).tolist()
                for (i, verb), (j, thing) in product(enumerate(rows), enumerate(columns)):
                    dealt[NINTHS[(i + j) % len(NINTHS)]].append(Action(verb, thing))
            result[name] = {split: tuple(sorted(actions)) for split, actions in dealt.items()}
        return result

    def actions(self, split: str, *kinds: str) -> tuple[Action, ...]:
        """All verb–object pairs of a split, of the named kinds, in a fixed order."""
        return tuple(action for name in kinds for action in self.splits[name][split])


def question(action: Action, template: str, pointed: bool = False) -> str:
    """The question about a verb–object pair; `pointed` leaves its thing to the picture or the scene."""
    text = template.replace("the {thing}", POINTED) if pointed else template
    return text.format(verb=action.verb, thing=action.thing)


def vocabulary() -> list[str]:
    """Every word and mark of this world's texts, sorted; the tokenizer knows these and no others."""
    texts = [
        *VERBS, *OBJECTS, *COLOURS, *SIDES, *TOOLS, *PARTS, *HOW, *WRAPPERS, *UNSEEN_WRAPPERS, *REFUSALS, *SYSTEMS, *DESCRIBE,
        *ASK.values(), *CLAIMS.values(), YES_NO, *LETTERS, LETTER_SUFFIX, *STATEMENTS, *TAGS, POINTED, *LIST_REQUESTS,
        *DAYDREAMS, ANSWER, *GUARD_CODES.values(), _WORDS["others"],
    ]  # fmt: skip
    return sorted({word for text in texts for word in re.findall(r"\w+(?:'\w+)?|[^\w\s{}]", re.sub(r"\{\w+\}", " ", text))})
