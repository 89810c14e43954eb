"""What a reproduction would cost before it is run: operations, memory, time and disk, from real shapes.

Everything is computed from shapes alone, or, with a GPU, scaled by the utilisation that a few steps of the same trainers reach
on random weights and synthetic rows. Every figure says which of the two it is.

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

from vlsafe.core.scale import Fit, Scale
from vlsafe.models import checkpoints, devices
from vlsafe.study import adaptation, tuning

MEASURED = "from measured steps"
SCREENED_ROWS = 1_223_426  # 558,128 captions and 665,298 instructions, of LLaVA's own files
GUARD_WEIGHTS = 8.0e9  # Llama-Guard-3-8B
RECIPES = [recipe for recipe in tuning.RECIPES.values() if recipe.grid == "default"]
BEGIN, END = "<!-- costs: `vlsafe dryrun --readme` -->", "<!-- costs end -->"
_DATA = yaml.safe_load((Path(__file__).parent / "gpus.yaml").read_text(encoding="utf-8"))
GPUS: dict[str, dict[str, float]] = _DATA["gpus"]
README_ROWS: list[list[Any]] = _DATA["readme"]
UTILISATION = 0.25  # of the peak, in training: LLaVA-1.5's published 10 hours of stage 2 on eight A100 come to about that
PREFILL = 0.4  # of the peak, where prompts are only read; assumed
BANDWIDTH = 0.4  # of the memory's, where answers are decoded token by token; assumed
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


class Work(NamedTuple):
    """A part of a reproduction: operations and time of one GPU, memory of each of `processes`, what stays on disk."""

    name: str
    runs: int
    tokens: float
    hours: float
    memory: dict[int, float]
    kept: float
    at_most: float
    how: str


def plan(scale: Scale, backbone: str, gpu: str, utilisation: float | None = None) -> list[Work]:
    """Every part of a scale for one backbone and one seed, default grid; a measured `utilisation` replaces the assumed."""
    shapes = _shapes(scale, backbone, checkpoints.random_graft(scale.decoder(backbone), scale.vision, scale.source == "load"))
    screening = [_screening(scale, gpu)] if scale.source == "load" else []
    training = [_training(scale, shapes, gpu, utilisation, *part) for part in _parts(scale)]
    return [*screening, *training, _examinations(scale, shapes, gpu)]


def _shapes(scale: Scale, backbone: str, model: Any) -> Shapes:
    spec, vision = scale.decoder(backbone), scale.vision
    tokens = (vision.image_size // vision.patch_size) ** 2 + (vision.feature_strategy == "full")  # a picture in a prompt
    return Shapes(**checkpoints.shapes(model), layers=spec.layers, width=spec.width, image_tokens=tokens)


def _parts(scale: Scale) -> list[tuple[str, Fit, int, str, int, float, float]]:
    """What is trained with one fit: name, fit, runs, method, checkpoints of all runs, text tokens and pictures of a mean row."""
    inside = sum(step < scale.instruct.steps for step in scale.checkpoints) + 1
    arms = sum(step < scale.instruct.steps for step in scale.arm_checkpoints) + 1
    early = sum(step < scale.projector.steps for step in scale.checkpoints) + 2
    others = [recipe for name, recipe in adaptation.RECIPES.items() if name != adaptation.MAIN]
    light = sum(recipe.method == "lora" for recipe in others)
    whole = len(others) - light
    sft = [r for r in RECIPES if r.objective == "sft" and "general" not in r.corpora]
    mixed = sum("general" in r.corpora for r in RECIPES)
    pairs = [r for r in RECIPES if r.objective == "dpo"]
    corpora = sum(len(r.corpora) for r in pairs)
    replay = sum(scale.tuning.replay for r in sft if "replay" in r.corpora)
    stage_2, traffic, row = scale.instruct, scale.traffic, (scale.traffic.instructions, scale.traffic.pictured)
    longer = ((scale.tuning.sft, (len(sft) + replay) / len(sft)), (scale.tuning.preference.fit, corpora / len(pairs)))
    # steps grow with corpora; means over the recipes
    safety, preference = (dataclasses.replace(fit, steps=max(1, round(fit.steps * times))) for fit, times in longer)
    return [
        ("stage 1", scale.projector, 1, "projector", early, traffic.captions, 1.0),
        ("stage 2", stage_2, 1, "full", inside, *row),
        ("stage 2, other data and methods", stage_2, whole, "full", whole * arms, *row),
        ("stage 2, LoRA", stage_2, light, "lora", light * arms, *row),
        ("multitask tuning", stage_2, mixed, "full", mixed, *row),
        ("safety SFT", safety, len(sft), "full", len(sft), traffic.safety, 1.0),
        ("DPO", preference, len(pairs), "dpo", len(pairs), traffic.pairs, 0.5),  # SPA-VL has pictures, SafeRLHF none
    ]


def _training(scale: Scale, shapes: Shapes, gpu: str, utilisation: float | None, name: str, fit: Fit, runs: int, method: str,
              saved: int, text: float, pictures: float) -> Work:  # fmt: skip
    dpo, answers = method == "dpo", 2 if method == "dpo" else 1
    adapters = 2 * scale.lora.rank * shapes.layers * 13 * shapes.width  # rank × both sides of 7 maps
    trained = {"projector": 0, "lora": adapters}.get(method, shapes.language) + shapes.projector
    of_row = operations(shapes, text, pictures, 4 if method in ("projector", "lora") else 6)
    if dpo:
        of_row = 2 * (of_row + operations(shapes, text, pictures, 2))  # two answers, and the reference reads both
    rows, row_tokens = fit.steps * fit.batch_size, text + pictures * shapes.image_tokens
    at_once = (fit.at_once or fit.batch_size // fit.micro_batches) * answers
    sharded = "fsdp" in fit.launch
    low, waiting = fit.dtype == "bfloat16", activations(shapes, at_once * row_tokens, method, recompute=True)
    memory = {n: gpu_memory(shapes, trained, n, sharded, low) + waiting for n in (1, 8)}
    if dpo:  # the reference
        memory = {n: size + (FROZEN / n if sharded else CAST if low else FROZEN) * shapes.all for n, size in memory.items()}
    kept = saved * (2 if fit.saved == "bfloat16" else 4) * shapes.all
    at_most = saved * FROZEN * shapes.all + 2 * (FROZEN * shapes.all + 8 * trained)  # two of them can be resumed
    hours = runs * _seconds(of_row * rows, gpu, utilisation or UTILISATION) / 3600
    tokens = runs * (rows * row_tokens * answers)
    return Work(name, runs, tokens, hours, memory, kept, at_most / runs, MEASURED if utilisation else "computed")


def _seconds(operations: float, gpu: str, utilisation: float) -> float:
    return operations / (GPUS[gpu]["operations"] * utilisation)


def _screening(scale: Scale, gpu: str) -> Work:
    """Both large corpora through the text guard; the picture classifier is a hundredth of it."""
    corpora = [getattr(scale.loaded, name) for name in ("captions", "instructions")]
    rows = sum(corpus.limit or corpus.rows or 0 for corpus in corpora if corpus) or SCREENED_ROWS
    tokens = rows * scale.traffic.screened
    memory = CAST * GUARD_WEIGHTS * 1.3
    hours = _seconds(2 * GUARD_WEIGHTS * tokens, gpu, PREFILL) / 3600
    return Work("screening", 1, tokens, hours, {1: memory, 8: memory}, 0.0, 0.0, "computed")


def _examinations(scale: Scale, shapes: Shapes, gpu: str) -> Work:
    """Every end point takes the full examination, every earlier checkpoint the panel."""
    exam, traffic = scale.exam, scale.traffic
    ends = 2 + len(adaptation.RECIPES) + len(RECIPES)
    early = len(scale.checkpoints) * 2 + len(scale.arm_checkpoints) * (len(adaptation.RECIPES) - 1)
    full, panel = (min(1.0, n * 11 / (traffic.questions + traffic.requests)) for n in (exam.full, exam.panel))  # 11 benchmarks
    times = ends * full + early * panel
    answers, questions, length = times * traffic.requests, times * traffic.questions, min(traffic.answer, exam.max_new_tokens)
    prefill = operations(shapes, 100, 0.8, 2) * (answers + questions)
    weights = CAST * shapes.language  # every token of a batch reads all of them once
    decoding = round(answers) / exam.batch_size * length * weights / (GPUS[gpu]["bandwidth"] * BANDWIDTH)
    hours = (_seconds(prefill, gpu, PREFILL) + decoding) / 3600
    memory = CAST * shapes.all * 1.5
    return Work("examinations", ends, answers * length, hours, {1: memory, 8: memory}, 2e9, 2e9, "computed")


def measure(scale: Scale, backbone: str, steps: int = 6) -> dict[str, Any]:
    """Some steps of stage 2 on the real shapes with random weights, by the trainer that a reproduction uses.

    Units:    tokens_per_second without padding; mfu a fraction of the GPU's dense bf16 peak (None where that is not known)
    """
    with devices.chosen_by(scale):
        return _measured(scale, backbone, steps)


def _measured(scale: Scale, backbone: str, steps: int) -> dict[str, Any]:
    from vlsafe.models import trainable
    from vlsafe.training import datasets, trainers

    at_once = scale.instruct.at_once or scale.instruct.batch_size
    fit = dataclasses.replace(scale.instruct, steps=steps, batch_size=at_once, micro_batches=1, launch="", grouped=False)
    model, processor, rows = stand_ins(scale, backbone, at_once * steps)  # one epoch: at its end workers start again
    where, shapes = devices.device(), _shapes(scale, backbone, model)
    trainable.choose(model, "full", scale.lora)
    ticks: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        rest = (fit, Path(folder), 0, (), lambda step: ticks.append(time.perf_counter()))
        counts = trainers.tokens_seen(trainers.sft_history(model, processor, datasets.chat_dataset(rows, True), *rest))
    seconds, tokens = (ticks[-1] - ticks[1]) / (steps - 2), (counts[-1] - counts[1]) / (steps - 2)  # the first two warm up
    done = operations(shapes, tokens / at_once - shapes.image_tokens, 1.0, 6) * at_once / seconds
    peak = peak_operations()
    return {
        "device": where, "tokens_per_second": tokens / seconds, "seconds_per_step": seconds,
        "peak_bytes": torch.cuda.max_memory_allocated() if where == "cuda" else None,
        "tokens_per_row": tokens / at_once, "mfu": done / peak if peak else None,
    }  # fmt: skip


def stand_ins(scale: Scale, backbone: str, many: int) -> tuple[Any, Any, list[Any]]:
    """A model of a scale's shapes with random weights, a processor, and `many` rows of a picture and text of usual length."""
    from vlsafe.core.schema import Example, Turn
    from vlsafe.data.miniature.pictures import to_png
    from vlsafe.models import chat

    spec, vision = scale.decoder(backbone), scale.vision
    model = checkpoints.random_graft(spec, vision, scale.source == "load", devices.device())
    tokenizer = chat.build_tokenizer(["word"], scale.language.context)
    tokenizer.chat_template = chat.template("tulu")
    model.config.image_token_id = tokenizer.image_token_id
    processor = chat.build_processor(tokenizer, vision.image_size, vision.patch_size, vision.feature_strategy)
    pictured = (vision.image_size // vision.patch_size) ** 2
    text = max(1, min(scale.traffic.instructions, spec.context - pictured - 32))
    turns = (Turn("user", "word"), Turn("assistant", " ".join(["word"] * text)))
    picture = to_png(np.full((vision.image_size, vision.image_size, 3), 60, np.uint8))
    return model, processor, [Example(f"row-{i}", "synthetic", turns, (picture,)) for i in range(many)]


def peak_operations() -> float | None:
    """Operations a second of this GPU in dense bfloat16; None where it is not known."""
    gpu = torch.cuda.get_device_name() if devices.device() == "cuda" else ""
    return next((spec["operations"] for name, spec in GPUS.items() if name.split("-")[0] in gpu), None)


def lines(works: Sequence[Work], gpu: str) -> list[dict[str, Any]]:
    """The plan as formatted rows, and their total."""
    runs, hours, kept = (sum(getattr(work, name) for work in works) for name in ("runs", "hours", "kept"))
    memory = {n: max(work.memory[n] for work in works) for n in (1, 8)}
    total = Work("all", runs, 0.0, hours, memory, kept, max(work.at_most for work in works), "")
    return [{
        "part": work.name, "runs": work.runs, "tokens, 10^6": "" if work is total else f"{work.tokens / 1e6:,.0f}",
        f"hours, 1 {gpu}": f"{work.hours:,.1f}", f"hours, 8 {gpu}": f"{work.hours / 8:,.1f}",
        "GB a GPU, 1": f"{work.memory[1] / 1e9:,.0f}", "GB a GPU, 8": f"{work.memory[8] / 1e9:,.0f}",
        "GB kept": f"{work.kept / 1e9:,.0f}", "GB while running": f"{work.at_most / 1e9:,.0f}", "how": work.how,
    } for work in (*works, total)]  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as a Markdown table."""
    body = [list(rows[0]), ["---"] * len(rows[0]), *[map(str, row.values()) for row in rows]]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in body)


def summary(chosen: Sequence[tuple[int, str, Scale, str]]) -> str:
    """What fits on how many GPUs, as Markdown; `chosen` holds (GPUs, their name, scale, backbone)."""
    rows = []
    for many, gpu, scale, backbone in chosen:
        works = plan(scale, backbone, gpu)
        fit = [work for work in works if work.memory[1 if many == 1 else 8] <= GPUS[gpu]["memory"]]
        without = ", ".join(work.name for work in works if work not in fit)
        disk = sum(work.kept for work in fit) + max(work.at_most for work in fit)
        rows.append({
            "GPUs": f"{many} × {gpu}", "scale": f"`{scale.name}`", "what": f"all but {without}" if without else "everything",
            "hours": f"{sum(work.hours for work in fit) / many:,.0f}", "GB on disk": f"{disk / 1e9:,.0f}", "": "computed",
        })  # fmt: skip
    return table(rows)


def in_readme(text: str, content: str) -> str:
    """A text with the part between its markers replaced; ValueError where the markers are not there."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"the text needs {BEGIN} and {END} once each")
    return text[: text.index(BEGIN) + len(BEGIN)] + f"\n{content}\n" + text[text.index(END) :]
