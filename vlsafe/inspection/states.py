"""Hidden states of the decoder blocks, how alike two models are in them, how weights change, where a parent keeps its safety.

Layers are counted from 0 and bands are half-open. A pair of models is two folders of kept states of the same prompts, "own" and
"reference"; one layer of both is in memory. What is known about the prompts is a frame with the columns item, cluster, group
(the modality) and harmful. This module knows neither the run store nor what makes a prompt harmful.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import LlavaProcessor, PreTrainedModel

from vlsafe.core.schema import Picture, Turn
from vlsafe.models import checkpoints, devices
from vlsafe.models.architectures import PROJECTIONS, address, language_layers, read_out
from vlsafe.models.chat import last_positions, prompt_batch
from vlsafe.models.checkpoints import Place, as_tied, language_places, read_tensor, shared_rows

Prompts = Sequence[tuple[Sequence[Turn], Sequence[Picture]]]  # turns, and the pictures that go with them
Pair = Mapping[str, Path]
JACKKNIFE = 20  # groups of clusters that are left out in turn for the standard error of CKA


@torch.inference_mode()
def last_states(model: PreTrainedModel, processor: Any, prompts: Prompts, batch_size: int = 64) -> torch.Tensor:
    """The output [N, L, D] of every decoder block at the last position of N prompts, before the final norm."""
    return torch.cat([states[:, 1:] for states in streamed(model, processor, prompts, batch_size)])


@torch.inference_mode()
def streamed(model: PreTrainedModel, processor: Any, prompts: Prompts, batch_size: int = 64) -> Iterator[torch.Tensor]:
    """One batch [B, 1 + L, D] after the other, on the CPU, at the last position: the input of the first block, every output."""
    for part in _batches(processor, prompts, batch_size):
        inputs = prompt_batch(processor, [turns for turns, _ in part], [images for _, images in part])
        rows, last = torch.arange(len(part)), last_positions(inputs["attention_mask"])
        states: list[torch.Tensor] = []
        with hooked(model, lambda state: states.append(state[rows, last].float().cpu())):  # noqa: B023 (called in this round only)
            model(**inputs.to(model.device), use_cache=False, logits_to_keep=1)
        yield torch.stack(states, 1)


def _batches(processor: Any, prompts: Prompts, size: int) -> Iterator[Prompts]:
    """Prompts in their order; with pictures and without apart, unless the processor takes both at once, as LLaVA's does."""
    apart = not isinstance(processor, LlavaProcessor)
    for _, run in groupby(prompts, key=lambda prompt: apart and bool(prompt[1])):
        of = list(run)
        yield from (of[start : start + size] for start in range(0, len(of), size))


@contextmanager
def hooked(model: PreTrainedModel, visit: Callable[[torch.Tensor], torch.Tensor | None],
           layers: Sequence[int] | None = None, entering: bool = True) -> Iterator[None]:  # fmt: skip
    """Call `visit` with the residual stream [B, T, D] where it enters the first block and leaves the given ones (None: all).
    A tensor that it returns replaces the stream there."""

    def visited(value: Any) -> Any:  # the stream, or a tuple that starts with it
        if not isinstance(value, tuple):
            return visit(value)
        state = visit(value[0])
        return None if state is None else (state, *value[1:])

    blocks = language_layers(model)
    chosen = blocks if layers is None else [blocks[layer] for layer in layers]
    hooks = [block.register_forward_hook(lambda _, __, out: visited(out)) for block in chosen]
    if entering:
        hooks.append(blocks[0].register_forward_pre_hook(lambda _, inputs: visited(inputs)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def replaced(weights: Collection[torch.Tensor], values: Iterable[torch.Tensor]) -> Iterator[None]:
    """Give weights other values, and put their own back bit for bit afterwards, also after an error."""

    @torch.no_grad()
    def put(values: Iterable[torch.Tensor]) -> None:
        for weight, value in zip(weights, values, strict=True):
            weight.copy_(value)

    own = [weight.detach().clone() for weight in weights]
    try:
        put(values)
        yield
    finally:
        put(own)


def keep_states(model: PreTrainedModel, processor: Any, prompts: Prompts, folder: Path, batch_size: int = 64) -> Path:
    """Write the states of prompts batch by batch, so that memory holds the model and one batch however many there are."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, states in enumerate(streamed(model, processor, prompts, batch_size)):
        save_file({"states": states.contiguous()}, folder / f"states-{number:05d}.safetensors")
    return folder


def kept_states(folder: Path, layer: int) -> torch.Tensor:
    """The kept states [N, D] of all prompts in one layer; 0 is the input of the first block, `i + 1` the output of block i."""
    files = sorted(folder.glob("states-*.safetensors"))
    return torch.cat([safe_open(file, "pt").get_slice("states")[:, layer] for file in files])


def centred(states: torch.Tensor, groups: np.ndarray) -> torch.Tensor:
    """States [N, D] less the mean over the prompts of their group [N]."""
    out = states.clone()
    for group in np.unique(groups):
        of = torch.from_numpy(groups == group)
        out[of] -= states[of].mean(0)
    return out


def similarity(states_a: torch.Tensor, states_b: torch.Tensor) -> torch.Tensor:
    """Mean cosine [L] between the states [N, L, D] of the same prompts in two models, per layer.

    Raises:   ValueError where the shapes differ
    Departs:  Li et al. 2024 compare different prompts in one model (`pair_cosines`), here it is one prompt in two models
    """
    if states_a.shape != states_b.shape:
        raise ValueError(f"similarity needs the same prompts and layers, not {list(states_a.shape)} and {list(states_b.shape)}")
    return torch.cosine_similarity(states_a, states_b, dim=-1).mean(0)


def cka(a: torch.Tensor, b: torch.Tensor) -> float:
    """Linear centred kernel alignment of states [N, D] and [N, E] of the same prompts; 1 where they differ by rotation and scale
    alone. The estimate is unbiased: with the usual one, unrelated states of few prompts look alike.

    Raises:   ValueError with fewer than four prompts, for which the estimate is not defined
    Source:   Kornblith et al. 2019; unbiased HSIC of Song et al. 2012, equation 5
    """
    if len(a) != len(b) or len(a) < 4:
        raise ValueError(f"CKA needs the same prompts on both sides, at least four, not {len(a)} and {len(b)}")
    k, m = ((x.double() @ x.double().T).fill_diagonal_(0) for x in (a, b))
    return float(_hsic(k, m) / (_hsic(k, k) * _hsic(m, m)).sqrt())


def _hsic(k: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    n, rows_k, rows_m = len(k), k.sum(0), m.sum(0)
    middle = rows_k.sum() * rows_m.sum() / ((n - 1) * (n - 2)) - 2 * (rows_k @ rows_m) / (n - 2)
    return ((k * m).sum() + middle) / (n * (n - 3))


def harm_scores(states: torch.Tensor, harmful: np.ndarray, clusters: np.ndarray, others: Sequence[torch.Tensor] = (),
                folds: int = 5) -> list[np.ndarray]:  # fmt: skip
    """Held-out scores of a linear probe for harmfulness on `states`, and of the same probe read on other models' states. A prompt
    is scored by the probe that was not fitted on its cluster.

    Shapes:   states, others  [N, D]  ->  1 + len(others) arrays [N], higher for harmful
    Raises:   ValueError where one class is missing, or clusters are fewer than folds
    """
    if harmful.all() or not harmful.any():
        raise ValueError("a probe needs harmful and harmless prompts")
    scores = [np.full(len(harmful), np.nan) for _ in range(1 + len(others))]
    split = GroupKFold if len(harmful) > 100 else StratifiedGroupKFold  # scores of folds with unequal classes are put together
    for train, test in split(folds).split(states, harmful, clusters):
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300)).fit(states[train], harmful[train])
        for values, side in zip(scores, (states, *others), strict=True):
            values[test] = probe.decision_function(side[test])
    return scores


def keep_pair(folder: Path, parent: Path, prompts: Prompts, work: Path, batch_size: int) -> Pair:
    """Write the states of a model and of its reference: the parent's language weights with the model's tower and projector."""
    model, processor = checkpoints.load(folder).to(devices.device()), checkpoints.load_processor(folder)
    shutil.rmtree(work, ignore_errors=True)  # a killed attempt may have left more batches
    own = keep_states(model, processor, prompts, work / "own", batch_size)
    checkpoints.put_language(model, checkpoints.language_places(parent))  # streamed over the model's own: one model is in memory
    return {"own": own, "reference": keep_states(model, processor, prompts, work / "reference", batch_size)}


def _layers(pair: Pair) -> Iterator[tuple[int, dict[str, torch.Tensor], dict[str, torch.Tensor]]]:
    """Number, states and increments [N, D] of every block, of both models."""
    _, outputs, _ = safe_open(next(pair["own"].glob("*.safetensors")), "pt").get_slice("states").get_shape()
    before = {name: kept_states(folder, 0) for name, folder in pair.items()}
    for layer in range(outputs - 1):
        now = {name: kept_states(folder, layer + 1) for name, folder in pair.items()}
        yield layer, now, {name: now[name] - before[name] for name in pair}
        before = now


def compare_prompts(pair: Pair, prompts: pd.DataFrame, directions: Mapping[str, torch.Tensor],
                    probes: bool = True) -> pd.DataFrame:  # fmt: skip
    """One row per layer × prompt: cosines of states and of increments, projections on the direction, scores of the probes.

    A projection is 0 at the mean of harmless prompts, where the direction [L, D] starts, and 1 at that of harmful ones.
    """
    frames, groups = [], prompts["group"].to_numpy()
    for layer, now, increments in _layers(pair):
        columns = _cosines("cosine", **now, groups=groups) | _cosines("increment", **increments, groups=groups)
        axis, origin = directions["direction"][layer], directions["harmless"][layer]
        for name, side in (("projection", "own"), ("projection_reference", "reference")):
            columns[name] = ((now[side] - origin) @ axis / (axis @ axis)).numpy()
        columns |= probe_scores(**now, prompts=prompts) if probes else {}
        frames.append(prompts.assign(layer=layer, **columns))
    return pd.concat(frames)


def compare_states(own: torch.Tensor, reference: torch.Tensor, prompts: pd.DataFrame) -> pd.DataFrame:
    """Cosines of two models' states [N, L, D], one row per layer × prompt; all prompts are one group."""
    group, layers = np.zeros(len(prompts)), range(own.shape[1])
    return pd.concat(prompts.assign(layer=i, **_cosines("cosine", own[:, i], reference[:, i], group)) for i in layers)


def _cosines(name: str, own: torch.Tensor, reference: torch.Tensor, groups: np.ndarray) -> dict[str, np.ndarray]:
    """Cosines [N] of states [N, D], raw and less the mean of each prompt's group."""
    sides = {name: (own, reference), f"{name}_centred": [centred(side, groups) for side in (own, reference)]}
    return {column: torch.cosine_similarity(*pair, dim=-1).numpy() for column, pair in sides.items()}


def probe_scores(own: torch.Tensor, reference: torch.Tensor, prompts: pd.DataFrame) -> dict[str, np.ndarray]:
    """Held-out scores [N] of probes for harm, one per group: the model's, the reference's, and the latter's on the model."""
    scores = {name: np.full(len(prompts), np.nan) for name in ("probe_own", "probe_reference", "probe_transferred")}
    for rows in prompts.groupby("group").indices.values():
        harmful, clusters = (prompts[name].to_numpy()[rows] for name in ("harmful", "cluster"))
        a, b = own[rows].numpy(), reference[rows].numpy()
        (scores["probe_own"][rows],) = harm_scores(a, harmful, clusters)
        scores["probe_reference"][rows], scores["probe_transferred"][rows] = harm_scores(b, harmful, clusters, [a])
    return scores


def compare_sets(pair: Pair, prompts: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """CKA per layer × group, with its jackknife standard error over groups of clusters."""
    fold = np.unique(prompts["cluster"].astype(str), return_inverse=True)[1] % JACKKNIFE
    for layer, now, _ in _layers(pair):
        for group, rows in sorted(prompts.groupby("group").indices.items()):
            kept = (rows[fold[rows] != left_out] for left_out in np.unique(fold[rows]))
            whole, *without = (cka(now["own"][part], now["reference"][part]) for part in (rows, *kept))
            error = float(np.sqrt((len(without) - 1) * np.var(without)))
            yield {"layer": layer, "group": group, "cka": whole, "error": error, "n": len(rows)}


def drift(before: Mapping[str, Place], after: Mapping[str, Place], with_rank: bool = True) -> Iterator[dict[str, Any]]:
    """How far every language weight has moved, a row each, two tensors in memory at a time; squared norms can be added up.
    Of embedding and head, the rows that both models have are compared.

    Raises:   ValueError where the two models do not have the same language weights
    Source:   effective rank: exp of the entropy of the normalised singular values, Roy and Vetterli 2007
    """
    before, after = as_tied(before, after), as_tied(after, before)
    if set(before) != set(after):
        raise ValueError(f"the models have different language weights: {sorted(set(before) ^ set(after))[:6]}")
    for name in before:
        old, new = shared_rows(name, *(read_tensor(side[name]).float() for side in (before, after)))
        layer, module = address(name)
        change = new - old
        rank = effective_rank(change) if with_rank and change.ndim == 2 and layer is not None else None
        yield {
            "layer": layer, "module": module, "weight": name, "norm": float(old.square().sum()),
            "norm_after": float(new.square().sum()), "inner": float((old * new).sum()),
            "change": float(change.square().sum()), "n": change.numel(), "rank": rank, "full_rank": min(change.shape),
        }  # fmt: skip


def effective_rank(matrix: torch.Tensor) -> float:
    """exp of the entropy of the singular values as shares of their sum; 0 for a matrix of zeros."""
    values = torch.linalg.svdvals(matrix.double().to(devices.device()))
    return float(torch.special.entr(values / values.sum()).sum().exp()) if values.sum() > 0 else 0.0


def alignment(a: Sequence[Mapping[str, Place]], b: Sequence[Mapping[str, Place]]) -> Iterator[dict[str, Any]]:
    """Inner product and squared norms of two task vectors (start, end), a row per weight, to be added up before a cosine."""
    for name in a[0]:
        first, second = (read_tensor(end[name]).float() - read_tensor(start[name]).float() for start, end in (a, b))
        layer, module = address(name)
        sizes = {"a": float(first.square().sum()), "b": float(second.square().sum()), "n": first.numel()}
        yield {"layer": layer, "module": module, "inner": float((first * second).sum()), **sizes}


def gram(files: Sequence[Path]) -> dict[int, np.ndarray]:
    """Inner products [F, F] of the gradients stored in F files, per block; as many tensors are in memory as there are files."""
    places = [language_places(file) for file in files]
    products: dict[int, np.ndarray] = {}
    for name in places[0]:
        if (layer := address(name)[0]) is not None:
            rows = torch.stack([read_tensor(place[name]).double().flatten() for place in places])
            products[layer] = products.get(layer, 0) + (rows @ rows.T).numpy()
    return products


def compare_gradients(files: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """Cosines of every two gradients per block; files are called `<task>-<number>`."""
    tasks = [file.name.split("-")[0] for file in files]
    for layer, products in gram(files).items():
        size = np.sqrt(np.diag(products))
        cosines = products / np.outer(size, size)
        for b, a in np.argwhere(np.tri(len(files), k=-1)).tolist():
            yield {"layer": layer, "a": a, "b": b, "task_a": tasks[a], "task_b": tasks[b], "cosine": float(cosines[b, a])}


def pair_cosines(a: torch.Tensor, b: torch.Tensor, draws: int, rng: np.random.Generator) -> np.ndarray:
    """Mean cosine [L] of random pairs, one of `a` [N, L, D] and one of `b` [M, L, D], never a prompt with itself.

    Draws:    `draws` pairs from `rng`
    Source:   Li et al. 2024 (arXiv 2408.17003), existence of safety layers; 500 pairs there
    """
    i, j = rng.integers(len(a), size=draws), rng.integers(len(b), size=draws)
    if a is b:
        j = (i + 1 + rng.integers(len(a) - 1, size=draws)) % len(a)
    return similarity(a[i], b[j]).numpy()


def angular_gap(normal: torch.Tensor, harmful: torch.Tensor, draws: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """N–N, M–M and N–M cosines and the angle by which N–M is wider than N–N, per layer.

    Shapes:   normal  [N, L, D],  harmful  [M, L, D]  ->  four arrays [L]
    Source:   Li et al. 2024, section 3: arccos of the mean cosines, in degrees
    """
    pairs = {"normal_normal": (normal, normal), "harmful_harmful": (harmful, harmful), "normal_harmful": (normal, harmful)}
    cosines = {name: pair_cosines(a, b, draws, rng) for name, (a, b) in pairs.items()}
    angles = {name: np.degrees(np.arccos(np.clip(values, -1, 1))) for name, values in cosines.items()}
    return {**cosines, "gap": angles["normal_harmful"] - angles["normal_normal"]}


def scaled(model: PreTrainedModel, band: tuple[int, int], factor: float) -> AbstractContextManager[None]:
    """Multiply the projection weights of a band's blocks by a factor for the time of a `with` block."""
    modules = [item for layer in language_layers(model)[band[0] : band[1]] for item in layer.named_modules()]
    weights = [module.weight for name, module in modules if name.rpartition(".")[2] in PROJECTIONS]
    return replaced(weights, (weight * factor for weight in weights))


class Located(NamedTuple):
    """A safety band `[start, end)`, or None where none was found, and why."""

    band: tuple[int, int] | None
    reason: str
    counts: tuple[tuple[int, int, float, int], ...]  # (start, end, factor, refusals) per scaling; unscaled: (0, 0, 1.0, refusals)


def localise(gap: np.ndarray, refusals: Callable[[tuple[int, int], float], int], factors: Sequence[float]) -> Located:
    """Find the band whose scaling makes a parent refuse most harmless prompts, by the first factor that adds a refusal.

    Start at the layer where the angular gap grows fastest; move the upper end until refusals peak, then the lower one.

    Shapes:   gap  [L];  `refusals(band, factor)` counts refused harmless prompts
    Source:   Li et al. 2024, section 4.2, progressive localisation (factor 1.1 in the released script)
    Departs:  larger factors are tried where 1.1 adds none; ties go to the narrower band
    """
    n, start, unscaled = len(gap), int(np.argmax(np.diff(gap, prepend=0.0))), refusals((0, 0), 1.0)
    counts = [(0, 0, 1.0, unscaled)]

    def best(bands: Sequence[tuple[int, int]], factor: float) -> tuple[int, int]:
        results = [(refusals(band, factor), band) for band in bands]
        counts.extend((*band, factor, count) for count, band in results)
        return max(results, key=lambda pair: (pair[0], pair[1][0] - pair[1][1]))[1]

    for factor in factors:
        first = best([(start, end) for end in range(start + 1, n + 1)], factor)
        band = best([(begin, first[1]) for begin in range(first[1])], factor)
        if max(count for *_, used, count in counts if used == factor) > unscaled:
            return Located(band, f"scaling by {factor} moves refusals most in [{band[0]}, {band[1]})", tuple(counts))
    return Located(None, f"no scaling up to {max(factors)} adds a refusal of a harmless prompt", tuple(counts))


def by_chance(
    scaled: np.ndarray, unscaled: np.ndarray, clusters: np.ndarray, rng: np.random.Generator, draws: int = 1999
) -> float:
    """p-value of the best of all scaled bands: how often as many more prompts are refused than without scaling, where each
    cluster's differences, of all bands together, could as well have the other sign.

    Shapes:   scaled  [B, N], whether prompts are refused with each band scaled;  unscaled, clusters  [N]
    Draws:    from `rng` only; the observed signs are one of them
    """
    of = np.stack([(scaled.astype(int) - unscaled)[:, clusters == cluster].sum(1) for cluster in np.unique(clusters)])
    flipped = (rng.choice([-1, 1], (draws, len(of))) @ of).max(1)
    return float((1 + (flipped >= of.sum(0).max()).sum()) / (1 + draws))


@torch.inference_mode()
def refusal_by_layer(model: PreTrainedModel, processor: Any, prompts: Prompts, starts: Sequence[str]) -> torch.Tensor:
    """The probability [N, L] that an answer starts like a refusal, every layer read as if it were the last one (logit lens).

    It is the probability of the *first token* of the answer, added up over the first tokens of `starts`, in lower case and
    capitalised; starts that the tokenizer does not know are left out. A token that also begins other answers ("i") counts
    in full, so a layer's number is an upper bound; the last layer's is the model's own.

    Source:   nostalgebraist 2020, the logit lens: final norm and head applied to what a block puts out
    Raises:   ValueError where the tokenizer knows no start
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    forms = {form for start in starts for form in (start, start.capitalize())}
    first = {tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in forms} - {tokenizer.unk_token_id}
    if not first:
        raise ValueError(f"the tokenizer knows no first word of the refusals {list(starts)[:3]} …; name some that it has")
    return read_out(model, last_states(model, processor, prompts)).softmax(-1)[..., sorted(first)].sum(-1)
