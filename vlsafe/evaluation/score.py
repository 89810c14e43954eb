"""`vlsafe score`: responses made anywhere, any judges, the official metric.

Responses come as lines of `{"id", "response"}`, ids as the official files write them; where several items share an id,
further keys tell them apart. A judge that asks a model finds its answers in a file, or has them made by weights
or an endpoint and kept beside the result, line by line, so that an interrupted run goes on where it stopped. What has no
response, no answer or no readable answer is unjudged: counted, with the reason, and never taken for either side.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from vlsafe.core import store
from vlsafe.core.scale import known
from vlsafe.core.schema import Item, Turn
from vlsafe.evaluation import servers
from vlsafe.evaluation.benchmarks import REAL, official
from vlsafe.evaluation.benchmarks.official import Marked, Score
from vlsafe.evaluation.judges import JUDGES
from vlsafe.evaluation.judges.marks import UNJUDGED
from vlsafe.evaluation.judges.written import WRITTEN, Written, wordings
from vlsafe.evaluation.servers import Reply, Request

Said = dict[str, list[str | None]]  # item id: its responses, one per try
Key = tuple[str, int]  # item id, try


class Asker(NamedTuple):
    """Who answers for judges that ask: a name that goes with the result, and how it is asked."""

    model: str
    ask: Callable[[Written, Sequence[tuple[Key, Item, str]], Mapping[str, str]], Iterator[tuple[Key, Reply]]]


def endpoint(server: servers.Server) -> Asker:
    """A served model: raw prompts as completions, others as chat."""

    def ask(written: Written, asked: Sequence[tuple[Key, Item, str]], wording: Mapping[str, str]) -> Iterator[tuple[Key, Reply]]:
        """The server's answers as they come, in no order."""

        def requests() -> Iterator[Request]:
            for key, item, text in asked:
                prompt = written.ask(item, text, dict(wording))
                if written.raw:
                    yield Request(key, prompt=prompt.removeprefix("<|begin_of_text|>"))  # the server writes it
                    continue
                opening = (Turn("system", written.system),) if written.system else ()
                shown = item.images if written.pictures else ()
                yield Request(key, servers.said((*opening, Turn("user", prompt)), shown))

        yield from servers.complete(server, requests(), written.max_tokens)

    return Asker(server.model, ask)


def weights(folder: Path, batch_size: int = 16) -> Asker:
    """A model folder, run here, on a GPU in bfloat16 where there is one; only for judges whose prompt is text."""
    import torch

    from vlsafe.evaluation import engines
    from vlsafe.models import checkpoints

    fast = torch.cuda.is_available()
    model = checkpoints.load(folder, torch.bfloat16 if fast else torch.float32).to("cuda" if fast else "cpu")
    processor = checkpoints.load_processor(folder)
    tokenizer = getattr(processor, "tokenizer", processor)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    def ask(written: Written, asked: Sequence[tuple[Key, Item, str]], wording: Mapping[str, str]) -> Iterator[tuple[Key, Reply]]:
        if not written.raw:
            raise ValueError(f"the judge {written.texts!r} is a chat with {written.model}; serve a model and name the --endpoint")
        prompts = [(key, written.ask(item, text, dict(wording))) for key, item, text in asked]
        prompts.sort(key=lambda pair: len(pair[1]))
        for start in range(0, len(prompts), batch_size):
            keys, texts = zip(*prompts[start : start + batch_size], strict=True)
            made = engines.continued(model, tokenizer, texts, written.max_tokens)
            yield from ((key, Reply(text, cut)) for key, (text, cut) in zip(keys, made, strict=True))

    return Asker(Path(folder).name, ask)


# ---- reading


def finder(module: ModuleType, items: Sequence[Item]) -> Callable[[Mapping[str, Any], str], str]:
    """A function from a row with an id, and where it stands, to the id of the item that it means."""
    by_name: dict[str, list[Item]] = {}
    for item in items:
        for name in dict.fromkeys(official.own(module, "names")(item)):
            by_name.setdefault(name, []).append(item)

    def find(row: Mapping[str, Any], where: str) -> str:
        """Raises:   ValueError, naming the place, where the id means no item or several"""
        meant = by_name.get(str(row["id"]), [])
        if len(meant) > 1:
            meant = [item for item in meant if official.fits(module, item, row)]
        if not meant:
            raise ValueError(f"{where}: {str(row['id'])[:60]!r} is no item of {module.NAME}; its ids look like {items[0].id!r}")
        if len(meant) > 1:
            keys = ", ".join(official.own(module, "QUALIFIERS"))
            raise ValueError(f"{where}: the id {str(row['id'])[:60]!r} means {len(meant)} items; add one of {keys}")
        return meant[0].id

    return find


def read_responses(
    module: ModuleType, path: Path, items: Sequence[Item], find: Callable[[Mapping[str, Any], str], str], tries: int = 1
) -> Said:
    """Responses per item, in the order of the file; null is a try without a response.

    Raises:   ValueError for a row without id or response, a stranger's id, or more responses to an item than `tries`
    """
    folder = path.is_dir() and hasattr(module, "official_responses")
    if path.is_dir() and not folder:
        raise ValueError(f"{path} is a folder; responses to {module.NAME} are one file of lines with id and response")
    said: Said = {}
    for number, row in enumerate(module.official_responses(path, items) if folder else official.read_lines(path), 1):
        where = f"row {number} of {path}"
        official.needs(row, ("id", "response"), where)
        if row["response"] is not None and not isinstance(row["response"], str):
            raise ValueError(f"{where}: a response is a text or null, not {type(row['response']).__name__}")
        given = said.setdefault(find(row, where), [])
        given.append(row["response"])
        if len(given) > tries:
            raise ValueError(f"{where}: the item {row['id']} has {len(given)} responses; {module.NAME} counts at most {tries}")
    if not said:
        raise ValueError(f"{path} holds no responses")
    return said


class Answers(NamedTuple):
    """Verdict texts by (name of the texts, item, try), each with the model that wrote it and the digest of the response."""

    found: dict[tuple[str, str, int], tuple[str, str | None, str | None]]

    def of(self, texts: str, key: Key, response: str, model: str | None) -> str | None:
        """The text about this very response by this model, where either is known."""
        text, by, about = self.found.get((texts, *key), (None, None, None))
        fits = about in (None, _digest(response)) and (model is None or by in (None, model))
        return text if fits else None


def read_answers(paths: Iterable[Path], find: Callable[[Mapping[str, Any], str], str], judges: Sequence[str]) -> Answers:
    """Verdict texts, ours and others': `{"id", "judgement"}` and perhaps `judge`, `try`, `model`; later ones win.

    Raises:   ValueError where a line does not say which of several judges wrote it
    """
    names = list(dict.fromkeys(WRITTEN[name].texts for name in judges if name in WRITTEN))
    found: dict[tuple[str, str, int], tuple[str, str | None, str | None]] = {}
    for path in paths:
        turn: Counter[tuple[str, str]] = Counter()
        for number, row in enumerate(official.read_lines(path), 1):
            where = f"row {number} of {path}"
            official.needs(row, ("id", "judgement"), where)
            if "judge" not in row and len(names) != 1:
                raise ValueError(
                    f"{where} does not say which judge wrote it; add judge: one of {', '.join(names) or 'none asked'}"
                )
            judge, item = row.get("judge", names[0] if names else ""), find(row, where)
            judge = WRITTEN[judge].texts if judge in WRITTEN else judge
            place = int(row.get("try", turn[judge, item]))
            turn[judge, item] += 1
            found[judge, item, place] = (str(row["judgement"]), row.get("model"), row.get("response"))
    return Answers(found)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# ---- judging


def examined(module: ModuleType, items: Sequence[Item], said: Said) -> tuple[list[Item], list[str]]:
    """The items of those parts (kinds, styles, subsets) that have any response; the other parts' names."""
    part = official.own(module, "part")
    parts = {part(item) for item in items if item.id in said}
    left = dict.fromkeys(part(item) for item in items if part(item) not in parts)
    return [item for item in items if part(item) in parts], list(left)


def ask_missing(
    written: Written, items: Sequence[Item], said: Said, answers: Answers, asker: Asker, wording: Mapping[str, str], keep: Path
) -> tuple[Answers, dict[Key, str]]:  # fmt: skip
    """Have what is not answered yet answered, writing each answer down as it comes; and why some were not."""
    missing = [
        ((item.id, place), item, text)
        for item in items
        for place, text in enumerate(said.get(item.id, ()))
        if text is not None
        and written.settle(item, text) is None
        and answers.of(written.texts, (item.id, place), text, asker.model) is None
    ]
    problems = {key: "no picture" for key, item, _ in missing if written.pictures and not item.images}
    missing = [row for row in missing if row[0] not in problems]
    if not missing:
        return answers, problems
    found = dict(answers.found)
    with keep.open("a", encoding="utf-8") as file:
        for (item, place), reply in asker.ask(written, missing, wording):
            if reply.text is None:
                problems[item, place] = reply.problem
                continue
            about = _digest(str(said[item][place]))
            found[written.texts, item, place] = (reply.text, asker.model, about)
            line = {"id": item, "try": place, "judge": written.texts, "judgement": reply.text}
            file.write(json.dumps({**line, "model": asker.model, "response": about}, ensure_ascii=False) + "\n")
            file.flush()
    return Answers(found), problems


def _mend(path: Path) -> None:
    """Cut off a last line that was being written when a run ended."""
    if path.exists() and not (data := path.read_bytes()).endswith(b"\n"):
        path.write_bytes(data[: data.rfind(b"\n") + 1])


def marked(
    name: str, items: Sequence[Item], said: Said, answers: Answers, problems: Mapping[Key, str], model: str | None
) -> tuple[list[Marked], Counter[str]]:  # fmt: skip
    """Labels of one judge, and why some are missing. Every item has as many tries as the one with most."""
    width, reasons, rows = max(map(len, said.values())), Counter[str](), []
    for item in items:
        given = said.get(item.id, [])
        labels = []
        for place in range(width):
            text = given[place] if place < len(given) else None
            label, reason = (None, "no response") if text is None else _mark(name, item, place, text, answers, problems, model)
            labels.append(label)
            reasons.update([reason] if label is None else [])
        rows.append(Marked(item, tuple(labels)))
    return rows, reasons


def _mark(
    name: str, item: Item, place: int, text: str, answers: Answers, problems: Mapping[Key, str], model: str | None
) -> tuple[str | None, str]:  # fmt: skip
    if name in JUDGES:
        label, _ = JUDGES[name](item, text)
        return (None, "not decided by the rule") if label == UNJUDGED else (label, "")
    written = WRITTEN[name]
    mark = written.settle(item, text)
    if mark is None:
        answer = answers.of(written.texts, (item.id, place), text, model)
        if answer is None:
            return None, problems.get((item.id, place), "no judgement")
        mark = written.parse(answer)
    return (None, "judgement cannot be read") if mark.label == UNJUDGED else (mark.label, "")


def verdicts(judge: str, rows: Sequence[Marked]) -> Iterator[dict[str, Any]]:
    """Rows as raw tables have them, one per response. `event`: complied (safety), right (helpfulness), effective (SIUO)."""
    words = official.MEANINGS.get(judge)
    for item, labels in rows:
        for place, label in enumerate(labels):
            event = None if label is None else words[label] == "complied" if words else label in ("right", item.reference)
            if label is not None and "effective" in judge:
                event = label != "Ineffective"
            told = dict(benchmark=item.benchmark, group=item.group, category=item.category, cluster=item.cluster, item=item.id)
            yield {**told, "harmful": item.harmful, "try": place, "judge": judge, "label": label or UNJUDGED, "event": event}


# ---- the command


def score(
    benchmark: str, data: Path, responses: Path, out: Path, judges: Sequence[str] = (), subset: str | None = None,
    judgements: Path | None = None, asker: Asker | None = None, rows_to: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Score stored responses and write the result as JSON; with `rows_to`, every verdict as a line of its own.

    Raises:   ValueError for anything that does not fit together, naming it; ConnectionAbortedError when an endpoint is gone
              (its answers so far are kept beside `out`)
    """
    module = REAL[known(benchmark, REAL, "benchmark")]
    subset = known(subset, module.OFFICIAL, f"subset of {benchmark}") if subset else next(iter(module.OFFICIAL))
    names = [known(name, JUDGES | WRITTEN, "judge") for name in judges or module.OFFICIAL[subset]]
    written = [name for name in names if name in WRITTEN]
    _refuse_unanswered(written, judgements, asker)
    items, notes = module.load(data, subset, pictures=False)
    find = finder(module, items)
    said = read_responses(module, responses, items, find, official.own(module, "TRIES").get(subset, 1))
    items, left = examined(module, items, said)
    if asker is not None and any(WRITTEN[name].pictures for name in written):
        pictured, notes = module.load(data, subset, pictures=True)
        shown = {item.id: item for item in pictured}
        items = [shown.get(item.id, item) for item in items]
    out.parent.mkdir(parents=True, exist_ok=True)
    keep = out.with_suffix(".judgements.jsonl")
    _mend(keep)
    sources = [path for path in (keep if asker else None, judgements) if path is not None and path.exists()]
    answers = read_answers(sources if written else (), find, written)
    problems: dict[str, dict[Key, str]] = {}
    if asker is not None:
        for texts, name in {WRITTEN[name].texts: name for name in written}.items():
            wording = wordings(name, official.places(data, module.FOLDER))
            answers, problems[texts] = ask_missing(WRITTEN[name], items, said, answers, asker, wording, keep)
    marks, told = {}, {}
    for name in names:
        model = asker.model if asker and name in WRITTEN else None
        why = problems.get(WRITTEN[name].texts, {}) if name in WRITTEN else {}
        marks[name], reasons = marked(name, items, said, answers, why, model)
        told[name] = dict(judge=name, model=model, official=name in module.OFFICIAL[subset], unjudged=dict(reasons))
    scores = [{**row._asdict(), "model": told[row.judge.split(" + ")[0]]["model"]} for row in module.scores(marks)]
    if not scores:
        raise ValueError(f"none of {', '.join(names)} tells anything about these responses to {benchmark}")
    result = {
        "benchmark": benchmark, "subset": subset, "files": notes, "responses": responses.name, "n_items": len(items),
        "n_without_response": sum(item.id not in said for item in items), "parts_without_responses": left,
        "judges": list(told.values()), "scores": scores, "agreement": _agreement(marks),
        "divergences": list(module.DIVERGENCES), "source": store.source_digest(),
    }  # fmt: skip
    store.write_text(out, json.dumps(_plain(result), indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    if rows_to is not None:
        rows = (row for name in names for row in verdicts(name, marks[name]))
        store.write_text(rows_to, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return result


def _refuse_unanswered(written: Sequence[str], judgements: Path | None, asker: Asker | None) -> None:
    if judgements is not None and not judgements.exists():
        raise FileNotFoundError(f"there is no file {judgements}")
    if written and judgements is None and asker is None:
        rules = ", ".join(name for name in JUDGES if name in official.MEANINGS and not name.endswith("-literal"))
        raise ValueError(
            f"the judge {written[0]!r} asks a model ({WRITTEN[written[0]].model}): give --judgements, --weights or --endpoint. "
            f"Judges by rule, which are other measures: {rules}"
        )


def _agreement(marks: Mapping[str, Sequence[Marked]]) -> list[dict[str, Any]]:
    """Pairs of judges that ask the same of the same responses (did it comply, or is it right): equal verdicts and kappa.

    Kappa is None where a judge says the same of everything. How models rank by each judge is the affair of several
    results (`agreement`).
    """
    alike: dict[bool, dict[str, np.ndarray]] = {}
    for name in marks:
        if "effective" not in name:
            events = [row["event"] for row in verdicts(name, marks[name])]
            alike.setdefault(name in official.MEANINGS, {})[name] = np.array(events, float)
    found = []
    for told in alike.values():
        for one, two in combinations(told, 2):
            from statsmodels.stats.inter_rater import cohens_kappa

            both = ~np.isnan(told[one] + told[two])
            table = np.histogram2d(told[one][both], told[two][both], bins=[[0, 0.5, 1]] * 2)[0]
            n, varied = int(table.sum()), min(*table.sum(0), *table.sum(1)) > 0
            equal = float(table.trace() / n) if n else None
            kappa = float(cohens_kappa(table).kappa) if varied else None
            found.append(dict(judge=one, other=two, n=n, table=table.astype(int).tolist(), agreement=equal, kappa=kappa))
    return found


def _plain(value: Any) -> Any:
    """The same with None for what is no number, which JSON cannot write."""
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def lines(result: Mapping[str, Any]) -> Iterator[str]:
    """A result for reading: one line per number, with interval, n and unjudged; then what is to be borne in mind."""
    yield f"{result['benchmark']} ({result['subset']}), {result['n_items']:,} items"
    yield from (f"{n:,} items have no response" for n in [result["n_without_response"]] if n)
    yield f"{'metric':<24} {'over':<48} {'judge':<26} {'value':>8} {'95 % interval':>18} {'n':>7} {'unjudged':>8}"
    for told in result["scores"]:
        row, model = Score(*(told[key] for key in Score._fields)), told["model"]
        factor, unit = (100, " %") if row.full == 1 else (1, "  ")
        value = f"{factor * row.value:.1f}{unit}"
        span = f"[{factor * row.low:.1f}, {factor * row.high:.1f}]"
        judge = f"{row.judge} by {model}" if model else row.judge
        yield f"{row.metric:<24} {row.over:<48} {judge:<26} {value:>8} {span:>18} {row.n:>7,} {row.n_unjudged:>8,}"
    for judge in result["judges"]:
        for reason, count in judge["unjudged"].items():
            yield f"unjudged by {judge['judge']}: {count:,} ({reason})"
    for pair in result["agreement"]:
        if pair["n"]:
            alike = f"equal on {pair['agreement']:.1%} of {pair['n']:,}"
            kappa = f"kappa {pair['kappa']:.2f}" if pair["kappa"] is not None else "no kappa: one says the same of everything"
            yield f"{pair['judge']} and {pair['other']}: {alike}, {kappa}"
    yield from (f"no responses to: {part}" for part in result["parts_without_responses"])
    yield from (f"files: {note}" for note in result["files"])
