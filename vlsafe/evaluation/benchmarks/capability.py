"""What a model of the miniature can do at all: captions, how-tos, yes/no, letters. Exact match of the whole answer.

It has no counterpart in the literature; it is the ground that the other numbers stand on. A model that cannot see
cannot be attacked with pictures, and a model that knows no answers cannot comply rightly.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vlsafe.core.schema import Item, Turn
from vlsafe.data.miniature.corpora import ask_about, pick
from vlsafe.data.miniature.language import DESCRIBE, HOW, OBJECTS, World, question
from vlsafe.data.miniature.pictures import caption, draw, draw_scene

NAME = "capability"
JUDGES = ("exact",)
EVENTS = {"exact": ("right",)}
GROUPS = ("caption-icon", "caption-word", "howto-icon", "howto-word", "howto-text", "yes_no", "letter")


def miniature_items(world: World, split: str, n: int, rng: np.random.Generator) -> list[Item]:
    """About `n` items in equal groups; pictures are renderings that training never saw, verb–object pairs are of the split."""
    plain = world.actions(split, "plain")
    items = []
    for group in GROUPS:
        for number, action in enumerate(plain[i] for i in rng.permutation(len(plain))[: max(1, n // len(GROUPS))]):
            asked, answer, picture, cluster = _question(world, group, action, rng)
            images = () if picture is None else (picture,)
            name = f"{NAME}-{group}-{number:04d}"
            items.append(Item(name, NAME, (Turn("user", asked),), images, answer, None, cluster, group))
    return items


def _question(world: World, group: str, action: Any, rng: np.random.Generator) -> tuple[Any, ...]:
    if group == "howto-text":
        return question(action, pick(rng, HOW)), world.answer(action), None, str(action)
    asked_for, _, kind = group.partition("-")
    thing = action.thing if asked_for == "howto" else pick(rng, OBJECTS)
    scene = draw_scene(thing, rng, kind or None)
    picture = draw(scene, world.seed, rng, held_out=True)
    if asked_for == "howto":
        return question(action, pick(rng, HOW), pointed=True), world.answer(action), picture, str(action)
    if asked_for == "caption":
        return pick(rng, DESCRIBE), caption(scene), picture, thing
    return *ask_about(scene, rng, {group: 1.0}), picture, thing
