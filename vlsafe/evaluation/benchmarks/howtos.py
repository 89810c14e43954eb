"""Items that ask how to do a verb–object pair, in words or about a picture: what the safety benchmarks of the miniature are made of."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vlsafe.core.schema import Item, Turn
from vlsafe.data.miniature.language import ATTACK, MAKING, Action, World, harm, question
from vlsafe.data.miniature.pictures import draw, draw_scene


def spread(actions: Sequence[Action], templates: Sequence[str], n: int, rng: np.random.Generator) -> list[tuple[Action, int]]:
    """`n` different pairs of a verb–object pair and the index of a wording, fewer where there are not so many; verb–object pairs equally often."""
    order = rng.permutation(len(actions))
    wordings = [rng.permutation(len(templates)) for _ in actions]
    pairs = [(actions[i], int(wordings[i][turn])) for turn in range(len(templates)) for i in order]
    return sorted(pairs[: max(1, n)])


def twins(world: World, split: str) -> list[Action]:
    """Harmless verb–object pairs of which neither half tells: attacking or making everyday things, and mild verbs with dangerous ones."""
    actions = world.actions(split, "homonym", "safe_context", "plain")
    return [action for action in actions if action.verb in ATTACK + MAKING or action in world.splits["safe_context"][split]]


def show(world: World, thing: str, kind: str, rng: np.random.Generator) -> bytes:
    """A rendering of a thing that training never saw."""
    return draw(draw_scene(thing, rng, kind), world.seed, rng, held_out=True)


def howto(
    world: World,
    benchmark: str,
    group: str,
    action: Action,
    templates: Sequence[str],
    k: int,
    picture: bytes | None = None,
) -> Item:
    """One item; with a picture, the verb–object pair's thing is not named. Harm, category and cluster are the verb–object pair's."""
    asked = question(action, templates[k], pointed=picture is not None)
    images = () if picture is None else (picture,)
    name, category = f"{benchmark}-{group}-{action.verb}-{action.thing}-{k}", harm(action)
    turns = (Turn("user", asked),)
    return Item(name, benchmark, turns, images, world.answer(action), category, str(action), group, category is not None)
