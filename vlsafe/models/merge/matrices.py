"""Merging by the singular vectors of task matrices Δ = θ − θ_0. A part of `rules`.

What `torch.linalg.svd` needs beside its input is as large as the input and its result, so the peak is some copies of the largest
matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Components(NamedTuple):
    """Singular components U Σ Vᵀ.

    Shapes:   u [M, K], s [K], v [N, K]
    """

    u: Tensor
    s: Tensor
    v: Tensor


def components(task: Tensor, share: float) -> Components:
    """The largest components of a matrix: a `share` of its shorter side, at least one; of lower rank those that it has.

    Shapes:   [M, N]  ->  K ≤ max(1, share min(M, N))
    """
    u, s, vt = torch.linalg.svd(task, full_matrices=False)
    kept = min(max(1, int(share * len(s) + 1e-6)), _rank(s, task.shape))
    return Components(u[:, :kept], s[:kept], vt[:kept].T)


def _rank(s: Tensor, shape: Sequence[int]) -> int:
    """How many singular values differ from zero as far as the precision can tell."""
    return int((s > s.max() * max(shape) * torch.finfo(s.dtype).eps).sum())


def joined(tasks: Sequence[Components]) -> Components:
    """The components of all tasks side by side."""
    return Components(*(torch.cat(parts, dim=-1) for parts in zip(*tasks, strict=True)))


def orthogonal(vectors: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns, P Qᵀ of the decomposition P D Qᵀ (orthogonal Procrustes).

    Departs:  where columns depend on each other, as those of equal tasks do, it is not unique; the directions whose D is zero are
              then left out, so that equal tasks give one of them back

    Shapes:   [M, K]  ->  [M, K]
    """
    p, d, qt = torch.linalg.svd(vectors, full_matrices=False)
    rank = _rank(d, vectors.shape)
    return p[:, :rank] @ qt[:rank]


def decorrelated(tasks: Components) -> Tensor:
    """U_⊥ Σ V_⊥ᵀ: the tasks' components with their singular vectors made orthogonal to each other's. TSV-M's merged Δ."""
    if not len(tasks.s):
        return tasks.u @ tasks.v.T
    return orthogonal(tasks.u).mul_(tasks.s) @ orthogonal(tasks.v).T


def interference(tasks: Components) -> float:
    """Singular task interference, ‖(UᵀU − I) Σ (VᵀV − I)‖_1, the sum of all entries' magnitudes; 0 where tasks are orthogonal.

    Source:   Gargiulo et al. 2025 (arXiv 2412.00081), section 3.3
    """
    one = torch.eye(len(tasks.s))
    return float((((tasks.u.T @ tasks.u - one) * tasks.s) @ (tasks.v.T @ tasks.v - one)).abs().sum())


def isotropic(total: Tensor) -> Tensor:
    """A matrix with the singular vectors of `total` and the mean of its singular values in place of each. Iso-C's merged Δ."""
    u, s, vt = torch.linalg.svd(total, full_matrices=False)
    return (u @ vt).mul_(s.mean())
