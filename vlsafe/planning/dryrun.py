"""Operations and memory of training and generation from real shapes, and the shares of a GPU's peak that are measured on it with
random weights. `planning.costs` counts the stages of a scale by them.

Units: bytes, seconds, operations (a multiplication and an addition are two).
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml

from vlsafe import data, evaluation, training
from vlsafe.core.scale import Scale
from vlsafe.core.schema import Example, Item, Turn
from vlsafe.models import chat, checkpoints, devices, trainable

MEASURED = "from measured steps"
BEGIN, END = "<!-- costs: `vlsafe dryrun --readme README.md` -->", "<!-- costs end -->"
_DATA = yaml.safe_load((Path(__file__).parent / "gpus.yaml").read_text(encoding="utf-8"))
GPUS: dict[str, dict[str, float]] = _DATA["gpus"]
README_ROWS: list[list[Any]] = _DATA["readme"]
PREFILL = 0.4  # of the peak, where prompts are only read; assumed
TRIED = 0.5  # seconds at least, that tries of one batch take together: a small model's are lost in the noise of a busy machine
BANDWIDTH = 0.5  # of the memory's, where answers are decoded: 8.0 and 13.2 ms a step at 16 and 64 prompts on one H200
TRAINABLE, FROZEN = 16, 4  # bytes a weight: float32 master, gradient and AdamW's two moments; float32 alone
CAST = 2  # bytes a weight of the bfloat16 copy that computation needs
KEPT = {"full": 33, "projector": 23, "lora": 53, "lora without dropout": 39, "dpo": 33}  # bytes a token, block and unit of width
WORKING = 18  # such bytes outside the blocks. Both are of LLaVA-1.5-7B on one H200, with Liger's kernels


class Shapes(NamedTuple):
    """The number of weights in each part of a model, and what else the operations depend on."""

    blocks: int
    head: int
    embedding: int
    projector: int
    tower: int
    layers: int
    width: int
    image_tokens: int

    @property
    def language(self) -> int:
        return self.blocks + self.head + self.embedding

    @property
    def all(self) -> int:
        return self.language + self.projector + self.tower


def operations(shapes: Shapes, text: float, pictures: float, passes: int) -> float:
    """Operations of one row: `passes` is 6 where all weights are trained (forward 2, backward 4), 4 where the backward pass only
    goes through them, 2 without a backward pass. The tower runs forward only; recomputation and padding do not count.

    Units:    text in tokens, pictures per row  ->  operations
    Source:   6·N·tokens plus attention's 12·layers·width·tokens² / 2 for causal masks (Chowdhery et al. 2022, appendix B)
    """
    tokens = text + pictures * shapes.image_tokens
    dense = passes * tokens * (shapes.blocks + shapes.head + pictures * shapes.image_tokens / max(tokens, 1) * shapes.projector)
    attention = passes * shapes.layers * shapes.width * tokens**2
    return dense + attention + 2 * pictures * (shapes.image_tokens + 1) * shapes.tower


def gpu_memory(shapes: Shapes, trainable: int, processes: int, sharded: bool, low: bool) -> float:
    """Bytes on each GPU of weights, gradients and optimiser. With `low` frozen weights are there in bfloat16 alone."""
    kept = TRAINABLE * trainable + (0 if low and not sharded else FROZEN) * (shapes.all - trainable)
    gathered = CAST * (2 * shapes.blocks / shapes.layers + shapes.embedding + shapes.head) if sharded else CAST * shapes.all
    return kept / (processes if sharded else 1) + gathered


def activations(shapes: Shapes, tokens: float, method: str, recompute: bool) -> float:
    """Bytes that wait for the backward pass of so many tokens: every block's, or every block's input and one block's."""
    blocks = 2 * shapes.layers + KEPT[method] if recompute else KEPT[method] * shapes.layers
    return tokens * shapes.width * (blocks + WORKING)


def _shapes(scale: Scale, backbone: str, model: Any) -> Shapes:
    spec, vision = scale.decoder(backbone), scale.vision
    tokens = (vision.image_size // vision.patch_size) ** 2 + (vision.feature_strategy == "full")  # a picture in a prompt
    return Shapes(**checkpoints.shapes(model), layers=spec.layers, width=spec.width, image_tokens=tokens)


def measure(scale: Scale, backbone: str, steps: int = 6) -> dict[str, Any]:
    """Some steps of stage 2 and some batches of answers on the real shapes with random weights, by the trainer and the engine
    that a reproduction uses.

    Units:    tokens_per_second without padding; mfu and prefill_mfu fractions of the GPU's dense bf16 peak, bandwidth a fraction
              of its memory's (None where these are not known); step_seconds of one token of every row of a batch
    """
    with devices.chosen_by(scale):
        return _measured(scale, backbone, steps) | _generated(scale, backbone)


def _measured(scale: Scale, backbone: str, steps: int) -> dict[str, Any]:
    at_once = scale.instruct.at_once or scale.instruct.batch_size
    fit = dataclasses.replace(scale.instruct, steps=steps, batch_size=at_once, micro_batches=1, launch="", grouped=False)
    model, processor, rows = stand_ins(scale, backbone, at_once * steps)  # one epoch: at its end workers start again
    where, shapes = devices.device(), _shapes(scale, backbone, model)
    trainable.choose(model, "full", scale.lora)
    ticks: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        rest = (fit, Path(folder), 0, (), lambda step: ticks.append(time.perf_counter()))
        counts = training.trainers.tokens_seen(
            training.trainers.sft_history(model, processor, training.datasets.chat_dataset(rows, True), *rest)
        )
    seconds, tokens = (ticks[-1] - ticks[1]) / (steps - 2), (counts[-1] - counts[1]) / (steps - 2)  # the first two warm up
    done = operations(shapes, tokens / at_once - shapes.image_tokens, 1.0, 6) * at_once / seconds
    spec = this_gpu()
    return {
        "device": where, "tokens_per_second": tokens / seconds, "seconds_per_step": seconds,
        "peak_bytes": torch.cuda.max_memory_allocated() if where == "cuda" else None,
        "tokens_per_row": tokens / at_once, "mfu": done / spec["operations"] if spec else None,
    }  # fmt: skip


def _generated(scale: Scale, backbone: str) -> dict[str, Any]:
    """Two batches of answers, the fastest of several tries: what reading a prompt takes, and what each further token."""
    size, new = scale.exam.batch_size, min(64, scale.exam.max_new_tokens)
    model, processor, rows = stand_ins(scale, backbone, 2 * size)
    shapes, spec = _shapes(scale, backbone, model), this_gpu()
    model = model.eval().to(getattr(torch, scale.exam.dtype))
    model.generation_config.eos_token_id = [-1]  # random weights shall not end early
    items = [Item(row.id, "synthetic", row.turns[:1], row.images) for row in rows]
    took: dict[int, list[float]] = {1: [], new: []}
    while len(took[new]) < 3 or sum(sum(times[1:]) for times in took.values()) < TRIED:  # the first of each warms up
        for tokens in took:
            start = time.perf_counter()
            evaluation.engines.generate(model, processor, items, size, tokens, lambda done: None)
            took[tokens].append((time.perf_counter() - start) / 2)
    seconds = {tokens: min(times[1:]) for tokens, times in took.items()}
    step, cache = (seconds[new] - seconds[1]) / (new - 1), cache_bytes(shapes, shapes.image_tokens + new / 2)
    prompt = operations(shapes, 2.0, 1.0, 2) * size
    return {
        "step_seconds": step, "generated_per_second": size / step,
        "prefill_mfu": prompt / seconds[1] / spec["operations"] if spec else None,
        "bandwidth": (CAST * shapes.language + size * cache) / step / spec["bandwidth"] if spec else None,
    }  # fmt: skip


def cache_bytes(shapes: Shapes, tokens: float) -> float:
    """The keys and values of one row in bfloat16; heads that share them are not counted as shared."""
    return 2 * CAST * shapes.layers * shapes.width * tokens


def stand_ins(scale: Scale, backbone: str, many: int) -> tuple[Any, Any, list[Any]]:
    """A model of a scale's shapes with random weights, a processor, and `many` rows of a picture and text of usual length."""
    spec, vision = scale.decoder(backbone), scale.vision
    model = checkpoints.random_graft(spec, vision, scale.source == "load", devices.device())
    tokenizer = chat.build_tokenizer(["word"], scale.language.context)
    tokenizer.chat_template = chat.template("tulu")
    model.config.image_token_id = tokenizer.image_token_id
    processor = chat.build_processor(tokenizer, vision.image_size, vision.patch_size, vision.feature_strategy)
    pictured = (vision.image_size // vision.patch_size) ** 2
    text = max(1, min(scale.traffic.instructions, spec.context - pictured - 32))
    turns = (Turn("user", "word"), Turn("assistant", " ".join(["word"] * text)))
    picture = data.miniature.pictures.to_png(np.full((vision.image_size, vision.image_size, 3), 60, np.uint8))
    return model, processor, [Example(f"row-{i}", "synthetic", turns, (picture,)) for i in range(many)]


def this_gpu() -> dict[str, float] | None:
    """What is known of this GPU: operations a second in dense bfloat16, bandwidth; None where it is not."""
    here = torch.cuda.get_device_name() if devices.device() == "cuda" else ""
    words = set(here.upper().replace("-", " ").replace("GB", "G").split())
    return next((spec for name, spec in GPUS.items() if set(name.upper().split("-")) <= words), None)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as a Markdown table."""
    body = [list(rows[0]), ["---"] * len(rows[0]), *[map(str, row.values()) for row in rows]]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in body)


def in_readme(text: str, content: str) -> str:
    """A text with the part between its markers replaced; ValueError where the markers are not there."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"the text needs {BEGIN} and {END} once each")
    return text[: text.index(BEGIN) + len(BEGIN)] + f"\n{content}\n" + text[text.index(END) :]
