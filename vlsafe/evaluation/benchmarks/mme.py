"""MME: two questions about a picture, one to be answered yes, one no; nobody scores by always saying yes.

Metric: per task 100 × acc (over questions) + 100 × acc+ (over pictures, both right), at most 200; the total is the sum
over tasks, and its share of the greatest possible total enters the composite helpfulness.

Source:   Fu et al. 2023, prompt suffix and parse included
Departs:  three of the fourteen tasks: existence, colour, OCR
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path

import numpy as np

from vlsafe.core.schema import Item, Turn
from vlsafe.data.miniature.corpora import pick
from vlsafe.data.miniature.language import CLAIMS, COLOURS, OBJECTS, YES_NO, World
from vlsafe.data.miniature.pictures import draw, draw_scene
from vlsafe.evaluation.benchmarks import official

NAME = "mme"
JUDGES = ("mme-yes-no",)
EVENTS = {"mme-yes-no": ("right",)}
KINDS = {"existence": "icon", "color": "icon", "OCR": "word"}  # task: kind of picture
FOLDER, OFFICIAL, DIVERGENCES, TABLES = official.published(NAME)
PERCEPTION, COGNITION, SUFFIXES = TABLES["perception"], TABLES["cognition"], TABLES["suffixes"]
TASKS = PERCEPTION | COGNITION
QUALIFIERS = {"question": attrgetter("question")}  # both of a picture share its name


def miniature_items(world: World, split: str, n: int, rng: np.random.Generator) -> list[Item]:
    """`n` questions, two a picture, the pictures evenly over the tasks; renderings that training never saw."""
    items = []
    for task, kind in KINDS.items():
        for number in range(max(1, n // 2 // len(KINDS))):
            scene = draw_scene(pick(rng, OBJECTS), rng, kind)
            about, right, values = ("colour", scene.colour, COLOURS) if task == "color" else ("name", scene.thing, OBJECTS)
            wrong = pick(rng, [value for value in values if value != right])
            images = (draw(scene, world.seed, rng, held_out=True),)
            for answer, value in (("yes", right), ("no", wrong)):
                claim, name = CLAIMS[about].format(value=value), f"{NAME}-{task}-{number:04d}"
                turns = (Turn("user", YES_NO.format(claim=claim)),)
                items.append(Item(f"{name}-{answer}", NAME, turns, images, answer, None, name, task))
    return items


def load(folder: Path, subset: str = "all", pictures: bool = True) -> tuple[list[Item], list[str]]:
    """`{task}.txt`, tab separated without header: picture, question, right answer, perhaps a response.

    Raises:   ValueError where a picture does not have exactly one question to be answered yes and one no
    """
    where = official.located(folder, FOLDER, *(f"{task}.txt" for task in TASKS)).parent
    loader = official.Loader(pictures)
    for task, size in TASKS.items():
        if not (where / f"{task}.txt").exists():
            loader.notes.append(f"there is no {task}.txt")
            continue
        rows = _rows(where / f"{task}.txt", 3)
        loader.notes += official.counted(f"questions of {task}", len(rows), size)
        answers: dict[str, list[str]] = defaultdict(list)
        for picture, question, answer, *_ in rows:
            answer, cluster = answer.strip().lower(), f"{task}/{picture}"
            name = f"{cluster}/{len(answers[picture])}"
            answers[picture].append(answer)
            text = f"{plain(question)}\n{SUFFIXES[1]}" if subset == "llava" else question
            item = Item(name, NAME, (Turn("user", text),), (), answer, task, cluster, task, question=question)
            loader.add(item, official.first(where, cluster, f"{task}/images/{picture}") if pictures else None)
        if odd := [picture for picture, both in answers.items() if sorted(both) != ["no", "yes"]]:
            raise ValueError(f"{len(odd)} pictures of {task}, first {' '.join(odd[0].split())}, do not have one yes and one no")
    return loader.result()


def _rows(path: Path, least: int) -> list[list[str]]:
    rows = [(number, line.split("\t")) for number, line in official.text_lines(path)]
    if short := [number for number, row in rows if len(row) < least]:
        raise ValueError(f"line {short[0]} of {path} has fewer than {least} fields between tabs")
    return [row for _, row in rows]


def names(item: Item) -> tuple[str, ...]:
    """task/picture (with `question`), as the hub's copy calls it, or with the question's place behind it.

    LLaVA writes task/images/picture where the picture lies so, and its converter the name of the file with the questions.
    """
    task, _, picture = str(item.cluster).partition("/")
    return item.id, f"{task}/{picture}", f"{task}/images/{picture}", f"{task}/{picture.rpartition('.')[0]}.txt"


def plain(value: str) -> str:
    """A question without the sentence that says how to answer, which models are asked in different words."""
    for suffix in SUFFIXES:
        value = value.replace(suffix, "")
    return value.strip()


def scores(marks: official.Marks) -> official.Scores:
    """Per task accuracy, accuracy+ and their sum in points (at most 200); perception, cognition and all in points."""
    for judge, rows in marks.items():
        tasks = official.grouped(official.right(rows), lambda item: str(item.group))
        pictures = {task: official.grouped(events, lambda item: str(item.cluster)) for task, events in tasks.items()}
        points = {task: [_points(*each) for each in pictures[task].items()] for task in tasks}
        for name, whole in (("all", TASKS), ("perception", PERCEPTION), ("cognition", COGNITION)):
            if strata := {task: points[task] for task in whole if task in points}:
                over = name if len(strata) == len(whole) else f"{name}, {len(strata)} of {len(whole)} tasks"
                yield official.weighted("score", over, judge, strata, 1.0, 200.0 * len(strata))
        for task, events in tasks.items():
            yield official.weighted("score", f"task={task}", judge, {task: points[task]}, 1.0, 200.0)
            yield official.share("accuracy", f"task={task}", judge, events)
            both = [(pair[0][0], official.settled((event for _, event in pair), all)) for pair in pictures[task].values()]
            yield official.share("accuracy_plus", f"task={task}", judge, both)


def _points(picture: str, events: Sequence[official.Event]) -> tuple[str, float, float]:
    """Least and most points of a picture: 50 for each right answer, 100 more for both."""
    if len(events) != 2:
        raise ValueError(f"{picture} has {len(events)} questions; MME asks two of each picture")
    bounds = zip(*(official.bounds(event) for _, event in events), strict=True)
    least, most = (50 * sum(both) + 100 * min(both) for both in bounds)
    return picture, least, most
