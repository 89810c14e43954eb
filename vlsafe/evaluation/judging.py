"""Judges that ask a model: who answers them, what they wrote, and the file that keeps it, line by line.

A judgement is of one response: equal responses to an item are asked about once, and two judges that read the same judgement
share it. What has no response, no judgement or no readable judgement is unjudged, with the reason, and never taken for
either side. Knows neither studies nor metrics.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vlsafe import evaluation, models
from vlsafe.core import store
from vlsafe.core.scale import known
from vlsafe.core.schema import Item, Turn
from vlsafe.evaluation.benchmarks import official
from vlsafe.evaluation.benchmarks.official import Marked
from vlsafe.evaluation.judges import JUDGES, LLM_JUDGES, UNJUDGED, LLMJudge

if TYPE_CHECKING:
    from vlsafe.evaluation.servers import Prompt, Reply, Server  # whose library takes a second to import

Responses = Mapping[str, Sequence[str | None]]  # item id: its responses, one per try; None is a try without a response
MISSING, UNREADABLE = "no judgement", "judgement cannot be read"  # both are asked about again: only verdicts are final
KEPT = '{"id": '  # how our lines begin: one that a kill has cut off is known by it
Key = tuple[str, str]  # item id, digest of the response
Find = Callable[[Mapping[str, Any], str], str]  # a row with an id, and where it stands -> the id of the item that it means


class JudgeModel(NamedTuple):
    """The model behind LLM judges: its name, which goes with the result, and how it completes prompts about items."""

    name: str
    complete: Callable[[LLMJudge, Sequence[tuple[Key, Item, str]]], Iterator[tuple[Key, Reply]]]


def endpoint(server: Server) -> JudgeModel:
    """A served model: raw prompts as completions, others as chat."""

    def prompt(judge: LLMJudge, item: Item, text: str) -> Prompt:
        if judge.raw:
            return text.removeprefix("<|begin_of_text|>")  # the server writes it
        system = (Turn("system", judge.system),) if judge.system else ()
        return evaluation.servers.chat_messages((*system, Turn("user", text)), item.images if judge.pictures else ())

    def complete(judge: LLMJudge, prompts: Sequence[tuple[Key, Item, str]]) -> Iterator[tuple[Key, Reply]]:
        requests = ((key, prompt(judge, item, text)) for key, item, text in prompts)
        return evaluation.servers.complete(server, requests, judge.max_tokens)

    return JudgeModel(server.model, complete)


def served(judges: Iterable[str], address: str, model: str | None, key: str, timeout: float, parallel: int) -> JudgeModel:
    """The model at an address, by default the one that the first judge which asks is published with.

    Raises:   ValueError where there is none to ask for
    """
    model = model or next((LLM_JUDGES[name].model for name in judges if name in LLM_JUDGES), "")
    if not model:
        raise ValueError("say which model the endpoint is to be asked for: --judge-model")
    return endpoint(evaluation.servers.Server(address, model, key, timeout, parallel=parallel))


def weights(folder: Path, name: str = "", batch_size: int = 16) -> JudgeModel:
    """A model folder, in memory while it judges and no longer, in bfloat16 on a GPU. Only for judges whose prompt is raw text.

    Raises:   FileNotFoundError where the folder holds no model
    """
    if not (Path(folder) / "config.json").exists():
        raise FileNotFoundError(f"{folder} holds no model (no config.json)")

    def complete(judge: LLMJudge, prompts: Sequence[tuple[Key, Item, str]]) -> Iterator[tuple[Key, Reply]]:
        """Greedy answers in batches of about one length; the model is loaded here and let go afterwards."""
        if not judge.raw:
            raise ValueError(f"the judge {judge.query!r} is a chat with {judge.model}; serve a model and name the --endpoint")
        import torch

        place = models.devices.device()
        model = models.checkpoints.load(folder, torch.float32 if place == "cpu" else torch.bfloat16).to(place)
        processor = models.checkpoints.load_processor(folder)
        tokenizer = getattr(processor, "tokenizer", processor)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        for batch in store.parts(sorted(prompts, key=lambda row: len(row[2])), batch_size):
            keys, _, texts = zip(*batch, strict=True)
            outputs = evaluation.engines.complete(model, tokenizer, texts, judge.max_tokens)
            yield from ((key, evaluation.servers.Reply(*output)) for key, output in zip(keys, outputs, strict=True))

    return JudgeModel(name or Path(folder).name, complete)


@dataclass
class Judgements:
    """What LLM judges wrote, and why some of it is missing.

    `models` write what is missing, by what they are asked (`LLMJudge.query`); `keep` is the file that gets each judgement as it
    comes. `written` holds text and model (None: unknown) by query, item and the digest of the response, or the number of the try
    where others' files say no more.
    """

    models: Mapping[str, JudgeModel]
    keep: Path
    written: dict[tuple[str, str, str | int], tuple[str, str | None]] = field(default_factory=dict)
    problems: dict[tuple[str, str, str], str] = field(default_factory=dict)

    def label(self, name: str, item: Item, response: str | None, attempt: int = 0) -> tuple[str | None, str]:
        """A judge's label, or None and the reason; a judgement is of this very response by this model, where either is known."""
        if response is None:
            return None, "no response"
        if name in JUDGES:
            label = JUDGES[name](item, response).label
            return (None, "not decided by the rule") if label == UNJUDGED else (label, "")
        judge = LLM_JUDGES[name]
        label = judge.shortcut(item, response).label
        if label == UNJUDGED:
            text, key = self._text(judge.query, item.id, response, attempt), (judge.query, item.id, digest(response))
            if text is None:
                return None, self.problems.get(key, MISSING)
            label = judge.parse(text).label
        return (None, UNREADABLE) if label == UNJUDGED else (label, "")

    def _text(self, query: str, item: str, response: str, attempt: int) -> str | None:
        model = self.models.get(query)
        found = (self.written.get((query, item, about)) for about in (attempt, digest(response)))
        return next((text for text, by in filter(None, found) if model is None or by in (None, model.name)), None)

    def read(self, rows: Iterable[Mapping[str, Any]], place: str, find: Find, judges: Sequence[str]) -> None:
        """Add lines, ours or others': `{"id", "judgement"}` and perhaps `judge`, `response` (the text or its digest) or `try`,
        `model`; later ones of one response win.

        Raises:   ValueError where a line does not say which of several judges wrote it
        """
        queries = list(queries_of(judges))
        count: Counter[tuple[str, str]] = Counter()
        for number, row in enumerate(rows, 1):
            where = f"row {number} of {place}"
            if not isinstance(row, Mapping):
                raise ValueError(f"{where} is no object with an id and a judgement")
            official.needs(row, ("id", "judgement"), where, 'a judgement is a row {"id", "judgement"}')
            if "judge" not in row and len(queries) != 1:
                raise ValueError(f"{where} does not say which judge wrote it; add judge: one of {', '.join(queries)}")
            judge, text, about = row.get("judge", queries[0]), row["judgement"], row.get("response")
            judge, item = known(judge, {*LLM_JUDGES, *ASKED}, f"judge in {where}"), find(row, where)
            if not (isinstance(text, str | int | None) and isinstance(about, str | None) and type(row.get("try", 0)) is int):
                raise ValueError(f"{where}: a judgement is text or null, a response text or its digest, a try a number from 0")
            query = LLM_JUDGES[judge].query if judge in LLM_JUDGES else judge
            if text is not None:  # null: a call that failed, of which there may be another line
                if about is not None:
                    about = about if re.fullmatch("[0-9a-f]{16}", about) else digest(about)
                else:
                    about = int(row.get("try", count[query, item]))
                    count[query, item] += 1
                self.written[query, item, about] = (str(text), row.get("model"))

    def read_kept(self, find: Find, judges: Sequence[str]) -> None:
        """Add what an earlier call has kept, without a line that a kill has cut off; the file stays as it is."""
        if self.keep.exists():
            self.read(official.read_lines(self.keep, cut=KEPT), str(self.keep), find, judges)

    def missing(
        self, names: Sequence[str], items: Iterable[Item], responses: Responses, wording: Mapping[str, str]
    ) -> dict[Key, tuple[Item, str]]:  # fmt: skip
        """What judges of one query have yet to judge: each response to an item once, with the prompt about it."""
        judge, prompts = LLM_JUDGES[names[0]], dict[Key, tuple[Item, str]]()
        for item in items:
            for attempt, response in enumerate(responses.get(item.id, ())):
                labels = [self.label(name, item, response, attempt) for name in names]
                if response is None or not any(label is None and reason in (MISSING, UNREADABLE) for label, reason in labels):
                    continue
                if judge.pictures and not item.images:
                    self.problems[judge.query, item.id, digest(response)] = "no picture"
                else:
                    prompts[item.id, digest(response)] = item, judge.prompt(item, response, wording)
        return prompts

    def ask(
        self, query: str, prompts: Mapping[Key, tuple[Item, str]], progress: Callable[[int], None] = lambda done: None
    ) -> None:
        """Have the model of a query complete prompts, keep each judgement as it comes, and note why some did not.

        Units:    `progress` counts prompts
        Raises:   ConnectionAbortedError where an endpoint is gone; what it wrote before is kept
        """
        model, judge = self.models[query], next(judge for judge in LLM_JUDGES.values() if judge.query == query)
        replies = model.complete(judge, [(key, *prompt) for key, prompt in prompts.items()]) if prompts else ()
        try:
            for done, ((item_id, about), reply) in enumerate(replies, 1):
                progress(done)
                if reply.text is None:
                    self.problems[query, item_id, about] = reply.problem
                    continue
                self.written[query, item_id, about] = (reply.text, model.name)
                line = {"id": item_id, "judge": query, "judgement": reply.text, "model": model.name, "response": about}
                self._append(json.dumps(line))
        except evaluation.servers.Rejected as error:
            if not any(by == model.name and of == query for (of, _, _), (_, by) in self.written.items()):
                raise
            for item_id, about in prompts:  # it answers others: these few it refuses each time, as a filter does
                self.problems.setdefault((query, item_id, about), error.problem)

    def refuse_silent(self, query: str) -> None:
        """Raises:   ConnectionAbortedError where the model of a query has not written a word: it may another time"""
        if not any(of == query for of, _, _ in self.written):
            said = Counter(problem for (of, _, _), problem in self.problems.items() if of == query)
            reasons = "; ".join(f"{count} × {reason}" for reason, count in said.items())
            raise ConnectionAbortedError(f"the judge {query!r} wrote nothing at all ({reasons}); the same command asks it again")

    def _append(self, line: str) -> None:
        """Add a line to the kept ones, after whatever the file holds: a last line without an end is somebody's, too."""
        with self.keep.open("ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                line = line if file.read(1) == b"\n" else f"\n{line}"
            file.write(f"{line}\n".encode())


ASKED = frozenset(judge.query for judge in LLM_JUDGES.values())


def digest(text: str) -> str:
    """By what a judgement names the response that it is of."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def queries_of(judges: Iterable[str]) -> dict[str, list[str]]:
    """The judges among these that ask a model, by what they ask: judges of one query read the same judgement."""
    queries: dict[str, list[str]] = {}
    for name in judges:
        if name in LLM_JUDGES:
            queries.setdefault(LLM_JUDGES[name].query, []).append(name)
    return queries


def marked(name: str, items: Sequence[Item], responses: Responses, judgements: Judgements) -> tuple[list[Marked], Counter[str]]:
    """Labels of one judge, and why some are missing. Every item has as many tries as the one with most."""
    tries, reasons, rows = max(map(len, responses.values())), Counter[str](), []
    for item in items:
        texts = list(responses.get(item.id, ()))
        texts += [None] * (tries - len(texts))
        labels = [judgements.label(name, item, text, attempt) for attempt, text in enumerate(texts)]
        reasons.update(reason for label, reason in labels if label is None)
        rows.append(Marked(item, tuple(label for label, _ in labels)))
    return rows, reasons
