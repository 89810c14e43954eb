"""`vlsafe score`: responses from anywhere, any judges, the official metric.

Responses come as lines of `{"id", "response"}`, ids as the official files write them, or in a published format (`formats`). What
is left out of them is counted and named: ids of no item, items of another subset, repeats. An LLM judge finds its judgements in a
file, or has them written by weights or an endpoint and kept beside the result, line by line, so that an interrupted run goes on
where it stopped. What has no response, no judgement or no readable judgement is unjudged: counted, with the reason, and never
taken for either side.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from vlsafe.core import store, writing
from vlsafe.core.scale import known
from vlsafe.core.schema import Item
from vlsafe.evaluation import formats, judging, reading
from vlsafe.evaluation.benchmarks import REAL, official
from vlsafe.evaluation.benchmarks.official import Marked, Score
from vlsafe.evaluation.contents import contents
from vlsafe.evaluation.examine import outcome_of
from vlsafe.evaluation.judges import JUDGES, LLM_JUDGES, UNJUDGED
from vlsafe.evaluation.judges.llm import wordings
from vlsafe.evaluation.judging import Find, Judgements, JudgeModel


class Stored(NamedTuple):
    """What a run of the run store holds of a benchmark: the model's name, its response to each item that it was examined on, and
    lines as `Judgements` keeps them."""

    name: str
    responses: Mapping[str, str]
    judgements: Sequence[Mapping[str, Any]] = ()


# ---- judging


OURS = '{"benchmark":'  # how a result begins, and a line of verdicts


def verdicts(judge: str, rows: Sequence[Marked]) -> Iterator[dict[str, Any]]:
    """Rows as raw tables have them, one per response. `event`: complied (safety), right (helpfulness), effective (SIUO)."""
    for item, labels in rows:
        for attempt, label in enumerate(labels):
            event = None if label is None else outcome_of(judge, label, item) in ("complied", "right", "effective")
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
    Units:    shares are fractions in [0, 1], points where `full` is not 1; `value` counts the unjudged as no event (None where
              all are), `value_high` as events, and the 95 % interval from `low` to `high` covers both
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
    if not llm and (judgements is not None or judge_model is not None):
        raise ValueError(f"{', '.join(names)} judges by rule and reads no judgements; name a --judge that asks a model")
    pictures = judge_model is not None and any(LLM_JUDGES[name].pictures for name in llm)
    items, texts, find, of_responses = _examined(module, data, subset, responses, pictures)
    written.models = dict.fromkeys(judging.queries_of(llm), judge_model) if judge_model else {}
    _collect(written, llm, items, texts, find, of_run, judgements, official.places(data, module.FOLDER))
    found = {name: judging.marked(name, items, texts, written) for name in names}
    marks, about = {name: rows for name, (rows, _) in found.items()}, {}
    for name, (_, reasons) in found.items():
        model = judge_model.name if judge_model and name in llm else None
        about[name] = dict(judge=name, model=model, official=name in module.OFFICIAL[subset], unjudged=dict(reasons))
    scores = [{**row._asdict(), "model": about[row.judge.split(" + ")[0]]["model"]} for row in module.scores(marks)]
    for row in scores:
        row["value"] = None if row["n_unjudged"] == row["n"] else row["value"]  # no answer of a judge is no 0
    if not scores:
        raise ValueError(f"none of {', '.join(names)} tells anything about these responses to {benchmark}")
    result = {
        "benchmark": benchmark, "subset": subset, **of_responses, "labels": {
            name: Counter(label for row in rows for label in row.labels if label is not None) for name, rows in marks.items()
        },
        "judges": list(about.values()), "scores": scores, "agreement": _agreement(marks),
        "divergences": list(module.DIVERGENCES), "source": store.source_digest(),
    }  # fmt: skip
    _write(result, out, marks, rows_to)
    return result


def _examined(
    module: ModuleType, data: Path, subset: str, responses: formats.Source | Stored, pictures: bool
) -> tuple[list[Item], Mapping[str, list[str | None]], Find, dict[str, Any]]:
    """The items of the parts of a benchmark that have responses, these, how rows find items, and what a result says of it all."""
    items, notes = official.load(module, data, subset, pictures=False)
    if not items:
        raise ValueError(f"the files of {module.NAME} in {data} hold no items of the subset {subset}")
    find = reading.finder(module, items, lambda: reading.other_subsets(module, data, subset))
    texts: Mapping[str, list[str | None]]
    if isinstance(responses, Stored):
        notes, left = notes + _not_in_run(responses, module, items), reading.LeftOut([], [], [])
        texts = {name: [text] for name, text in responses.responses.items()}
        items = [item for item in items if item.id in texts]
    else:
        texts, left = reading.read_responses(module, responses, items, find, official.own(module, "TRIES").get(subset, 1))
    many = sorted({len(of) for of in texts.values()})
    if len(many) > 1:
        most = next(item for item, of in texts.items() if len(of) == many[-1])
        notes = [*notes, f"{most} has {many[-1]} responses, others have {many[0]}: tries that are not there are unjudged"]
    part = official.own(module, "part")
    parts = {part(item) for item in items if item.id in texts}  # parts (kinds, styles) without any response are not examined
    absent = list(dict.fromkeys(part(item) for item in items if part(item) not in parts))
    items = [item for item in items if part(item) in parts]
    if pictures:
        pictured, of_pictures = official.load(module, data, subset)
        by_id, notes = {item.id: item for item in pictured}, list(dict.fromkeys(notes + of_pictures))
        items = [by_id.get(item.id, item) for item in items]
    return items, texts, find, {
        "files": notes, "responses": responses.name,
        "format": "a run's" if isinstance(responses, Stored) else responses.format.title,
        "left_out": [*left.lines(module.NAME, subset)], "n_left_out": {kind: len(rows) for kind, rows in left._asdict().items()},
        "n_items": len(items), "n_without_response": sum(item.id not in texts for item in items),
        "parts_without_responses": absent,
    }  # fmt: skip


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
    store.refuse_inputs({"--out": out, "--verdicts": rows_to}, inputs, OURS)
    if keep:
        store.refuse_inputs({"--out": out, "--verdicts": rows_to, "the file of judgements": keep}, {})
        store.refuse_inputs({"the file of judgements": keep}, {**inputs, "--data": None}, judging.KEPT.replace(" ", ""))
    for path in (out, rows_to):
        if path is not None:
            if path.is_dir():
                raise ValueError(f"{path} is a folder; the result is a file")
            if path.is_file() and path.stat().st_size and not writing.starts(path, OURS):
                raise ValueError(f"{path} is there and is no result; choose another place")
            path.parent.mkdir(parents=True, exist_ok=True)


def _require_judgements(llm: Sequence[str], judgements: Path | None, judge_model: JudgeModel | None) -> None:
    if judgements is not None and not judgements.exists():
        raise FileNotFoundError(f"there is no file {judgements}")
    if llm and judgements is None and judge_model is None:
        others = [name for name in JUDGES if name in official.MEANINGS and not name.endswith("-literal") and name != "world"]
        raise ValueError(
            f"the judge {llm[0]!r} asks a model ({LLM_JUDGES[llm[0]].model}): give --judgements, --weights or --endpoint. "
            f"Judges by rule, which are other measures: {', '.join(others)}"
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
        _refuse_surplus(written, responses, path)
    for query in written.models:
        names = judging.queries_of(llm)[query]
        written.ask(query, written.missing(names, items, responses, wordings(names[0], folders)))


def _refuse_surplus(written: Judgements, responses: judging.Responses, path: Path) -> None:
    """Raises:   ValueError where a file has several judgements of one response that are not the same"""
    for (query, item, about), (text, _) in written.written.items():
        n = len(responses.get(item, ()))
        known_ones = {written.written[place][0] for of in range(n) if (place := (query, item, of)) in written.written}
        if isinstance(about, int) and about >= n > 0 and known_ones != {text}:
            raise ValueError(f"{path}: {item} has {n} response(s), and a judgement of another try ({about}, from 0) that differs")


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
        value = "unjudged" if entry["value"] is None else f"{factor * row.value:.1f}{unit}"
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
