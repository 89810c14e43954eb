"""Responses from a model: batched, greedy, local generation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from vlsafe.chat import prompt_batch
from vlsafe.schema import Item, Response


@torch.inference_mode()
def respond(
    model: PreTrainedModel, processor: Any, items: Sequence[Item], name: str, batch_size: int, max_new_tokens: int,
    progress: Callable[[int], None] = lambda n: None,
) -> list[Response]:  # fmt: skip
    """Greedy responses in the order of the items.

    Items are batched with others of the same modality and about the same length, left-padded; the answers are those
    of one prompt at a time (a test holds us to it).

    Units:    `max_new_tokens` tokens; progress counts items
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    stop = model.generation_config.eos_token_id
    order = sorted(range(len(items)), key=lambda i: (len(items[i].images), len(items[i].turns[-1].text.split()), i))
    texts: dict[int, tuple[str, bool]] = {}
    for batch in _batches(order, items, batch_size):
        chosen = [items[i] for i in batch]
        inputs = prompt_batch(processor, [item.turns for item in chosen], [item.images for item in chosen])
        made = model.generate(**inputs.to(model.device), max_new_tokens=max_new_tokens, do_sample=False)
        for i, tokens in zip(batch, made[:, inputs["input_ids"].shape[1] :], strict=True):
            ended = bool((tokens == stop).any())
            texts[i] = (tokenizer.decode(tokens, skip_special_tokens=True).strip(), not ended)
        progress(len(texts))
    return [Response(item.id, item.benchmark, name, *texts[i]) for i, item in enumerate(items)]


def _batches(order: Sequence[int], items: Sequence[Item], size: int) -> list[list[int]]:
    """Consecutive runs of one modality, at most `size` long."""
    batches: list[list[int]] = []
    for i in order:
        if batches and len(batches[-1]) < size and bool(items[batches[-1][0]].images) == bool(items[i].images):
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches
