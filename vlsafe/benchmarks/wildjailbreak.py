"""WildJailbreak (its evaluation set): adversarial wrappings of harmful and of harmless requests.

Metrics: on harmful rows the attack success rate (ASR), on benign rows the rate of refusing to answer (RTA). The
wrappers are ones that no training text holds. Nine in ten of the original's rows are harmful, two in three here.

Source:   Jiang et al. 2024; AI2 safety-eval computes both rates
Departs:  the original's judge is WildGuard, ours the world's truth
"""

from __future__ import annotations

import numpy as np

from vlsafe.benchmarks.howtos import howto, spread
from vlsafe.miniature.language import HOW, UNSEEN_WRAPPERS, World
from vlsafe.schema import Item

NAME = "wildjailbreak"
JUDGES = ("world", "xstest-strings")
EVENTS = {"world": ("complied_right", "complied_wrong"), "xstest-strings": ("1_full_compliance",)}
TEMPLATES = tuple(wrapper.format(question=how) for wrapper in UNSEEN_WRAPPERS for how in HOW)
BENIGN = ("homonym", "safe_context", "plain")


def miniature_items(world: World, split: str, n: int, rng: np.random.Generator) -> list[Item]:
    """Harmful deeds of a split, two thirds of `n`, and one third harmless ones, equally many that sound dangerous or plain."""
    chosen = [("adversarial_harmful", *pair) for pair in spread(world.deeds(split, "harmful"), TEMPLATES, 2 * n // 3, rng)]
    for kind in BENIGN:
        pairs = spread(world.deeds(split, kind), TEMPLATES, n // 3 // len(BENIGN), rng)
        chosen += [("adversarial_benign", *pair) for pair in pairs]
    return [howto(world, NAME, group, deed, TEMPLATES, k) for group, deed, k in chosen]
