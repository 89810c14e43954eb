"""One stage of SFT (with PCGrad for two tasks), DPO or GRPO on TRL, with checkpoints at chosen steps and exact resumption.

TRL's trainers with arguments and callbacks, and three functions replaced while they run; it knows no run store and no content.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers import trainer as hf_trainer
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
from trl.trainer import dpo_trainer
from trl.trainer import utils as trl_utils

from vlsafe.core.scale import Fit, Preference, Rollout, known
from vlsafe.core.store import write_text
from vlsafe.models import devices
from vlsafe.models.architectures import within
from vlsafe.models.checkpoints import fused, in_memory_layout
from vlsafe.training import precision, processes
from vlsafe.training.checkpoints import AT_ONCE, MOVED, Milestones, Progress, last_complete

History = list[dict[str, float]]  # what a trainer logged, a record per step
SFT, DPO, GRPO = (SFTTrainer, SFTConfig), (DPOTrainer, DPOConfig), (GRPOTrainer, GRPOConfig)
LARGE = 10_000  # tokens of a vocabulary; the miniature has 399, and its bits stay what they are
WORKERS = 4  # processes that load pictures for one GPU
# Which rows share a step never depends on their length: in the miniature length reveals the task, and steps of one task may
# undo each other (LOG.md). Within a step they are split by length into micro-batches, which saves padding.
BY_LENGTH = {"train_sampling_strategy": "batch_rebalance"}
IN_ORDER = {"train_sampling_strategy": "sequential"}  # of rows that were put in order before


def sft(model: PreTrainedModel, processor: Any, data: Dataset, fit: Fit, folder: Path, seed: int,
        milestones: Sequence[int] = (), progress: Progress = lambda step: None) -> list[float]:  # fmt: skip
    """`sft_history`'s losses: nats per token, one per step from the first."""
    return [record["loss"] for record in sft_history(model, processor, data, fit, folder, seed, milestones, progress)]


def sft_history(model: PreTrainedModel, processor: Any, data: Dataset, fit: Fit, folder: Path, seed: int,
                milestones: Sequence[int] = (), progress: Progress = lambda step: None) -> History:  # fmt: skip
    """Train in place; only assistant tokens carry loss (every token, where the rows are plain text). `seed` orders the rows of a
    grouped fit; those of others all seeds see in one order, the library's.

    A killed run resumes from the last complete milestone and ends with the weights and records of an uninterrupted one, bit
    for bit. So does `dpo`.

    Units:    -> one record per step from the first: loss in nats per token, num_tokens …
    """
    own = {"max_length": fit.max_length, "assistant_only_loss": "messages" in data.column_names, **BY_LENGTH}
    return _run(SFT, own, model, processor, data, fit, folder, seed, milestones, progress)


def sft_without_conflict(model: PreTrainedModel, processor: Any, data: Dataset, first: int, fit: Fit, folder: Path, seed: int,
                         milestones: Sequence[int] = (), progress: Progress = lambda step: None) -> History:  # fmt: skip
    """`sft_history` on two tasks, the first `first` rows and the others, with conflicting gradients projected (PCGrad).

    Rows are seen in the same proportion as in plain training on both; where nothing conflicts, a step is the same as well.

    Units:    -> records that also hold `task_cosine`, of the two gradients before the projection
    """
    data, leading = without_mixed_tasks(data, first, fit, processes.world_size(), np.random.default_rng(seed))
    # Gradients are summed at every micro-batch, else a process sees its own rows' gradient, or none; the callback clips.
    own = {"max_length": fit.max_length, "assistant_only_loss": True, **IN_ORDER, **_synced(), "max_grad_norm": 0.0}
    return _run(SFT, own, model, processor, data, fit, folder, seed, milestones, progress, callbacks=[ConflictFree(leading)])


def _synced() -> dict[str, Any]:
    """Sum gradients over the processes at every micro-batch. A new value each time, because a trainer writes into it."""
    return {"accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": True}}}


def without_mixed_tasks(data: Dataset, first: int, fit: Fit, many: int, rng: np.random.Generator) -> tuple[Dataset, list[int]]:
    """The rows of a run of `many` processes in order, and how many micro-batches of each step hold the second task.

    All rows that are worked on at one time are of one task and, where the fit is grouped, of one modality.
    """
    batches, size = processes.micro_batches(fit, many), processes.per_process(fit, many) * many
    leading = task_shares(first, len(data) - first, fit.steps, batches)
    pictured = _pictured(data) if fit.grouped else [False] * len(data)
    order = task_order(first, pictured, leading, batches, size, rng)
    processes.refuse_mixed([pictured[i] for i in order], size)
    return data.select(order), leading


def task_shares(first: int, second: int, steps: int, batches: int) -> list[int]:
    """How many micro-batches of each of `steps` hold the second task: in proportion to its rows, at least one and never all.

    Raises:   ValueError where a step has fewer than two micro-batches
    """
    if batches < 2:
        raise ValueError(f"two tasks need at least two micro-batches a step, not {batches}")
    due = np.round(np.arange(steps + 1) * batches * second / (first + second)).astype(int)
    return [int(n) for n in np.clip(np.diff(due), 1, batches - 1)]


def task_order(first: int, pictured: Sequence[bool], leading: Sequence[int], batches: int, size: int,
               rng: np.random.Generator) -> list[int]:  # fmt: skip
    """Row numbers in training order, from `rng`: in every step the micro-batches of the second task, then those of the first.

    Rows 0 … first - 1 are the first task's, the others the second's. The `size` rows of a micro-batch are `pictured` or are not;
    rows that do not fill one wait for the next epoch. Else no row is seen again before all of its task have been.
    """

    def endless(start: int, n: int) -> Iterator[list[int]]:
        waiting: dict[bool, list[int]] = {False: [], True: []}
        while True:
            for row in (start + rng.permutation(n)).tolist():
                rows = waiting[bool(pictured[row])]
                rows.append(row)
                if len(rows) == size:
                    yield rows
                    rows.clear()

    second = len(pictured) - first
    parts = {True: endless(first, second), False: endless(0, first)}
    return [row for n in leading for batch in range(batches) for row in next(parts[batch < n])]


def without_conflict(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], float]:
    """The sum of two tasks' gradients, each without its component against the other, and their cosine before.

    Source:   Yu et al. 2020, "Gradient Surgery for Multi-Task Learning" (PCGrad), algorithm 1: over all weights at once
    """
    pairs = ((first, second), (first, first), (second, second))
    inner, a, b = (sum(_number((x * y).sum()) for x, y in zip(*pair, strict=True)) for pair in pairs)
    cosine = inner / (a * b) ** 0.5 if a > 0 and b > 0 else 0.0
    if cosine >= 0:
        return [x + y for x, y in zip(first, second, strict=True)], cosine
    return [(1 - inner / a) * x + (1 - inner / b) * y for x, y in zip(first, second, strict=True)], cosine


def _number(value: torch.Tensor) -> float:
    """A scalar as a number. Of sharded gradients each process has its own part, and `float` would return that part alone."""
    return float(value.full_tensor() if isinstance(value, DTensor) else value)


class ConflictFree(TrainerCallback):
    """Store the gradient of a step's leading micro-batches and combine it with that of the others before the optimiser step.

    It clips to the trainer's default norm, because the trainer clips before, and logs the two gradients' `task_cosine`.
    """

    def __init__(self, leading: Sequence[int], max_norm: float = 1.0) -> None:
        self.leading, self.max_norm, self.done, self.cosine = leading, max_norm, 0, 0.0
        self.second: list[torch.Tensor] = []

    def on_substep_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.done += 1
        if self.done == self.leading[state.global_step]:
            self.second = [gradient.clone() for gradient in _gradients(model).values()]

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        both = _gradients(model)
        first = [total - second for total, second in zip(both.values(), self.second, strict=True)]
        gradients, self.cosine = without_conflict(first, self.second)
        for weight, gradient in zip(both, gradients, strict=True):
            weight.grad = gradient
        torch.nn.utils.clip_grad_norm_(list(both), self.max_norm)
        self.second, self.done = [], 0

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        state.log_history[-1]["task_cosine"] = self.cosine


def _gradients(model: Any) -> dict[torch.nn.Parameter, torch.Tensor]:
    """Trainable weights with their gradients; zeros where no row used a weight, as with the projector on text alone."""
    moving = [weight for weight in model.parameters() if weight.requires_grad]
    return {w: torch.zeros_like(w, dtype=torch.float32) if w.grad is None else w.grad for w in moving}


def gradients(model: PreTrainedModel, processor: Any, data: Dataset, fit: Fit, folder: Path, seed: int,
              note: Callable[[], None]) -> None:  # fmt: skip
    """Run SFT without updating the weights: `note` is called where they hold the gradient of each step."""
    own = {"max_length": fit.max_length, "assistant_only_loss": True, **BY_LENGTH}
    _run(SFT, own, model, processor, data, fit, folder, seed, (), lambda step: None, optimizer=_Still(model, note))


class _Still(torch.optim.Optimizer):
    """An optimiser that calls `note` instead of taking a step."""

    def __init__(self, model: PreTrainedModel, note: Callable[[], None]) -> None:
        super().__init__([weight for weight in model.parameters() if weight.requires_grad], {"lr": 0.0})
        self.note = note

    def step(self, closure: Any = None) -> None:
        self.note()


def dpo(model: PreTrainedModel, reference: PreTrainedModel, processor: Any, data: Dataset, spec: Preference, fit: Fit,
        folder: Path, seed: int, milestones: Sequence[int] = (), progress: Progress = lambda step: None) -> History:  # fmt: skip
    """Train in place on preferences; the reference is always passed (TRL would load one from a stored, perhaps older path).

    The reference's log-probabilities of text-only pairs are computed once; TRL cannot do so where there are pictures.
    Nothing is truncated: `intake.sound` has dropped what is too long. Micro-batches are of one size and not by length:
    TRL takes the mean over each, so that in uneven ones (`BY_LENGTH`) a pair would weigh more the fewer share it.

    Units:    -> one record per step: loss in nats per pair, rewards/accuracies, num_tokens …
    Source:   Rafailov et al. 2023, equation 7: -log sigmoid(beta * (log-ratio of chosen - log-ratio of rejected))
    """
    own = {"max_length": None, "beta": spec.beta, "precompute_ref_log_probs": "images" not in data.column_names}
    return _run(DPO, own, model, processor, data, fit, folder, seed, milestones, progress, ref_model=reference)


def grpo(model: PreTrainedModel, reward: Callable[..., list[float]], processor: Any, data: Dataset, spec: Rollout, folder: Path,
         seed: int, milestones: Sequence[int] = (), progress: Progress = lambda step: None) -> History:  # fmt: skip
    """Train in place on the model's own answers to prompts of one modality (TRL fails on a batch of both), rewarded in [0, 1].

    A step samples `batch_size` answers, `generations` to a prompt. There is no KL penalty, as is TRL's default.

    Units:    -> one record per step: reward, completions/mean_length, num_tokens …
    Source:   Shao et al. 2024, section 4; loss as TRL has it by default (DAPO)
    """
    own = {"beta": 0.0, "num_generations": spec.generations, "max_completion_length": spec.max_new_tokens,
           "temperature": spec.temperature}  # fmt: skip
    return _run(GRPO, own, model, processor, data, spec.fit, folder, seed, milestones, progress, reward_funcs=reward)


def tokens_seen(history: History) -> list[int]:
    """Tokens processed up to each step, padding not counted; TRL's own count starts again after a resumption."""
    counts = [record["num_tokens"] for record in history]
    new = [now - before if now > before else now for before, now in zip([0, *counts], counts, strict=False)]
    return [int(total) for total in itertools.accumulate(new)]


def _run(kind: tuple[type[Trainer], type[TrainingArguments]], own: dict[str, Any], model: PreTrainedModel, processor: Any,
         data: Dataset, fit: Fit, folder: Path, seed: int, milestones: Sequence[int], progress: Progress,
         optimizer: Any = None, callbacks: Sequence[TrainerCallback] = (), **more: Any) -> History:  # fmt: skip
    """Build one of TRL's trainers, resume from the last complete checkpoint, and return what was logged at every step."""
    [last] = broadcast_object_list([last_complete(folder) if PartialState().is_main_process else None])
    masters = _lowered(model, kind[1], fit, folder, seed, own, more.get("ref_model"))
    masters = None if optimizer is not None else masters  # gradients alone are wanted: nothing is moved
    fit, own = _fitted(kind, own, model, processor, data, fit, folder, seed, more) if masters is not None else (fit, own)
    arguments = _arguments(kind[1], fit, folder, seed, own)
    if fit.grouped:
        data = data if IN_ORDER.items() <= own.items() else _grouped(data, fit, seed)
    elif processes.sharded() and "pictures" in data.column_names:
        raise ValueError("a sharded fit with pictures needs `grouped: true`: processes must not differ in whether they have any")
    saved = Milestones(frozenset(milestones), progress)
    with warnings.catch_warnings(), _hashed_in_parts(), _weights_once(model), _spared(model, fit), contextlib.closing(saved):
        warnings.simplefilter("ignore")
        trainer = kind[0](
            model=model if isinstance(model, PeftModel) else in_memory_layout(model), processing_class=processor, args=arguments,
            train_dataset=data, callbacks=[*callbacks, precision.FrozenTower(), processes.Guards(), saved], **more,
        )  # fmt: skip
        trainer.optimizer_cls_and_kwargs = _optimizer(model, fit, masters)  # not every trainer takes it as argument
        trainer.optimizer = optimizer  # None: made from the line above
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    model.eval()
    logged = [record for record in trainer.state.log_history if "loss" in record]
    return [{name: value for name, value in record.items() if name != "step_time"} for record in logged]


def _spared(model: PreTrainedModel, fit: Fit) -> contextlib.AbstractContextManager[Any]:
    """Leave out what costs a CPU half of a step. TRL's loss is taken of labelled tokens alone, as on GPUs: elsewhere it scores
    all, and with a vocabulary of thousands that is most of the head's work. In bfloat16 PyTorch's fused attention goes back
    through some dozens of tokens three times as slowly as plain products do."""
    held = contextlib.ExitStack()
    if model.device.type == "cpu" and model.config.get_text_config().vocab_size > LARGE:
        held.enter_context(mock.patch.object(trl_utils, "_use_triton", lambda _: True))  # its only use there: which are scored
        held.enter_context(sdpa_kernel(SDPBackend.MATH) if fit.autocast else contextlib.nullcontext())
    return held


def _weights_once(model: Any) -> contextlib.AbstractContextManager[Any]:
    """Write and read a sharded model's weights in its checkpoints as `model.safetensors` alone: the trainer would gather them
    again and write a second copy for resumption. Adapters are small and stay as they are."""
    held = contextlib.ExitStack()
    if processes.sharded() and not isinstance(model, PeftModel):
        held.enter_context(mock.patch.object(hf_trainer, "save_fsdp_model", lambda *_, **__: None))
        held.enter_context(mock.patch.object(hf_trainer, "load_fsdp_model", _read_shards))
    return held


def _read_shards(plugin: Any, accelerator: Any, model: Any, folder: str, **_: Any) -> None:
    """Give every process its part of a checkpoint's weights, which the first one reads."""
    weights = load_file(Path(folder) / "model.safetensors") if accelerator.is_main_process else {}
    strict = not (Path(folder) / MOVED).exists()
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=strict)
    set_model_state_dict(model, weights, options=options)


def _hashed_in_parts() -> contextlib.AbstractContextManager[Any]:
    """Let TRL take the digest of a sharded reference, by which it names the file of its log-probabilities, over a process's own
    part; it fails on sharded weights. The first process's name is used; the file lies with the job's data, new at every start."""
    whole = dpo_trainer.hash_module

    def own(model: Any) -> str:
        parts = {name: getattr(held, "to_local", lambda held=held: held)() for name, held in model.state_dict().items()}
        return str(whole(SimpleNamespace(state_dict=lambda: parts)))

    return mock.patch.object(dpo_trainer, "hash_module", own)


def _lowered(model: PreTrainedModel, kind: type[TrainingArguments], fit: Fit, folder: Path, seed: int, own: dict[str, Any],
             reference: PreTrainedModel | None) -> precision.Masters | None:  # fmt: skip
    """Weights in the dtype in which they compute, on their device, with fused kernels; the masters of those that are trained.

    Shards stay float32: FSDP2 gathers them in bfloat16. So do trainable weights of which every process has a copy, because their
    gradients are averaged in their own dtype: these compute under autocast.
    """
    if known(fit.dtype, ("float32", "bfloat16"), "dtype") == "float32":
        return None
    if fit.saved != "bfloat16":
        raise ValueError("`dtype: bfloat16` makes checkpoints in bfloat16: set `saved: bfloat16` in this fit as well")
    if processes.sharded():
        return None
    device = _arguments(kind, fit, folder, seed, own).device
    for each in [model, *([reference] if reference is not None else [])]:
        fused(each.to(device))
    if reference is not None:
        precision.halve(reference.requires_grad_(False))
    return precision.halve(model, trainable=processes.world_size() == 1) or None


def _fitted(kind: tuple[type[Trainer], type[TrainingArguments]], own: dict[str, Any], model: PreTrainedModel, processor: Any,
            data: Dataset, fit: Fit, folder: Path, seed: int, more: dict[str, Any]) -> tuple[Fit, dict[str, Any]]:  # fmt: skip
    """Rows at once and recomputation by a trial on this GPU, the same ones after a resumption; elsewhere as the fit says."""
    if devices.device() != "cuda" or processes.world_size() > 1 or kind is GRPO:
        return fit, own
    noted = folder / AT_ONCE
    if not noted.exists():
        longest = sorted(range(len(data)), key=data["length"].__getitem__)[-fit.batch_size :]
        known_later = {"precompute_ref_log_probs": False} if kind is DPO else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = kind[0](model=model, processing_class=processor, train_dataset=data.select(longest[::-1]),
                              args=_arguments(kind[1], fit, folder, seed, {**own, **known_later}), **more)  # fmt: skip

        def batch(rows: int) -> precision.Batch:
            inputs = trainer.data_collator([trainer.train_dataset[i] for i in range(rows)])
            return {name: value.to(model.device) for name, value in inputs.items()}

        found = precision.tried(model.train(), batch, lambda inputs: trainer.compute_loss(model, inputs), len(longest))
        write_text(noted, json.dumps(found))
    rows, recompute, _ = json.loads(noted.read_text(encoding="utf-8"))
    return precision.divisible(fit, rows), {**own, "gradient_checkpointing": recompute}


def _grouped(data: Dataset, fit: Fit, seed: int) -> Dataset:
    """The rows of the whole run in the order of its steps."""
    pictured, many, rng = _pictured(data), processes.world_size(), np.random.default_rng([seed, *b"order"])
    order = processes.grouped_order(list(data["length"]), pictured, fit, many, rng)
    processes.refuse_mixed([pictured[i] for i in order], many * processes.per_process(fit, many))
    return data.select(order)


def _pictured(data: Dataset) -> list[bool]:
    """Whether each row has a picture."""
    return [bool(n) for n in data["pictures"]] if "pictures" in data.column_names else [False] * len(data)


def _optimizer(model: PreTrainedModel, fit: Fit, masters: precision.Masters | None) -> tuple[Any, dict[str, Any]]:
    """AdamW over the trainable weights, and its arguments; the projector has its own rate where the fit gives one."""
    weights = [(within(name, "projector"), weight) for name, weight in model.named_parameters() if weight.requires_grad]
    rates = {False: fit.learning_rate, True: fit.projector_rate or fit.learning_rate}  # by whether it is the projector's
    groups = [{"params": [weight for kind, weight in weights if kind == projector], "lr": rates[projector]}
              for projector in sorted({kind for kind, _ in weights})]  # fmt: skip
    options = {"params": groups, "lr": fit.learning_rate, "weight_decay": fit.weight_decay, "fused": True}
    return (torch.optim.AdamW, options) if masters is None else (precision.MasterAdamW, {**options, "masters": masters})


def _arguments(kind: type[TrainingArguments], fit: Fit, folder: Path, seed: int, own: dict[str, Any]) -> Any:
    """TRL's defaults are for large models on GPUs: bf16 and recomputation are switched off where there is none."""
    gpu = devices.device() == "cuda"
    low = fit.dtype == "bfloat16"
    autocast = processes.world_size() > 1 and not processes.sharded() if low else gpu or fit.autocast
    own = {"gradient_checkpointing": gpu, **own, **(IN_ORDER if fit.grouped else {})}
    if processes.sharded() and (gpu or low):  # otherwise the whole gradient waits on every GPU, and a tower that text skips fails
        own |= _synced()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # our explicit gradient_checkpointing, renamed in the next major
        return kind(
            output_dir=str(folder), max_steps=fit.steps,
            per_device_train_batch_size=processes.per_process(fit, processes.world_size()),
            gradient_accumulation_steps=processes.micro_batches(fit, processes.world_size()),
            remove_unused_columns=False, learning_rate=fit.learning_rate, dataloader_num_workers=WORKERS if gpu else 0,
            lr_scheduler_type=fit.schedule, warmup_steps=int(fit.warmup_ratio * fit.steps), weight_decay=fit.weight_decay,
            seed=seed, data_seed=seed, use_cpu=not gpu, bf16=autocast, logging_steps=1, save_strategy="no",
            report_to=[], disable_tqdm=True, dataloader_pin_memory=gpu, dataloader_persistent_workers=gpu, use_cache=True, **own,
        )  # fmt: skip
