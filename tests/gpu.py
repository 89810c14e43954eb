"""`tests/gpu.sh [SECONDS]`: what a 7B model costs on one GPU, with random weights and synthetic rows, as a table.

Every line is a training by the trainers, or answers by the engine, that a reproduction uses. What this card is too small for, by
the plan or as it turns out, or what no longer fits the time, is skipped by name. The merge of two checkpoints runs beside the
rest, on the CPU. `tests/planning/test_gpu_script.py` runs all lines at tiny sizes, without a GPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import shutil
import signal
import subprocess
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
import transformers
from safetensors.torch import save_file

from vlsafe.core.presets import PAPER
from vlsafe.core.scale import Fit
from vlsafe.core.schema import Pair, Turn
from vlsafe.data.guards import LlamaGuard
from vlsafe.data.miniature.pictures import to_png
from vlsafe.evaluation.decoding import Decoder
from vlsafe.evaluation.engines import Ensemble
from vlsafe.models import chat, checkpoints, trainable
from vlsafe.models.merge.files import merge
from vlsafe.models.merge.rules import How
from vlsafe.planning import costs, dryrun
from vlsafe.study.study import Study
from vlsafe.training import datasets, precision, trainers

SECONDS = float(sys.argv[1]) if sys.argv[1:2] and sys.argv[1].isdigit() else 340.0  # in all
STEPS, NEW = 2, 128  # the first step warms up
ROWS = {"stage 2, full": 128}  # a step's, 64 where no number is given: the optimiser's share is that of a recipe's batch
EXCHANGES = 96  # that the guard reads
BACKBONE = "llama2-chat"
GPU, SEEN = "cuda", [torch.profiler.ProfilerActivity.CUDA]
GUARD = dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8)
WORDS = 128_000  # of the guard's vocabulary
COPY = 4.3e12  # bytes a second that an H200 copies, as measured
BEGUN = time.perf_counter()


def say(*cells: Any) -> None:
    print("| " + " | ".join(str(cell) for cell in cells) + " |", flush=True)


@contextlib.contextmanager
def line(what: str) -> Iterator[None]:
    """One measurement. It ends in a line of the table also where it does not fit or breaks."""
    began = time.perf_counter()
    emptied()  # of the model of the line before: trainers hold circles
    try:
        yield
    except TimeoutError as error:
        say(what, f"skipped: {error}")
    except torch.OutOfMemoryError as error:
        say(what, f"skipped: does not fit this card ({str(error).splitlines()[0][:90]})")
    except Exception as error:
        traceback.print_exc()
        say(what, f"FAILED: {type(error).__name__}: {str(error)[:150]}")
    emptied()
    print(f"  ({what}: {time.perf_counter() - began:.0f} s of {time.perf_counter() - BEGUN:.0f})", flush=True)


def emptied() -> None:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def on_card(planned: float) -> None:
    """Raises:   OutOfMemoryError where the plan says that this card is too small, before anything is tried"""
    size = torch.cuda.get_device_properties().total_memory
    if planned > size:
        raise torch.OutOfMemoryError(f"the plan is {planned / 1e9:.0f} GB, it has {size / 1e9:.0f}")


def on_time(needed: float) -> None:
    left = SECONDS - (time.perf_counter() - BEGUN)
    if left < needed:
        raise TimeoutError(f"it takes some {needed:.0f} s, and {left:.0f} are left")


def fit_of(fit: Fit, rows: int) -> Fit:
    return dataclasses.replace(fit, steps=STEPS, batch_size=rows, micro_batches=1, launch="", grouped=False, at_once=None)


def trained(what: str, model: Any, fit: Fit, passes: int, method: str, run: Callable[..., Any], rows: int) -> None:
    """Seconds a row, MFU and peak memory of a training's second step, beside the plan's memory."""
    shapes, ticks = dryrun._shapes(PAPER, BACKBONE, getattr(model, "get_base_model", lambda: model)()), []
    moving = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    planned = dryrun.gpu_memory(shapes, moving, 1, False, True) + (dryrun.CAST * shapes.all if what.startswith("DPO") else 0)
    on_card(planned)
    with tempfile.TemporaryDirectory() as folder:
        rest = (fit, Path(folder), 0, (), lambda step: ticks.append(time.perf_counter()))
        history = run(*rest)
        at_once, recompute, took = json.loads((Path(folder) / "at-once.json").read_text())
    counts = trainers.tokens_seen(history)
    seconds, tokens = (ticks[-1] - ticks[-2]) / rows, (counts[-1] - counts[-2]) / rows
    done = dryrun.operations(shapes, tokens - shapes.image_tokens, 1.0, passes)
    planned += dryrun.activations(shapes, at_once * tokens, method, recompute)
    if what.startswith("DPO"):  # tokens are those of both answers; the reference reads them as well
        one = tokens / 2 - shapes.image_tokens
        done = 2 * (dryrun.operations(shapes, one, 1.0, passes) + dryrun.operations(shapes, one, 1.0, 2))
    mfu = done / seconds / (dryrun.this_gpu() or {"operations": float("nan")})["operations"]
    peak = torch.cuda.max_memory_allocated() / 1e9
    say(what, f"{seconds * 1e3:.1f} ms a row", f"{tokens:.0f} tokens a row", f"MFU {mfu:.1%}", f"peak {peak:.0f} GB",
        f"plan {planned / 1e9:.0f} GB", f"{rows} a step, {at_once} at once, recompute {recompute}, {took * 1e3:.1f} ms tried",
        f"loss {history[-1]['loss']:.3f}")  # fmt: skip


def tuned(what: str, method: str, fit: Fit, passes: int, needed: float) -> None:
    many = ROWS.get(what, 64)
    with line(what):
        on_time(needed)
        model, processor, rows = dryrun.stand_ins(PAPER, BACKBONE, many * STEPS)
        model = trainable.choose(model, method, PAPER.lora)
        data = datasets.chat_dataset(rows, True)
        trained(what, model, fit_of(fit, many), passes, method,
                lambda *rest: trainers.sft_history(model, processor, data, *rest), many)  # fmt: skip


def profiled() -> None:
    """What the GPU does in a step of two micro-batches of four rows, the optimiser included, and while it reads 64 prompts.
    After what is timed for training: a profiler can slow what comes after it."""
    model = None
    with line("profile of a step of stage 2, 2 x 4 rows"), tempfile.TemporaryDirectory() as folder:
        on_time(14)
        model, processor, rows = dryrun.stand_ins(PAPER, BACKBONE, 24)
        model, profile, ticks = trainable.choose(model, "full", PAPER.lora), torch.profiler.profile(activities=SEEN), []

        def progress(step: int) -> None:
            torch.cuda.synchronize()
            ticks.append(time.perf_counter())
            if step == 2:
                profile.start()
            if step == 3:
                profile.stop()

        (Path(folder) / "at-once.json").write_text("[4, false, 0]")
        fit = dataclasses.replace(fit_of(PAPER.instruct, 8), steps=3)
        trainers.sft_history(model, processor, datasets.chat_dataset(rows, True), fit, Path(folder), 0, (), progress)
        busiest(profile, ticks[-1] - ticks[-2])
    with line("profile of reading 64 prompts"), torch.inference_mode():
        on_time(5)
        if model is None:
            raise TimeoutError("it takes the model of the profile before it")
        decoder, inputs = Decoder(model.eval(), torch.tensor([-1]), 0), prompts(processor, 64)
        for profile in (None, torch.profiler.profile(activities=SEEN)):
            with profile or contextlib.nullcontext():
                start = time.perf_counter()
                decoder(dict(inputs), 1)
                torch.cuda.synchronize()
        busiest(profile, time.perf_counter() - start)


def busiest(profile: Any, seconds: float) -> None:
    events = sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total)
    busy = sum(event.self_device_time_total for event in events) / 1e3
    print(f"  busy {busy:.0f} ms of {seconds * 1e3:.0f}, {sum(event.count for event in events)} kernels")
    for event in events[:16]:
        print(f"  {event.self_device_time_total / 1e3:8.1f} ms {event.count:6d} x {event.key[:110]}")


def preferred(method: str, passes: int, needed: float) -> None:
    what, many = f"DPO, {method}", 8
    with line(what):
        on_time(needed)
        model, processor, rows = dryrun.stand_ins(PAPER, BACKBONE, many * STEPS)
        words = ["word " * 100, "word " * 90]
        pairs = [Pair(row.id, "synthetic", row.turns[:1], *words, row.images) for row in rows]
        model = trainable.choose(model, method, PAPER.lora)
        with torch.no_grad():
            reference = checkpoints.random_graft(PAPER.decoder(BACKBONE), PAPER.vision, True, GPU)
        reference.config.image_token_id = processor.tokenizer.image_token_id
        precision.halve(reference.requires_grad_(False))
        torch.cuda.empty_cache()
        data, spec = datasets.pair_dataset(pairs, True), PAPER.tuning.preference
        trained(what, model, fit_of(spec.fit, many), passes, {"lora": "lora without dropout"}.get(method, method),
                lambda *rest: trainers.dpo(model, reference, processor, data, spec, *rest), many)  # fmt: skip


def prompts(processor: Any, rows: int) -> dict[str, Any]:
    size, turns = PAPER.vision.image_size, (Turn("user", " ".join(["word"] * 60)),)
    picture = to_png(np.full((size, size, 3), 60, np.uint8))
    return dict(chat.prompt_batch(processor, [turns] * rows, [(picture,)] * rows).to(GPU))


def answered() -> None:
    """Answers to a picture and 60 words, none of which ends before its last token: with random weights no token means an end."""
    model = None
    with line("a model that answers"):
        model, processor, _ = dryrun.stand_ins(PAPER, BACKBONE, 1)
    if model is None:
        return
    precision.halve(model.eval().requires_grad_(False))
    checkpoints.fused(model)
    shapes = dryrun._shapes(PAPER, BACKBONE, model)
    weights = 2 * (shapes.blocks + shapes.head)
    for rows in (16, 64):
        what = f"{NEW} tokens, {rows} prompts"
        with line(what), torch.inference_mode():
            on_time(10)
            inputs = prompts(processor, rows)
            decoder, took = Decoder(model, torch.tensor([-1]), 0), {}
            decoder(dict(inputs), NEW)
            for new in (1, NEW):
                torch.cuda.synchronize()
                start = time.perf_counter()
                tokens = decoder(dict(inputs), new)
                torch.cuda.synchronize()
                took[new] = time.perf_counter() - start
            shape = decoder.shape
            del decoder, tokens
            step = (took[NEW] - took[1]) / (NEW - 1)
            cache = rows * dryrun.cache_bytes(shapes, shape[1])
            say(what, f"{rows * NEW / took[NEW]:,.0f} tokens/s", f"{rows / step:,.0f} without the prompt ({took[1]:.2f} s)",
                f"{step * 1e3:.2f} ms a step", f"{step / (weights + cache) * COPY:.1f} × reading weights and cache",
                f"{step / weights * COPY:.1f} × weights",
                f"peak {torch.cuda.max_memory_allocated() / 1e9:.0f} GB",
                f"plan {(dryrun.CAST * shapes.all + 2 * cache) / 1e9:.0f} GB")  # fmt: skip
    with line("an ensemble"), torch.inference_mode():
        model.generation_config.update(eos_token_id=-1, pad_token_id=0)
        both = Ensemble(model, model, 0.5)
        tokens = both.generate(**prompts(processor, 4), max_new_tokens=8, do_sample=False, use_cache=True)
        say("an ensemble", f"{len(tokens)} prompts with their answers, {tokens.shape[1]} tokens each")


def guarded() -> None:
    """Exchanges of usual length through Llama-Guard-3's shapes, beside the plan; every answer runs to its last token, which is
    the slowest case."""
    with line("guard"):
        on_time(15)
        known = next((name for name, spec in costs.GPUS.items() if spec is dryrun.this_gpu()), "H100")
        with tempfile.TemporaryDirectory() as folder:
            planned = costs.Plan(Study.open("paper", BACKBONE, 0, folder), known).judged(EXCHANGES)
        on_card(planned.memory[1])
        words = [f"word{i}" for i in range(WORDS)]
        tokenizer = chat.build_tokenizer([*words, "safe", "unsafe"], 8192)
        config = transformers.AutoConfig.for_model(
            "llama", **GUARD, vocab_size=WORDS + 256, max_position_embeddings=8192, dtype="bfloat16", eos_token_id=None,
        )  # fmt: skip
        with torch.device(GPU):
            model = transformers.AutoModelForCausalLM.from_config(config).bfloat16().eval()
        guard = LlamaGuard(checkpoints.fused(model), tokenizer)
        half = " ".join(["word1"] * (PAPER.traffic.screened // 2))
        exchanges = [(Turn("user", half), Turn("assistant", half))] * EXCHANGES
        guard.assess(exchanges[:32])
        start = time.perf_counter()
        guard.assess(exchanges)
        seconds = time.perf_counter() - start
        say("guard", f"{EXCHANGES / seconds:.1f} exchanges/s", f"plan {EXCHANGES / planned.hours / 3600:.1f} on one {known}",
            f"{EXCHANGES * PAPER.traffic.screened / seconds:,.0f} words/s",
            f"peak {torch.cuda.max_memory_allocated() / 1e9:.0f} GB", f"plan {planned.memory[1] / 1e9:.0f} GB")  # fmt: skip


def random_checkpoint(folder: Path, seed: int) -> Path:
    """A checkpoint of 7B shapes in bfloat16, its weights cut from one block of random numbers."""
    config = transformers.AutoConfig.for_model("llama", hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
                                               num_attention_heads=32, vocab_size=32_000, architectures=["LlamaForCausalLM"],
                                               dtype="bfloat16")  # fmt: skip
    config.save_pretrained(folder)
    with torch.device("meta"):
        sizes = {name: value.shape for name, value in transformers.AutoModelForCausalLM.from_config(config).state_dict().items()}
    block = torch.randn(140_000_000, generator=torch.Generator().manual_seed(seed)).mul_(0.02).bfloat16()
    shards, places = 3, {}
    for shard in range(shards):
        name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {key: block[shard * 1000 :][: sizes[key].numel()].clone().view(sizes[key]) for key in sorted(sizes)[shard::shards]}
        save_file(part, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def merged() -> int:
    """Two checkpoints of 13.5 GB into a third on disk."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the folder is removed
    torch.set_num_threads(4)
    with tempfile.TemporaryDirectory() as folder:
        if shutil.disk_usage(folder).free < 45e9:
            say("streaming merge", "skipped: it takes 41 GB of disk")
            return 0
        start = time.perf_counter()
        both = {name: random_checkpoint(Path(folder) / name, seed) for seed, name in enumerate("ab")}
        print(f"  (two checkpoints of 13.5 GB on disk: {time.perf_counter() - start:.0f} s)", flush=True)
        start, busy = time.perf_counter(), time.process_time()
        result = merge("linear", both, Path(folder) / "out", How())
        say("streaming merge", f"{time.perf_counter() - start:.0f} s", f"{time.process_time() - busy:.0f} CPU-seconds",
            f"{result['bytes'] / 1e9:.1f} GB of {result['tensors']} tensors")  # fmt: skip
    return 0


def main() -> int:
    if not torch.cuda.is_available():
        print("no GPU here: nothing to measure")
        return 0
    hub_datasets.disable_progress_bars()
    say(torch.cuda.get_device_name(), f"torch {torch.__version__}", f"transformers {transformers.__version__}",
        f"liger {transformers.utils.is_liger_kernel_available()}")  # fmt: skip
    beside = subprocess.Popen([sys.executable, __file__, "merge"])
    tuned("stage 2, full", "full", PAPER.instruct, 6, 60)
    tuned("stage 1", "projector", PAPER.projector, 4, 15)
    tuned("stage 2, LoRA", "lora", PAPER.instruct, 4, 25)
    preferred("lora", 4, 15)
    preferred("full", 6, 10)
    answered()
    guarded()
    profiled()
    try:
        beside.wait(max(0.0, SECONDS - (time.perf_counter() - BEGUN)))
    except subprocess.TimeoutExpired:
        beside.terminate()  # it removes its files
        say("streaming merge", f"skipped: not done after {SECONDS:.0f} s")
        beside.wait()
    return 0


if __name__ == "__main__":
    import logging

    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("vlsafe").setLevel(logging.INFO)
    sys.exit(merged() if sys.argv[1:] == ["merge"] else main())
