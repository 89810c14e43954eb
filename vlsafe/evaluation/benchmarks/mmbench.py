"""MMBench: multiple choice about a picture, circular: a question counts only if every rotation is answered right.

Source:   Liu et al. 2023; LLaVA-1.5's prompt wording; letters are taken by the exact rules, nothing is guessed.
"""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlsafe.core.schema import Item, Turn
from vlsafe.data.miniature.corpora import choice, letter_prompt
from vlsafe.data.miniature.language import LETTERS, OBJECTS, World
from vlsafe.data.miniature.pictures import draw, draw_scene
from vlsafe.evaluation.benchmarks import official
from vlsafe.evaluation.benchmarks.official import Marked, Score

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


FOLDER = "MMBench"
OFFICIAL = {"all": ("mmbench-letters",)}
COPY = 1_000_000
DIVERGENCES = (
    "where the exact rules read no letter the response is unjudged; the original asks ChatGPT (mmbench-extractor here, in our "
    "words) and, that failing, draws a letter",
    "LLaVA does not score locally; its prompt is used for generation",
    "circular accuracy needs all rotations of a question in the file; none are made up",
)


def part(item: Item) -> str:
    """All questions belong together."""
    return NAME


def load(folder: Path, subset: str = "all", pictures: bool = True) -> tuple[list[Item], list[str]]:
    """The one .tsv file of the folder, or `folder` itself if it is one; which file it is, is said in the notes.

    Rotations of question q have the index q + k · 1,000,000 and may name q in place of their picture.

    Raises:   ValueError where a question lacks a rotation or its answer is none of its options
    """
    path = folder if folder.is_file() else _only(official.home(folder, FOLDER, "*.tsv"))
    rows = official.read_table(path, ("index", "question", "A", "B", "answer", "image"), "\t")
    encoded = {row["index"]: row["image"] for row in rows}
    lost: list[str] = []
    items = []
    for row in rows:
        options = tuple(row[letter] for letter in LETTERS[:4] if row.get(letter, "") not in ("", "nan"))
        question = int(row["index"]) % COPY
        if row["answer"] and row["answer"] not in LETTERS[: len(options)]:
            raise ValueError(f"question {row['index']} of {path} has {len(options)} options and the answer {row['answer']!r}")
        hint = row.get("hint", "")
        asked = f"{hint}\n{row['question']}" if hint not in ("", "nan") else row["question"]
        shown = _picture(row, encoded, lost) if pictures else ()
        if shown or not pictures:
            ability = row.get("l2-category") or row.get("L2-category") or ""
            known: dict[str, Any] = dict(
                category=row.get("category"), group=ability, cluster=f"question-{question}", question=asked
            )  # fmt: skip
            listed = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
            turns = (Turn("user", f"{asked}\n{listed}\n{official.LETTER_SUFFIX}"),)
            items.append(Item(row["index"], NAME, turns, shown, row["answer"] or None, options=options, **known))
    return items, [*_rotations(items, path, len(rows)), *official.told(lost)]


def _only(folder: Path) -> Path:
    found = sorted(folder.glob("*.tsv"))
    if len(found) > 1:
        raise ValueError(f"{folder} holds {len(found)} tables; name the one you mean: {', '.join(path.name for path in found)}")
    return found[0]


def _picture(row: Mapping[str, str], encoded: Mapping[str, str], lost: list[str]) -> tuple[bytes, ...]:
    held = row["image"]
    held = encoded.get(held, "") if len(held) < 64 else held
    try:
        return official.seen(None, row["index"], lost, base64.b64decode(held, validate=True) or None)
    except ValueError:
        lost.append(f"{row['index']} (no base64)")
        return ()


def _rotations(items: Sequence[Item], path: Path, n: int) -> list[str]:
    """What is to be said about a file's size and rotations."""
    copies = Counter(item.cluster for item in items)
    notes = [f"file {path.name}, {n:,} rows, {len(copies):,} questions"]
    if all(count == 1 for count in copies.values()):
        return [*notes, "the file has no rotated copies: accuracy is not circular"]
    wanted = {item.cluster: len(item.options) for item in items}
    if short := [name for name, count in copies.items() if count != wanted[name]]:
        raise ValueError(f"{path} has not all rotations of {len(short)} questions, first {short[0]}")
    return notes


def names(item: Item) -> tuple[str, ...]:
    """The row's index."""
    return (item.id,)


def qualifiers(item: Item) -> dict[str, str]:
    """Nothing: indices are unique."""
    return {}


def scores(marks: Mapping[str, Sequence[Marked]]) -> Iterator[Score]:
    """Circular accuracy (all rotations right) and accuracy of single rows; per L2 and L3 ability."""
    cuts = {"l2": lambda item: item.group or None, "l3": lambda item: item.category or None}
    for judge, marked in marks.items():
        right = [(row.item, _right(row.item, row.labels[0])) for row in marked]
        whole: dict[str | None, list[tuple[Item, bool | None]]] = {}
        for item, event in right:
            whole.setdefault(item.cluster, []).append((item, event))
        if any(len(rows) > 1 for rows in whole.values()):
            circular = [(rows[0][0], official.settled((event for _, event in rows), all)) for rows in whole.values()]
            yield from official.shares("circular_accuracy", judge, circular, **cuts)
        yield from official.shares("accuracy", judge, right, **cuts)


def _right(item: Item, label: str | None) -> bool | None:
    return None if label is None else label in ("right", item.reference)
