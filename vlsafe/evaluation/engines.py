"""Responses from a model: batched and local, written greedily or chosen by likelihood."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from string import ascii_uppercase
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from vlsafe.core.schema import Item, Response, Turn
from vlsafe.models.chat import prompt_batch, rendered

Progress = Callable[[int], None]


def respond(
    model: PreTrainedModel, processor: Any, items: Sequence[Item], name: str, batch_size: int, max_new_tokens: int,
    progress: Progress = lambda n: None,
) -> list[Response]:  # fmt: skip
    """Responses in the order of the items, each by its item's own scoring.

    The response to a ranked item is the letter of the chosen option.

    Units:    `max_new_tokens` tokens; progress counts items
    """
    ranked = [i for i, item in enumerate(items) if item.scoring == "likelihood"]
    written = [i for i, item in enumerate(items) if item.scoring == "generated"]
    texts = generate(model, processor, [items[i] for i in written], batch_size, max_new_tokens, progress)
    losses = option_losses(
        model, processor, [items[i] for i in ranked], batch_size, lambda done: progress(len(written) + done)
    )  # fmt: skip
    letters = [(ascii_uppercase[min(range(len(of)), key=of.__getitem__)], False) for of in losses]
    said = dict(zip(written + ranked, texts + letters, strict=True))
    return [Response(item.id, item.benchmark, name, *said[i]) for i, item in enumerate(items)]


@torch.inference_mode()
def generate(
    model: PreTrainedModel, processor: Any, items: Sequence[Item], batch_size: int, max_new_tokens: int, progress: Progress
) -> list[tuple[str, bool]]:
    """Greedy texts, and whether the token limit cut them off.

    Items are batched with others of the same modality and about the same length, left-padded; the answers are those
    of one prompt at a time (a test holds us to it).
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    stop = model.generation_config.eos_token_id
    texts: dict[int, tuple[str, bool]] = {}
    for batch in _batches(items, batch_size):
        chosen = [items[i] for i in batch]
        inputs = prompt_batch(processor, [item.turns for item in chosen], [item.images for item in chosen])
        # said aloud, because trainers write use_cache=False into the configs of their checkpoints
        made = model.generate(**inputs.to(model.device), max_new_tokens=max_new_tokens, do_sample=False, use_cache=True)
        for i, tokens in zip(batch, made[:, inputs["input_ids"].shape[1] :], strict=True):
            ended = bool((tokens == stop).any())
            texts[i] = (tokenizer.decode(tokens, skip_special_tokens=True).strip(), not ended)
        progress(len(texts))
    return [texts[i] for i in range(len(items))]


@torch.inference_mode()
def option_losses(
    model: PreTrainedModel, processor: Any, items: Sequence[Item], batch_size: int, progress: Progress = lambda n: None
) -> list[list[float]]:
    """The model's total loss on each option of each item, spoken as the assistant's answer to the item's prompt.

    A batch holds `batch_size` answers, so about a quarter as many items with four options; each item's pictures go
    through the tower once per option. The answer includes its EOS, as in training.

    Shapes:   N items of K options  ->  N lists of K
    Units:    nats, summed over the answer's tokens
    Source:   SEED-Bench ranks by LAVIS's losses: a sum (T5), or a mean over a common padded length (LLaMA); either
              ranks as the sum does
    """
    losses: dict[int, list[float]] = {}
    for batch in _batches(items, max(1, batch_size // max([len(item.options) for item in items], default=1))):
        asked = [(items[i], option) for i in batch for option in items[i].options]
        told = iter(_answer_losses(model, processor, asked).tolist())
        losses |= {i: [next(told) for _ in items[i].options] for i in batch}
        progress(len(losses))
    return [losses[i] for i in range(len(items))]


def _answer_losses(model: PreTrainedModel, processor: Any, asked: Sequence[tuple[Item, str]]) -> torch.Tensor:
    """Loss of one batch of answers: asked [N]  ->  [N] nats. Padding is on the left, so every answer ends in the last column.

    Positions are counted from each row's first token, as generation counts them.
    """
    spoken = [(*item.turns, Turn("assistant", option)) for item, option in asked]
    inputs = prompt_batch(processor, spoken, [item.images for item, _ in asked]).to(model.device)
    lengths = torch.tensor([_answer_length(processor, item, turns) for (item, _), turns in zip(asked, spoken, strict=True)])
    longest = int(lengths.max())
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    logits = model(**inputs, position_ids=positions, logits_to_keep=longest + 1).logits[:, -longest - 1 : -1].float()
    told = logits.log_softmax(-1).gather(-1, inputs["input_ids"][:, -longest:, None]).squeeze(-1).cpu()
    of_answer = torch.arange(longest, 0, -1)[None] <= lengths[:, None]
    return -(told * of_answer).sum(1)


def _answer_length(processor: Any, item: Item, spoken: Sequence[Turn]) -> int:
    """How many tokens the answer adds to its prompt.

    Raises:   ValueError where the prompt is not the beginning of the whole: the loss would fall on other tokens
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    texts = rendered(processor, item.turns, len(item.images)), rendered(processor, spoken, len(item.images))
    prompt, whole = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
    if whole[: len(prompt)] != prompt or len(whole) == len(prompt):
        raise ValueError(f"the answer {spoken[-1].text!r} to {item.id} does not follow its prompt token by token")
    return len(whole) - len(prompt)


def _batches(items: Sequence[Item], size: int) -> list[list[int]]:
    """Indices in runs of one modality and about one length, at most `size` long."""
    order = sorted(range(len(items)), key=lambda i: (len(items[i].images), len(items[i].turns[-1].text.split()), i))
    batches: list[list[int]] = []
    for i in order:
        if batches and len(batches[-1]) < size and bool(items[batches[-1][0]].images) == bool(items[i].images):
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


@torch.inference_mode()
def continued(model: PreTrainedModel, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int) -> list[tuple[str, bool]]:
    """Greedy continuations of raw prompts as one batch, and whether the token limit cut them off.

    A prompt that begins with the tokenizer's BOS is taken as it is; any other gets one.
    """
    opening = tokenizer.bos_token or ""
    texts = [text if opening and text.startswith(opening) else opening + text for text in prompts]
    inputs = tokenizer(texts, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    made = model.generate(**inputs.to(model.device), max_new_tokens=max_new_tokens, do_sample=False, use_cache=True)
    new = made[:, inputs["input_ids"].shape[1] :]
    ends = model.generation_config.eos_token_id
    stop = torch.tensor(tokenizer.eos_token_id if ends is None else ends, device=new.device)
    ended = torch.isin(new, stop).any(1).tolist()
    return [(text, not done) for text, done in zip(tokenizer.batch_decode(new, skip_special_tokens=True), ended, strict=True)]


class Ensemble(torch.nn.Module):
    """Two models that speak as one: the next token's distribution is the mean of theirs, `ratio` the weight of the second.

    It is called, and generates, as a model does; greedily, with a cache for each member.
    """

    def __init__(self, first: PreTrainedModel, second: PreTrainedModel, ratio: float) -> None:
        super().__init__()
        self.members, self.ratio = torch.nn.ModuleList([first, second]), ratio
        self.generation_config, self.device = first.generation_config, first.device

    def forward(self, **inputs: Any) -> CausalLMOutput:
        """Shapes:   as the members'; the logits are log-probabilities"""
        return self._mean([member(**inputs) for member in self.members])

    def _mean(self, outputs: Sequence[Any]) -> CausalLMOutput:
        first, second = (out.logits.float().softmax(-1) for out in outputs)
        return CausalLMOutput(logits=torch.lerp(first, second, self.ratio).log())

    def generate(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, max_new_tokens: int, do_sample: bool, use_cache: bool,
        **pictures: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """Prompts and their greedy continuations; after a row's end it is padded.

        Shapes:   input_ids, attention_mask  [N, T]  ->  [N, T + up to max_new_tokens]
        Raises:   ValueError where it is to sample, or without its cache
        """
        if do_sample or not use_cache:
            raise ValueError("an ensemble speaks greedily and with its cache")
        stop, pad = self.generation_config.eos_token_id, self.generation_config.pad_token_id
        made, caches, ended = input_ids, [None, None], torch.zeros(len(input_ids), dtype=torch.bool)
        while made.shape[1] < input_ids.shape[1] + max_new_tokens and not ended.all():
            new = made if caches[0] is None else made[:, -1:]
            positions = (attention_mask.cumsum(1) - 1).clamp(min=0)[:, -new.shape[1] :]
            told = dict(input_ids=new, attention_mask=attention_mask, position_ids=positions, use_cache=True, logits_to_keep=1)
            shown = pictures if caches[0] is None else {}
            outputs = [m(**told, **shown, past_key_values=cache) for m, cache in zip(self.members, caches, strict=True)]
            caches = [out.past_key_values for out in outputs]
            chosen = self._mean(outputs).logits[:, -1].argmax(-1).masked_fill(ended, pad)
            ended = ended | (chosen == stop)
            made = torch.cat([made, chosen[:, None]], 1)
            attention_mask = torch.cat([attention_mask, torch.ones_like(attention_mask[:, :1])], 1)
        return made
