"""The stages that have stored responses judged by models, at scales that are loaded; and a run's responses for `vlsafe score`.

The raw tables of the run that generated the responses are written again with the verdicts of models beside those of rules.
Judgements are kept line by line: a stage that is killed, or whose endpoint goes away, goes on where it stopped when it is
made again; then it asks again about what could not be read. What stays unjudged is counted by reason, and is never "safe".
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

from vlsafe import analysis, evaluation, models
from vlsafe.core import assets, store
from vlsafe.core.scale import Scale, known
from vlsafe.core.schema import Item
from vlsafe.evaluation import judging
from vlsafe.evaluation.benchmarks import BENCHMARKS, CONTROLS, OWN, PACKED, REAL, confounds, official
from vlsafe.evaluation.examine import Rows, judges_of, verdict_columns
from vlsafe.evaluation.judges import JUDGES, LLM_JUDGES, UNJUDGED, llm
from vlsafe.evaluation.judging import Judgements, JudgeModel
from vlsafe.study.study import Bar, Study

TABLES = ("raw.parquet", "panel.parquet")  # raw rows of a run; only merges have a panel apart
RESPONSES, KEPT = "responses.parquet", "judgements.jsonl"
PARENT = "parent/aligned"
QUERIES = judging.queries_of(LLM_JUDGES)


def refuse_unanswered(scale: Scale) -> None:
    """Refuse a scale some of whose judges nobody answers, before any work.

    Raises:   ValueError naming the judge, and the field for its weights and the one for its server
    """
    loaded, endpoints = scale.loaded.judges if scale.loaded else {}, scale.exam.endpoints
    for query in (*loaded, *endpoints):
        known(query, QUERIES, "judge that asks a model")
    for benchmark, judges in scale.exam.judges.items():
        known(benchmark, {*REAL, *CONTROLS, *PACKED, OWN}, "benchmark of exam.judges")
        if not any(known(name, JUDGES | LLM_JUDGES, f"judge of {benchmark}") in JUDGES for name in judges):
            raise ValueError(f"exam.judges names no rule for {benchmark}; one has to be there beside {', '.join(judges)}")
        for query, names in judging.queries_of(judges).items():
            where = f"loaded.judges.{query} (weights) or exam.endpoints.{query} (a server)"
            if (query in loaded) == (query in endpoints):
                many = "both answer" if query in loaded else "nobody answers"
                raise ValueError(f"{many} the judge {names[0]!r} of {benchmark}: name one of {where}")
            if query in loaded and not LLM_JUDGES[names[0]].raw:
                raise ValueError(
                    f"the judge {names[0]!r} of {benchmark} is a chat, which needs exam.endpoints.{query} (a server)"
                )


def judged_params(study: Study) -> dict[str, Any]:
    """What verdicts depend on beside the responses: judges, their weights, and the names of served models; no address."""
    exam, queries = study.scale.exam, judging.queries_of(name for judges in study.scale.exam.judges.values() for name in judges)
    weights = study.scale.loaded.judges if study.scale.loaded else {}
    return {
        "judges": exam.judges,
        "weights": {q: [weights[q].repo, assets.pinned(weights[q].repo, weights[q].revision)] for q in queries if q in weights},
        "served": {q: exam.endpoints[q].model or LLM_JUDGES[queries[q][0]].model for q in queries if q in exam.endpoints},
    }


def answers(scale: Scale, query: str) -> JudgeModel:
    """The model that answers a query: weights in a folder or in the hub's cache, or a server.

    Raises:   FileNotFoundError where the weights are not here
    """
    if scale.loaded and query in scale.loaded.judges:
        origin = scale.loaded.judges[query]
        name = Path(origin.repo).name if Path(origin.repo).is_dir() else origin.repo
        return judging.weights(assets.model_folder(origin, f"the judge {query!r}"), name, scale.exam.batch_size)
    at = scale.exam.endpoints[query]
    return judging.served(QUERIES[query], at.address, at.model, at.key, at.timeout, at.parallel)


def make_judged(study: Study, work: Path, source: str) -> dict[str, Any]:
    """Have every model that judges judge the responses of a finished run, each distinct one once.

    Writes the raw tables of the run with the rows of all judges in the scale's order, its other files as they are, and
    `judgements.jsonl`, what the models wrote. Returns the run's numbers, how many judgements there are, and how many rows are
    unjudged, by judge and reason.

    Raises:   ConnectionAbortedError where an endpoint goes away or writes nothing at all; what is judged is kept
    """
    refuse_unanswered(study.scale)
    folder, judges = study.folder(source), study.scale.exam.judges
    tables = {file: store.read_rows(folder / file) for file in TABLES if (folder / file).exists()}
    texts = _texts(store.read_rows(folder / RESPONSES))
    rows = [row for table in tables.values() for row in table]
    by_benchmark = _responses(rows, texts)
    queries = judging.queries_of(name for benchmark in by_benchmark for name in judges_of(benchmark, judges))
    named = {query: answers(study.scale, query) for query in queries}
    items = _items(study, by_benchmark)
    written = Judgements(named, work / KEPT)
    store.whole_lines(written.keep)  # this file is the stage's own: what a kill has cut off goes
    written.read_kept(lambda row, where: row["id"], list(LLM_JUDGES))
    prompts = {query: _prompts(study, written, query, by_benchmark, items) for query in queries}  # all before any is asked
    for query, of in prompts.items():
        written.ask(query, of, Bar(f"{query} judges", len(of)))
        if of:
            written.refuse_silent(query)
    unjudged: dict[str, Counter[str]] = {}
    for file, table in tables.items():
        store.write_rows(work / file, list(_with_verdicts(table, judges, items, texts, written, unjudged)))
    for path in folder.iterdir():
        if path.is_file() and path.name not in (*TABLES, store.MANIFEST):
            shutil.copy2(path, work / path.name)
    reasons = {name: dict(reasons) for name, reasons in unjudged.items()}
    return {**study.numbers(source), "judgements": len(written.written), "unjudged": reasons}


def perplexity(grid: str) -> str:
    """The stage that has the parent read what a grid's models answer."""
    return f"judging/perplexity{'' if grid == 'default' else '.full'}"


def make_perplexity(study: Study, work: Path, grid: str) -> dict[str, Any]:
    """How likely its parent finds what each examined model answers to harmless requests in words alone, those of the benchmarks
    that headline measures are of.

    Writes `perplexity.parquet`, a line per model with its number of `answers`. One that the token limit has cut off ends there;
    those that do not follow their prompt token by token are left out and counted in the run's numbers.
    """
    folder, lines, skipped = study.folder(PARENT), list[dict[str, Any]](), 0
    model, processor = models.checkpoints.ready(folder, study.scale.exam.dtype), models.checkpoints.load_processor(folder)
    alike = analysis.merging.needed(*analysis.measures.HEADLINE)  # merges are asked these too: all answer the same requests
    items = {i.id: i for i in study.items() if i.scoring == "generated" and not i.images and i.benchmark in alike}
    for name in (needed for needed in study.inputs(perplexity(grid)) if needed.startswith(("examination/", "merge/"))):
        texts, answered = _texts(study.rows(name, RESPONSES)), dict[tuple[str, ...], dict[str, Item]]()
        for row in study.rows(name, "raw.parquet"):
            said = texts.get((row["model"], row["item"]))  # of merges not all answers are kept
            if row["exam"] == "full" and row["item"] in items and not row["harmful"] and said is not None:
                item = replace(items[row["item"]], options=(said,))
                answered.setdefault((row["stage"], row["recipe"]), {})[row["item"]] = item
        for (stage, recipe), of in answered.items():
            read = [item for item in of.values() if evaluation.engines.follows(processor, item)]
            skipped += len(of) - len(read)
            if read:
                value = evaluation.engines.perplexity(model, processor, read, study.scale.exam.batch_size)
                line = {"backbone": study.backbone, "seed": study.seed, "stage": stage, "recipe": recipe}
                lines.append(line | {"answers": len(read), "perplexity": value})
    store.write_rows(work / "perplexity.parquet", lines)
    return {"models": len(lines), "skipped": skipped}


def _texts(responses: Rows) -> dict[tuple[str, str], str]:
    """Responses by model and item.

    Raises:   ValueError where a model has two different ones to one item: nobody knows which a verdict is of
    """
    texts: dict[tuple[str, str], str] = {}
    for row in responses:
        if texts.setdefault((row["model"], row["item"]), row["text"]) != row["text"]:
            raise ValueError(f"{row['model']} has two different responses to {row['item']}")
    return texts


def _responses(rows: Rows, texts: Mapping[tuple[str, str], str]) -> dict[str, dict[str, list[str | None]]]:
    """The distinct responses to each item, by benchmark."""
    found: dict[str, dict[str, dict[str, None]]] = {}
    for row in rows:
        if (key := (row["model"], row["item"])) not in texts:
            raise ValueError(f"{RESPONSES} holds no response of {key[0]} to {key[1]}, which {TABLES[0]} has a verdict on")
        found.setdefault(row["benchmark"], {}).setdefault(row["item"], {})[texts[key]] = None
    return {benchmark: {item: list(distinct) for item, distinct in of.items()} for benchmark, of in found.items()}


def _items(study: Study, benchmarks: Iterable[str]) -> dict[str, Item]:
    """The items of a study by their id, those in altered prompts included where there are responses to some."""
    test = study.items()
    varied = confounds.variants(test, study.stream("confounds")) if set(benchmarks) & set(CONTROLS) else []
    return {item.id: item for item in (*study.items("validation"), *test, *varied)}


def _prompts(
    study: Study, written: Judgements, query: str, responses: Mapping[str, judging.Responses], items: Mapping[str, Item]
) -> dict[judging.Key, tuple[Item, str]]:
    """What a query has yet to be asked about, over all benchmarks some of whose judges it is."""
    prompts: dict[judging.Key, tuple[Item, str]] = {}
    for benchmark, of in responses.items():
        names = judging.queries_of(judges_of(benchmark, study.scale.exam.judges)).get(query)
        if names:
            folders = official.places(assets.outside() or Path(), REAL.get(benchmark, REAL["sorry_bench"]).FOLDER)
            prompts |= written.missing(names, [items[name] for name in of], of, llm.wordings(names[0], folders))
    return prompts


def _with_verdicts(
    rows: Rows, judges: Mapping[str, Sequence[str]], items: Mapping[str, Item], texts: Mapping[tuple[str, str], str],
    written: Judgements, unjudged: dict[str, Counter[str]],
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Raw rows with those of models among them, each examination of a benchmark by its judges in their order."""
    modules = BENCHMARKS | REAL | CONTROLS | PACKED
    for (_, _, benchmark), group in groupby(rows, key=lambda row: (row["model"], row["exam"], row["benchmark"])):
        by_judge: dict[str, Rows] = {}
        for row in group:
            by_judge.setdefault(row["judge"], []).append(row)
        names = judges_of(benchmark, judges)
        for name in names:
            yield from by_judge.get(name, ())
            for row in next(iter(by_judge.values())) if name in LLM_JUDGES else ():
                item = items[row["item"]]
                label, reason = written.label(name, item, texts[row["model"], row["item"]])
                if label is None:
                    unjudged.setdefault(name, Counter())[reason] += 1
                columns = verdict_columns(modules[benchmark], item, name, label or UNJUDGED, names)
                yield {**row, "judge": name, "label": label or UNJUDGED, **columns}


# ---- for `vlsafe score`


def stored(study: Study, name: str, benchmark: str, model: str | None = None) -> evaluation.score.Stored:
    """What a finished run holds of a benchmark: the responses of its full examination, and what models have judged of them.

    Raises:   FileNotFoundError where the run is not made; ValueError where it has no such responses, or those of several models
              of which none is named
    """
    known(benchmark, REAL, "benchmark")
    if not study.scale.loaded:
        raise ValueError(f"{study.scale.name!r} has benchmarks in miniature, with no official metric; name a loaded scale")
    if not store.readable(study.run(name)):
        raise FileNotFoundError(f"there is no valid run {name}; `vlsafe stage {name}` makes it")
    folder = study.run(name).folder
    if not (folder / RESPONSES).exists():
        raise ValueError(f"{name} holds no responses; examination/… and merge/… do")
    rows = [row for row in store.read_rows(folder / "raw.parquet") if (row["exam"], row["benchmark"]) == ("full", benchmark)]
    models = list(dict.fromkeys(row["model"] for row in rows))
    if not models:
        raise ValueError(f"{name} holds no responses to {benchmark} in its full examination")
    if model is None and len(models) > 1:
        raise ValueError(f"{name} holds {len(models)} models; say which by --model: {', '.join(models)}")
    model = known(model or models[0], models, f"model of {name}")
    examined = {row["item"] for row in rows if row["model"] == model}
    prefix = f"{benchmark}/"  # by which a study tells items of several benchmarks apart
    texts = {item: text for (of, item), text in _texts(store.read_rows(folder / RESPONSES)).items() if of == model}
    kept = official.read_lines(folder / KEPT) if (folder / KEPT).exists() else ()
    judgements = [{**row, "id": row["id"].removeprefix(prefix)} for row in kept if row["id"] in examined]
    return evaluation.score.Stored(model, {i.removeprefix(prefix): texts[i] for i in texts if i in examined}, judgements)
