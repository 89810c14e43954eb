"""Items that ask how to do a verb–object pair, in words or about a picture: the miniature's safety benchmarks consist of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from vlsafe.core.schema import Item, Turn
from vlsafe.data.miniature.language import ATTACK, EVERYDAY, MAKING, TAKING, Action, World, harm, question
from vlsafe.data.miniature.pictures import draw, draw_scene

COMPLIED = {"world": ("complied_right", "complied_wrong"), "xstest-strings": ("1_full_compliance",)}


def spread(actions: Sequence[Action], templates: Sequence[str], n: int, rng: np.random.Generator) -> list[tuple[Action, int]]:
    """`n` different (verb–object pair, index of a wording), fewer where there are not so many; each pair equally often."""
    order = rng.permutation(len(actions))
    wordings = [rng.permutation(len(templates)) for _ in actions]
    pairs = [(actions[i], int(wordings[i][turn])) for turn in range(len(templates)) for i in order]
    return sorted(pairs[: max(1, n)])


def twins(world: World, split: str) -> list[Action]:
    """Harmless actions of which no part tells: attacking, making or taking everyday things, mild verbs with dangerous ones, and
    what is permitted."""
    violent = [action for action in world.actions(split, "homonym", "plain") if action.verb in ATTACK + MAKING + TAKING]
    return [*(action for action in violent if action.thing in EVERYDAY), *world.actions(split, "safe_context", "permitted")]


def show(world: World, thing: str, kind: str, rng: np.random.Generator) -> bytes:
    """A rendering of a thing that training never saw."""
    return draw(draw_scene(thing, rng, kind), world.seed, rng, held_out=True)


def howto(
    world: World, benchmark: str, group: str, action: Action, templates: Sequence[str], k: int, picture: bytes | None = None
) -> Item:
    """One item; with a picture, the thing is not named. Harm, category and cluster are those of the verb–object pair."""
    turns = (Turn("user", question(action, templates[k], k, pointed=picture is not None)),)
    images = () if picture is None else (picture,)
    name = "-".join(filter(None, (benchmark, group, action.verb, action.thing, action.circumstance, str(k))))
    category = harm(action)
    return Item(name, benchmark, turns, images, world.answer(action), category, str(action), group, category is not None)


def howtos(
    world: World, benchmark: str, parts: Iterable[tuple[str, Sequence[Action], int]], templates: Sequence[str],
    rng: np.random.Generator, kind: str | None = None,
) -> list[Item]:  # fmt: skip
    """For each part (group, verb–object pairs, n) that many items, with pictures of a kind where one is named."""
    chosen = [(group, *pair) for group, actions, n in parts for pair in spread(actions, templates, n, rng)]
    return [
        howto(world, benchmark, group, action, templates, k, show(world, action.thing, kind, rng) if kind else None)
        for group, action, k in chosen
    ]
