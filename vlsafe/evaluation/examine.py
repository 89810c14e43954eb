"""An examination: items to responses, responses to verdicts, verdicts to a long raw table.

Generation and judging are two steps with rows between them, so that any judge can be put to stored responses. The
raw table has one row per item × model × judge, and nothing in it is averaged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vlsafe.core.scale import Exam
from vlsafe.core.schema import Item, Response, Turn
from vlsafe.evaluation.benchmarks import BENCHMARKS, CONTROLS
from vlsafe.evaluation.judges import UNJUDGED, judge

Rows = list[dict[str, Any]]
MODEL = {"scale": "", "backbone": "", "seed": 0, "model": "", "stage": "", "recipe": "", "step": 0, "exam": "full"}
"""The columns by which a raw table tells models apart."""


class Examination(NamedTuple):
    """What a model answered, in the order of the items, and the raw table: one row per item × judge."""

    responses: list[Response]
    rows: Rows


def examine(
    folder: str | Path, items: Sequence[Item], exam: Exam, record: Mapping[str, Any] | None = None, without: Sequence[str] = (),
    progress: Callable[[int], None] = lambda done: None,
) -> Examination:  # fmt: skip
    """Ask a checkpoint every item that it can answer, and judge its responses.

    `folder` holds an ordinary Hugging Face checkpoint, text-only or with a vision tower; `exam` says by which engine, dtype and
    batch size it answers; `record` fills the columns of MODEL (by default the folder's name stands for the model); judges
    named in `without` are left out.

    Shapes:   N items, of which a text-only model answers those without pictures  ->  at most N responses
    Units:    `progress` counts items
    Raises:   FileNotFoundError where the folder holds no checkpoint; ConnectionAbortedError where a server stops answering
    """
    from vlsafe.models.checkpoints import is_multimodal

    columns = {**MODEL, "model": Path(folder).name, **(record or {})}
    chosen = answerable(items, is_multimodal(Path(folder)))
    responses = respond(Path(folder), chosen, columns["model"], exam, progress)
    return Examination(responses, raw_table(chosen, responses, columns, without))


def respond(
    folder: Path, items: Sequence[Item], name: str, exam: Exam, progress: Callable[[int], None] = lambda done: None
) -> list[Response]:
    """Responses of a checkpoint in the order of the items, by the engine that `exam` names.

    Options are ranked by the local engine also where a server writes the responses: servers do not return likelihoods.
    """
    from vlsafe.evaluation import engines, servers
    from vlsafe.models import checkpoints

    served = [item for item in items if item.scoring == "generated"] if exam.serve else []
    local = [item for item in items if item.scoring != "generated"] if exam.serve else items
    responses = servers.serve_and_respond(exam.serve, folder, served, name, exam.max_new_tokens) if served else []
    if local:
        model, processor = checkpoints.ready(folder, exam.dtype), checkpoints.load_processor(folder)
        responses += engines.respond(model, processor, local, name, exam.batch_size, exam.max_new_tokens, progress)
    by_item = {response.item: response for response in responses}
    return [by_item[item.id] for item in items]


def raw_table(
    items: Sequence[Item], responses: Sequence[Response], record: Mapping[str, Any], without: Sequence[str] = ()
) -> Rows:
    """Judge responses by every judge that their benchmark names, except those in `without`.

    `record` (model, step, …) is added to each row. `event` is whether the benchmark's event happened, None where the response
    could not be judged.
    """
    by_id, rows = {item.id: item for item in items}, []
    for name, benchmark in (BENCHMARKS | CONTROLS).items():
        answers = [response for response in responses if response.benchmark == name]
        for judge_name in [each for each in benchmark.JUDGES if each not in without] if answers else ():
            for verdict, response in zip(judge(judge_name, items, answers), answers, strict=True):
                item = by_id[verdict.item]
                event = None if verdict.label == UNJUDGED else verdict.label in benchmark.EVENTS[judge_name]
                row = dict(
                    benchmark=name, group=item.group, category=item.category, cluster=item.cluster, item=item.id,
                    harmful=item.harmful, judge=judge_name, label=verdict.label, event=event, truncated=response.truncated,
                )  # fmt: skip
                rows.append({**record, **row})
    return rows


def guard_rows(guard: Any, name: str, items: Iterable[Item], rows: Rows, responses: Rows) -> Rows:
    """A guard's verdicts on stored responses, as rows of the raw table by the judge `name`; its event is an unsafe conversation.

    `rows` are of a raw table, one per response; `responses` hold the texts. An assessment that cannot be read is unjudged.
    """
    by_id = {item.id: item for item in items}
    texts = {(response["item"], response["model"]): response["text"] for response in responses}
    talks = [(*by_id[row["item"]].turns, Turn("assistant", texts[row["item"], row["model"]])) for row in rows]
    labels = {True: "unsafe", False: "safe", None: UNJUDGED}
    verdicts = [assessment.unsafe for assessment in guard.assess(talks)]
    return [{**row, "judge": name, "label": labels[v], "event": v} for row, v in zip(rows, verdicts, strict=True)]


def all_items(world: Any, split: str, n: int) -> list[Item]:
    """Every benchmark's items of a split of the miniature's world, each benchmark from its own random stream."""
    return [
        item for name, benchmark in BENCHMARKS.items()
        for item in benchmark.miniature_items(world, split, n, world.rng(f"items {name} {split}"))
    ]  # fmt: skip


def panel(items: Sequence[Item], size: int) -> list[Item]:
    """A stratified selection: evenly spaced clusters of every benchmark × group × harmfulness, `size` items a benchmark.

    Whole clusters are taken, so that circular questions stay complete.
    """
    chosen: set[str] = set()
    for name in dict.fromkeys(item.benchmark for item in items):
        strata: dict[tuple[Any, ...], dict[str, list[Item]]] = {}
        for item in (i for i in items if i.benchmark == name):
            strata.setdefault((item.group, item.harmful), {}).setdefault(str(item.cluster), []).append(item)
        for clusters in strata.values():
            names = sorted(clusters)
            per_cluster = sum(map(len, clusters.values())) / len(names)
            n = max(1, round(size / len(strata) / per_cluster))
            chosen_clusters = np.linspace(0, len(names) - 1, min(n, len(names))).round().astype(int)
            chosen.update(item.id for place in chosen_clusters for item in clusters[names[place]])
    return [item for item in items if item.id in chosen]


def answerable(items: Iterable[Item], multimodal: bool) -> list[Item]:
    """The items that a model can be asked: a text-only model is not asked about pictures."""
    return [item for item in items if multimodal or not item.images]
