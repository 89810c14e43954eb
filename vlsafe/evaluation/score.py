"""`vlsafe score`: responses from anywhere, any judges, the official metric.

Responses come as lines of `{"id", "response"}`, ids as the official files write them, or in a published format (`formats`). What
is left out of them is counted and named: ids of no item, items of another subset, repeats. An LLM judge finds its judgements in a
file, or has them written by weights or an endpoint and kept beside the result, line by line, so that an interrupted run goes on
where it stopped. What has no response, no judgement or no readable judgement is unjudged: counted, with the reason, and never
taken for either side.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from vlsafe.core import store
from vlsafe.core.scale import known
from vlsafe.core.schema import Item
from vlsafe.evaluation import formats, judging
from vlsafe.evaluation.benchmarks import REAL, official
from vlsafe.evaluation.benchmarks.official import Marked, Score
from vlsafe.evaluation.contents import contents
from vlsafe.evaluation.judges import JUDGES, LLM_JUDGES, UNJUDGED
from vlsafe.evaluation.judges.llm import wordings
from vlsafe.evaluation.judging import Find, Judgements, JudgeModel

SHOWN = 3  # responses of each kind that are left out and named


class Stored(NamedTuple):
    """What a run of the run store holds of a benchmark: the model's name, its response to each item that it was examined on, and
    lines as `Judgements` keeps them."""

    name: str
    responses: Mapping[str, str]
    judgements: Sequence[Mapping[str, Any]] = ()


# ---- reading


class UnknownItem(ValueError):
    """A row that is about no item."""


def finder(module: ModuleType, items: Sequence[Item], others: Callable[[], Sequence[Item]] = tuple) -> Find:
    """A function from a row with an id, and where it stands, to the id of the item that it means.

    `others` are items of the benchmark's other subsets, which are looked at where an id is none of `items`.
    """
    own, rest = _named(module, items), functools.cache(lambda: _named(module, others()))

    def find(row: Mapping[str, Any], where: str) -> str:
        """Raises:   ValueError, naming the place, where the id means no item or several"""
        name = str(row["id"])
        meant = _meant(module, own, name, row) or _meant(module, rest(), name, row)
        if not meant:
            raise UnknownItem(f"{where}: {name[:60]!r} is no item of {module.NAME}; its ids look like {items[0].id!r}")
        if len(meant) > 1:
            keys = ", ".join(official.own(module, "QUALIFIERS"))
            raise ValueError(f"{where}: the id {name[:60]!r} means {len(meant)} items; add one of {keys}")
        return meant[0].id

    return find


def _named(module: ModuleType, items: Sequence[Item]) -> dict[str, list[Item]]:
    by_name: dict[str, list[Item]] = {}
    for item in items:
        for name in dict.fromkeys(official.own(module, "names")(item)):
            by_name.setdefault(name, []).append(item)
    return by_name


def _meant(module: ModuleType, named: Mapping[str, list[Item]], name: str, row: Mapping[str, Any]) -> list[Item]:
    meant = named.get(name, [])
    return meant if len(meant) < 2 else [item for item in meant if official.fits(module, item, row)]


def other_subsets(module: ModuleType, data: Path, subset: str) -> list[Item]:
    """The items of a benchmark's other subsets, as far as their files are here."""
    items: list[Item] = []
    for other in module.OFFICIAL:
        with contextlib.suppress(ValueError, OSError):
            items += official.load(module, data, other, pictures=False)[0] if other != subset else []
    return items


class LeftOut(NamedTuple):
    """What of a file of responses does not count: where, and the id."""

    unknown: list[str]
    elsewhere: list[str]
    repeated: list[str]

    def lines(self, benchmark: str, subset: str) -> Iterator[str]:
        """A line for each kind of which there is any."""
        kinds = (
            f"no item of {benchmark} has their id",
            f"outside of the subset {subset}",
            "they repeat an item; the first counts",
        )
        for rows, kind in zip(self, kinds, strict=True):
            if rows:
                yield f"left out ({kind}): {len(rows):,}, such as {', '.join(rows[:SHOWN])}"


def read_responses(
    module: ModuleType, source: formats.Source, items: Sequence[Item], find: Find, tries: int = 1
) -> tuple[dict[str, list[str | None]], LeftOut]:
    """Responses per item, in the order of the file, and what was left out; null is a try without a response.

    Of more responses to an item than `tries` the first count. In our own format others have to equal these, and every id has to
    mean an item: whoever writes it writes it for us, while published files may be of another version of a benchmark.

    Raises:   ValueError for a row without id or response, an unknown id or a second response as above, a question that is another
              than the item's, and where no row is about any item
    """
    by_id, strict = {item.id: item for item in items}, source.format is formats.FORMATS["own"]
    responses, left, error = dict[str, list[str | None]](), LeftOut([], [], []), None
    for where, row in source.rows(module, items):
        text, name = (
            row["response"],
            f"{' '.join(str(row['id']).split())[:60]} ({where.removesuffix(f' of {source.content.path}')})",
        )
        if not isinstance(text, str | None):
            raise ValueError(f"{where}: a response is a text or null, not {type(text).__name__}")
        try:
            item = find(row, where)
        except UnknownItem as unknown:
            if strict:
                raise
            error = error or unknown
            left.unknown.append(name)
            continue
        if item not in by_id:
            left.elsewhere.append(name)
            continue
        _refuse_other_question(by_id[item], row, where)
        of_item = responses.setdefault(item, [])
        if len(of_item) < tries:
            of_item.append(text)
        elif strict and text not in of_item:
            n, count = len(of_item) + 1, f"{module.NAME} counts at most {tries}"
            raise ValueError(f"{where}: the item {row['id']} has {n} responses; {count}")
        else:
            left.repeated.append(name)
    if not responses:
        raise error or ValueError(f"{source.content.path} holds no responses" + " to this subset" * bool(left.elsewhere))
    return responses, left


def _refuse_other_question(item: Item, row: Mapping[str, Any], where: str) -> None:
    """A row that quotes its question is about an item with this question; raises ValueError for another."""
    if formats.QUOTED not in row:
        return
    prompt = f"{item.question or ''} {' '.join(turn.text for turn in item.turns)}"
    if " ".join(str(row[formats.QUOTED]).split()) not in " ".join(prompt.split()):
        raise ValueError(f"{where} has another question than the item {item.id}; is it of another version of {item.benchmark}?")


# ---- judging


def verdicts(judge: str, rows: Sequence[Marked]) -> Iterator[dict[str, Any]]:
    """Rows as raw tables have them, one per response. `event`: complied (safety), right (helpfulness), effective (SIUO)."""
    meanings = official.MEANINGS.get(judge)
    for item, labels in rows:
        for attempt, label in enumerate(labels):
            event = None if label is None else meanings[label] == "complied" if meanings else label in ("right", item.reference)
            if label is not None and "effective" in judge:
                event = label != "Ineffective"
            row = dict(benchmark=item.benchmark, group=item.group, category=item.category, cluster=item.cluster, item=item.id)
            yield {**row, "harmful": item.harmful, "try": attempt, "judge": judge, "label": label or UNJUDGED, "event": event}


# ---- the command


def score(
    benchmark: str, data: Path, responses: Path | formats.Source | Stored, out: Path, judges: Sequence[str] = (),
    subset: str | None = None, judgements: Path | None = None, judge_model: JudgeModel | None = None, rows_to: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Score stored responses to a benchmark by its official metric, and write the result as JSON to `out`.

    `data` is the folder of the official files, `subset` one of the benchmark's (by default the one that the responses' format is
    made for, else its first), `responses` a file or folder in one of `formats.FORMATS` (`formats.opened` says in which) or what a
    run holds, `judges` names of JUDGES or LLM_JUDGES (by default the official ones). LLM judges read `judgements`, lines
    `{"id", "judgement"}`, and have `judge_model` (`judging.endpoint`, `judging.weights`) write the missing ones, which are kept
    beside `out` for later calls. With `rows_to`, each verdict is written as a line there.

    Shapes:   N items × up to K tries × J judges  ->  `scores`, one entry per judge × metric × part of the benchmark
    Units:    shares are fractions in [0, 1], points where `full` is not 1; `value` counts the unjudged as no event,
              `value_high` as events, and the 95 % interval from `low` to `high` covers both
    Raises:   ValueError for anything that does not fit together, naming it; FileNotFoundError where files are missing;
              ConnectionAbortedError where an endpoint is gone (its judgements so far are kept)
    """
    module = REAL[known(benchmark, REAL, "benchmark")]
    responses = formats.opened(responses, benchmark) if isinstance(responses, Path) else responses
    made_for = {} if isinstance(responses, Stored) else responses.format.subset
    subset = known(subset or made_for.get(benchmark, next(iter(module.OFFICIAL))), module.OFFICIAL, f"subset of {benchmark}")
    names = [known(name, JUDGES | LLM_JUDGES, "judge") for name in judges or module.OFFICIAL[subset]]
    llm = [name for name in names if name in LLM_JUDGES]
    of_run = responses.judgements if isinstance(responses, Stored) else ()
    written = Judgements({}, out.with_suffix(".judgements.jsonl"))
    _refuse_inputs(out, rows_to, written.keep if judge_model else None, data, responses, judgements)
    lacking = [name for name in llm if LLM_JUDGES[name].query not in {row["judge"] for row in of_run}]
    _require_judgements(lacking, judgements, judge_model)
    items, notes = official.load(module, data, subset, pictures=False)
    if not items:
        raise ValueError(f"the files of {benchmark} in {data} hold no items of the subset {subset}")
    find = finder(module, items, lambda: other_subsets(module, data, subset))
    if isinstance(responses, Stored):
        notes += _not_in_run(responses, module, items)
        texts: dict[str, list[str | None]] = {name: [text] for name, text in responses.responses.items()}
        left = LeftOut([], [], [])
        items = [item for item in items if item.id in texts]
    else:
        texts, left = read_responses(module, responses, items, find, official.own(module, "TRIES").get(subset, 1))
    part = official.own(module, "part")
    parts = {part(item) for item in items if item.id in texts}  # parts (kinds, styles) without any response are not examined
    absent = list(dict.fromkeys(part(item) for item in items if part(item) not in parts))
    items = [item for item in items if part(item) in parts]
    if judge_model is not None and any(LLM_JUDGES[name].pictures for name in llm):
        pictured, notes = official.load(module, data, subset)
        by_id = {item.id: item for item in pictured}
        items = [by_id.get(item.id, item) for item in items]
    written.models = dict.fromkeys(judging.queries_of(llm), judge_model) if judge_model else {}
    _collect(written, llm, items, texts, find, of_run, judgements, official.places(data, module.FOLDER))
    found = {name: judging.marked(name, items, texts, written) for name in names}
    marks, about = {name: rows for name, (rows, _) in found.items()}, {}
    for name, (_, reasons) in found.items():
        model = judge_model.name if judge_model and name in llm else None
        about[name] = dict(judge=name, model=model, official=name in module.OFFICIAL[subset], unjudged=dict(reasons))
    scores = [{**row._asdict(), "model": about[row.judge.split(" + ")[0]]["model"]} for row in module.scores(marks)]
    if not scores:
        raise ValueError(f"none of {', '.join(names)} tells anything about these responses to {benchmark}")
    result = {
        "benchmark": benchmark, "subset": subset, "files": notes, "responses": responses.name,
        "format": "a run's" if isinstance(responses, Stored) else responses.format.title,
        "left_out": [*left.lines(benchmark, subset)], "n_left_out": {kind: len(rows) for kind, rows in left._asdict().items()},
        "n_items": len(items), "labels": {name: _labels(rows) for name, rows in marks.items()},
        "n_without_response": sum(item.id not in texts for item in items), "parts_without_responses": absent,
        "judges": list(about.values()), "scores": scores, "agreement": _agreement(marks),
        "divergences": list(module.DIVERGENCES), "source": store.source_digest(),
    }  # fmt: skip
    _write(result, out, marks, rows_to)
    return result


def _labels(rows: Iterable[Marked]) -> Counter[str]:
    return Counter(label for row in rows for label in row.labels if label is not None)


def _write(result: Mapping[str, Any], out: Path, marks: Mapping[str, Sequence[Marked]], rows_to: Path | None) -> None:
    """The result as JSON, and where it is wanted a line for every verdict; never beside the verdicts of an earlier call."""
    if rows_to is not None:
        rows_to.unlink(missing_ok=True)
    store.write_text(out, json.dumps(_plain(result), indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    if rows_to is not None:
        rows = (row for name, of in marks.items() for row in verdicts(name, of))
        store.write_text(rows_to, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _refuse_inputs(
    out: Path, rows_to: Path | None, keep: Path | None, data: Path, responses: formats.Source | Stored, judgements: Path | None
) -> None:
    """No file that is read is written, and none that is written twice; raises ValueError naming both."""
    read = None if isinstance(responses, Stored) else responses.content.path
    inputs = {"--data": data, "--responses": read, "--judgements": judgements}
    store.refuse_inputs({"--out": out, "--verdicts": rows_to}, inputs, '{"benchmark":')
    if keep:
        store.refuse_inputs({"--out": out, "--verdicts": rows_to, "the file of judgements": keep}, {})
        store.refuse_inputs({"the file of judgements": keep}, {**inputs, "--data": None}, judging.KEPT.replace(" ", ""))
    for path in (out, rows_to):
        if path is not None:
            if path.is_dir():
                raise ValueError(f"{path} is a folder; the result is a file")
            path.parent.mkdir(parents=True, exist_ok=True)


def _require_judgements(llm: Sequence[str], judgements: Path | None, judge_model: JudgeModel | None) -> None:
    if judgements is not None and not judgements.exists():
        raise FileNotFoundError(f"there is no file {judgements}")
    if llm and judgements is None and judge_model is None:
        rules = ", ".join(name for name in JUDGES if name in official.MEANINGS and not name.endswith("-literal"))
        raise ValueError(
            f"the judge {llm[0]!r} asks a model ({LLM_JUDGES[llm[0]].model}): give --judgements, --weights or --endpoint. "
            f"Judges by rule, which are other measures: {rules}"
        )


def _not_in_run(stored: Stored, module: ModuleType, items: Sequence[Item]) -> list[str]:
    """A line where the official files have more items than a run has examined.

    Raises:   ValueError where the run was examined on others
    """
    if unknown := set(stored.responses) - {item.id for item in items}:
        raise ValueError(f"{stored.name} was examined on {min(unknown)!r}, which is no item of these files of {module.NAME}")
    n = len(items) - len(stored.responses)
    return (
        [f"{n:,} items are left out: the run's examination does not have them (validation, a smaller examination)"] if n else []
    )


def _collect(
    written: Judgements, llm: Sequence[str], items: Sequence[Item], responses: judging.Responses, find: Find,
    of_run: Sequence[Mapping[str, Any]], path: Path | None, folders: Sequence[Path],
) -> None:  # fmt: skip
    """Add the judgements of a run, those kept by an earlier call, those of a file, then those that the model has yet to write."""
    if llm:
        written.read(of_run, "the run's judgements", find, llm)
    if written.models:
        written.read_kept(find, llm)
    if llm and path is not None:
        written.read(contents(path).rows, str(path), find, llm)
    for query in written.models:
        names = judging.queries_of(llm)[query]
        written.ask(query, written.missing(names, items, responses, wordings(names[0], folders)))


def _agreement(marks: Mapping[str, Sequence[Marked]]) -> list[dict[str, Any]]:
    """Pairs of judges that ask the same of the same responses (did it comply, or is it right): equal verdicts and kappa.

    Kappa is None where a judge says the same of everything. How models rank by each judge takes several results
    (`analysis.agreement`).
    """
    events = {name: np.array([row["event"] for row in verdicts(name, rows)], float) for name, rows in marks.items()}
    kinds = {name: name in official.MEANINGS for name in marks if "effective" not in name}
    alike = [[name for name in kinds if kinds[name] == kind] for kind in dict.fromkeys(kinds.values())]
    pairs = []
    for one, two in (pair for names in alike for pair in combinations(names, 2)):
        from statsmodels.stats.inter_rater import cohens_kappa

        both = ~np.isnan(events[one] + events[two])
        table = np.histogram2d(events[one][both], events[two][both], bins=[[0, 0.5, 1]] * 2)[0]
        n, varied = int(table.sum()), min(*table.sum(0), *table.sum(1)) > 0
        equal = float(table.trace() / n) if n else None
        kappa = float(cohens_kappa(table).kappa) if varied else None
        pairs.append(dict(judge=one, other=two, n=n, table=table.astype(int).tolist(), agreement=equal, kappa=kappa))
    return pairs


def _plain(result: Mapping[str, Any]) -> Any:
    """The same with None for NaN, which JSON cannot write."""
    return json.loads(json.dumps(result), parse_constant={"NaN": None}.__getitem__)


def lines(result: Mapping[str, Any]) -> Iterator[str]:
    """A result for reading: one line per number, with interval, n and unjudged; then what is to be borne in mind."""
    yield f"{result['benchmark']} ({result['subset']}), {result['n_items']:,} items; responses: {result['format']}"
    yield from result["left_out"]
    yield from (f"{n:,} items have no response" for n in [result["n_without_response"]] if n)
    yield f"{'metric':<24} {'over':<48} {'judge':<26} {'value':>8} {'95 % interval':>18} {'n':>7} {'unjudged':>8}"
    for entry in result["scores"]:
        row, model = Score(*(entry[key] for key in Score._fields)), entry["model"]
        factor, unit = (100, " %") if row.full == 1 else (1, "  ")
        value = f"{factor * row.value:.1f}{unit}"
        span = f"[{factor * row.low:.1f}, {factor * row.high:.1f}]"
        judge = f"{row.judge} by {model}" if model else row.judge
        yield f"{row.metric:<24} {row.over:<48} {judge:<26} {value:>8} {span:>18} {row.n:>7,} {row.n_unjudged:>8,}"
    for judge in result["judges"]:
        for reason, count in judge["unjudged"].items():
            yield f"unjudged by {judge['judge']}: {count:,} ({reason})"
        if other := result["labels"][judge["judge"]].get("other"):
            yield f"neither yes nor no to {judge['judge']}: {other:,} (wrong, as published)"
    for pair in result["agreement"]:
        if pair["n"]:
            equal = f"equal on {pair['agreement']:.1%} of {pair['n']:,}"
            kappa = f"kappa {pair['kappa']:.2f}" if pair["kappa"] is not None else "no kappa: one says the same of everything"
            yield f"{pair['judge']} and {pair['other']}: {equal}, {kappa}"
    yield from (f"no responses to: {part}" for part in result["parts_without_responses"])
    yield from (f"files: {note}" for note in result["files"])
