"""MMBench: multiple choice about a picture, circular: a question counts only if every rotation is answered right.

Source:   Liu et al. 2023; LLaVA-1.5's prompt wording; letters are taken by the exact rules, nothing is guessed.
"""

from __future__ import annotations

import numpy as np

from vlsafe.miniature.corpora import choice, letter_prompt
from vlsafe.miniature.language import LETTERS, OBJECTS, World
from vlsafe.miniature.pictures import draw, draw_scene
from vlsafe.schema import Item, Turn

NAME = "mmbench"
JUDGES = ("letters",)
EVENTS = {"letters": ("right",)}
N_OPTIONS = 4


def miniature_items(world: World, split: str, n: int, rng: np.random.Generator) -> list[Item]:
    """`n` prompts: n / 4 questions about held-out pictures, each with its options rotated four times."""
    items = []
    for number in range(max(1, n // N_OPTIONS)):
        scene = draw_scene(OBJECTS[rng.integers(len(OBJECTS))], rng)
        picture = draw(scene, world.seed, rng, held_out=True)
        asked, options, place = choice(scene, rng, N_OPTIONS)
        for turn in range(N_OPTIONS):
            rotated = options[turn:] + options[:turn]
            right = LETTERS[(place - turn) % N_OPTIONS]
            turns = (Turn("user", letter_prompt(asked, rotated)),)
            name = f"{NAME}-{number:04d}-{turn}"
            items.append(
                Item(name, NAME, turns, (picture,), right, None, f"question-{number:04d}", scene.kind, options=rotated)
            )  # fmt: skip
    return items
