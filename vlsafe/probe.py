"""What happens inside: hidden states of the decoder blocks, and where in them a parent keeps its safety.

Layers are counted from 0 and bands are half-open. This room knows neither files nor what makes a prompt harmful.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers import PreTrainedModel

from vlsafe.chat import last_positions, prompt_batch
from vlsafe.models import language_layers, read_out
from vlsafe.schema import Turn

Prompts = Sequence[tuple[Sequence[Turn], Sequence[bytes]]]
"""What is asked, and the pictures that go with it."""
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@torch.inference_mode()
def last_states(model: PreTrainedModel, processor: Any, prompts: Prompts, batch_size: int = 64) -> torch.Tensor:
    """What every decoder block puts out at the last position of each prompt, taken by hooks.

    Shapes:   N prompts  ->  [N, L, D], before the final norm
    """
    taken: list[torch.Tensor] = []
    parts = []
    hooks = [
        layer.register_forward_hook(lambda _, __, out: taken.append(out[0] if isinstance(out, tuple) else out))
        for layer in language_layers(model)
    ]
    try:
        for start in range(0, len(prompts), batch_size):
            part = prompts[start : start + batch_size]
            inputs = prompt_batch(processor, [turns for turns, _ in part], [images for _, images in part])
            taken.clear()
            model(**inputs.to(model.device), use_cache=False)
            rows, last = torch.arange(len(part)), last_positions(inputs["attention_mask"])
            parts.append(torch.stack([state[rows, last] for state in taken], 1))
    finally:
        for hook in hooks:
            hook.remove()
    return torch.cat(parts)


def pair_cosines(a: torch.Tensor, b: torch.Tensor, draws: int, rng: np.random.Generator) -> np.ndarray:
    """Mean cosine of random pairs, one of `a` and one of `b`, never a prompt with itself, per layer.

    Shapes:   a  [N, L, D],  b  [M, L, D]  ->  [L]
    Draws:    `draws` pairs from `rng`
    Source:   Li et al. 2024 (arXiv 2408.17003), existence of safety layers; 500 pairs there
    """
    i, j = rng.integers(len(a), size=draws), rng.integers(len(b), size=draws)
    if a is b:
        j = (i + 1 + rng.integers(len(a) - 1, size=draws)) % len(a)
    return functional.cosine_similarity(a[i], b[j], dim=-1).mean(0).numpy()


def angular_gap(normal: torch.Tensor, harmful: torch.Tensor, draws: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """N–N, M–M and N–M cosines and the angle by which N–M is wider than N–N, per layer.

    Shapes:   normal  [N, L, D],  harmful  [M, L, D]  ->  four arrays [L]
    Units:    gap: degrees
    Source:   Li et al. 2024, section 3: arccos of the mean cosines, in degrees
    """
    found = {
        "normal_normal": pair_cosines(normal, normal, draws, rng),
        "harmful_harmful": pair_cosines(harmful, harmful, draws, rng),
        "normal_harmful": pair_cosines(normal, harmful, draws, rng),
    }
    angles = {name: np.degrees(np.arccos(np.clip(values, -1, 1))) for name, values in found.items()}
    return {**found, "gap": angles["normal_harmful"] - angles["normal_normal"]}


@contextmanager
def scaled(model: PreTrainedModel, band: tuple[int, int], factor: float) -> Iterator[None]:
    """The projection weights of the blocks of a band multiplied by a factor, and put back bit for bit afterwards."""
    weights = [
        module.weight
        for layer in language_layers(model)[band[0] : band[1]]
        for name, module in layer.named_modules()
        if name.rpartition(".")[2] in PROJECTIONS
    ]
    kept = [weight.detach().clone() for weight in weights]
    try:
        with torch.no_grad():
            for weight in weights:
                weight.mul_(factor)
        yield
    finally:
        with torch.no_grad():
            for weight, value in zip(weights, kept, strict=True):
                weight.copy_(value)


@dataclass(frozen=True)
class Located:
    """A safety band `[start, end)`, or None where none was found, and why.

    `counts` holds (start, end, factor, refusals) of every scaling tried; the unscaled model is (0, 0, 1.0, refusals).
    """

    band: tuple[int, int] | None
    reason: str
    counts: tuple[tuple[int, int, float, int], ...]


def localise(gap: np.ndarray, refusals: Callable[[tuple[int, int], float], int], factors: Sequence[float]) -> Located:
    """Find the band whose scaling makes a parent refuse most harmless prompts.

    Start at the layer where the angular gap grows fastest; move the upper end until refusals peak, then the lower one.
    The first factor that moves any refusal is used; where none does, nothing is located.

    Shapes:   gap  [L];  `refusals(band, factor)` counts refused harmless prompts
    Source:   Li et al. 2024, section 4.2, progressive localisation (factor 1.1 in the released script)
    Departs:  larger factors are tried where 1.1 moves nothing; ties go to the narrower band
    """
    n, start = len(gap), int(np.argmax(np.diff(gap, prepend=0.0)))
    plain = refusals((0, 0), 1.0)
    counts = [(0, 0, 1.0, plain)]

    def tried(bands: Sequence[tuple[int, int]], factor: float) -> tuple[int, int]:
        found = [(refusals(band, factor), band) for band in bands]
        counts.extend((*band, factor, count) for count, band in found)
        return max(found, key=lambda pair: (pair[0], pair[1][0] - pair[1][1]))[1]

    for factor in factors:
        first = tried([(start, end) for end in range(start + 1, n + 1)], factor)
        band = tried([(begin, first[1]) for begin in range(first[1])], factor)
        if max(count for *_, used, count in counts if used == factor) > plain:
            return Located(band, f"scaling by {factor} moves refusals most in [{band[0]}, {band[1]})", tuple(counts))
    return Located(None, f"no scaling up to {max(factors)} adds a refusal of a harmless prompt", tuple(counts))


@torch.inference_mode()
def refusal_by_layer(model: PreTrainedModel, processor: Any, prompts: Prompts, starts: Sequence[str]) -> torch.Tensor:
    """How likely every layer, read as if it were the last one, finds an answer that starts like a refusal (logit lens).

    It is the probability of the *first token* of the answer, added up over the first tokens of `starts`, in lower case and
    capitalised; starts that the tokenizer does not know are left out. A token that also begins other answers ("i") counts
    whole, so a layer's number is an upper bound; the last layer's is what the model says.

    Shapes:   N prompts  ->  [N, L], fractions in [0, 1]
    Source:   nostalgebraist 2020, the logit lens: final norm and head applied to what a block puts out
    Raises:   ValueError where the tokenizer knows no start
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    spoken = {form for start in starts for form in (start, start.capitalize())}
    first = {tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in spoken} - {tokenizer.unk_token_id}
    if not first:
        raise ValueError(f"the tokenizer knows no first word of the refusals {list(starts)[:3]} …; name some that it has")
    return read_out(model, last_states(model, processor, prompts)).softmax(-1)[..., sorted(first)].sum(-1)
