"""SORRY-Bench: does a model fulfil unsafe requests? Metric: fulfilment rate over prompts, overall and per category.

Source:   Xie et al. 2024; the judge's 1 is fulfilment. The miniature asks about every harmful test action.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from vlsafe.core.schema import Item, Turn
from vlsafe.data.miniature.language import HOW, TEST, World
from vlsafe.evaluation.benchmarks import official
from vlsafe.evaluation.benchmarks.howtos import COMPLIED, howto, spread

NAME = "sorry_bench"
JUDGES, EVENTS = tuple(COMPLIED), COMPLIED
FOLDER, OFFICIAL, DIVERGENCES, TABLES = official.published(NAME)
STYLES = TABLES["styles"]
DOMAIN_OF = {number: name for name, (start, end) in TABLES["domains"].items() for number in range(start, end + 1)}
QUALIFIERS = {"prompt_style": official.GROUP, "style": official.GROUP}


def miniature_items(world: World, split: str, n: int, rng: np.random.Generator) -> list[Item]:
    """`n` items about the harmful actions of a split, each in as many wordings as that needs."""
    chosen = spread(world.actions(split, "harmful"), HOW[TEST], n, rng)
    return [howto(world, NAME, "base", action, HOW[TEST], k) for action, k in chosen]


def load(folder: Path, subset: str = "all", pictures: bool = True) -> tuple[list[Item], list[str]]:
    """`question.jsonl` and every `question_{style}.jsonl` beside it; rows without text are dropped and named.

    A judge is told the base wording whatever the style, as in the original.
    """
    base = official.located(folder, FOLDER, "question.jsonl", "data/question.jsonl")
    paths = {"base": base} | {path.stem.removeprefix("question_"): path for path in sorted(base.parent.glob("question_*.jsonl"))}
    official.needs(dict.fromkeys(STYLES), list(paths), f"SORRY-Bench, as its card describes it, in {base.parent},")
    wordings: dict[int, str] = {}
    items, notes = [], []
    for style, path in paths.items():
        rows = list(official.read_lines(path))
        for row in rows:
            official.needs(row, ("question_id", "category", "turns"), f"a row of {path}")
            number, category, texts = int(row["question_id"]), int(row["category"]), row["turns"] or [None]
            if len(texts) != 1 or not 1 <= category <= 45:
                what = f"{len(texts)} turns and the category {category}"
                raise ValueError(f"question {number} of {path} has {what}; official rows have one turn and categories 1 to 45")
            if not texts[0]:
                notes.append(f"{style}/{number} has no text and is left out")
                continue
            wording = wordings.setdefault(number, texts[0]) if style == "base" else wordings.get(number)
            if wording is None:
                raise ValueError(f"question {number} of {path} has no base wording in {base}")
            name, turns, cluster = f"{style}/{number}", (Turn("user", texts[0]),), f"question-{number}"
            items.append(Item(name, NAME, turns, (), None, str(category), cluster, style, True, question=wording))
        notes += official.counted(f"rows of style {style}", len(rows), 450, 440)
        if len(rows) == 440 and any((int(row["question_id"]) - 1) // 10 + 1 != int(row["category"]) for row in rows):
            notes.append(f"style {style} has 440 rows, whose ids do not count up with their categories as in 202503")
    return items, notes


def scores(marks: official.Marks) -> official.Scores:
    """Fulfilment rate per style, and within it per category and (202503) per domain."""
    for judge, rows in marks.items():
        fulfilled = official.judged(judge, "complied", rows)
        for style, events in official.grouped(fulfilled, official.GROUP).items():
            cuts: dict[str, Any] = {"category": official.CATEGORY}
            if max(int(str(item.category)) for item, _ in events) <= 44:
                cuts = {"domain": lambda item: DOMAIN_OF[int(item.category)]} | cuts
            yield from official.shares("fulfilment_rate", judge, events, cuts, f"style={style}")
