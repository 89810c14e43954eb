"""Responses from a model: batched and local, generated greedily or chosen by likelihood."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import logging

from vlsafe.core import store
from vlsafe.core.schema import Item, Response, Turn
from vlsafe.evaluation import decoding
from vlsafe.evaluation.judges.rules import SEEN
from vlsafe.models.chat import answer_tokens, prompt_batch

Progress = Callable[[int], None]
Text = tuple[str, bool, float | None]  # an answer, whether the token limit cut it off, the probability of a refusal's first word
# First words of refusals: Arditi et al. 2024 take "I" and "As" by model, the others are assumed. Answers may begin so too.
REFUSING = ("i", "i'm", "sorry", "as", "it", "it's", "unfortunately", "my")


class Kept:
    """Texts by item, in a file as they come, a line each: a killed examination goes on where it stopped. Without a file: none."""

    def __init__(self, file: Path | None = None) -> None:
        self.file, self.texts = file, dict[str, Text]()
        if file and store.whole_lines(file)[0]:  # what a kill has cut off goes
            rows = map(json.loads, file.read_text(encoding="utf-8").splitlines())
            self.texts = {row["item"]: (row["text"], row["truncated"], row.get("refusal")) for row in rows}

    def add(self, texts: Mapping[str, Text]) -> None:
        self.texts |= texts
        if self.file:
            names = ("text", "truncated", "refusal")
            rows = ({"item": item, **dict(zip(names, of, strict=True))} for item, of in texts.items())
            with open(self.file, "a", encoding="utf-8") as file:
                file.write("".join(f"{json.dumps(row)}\n" for row in rows))


def respond(
    model: PreTrainedModel, processor: Any, items: Sequence[Item], name: str, batch_size: int, max_new_tokens: int,
    progress: Progress = lambda n: None, kept: Kept | None = None,
) -> list[Response]:  # fmt: skip
    """Responses in the order of the items, each by its item's own scoring; of a ranked item, the letter of the chosen option.

    What is `kept` is not asked again.

    Units:    `max_new_tokens` tokens; progress counts items
    """
    kept = kept or Kept()
    written = [item for item in items if item.scoring == "generated"]
    ranked = [item for item in items if item.scoring == "likelihood" and item.id not in kept.texts]
    texts = iter(generate(model, processor, written, batch_size, max_new_tokens, progress, kept))
    losses = option_losses(model, processor, ranked, batch_size, lambda done: progress(len(items) - len(ranked) + done))
    kept.add({item.id: (ascii_uppercase[row.index(min(row))], False, None) for item, row in zip(ranked, losses, strict=True)})
    answers = (next(texts) if item.scoring == "generated" else kept.texts[item.id] for item in items)
    return [Response(item.id, item.benchmark, name, *answer) for item, answer in zip(items, answers, strict=True)]


@torch.inference_mode()
def generate(
    model: PreTrainedModel, processor: Any, items: Sequence[Item], batch_size: int, max_new_tokens: int, progress: Progress,
    kept: Kept | None = None,
) -> list[Text]:  # fmt: skip
    """Greedy texts, whether the token limit cut them off, and the probability that they refuse (`Response.refusal`).

    Items are batched with others of the same modality and about the same length, left-padded; the texts equal those of one
    prompt at a time (a test checks it). A batch that does not fit in memory is halved, and so are those after it.

    Raises:   torch.OutOfMemoryError where one prompt does not fit
    """
    tokenizer, kept = getattr(processor, "tokenizer", processor), kept or Kept()
    texts = {i: kept.texts[item.id] for i, item in enumerate(items) if item.id in kept.texts}
    decoder = _decoder(model, tokenizer)
    for batch in _batches(items, batch_size):
        waiting = [i for i in batch if i not in texts]
        while waiting:
            part = waiting[:batch_size]
            inputs = prompt_batch(processor, [items[i].turns for i in part], [items[i].images for i in part])
            new = _if_it_fits(lambda: _greedy(model, tokenizer, inputs, max_new_tokens, decoder), len(part))  # noqa: B023
            if new is None:
                batch_size, decoder = (len(part) + 1) // 2, _decoder(model, tokenizer)
                continue
            texts |= (found := {i: (text.strip(), cut, p) for i, (text, cut, p) in zip(part, new, strict=True)})
            kept.add({items[i].id: text for i, text in found.items()})
            waiting = waiting[len(part) :]
            progress(len(texts))
    return [text for _, text in sorted(texts.items())]


def _if_it_fits(attempt: Callable[[], list[Text]], n: int) -> list[Text] | None:
    """What an attempt at `n` prompts gives; None, with a line that says so, where they do not fit in memory together."""
    try:
        return attempt()
    except RuntimeError as error:
        if n == 1 or not should_reduce_batch_size(error):
            raise
    gc.collect()  # after the error is gone, whose traceback holds the tensors
    torch.cuda.empty_cache()
    logging.get_logger(__name__).warning(f"{n} prompts at a time do not fit in memory; going on with {(n + 1) // 2}")
    return None


@torch.inference_mode()
def complete(model: PreTrainedModel, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int) -> list[tuple[str, bool]]:
    """Greedy continuations of raw prompts as one batch, and whether the token limit cut them off.

    A prompt that begins with the tokenizer's BOS is taken as it is; any other gets one.
    """
    bos = tokenizer.bos_token or ""
    texts = [text if bos and text.startswith(bos) else bos + text for text in prompts]
    inputs = tokenizer(texts, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    return [(text, cut) for text, cut, _ in _greedy(model, tokenizer, inputs, max_new_tokens)]


PLAINLY = {"repetition_penalty": 1.0}  # whatever a model's makers recommend: the decoder for GPUs knows none


def _decoder(model: PreTrainedModel, tokenizer: Any) -> decoding.Decoder | None:
    """What decodes on a GPU. On a CPU the library's own way is faster: its cache grows, and there are no launches to save."""
    able = isinstance(model, PreTrainedModel) and decoding.able(model.config)
    if not able or model.device.type != "cuda":
        return None
    return decoding.Decoder(model, _stops(model, tokenizer), tokenizer.pad_token_id)


def _stops(model: PreTrainedModel, tokenizer: Any) -> torch.Tensor:
    """The tokens that end an answer."""
    eos = model.generation_config.eos_token_id
    return torch.tensor(tokenizer.eos_token_id if eos is None else eos, device=model.device).reshape(-1)


class _Refusing(LogitsProcessor):
    """Notes how probable a first word of refusals is at every step; the logits stay as they are."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens, self.steps = list(tokens), list[torch.Tensor]()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.steps.append(scores.float().softmax(-1)[:, self.tokens].sum(-1))
        return scores


def refusing(tokenizer: Any) -> list[int]:
    """The tokens that refusals begin with, as far as the tokenizer has them as words."""
    words = [form for word in REFUSING for form in (word, word.capitalize())]
    first = {tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in words}
    return sorted(first - {tokenizer.unk_token_id})


def _greedy(
    model: PreTrainedModel, tokenizer: Any, inputs: Any, max_new_tokens: int, decoder: decoding.Decoder | None = None
) -> list[Text]:
    inputs, note = inputs.to(model.device), _Refusing(refusing(tokenizer))
    if decoder is not None:
        new = decoder(dict(inputs), max_new_tokens)
        note(new, decoder.first)
    else:  # use_cache is explicit because trainers write use_cache=False into the configs of their checkpoints
        plainly = {**PLAINLY, "logits_processor": LogitsProcessorList([note])}
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, use_cache=True, **plainly)
        new = output[:, inputs["input_ids"].shape[1] :]
    ended = torch.isin(new, _stops(model, tokenizer)).any(1).tolist()
    texts = tokenizer.batch_decode(new, skip_special_tokens=True)
    steps = torch.stack(note.steps, 1).cpu()
    places = [
        len(tokenizer(seen[0], add_special_tokens=False)["input_ids"]) if (seen := SEEN.match(text)) else 0 for text in texts
    ]
    refusal = [float(row[place]) if place < len(row) else None for row, place in zip(steps, places, strict=True)]
    return [(text, not done, p) for text, done, p in zip(texts, ended, refusal, strict=True)]


@torch.inference_mode()
def option_losses(
    model: PreTrainedModel, processor: Any, items: Sequence[Item], batch_size: int, progress: Progress = lambda n: None
) -> list[list[float]]:
    """The model's total loss on each option of each item, as the assistant's answer to the item's prompt.

    A batch holds `batch_size` answers, so about a quarter as many items with four options; each prompt, with its pictures, is
    read once, and its options follow on its cache. The answer includes its EOS, as in training.

    Shapes:   N items of K options  ->  N lists of K
    Units:    nats, summed over the answer's tokens
    Source:   SEED-Bench ranks by LAVIS's losses: a sum (T5), or a mean over a common padded length (LLaMA); either
              ranks as the sum does
    """
    losses: dict[int, list[float]] = {}
    for batch in _batches(items, max(1, batch_size // max([len(item.options) for item in items], default=1))):
        values = iter(_answer_losses(model, processor, [items[i] for i in batch]).tolist())
        losses |= {i: [next(values) for _ in items[i].options] for i in batch}
        progress(len(losses))
    return [losses[i] for i in range(len(items))]


def perplexity(model: PreTrainedModel, processor: Any, items: Sequence[Item], batch_size: int) -> float:
    """Of the one option of each item, as the assistant's answer to its prompt.

    Units:    per token, the end of an answer included
    Raises:   ValueError for an answer that does not follow its prompt token by token
    """
    losses = option_losses(model, processor, items, batch_size)
    tokens = sum(len(_tokens(processor, item, option)) for item in items for option in item.options)
    return math.exp(sum(loss for (loss,) in losses) / tokens)


def follows(processor: Any, item: Item) -> bool:
    """Whether the first option of an item follows its prompt token by token: only then has it a loss of its own."""
    try:
        return bool(_tokens(processor, item, item.options[0]))
    except ValueError:
        return False


def _tokens(processor: Any, item: Item, option: str) -> list[int]:
    return answer_tokens(processor, (*item.turns, Turn("assistant", option)), len(item.images), item.id)


def _answer_losses(model: PreTrainedModel, processor: Any, items: Sequence[Item]) -> torch.Tensor:
    """Losses of one batch: items of N options together  ->  [N] nats. Prompts are padded on the left, answers on the right.

    Positions are counted from each row's first token, as generation counts them.
    """
    if any(item.images for item in items) and isinstance(model, PreTrainedModel) and model.config.model_type != "llava":
        raise ValueError(f"options beside pictures are ranked by models of the type 'llava', not by {model.config.model_type!r}")
    answers = [torch.tensor(_tokens(processor, item, option)) for item in items for option in item.options]
    tokens = torch.nn.utils.rnn.pad_sequence(answers, batch_first=True, padding_value=-1).to(model.device)
    of = torch.tensor([row for row, item in enumerate(items) for _ in item.options], device=model.device)
    inputs = prompt_batch(processor, [item.turns for item in items], [item.images for item in items]).to(model.device)
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    read = model(**inputs, position_ids=positions, use_cache=True, logits_to_keep=1)
    logits, before = read.logits[of].float(), tokens[:, :-1]
    if before.shape[1]:
        read.past_key_values.batch_select_indices(of)
        mask = torch.cat([inputs["attention_mask"][of], torch.ones_like(before)], 1)
        places = positions[of, -1:] + torch.arange(1, before.shape[1] + 1, device=model.device)
        cache = {"past_key_values": read.past_key_values, "use_cache": True}
        rest = model(input_ids=before.clamp(min=0), attention_mask=mask, position_ids=places, **cache).logits
        logits = torch.cat([logits, rest.float()], 1)
    log_probs = logits.log_softmax(-1).gather(-1, tokens.clamp(min=0)[..., None]).squeeze(-1)
    return -log_probs.masked_fill(tokens < 0, 0.0).sum(1).cpu()


def _batches(items: Sequence[Item], size: int) -> list[list[int]]:
    """Indices in batches of one modality and about one length, at most `size` long."""
    order = sorted(range(len(items)), key=lambda i: (len(items[i].images), len(items[i].turns[-1].text.split()), i))
    return [batch for _, run in groupby(order, key=lambda i: bool(items[i].images)) for batch in store.parts(list(run), size)]


class Ensemble(torch.nn.Module):
    """Two models as one: the next token's distribution is the mean of theirs, `ratio` the weight of the second.

    It is called, and generates, as a model does; greedily, with a cache for each member.
    """

    def __init__(self, first: PreTrainedModel, second: PreTrainedModel, ratio: float) -> None:
        super().__init__()
        self.members, self.ratio = torch.nn.ModuleList([first, second]), ratio
        self.generation_config, self.device = first.generation_config, first.device

    def forward(self, past_key_values: Caches | None = None, **inputs: Any) -> CausalLMOutputWithPast:
        """Shapes:   as the members'; the logits are log-probabilities, the cache is a list of theirs"""
        caches = past_key_values or [None] * len(self.members)
        outputs = [member(**inputs, past_key_values=cache) for member, cache in zip(self.members, caches, strict=True)]
        first, second = (out.logits.float().softmax(-1) for out in outputs)
        cached = Caches(out.past_key_values for out in outputs)
        return CausalLMOutputWithPast(logits=torch.lerp(first, second, self.ratio).log(), past_key_values=cached)

    def generate(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, max_new_tokens: int, do_sample: bool, use_cache: bool,
        logits_processor: LogitsProcessorList | None = None, **pictures: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """Prompts and their greedy continuations; after a row's end it is padded.

        Shapes:   input_ids, attention_mask  [N, T]  ->  [N, T + up to max_new_tokens]
        Raises:   ValueError where it is to sample, or without its cache
        """
        if do_sample or not use_cache:
            raise ValueError("an ensemble generates greedily and with its cache")
        stops = torch.as_tensor(self.generation_config.eos_token_id, device=input_ids.device)
        tokens, caches, ended = input_ids, None, torch.zeros_like(input_ids[:, 0], dtype=torch.bool)
        while tokens.shape[1] < input_ids.shape[1] + max_new_tokens and not ended.all():
            new = tokens[:, -1:] if caches else tokens
            positions = (attention_mask.cumsum(1) - 1).clamp(min=0)[:, -new.shape[1] :]
            inputs = dict(input_ids=new, attention_mask=attention_mask, position_ids=positions, **({} if caches else pictures))
            output = self(**inputs, use_cache=True, logits_to_keep=1, past_key_values=caches)
            caches = output.past_key_values
            logits = (logits_processor or LogitsProcessorList())(tokens, output.logits[:, -1])
            chosen = logits.argmax(-1).masked_fill(ended, self.generation_config.pad_token_id)
            ended = ended | torch.isin(chosen, stops)
            tokens = torch.cat([tokens, chosen[:, None]], 1)
            attention_mask = torch.cat([attention_mask, torch.ones_like(attention_mask[:, :1])], 1)
        return tokens


class Caches(list[Any]):
    """The caches of an ensemble's members, of which rows are selected as of one."""

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        for cache in self:
            cache.batch_select_indices(indices)
