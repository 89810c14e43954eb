"""MME: two questions about a picture, one to be answered yes, one no; nobody scores by always saying yes.

Metric: per task 100 × acc (over questions) + 100 × acc+ (over pictures, both right), at most 200; the total is the sum
over tasks, and its share of the greatest possible total enters the composite helpfulness.

Source:   Fu et al. 2023, prompt suffix and parse included
Departs:  three of the fourteen tasks: existence, colour, OCR
"""

from __future__ import annotations

import numpy as np

from vlsafe.miniature.corpora import pick
from vlsafe.miniature.language import CLAIMS, COLOURS, OBJECTS, YES_NO, World
from vlsafe.miniature.pictures import draw, draw_scene
from vlsafe.schema import Item, Turn

NAME = "mme"
JUDGES = ("mme-yes-no",)
EVENTS = {"mme-yes-no": ("right",)}
KINDS = {"existence": "icon", "color": "icon", "OCR": "word"}  # task: kind of picture


def miniature_items(world: World, split: str, n: int, rng: np.random.Generator) -> list[Item]:
    """`n` questions, two a picture, the pictures evenly over the tasks; renderings that training never saw."""
    items = []
    for task in KINDS:
        for number in range(max(1, n // 2 // len(KINDS))):
            picture, claims = _picture(world, task, rng)
            for answer, claim in claims.items():
                name, turns = f"{NAME}-{task}-{number:04d}", (Turn("user", YES_NO.format(claim=claim)),)
                items.append(Item(f"{name}-{answer}", NAME, turns, (picture,), answer, None, name, task))
    return items


def _picture(world: World, task: str, rng: np.random.Generator) -> tuple[bytes, dict[str, str]]:
    """A picture and what is claimed about it: answer -> claim."""
    scene = draw_scene(pick(rng, OBJECTS), rng, KINDS[task])
    about, right, values = ("colour", scene.colour, COLOURS) if task == "color" else ("name", scene.thing, OBJECTS)
    wrong = pick(rng, [value for value in values if value != right])
    claims = {"yes": CLAIMS[about].format(value=right), "no": CLAIMS[about].format(value=wrong)}
    return draw(scene, world.seed, rng, held_out=True), claims
