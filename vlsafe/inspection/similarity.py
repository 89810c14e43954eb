"""How alike two models are inside: cosines, projections, linear probes and CKA of their states, cosines of gradients.

A pair of models is two folders of kept states of the same prompts, "own" and "reference"; one layer of both is in memory.
What is known about the prompts is a frame with the columns item, cluster, group (the modality) and harmful.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors import safe_open

from vlsafe.inspection import states
from vlsafe.models import checkpoints

Pair = Mapping[str, Path]
JACKKNIFE = 20  # groups of clusters that are left out in turn for the standard error of CKA


def keep_pair(folder: Path, parent: Path, prompts: states.Prompts, work: Path, batch_size: int) -> Pair:
    """Write the states of a model and of its reference: the parent's language weights with the model's tower and projector."""
    model, processor = checkpoints.load(folder), checkpoints.load_processor(folder)
    shutil.rmtree(work, ignore_errors=True)  # a killed attempt may have left more batches
    own = states.keep_states(model, processor, prompts, work / "own", batch_size)
    checkpoints.put_language(model, checkpoints.language_places(parent))  # streamed over the model's own: one model is in memory
    return {"own": own, "reference": states.keep_states(model, processor, prompts, work / "reference", batch_size)}


def _layers(pair: Pair) -> Iterator[tuple[int, dict[str, torch.Tensor], dict[str, torch.Tensor]]]:
    """Number, states and increments [N, D] of every block, of both models."""
    with safe_open(next(pair["own"].glob("*.safetensors")), "pt") as tensors:
        blocks = tensors.get_slice("states").get_shape()[1] - 1
    before = {name: states.kept_states(folder, 0) for name, folder in pair.items()}
    for layer in range(blocks):
        now = {name: states.kept_states(folder, layer + 1) for name, folder in pair.items()}
        yield layer, now, {name: now[name] - before[name] for name in pair}
        before = now


def compare_prompts(
    pair: Pair, prompts: pd.DataFrame, directions: Mapping[str, torch.Tensor], probes: bool = True
) -> pd.DataFrame:
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
    sides = {name: (own, reference), f"{name}_centred": [states.centred(side, groups) for side in (own, reference)]}
    return {column: torch.cosine_similarity(*pair, dim=-1).numpy() for column, pair in sides.items()}


def probe_scores(own: torch.Tensor, reference: torch.Tensor, prompts: pd.DataFrame) -> dict[str, np.ndarray]:
    """Held-out scores [N] of probes for harm, one per group: the model's, the reference's, and the latter's on the model."""
    scores = {name: np.full(len(prompts), np.nan) for name in ("probe_own", "probe_reference", "probe_transferred")}
    for rows in prompts.groupby("group").indices.values():
        harmful, clusters = (prompts[name].to_numpy()[rows] for name in ("harmful", "cluster"))
        a, b = own[rows].numpy(), reference[rows].numpy()
        (scores["probe_own"][rows],) = states.harm_scores(a, harmful, clusters)
        scores["probe_reference"][rows], scores["probe_transferred"][rows] = states.harm_scores(b, harmful, clusters, [a])
    return scores


def compare_sets(pair: Pair, prompts: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """CKA per layer × group, with its jackknife standard error over groups of clusters."""
    fold = np.unique(prompts["cluster"].astype(str), return_inverse=True)[1] % JACKKNIFE
    for layer, now, _ in _layers(pair):
        for group, rows in sorted(prompts.groupby("group").indices.items()):
            kept = (rows[fold[rows] != left_out] for left_out in np.unique(fold[rows]))
            cka, *without = (states.cka(now["own"][part], now["reference"][part]) for part in (rows, *kept))
            error = float(np.sqrt((len(without) - 1) * np.var(without)))
            yield {"layer": layer, "group": group, "cka": cka, "error": error, "n": len(rows)}


def compare_gradients(files: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """Cosines of every two gradients per block; files are called `<task>-<number>`."""
    tasks = [file.name.split("-")[0] for file in files]
    for layer, gram in states.gram(files).items():
        size = np.sqrt(np.diag(gram))
        cosines = gram / np.outer(size, size)
        for b, a in np.argwhere(np.tri(len(files), k=-1)).tolist():
            yield {"layer": layer, "a": a, "b": b, "task_a": tasks[a], "task_b": tasks[b], "cosine": float(cosines[b, a])}
