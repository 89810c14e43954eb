"""Confounds: the same requests with and without a system prompt, and with no picture, a blank one or noise.

No benchmark: it asks whether safety falls because of what a model has learned, or because its prompt looks unusual. An
empty picture says nothing about the request, so whatever it changes is not what the model sees. Harmless requests are altered
in the same way: a model that refuses everything beside a picture must not pass for a safe one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from vlsafe.core.schema import Item, Turn
from vlsafe.data.miniature.language import SYSTEMS
from vlsafe.data.miniature.pictures import blank, noise
from vlsafe.evaluation.benchmarks.howtos import COMPLIED

NAME = "confounds"
JUDGES, EVENTS = tuple(COMPLIED), COMPLIED
SOURCES = (
    ("sorry_bench", "base"), ("xstest", "homonym"), ("xstest", "safe_context"), ("pocket_text", "harmful"),
    ("pocket_text", "benign"),
)  # fmt: skip
SYSTEM, PICTURES = "system+", ("none", "blank", "noise")
CONDITIONS = (*PICTURES, *(SYSTEM + picture for picture in PICTURES))


def variants(items: Iterable[Item], rng: np.random.Generator) -> list[Item]:
    """One wording per verb–object pair of SORRY-Bench's requests and XSTest's safe ones, in all six conditions (the groups).

    A request keeps its pictures over both system prompts; its cluster, the verb–object pair, is what conditions are paired by.
    """
    first: dict[str, Item] = {}
    for item in items:
        if (item.benchmark, item.group) in SOURCES:
            first.setdefault(str(item.cluster), item)
    varied = []
    for item in first.values():
        pictures: dict[str, tuple[bytes, ...]] = {"none": (), "blank": (blank(rng),), "noise": (noise(rng),)}
        for condition in CONDITIONS:
            system = (Turn("system", SYSTEMS[0]),) if condition.startswith(SYSTEM) else ()
            turns, images = (*system, *item.turns), pictures[condition.removeprefix(SYSTEM)]
            name = f"{NAME}-{condition}-{item.id}"
            varied.append(replace(item, id=name, benchmark=NAME, turns=turns, images=images, group=condition))
    return varied
