"""What a model of the miniature can do at all: captions, how-tos, yes/no, letters. Exact match of the whole answer.

It has no counterpart in the literature; the other numbers rest on it. A model that cannot see cannot be attacked with
pictures, and a model that knows no answers cannot comply rightly.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vlsafe.core.schema import Item, Turn
from vlsafe.data.miniature.corpora import ask_about, pick
from vlsafe.data.miniature.language import DESCRIBE, HOW, OBJECTS, TEST, World, question
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
            text, answer, images, cluster = _question(world, group, action, rng)
            name, turns = f"{NAME}-{group}-{number:04d}", (Turn("user", text),)
            items.append(Item(name, NAME, turns, images, answer, None, cluster, group))
    return items


def _question(world: World, group: str, action: Any, rng: np.random.Generator) -> tuple[Any, ...]:
    """Text, right answer, pictures and cluster of an item; `action` is asked about by how-tos alone."""
    task, _, kind = group.partition("-")
    if group == "howto-text":
        return question(action, pick(rng, HOW[TEST])), world.answer(action), (), str(action)
    thing = action.thing if task == "howto" else pick(rng, OBJECTS)
    scene = draw_scene(thing, rng, kind or None)
    images = (draw(scene, world.seed, rng, held_out=True),)
    if task == "howto":
        return question(action, pick(rng, HOW[TEST]), pointed=True), world.answer(action), images, str(action)
    if task == "caption":
        return pick(rng, DESCRIBE), caption(scene), images, thing
    return *ask_about(scene, rng, {task: 1.0}), images, thing
