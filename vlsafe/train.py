"""One stage of supervised fine-tuning on TRL, with checkpoints at chosen steps and exact resumption.

The trainer is TRL's own, untouched; what we add are arguments and callbacks. This room knows neither where a run lies
in the cellar nor what a row is about.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Features, Image, List, Value
from peft import PeftModel
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from vlsafe.models import in_memory_layout, load, save
from vlsafe.scales import Fit
from vlsafe.schema import Example
from vlsafe.store import file_digest, write_text

Progress = Callable[[int], None]
COMPLETE = "complete.json"
IMAGE_LENGTH = 17  # words that a picture counts for where rows are sorted by length; an order, not a token count
TRAINING_STATE = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", COMPLETE)


def chat_dataset(rows: Sequence[Example], with_images: bool) -> Dataset:
    """Rows as TRL takes them. Text-only rows among pictures carry an empty list, never a missing value."""
    table: dict[str, list[Any]] = {"messages": [[{"role": t.role, "content": t.text} for t in row.turns] for row in rows]}
    table["length"] = [sum(len(t.text.split()) for t in row.turns) + IMAGE_LENGTH * len(row.images) for row in rows]
    features: dict[str, Any] = {"messages": List({"role": Value("string"), "content": Value("string")})}
    features["length"] = Value("int64")
    if with_images:
        table["images"] = [[{"bytes": data, "path": None} for data in row.images] for row in rows]
        features["images"] = List(Image(mode="RGB"))
    return Dataset.from_dict(table, features=Features(features))


def text_dataset(texts: Sequence[Sequence[str]], tokenizer: Any) -> Dataset:
    """Texts as token ids between BOS and EOS; loss on every second part (the continuations) and on EOS."""
    columns: dict[str, list[Any]] = {"input_ids": [], "labels": []}
    for text in texts:
        ids, labels = [tokenizer.bos_token_id], [-100]
        for number, part in enumerate(tokenizer(list(text)).input_ids):
            ids += part
            labels += part if number % 2 else [-100] * len(part)
        columns["input_ids"].append([*ids, tokenizer.eos_token_id])
        columns["labels"].append([*labels, tokenizer.eos_token_id])
    columns["length"] = [len(ids) for ids in columns["input_ids"]]
    return Dataset.from_dict(columns)


def sft(
    model: PreTrainedModel, processor: Any, data: Dataset, fit: Fit, folder: Path, seed: int,
    milestones: Sequence[int] = (), progress: Progress = lambda step: None,
) -> list[float]:  # fmt: skip
    """Train in place; only assistant tokens carry loss (every token, where the rows are plain text).

    Checkpoints are written at the milestones; a training that was killed goes on from the last complete one, and ends
    with the weights and losses of an undisturbed run, bit for bit.

    Units:    -> losses, nats per token, one per step since the start of this process's training
    Draws:    data order from `seed`
    """
    folder = Path(folder)
    last = _last_complete(folder)
    losses = _Losses()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # our explicit gradient_checkpointing, renamed in the next major
        arguments = _arguments(fit, folder, seed, data.column_names)
    trainer = SFTTrainer(
        model=model if isinstance(model, PeftModel) else in_memory_layout(model), processing_class=processor, train_dataset=data,
        args=arguments, optimizers=(_optimizer(model, fit), None),
        callbacks=[_Milestones(frozenset(milestones)), _Tick(progress), losses],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    model.eval()
    return losses.values


def _optimizer(model: PreTrainedModel, fit: Fit) -> torch.optim.Optimizer:
    """AdamW over the moving weights; the projector has its own rate where the fit gives one."""
    projector: list[Any] = []
    others: list[Any] = []
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            (projector if "multi_modal_projector" in name else others).append(weight)
    groups = [
        {"params": others, "lr": fit.learning_rate},
        {"params": projector, "lr": fit.projector_rate or fit.learning_rate},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=fit.learning_rate, weight_decay=fit.weight_decay, fused=True)


def _arguments(fit: Fit, folder: Path, seed: int, columns: Sequence[str]) -> SFTConfig:
    """TRL's defaults are for large models on GPUs: bf16 and recomputation are switched off where there is none.

    Which rows share a step never depends on their length: in the miniature length tells the task, and steps of one task
    may undo each other (LOG.md). Within a step they are split by length into micro-batches, which saves padding.
    """
    gpu = torch.cuda.is_available()
    return SFTConfig(
        output_dir=str(folder), max_steps=fit.steps, per_device_train_batch_size=fit.batch_size // fit.micro_batches,
        gradient_accumulation_steps=fit.micro_batches, train_sampling_strategy="batch_rebalance",
        remove_unused_columns=False, learning_rate=fit.learning_rate, lr_scheduler_type=fit.schedule,
        warmup_steps=int(fit.warmup_ratio * fit.steps), weight_decay=fit.weight_decay, max_length=fit.max_length,
        assistant_only_loss="messages" in columns, seed=seed, data_seed=seed, use_cpu=not gpu, bf16=gpu,
        gradient_checkpointing=gpu, logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True,
        dataloader_pin_memory=gpu, use_cache=True,
    )  # fmt: skip


class _Milestones(TrainerCallback):
    """Ask for a checkpoint at chosen steps, and mark it complete, with digests, once it is whole."""

    def __init__(self, steps: frozenset[int]) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_save = state.global_step in self.steps

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        files = {p.name: file_digest(p) for p in sorted(folder.iterdir()) if p.is_file()}
        write_text(folder / COMPLETE, json.dumps(files))


class _Tick(TrainerCallback):
    """Report every step."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.progress(state.global_step)


class _Losses(TrainerCallback):
    """Collect the training loss of each step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.values.append(logs["loss"])


def _last_complete(folder: Path) -> Path | None:
    """The latest checkpoint whose files are all as they were when it was finished; broken ones are removed."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]), reverse=True)
    for checkpoint in found:
        mark = checkpoint / COMPLETE
        if mark.exists():
            files = json.loads(mark.read_text(encoding="utf-8"))
            if all((checkpoint / n).exists() and file_digest(checkpoint / n) == d for n, d in files.items()):
                return checkpoint
        shutil.rmtree(checkpoint)
    return None


def settle(folder: Path, processor: Any, start: Path) -> list[Path]:
    """Turn a finished training's checkpoints into plain model folders `step-000025`, without optimiser state.

    Checkpoints of adapters are merged into the model in the folder `start`, which they were trained on.
    """
    settled = []
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1])):
        if (checkpoint / "adapter_config.json").exists():
            _merge_adapter(checkpoint, start)
        for name in TRAINING_STATE:
            (checkpoint / name).unlink(missing_ok=True)
        processor.save_pretrained(checkpoint)
        settled.append(checkpoint.rename(folder / f"step-{int(checkpoint.name.split('-')[1]):06d}"))
    return settled


def _merge_adapter(checkpoint: Path, start: Path) -> None:
    """Replace a checkpoint of adapters by the whole model that they make of `start`."""
    merged = PeftModel.from_pretrained(load(start), checkpoint).merge_and_unload()
    shutil.rmtree(checkpoint)
    save(merged, checkpoint)
