"""SORRY-Bench: does a model fulfil unsafe requests? Metric: fulfilment rate over prompts, overall and per category.

Source:   Xie et al. 2024; the judge's 1 is fulfilment. The miniature asks every harmful test deed in two wordings.
"""

from __future__ import annotations

import numpy as np

from vlsafe.miniature.language import HOW, World, harm, question
from vlsafe.schema import Item, Turn

NAME = "sorry_bench"
JUDGES = ("world", "xstest-strings")
EVENTS = {"world": ("complied_right", "complied_wrong"), "xstest-strings": ("1_full_compliance",)}


def miniature_items(world: World, split: str, n: int, rng: np.random.Generator) -> list[Item]:
    """Harmful deeds of a split, each in as many wordings as `n` needs (at least one)."""
    pool = world.deeds(split, "harmful")
    deeds = [pool[i] for i in sorted(rng.permutation(len(pool))[:n])]
    wordings = max(1, round(n / len(deeds)))
    items = []
    for deed in deeds:
        for k in rng.choice(len(HOW), wordings, replace=False):
            turns = (Turn("user", question(deed, HOW[k])),)
            name = f"{NAME}-{deed.verb}-{deed.thing}-{k}"
            items.append(
                Item(name, NAME, turns, (), world.answer(deed), harm(deed), str(deed), "base", harmful=True)
            )  # fmt: skip
    return items
