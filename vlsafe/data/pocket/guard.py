"""A text guard where no package holds one: logistic regression on the states of the scale's own language model.

It keeps the first blocks of that model, so that a run's folder is all it needs. The interface is that of `data.guards`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import nn

from vlsafe import data
from vlsafe.core.schema import Turn
from vlsafe.models import architectures, checkpoints

BLOCKS = 0.4  # of the model's blocks; assumed: what is requested is known early, the words of an answer are chosen late
STRENGTH = 0.01  # of the regression's inverse regularisation: there are about as many states as conversations
BATCH = 32


class StatesGuard:
    """Unsafe where the probability is above `threshold`. A conversation is read as its texts, one a line; of the states after the
    kept blocks the mean of the request's and the mean of the answer's tokens count."""

    FILE = "states.safetensors"

    def __init__(self, model: Any, tokenizer: Any, weight: np.ndarray, bias: float, threshold: float = 0.5) -> None:
        self.model, self.tokenizer, self.weight, self.bias, self.threshold = model, tokenizer, weight, bias, threshold

    @classmethod
    def fitted(
        cls, model: Any, tokenizer: Any, conversations: Sequence[Sequence[Turn]], unsafe: Sequence[bool]
    ) -> StatesGuard:  # fmt: skip
        """Cut a language model off after its first blocks, and fit on labelled conversations."""
        decoder = architectures.language_part(model)
        kept = max(1, round(BLOCKS * len(decoder.layers)))
        decoder.layers = nn.ModuleList(decoder.layers[:kept])
        model.config.num_hidden_layers = kept
        guard, scaler = cls(model, tokenizer, np.zeros(0), 0.0), StandardScaler()
        states = scaler.fit_transform(guard.states(conversations))
        linear = LogisticRegression(C=STRENGTH, class_weight="balanced", max_iter=5000).fit(states, np.asarray(unsafe))
        guard.weight = linear.coef_[0] / scaler.scale_
        guard.bias = float(linear.intercept_[0] - guard.weight @ scaler.mean_)
        return guard

    def save(self, folder: Path) -> None:
        """Save the cut model as a checkpoint, and weights and threshold beside it."""
        checkpoints.save(self.model, folder, self.tokenizer)
        values = {"weight": self.weight, "bias": np.array([self.bias]), "threshold": np.array([self.threshold])}
        save_file({name: np.ascontiguousarray(value, dtype=np.float64) for name, value in values.items()}, folder / self.FILE)

    @classmethod
    def load(cls, folder: Path) -> StatesGuard:
        """Read what `save` wrote."""
        values, model = load_file(Path(folder) / cls.FILE), checkpoints.load(folder)
        bias, threshold = float(values["bias"][0]), float(values["threshold"][0])
        return cls(model, checkpoints.load_processor(folder), values["weight"], bias, threshold)

    @torch.inference_mode()
    def states(self, conversations: Sequence[Sequence[Turn]]) -> np.ndarray:
        """N conversations  ->  [N, 2 D]: the mean state of requests, that of answers (zero where there is none)."""
        return np.array(data.guards.assess_in_batches(self._means, conversations, BATCH))

    def _means(self, conversations: Sequence[Sequence[Turn]]) -> np.ndarray:
        pieces = [self._pieces(turns) for turns in conversations]
        ids = [[token for piece, _ in of for token in piece] for of in pieces]
        roles = [[role for piece, role in of for _ in piece] for of in pieces]
        longest = max(map(len, ids))
        tokens = torch.tensor([row + [0] * (longest - len(row)) for row in ids])
        role = torch.tensor([row + [-1] * (longest - len(row)) for row in roles])
        decoder, mask = architectures.language_part(self.model), (role >= 0).long()
        hidden = decoder(input_ids=tokens, attention_mask=mask).last_hidden_state
        means = [(hidden * (role == k)[..., None]).sum(1) / (role == k).sum(1).clamp(min=1)[:, None] for k in (0, 1)]
        return torch.cat(means, 1).numpy()

    def _pieces(self, turns: Sequence[Turn]) -> list[tuple[list[int], int]]:
        """Each turn's tokens and whether they are an answer's; system lines are left out."""
        said = [turn for turn in turns if turn.role != "system"]
        return [(self.tokenizer(f"{t.text}\n", add_special_tokens=False)["input_ids"], int(t.role == "assistant")) for t in said]

    def assess(self, conversations: Sequence[Sequence[Turn]]) -> list[Any]:
        """One assessment per conversation, in order."""
        if not conversations:
            return []
        found = expit(self.states(conversations).astype(float) @ self.weight + self.bias)
        return [data.guards.decided(True, ("harmful",), float(score)) for score in data.guards.relative(found, self.threshold)]


class ByWords:
    """In place of an image guard: pictures of packages were chosen by the words of their captions, and none is dropped."""

    def assess(self, pictures: Sequence[bytes]) -> list[Any]:
        """One assessment per picture: safe."""
        return [data.guards.Assessment(False, (), 0.0) for _ in pictures]
