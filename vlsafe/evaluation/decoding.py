"""Greedy decoding with a cache of fixed size, whose step is captured once as a CUDA graph and replayed.

A step of a model of seven billion weights is a thousand small kernels: launched one by one they take fifteen times as long as
reading the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel, StaticCache

BLOCK = 128  # the cache's length is a multiple of it, so that one captured step serves prompts of several lengths
EAGER = 4  # steps of a batch before its step is captured; they also warm up what must not happen while capturing
PLAIN = ("llama", "qwen2")  # decoders that were compared with the library's own decoding
LOOK = 8  # steps between two looks at whether all rows have ended: each waits for the GPU


def able(config: Any) -> bool:
    """Whether a model's positions and masks are those of this file: neither windows nor cross-attention nor positions in three
    dimensions. The others decode in the library's own way."""
    return config.model_type in ("llava", *PLAIN) and config.get_text_config().model_type in PLAIN


class Decoder:
    """Decodes batch after batch; batches of one size and about one length share a cache and a captured step."""

    def __init__(self, model: PreTrainedModel, stop: torch.Tensor, pad: int) -> None:
        self.model, self.stop, self.pad = model, stop.to(model.device), pad
        self.shape, self.replay = (0, 0), None

    def __call__(self, inputs: dict[str, torch.Tensor], max_new_tokens: int) -> torch.Tensor:
        """New tokens of left-padded prompts; after its end a row is padded.

        Shapes:   input_ids, attention_mask  [N, T]  ->  [N, up to max_new_tokens]
        """
        ids, seen = inputs["input_ids"], inputs["attention_mask"].bool()
        rest = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
        self._start(seen, max_new_tokens)
        positions = (seen.cumsum(1) - 1).clamp(min=0)
        out = self.model(input_ids=ids, attention_mask=seen.long(), position_ids=positions, past_key_values=self.cache,
                         use_cache=True, logits_to_keep=1, **rest)  # fmt: skip
        self.position.copy_(positions[:, -1:])
        self.first = out.logits[:, -1]
        self._choose(out.logits)
        for done in range(1, max_new_tokens):
            if done % LOOK == 1 and self.ended.all():
                break
            self._advance(done)
        return self.written[:, : int(self.count)]

    def _start(self, seen: torch.Tensor, new: int) -> None:
        """Empty buffers for one batch. New ones where the last have another shape, whose step is then captured again."""
        (rows, start), device = seen.shape, seen.device
        length = -(-(start + new) // BLOCK) * BLOCK
        if self.shape != (rows, length):
            self.shape, self.replay = (rows, length), None
            self.cache = StaticCache(config=self.model.config, max_cache_len=length)
            self.token, self.position, self.ended = (torch.zeros(rows, 1, dtype=kind, device=device)
                                                     for kind in (torch.long, torch.long, torch.bool))  # fmt: skip
            self.written = torch.zeros(rows, length, dtype=torch.long, device=device)
            self.hidden = torch.zeros(rows, 1, 1, length, dtype=self.model.dtype, device=device)
            self.count, self.slot = (torch.zeros(1, dtype=torch.long, device=device) for _ in range(2))
        self.cache.reset()
        self.ended.zero_()
        self.count.zero_()
        self.slot.fill_(start)
        self.written.fill_(self.pad)
        self.hidden.fill_(-torch.inf)
        self.hidden[..., :start].masked_fill_(seen[:, None, None], 0)

    def _choose(self, logits: torch.Tensor) -> None:
        """Note the likeliest token of every row that has not ended."""
        token = logits[:, -1:].argmax(-1).masked_fill(self.ended, self.pad)
        self.ended.logical_or_((token == self.stop).any(1, keepdim=True))
        self.token.copy_(token)
        self.written.index_copy_(1, self.count, token)
        self.count.add_(1)

    def _step(self) -> None:
        """One token of every row. All that changes is changed in place, on the GPU."""
        self.position.add_(1)
        self.hidden.index_fill_(3, self.slot, 0)
        self.slot.add_(1)
        out = self.model(input_ids=self.token, attention_mask=self.hidden, position_ids=self.position, past_key_values=self.cache,
                         use_cache=True, logits_to_keep=1)  # fmt: skip
        self._choose(out.logits)

    def _advance(self, done: int) -> None:
        if self.token.is_cuda and self.replay is None and done > EAGER:
            self.replay = _captured(self._step)
        (self.replay or self._step)()


def _captured(step: Callable[[], None]) -> Any:
    """A step as a graph; capturing runs none of its kernels."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
