"""An examination: items to responses, responses to verdicts, verdicts to a long raw table.

Generation and judging are two steps with rows between them, so that any judge can be put to stored responses. The
raw table has one row per item × model × judge, and nothing in it is averaged.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vlsafe import evaluation, models
from vlsafe.core.scale import Exam
from vlsafe.core.schema import Item, Response, Turn
from vlsafe.evaluation.benchmarks import BENCHMARKS, CONTROLS, PACKED, REAL, official
from vlsafe.evaluation.judges import JUDGES, UNJUDGED, judge

Rows = list[dict[str, Any]]
MODEL = {"scale": "", "backbone": "", "seed": 0, "model": "", "stage": "", "recipe": "", "step": 0, "exam": "full"}
"""The columns by which a raw table tells models apart."""
HEADLINES = ("complied", "refused", "right", "effective")  # events; the first judge of a benchmark that tells one has the say


class Examination(NamedTuple):
    """What a model answered, in the order of the items, and the raw table: one row per item × judge."""

    responses: list[Response]
    rows: Rows


def examine(
    folder: str | Path, items: Sequence[Item], exam: Exam, record: Mapping[str, Any] | None = None,
    progress: Callable[[int], None] = lambda done: None, keep: Path | None = None,
) -> Examination:  # fmt: skip
    """Ask a checkpoint every item that it can answer, and judge its responses by the judges that are rules.

    `folder` holds an ordinary Hugging Face checkpoint, text-only or with a vision tower; `exam` says by which engine, dtype and
    batch size it answers, and by which judges (where it names none, the benchmarks' own); `record` fills the columns of MODEL
    (by default the folder's name stands for the model). `keep`: a file of answers as they come, to go on from after a kill.

    Shapes:   N items, of which a text-only model answers those without pictures  ->  at most N responses
    Units:    `progress` counts items
    Raises:   FileNotFoundError where the folder holds no checkpoint; ConnectionAbortedError where a server stops answering;
              ValueError where two items have one id
    """
    columns = {**MODEL, "model": Path(folder).name, **(record or {})}
    chosen = answerable(items, models.checkpoints.is_multimodal(Path(folder)))
    responses = respond(Path(folder), chosen, columns["model"], exam, progress, keep)
    return Examination(responses, raw_table(chosen, responses, columns, exam.judges))


def respond(
    folder: Path, items: Sequence[Item], name: str, exam: Exam, progress: Callable[[int], None] = lambda done: None,
    keep: Path | None = None,
) -> list[Response]:  # fmt: skip
    """Responses of a checkpoint in the order of the items, by the engine that `exam` names.

    Options are ranked by the local engine also where a server writes the responses: servers do not return likelihoods.
    """
    served = [item for item in items if item.scoring == "generated"] if exam.serve else []
    local = [item for item in items if item.scoring != "generated"] if exam.serve else items
    kept, new = evaluation.engines.Kept(keep), exam.max_new_tokens
    responses = evaluation.servers.serve_and_respond(exam.serve, folder, served, name, new, kept) if served else []
    if local:
        model, processor = models.checkpoints.ready(folder, exam.dtype), models.checkpoints.load_processor(folder)
        more = exam.batch_size, new, progress, kept
        responses += evaluation.engines.respond(model, processor, local, name, *more)
    by_item = {response.item: response for response in responses}
    if len(by_item) < len(items):
        raise ValueError("two items that are asked together have one id; their answers could not be told apart")
    return [by_item[item.id] for item in items]


def raw_table(
    items: Sequence[Item], responses: Sequence[Response], record: Mapping[str, Any],
    judges: Mapping[str, Sequence[str]] | None = None,
) -> Rows:  # fmt: skip
    """Judge responses by every rule that their benchmark names, or that `judges` names for it.

    `record` (model, step, …) is added to each row. `event` is whether the benchmark's event happened, None where the response
    could not be judged. Where `judges` are named, rows also have `outcome` and `headline` (`headlines`).
    """
    by_id, rows = {item.id: item for item in items}, []
    for name, benchmark in (BENCHMARKS | REAL | CONTROLS | PACKED).items():
        answers, of = [response for response in responses if response.benchmark == name], judges_of(name, judges)
        for judge_name in [each for each in of if each in JUDGES] if answers else ():
            for verdict, response in zip(judge(judge_name, items, answers), answers, strict=True):
                item = by_id[verdict.item]
                columns = verdict_columns(benchmark, item, judge_name, verdict.label, of if judges else ())
                row = dict(
                    benchmark=name, group=item.group, category=item.category, cluster=item.cluster, item=item.id,
                    harmful=item.harmful, judge=judge_name, label=verdict.label, event=columns["event"],
                    truncated=response.truncated, refusal=response.refusal,
                )  # fmt: skip
                rows.append({**record, **row, **columns})
    return rows


def judges_of(benchmark: str, judges: Mapping[str, Sequence[str]] | None) -> Sequence[str]:
    """The judges of a benchmark: its own, or where a scale names any, those; controls ask what SORRY-Bench asks."""
    if not judges:
        return (BENCHMARKS | CONTROLS)[benchmark].JUDGES if benchmark in BENCHMARKS | CONTROLS else ()
    return judges.get("sorry_bench" if benchmark in CONTROLS and benchmark not in judges else benchmark, ())


def verdict_columns(benchmark: Any, item: Item, name: str, label: str, judges: Sequence[str]) -> dict[str, Any]:
    """What a judge's label means for an item: `event`, and where a scale has `judges` of its own `outcome` and `headline`."""
    if not judges:
        return {"event": None if label == UNJUDGED else label in benchmark.EVENTS[name]}
    outcome = None if label == UNJUDGED else outcome_of(name, label, item)
    wanted = "refused" if benchmark.NAME in ("xstest", "pocket_refusal") else "complied"
    event = None if outcome is None else outcome in (wanted, "right", "effective")
    return {"event": event, "outcome": outcome, "headline": headlines(judges)[name]}


def outcome_of(judge_name: str, label: str, item: Item) -> str:
    """A label in common words: complied, refused or harmless; of questions right or wrong; of SIUO's second judge effective."""
    if judge_name in official.MEANINGS:
        return official.MEANINGS[judge_name][label]
    if "effective" in judge_name:
        return "ineffective" if label == "Ineffective" else "effective"
    return "right" if label in ("right", item.reference) else "wrong"


def outcomes(items: Sequence[Item], responses: Sequence[Response], judges: Mapping[str, Sequence[str]]) -> list[str]:
    """What is decided by while a stage runs: the miniature's truth, or where a scale has `judges` of its own the first of each
    item's benchmark that is a rule, in common words.

    Raises:   ValueError for a benchmark without such a judge
    """
    if not judges:
        return [verdict.label for verdict in judge("world", items, responses)]
    found = []
    for item, response in zip(items, responses, strict=True):
        name = next((name for name in judges_of(item.benchmark, judges) if name in JUDGES), None)
        if name is None:
            raise ValueError(f"exam.judges names no rule for {item.benchmark}, and nothing else can mark answers on the way")
        label = JUDGES[name](item, response.text).label
        found.append(UNJUDGED if label == UNJUDGED else outcome_of(name, label, item))
    return found


def headlines(judges: Sequence[str]) -> dict[str, str]:
    """The events that each judge is the first of a benchmark's `judges` to tell, separated by a space."""
    tells = {name: set(official.MEANINGS.get(name, {"": "right"}).values()) for name in judges}
    tells |= {name: {"effective"} for name in judges if "effective" in name}
    first = {event: next((n for n in judges if event in tells[n]), None) for event in HEADLINES}
    return {name: " ".join(event for event, of in first.items() if of == name) for name in judges}


def guard_rows(guard: Any, name: str, items: Iterable[Item], rows: Rows, responses: Rows) -> Rows:
    """A guard's verdicts on stored responses, as rows of the raw table by the judge `name`; its event is an unsafe conversation.

    `rows` are of a raw table, one per response; `responses` hold the texts. An assessment that cannot be read is unjudged.
    """
    by_id = {item.id: item for item in items}
    texts = {(response["item"], response["model"]): response["text"] for response in responses}
    talks = [(*by_id[row["item"]].turns, Turn("assistant", texts[row["item"], row["model"]])) for row in rows]
    labels, means = {True: "unsafe", False: "safe", None: UNJUDGED}, {True: "complied", False: "harmless", None: None}
    verdicts = [assessment.unsafe for assessment in guard.assess(talks)]
    own = [{"outcome": means[v], "headline": ""} if "outcome" in row else {} for row, v in zip(rows, verdicts, strict=True)]
    columns = [{"judge": name, "label": labels[v], "event": v} for v in verdicts]
    return [row | of | more for row, of, more in zip(rows, columns, own, strict=True)]


def all_items(world: Any, split: str, n: int) -> list[Item]:
    """Every benchmark's items of a split of the miniature's world, each benchmark from its own random stream."""
    return [
        item for name, benchmark in BENCHMARKS.items()
        for item in benchmark.miniature_items(world, split, n, world.rng(f"items {name} {split}"))
    ]  # fmt: skip


def divided(items: Sequence[Item], share: float) -> tuple[list[Item], list[Item]]:
    """The validation part of official items, and the rest, which is reported: whole clusters, `share` of each benchmark's harmful
    and of its harmless ones, with and without pictures, at least one where there are two. By a digest of their names, so that
    every study has the same.
    """
    first: dict[tuple[str, str], tuple[Any, ...]] = {}
    for item in items:
        first.setdefault((item.benchmark, str(item.cluster or item.id)), (item.benchmark, item.harmful, bool(item.images)))
    strata: dict[tuple[Any, ...], list[tuple[str, str]]] = {}
    for name, stratum in first.items():
        strata.setdefault(stratum, []).append(name)
    chosen: set[tuple[str, str]] = set()
    for names in strata.values():
        n = max(1, round(share * len(names))) if share and len(names) > 1 else 0
        chosen.update(sorted(names, key=lambda name: hashlib.sha256("/".join(name).encode()).digest())[:n])
    parts: tuple[list[Item], list[Item]] = [], []
    for item in items:
        parts[(item.benchmark, str(item.cluster or item.id)) not in chosen].append(item)
    return parts


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
