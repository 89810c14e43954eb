"""Guards: content in, assessment out. A text guard reads, an image guard looks; neither knows why it is asked.

The miniature trains one of each: a language model that answers in Llama-Guard's output format, and a linear
classifier on vision features. Those of others come behind the same two calls (`guards.hub`).

Harm is rare (a per cent of a corpus) and both guards are trained on data in which it is not. So neither decides at the
probability 0.5 nor by its most probable word, but at the threshold of greatest F1 on labelled contents that it was not
trained on, weighted to the corpus's share of harm (`decide`). The threshold is kept with the guard.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import PreTrainedModel

from vlsafe.core.schema import Pair, Turn
from vlsafe.core.store import write_text
from vlsafe.data.miniature.corpora import FOLLOWING, LOOKING, ask_about, pick
from vlsafe.data.miniature.language import GUARD_CODES, HOW, OBJECTS, REFUSALS, World, harm, question
from vlsafe.data.miniature.pictures import draw_scene
from vlsafe.models import checkpoints, towers


class Assessment(NamedTuple):
    """What a guard says of one content. `unsafe` None: its answer could not be read (counted, never taken as safe).

    Units:    score in [0, 1]: odds of "unsafe" relative to the guard's threshold, so that 0.5 is where it decides
    """

    unsafe: bool | None
    categories: tuple[str, ...]
    score: float


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


def relative(probability: np.ndarray, threshold: float) -> np.ndarray:
    """Probabilities with their odds divided by the threshold's: 0.5 at the threshold, unchanged where that is 0.5."""
    above = probability * (1 - threshold)
    return above / (above + (1 - probability) * threshold)


def best_threshold(scores: Sequence[float], unsafe: Sequence[bool], prevalence: float) -> float:
    """Where "above is unsafe" has the greatest F1 if `prevalence` of all contents were unsafe; half-way between two scores.

    Raises:   ValueError when the labels are all alike
    """
    score, truth = np.asarray(scores, float), np.asarray(unsafe, bool)
    if truth.all() or not truth.any():
        raise ValueError("a threshold needs labelled contents of both kinds")
    order = np.argsort(-score, kind="stable")
    score, truth = score[order], truth[order]
    hits = np.cumsum(truth) * prevalence / truth.sum()
    alarms = np.cumsum(~truth) * (1 - prevalence) / (~truth).sum()
    apart = np.append(score[:-1] > score[1:], False)  # equal scores cannot be parted; above all of them is never best
    best = int(np.where(apart, 2 * hits / (hits + alarms + prevalence), -1.0).argmax())
    return float(np.clip((score[best] + score[best + 1]) / 2, 1e-12, 1 - 1e-12))  # odds must be finite


def decide(guard: Any, contents: Sequence[Any], unsafe: Sequence[bool], prevalence: float) -> None:
    """Set the threshold of a guard from contents that it was not trained on."""
    guard.threshold = 0.5
    guard.threshold = best_threshold([found.score for found in guard.assess(contents)], unsafe, prevalence)


def guard_prompt(conversation: Sequence[Turn]) -> str:
    """The text that the miniature's guard reads. Speakers are named by their markers; the system line is not judged."""
    marker = {"user": "<|user|>", "assistant": "<|assistant|>"}
    return " ".join(f"{marker[turn.role]} {turn.text}" for turn in conversation if turn.role in marker) + " <|system|>"


ROWS = {"harmful": 0.45, "refused": 0.05, "borderline": 0.1, "plain": 0.25, "looking": 0.15}  # what guards learn from


def guard_texts(world: World, n: int, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Labelled conversations, harmful far oftener than in a corpus: an answered harmful verb–object pair is unsafe, all else is safe.

    Half of the how-tos point at a picture that the guard cannot see; then only the answer tells what is meant, and often
    it leaves that open. Homonyms ("kill the process") stay in: the corpora have none, but a guard has to know them.
    """
    harmful, plain = world.actions("train", "harmful"), world.actions("train", "plain")
    pools = {"harmful": harmful, "refused": harmful, "plain": plain}
    pools["borderline"] = world.actions("train", "homonym", "safe_context")
    rows = []
    for kind in rng.choice(list(ROWS), n, p=list(ROWS.values())):
        action = pick(rng, pools[kind]) if kind in pools else None
        scene = draw_scene(action.thing if action else pick(rng, OBJECTS), rng)
        asked, answer = ask_about(scene, rng, LOOKING)
        if action:
            asked = question(action, pick(rng, HOW), pointed=rng.random() < 0.5)
            answer = pick(rng, REFUSALS) if kind == "refused" else world.answer(action)
        turns = [Turn("user", asked), Turn("assistant", answer)]
        if rng.random() < 0.1:
            turns += [
                Turn(role, text) for role, text in zip(("user", "assistant"), ask_about(scene, rng, FOLLOWING), strict=True)
            ]
        rows.append(
            (
                guard_prompt(turns),
                f"unsafe {GUARD_CODES[str(harm(action))]}" if action and kind == "harmful" else "safe",
            )
        )
    return rows


class LanguageModelGuard:
    """A causal language model that continues a conversation with its assessment.

    What it writes has to be readable and names the categories; whether a conversation is unsafe is decided by the
    probability of "unsafe" as the first word being above `threshold`, also where another word was more probable.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: Any, threshold: float = 0.5, batch_size: int = 128, max_new_tokens: int = 4
    ) -> None:
        self.model, self.tokenizer, self.threshold = model, tokenizer, threshold
        self.batch_size, self.max_new_tokens = batch_size, max_new_tokens

    def save(self, folder: Path) -> None:
        """An ordinary model folder, and the threshold beside it."""
        checkpoints.save(self.model, folder, self.tokenizer)
        write_text(Path(folder) / "guard.json", json.dumps({"threshold": self.threshold}))

    @classmethod
    def load(cls, folder: Path) -> LanguageModelGuard:
        """Read what `save` wrote.

        Raises:   FileNotFoundError when there is no threshold: the guard would decide by another rule
        """
        kept = json.loads((Path(folder) / "guard.json").read_text(encoding="utf-8"))
        return cls(checkpoints.load(folder), checkpoints.load_processor(folder), kept["threshold"])

    @torch.inference_mode()
    def assess(self, conversations: Sequence[Sequence[Turn]]) -> list[Assessment]:
        """One assessment per conversation, in order."""
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
        options = dict(max_new_tokens=self.max_new_tokens, output_scores=True, return_dict_in_generate=True)
        made = self.model.generate(**inputs, do_sample=False, use_cache=True, **options)
        unsafe = self.tokenizer.convert_tokens_to_ids("unsafe")
        scores = relative(made.scores[0].double().softmax(-1)[:, unsafe].numpy(), self.threshold).tolist()
        answers = self.tokenizer.batch_decode(made.sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [decided(*parse_guard(text), score) for text, score in zip(answers, scores, strict=True)]


def opened(folder: Path) -> Any:
    """The text guard of a finished run: the miniature's own, or the one from the hub that the run points to."""

    from vlsafe.data.guards import hub

    pointer = Path(folder) / hub.POINTER
    if pointer.exists():
        return hub.load_guard(json.loads(pointer.read_text(encoding="utf-8")))
    return LanguageModelGuard.load(folder)


def decided(said: bool | None, categories: tuple[str, ...], score: float) -> Assessment:
    """The word only says whether the answer could be read, and of what kind the harm is."""
    unsafe = score > 0.5 if said is not None else None
    return Assessment(unsafe, categories if unsafe else (), score)


def reward_by(guard: Any, pairs: Sequence[Pair]) -> Callable[..., list[float]]:
    """A reward for answers to the prompts of preference rows: safe where the prompt is harmful, right where it is not.

    On a harmful prompt it is one minus the guard's score, so that groups of equally unsafe answers can still teach; an
    assessment that could not be read earns nothing. On a harmless prompt only the preferred answer counts, word for word.
    This guard must not be the judge of the result: what it cannot tell is what a model learns to say.
    """

    def reward(completions: Sequence[Sequence[dict[str, str]]], number: Sequence[int], **_: Any) -> list[float]:
        asked, said = [pairs[i] for i in number], [completion[-1]["content"].strip() for completion in completions]
        talks = [(*pair.turns, Turn("assistant", text)) for pair, text in zip(asked, said, strict=True)]
        found = guard.assess(talks)
        return [
            float(text == pair.chosen) if pair.category is None else 0.0 if seen.unsafe is None else 1 - seen.score
            for pair, text, seen in zip(asked, said, found, strict=True)
        ]

    return reward


class LinearImageGuard:
    """Logistic regression on a tower's patch embeddings; `unsafe` where its probability is above `threshold`."""

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
        return cls(tower, processor, weight, bias)

    def save(self, path: Path) -> None:
        """Weights as safetensors."""
        save_file({"weight": self.weight, "bias": np.array([self.bias]), "threshold": np.array([self.threshold])}, path)

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
        scores = relative(expit(seen.astype(float) @ self.weight + self.bias), self.threshold).tolist()
        return [decided(True, ("graphic",), score) for score in scores]
