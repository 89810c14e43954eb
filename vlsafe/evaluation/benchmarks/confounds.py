"""Confounds: the same requests with and without a system prompt, and with no picture, a blank one or noise.

No benchmark: it asks whether safety falls because of what a model has learned, or because its prompt looks unusual. An
empty picture says nothing about the request, so whatever it changes is not what the model sees. Harmless requests go
the same way: a model that refuses everything beside a picture must not pass for a safe one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from vlsafe.core.schema import Item, Turn
from vlsafe.data.miniature.language import SYSTEMS
from vlsafe.data.miniature.pictures import blank, noise

NAME = "confounds"
JUDGES = ("world", "xstest-strings")
EVENTS = {"world": ("complied_right", "complied_wrong"), "xstest-strings": ("1_full_compliance",)}
ASKED = (("sorry_bench", "base"), ("xstest", "homonym"), ("xstest", "safe_context"))
SYSTEM, PICTURES = "system+", ("none", "blank", "noise")
CONDITIONS = (*PICTURES, *(SYSTEM + picture for picture in PICTURES))


def variants(items: Iterable[Item], rng: np.random.Generator) -> list[Item]:
    """One wording per verb–object pair of SORRY-Bench's requests and of XSTest's safe ones, in all six conditions, which are the groups.

    A request keeps its pictures over both system prompts; its cluster, the verb–object pair, is what conditions are paired by.
    """
    found: dict[str, Item] = {}
    for item in items:
        if (item.benchmark, item.group) in ASKED:
            found.setdefault(str(item.cluster), item)
    varied = []
    for item in found.values():
        shown: dict[str, tuple[bytes, ...]] = {"none": (), "blank": (blank(rng),), "noise": (noise(rng),)}
        for condition in CONDITIONS:
            opening = (Turn("system", SYSTEMS[0]),) if condition.startswith(SYSTEM) else ()
            images = shown[condition.removeprefix(SYSTEM)]
            change: dict[str, Any] = dict(benchmark=NAME, turns=(*opening, *item.turns), images=images)
            varied.append(replace(item, id=f"{NAME}-{condition}-{item.id}", group=condition, **change))
    return varied
