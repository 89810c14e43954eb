"""Guards: content in, assessment out. A text guard reads, an image guard looks; neither knows why it is asked.

The miniature trains one of each: a language model that answers in Llama-Guard's output format, and a linear
classifier on vision features. Real guards come behind the same two calls.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import PreTrainedModel

from vlsafe import towers
from vlsafe.miniature.corpora import LOOKING, ask_about, pick, reply
from vlsafe.miniature.language import GUARD_CODES, HOW, REFUSALS, Deed, World, harm, question
from vlsafe.miniature.pictures import draw_scene
from vlsafe.schema import Turn


class Assessment(NamedTuple):
    """What a guard says of one content. `unsafe` None: its answer could not be read (counted, never taken as safe).

    Units:    score: probability of "unsafe", in [0, 1]
    """

    unsafe: bool | None
    categories: tuple[str, ...]
    score: float


class TextGuard(Protocol):
    """Reads conversations; one assessment each, in order."""

    def assess(self, conversations: Sequence[Sequence[Turn]]) -> list[Assessment]: ...


class ImageGuard(Protocol):
    """Looks at pictures (PNG bytes); one assessment each, in order."""

    def assess(self, pictures: Sequence[bytes]) -> list[Assessment]: ...


def parse_guard(text: str) -> tuple[bool | None, tuple[str, ...]]:
    """Llama-Guard's answer: `safe`, or `unsafe` and on the next line comma-separated codes; anything else is None.

    Source:   Llama-Guard-3 model card
    """
    words = text.strip().replace(",", " ").split()
    if words == ["safe"]:
        return False, ()
    if words and words[0] == "unsafe" and all(re.fullmatch(r"S\d+", code) for code in words[1:]):
        return True, tuple(words[1:])
    return None, ()


def guard_prompt(conversation: Sequence[Turn]) -> str:
    """The text that the miniature's guard reads. Speakers are named by their markers; the system line is not judged."""
    marker = {"user": "<|user|>", "assistant": "<|assistant|>"}
    return " ".join(f"{marker[turn.role]} {turn.text}" for turn in conversation if turn.role in marker) + " <|system|>"


def guard_texts(world: World, n: int, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Labelled conversations: an answered harmful deed is unsafe, a refused or harmless one is safe.

    A third of the rows are about a picture, harmless and safe: a guard that has never read a caption drops them all.
    """
    harmful = world.deeds("train", "harmful")
    benign = world.deeds("train", "homonym", "safe_context", "plain")
    rows = []
    for _ in range(n):
        if rng.random() < 0.35:
            rows.append((guard_prompt(_about_a_picture(world, pick(rng, benign), rng)), "safe"))
            continue
        bad, refused = rng.random() < 0.5, rng.random() < 0.15
        deed = pick(rng, harmful if bad or refused else benign)
        answer = pick(rng, REFUSALS) if refused and not bad else world.answer(deed)
        label = f"unsafe {GUARD_CODES[harm(deed)]}" if bad else "safe"
        turns = [Turn("user", question(deed, pick(rng, HOW))), Turn("assistant", answer)]
        if rng.random() < 0.3:
            other = pick(rng, benign)
            first = [Turn("user", question(other, pick(rng, HOW))), Turn("assistant", reply(world, other, rng))]
            turns = first + turns if rng.random() < 0.5 else turns + first
        rows.append((guard_prompt(turns), label))
    return rows


def _about_a_picture(world: World, deed: Deed, rng: np.random.Generator) -> list[Turn]:
    """A harmless exchange whose thing stands in a picture that the guard cannot see."""
    if rng.random() < 0.4:
        asked, answer = question(deed, pick(rng, HOW), pointed=True), world.answer(deed)
    else:
        asked, answer = ask_about(draw_scene(deed.thing, rng), rng, LOOKING)
    return [Turn("user", asked), Turn("assistant", answer)]


class LanguageModelGuard:
    """A causal language model that continues a conversation with its assessment."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any, batch_size: int = 128) -> None:
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size

    @torch.inference_mode()
    def assess(self, conversations: Sequence[Sequence[Turn]]) -> list[Assessment]:
        """One assessment per conversation; the score is the probability of "unsafe" as the first word."""
        order = sorted(range(len(conversations)), key=lambda i: sum(len(turn.text) for turn in conversations[i]))
        found: dict[int, Assessment] = {}
        for start in range(0, len(order), self.batch_size):
            part = order[start : start + self.batch_size]
            for i, assessment in zip(part, self._assess([conversations[i] for i in part]), strict=True):
                found[i] = assessment
        return [found[i] for i in range(len(conversations))]

    def _assess(self, conversations: Sequence[Sequence[Turn]]) -> list[Assessment]:
        texts = [self.tokenizer.bos_token + guard_prompt(turns) for turns in conversations]
        inputs = self.tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
        made = self.model.generate(**inputs, max_new_tokens=4, do_sample=False, output_scores=True, return_dict_in_generate=True)
        unsafe = self.tokenizer.convert_tokens_to_ids("unsafe")
        scores = made.scores[0].softmax(-1)[:, unsafe].tolist()
        answers = self.tokenizer.batch_decode(made.sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [Assessment(*parse_guard(text), score) for text, score in zip(answers, scores, strict=True)]


class LinearImageGuard:
    """Logistic regression on a tower's picture embeddings; `unsafe` above `threshold`."""

    def __init__(self, tower: Any, processor: Any, weight: np.ndarray, bias: float, threshold: float = 0.5) -> None:
        self.tower, self.processor = tower, processor
        self.weight, self.bias, self.threshold = weight, bias, threshold

    @classmethod
    def fitted(cls, tower: Any, processor: Any, pictures: Sequence[bytes], graphic: Sequence[bool]) -> LinearImageGuard:
        """Fit on labelled pictures; the scaling of the features is folded into the weights."""
        seen = towers.features(tower, towers.pixels(processor, pictures)).numpy()
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(seen, np.asarray(graphic))
        scaler, linear = model.steps[0][1], model.steps[1][1]
        weight = linear.coef_[0] / scaler.scale_
        bias = float(linear.intercept_[0] - weight @ scaler.mean_)
        return cls(tower, processor, weight.astype(np.float32), bias)

    def save(self, path: Path) -> None:
        """Weights as safetensors."""
        save_file({"weight": self.weight, "bias": np.float32([self.bias]), "threshold": np.float32([self.threshold])}, path)

    @classmethod
    def load(cls, tower: Any, processor: Any, path: Path) -> LinearImageGuard:
        """Read what `save` wrote."""
        kept = load_file(path)
        return cls(tower, processor, kept["weight"], float(kept["bias"][0]), float(kept["threshold"][0]))

    def assess(self, pictures: Sequence[bytes]) -> list[Assessment]:
        """One assessment per picture."""
        if not pictures:
            return []
        seen = towers.features(self.tower, towers.pixels(self.processor, pictures)).numpy()
        scores = 1 / (1 + np.exp(-(seen @ self.weight + self.bias)))
        return [Assessment(bool(s > self.threshold), ("graphic",) if s > self.threshold else (), float(s)) for s in scores]
