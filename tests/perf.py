"""`make perf`: what our hot paths cost beside the barest thing that does the same work, each with its bound.

Ratios of process CPU time, both sides in one process and in turn, on the miniature's own model size and rows; weights
are random, from a seed. Not collected by pytest: times are no property of the code alone.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch
from transformers import get_scheduler

from vlsafe.core.presets import MINI
from vlsafe.core.scale import Fit
from vlsafe.core.schema import Item
from vlsafe.data import arms
from vlsafe.data.miniature import corpora
from vlsafe.data.miniature.language import World, vocabulary
from vlsafe.evaluation import examine
from vlsafe.evaluation.engines import respond
from vlsafe.models import chat, checkpoints, trainable
from vlsafe.training import datasets as training_datasets
from vlsafe.training import trainers

SEED, REPEATS = 0, 3
FIT = Fit(steps=13, batch_size=32, learning_rate=1e-3, schedule="constant")
GAP = 1e-5  # logits; two tokens nearer than this are a tie that rounding may break either way


class Line(NamedTuple):
    """One row of the printed table: ratios of all repeats against a bound."""

    what: str
    ratios: Sequence[float]
    bound: float
    at_most: bool

    @property
    def held(self) -> bool:
        middle = statistics.median(self.ratios)
        return middle <= self.bound if self.at_most else middle >= self.bound

    def __str__(self) -> str:
        sign = "<=" if self.at_most else ">="
        low, middle, high = min(self.ratios), statistics.median(self.ratios), max(self.ratios)
        verdict = "ok" if self.held else "MISSED"
        return f"{self.what:<54} {middle:7.2f}  ({low:6.2f} to {high:6.2f})   {sign} {self.bound:5.2f}   {verdict}"


def built(with_images: bool) -> tuple[Any, Any]:
    """A model of MINI's size with random weights, and its tokenizer or processor."""
    tokenizer = chat.build_tokenizer(vocabulary(), MINI.language.context)
    tokenizer.chat_template = chat.template(MINI.backbone("mini-chat").template)
    language = checkpoints.build_llm(MINI.language, tokenizer, SEED)
    if not with_images:
        return language, tokenizer
    spec = MINI.vision
    processor = chat.build_processor(tokenizer, spec.image_size, spec.patch_size, spec.feature_strategy)
    model = checkpoints.graft(language, checkpoints.build_clip(spec, tokenizer, SEED), processor, spec, SEED)
    trainable.choose(model, "full", MINI.lora)
    return model, processor


def rows_for(with_images: bool) -> list[Any]:
    """The miniature's own rows: alignment chats, or visual instructions with their share of text-only rows."""
    world, n = World(SEED), FIT.steps * FIT.batch_size
    rng = world.rng("perf")
    if not with_images:
        return corpora.alignment_chats(world, n, 0.35, 0.15, (), rng)
    pool = corpora.paint(world, n, 0, rng)
    return corpora.instruction_rows(world, pool, n, MINI.corpora.text_only_share, 0, rng)


def ours(with_images: bool, rows: Any, record: list[dict[str, Any]] | None = None) -> tuple[float, list[float]]:
    """Seconds of CPU per step through `train.sft` without the first step, and losses; `record` keeps what the model saw."""
    model, processor = built(with_images)
    ticks: list[float] = []
    if record is not None:
        kept = ("input_ids", "attention_mask", "labels", "pixel_values")
        model.register_forward_pre_hook(
            lambda _, __, seen: record.append({k: v for k, v in seen.items() if k in kept}), with_kwargs=True
        )
    with tempfile.TemporaryDirectory() as folder:
        losses = trainers.sft(model, processor, rows, FIT, Path(folder), SEED, (), lambda _: ticks.append(time.process_time()))
    return (ticks[-1] - ticks[0]) / (len(ticks) - 1), losses


def bare(with_images: bool, seen: Sequence[dict[str, Any]]) -> tuple[float, list[float]]:
    """The same steps as a plain loop over the same micro-batches, collated before the clock starts."""
    model, _ = built(with_images)
    model.train()
    moving = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(moving, FIT.learning_rate, weight_decay=FIT.weight_decay, fused=True)
    schedule = get_scheduler(FIT.schedule, optimizer, int(FIT.warmup_ratio * FIT.steps), FIT.steps)
    ticks, losses = [], []
    for step in range(FIT.steps):
        total, batches = 0.0, seen[step * FIT.micro_batches : (step + 1) * FIT.micro_batches]
        answered = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)
        for batch in batches:
            loss = model(**batch, num_items_in_batch=answered).loss
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(moving, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(total)
        ticks.append(time.process_time())
    return (ticks[-1] - ticks[0]) / (len(ticks) - 1), losses


def training(with_images: bool, bound: float) -> Line:
    """Raises:   ValueError when both sides did not do the same work, by their losses."""
    rows = training_datasets.chat_dataset(rows_for(with_images), with_images)
    seen: list[dict[str, Any]] = []
    losses = ours(with_images, rows, seen)[1]
    again = bare(with_images, seen)[1]
    if max(abs(a - b) for a, b in zip(losses, again, strict=True)) > 1e-3:
        raise ValueError(f"the two loops differ, losses {losses} and {again}")
    ratios = [ours(with_images, rows)[0] / bare(with_images, seen)[0] for _ in range(REPEATS)]
    return Line(f"SFT step, {'picture' if with_images else 'text'} rows, beside a bare loop", ratios, bound, True)


def preferences(with_images: bool, bound: float) -> Line:
    """A DPO step on B pairs beside an SFT step on the same 2B sequences, both as the study trains; the first step is left out.

    With pictures the reference goes through every step; on text alone its part is computed before the first one.
    """
    fit, world = dataclasses.replace(FIT, batch_size=FIT.batch_size // 2, micro_batches=1), World(SEED)
    pairs = corpora.preference_pairs(world, fit.steps * fit.batch_size, with_images, world.rng("perf"))
    spoken = [arms.answered(pair, answer) for pair in pairs for answer in (pair.chosen, pair.rejected)]
    spec, ratios = dataclasses.replace(MINI.tuning.preference, fit=fit), []

    def seconds(train_by: Callable[..., Any]) -> float:
        model, processor = built(True)
        ticks: list[float] = []
        with tempfile.TemporaryDirectory() as folder:
            how = (Path(folder), SEED, (), lambda _: ticks.append(time.process_time()))
            train_by(model, processor, how)
        return (ticks[-1] - ticks[0]) / (len(ticks) - 1)

    for _ in range(REPEATS):
        dpo = seconds(
            lambda m, p, how: trainers.dpo(
                m, built(True)[0], p, training_datasets.pair_dataset(pairs, with_images), spec, fit, *how
            )
        )
        sft = seconds(lambda m, p, how: trainers.sft(m, p, training_datasets.chat_dataset(spoken, with_images), FIT, *how))
        ratios.append(dpo / sft)
    return Line(f"DPO step, {'picture' if with_images else 'text'} pairs, beside SFT on both answers", ratios, bound, True)


def generation(with_images: bool, bound: float) -> tuple[Line, str, bool]:
    """Batched answers beside one prompt at a time; where they differ, by how little."""
    model, processor = built(True)
    model.eval()
    asked = [item for item in examine.all_items(World(SEED), "test", 60) if bool(item.images) == with_images]
    asked = asked[:: len(asked) // MINI.exam.batch_size][: MINI.exam.batch_size]
    took: dict[int, list[float]] = {MINI.exam.batch_size: [], 1: []}
    texts: dict[int, list[str]] = {}
    for _ in range(REPEATS):
        for size, seconds in took.items():
            start = time.process_time()
            texts[size] = [r.text for r in respond(model, processor, asked, "m", size, MINI.exam.max_new_tokens)]
            seconds.append(time.process_time() - start)
    many, one = took.values()
    modality = "picture" if with_images else "text"
    line = Line(f"one {modality} prompt at a time, beside batches of {MINI.exam.batch_size}",
                [slow / fast for slow, fast in zip(one, many, strict=True)], bound, False)  # fmt: skip
    differing = [i for i, (a, b) in enumerate(zip(*texts.values(), strict=True)) if a != b]
    gaps = [gap(model, processor, asked, i) for i in differing]
    told = f"  {len(asked) - len(gaps)} of {len(asked)} {modality} answers identical"
    told += f"; first differing tokens at most {max(gaps):.1e} apart" if gaps else ""
    return line, told, max(gaps, default=0.0) <= GAP


@torch.inference_mode()
def gap(model: Any, processor: Any, items: Sequence[Item], which: int) -> float:
    """How far apart, for one prompt alone, the logits are of the first token at which it and its batch part.

    Units:    logits; 0 where they do not part
    """

    def generated(some: Sequence[Item]) -> Any:
        inputs = chat.prompt_batch(processor, [item.turns for item in some], [item.images for item in some])
        options = dict(max_new_tokens=MINI.exam.max_new_tokens, do_sample=False, return_dict_in_generate=True)
        return model.generate(**inputs, **options, output_logits=True)

    alone, together = generated([items[which]]), generated(items)
    tokens = (made.sequences[row, -len(made.logits) :] for made, row in ((alone, 0), (together, which)))
    for step, (a, b) in enumerate(zip(*tokens, strict=False)):
        if a != b:
            return float((alone.logits[step][0, a] - alone.logits[step][0, b]).abs())
    return 0.0


def main() -> int:
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    lines, notes, same = [training(False, 1.15), training(True, 1.3), preferences(False, 1.2), preferences(True, 1.4)], [], True
    for with_images, bound in ((False, 12.0), (True, 7.0)):
        line, told, tied = generation(with_images, bound)
        lines, notes, same = [*lines, line], [*notes, told], same and tied
    print(f"{'ratio of CPU time':<54}  median  (min to max)         bound", *lines, *notes, sep="\n")
    return 0 if same and all(line.held for line in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
