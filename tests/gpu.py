"""`tests/gpu.sh`: what a 7B model costs on one GPU, with random weights and synthetic rows, as a table in at most six minutes.

Every line is a training by the trainers, or answers by the engine, that a reproduction uses. What does not fit this card, or no
longer fits the time, is skipped by name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets as hub_datasets
import numpy as np
import torch

from vlsafe.core.presets import PAPER
from vlsafe.core.scale import Fit
from vlsafe.core.schema import Pair, Turn
from vlsafe.data.miniature.pictures import to_png
from vlsafe.evaluation.decoding import Decoder
from vlsafe.models import chat, checkpoints, trainable
from vlsafe.planning import dryrun
from vlsafe.training import datasets, precision, trainers

SECONDS = 240  # after which nothing is begun
STEPS, ROWS, PAIRS, NEW = 4, 32, 8, 128
BACKBONE = "llama2-chat"
COPY = 4.3e12  # bytes a second that an H200 copies, as measured
BEGUN = time.perf_counter()


def say(*cells: Any) -> None:
    print("| " + " | ".join(str(cell) for cell in cells) + " |", flush=True)


@contextlib.contextmanager
def line(what: str) -> Iterator[None]:
    """One measurement. It ends in a line of the table also where it does not fit or breaks."""
    began = time.perf_counter()
    try:
        yield
    except TimeoutError as error:
        say(what, f"skipped: {error}")
    except torch.OutOfMemoryError as error:
        say(what, f"skipped: does not fit this card ({str(error).splitlines()[0][:90]})")
    except Exception as error:
        traceback.print_exc()
        say(what, f"FAILED: {type(error).__name__}: {str(error)[:150]}")
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    print(f"  ({what}: {time.perf_counter() - began:.0f} s of {time.perf_counter() - BEGUN:.0f})", flush=True)


def on_time() -> None:
    if time.perf_counter() - BEGUN > SECONDS:
        raise TimeoutError(f"{SECONDS} s are over")


def fit_of(fit: Fit, rows: int) -> Fit:
    return dataclasses.replace(fit, steps=STEPS, batch_size=rows, micro_batches=1, launch="", grouped=False, at_once=None)


def trained(what: str, model: Any, fit: Fit, passes: int, kept: float, run: Callable[..., Any], rows: int) -> None:
    """Seconds a step, MFU and peak memory of a training; the first two steps warm up."""
    shapes, ticks = dryrun._shapes(PAPER, BACKBONE, getattr(model, "get_base_model", lambda: model)()), []
    with tempfile.TemporaryDirectory() as folder:
        rest = (fit, Path(folder), 0, (), lambda step: ticks.append(time.perf_counter()))
        history = run(*rest)
        found = (Path(folder) / "at-once.json").read_text()
    counts = trainers.tokens_seen(history)
    seconds, tokens = (ticks[-1] - ticks[1]) / (STEPS - 2), (counts[-1] - counts[1]) / (STEPS - 2) / rows
    done = dryrun.operations(shapes, tokens - shapes.image_tokens, 1.0, passes)
    if what.startswith("DPO"):  # tokens are those of both answers; the reference reads them as well
        one = tokens / 2 - shapes.image_tokens
        done = 2 * (dryrun.operations(shapes, one, 1.0, passes) + dryrun.operations(shapes, one, 1.0, 2))
    mfu = done * rows / seconds / (dryrun.peak_operations() or float("nan"))
    peak = torch.cuda.max_memory_allocated() / 1e9
    say(what, f"{seconds / rows * 1e3:.0f} ms a row", f"{tokens:.0f} tokens a row", f"MFU {mfu:.1%}", f"peak {peak:.0f} GB",
        f"weights and optimiser {kept / 1e9:.0f} GB", f"trial {found}", f"loss {history[-1]['loss']:.3f}")  # fmt: skip


def weights_and_optimiser(model: Any) -> float:
    """Bytes: bfloat16 weights; master, two moments and float32 gradient of those that are trained."""
    return sum(weight.numel() * (18 if weight.requires_grad else 2) for weight in model.parameters())


def tuned(what: str, method: str, fit: Fit, passes: int, then: Callable[[Any, Any], None] | None = None) -> None:
    with line(what):
        on_time()
        model, processor, rows = dryrun.stand_ins(PAPER, BACKBONE, ROWS)
        model = trainable.choose(model, method, PAPER.lora)
        data = datasets.chat_dataset(rows, True)
        trained(what, model, fit_of(fit, ROWS), passes, weights_and_optimiser(model),
                lambda *rest: trainers.sft_history(model, processor, data, *rest), ROWS)  # fmt: skip
        if then:
            gc.collect()
            torch.cuda.empty_cache()
            then(model, processor)


def preferred(method: str, passes: int) -> None:
    what = f"DPO, {method}"
    with line(what):
        on_time()
        model, processor, rows = dryrun.stand_ins(PAPER, BACKBONE, PAIRS)
        words = ["word " * 100, "word " * 90]
        pairs = [Pair(row.id, "synthetic", row.turns[:1], *words, row.images) for row in rows]
        model = trainable.choose(model, method, PAPER.lora)
        with torch.no_grad():
            reference = checkpoints.random_graft(PAPER.decoder(BACKBONE), PAPER.vision, True, "cuda")
        reference.config.image_token_id = processor.tokenizer.image_token_id
        precision.halve(reference.requires_grad_(False))
        torch.cuda.empty_cache()
        kept = weights_and_optimiser(model) + weights_and_optimiser(reference)
        data, spec = datasets.pair_dataset(pairs, True), PAPER.tuning.preference
        trained(what, model, fit_of(spec.fit, PAIRS), passes, kept,
                lambda *rest: trainers.dpo(model, reference, processor, data, spec, *rest), PAIRS)  # fmt: skip


class Eager(Decoder):
    """The same, with attention as plain products of matrices in the captured steps."""

    def _step(self) -> None:
        self.model.set_attn_implementation("eager")
        super()._step()
        self.model.set_attn_implementation("sdpa")


def answered(model: Any, processor: Any) -> None:
    """Answers to a picture and 60 words, none of which ends before its last token: with random weights no token means an end."""
    model.eval().requires_grad_(False)
    model.activation_checkpointing_disable()
    shapes, size = dryrun._shapes(PAPER, BACKBONE, model), PAPER.vision.image_size
    weights, turns = 2 * (shapes.blocks + shapes.head), (Turn("user", " ".join(["word"] * 60)),)
    picture, texts = to_png(np.full((size, size, 3), 60, np.uint8)), {}
    for rows, kind in ((16, Decoder), (64, Decoder), (16, Eager), (64, Eager)):
        what = f"{NEW} tokens, {rows} prompts" + (", plain attention" if kind is Eager else "")
        with line(what), torch.inference_mode():
            on_time()
            inputs = dict(chat.prompt_batch(processor, [turns] * rows, [(picture,)] * rows).to("cuda"))
            decoder, took = kind(model, torch.tensor([-1]), 0), {}
            decoder(dict(inputs), NEW)
            for new in (1, NEW):
                torch.cuda.synchronize()
                start = time.perf_counter()
                tokens = decoder(dict(inputs), new)
                torch.cuda.synchronize()
                took[new] = time.perf_counter() - start
            texts[what], shape = tokens.clone(), decoder.shape
            del decoder, tokens
            step = (took[NEW] - took[1]) / (NEW - 1)
            cache = 2 * 2 * shapes.width * shapes.layers * shape[1] * rows
            say(what, f"{rows * NEW / took[NEW]:,.0f} tokens/s", f"{rows / step:,.0f} without the prompt ({took[1]:.2f} s)",
                f"{step * 1e3:.2f} ms a step", f"{step / (weights + cache) * COPY:.1f} × reading weights and cache",
                f"{step / weights * COPY:.1f} × weights",
                f"peak {torch.cuda.max_memory_allocated() / 1e9:.0f} GB")  # fmt: skip
    with line("captured steps against the library's, 16 prompts"), torch.inference_mode():
        inputs = chat.prompt_batch(processor, [turns] * 16, [(picture,)] * 16).to("cuda")
        start = time.perf_counter()
        plain = model.generate(**inputs, max_new_tokens=32, do_sample=False, use_cache=True, eos_token_id=None, pad_token_id=0)
        torch.cuda.synchronize()
        took = time.perf_counter() - start
        plain, ours = plain[:, inputs["input_ids"].shape[1] :], next(iter(texts.values()))[:, :32]
        same = (plain == ours).float().cumprod(1).sum(1).mean()
        say(
            "the library's generate",
            f"{16 * 32 / took:,.0f} tokens/s",
            f"{same:.0f} of 32 tokens equal till one differs",
        )


def main() -> int:
    if not torch.cuda.is_available():
        print("no GPU here: nothing to measure")
        return 0
    hub_datasets.disable_progress_bars()
    import transformers

    say(torch.cuda.get_device_name(), f"torch {torch.__version__}", f"transformers {transformers.__version__}",
        f"liger {transformers.utils.is_liger_kernel_available()}")  # fmt: skip
    tuned("stage 2, full", "full", PAPER.instruct, 6, answered)
    tuned("stage 1", "projector", PAPER.projector, 4)
    tuned("stage 2, LoRA", "lora", PAPER.instruct, 4)
    preferred("lora", 4)
    preferred("full", 6)
    return 0


if __name__ == "__main__":
    import logging

    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("vlsafe").setLevel(logging.INFO)
    sys.exit(main())
