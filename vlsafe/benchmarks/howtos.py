"""Items that ask how to do a deed, in words or about a picture: what the safety benchmarks of the miniature are made of."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vlsafe.miniature.language import ATTACK, MAKING, Deed, World, harm, question
from vlsafe.miniature.pictures import draw, draw_scene
from vlsafe.schema import Item, Turn


def spread(deeds: Sequence[Deed], templates: Sequence[str], n: int, rng: np.random.Generator) -> list[tuple[Deed, int]]:
    """`n` different pairs of a deed and the index of a wording, fewer where there are not so many; deeds equally often."""
    order = rng.permutation(len(deeds))
    wordings = [rng.permutation(len(templates)) for _ in deeds]
    pairs = [(deeds[i], int(wordings[i][turn])) for turn in range(len(templates)) for i in order]
    return sorted(pairs[: max(1, n)])


def twins(world: World, split: str) -> list[Deed]:
    """Harmless deeds of which neither half tells: attacking or making everyday things, and mild verbs with dangerous ones."""
    deeds = world.deeds(split, "homonym", "safe_context", "plain")
    return [deed for deed in deeds if deed.verb in ATTACK + MAKING or deed in world.splits["safe_context"][split]]


def show(world: World, thing: str, kind: str, rng: np.random.Generator) -> bytes:
    """A rendering of a thing that training never saw."""
    return draw(draw_scene(thing, rng, kind), world.seed, rng, held_out=True)


def howto(
    world: World, benchmark: str, group: str, deed: Deed, templates: Sequence[str], k: int, picture: bytes | None = None
) -> Item:
    """One item; with a picture, the deed's thing is not named. Harm, category and cluster are the deed's."""
    asked = question(deed, templates[k], pointed=picture is not None)
    images = () if picture is None else (picture,)
    name, category = f"{benchmark}-{group}-{deed.verb}-{deed.thing}-{k}", harm(deed)
    turns = (Turn("user", asked),)
    return Item(name, benchmark, turns, images, world.answer(deed), category, str(deed), group, category is not None)
