"""SEED-Bench: multiple choice about a picture, scored in two ways that must not be mixed.

`likelihood`, the official one: the question stands without options, and the answer is the option text on which the
model's loss is lowest. `letter`, LLaVA's: the options are shown, and the written answer must equal the letter exactly.
The composite helpfulness takes the official one.

Source:   Li et al. 2023; Liu et al. 2023 (LLaVA-1.5's prompt and its convert_seed_for_submission)
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from vlsafe.core.schema import Item, Turn
from vlsafe.data.miniature.corpora import choice, letter_prompt, pick
from vlsafe.data.miniature.language import LETTERS, OBJECTS, World
from vlsafe.data.miniature.pictures import draw, draw_scene
from vlsafe.evaluation.benchmarks import official

NAME = "seed_bench"
JUDGES = ("seed-letter",)
EVENTS = {"seed-letter": ("right",)}
FOLDER, OFFICIAL, DIVERGENCES, TABLES = official.published(NAME)


def miniature_items(world: World, split: str, n: int, rng: np.random.Generator) -> list[Item]:
    """`n` / 2 questions about held-out renderings, each scored in both ways."""
    items = []
    for number in range(max(1, n // 2)):
        scene = draw_scene(pick(rng, OBJECTS), rng)
        images, (text, options, place) = (draw(scene, world.seed, rng, held_out=True),), choice(scene, rng)
        right, cluster = LETTERS[place], f"seed-question-{number:04d}"
        sentences = tuple(f"{option}." for option in options)  # as this world answers: "red."
        for group, prompt, answers in (("likelihood", text, sentences), ("letter", letter_prompt(text, options), options)):
            name, turns = f"{NAME}-{group}-{number:04d}", (Turn("user", prompt),)
            scoring = "likelihood" if group == "likelihood" else "generated"
            items.append(Item(name, NAME, turns, images, right, None, cluster, group, options=answers, scoring=scoring))
    return items


def load(folder: Path, subset: str = "likelihood", pictures: bool = True) -> tuple[list[Item], list[str]]:
    """`SEED-Bench.json`, asked without options and ranked (`likelihood`) or with them in LLaVA's words (`letter`).

    Official files hold some ids twice: the first counts, the others are named.
    """
    path, ranked = official.located(folder, FOLDER, "SEED-Bench.json"), subset == "likelihood"
    rows = official.read_json(path)
    rows = rows["questions"] if isinstance(rows, dict) else rows
    loader, frameless, seen, repeated = official.Loader(pictures), 0, set[str](), list[str]()
    for row in rows:
        official.needs(row, ("question_id", "question", "answer", "data_type", "data_id", "question_type_id"), f"a row of {path}")
        name, options = str(row["question_id"]), tuple(str(row[f"choice_{letter}"]) for letter in "abcd")
        if name in seen:
            repeated.append(name)
            continue
        seen.add(name)
        text, kind, number = row["question"], row["data_type"], int(row["question_type_id"])
        if row["answer"] not in LETTERS[:4] or (kind == "image") != (number <= 9):
            raise ValueError(f"question {name} of {path} is a {kind} of type {number} with answer {row['answer']!r}")
        place = f"video-image/{name}" if kind == "video" else f"image/{row['data_id']}"
        names = (f"SEED-Bench-{place}{suffix}" for suffix in ("", ".jpg", ".png"))
        frame = official.first(path.parent, *names) if pictures else None
        if pictures and kind == "video" and frame is None:
            frameless += 1
            continue
        turns = (Turn("user", text if ranked else official.letter_prompt(text, options)),)
        category, scoring = TABLES["dimensions"][number - 1], "likelihood" if ranked else "generated"
        known = dict(category=category, cluster=str(row["data_id"]), group=kind, options=options, scoring=scoring, question=text)
        loader.add(Item(name, NAME, turns, (), row["answer"], **known), frame)
    if repeated:
        loader.notes.append(f"{len(repeated)} question ids stand there again, first {repeated[0]}: the first of each counts")
    loader.notes += [f"{len(rows):,} questions in the file", *official.counted("questions", len(rows), 17990, 17997, 19242)]
    loader.notes += [f"{frameless} video questions have no frame and are left out"] if frameless else []
    return loader.result()


def scores(marks: official.Marks) -> official.Scores:
    """Accuracy per kind and per dimension, named after how the answers came about."""
    for judge, rows in marks.items():
        way = "first_character" if judge == "first-character" else "letter"
        way = "likelihood" if rows[0].item.scoring == "likelihood" else way
        cuts = {"type": official.GROUP, "dimension": official.CATEGORY}
        yield from official.shares(f"accuracy_{way}", judge, official.right(rows), cuts)
