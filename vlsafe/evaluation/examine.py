"""An examination: items to responses, responses to verdicts, verdicts to a long raw table.

Generation and judging are two steps with rows between them, so that any judge can be put to stored responses. The
raw table has one row per item × model × judge, and nothing in it is averaged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlsafe.core.scale import Exam
from vlsafe.core.schema import Item, Response
from vlsafe.evaluation.benchmarks import BENCHMARKS, CONTROLS
from vlsafe.evaluation.judges import judge
from vlsafe.evaluation.judges.marks import UNJUDGED


def all_items(world: Any, split: str, n: int) -> list[Item]:
    """Every benchmark's items of a split, each from its own random stream."""
    items: list[Item] = []
    for name, benchmark in BENCHMARKS.items():
        items += benchmark.miniature_items(world, split, n, world.rng(f"items {name} {split}"))
    return items


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
            wanted = max(1, round(size / len(strata) / per_cluster))
            places = np.linspace(0, len(names) - 1, min(wanted, len(names))).round().astype(int)
            chosen.update(item.id for place in places for item in clusters[names[place]])
    return [item for item in items if item.id in chosen]


def answerable(items: Iterable[Item], multimodal: bool) -> list[Item]:
    """The items that a model can be asked: a text-only model is not asked about pictures."""
    return [item for item in items if multimodal or not item.images]


def raw_table(
    items: Sequence[Item], responses: Sequence[Response], facts: dict[str, Any], without: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Judge responses by every judge that their benchmark names, `without` some; `facts` (model, step, …) are added to each row.

    `event` is whether the benchmark's event happened, None where the response could not be judged.
    """
    by_id = {item.id: item for item in items}
    rows = []
    for name, benchmark in (BENCHMARKS | CONTROLS).items():
        given = [response for response in responses if response.benchmark == name]
        for judge_name in [each for each in benchmark.JUDGES if each not in without] if given else ():
            for verdict, response in zip(judge(judge_name, items, given), given, strict=True):
                item = by_id[verdict.item]
                event = None if verdict.label == UNJUDGED else verdict.label in benchmark.EVENTS[judge_name]
                told = dict(
                    benchmark=name, group=item.group, category=item.category, cluster=item.cluster, item=item.id,
                    harmful=item.harmful, judge=judge_name, label=verdict.label, event=event, truncated=response.truncated,
                )  # fmt: skip
                rows.append({**facts, **told})
    return rows


def answered(folder: Path, asked: Sequence[Item], model: str, exam: Exam, progress: Callable[[int], None]) -> list[Any]:
    """Responses by the scale's engine, in the order of the items. Options are ranked locally, whoever writes the answers:
    servers do not tell likelihoods."""
    from vlsafe.evaluation import engines, servers
    from vlsafe.models import checkpoints as models_checkpoints

    written = [item for item in asked if item.scoring == "generated"] if exam.serve else []
    ranked = [item for item in asked if item.scoring != "generated"] if exam.serve else asked
    given = servers.respond_served(exam.serve, folder, written, model, exam.max_new_tokens) if written else []
    if ranked:
        here, processor = models_checkpoints.ready(folder, exam.dtype), models_checkpoints.load_processor(folder)
        given += engines.respond(here, processor, ranked, model, exam.batch_size, exam.max_new_tokens, progress)
    by_item = {response.item: response for response in given}
    return [by_item[item.id] for item in asked]
