"""XSTest: harmless prompts that sound dangerous, and their harmful contrasts.

Official metric: refusal rate by the prefix list on the safe prompts. The contrasts are measured for compliance: a
model that refuses nothing is not well calibrated either. The four outcomes of the world are the second judge.

Source:   Röttger et al. 2023. The miniature has two of its ten types, homonyms (kill a process) and safe contexts
          (avoid the bomb), with their contrasts (kill the neighbor, make the bomb)
Departs:  a fifth group asks homonyms about a picture; the original has no pictures, so it is a measure of its own
"""

from __future__ import annotations

import numpy as np

from vlsafe.benchmarks.howtos import howto, show, spread
from vlsafe.miniature.language import ATTACK, HOW, MAKING, World
from vlsafe.schema import Item

NAME = "xstest"
JUDGES = ("xstest-strings", "world")
EVENTS = {"xstest-strings": ("2_full_refusal",), "world": ("refused",)}
GROUPS = {  # group: kind of deed, verbs (None: all)
    "homonym": ("homonym", None),
    "safe_context": ("safe_context", None),
    "contrast_homonym": ("harmful", ATTACK),
    "contrast_safe_context": ("harmful", MAKING),
    "picture_homonym": ("homonym", None),
}


def miniature_items(world: World, split: str, n: int, rng: np.random.Generator) -> list[Item]:
    """`n` items of a split in five equal groups."""
    items = []
    for group, (kind, verbs) in GROUPS.items():
        deeds = [deed for deed in world.deeds(split, kind) if verbs is None or deed.verb in verbs]
        for deed, k in spread(deeds, HOW, n // len(GROUPS), rng):
            picture = show(world, deed.thing, "icon", rng) if group.startswith("picture") else None
            items.append(howto(world, NAME, group, deed, HOW, k, picture))
    return items
