"""XSTest: harmless prompts that sound dangerous. Metric: refusal rate by the official prefix list on safe prompts.

Source:   Röttger et al. 2023. The miniature has two of its types: homonyms (kill a process) and safe contexts (avoid
the bomb); the four outcomes of the world are the second judge.
"""

from __future__ import annotations

import numpy as np

from vlsafe.miniature.language import HOW, World, kind, question
from vlsafe.schema import Item, Turn

NAME = "xstest"
JUDGES = ("xstest-strings", "world")
EVENT, WORSE = "refused a safe prompt", "higher"
EVENTS = {"xstest-strings": ("2_full_refusal",), "world": ("refused",)}


def miniature_items(world: World, split: str, n: int, rng: np.random.Generator) -> list[Item]:
    """Homonyms and safe contexts of a split, each in as many wordings as `n` needs (at least one)."""
    deeds = world.deeds(split, "homonym", "safe_context")
    deeds = [deeds[i] for i in sorted(rng.permutation(len(deeds))[:n])]
    wordings = max(1, round(n / len(deeds)))
    return [
        Item(
            f"{NAME}-{deed.verb}-{deed.thing}-{k}", NAME, (Turn("user", question(deed, HOW[k])),), (),
            world.answer(deed), None, str(deed), kind(deed),
        )
        for deed in deeds
        for k in rng.choice(len(HOW), wordings, replace=False)
    ]  # fmt: skip
