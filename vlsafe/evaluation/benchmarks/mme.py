"""MME: two questions about a picture, one to be answered yes, one no; nobody scores by always saying yes.

Metric: per task 100 × acc (over questions) + 100 × acc+ (over pictures, both right), at most 200; the total is the sum
over tasks, and its share of the greatest possible total enters the composite helpfulness.

Source:   Fu et al. 2023, prompt suffix and parse included
Departs:  three of the fourteen tasks: existence, colour, OCR
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

from vlsafe.core.schema import Item, Turn
from vlsafe.data.miniature.corpora import pick
from vlsafe.data.miniature.language import CLAIMS, COLOURS, OBJECTS, YES_NO, World
from vlsafe.data.miniature.pictures import draw, draw_scene
from vlsafe.evaluation.benchmarks import official
from vlsafe.evaluation.benchmarks.official import Marked, Score

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


FOLDER = "MME"
OFFICIAL = {"all": ("mme-yes-no",)}
part = attrgetter("group")
PERCEPTION = {
    "existence": 60, "count": 60, "position": 60, "color": 60, "posters": 294, "celebrity": 340, "scene": 400, "landmark": 400,
    "artwork": 400, "OCR": 40,
}  # fmt: skip
COGNITION = {"commonsense_reasoning": 140, "numerical_calculation": 40, "text_translation": 40, "code_reasoning": 40}
SUFFIXES = ("Please answer yes or no.", "Answer the question using a single word or phrase.")  # the original's, LLaVA's
DIVERGENCES = (
    "a task's interval is taken over pictures, whose two questions count together",
    "LLaVA replaces the question's last sentence by its own; the subset `llava` asks so, scoring is the same",
)
OFFICIAL["llava"] = OFFICIAL["all"]


def load(folder: Path, subset: str = "all", pictures: bool = True) -> tuple[list[Item], list[str]]:
    """`{task}.txt`, tab separated without header: picture, question, right answer, perhaps a response.

    Raises:   ValueError where a picture does not have exactly one question to be answered yes and one no
    """
    tasks = PERCEPTION | COGNITION
    where = official.home(folder, FOLDER, *(f"{task}.txt" for task in tasks))
    items: list[Item] = []
    notes: list[str] = []
    lost: list[str] = []
    for task, size in tasks.items():
        if not (where / f"{task}.txt").exists():
            notes.append(f"there is no {task}.txt")
            continue
        rows = _rows(where / f"{task}.txt", 3)
        notes += official.counted(f"questions of {task}", len(rows), size)
        answers: dict[str, list[str]] = {}
        for picture, question, answer, *_ in rows:
            answers.setdefault(picture, []).append(answer.strip().lower())
            name = f"{task}/{picture}/{len(answers[picture]) - 1}"
            places = (f"{task}/{picture}", f"{task}/images/{picture}")
            shown = official.seen(official.first(where, *places), name, lost) if pictures else ()
            if shown or not pictures:
                known: dict[str, Any] = dict(
                    reference=answer.strip().lower(), group=task, category=task, cluster=f"{task}/{picture}", question=question
                )
                items.append(Item(name, NAME, (Turn("user", _worded(question, subset)),), shown, **known))
        if odd := [picture for picture, given in answers.items() if sorted(given) != ["no", "yes"]]:
            raise ValueError(f"{len(odd)} pictures of {task}, first {odd[0]}, do not have one yes and one no")
    return items, notes + official.told(lost)


def _rows(path: Path, least: int) -> list[list[str]]:
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    if short := [number for number, row in enumerate(rows, 1) if len(row) < least]:
        raise ValueError(f"line {short[0]} of {path} has fewer than {least} fields between tabs")
    return rows


def _worded(question: str, subset: str) -> str:
    return question.replace(SUFFIXES[0], "").strip() + f"\n{SUFFIXES[1]}" if subset == "llava" else question


def official_responses(folder: Path, items: Sequence[Item]) -> Iterator[dict[str, str]]:
    """The rows of a folder of official result files, each with the id of its item.

    Raises:   ValueError where a line lacks its response or belongs to no question
    """
    known = {(item.group, item.cluster, _bare(item.question)): item.id for item in items}
    paths = [folder / f"{task}.txt" for task in PERCEPTION | COGNITION if (folder / f"{task}.txt").exists()]
    if not paths:
        raise FileNotFoundError(f"{folder} holds none of MME's result files, such as existence.txt")
    for path in paths:
        for number, (picture, question, _, *said) in enumerate(_rows(path, 4), 1):
            key = (path.stem, f"{path.stem}/{picture}", _bare(question))
            if key not in known:
                raise ValueError(f"line {number} of {path} is about no question of the data folder")
            yield {"id": known[key], "response": "\t".join(said)}


def _bare(question: str | None) -> str:
    """A question without the sentence that says how to answer, which models are asked in different words."""
    bare = question or ""
    for suffix in SUFFIXES:
        bare = bare.replace(suffix, "")
    return bare.strip()


def names(item: Item) -> tuple[str, ...]:
    """task/picture (with `question`), as the hub's copy calls it, or with the question's place behind it."""
    return item.id, str(item.cluster)


def qualifiers(item: Item) -> dict[str, str]:
    """The question, since both of a picture share its name."""
    return {"question": str(item.question)}


def plain(value: str) -> str:
    """A question for comparison."""
    return _bare(value)


def scores(marks: Mapping[str, Sequence[Marked]]) -> Iterator[Score]:
    """Per task accuracy, accuracy+ and their sum in points (at most 200); perception, cognition and all in points."""
    for judge, marked in marks.items():
        tasks: dict[str, dict[str, list[bool | None]]] = {}
        for row in marked:
            event = None if row.labels[0] is None else row.labels[0] == "right"
            tasks.setdefault(str(row.item.group), {}).setdefault(str(row.item.cluster), []).append(event)
        points = {
            task: [
                (picture, 50 * (a + b) + 100 * a * b, 50 * (c + d) + 100 * c * d) for picture, (a, c), (b, d) in _bounds(pictures)
            ]
            for task, pictures in tasks.items()
        }
        for part, of in (("all", PERCEPTION | COGNITION), ("perception", PERCEPTION), ("cognition", COGNITION)):
            strata = {task: points[task] for task in of if task in points}
            if strata:
                over = part if len(strata) == len(of) else f"{part}, {len(strata)} of {len(of)} tasks"
                yield official.weighted("score", over, judge, strata, 1.0, 200.0 * len(strata))
        for task, pictures in tasks.items():
            yield official.weighted("score", f"task={task}", judge, {task: points[task]}, 1.0, 200.0)
            clusters = [picture for picture, events in pictures.items() for _ in events]
            yield official.share("accuracy", f"task={task}", judge, [e for events in pictures.values() for e in events], clusters)
            whole = [official.settled(events, all) for events in pictures.values()]
            yield official.share("accuracy_plus", f"task={task}", judge, whole, list(pictures))


def _bounds(pictures: Mapping[str, Sequence[bool | None]]) -> Iterator[tuple[str, tuple[float, float], tuple[float, float]]]:
    for picture, events in pictures.items():
        if len(events) != 2:
            raise ValueError(f"{picture} has {len(events)} questions; MME asks two of each picture")
        yield picture, official.bounds(events[0]), official.bounds(events[1])
