"""What a reproduction would cost before anybody spends it: real shapes, random weights, synthetic rows.

Without a GPU everything is computed from shapes (`costs`). With one, the same trainers take a few steps on the real shapes,
and what they measure takes the place of what was assumed. Every figure says which of the two it is.
"""

from __future__ import annotations

import dataclasses
import io
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from vlsafe.core.scale import Fit, Scale
from vlsafe.models import checkpoints
from vlsafe.planning import costs
from vlsafe.planning.costs import Shapes
from vlsafe.study import adaptation, tuning

MEASURED = "from measured steps"
SCREENED_ROWS = 1_223_426  # 558,128 captions and 665,298 instructions, of LLaVA's own files
GUARD_WEIGHTS = 8.0e9  # Llama-Guard-3-8B
BEGIN, END = "<!-- costs: `vlsafe dryrun --readme` -->", "<!-- costs end -->"


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
    """Every part of a scale for one backbone and one seed, with the default grid; a measured `utilisation` counts."""
    shapes = _shapes(scale, backbone, checkpoints.random_graft(scale.decoder(backbone), scale.vision, scale.source == "load"))
    parts = [_fit_work(scale, shapes, gpu, utilisation, *given) for given in _fits(scale)]
    screen = _screening(scale, gpu) if scale.source == "load" else []
    return [*screen, *parts, _examining(scale, shapes, gpu)]


def _shapes(scale: Scale, backbone: str, model: Any) -> Shapes:
    spec = scale.decoder(backbone)
    return Shapes(
        **checkpoints.shapes(model), layers=spec.layers, width=spec.width, image_tokens=costs.image_tokens(scale.vision)
    )  # fmt: skip


def _fits(scale: Scale) -> list[tuple[str, Fit, int, str, str, int]]:
    """(name, fit, runs, method, objective, checkpoints of all runs) of everything that is trained."""
    inside = [step for step in scale.checkpoints if step < scale.instruct.steps]
    arms = [step for step in scale.arm_checkpoints if step < scale.instruct.steps]
    others = [recipe for name, recipe in adaptation.RECIPES.items() if name != adaptation.MAIN]
    light = sum(recipe.method == "lora" for recipe in others)
    whole = len(others) - light
    early = sum(step < scale.projector.steps for step in scale.checkpoints) + 2
    rows = [
        ("stage 1", scale.projector, 1, "projector", "sft", early),
        ("stage 2", scale.instruct, 1, "full", "sft", len(inside) + 1),
        ("stage 2, other data and methods", scale.instruct, whole, "full", "sft", whole * (len(arms) + 1)),
        ("stage 2, LoRA", scale.instruct, light, "lora", "sft", light * (len(arms) + 1)),
    ]
    recipes = [recipe for recipe in tuning.RECIPES.values() if recipe.grid == "default"]
    sft = [r for r in recipes if r.objective == "sft" and "general" not in r.corpora]
    mixed = sum("general" in r.corpora for r in recipes)
    pairs = [r for r in recipes if r.objective == "dpo"]
    corpora = sum(len(r.corpora) for r in pairs)
    replay = sum(scale.tuning.replay for r in sft if "replay" in r.corpora)
    safety, preference = scale.tuning.sft, scale.tuning.preference.fit  # steps grow with corpora; means over the recipes
    return [
        *rows,
        ("multitask tuning", scale.instruct, mixed, "full", "sft", mixed),
        ("safety SFT", _longer(safety, (len(sft) + replay) / len(sft)), len(sft), "full", "sft", len(sft)),
        ("DPO", _longer(preference, corpora / len(pairs)), len(pairs), "full", "dpo", len(pairs)),
    ]


def _longer(fit: Fit, times: float) -> Fit:
    return dataclasses.replace(fit, steps=max(1, round(fit.steps * times)))


def _row(scale: Scale, name: str, objective: str) -> tuple[float, float]:
    """Text tokens and pictures of a mean row of a part."""
    traffic = scale.traffic
    if name == "stage 1":
        return traffic.captions, 1.0
    if objective == "dpo":
        return traffic.pairs, 0.5  # SafeRLHF has no pictures, SPA-VL one a pair
    return (traffic.safety, 1.0) if name == "safety SFT" else (traffic.instructions, traffic.pictured)


def _fit_work(
    scale: Scale, shapes: Shapes, gpu: str, utilisation: float | None, name: str, fit: Fit, runs: int, method: str,
    objective: str, left: int,
) -> Work:  # fmt: skip
    text, pictures = _row(scale, name, objective)
    passes = {"projector": 4, "lora": 4, "full": 6}[method]
    moving = {"projector": shapes.projector, "full": shapes.language + shapes.projector}.get(method)
    moving = moving or 2 * scale.lora.rank * shapes.layers * 13 * shapes.width + shapes.projector  # rank × both sides of 7 maps
    of_row = costs.operations(shapes, text, pictures, passes)
    if objective == "dpo":
        of_row = 2 * (of_row + costs.operations(shapes, text, pictures, 2))  # two answers, and the reference reads both
    rows = fit.steps * fit.batch_size
    at_once = (fit.at_once or fit.batch_size // fit.micro_batches) * (2 if objective == "dpo" else 1)
    sharded = "fsdp" in fit.launch
    need = {
        n: costs.memory(shapes, moving, at_once * (text + pictures * shapes.image_tokens), n, sharded)
        + (costs.STILL * shapes.all / (n if sharded else 1) if objective == "dpo" else 0)
        for n in (1, 8)
    }
    saved = 2 if fit.saved == "bfloat16" else 4
    kept, at_most = costs.disk(shapes, moving, left, saved, 2)
    seconds = costs.training_seconds(of_row * rows, gpu, 1, utilisation or costs.UTILISATION)
    tokens = rows * (text + pictures * shapes.image_tokens) * (2 if objective == "dpo" else 1)
    how = MEASURED if utilisation else "computed"
    return Work(name, runs, runs * tokens, runs * seconds / 3600, need, kept, at_most / runs, how)


def _screening(scale: Scale, gpu: str) -> list[Work]:
    """Both large corpora through the text guard; the picture classifier is a hundredth of it."""
    limits = [getattr(scale.loaded, name) for name in ("captions", "instructions")]
    rows = sum(one.limit or one.rows or 0 for one in limits if one) or SCREENED_ROWS
    tokens = rows * scale.traffic.screened
    seconds = costs.training_seconds(2 * GUARD_WEIGHTS * tokens, gpu, 1, costs.PREFILL)
    need = costs.CAST * GUARD_WEIGHTS * 1.3
    return [Work("screening", 1, tokens, seconds / 3600, {1: need, 8: need}, 0.0, 0.0, "computed")]


def _examining(scale: Scale, shapes: Shapes, gpu: str) -> Work:
    """Every end point sits the full examination, every earlier checkpoint the panel."""
    exam, traffic = scale.exam, scale.traffic
    recipes = [r for r in tuning.RECIPES.values() if r.grid == "default"]
    ends = 2 + len(adaptation.RECIPES) + len(recipes)
    early = len(scale.checkpoints) * 2 + len(scale.arm_checkpoints) * (len(adaptation.RECIPES) - 1)
    share = min(1.0, exam.full * 11 / (traffic.questions + traffic.requests))  # eleven benchmarks
    panel = min(1.0, exam.panel * 11 / (traffic.questions + traffic.requests))
    sittings = ends * share + early * panel
    answers, questions = sittings * traffic.requests, sittings * traffic.questions
    read = costs.operations(shapes, 100, 0.8, 2) * (answers + questions)
    seconds = costs.training_seconds(read, gpu, 1, costs.PREFILL)
    seconds += costs.writing_seconds(shapes, round(answers), min(traffic.answer, exam.max_new_tokens), exam.batch_size, gpu)
    tokens = answers * min(traffic.answer, exam.max_new_tokens)
    need = costs.CAST * shapes.all * 1.5
    return Work("examinations", ends, tokens, seconds / 3600, {1: need, 8: need}, 2e9, 2e9, "computed")


def measure(scale: Scale, backbone: str, steps: int = 6) -> dict[str, Any]:
    """Some steps of stage 2 on the real shapes with random weights, by the trainer that a reproduction uses.

    Units:    tokens_per_second without padding; mfu a fraction of the GPU's dense bf16 peak (None where that is not known)
    """
    from vlsafe.core.schema import Example, Turn
    from vlsafe.models import trainable
    from vlsafe.training import datasets, trainers

    where, spec = "cuda" if torch.cuda.is_available() else "cpu", scale.decoder(backbone)
    model = checkpoints.random_graft(spec, scale.vision, scale.source == "load", where)
    processor, at_once = _synthetic_processor(scale, model), scale.instruct.at_once or scale.instruct.batch_size
    fit = dataclasses.replace(scale.instruct, steps=steps, batch_size=at_once, micro_batches=1, launch="", grouped=False)
    shapes = _shapes(scale, backbone, model)
    text = max(1, min(scale.traffic.instructions, spec.context - shapes.image_tokens - 32))
    said = (Turn("user", "word"), Turn("assistant", " ".join(["word"] * text)))
    rows = [Example(f"row-{i}", "synthetic", said, (_grey(scale.vision.image_size),)) for i in range(at_once)]
    trainable.choose(model, "full", scale.lora)
    ticks: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        how = (fit, Path(folder), 0, (), lambda step: ticks.append(time.perf_counter()))
        seen = trainers.tokens_seen(trainers.sft_history(model, processor, datasets.chat_dataset(rows, True), *how))
    seconds, tokens = (ticks[-1] - ticks[1]) / (steps - 2), (seen[-1] - seen[1]) / (steps - 2)  # the first two warm up
    done = costs.operations(shapes, tokens / at_once - shapes.image_tokens, 1.0, 6) * at_once / seconds
    peak = _peak(torch.cuda.get_device_name()) if where == "cuda" else None
    used = torch.cuda.max_memory_allocated() if where == "cuda" else None
    told = {"device": where, "tokens_per_second": tokens / seconds, "seconds_per_step": seconds, "peak_bytes": used}
    return {**told, "tokens_per_row": tokens / at_once, "mfu": done / peak if peak else None}


def _peak(name: str) -> float | None:
    """The dense bf16 peak of a GPU by its name, or None where it is not one of those that are known."""
    return next((peak for known, (peak, *_) in costs.GPUS.items() if known.split("-")[0] in name), None)


def _synthetic_processor(scale: Scale, model: Any) -> Any:
    from vlsafe.models import chat

    tokenizer = chat.build_tokenizer(["word"], scale.language.context)
    tokenizer.chat_template = chat.template("tulu")
    model.config.image_token_id = tokenizer.image_token_id
    return chat.build_processor(tokenizer, scale.vision.image_size, scale.vision.patch_size, scale.vision.feature_strategy)


def _grey(side: int) -> bytes:
    written = io.BytesIO()
    Image.new("RGB", (side, side), (60, 60, 60)).save(written, "PNG")
    return written.getvalue()


def lines(works: Sequence[Work], gpu: str) -> list[dict[str, Any]]:
    """The plan as rows for the eye, and their sum."""
    told = [
        {
            "part": work.name, "runs": work.runs, "tokens, 10^6": f"{work.tokens / 1e6:,.0f}",
            f"hours, 1 {gpu}": f"{work.hours:,.1f}", f"hours, 8 {gpu}": f"{work.hours / 8:,.1f}",
            "GB a GPU, 1": f"{work.memory[1] / 1e9:,.0f}", "GB a GPU, 8": f"{work.memory[8] / 1e9:,.0f}",
            "GB kept": f"{work.kept / 1e9:,.0f}", "GB while running": f"{work.at_most / 1e9:,.0f}", "how": work.how,
        }
        for work in works
    ]  # fmt: skip
    total = sum(work.hours for work in works)
    most = {n: max(work.memory[n] for work in works) for n in (1, 8)}
    whole: dict[str, Any] = dict.fromkeys(told[0], "")
    whole |= {
        "part": "all",
        "runs": sum(work.runs for work in works),
        f"hours, 1 {gpu}": f"{total:,.1f}",
        f"hours, 8 {gpu}": f"{total / 8:,.1f}",
    }
    whole |= {"GB a GPU, 1": f"{most[1] / 1e9:,.0f}", "GB a GPU, 8": f"{most[8] / 1e9:,.0f}"}
    whole |= {
        "GB kept": f"{sum(work.kept for work in works) / 1e9:,.0f}",
        "GB while running": f"{max(w.at_most for w in works) / 1e9:,.0f}",
    }
    return [*told, whole]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as a Markdown table."""
    names = list(rows[0])
    body = [names, ["---"] * len(names), *[[str(row[name]) for name in names] for row in rows]]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in body)


def summary(chosen: Sequence[tuple[int, str, Scale, str]]) -> str:
    """What can be reproduced on how many GPUs, as Markdown: all parts of a scale that fit into the memory of so many.

    `chosen`: (GPUs, their name, scale, backbone).
    """
    rows = []
    for many, gpu, scale, backbone in chosen:
        works = plan(scale, backbone, gpu)
        fit = [work for work in works if work.memory[1 if many == 1 else 8] <= costs.GPUS[gpu][1]]
        without = ", ".join(work.name for work in works if work not in fit)
        rows.append(
            {
                "GPUs": f"{many} × {gpu}", "scale": f"`{scale.name}`", "what": f"all but {without}" if without else "everything",
                "hours": f"{sum(work.hours for work in fit) / many:,.0f}",
                "GB on disk": f"{(sum(w.kept for w in fit) + max(w.at_most for w in fit)) / 1e9:,.0f}", "": "computed",
            }
        )  # fmt: skip
    return table(rows)


README_ROWS = ((1, "RTX-4090", "small", "smollm2"), (1, "A100-80G", "paper", "llama2-chat"), (1, "H200", "paper", "llama2-chat"),
               (8, "A100-80G", "paper", "llama2-chat"), (8, "H100", "paper", "llama2-chat"))  # fmt: skip


def in_readme(text: str, made: str) -> str:
    """A text with the table between its markers replaced.

    Raises:   ValueError where the markers are not there
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"the text needs {BEGIN} and {END} once each")
    return text[: text.index(BEGIN) + len(BEGIN)] + f"\n{made}\n" + text[text.index(END) :]
