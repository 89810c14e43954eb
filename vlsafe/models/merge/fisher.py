"""The diagonal of a model's Fisher information over rows, by which the merge rule `fisher` weighs each of its weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import PreTrainedModel

from vlsafe.core import writing
from vlsafe.core.schema import Example
from vlsafe.models.chat import answer_tokens, prompt_batch


def diagonal(
    model: PreTrainedModel, processor: Any, rows: Iterable[Example], limit: int | None = None
) -> dict[str, torch.Tensor]:
    """The mean over rows of (∂ log p(answer | conversation before it) / ∂θ)², by a row's last answer, divided by the length of
    all of it.

    Streamed: one row is in memory, and beside the sums, which are as large as the weights, one weight's gradient at a time.

    Departs:  the answers are the rows' own (the empirical Fisher information); the paper's are drawn from the model
    Shapes:   -> float32 on the CPU, by the weights' names in memory, a tied one under both
    Raises:   ValueError where there is no row, or a row that does not end with an answer, or no gradient at all
    Source:   Matena and Raffel 2022 (arXiv 2111.09832), section 3; their code divides by the length as well
    """
    weights = dict(model.named_parameters())
    sums = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}
    first = {weight: name for name, weight in weights.items()}

    def add(weight: torch.Tensor) -> None:
        sums[first[weight]].addcmul_(weight.grad.float(), weight.grad.float())
        weight.grad = None

    handles = [weight.register_post_accumulate_grad_hook(add) for weight in first]
    model.requires_grad_(True).eval()
    n = 0
    try:
        for n, row in enumerate(islice(rows, limit), 1):  # noqa: B007 (counted)
            _log_likelihood(model, processor, row).backward()
    finally:
        for handle in handles:
            handle.remove()
    length = torch.stack([total.double().square().sum() for total in sums.values()]).sum().sqrt().item()
    if not length:
        raise ValueError(f"{n} rows gave no gradient: there is nothing to weigh weights by")
    found = {name: total.div_(length).cpu() for name, total in sums.items()}
    same = {name: first[weight] for name, weight in model.named_parameters(remove_duplicate=False) if name not in found}
    return found | {name: found[other].clone() for name, other in same.items()}  # files hold no tensor under two names


def _log_likelihood(model: PreTrainedModel, processor: Any, row: Example) -> torch.Tensor:
    """Of a row's last answer, its end included, given all before it. Units: nats"""
    if len(row.turns) < 2 or row.turns[-1].role != "assistant":
        raise ValueError(f"the row {row.id} does not end with an answer, which the Fisher information is of")
    length = len(answer_tokens(processor, row.turns, len(row.images), row.id))
    inputs = prompt_batch(processor, [row.turns], [row.images]).to(model.device)
    log_probs = model(**inputs, logits_to_keep=length + 1).logits[0, :-1].float().log_softmax(-1)
    return log_probs.gather(-1, inputs["input_ids"][0, -length:, None]).sum()


def save(found: Mapping[str, torch.Tensor], out: Path) -> None:
    """Raises:   ValueError where the file exists; OSError, leaving none, where it cannot be written"""
    writing.refuse_existing(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        save_file({name: total.contiguous() for name, total in found.items()}, out)
    except SafetensorError as error:
        out.unlink(missing_ok=True)
        raise OSError(f"{out} cannot be written: {error}") from error
