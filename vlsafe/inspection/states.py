"""What happens inside: hidden states of the decoder blocks, and where in them a parent keeps its safety.

Layers are counted from 0 and bands are half-open. This room knows neither files nor what makes a prompt harmful.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch.nn import functional
from transformers import PreTrainedModel

from vlsafe.core.schema import Picture, Turn
from vlsafe.models.architectures import address, language_layers, read_out
from vlsafe.models.chat import last_positions, prompt_batch
from vlsafe.models.checkpoints import Place, language_places, read_tensor

Prompts = Sequence[tuple[Sequence[Turn], Sequence[Picture]]]
"""What is asked, and the pictures that go with it."""
Ends = tuple[Mapping[str, Place], Mapping[str, Place]]  # the weights that a task vector leads from and to
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@torch.inference_mode()
def last_states(model: PreTrainedModel, processor: Any, prompts: Prompts, batch_size: int = 64) -> torch.Tensor:
    """What every decoder block puts out at the last position of each prompt, taken by hooks.

    Shapes:   N prompts  ->  [N, L, D], before the final norm
    """
    return torch.cat([states[:, 1:] for states in streamed(model, processor, prompts, batch_size)])


@torch.inference_mode()
def streamed(model: PreTrainedModel, processor: Any, prompts: Prompts, batch_size: int = 64) -> Iterator[torch.Tensor]:
    """The states of one batch after the other: what enters the first block, then what every block puts out.

    Shapes:   N prompts  ->  batches [B, 1 + L, D] at the last position, on the processor
    """
    for start in range(0, len(prompts), batch_size):
        part = prompts[start : start + batch_size]
        inputs = prompt_batch(processor, [turns for turns, _ in part], [images for _, images in part])
        rows, last = torch.arange(len(part)), last_positions(inputs["attention_mask"])
        taken: list[torch.Tensor] = []
        with watched(model, lambda state: taken.append(state[rows, last].cpu())):  # noqa: B023 (called in this round only)
            model(**inputs.to(model.device), use_cache=False, logits_to_keep=1)
        yield torch.stack(taken, 1)


@contextmanager
def watched(model: PreTrainedModel, see: Callable[[torch.Tensor], None]) -> Iterator[None]:
    """Show the residual stream [B, T, D] to `see` where it enters the first block and where it leaves each one."""
    layers = language_layers(model)
    hooks = [layers[0].register_forward_pre_hook(lambda _, inputs: see(inputs[0]))]
    hooks += [layer.register_forward_hook(lambda _, __, out: see(out[0] if isinstance(out, tuple) else out)) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def keep_states(model: PreTrainedModel, processor: Any, prompts: Prompts, folder: Path, batch_size: int = 64) -> Path:
    """Write the states of prompts batch by batch, so that memory holds the model and one batch however many there are."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, states in enumerate(streamed(model, processor, prompts, batch_size)):
        save_file({"states": states.contiguous()}, folder / f"states-{number:05d}.safetensors")
    return folder


def kept_states(folder: Path, layer: int) -> torch.Tensor:
    """The states of all prompts in one layer; 0 is what enters the first block, `i + 1` what block i puts out.

    Shapes:   ->  [N, D]
    """
    parts = []
    for file in sorted(folder.glob("states-*.safetensors")):
        with safe_open(file, "pt") as tensors:
            parts.append(tensors.get_slice("states")[:, layer])
    return torch.cat(parts)


def centred(states: torch.Tensor, groups: np.ndarray) -> torch.Tensor:
    """States less the mean over the prompts of their group.

    Shapes:   states  [N, D],  groups  [N]  ->  [N, D]
    """
    out = states.clone()
    for group in np.unique(groups):
        of = torch.from_numpy(groups == group)
        out[of] -= states[of].mean(0)
    return out


def cka(a: torch.Tensor, b: torch.Tensor) -> float:
    """Linear centred kernel alignment of two sets of states of the same prompts; 1 where they differ by turn and scale alone.

    The estimate without bias: with the usual one, unrelated states of few prompts look alike.

    Shapes:   a  [N, D],  b  [N, E]  ->  at most 1
    Raises:   ValueError with fewer than four prompts, for which the estimate is not defined
    Source:   Kornblith et al. 2019; unbiased HSIC of Song et al. 2012, equation 5
    """
    if len(a) != len(b) or len(a) < 4:
        raise ValueError(f"CKA needs the same prompts on both sides, at least four, not {len(a)} and {len(b)}")
    k, m = ((x.double() @ x.double().T).fill_diagonal_(0) for x in (a, b))
    return float(_hsic(k, m) / (_hsic(k, k) * _hsic(m, m)).sqrt())


def _hsic(k: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    n = len(k)
    rows_k, rows_m = k.sum(0), m.sum(0)
    middle = rows_k.sum() * rows_m.sum() / ((n - 1) * (n - 2)) - 2 * (rows_k @ rows_m) / (n - 2)
    return ((k * m).sum() + middle) / (n * (n - 3))


def harm_scores(
    states: torch.Tensor, harmful: np.ndarray, clusters: np.ndarray, others: Sequence[torch.Tensor] = (), folds: int = 5
) -> list[np.ndarray]:
    """Held-out scores of a linear probe for harmfulness on `states`, and of the same probe read on other models' states.

    Folds hold out whole clusters, and a prompt is scored by the probe that has not seen its cluster.

    Shapes:   states, others  [N, D]  ->  1 + len(others) arrays [N], higher for harmful
    Raises:   ValueError where one side of the truth is missing, or clusters are fewer than folds
    """
    if harmful.all() or not harmful.any():
        raise ValueError("a probe needs harmful and harmless prompts")
    held, scores = GroupKFold(folds), [np.full(len(harmful), np.nan) for _ in range(1 + len(others))]
    for seen, unseen in held.split(states, harmful, clusters):
        fitted = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300)).fit(states[seen], harmful[seen])
        for told, of in zip(scores, (states, *others), strict=True):
            told[unseen] = fitted.decision_function(of[unseen])
    return scores


def drift(before: Mapping[str, Place], after: Mapping[str, Place], with_rank: bool = True) -> Iterator[dict[str, Any]]:
    """How far the weights of every block and module have moved, two tensors in memory at a time.

    One line per module: squared norms of its weights and of their change, their inner product, how many they are; for a
    matrix the effective rank of its change. Lines are summed by who reads them.

    Raises:   ValueError where the two models do not have the same language weights
    Source:   effective rank: exp of the entropy of the normalised singular values, Roy and Vetterli 2007
    """
    if set(before) != set(after):
        raise ValueError(f"the models have different language weights: {sorted(set(before) ^ set(after))[:6]}")
    for name in before:
        old, new = (read_tensor(side[name]).float() for side in (before, after))
        layer, module = address(name)
        moved = new - old
        rank = effective_rank(moved) if with_rank and moved.ndim == 2 and layer is not None else None
        yield {
            "layer": layer, "module": module, "weight": name, "norm": float(old.square().sum()),
            "norm_after": float(new.square().sum()), "inner": float((old * new).sum()),
            "change": float(moved.square().sum()), "n": moved.numel(), "rank": rank, "full_rank": min(moved.shape),
        }  # fmt: skip


def effective_rank(matrix: torch.Tensor) -> float:
    """exp of the entropy of the singular values as shares of their sum; 0 for a matrix of zeros."""
    values = torch.linalg.svdvals(matrix.double())
    if not values.sum() > 0:
        return 0.0
    share = values / values.sum()
    return float(torch.special.entr(share).sum().exp())


def alignment(a: Ends, b: Ends) -> Iterator[dict[str, Any]]:
    """Inner product and squared norms of two task vectors, each from a start to an end, per block and module.

    Lines can be added up before a cosine is taken; four tensors are in memory at a time.
    """
    for name in a[0]:
        first, second = (read_tensor(end[name]).float() - read_tensor(start[name]).float() for start, end in (a, b))
        layer, module = address(name)
        sizes = {"a": float(first.square().sum()), "b": float(second.square().sum()), "n": first.numel()}
        yield {"layer": layer, "module": module, "inner": float((first * second).sum()), **sizes}


def gram(files: Sequence[Path]) -> dict[int, np.ndarray]:
    """Inner products of gradients that lie in files, per block; as many tensors are in memory as there are files.

    Shapes:   F files  ->  layer -> [F, F]
    """
    places = [language_places(file) for file in files]
    found: dict[int, np.ndarray] = {}
    for name in places[0]:
        layer, _ = address(name)
        if layer is not None:
            rows = torch.stack([read_tensor(place[name]).double().flatten() for place in places])
            found[layer] = found.get(layer, 0) + (rows @ rows.T).numpy()
    return found


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
