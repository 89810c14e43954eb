"""The miniature's own guards: a language model that answers in Llama-Guard's format, a linear classifier of vision features."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import PreTrainedModel

from vlsafe.core.schema import Turn
from vlsafe.core.store import write_text
from vlsafe.data.guards.assessment import Assessment, assess_in_batches, decided, parse_guard, relative
from vlsafe.data.miniature.corpora import FOLLOWING, LOOKING, ask_about, exchange, pick
from vlsafe.data.miniature.language import GUARD_CODES, HOW, OBJECTS, REFUSALS, World, harm, question
from vlsafe.data.miniature.pictures import draw_scene
from vlsafe.models import checkpoints, towers

ROWS = {"harmful": 0.45, "refused": 0.05, "borderline": 0.1, "plain": 0.25, "looking": 0.15}  # shares of the training rows
MARKERS = {"user": "<|user|>", "assistant": "<|assistant|>"}


def guard_prompt(conversation: Sequence[Turn]) -> str:
    """The text that the miniature's guard reads: speakers by their markers, system lines left out."""
    return " ".join(f"{MARKERS[turn.role]} {turn.text}" for turn in conversation if turn.role in MARKERS) + " <|system|>"


def guard_texts(world: World, n: int, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Labelled conversations, harmful far oftener than in a corpus: an answer about a harmful verb–object pair is unsafe.

    Half of the how-tos point at a picture that the guard cannot see, so that only the answer shows what is meant, and often
    not even that. Homonyms ("kill the process") are included: the corpora have none, but a guard has to know them.
    """
    harmful, plain = world.actions("train", "harmful"), world.actions("train", "plain")
    pools = {"harmful": harmful, "refused": harmful, "plain": plain}
    pools["borderline"] = world.actions("train", "homonym", "safe_context")
    rows = []
    for kind in rng.choice(list(ROWS), n, p=list(ROWS.values())):
        action = pick(rng, pools[kind]) if kind in pools else None
        scene = draw_scene(action.thing if action else pick(rng, OBJECTS), rng)
        text, answer = ask_about(scene, rng, LOOKING)
        if action:
            text = question(action, pick(rng, HOW), pointed=rng.random() < 0.5)
            answer = pick(rng, REFUSALS) if kind == "refused" else world.answer(action)
        turns = exchange(text, answer)
        if rng.random() < 0.1:
            turns += exchange(*ask_about(scene, rng, FOLLOWING))
        label = f"unsafe {GUARD_CODES[str(harm(action))]}" if action and kind == "harmful" else "safe"
        rows.append((guard_prompt(turns), label))
    return rows


class LanguageModelGuard:
    """A causal language model that continues a conversation with its assessment.

    Its text has to be parsable and names the categories. A conversation is unsafe where the probability of "unsafe" as the first
    word is above `threshold`, even if another word is more probable.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: Any, threshold: float = 0.5, batch_size: int = 128, max_new_tokens: int = 4
    ) -> None:
        self.model, self.tokenizer, self.threshold = model, tokenizer, threshold
        self.batch_size, self.max_new_tokens = batch_size, max_new_tokens

    def save(self, folder: Path) -> None:
        """Save an ordinary model folder, and the threshold beside it."""
        checkpoints.save(self.model, folder, self.tokenizer)
        write_text(Path(folder) / "guard.json", json.dumps({"threshold": self.threshold}))

    @classmethod
    def load(cls, folder: Path) -> LanguageModelGuard:
        """Read what `save` wrote; FileNotFoundError without a threshold: the guard would decide by another rule."""
        threshold = json.loads((Path(folder) / "guard.json").read_text(encoding="utf-8"))["threshold"]
        return cls(checkpoints.load(folder), checkpoints.load_processor(folder), threshold)

    def assess(self, conversations: Sequence[Sequence[Turn]]) -> list[Assessment]:
        """One assessment per conversation, in order."""
        return assess_in_batches(self._assess, conversations, self.batch_size)

    @torch.inference_mode()
    def _assess(self, conversations: Sequence[Sequence[Turn]]) -> list[Assessment]:
        texts = [self.tokenizer.bos_token + guard_prompt(turns) for turns in conversations]
        inputs = self.tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
        options = dict(max_new_tokens=self.max_new_tokens, output_scores=True, return_dict_in_generate=True)
        output = self.model.generate(**inputs, do_sample=False, use_cache=True, **options)
        unsafe = self.tokenizer.convert_tokens_to_ids("unsafe")
        scores = relative(output.scores[0].double().softmax(-1)[:, unsafe].numpy(), self.threshold).tolist()
        answers = self.tokenizer.batch_decode(output.sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [decided(*parse_guard(text), score) for text, score in zip(answers, scores, strict=True)]


class LinearImageGuard:
    """Logistic regression on a tower's patch embeddings; `unsafe` where its probability is above `threshold`."""

    def __init__(self, tower: Any, processor: Any, weight: np.ndarray, bias: float, threshold: float = 0.5) -> None:
        self.tower, self.processor = tower, processor
        self.weight, self.bias, self.threshold = weight, bias, threshold

    @classmethod
    def fitted(cls, tower: Any, processor: Any, pictures: Sequence[bytes], graphic: Sequence[bool]) -> LinearImageGuard:
        """Fit on labelled pictures; the scaling of the features is folded into the weights."""
        features = towers.features(tower, towers.pixels(processor, pictures)).numpy()
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(features, np.asarray(graphic))
        scaler, linear = model.steps[0][1], model.steps[1][1]
        weight = linear.coef_[0] / scaler.scale_
        return cls(tower, processor, weight, float(linear.intercept_[0] - weight @ scaler.mean_))

    def save(self, path: Path) -> None:
        """Save the weights and the threshold as safetensors."""
        save_file({"weight": self.weight, "bias": np.array([self.bias]), "threshold": np.array([self.threshold])}, path)

    @classmethod
    def load(cls, tower: Any, processor: Any, path: Path) -> LinearImageGuard:
        """Read what `save` wrote."""
        tensors = load_file(path)
        return cls(tower, processor, tensors["weight"], float(tensors["bias"][0]), float(tensors["threshold"][0]))

    def assess(self, pictures: Sequence[bytes]) -> list[Assessment]:
        """One assessment per picture, in order."""
        if not pictures:
            return []
        features = towers.features(self.tower, towers.pixels(self.processor, pictures)).numpy()
        scores = relative(expit(features.astype(float) @ self.weight + self.bias), self.threshold).tolist()
        return [decided(True, ("graphic",), score) for score in scores]
