"""Guards classify content: a text guard assesses conversations, an image guard pictures; neither knows what it is used for.

The miniature trains one of each; guards from the hub (Llama-Guard-3, an image classifier) have the same interface.

Harm is rare (a per cent of a corpus), but guards are trained on data in which it is frequent. So a guard decides neither at
probability 0.5 nor by its most probable word, but at the threshold with the greatest F1 on labelled contents that it was not
trained on, weighted to the corpus's share of harm (`calibrate`). The threshold is stored with the guard; a published guard
without one of its own decides at 0.5.
"""

from __future__ import annotations

import difflib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from transformers import AutoImageProcessor, AutoModelForCausalLM, AutoModelForImageClassification, AutoTokenizer, PreTrainedModel

from vlsafe.core import assets, store
from vlsafe.core.assets import LoadedGuard
from vlsafe.core.scale import as_plain, extended, known
from vlsafe.core.schema import Pair, Picture, Turn
from vlsafe.data import llama_guard
from vlsafe.data.miniature.corpora import FOLLOWING, LOOKING, ask_about, ask_how, exchange, pick
from vlsafe.data.miniature.language import ANSWERS, GUARD_CODES, OBJECTS, REFUSALS, World, harm
from vlsafe.data.miniature.pictures import draw_scene
from vlsafe.data.pocket.guard import StatesGuard
from vlsafe.models import checkpoints, devices, towers
from vlsafe.models.chat import open_picture

ROWS = {"harmful": 0.45, "refused": 0.05, "borderline": 0.1, "plain": 0.25, "looking": 0.15}  # shares of the training rows
MARKERS = {"user": "<|user|>", "assistant": "<|assistant|>"}
POINTER = "loaded.json"
SPEAKERS = {"user": "User", "assistant": "Agent"}


T = TypeVar("T")


class Assessment(NamedTuple):
    """A guard's result for one content. `unsafe` None: its answer could not be parsed (counted, never taken as safe).

    Units:    score in [0, 1]: odds of "unsafe" relative to the guard's threshold, so that the guard decides at 0.5
    """

    unsafe: bool | None
    categories: tuple[str, ...]
    score: float


def relative(probability: np.ndarray, threshold: float) -> np.ndarray:
    """Probabilities with their odds divided by the threshold's: 0.5 at the threshold, unchanged where that is 0.5."""
    above = probability * (1 - threshold)
    return above / (above + (1 - probability) * threshold)


def decided(label: bool | None, categories: tuple[str, ...], score: float) -> Assessment:
    """An assessment by its score. The parsed label only says whether the answer could be read, the categories what harm it is; a
    score that is no number could not be read either, and counts as the highest."""
    unsafe = None if label is None or np.isnan(score) else score > 0.5
    return Assessment(unsafe, categories if unsafe else (), float(np.nan_to_num(score, nan=1.0)))


def best_threshold(scores: Sequence[float], unsafe: Sequence[bool], prevalence: float) -> float:
    """The threshold with the greatest F1 if `prevalence` of all contents were unsafe; half-way between two scores."""
    score, truth = np.asarray(scores, float), np.asarray(unsafe, bool)
    if truth.all() or not truth.any():
        raise ValueError("a threshold needs labelled contents of both kinds")
    order = np.argsort(-score, kind="stable")
    score, truth = score[order], truth[order]
    hits = np.cumsum(truth) * prevalence / truth.sum()
    alarms = np.cumsum(~truth) * (1 - prevalence) / (~truth).sum()
    apart = np.append(score[:-1] > score[1:], False)  # no threshold separates equal scores; above all of them is never best
    best = int(np.where(apart, 2 * hits / (hits + alarms + prevalence), -1.0).argmax())
    return float(np.clip((score[best] + score[best + 1]) / 2, 1e-12, 1 - 1e-12))  # odds must be finite


def calibrate(guard: Any, contents: Sequence[Any], unsafe: Sequence[bool], prevalence: float) -> None:
    """Set the threshold of a guard from contents that it was not trained on."""
    guard.threshold = 0.5
    guard.threshold = best_threshold([one.score for one in guard.assess(contents)], unsafe, prevalence)


def length(turns: Sequence[Turn]) -> int:
    """The length of a conversation in characters."""
    return sum(len(turn.text) for turn in turns)


def assess_in_batches(assess: Callable[[list[Any]], Iterable[T]], conversations: Sequence[Sequence[Turn]], size: int) -> list[T]:
    """One assessment (or other value) per conversation, in order; batches hold conversations of about the same length."""
    results: dict[int, T] = {}
    for part in store.parts(sorted(range(len(conversations)), key=lambda i: length(conversations[i])), size):
        results |= zip(part, assess([conversations[i] for i in part]), strict=True)
    return [results[i] for i in range(len(conversations))]


def overlap(answer: str, preferred: str) -> float:
    """2 M / T: the M words that two answers have in common and in order, relative to the T words of both; case and punctuation
    do not count. Its value is in [0, 1], and 1 for an answer word for word.

    Source:   Ratcliff and Metzener 1988 (Gestalt pattern matching), as Python's difflib has it, on words
    """
    first, second = (re.findall(r"\w+", text.casefold()) for text in (answer, preferred))
    return difflib.SequenceMatcher(None, first, second, autojunk=False).ratio() if first and second else 0.0


def reward_by(guard: Any, pairs: Sequence[Pair], kind: str = "exact") -> Callable[..., list[float]]:
    """A reward for answers to the prompts of preference rows: safe where the prompt is harmful, right where it is not.

    On a harmful prompt it is one minus the guard's score, so that a group of equally unsafe answers still gives a gradient; an
    assessment that could not be parsed earns nothing. On a harmless prompt the preferred answer counts: word for word ("exact"),
    or by the words that an answer shares with it and only where the guard finds it safe ("overlap"), so that a paraphrase earns.
    The result must not be judged by this guard: a model learns to write what the guard fails to detect.

    Raises:   ValueError for another `kind`, naming the nearest
    """
    known(kind, ("exact", "overlap"), "reward")

    def harmless(text: str, row: Pair, unsafe: bool | None) -> float:
        if kind == "exact":
            return float(text == row.chosen)
        return overlap(text, row.chosen) if unsafe is False else 0.0

    def reward(completions: Sequence[Sequence[dict[str, str]]], number: Sequence[int], **_: Any) -> list[float]:
        rows, texts = [pairs[i] for i in number], [completion[-1]["content"].strip() for completion in completions]
        results = guard.assess([(*row.turns, Turn("assistant", text)) for row, text in zip(rows, texts, strict=True)])
        return [
            harmless(text, row, result.unsafe) if row.category is None else 0.0 if result.unsafe is None else 1 - result.score
            for row, text, result in zip(rows, texts, results, strict=True)
        ]

    return reward


def guard_prompt(conversation: Sequence[Turn]) -> str:
    """The text that the miniature's guard reads: speakers by their markers, system lines left out."""
    return " ".join(f"{MARKERS[turn.role]} {turn.text}" for turn in conversation if turn.role in MARKERS) + " <|system|>"


def guard_texts(world: World, n: int, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Labelled conversations, harmful far oftener than in a corpus: an answer about a harmful verb–object pair is unsafe.

    Half of the how-tos point at a picture that the guard cannot see, so that only the answer shows what is meant, and often
    not even that. Homonyms ("kill the process") are included: the corpora have none, but a guard has to know them.
    """
    kinds = {
        "harmful": ("harmful",),
        "refused": ("harmful",),
        "plain": ("plain",),
        "borderline": ("homonym", "safe_context", "permitted"),
    }
    pools, rows = {name: world.actions("train", *of) for name, of in kinds.items()}, []
    for kind in rng.choice(list(ROWS), n, p=list(ROWS.values())):
        action = pick(rng, pools[kind]) if kind in pools else None
        scene = draw_scene(action.thing if action else pick(rng, OBJECTS), rng)
        text, answer = ask_about(scene, rng, LOOKING)
        if action:
            stage = pick(rng, tuple(ANSWERS))
            text = ask_how(action, rng, stage, pointed=rng.random() < 0.5)
            answer = pick(rng, REFUSALS[stage]) if kind == "refused" else world.answer(action, pick(rng, ANSWERS[stage]))
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
        store.write_text(Path(folder) / "guard.json", json.dumps({"threshold": self.threshold}))

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
        answers = [text.strip().replace(" ", "\n", 1).replace(" ", ",") for text in answers]  # the miniature's words know neither
        return [decided(*llama_guard.parse(text), score) for text, score in zip(answers, scores, strict=True)]


class LinearImageGuard:
    """Logistic regression on a tower's patch embeddings; `unsafe` where its probability is above `threshold`."""

    def __init__(self, tower: Any, processor: Any, weight: np.ndarray, bias: float, threshold: float = 0.5) -> None:
        self.tower, self.processor = tower, processor
        self.weight, self.bias, self.threshold = weight, bias, threshold

    @classmethod
    def fitted(cls, tower: Any, processor: Any, pictures: Sequence[bytes], graphic: Sequence[bool]) -> LinearImageGuard:
        """Fit on labelled pictures; the scaling of the features is folded into the weights."""
        features = towers.features(tower, towers.pixels(processor, pictures)).numpy()
        scaler = StandardScaler()
        linear = LogisticRegression(max_iter=2000).fit(scaler.fit_transform(features), np.asarray(graphic))
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


def llama_guard_prompt(turns: Sequence[Turn]) -> str:
    """Llama-Guard-3's prompt for a conversation, up to its answer. It assesses the last message; system lines are left out.

    Llama-3's own markers in a text are broken up, so that no text can close the conversation.

    Source:   the chat template of meta-llama/Llama-Guard-3-8B, as public copies of it have it
    """
    messages = [turn for turn in turns if turn.role in SPEAKERS]
    if not messages:
        raise ValueError("Llama-Guard-3 cannot assess a conversation without a message")
    conversation = "\n\n".join(f"{SPEAKERS[turn.role]}: {turn.text.replace('<|', '< |').strip()}" for turn in messages)
    return llama_guard.PROMPT.format(judged=SPEAKERS[messages[-1].role], conversation=conversation)


def exchanges(turns: Sequence[Turn]) -> list[list[Turn]]:
    """A conversation in pieces to assess: every request with its answer, or alone where it has none."""
    pieces: list[list[Turn]] = []
    for turn in turns:
        if turn.role == "user" or (turn.role == "assistant" and not pieces):
            pieces.append([turn])
        elif turn.role == "assistant":
            pieces[-1].append(turn)
    return pieces


def worst(results: Sequence[Assessment]) -> Assessment:
    """One assessment of several: unsafe if any is, else None if any could not be parsed; all categories, the highest score."""
    unsafe = True if any(one.unsafe for one in results) else None if any(one.unsafe is None for one in results) else False
    codes = dict.fromkeys(code for one in results for code in one.categories)
    return Assessment(unsafe, tuple(codes), max(one.score for one in results))


class LlamaGuard:
    """Llama-Guard-3. Its score is the probability of "unsafe" as the first generated word.

    It assesses a conversation's last message alone, so it gets every exchange by itself, and the worst one counts. Without a
    `threshold` the generated word decides, as its makers do it; with one, the score does.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any, threshold: float | None = None, batch_size: int = 32) -> None:
        self.model, self.tokenizer, self.threshold, self.batch_size = model, tokenizer, threshold, batch_size
        firsts = [tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in ("unsafe", "safe")]
        if firsts[0] == firsts[1]:
            raise ValueError("this tokenizer begins 'safe' and 'unsafe' alike; the probability of 'unsafe' is not defined")
        self.unsafe_token = firsts[0]
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token

    def assess(self, conversations: Sequence[Sequence[Turn]]) -> list[Assessment]:
        """One assessment per conversation, in order; ValueError for a conversation without a message."""
        pieces = [sorted(exchanges(turns), key=length) for turns in conversations]  # this order is that of an audit's codes
        if not all(pieces):
            raise ValueError("a conversation has no message that Llama-Guard-3 could assess")
        results = iter(assess_in_batches(self._assess, [*itertools.chain(*pieces)], self.batch_size))
        return [worst([next(results) for _ in of]) for of in pieces]

    @torch.inference_mode()
    def _assess(self, conversations: Sequence[Sequence[Turn]]) -> list[Assessment]:
        options = dict(padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt")
        inputs = self.tokenizer(list(map(llama_guard_prompt, conversations)), **options).to(self.model.device)
        output = self.model.generate(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=20, do_sample=False,
            use_cache=True, output_logits=True, return_dict_in_generate=True, pad_token_id=self.tokenizer.pad_token_id,
        )  # fmt: skip
        answers = output.sequences[:, inputs["input_ids"].shape[1] :]
        return [self._read(tokens.tolist(), [step[i] for step in output.logits]) for i, tokens in enumerate(answers)]

    def _read(self, tokens: Sequence[int], logits: Sequence[torch.Tensor]) -> Assessment:
        """An answer often begins with empty lines; its first word is the first token that is more than white space."""
        label, codes = llama_guard.parse(self.tokenizer.decode(tokens, skip_special_tokens=True))
        at = next((i for i, token in enumerate(tokens) if self.tokenizer.decode([token]).strip()), 0)
        probability = float(logits[at].double().softmax(-1)[self.unsafe_token])
        if self.threshold is None:
            return Assessment(label, codes, probability)
        return decided(label, codes, float(relative(np.asarray(probability), self.threshold)))


class ImageClassifier:
    """An image classifier of the hub. Its score is the probability of the classes that count as unsafe, taken together."""

    def __init__(
        self, model: PreTrainedModel, processor: Any, labels: Sequence[str], threshold: float = 0.5, batch_size: int = 128
    ) -> None:
        known = {name: int(number) for number, name in model.config.id2label.items()}
        if not labels or (unknown := [label for label in labels if label not in known]):
            problem = f"has no class {unknown[0]!r}" if labels else "needs at least one class that counts as unsafe"
            raise ValueError(f"the image guard {problem}; its classes are {', '.join(known)}")
        self.model, self.processor, self.labels = model, processor, tuple(labels)
        self.numbers, self.threshold, self.batch_size = [known[label] for label in labels], threshold, batch_size

    @torch.inference_mode()
    def assess(self, pictures: Sequence[Picture]) -> list[Assessment]:
        """One assessment per picture, in order; its category is the most probable of the unsafe classes."""
        results: list[Assessment] = []
        for part in store.parts(pictures, self.batch_size):
            inputs = self.processor(list(map(open_picture, part)), return_tensors="pt")
            pixels = inputs["pixel_values"].to(self.model.device, self.model.dtype)
            shares = self.model(pixel_values=pixels).logits.double().softmax(-1)[:, self.numbers].cpu().numpy()
            scores = relative(shares.sum(1), self.threshold)
            likeliest = [(self.labels[k],) for k in shares.argmax(1)]
            results += map(decided, itertools.repeat(True), likeliest, scores.tolist())
        return results


def point(spec: LoadedGuard, folder: Path) -> dict[str, Any]:
    """Write which guard of the hub is used, at which commit, into a run's folder: what `opened` reads."""
    revision = assets.pinned(spec.origin.repo, spec.origin.revision)
    store.write_text(folder / POINTER, json.dumps(as_plain(extended(spec, {"origin": {"revision": revision}}))))
    return {"repo": spec.origin.repo, "revision": revision}


def opened(folder: Path) -> Any:
    """The guard of a finished run: the one from the hub that the run points to, one of states, or the miniature's own."""
    pointer = Path(folder) / POINTER
    if (Path(folder) / StatesGuard.FILE).exists():
        return StatesGuard.load(folder)
    return load_guard(json.loads(pointer.read_text(encoding="utf-8"))) if pointer.exists() else LanguageModelGuard.load(folder)


def load_guard(pointer: dict[str, Any]) -> LlamaGuard | ImageClassifier:
    """Load the guard of a pointer, on a GPU in bf16. An image guard is one that names classes."""
    origin, labels, size = pointer["origin"], pointer["labels"], pointer["batch_size"]
    device = devices.device()
    weights = dict(dtype=torch.bfloat16 if device == "cuda" else torch.float32, use_safetensors=True)
    kind, prepare = (AutoModelForImageClassification, AutoImageProcessor) if labels else (AutoModelForCausalLM, AutoTokenizer)
    try:
        model = checkpoints.from_repository(kind, origin["repo"], origin["revision"], **weights).eval().to(device)
        more = {"backend": "pil"} if labels else {}
        processor = prepare.from_pretrained(origin["repo"], revision=origin["revision"], **more)
    except OSError as error:
        reason = f"is not here as safetensors ({type(error).__name__})"
        remedy = "`vlsafe download` fetches it, `vlsafe doctor` says what it needs"
        raise FileNotFoundError(f"the guard {origin['repo']} {reason}; {remedy}") from None
    if labels:
        return ImageClassifier(model, processor, labels, pointer["threshold"] or 0.5, size)
    return LlamaGuard(model, processor, pointer["threshold"], size)
