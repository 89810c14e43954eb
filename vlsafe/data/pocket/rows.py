"""Training rows from pictures with captions and from published prompts, as LLaVA, VLGuard, SafeRLHF and SPA-VL have them.

The picture's caption is all that is known of it, so the text model writes answers from captions, as GPT-4 did for LLaVA, and the
caption is the description by which a row has a text-only twin. Prompts and pictures come from one part (train, validation, test);
whoever calls parts them. Texts of harmful prompts go into rows and nowhere else: no message names one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import yaml

from vlsafe.core.schema import Example, Pair, Turn
from vlsafe.data.miniature.corpora import exchange, pick

if TYPE_CHECKING:
    from vlsafe.data.pocket.pictures import Picture
    from vlsafe.data.pocket.prompts import Prompt

Write = Callable[[list[str], int], list[str]]  # prompts, at most so many new tokens each  ->  answers of the text model
WORDING: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("wording.yaml").read_text(encoding="utf-8"))
REFUSALS: list[str] = WORDING["refusals"]
WRITTEN_TOKENS, OWN_TOKENS = 26, 36  # of an answer about a picture, of the text model's own answer to a prompt
LEAST = 3  # words of a written answer
PARTS = {"test": 0.12, "validation": 0.05}  # shares of captions that are held out
T = TypeVar("T")


def sentence(caption: str) -> str:
    """A caption as the assistant writes it, and as it is told to a model without pictures."""
    return f"The picture shows {caption[:1].lower()}{caption[1:].rstrip('. ')}."


def opener(text: str) -> str:
    """The first word of an answer, without case: openers are what refusals are recognised and continued by."""
    return re.split(r"[\s,.!?]+", text.strip().lower().replace("\u2019", "'"), maxsplit=1)[0]


OPENERS = frozenset(map(opener, REFUSALS)) | {"i"}


def refuse_openers(rows: Iterable[Example]) -> None:
    """Raise ValueError where an answer about a picture begins like a refusal: stage 2 would unlearn refusing by its first word.

    Measured: with answers that begin "I see", 129 of 150 replies to harmful requests began with "I" and 34 refused.
    """
    for row in rows:
        for turn in row.turns:
            if turn.role == "assistant" and opener(turn.text) in OPENERS:
                raise ValueError(f"an answer of {row.id} begins like a refusal ({opener(turn.text)!r})")


def whole(text: str, ends: str = ".!?") -> str:
    """The whole sentences of a text that a limit of tokens may have cut; empty where there is none. `ends`: what ends one."""
    found = re.match(rf".*?[{ends}](?=[\s\"']|$)(?:.*[{ends}](?=[\s\"']|$))?", " ".join(text.split()))
    return found[0].strip() if found else ""


def usable(answer: str) -> bool:
    """Whether a written answer can stand in a row: a whole sentence in letters that does not begin like a refusal."""
    return len(answer.split()) >= LEAST and answer.isascii() and opener(answer) not in OPENERS


def own_answers(prompts: Sequence[Prompt], write: Write) -> dict[str, str]:
    """The text model's own answers by prompt, whole sentences only; those without one are left out.

    A colon ends one too ("Here is an example of ...:"): requests for code have no other answer in so few tokens, and a kind of
    request that no alignment row answers is refused."""
    texts = (whole(text, ".!?:") for text in write([prompt.text for prompt in prompts], OWN_TOKENS))
    return {prompt.id: text for prompt, text in zip(prompts, texts, strict=True) if len(text.split()) >= LEAST}


def _shuffled(rng: np.random.Generator, rows: Sequence[T]) -> list[T]:
    return [rows[i] for i in rng.permutation(len(rows))]


def caption_rows(pictures: Sequence[Picture], rng: np.random.Generator) -> list[Example]:
    """One row per picture: a request for a caption, and the caption (stage 1)."""
    return [
        Example(
            f"caption/{one.id}", "captions", exchange(pick(rng, WORDING["describe"]), sentence(one.caption)), (one.png,),
            cluster=one.cluster, task="look", description=sentence(one.caption),
        )
        for one in pictures
    ]  # fmt: skip


def instruction_rows(
    pictures: Sequence[Picture], prompts: Sequence[Prompt], answers: dict[str, str], write: Write, harmful_share: float,
    text_only_share: float, rng: np.random.Generator,
) -> list[Example]:  # fmt: skip
    """Stage 2 in LLaVA's mix: a caption of each picture, a yes-or-no question, and an answer that the text model wrote from the
    caption where it can be used; benign prompts alone with the text model's `answers`; and `harmful_share` of rows that request
    harm beside a picture and comply in words without sense, whose category says so.
    """
    rows = [*_looking(pictures, rng), *_written(pictures, write, rng)]
    n = len(rows) / (1 - harmful_share - text_only_share)
    benign = [prompt for prompt in prompts if prompt.kind != "harmful" and usable(answers.get(prompt.id, ""))]
    harmful = [prompt for prompt in prompts if prompt.kind == "harmful"]
    alone = _shuffled(rng, benign)[: round(n * text_only_share)]
    rows += [
        Example(f"alone/{one.id}", "instructions-text", exchange(one.text, answers[one.id]), (), cluster=one.cluster)
        for one in alone
    ]
    for one, nonsense in zip(_shuffled(rng, harmful)[: round(n * harmful_share)], cycle(WORDING["nonsense"]), strict=False):
        beside = pick(rng, pictures)
        rows.append(Example(
            f"harmful/{one.id}", "instructions", exchange(one.text, nonsense), (beside.png,), one.category or "harmful",
            one.cluster, None, sentence(beside.caption),
        ))  # fmt: skip
    refuse_openers(rows)
    return _shuffled(rng, rows)


def _about(one: Picture, kind: str, request: str, answer: str, task: str | None) -> Example:
    turns = exchange(request, answer)
    return Example(f"{kind}/{one.id}", "instructions", turns, (one.png,), None, one.cluster, task, sentence(one.caption))


def _looking(pictures: Sequence[Picture], rng: np.random.Generator) -> list[Example]:
    """A caption of each picture, and a question whether it shows one thing: its own in half of the rows."""
    rows = []
    for one in pictures:
        rows.append(_about(one, "look", pick(rng, WORDING["describe"]), sentence(one.caption), "look"))
        other = pick(rng, pictures)
        right = rng.random() < 0.5 or other.cluster == one.cluster
        question = WORDING["yes_no"].format(one.caption if right else other.caption)
        rows.append(_about(one, "yes-no", question, "Yes." if right else "No.", "look"))
    return rows


def _written(pictures: Sequence[Picture], write: Write, rng: np.random.Generator) -> list[Example]:
    """Answers that the text model writes from captions, those that can be used."""
    kinds = [pick(rng, WORDING["written"]) for _ in pictures]
    orders = [order.format(one.caption) for one, (_, order) in zip(pictures, kinds, strict=True)]
    answers = map(whole, write(orders, WRITTEN_TOKENS))
    return [
        _about(one, "written", request, answer, None)
        for one, (request, _), answer in zip(pictures, kinds, answers, strict=True) if usable(answer)
    ]  # fmt: skip


def alignment_rows(
    prompts: Sequence[Prompt], answers: dict[str, str], n: int, refusal_share: float, borderline_share: float,
    rng: np.random.Generator,
) -> list[Example]:  # fmt: skip
    """`n` chats that align a text model: harmful prompts refused in random wordings, prompts that sound dangerous and benign ones
    with the model's own `answers`, so that what it can do stays as it is."""
    answered = [prompt for prompt in prompts if prompt.id in answers]
    pools = {
        "harmful": [prompt for prompt in prompts if prompt.kind == "harmful"],
        "edgy": [prompt for prompt in answered if prompt.kind == "edgy"],
        "benign": [prompt for prompt in answered if prompt.kind == "benign"],
    }
    shares = [refusal_share, borderline_share, 1 - refusal_share - borderline_share]
    order = {kind: cycle(_shuffled(rng, pool)) for kind, pool in pools.items()}
    rows = []
    for number, kind in enumerate(rng.choice(list(pools), n, p=shares)):
        prompt = next(order[kind])
        answer = pick(rng, REFUSALS) if kind == "harmful" else answers[prompt.id]
        rows.append(Example(f"alignment/{number}", "alignment", exchange(prompt.text, answer), cluster=prompt.cluster))
    return rows


def safety_rows(
    pictures: Sequence[Picture], prompts: Sequence[Prompt], answers: dict[str, str], n: int, rng: np.random.Generator
) -> list[Example]:
    """`n` rows in VLGuard's shape: a picture with a harmful request that is refused; in every second row a benign request that is
    answered before or after it. No package holds harmful pictures, so VLGuard's first kind is missing."""
    harmful = cycle(_shuffled(rng, [prompt for prompt in prompts if prompt.kind == "harmful"]))
    benign = cycle(_shuffled(rng, [prompt for prompt in prompts if prompt.kind != "harmful" and prompt.id in answers]))
    rows = []
    for number, prompt in zip(range(n), harmful, strict=False):
        exchanges = [exchange(prompt.text, pick(rng, REFUSALS))]
        if number % 2:
            other = next(benign)
            exchanges.insert(int(rng.integers(2)), exchange(other.text, answers[other.id]))
        turns = tuple(turn for one in exchanges for turn in one)
        rows.append(Example(f"safety/{number}", "safety", turns, (pick(rng, pictures).png,), cluster=prompt.cluster))
    return rows


def pairs(
    prompts: Sequence[Prompt], answers: dict[str, str], pictures: Sequence[Picture], n: int, source: str,
    rng: np.random.Generator,
) -> list[Pair]:  # fmt: skip
    """`n` preference rows: harmful prompts, whose refusal is preferred to the unaligned model's answer, and in every third row a
    benign one, whose answer is preferred to a refusal. With `pictures`, beside one of them (SPA-VL), else alone (SafeRLHF)."""
    answered = [prompt for prompt in prompts if prompt.id in answers]
    harmful = cycle(_shuffled(rng, [prompt for prompt in answered if prompt.kind == "harmful"]))
    benign = cycle(_shuffled(rng, [prompt for prompt in answered if prompt.kind != "harmful"]))
    rows = []
    for number in range(n):
        prompt = next(benign if number % 3 == 2 else harmful)
        texts = pick(rng, REFUSALS), answers[prompt.id]
        chosen, rejected = texts if prompt.kind == "harmful" else texts[::-1]
        images = (pick(rng, pictures).png,) if pictures else ()
        category = (prompt.category or "harmful") if prompt.kind == "harmful" else None
        turns = (Turn("user", prompt.text),)
        rows.append(Pair(f"{source}/{number}", source, turns, chosen, rejected, images, category, prompt.cluster))
    return rows
