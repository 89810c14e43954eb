"""MMBench: multiple choice about a picture, circular: a question counts only if every rotation is answered right.

Source:   Liu et al. 2023; LLaVA-1.5's prompt wording; letters are taken by the exact rules, nothing is guessed.
"""

from __future__ import annotations

import base64
from collections import Counter
from operator import attrgetter
from pathlib import Path

import numpy as np

from vlsafe.core.schema import Item, Turn
from vlsafe.data.miniature.corpora import choice, letter_prompt
from vlsafe.data.miniature.language import LETTERS, OBJECTS, World
from vlsafe.data.miniature.pictures import draw, draw_scene
from vlsafe.evaluation.benchmarks import official

NAME = "mmbench"
JUDGES = ("letters",)
EVENTS = {"letters": ("right",)}
N_OPTIONS = 4
FOLDER, OFFICIAL, DIVERGENCES, _ = official.published(NAME)
part = attrgetter("benchmark")  # all questions belong together
COPY = 1_000_000  # the step between the indices of a question's rotations


def miniature_items(world: World, split: str, n: int, rng: np.random.Generator) -> list[Item]:
    """`n` prompts: n / 4 questions about held-out pictures, each with its options rotated four times."""
    items = []
    for number in range(max(1, n // N_OPTIONS)):
        scene = draw_scene(OBJECTS[rng.integers(len(OBJECTS))], rng)
        picture = draw(scene, world.seed, rng, held_out=True)
        text, options, place = choice(scene, rng, N_OPTIONS)
        for turn in range(N_OPTIONS):
            name, cluster = f"{NAME}-{number:04d}-{turn}", f"question-{number:04d}"
            right, rotated = LETTERS[(place - turn) % N_OPTIONS], options[turn:] + options[:turn]
            turns = (Turn("user", letter_prompt(text, rotated)),)
            items.append(Item(name, NAME, turns, (picture,), right, None, cluster, scene.kind, options=rotated))
    return items


def load(folder: Path, subset: str = "all", pictures: bool = True) -> tuple[list[Item], list[str]]:
    """The one .tsv file of the folder, or `folder` itself if it is one; which file it is, is said in the notes.

    Rotations of question q have the index q + k · 1,000,000 and may name q in place of their picture. Those that are there count:
    the file of 2023 keeps a last option such as "none of these" in its place, so that four options have three rotations.

    Raises:   ValueError where a question's answer is none of its options
    """
    tables = [folder] if folder.is_file() else sorted(official.located(folder, FOLDER, "*.tsv").parent.glob("*.tsv"))
    if len(tables) > 1:
        raise ValueError(f"{len(tables)} tables in one folder; name the one you mean: {', '.join(map(str, tables))}")
    path = tables[0]
    rows = official.read_table(path, ("index", "question", "A", "B", "answer", "image"), "\t")
    encoded = {row["index"]: row["image"] for row in rows}
    loader = official.Loader(pictures)
    for row in rows:
        name, answer, text, hint = row["index"], row["answer"], row["question"], row.get("hint", "")
        letters = "".join(letter for letter in LETTERS[:4] if row.get(letter, "") not in ("", "nan"))
        if not LETTERS.startswith(letters):
            raise ValueError(f"question {name} of {path} has the options {', '.join(letters)}: one before the last is empty")
        options = tuple(row[letter] for letter in letters)
        if answer and answer not in LETTERS[: len(options)]:
            raise ValueError(f"question {name} of {path} has {len(options)} options and the answer {answer!r}")
        text = f"{hint}\n{text}" if hint not in ("", "nan") else text
        turns, cluster = (Turn("user", official.letter_prompt(text, options)),), f"question-{int(name) % COPY}"
        l3, l2 = row.get("category"), row.get("l2-category") or row.get("L2-category") or ""
        item = Item(name, NAME, turns, (), answer or None, l3, cluster, l2, options=options, question=text)
        image = row["image"] if len(row["image"]) >= 64 else encoded.get(row["image"], "")
        try:
            loader.add(item, base64.b64decode(image, validate=True) or None if pictures else None)
        except ValueError:
            loader.lost[name] = "no base64"
    copies = Counter(item.cluster for item in loader.items)
    loader.notes.append(f"file {path.name}, {len(rows):,} rows, {len(copies):,} questions")
    if max(copies.values(), default=1) == 1:
        loader.notes.append("the file has no rotated copies: accuracy is not circular")
    elif short := dict.fromkeys(item.cluster for item in loader.items if copies[item.cluster] < len(item.options)):
        fewer = f"{len(short)} questions have fewer rotations than options, first {next(iter(short))}"
        loader.notes.append(f"{fewer}: those that are there count")
    return loader.result()


def scores(marks: official.Marks) -> official.Scores:
    """Circular accuracy (all rotations right) and accuracy of single rows; per L2 and L3 ability."""
    cuts = {"l2": lambda item: item.group or None, "l3": lambda item: item.category or None}
    for judge, rows in marks.items():
        right = official.right(rows, letters=True)
        questions = official.grouped(right, lambda item: item.cluster).values()
        if any(len(rotations) > 1 for rotations in questions):
            circular = [(events[0][0], official.settled((event for _, event in events), all)) for events in questions]
            yield from official.shares("circular_accuracy", judge, circular, cuts)
        yield from official.shares("accuracy", judge, right, cuts)
