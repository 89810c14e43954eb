"""SEED-Bench: multiple choice about a picture, scored in two ways that must not be mixed.

`likelihood`, the official one: the question stands without options, and the answer is the option text on which the
model's loss is lowest. `letter`, LLaVA's: the options are shown, and the written answer must equal the letter exactly.
The composite helpfulness takes the official one.

Source:   Li et al. 2023; Liu et al. 2023 (LLaVA-1.5's prompt and its convert_seed_for_submission)
"""

from __future__ import annotations

import numpy as np

from vlsafe.miniature.corpora import choice, letter_prompt, pick
from vlsafe.miniature.language import LETTERS, OBJECTS, World
from vlsafe.miniature.pictures import draw, draw_scene
from vlsafe.schema import Item, Turn

NAME = "seed_bench"
JUDGES = ("seed-letter",)
EVENTS = {"seed-letter": ("right",)}


def miniature_items(world: World, split: str, n: int, rng: np.random.Generator) -> list[Item]:
    """`n` / 2 questions about held-out renderings, each scored in both ways."""
    items = []
    for number in range(max(1, n // 2)):
        scene = draw_scene(pick(rng, OBJECTS), rng)
        images, (asked, options, place) = (draw(scene, world.seed, rng, held_out=True),), choice(scene, rng)
        right, cluster = LETTERS[place], f"seed-question-{number:04d}"
        spoken = tuple(f"{option}." for option in options)  # as this world answers: "red."
        for group, text, shown, scoring in (
            ("likelihood", asked, spoken, "likelihood"),
            ("letter", letter_prompt(asked, options), options, "generated"),
        ):
            turns, name = (Turn("user", text),), f"{NAME}-{group}-{number:04d}"
            items.append(Item(name, NAME, turns, images, right, None, cluster, group, options=shown, scoring=scoring))
    return items
