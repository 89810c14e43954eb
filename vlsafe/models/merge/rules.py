"""Merge rules as pure functions of tensors, in the letters of their papers.

θ_a and θ_b are two models, θ_0 what both started from, τ = θ − θ_0 a task vector; `ratio` is the weight of b, 1 − ratio that
of a. A rule has two steps, so that large tensors can pass in pieces: `summarise` reads a whole tensor and returns the few
numbers that depend on all of it (a threshold, an angle), `combine` then works element by element; rules on whole matrices
(`matrices`) get tensors in their shapes instead of pieces. Arithmetic is in fp32.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vlsafe.core.scale import known
from vlsafe.models.architectures import block_of
from vlsafe.models.merge import matrices

Weights = Mapping[str, Tensor]
"""The tensors of a model in memory, by their names there."""
Pieces = Callable[[], Iterator[Any]]
"""Iterates over the flat fp32 pieces of (θ_a, θ_b, θ_0), for weighed rules also of (F_a, F_b), again at every call."""
Draws = tuple[np.random.Generator, np.random.Generator]
"""One random stream for each model, so that masks do not depend on the size of the pieces."""


class How(NamedTuple):
    """The numbers of a merge: `kept` is TIES's share of each task vector, `survived` DARE's 1 − p, `scaling` λ, `rank` the share
    of its singular vectors that TSV-M keeps of each task."""

    ratio: float = 0.5
    kept: float = 0.2
    survived: float = 0.5
    scaling: float = 1.0
    rank: float = 0.5

    def checked(self, beyond: bool = False) -> How:
        """Raises:   ValueError where a share is not one, or a factor not finite, by its name; `beyond`: ratios from 1 on alone"""
        if beyond and not 1 <= self.ratio < math.inf:
            raise ValueError(f"ratio is a number from 1 on where a line is left at its end, not {self.ratio}")
        if not beyond and not 0 <= self.ratio <= 1:
            raise ValueError(f"ratio is a share in [0, 1], not {self.ratio}")
        for name in ("kept", "survived", "rank"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share in (0, 1], not {getattr(self, name)}")
        if not math.isfinite(self.scaling):
            raise ValueError(f"scaling is a finite number, not {self.scaling}")
        return self


class Rule(NamedTuple):
    """`based`: it needs θ_0; `rated`: it has a ratio, `beyond` one from 1 on; `whole`: it gets tensors in their shapes;
    `weighed`: it needs the diagonals of both models' Fisher information; `measure`: a number that its summary of a tensor tells;
    `source`: the paper."""

    combine: Callable[..., Tensor]
    source: str
    summarise: Callable[[Pieces, How, Draws], Any] = lambda pieces, how, draws: None
    based: bool = False
    rated: bool = True
    beyond: bool = False
    whole: bool = False
    weighed: bool = False
    measure: Callable[[Any], float | None] = lambda summary: None


def merged(
    name: str, a: Tensor, b: Tensor, base: Tensor | None, how: How, seed: int | Sequence[int] = 0, fisher: Sequence[Tensor] = ()
) -> Tensor:  # fmt: skip
    """Two tensors of one shape merged by a rule, in a's precision; `fisher` of both where it weighs them.

    Shapes:   a, b, base, fisher  [...]  ->  [...]
    Draws:    DARE's masks, from `seed` only
    Raises:   ValueError for an unknown rule, or one that needs a base, or two diagonals of Fisher information, and lacks it
    """
    rule = RULES[known(name, RULES, "merge rule")]
    if rule.based and base is None:
        raise ValueError(f"{name} adds task vectors to what both models started from; it needs a base")
    refuse_unweighed(name, len(fisher))
    how.checked(rule.beyond)
    if a.numel() == 0:
        return a
    shape = a.shape if rule.whole else (-1,)
    tensors = tuple(None if tensor is None else tensor.reshape(shape).float() for tensor in (a, b, base, *fisher))
    summary = rule.summarise(lambda: iter([tensors]), how, streams(seed))
    return rule.combine(*tensors, how, summary, streams(seed)).reshape(a.shape).to(a.dtype)


def refuse_unweighed(name: str, diagonals: int) -> None:
    """Raises:   ValueError where a rule lacks the two diagonals of Fisher information, or has no use for them"""
    if diagonals != 2 * RULES[name].weighed:
        needs = "weighs with the Fisher information of a and of b" if RULES[name].weighed else "has no use for Fisher information"
        raise ValueError(f"{name} {needs} (--fisher)")


def streams(seed: int | Sequence[int]) -> Draws:
    """Two independent random streams of one seed."""
    first, second = np.random.SeedSequence(seed).spawn(2)
    return np.random.default_rng(first), np.random.default_rng(second)


def linear(a: Tensor, b: Tensor, base: Tensor | None, how: How, summary: Any = None, draws: Draws | None = None) -> Tensor:
    """(1 − ratio) θ_a + ratio θ_b; exact at both ends and for equal inputs."""
    if how.ratio in (0, 1):
        return b if how.ratio else a
    return torch.lerp(a, b, how.ratio)  # a + r (b − a) below one half, b − (1 − r)(b − a) above: exact where a equals b


def expo(a: Tensor, b: Tensor, base: Tensor | None, how: How, summary: Any = None, draws: Draws | None = None) -> Tensor:
    """θ_b + (ratio − 1)(θ_b − θ_a): the line from the less aligned a through b, left at its end; at ratio 1 it is b, bit for bit.

    The paper's θ_1 + α Δθ with θ_0 = θ_a, θ_1 = θ_b, Δθ = θ_1 − θ_0 and α = ratio − 1; to extrapolate from what both started
    from, that is a.
    """
    return torch.add(b, b - a, alpha=how.ratio - 1)


def fisher(
    a: Tensor, b: Tensor, base: Tensor | None, of_a: Tensor, of_b: Tensor, how: How, summary: Any = None,
    draws: Draws | None = None,
) -> Tensor:  # fmt: skip
    """((1 − ratio) F_a θ_a + ratio F_b θ_b) / ((1 − ratio) F_a + ratio F_b), entry by entry; F of `fisher.diagonal`.

    Departs:  where neither model's weight matters it is linear; the authors' code adds a floor of 1e-6 to F instead
    """
    mine, theirs = (1 - how.ratio) * of_a, how.ratio * of_b
    whole = mine + theirs
    return torch.lerp(a, b, torch.where(whole > 0, theirs / whole, how.ratio))


def _cosine(pairs: Iterable[tuple[Tensor, Tensor]]) -> float | None:
    """The cosine of two vectors that come in pieces, in fp64; None where one of them is zero."""
    dot = norm_a = norm_b = 0.0
    for a, b in pairs:
        x, y = a.double(), b.double()
        dot, norm_a, norm_b = dot + float(x @ y), norm_a + float(x @ x), norm_b + float(y @ y)
    norms = math.sqrt(norm_a * norm_b)
    return dot / norms if norms > 0 else None


def angle(pieces: Pieces, how: How, draws: Draws) -> float:
    """The angle between two tensors as vectors; 0 where it is undefined or there is no arc between them (opposite)."""
    cosine = _cosine((a, b) for a, b, _ in pieces())
    return math.acos(cosine) if cosine is not None and abs(cosine) < 1 - 1e-10 else 0.0


def slerp(a: Tensor, b: Tensor, base: Tensor | None, how: How, summary: float, draws: Draws | None = None) -> Tensor:
    """sin((1 − ratio) Ω) / sin Ω · θ_a + sin(ratio Ω) / sin Ω · θ_b with Ω, the angle between both whole tensors.

    Departs:  linear only where Ω is undefined; mergekit is linear from a cosine of 0.9995, where most pairs of models with
              one ancestor lie
    """
    if summary == 0 or how.ratio in (0, 1) or torch.equal(a, b):
        return linear(a, b, base, how)
    of_a, of_b = (math.sin(share * summary) / math.sin(summary) for share in (1 - how.ratio, how.ratio))
    return a * of_a + b * of_b


def _added(base: Tensor, taus: Sequence[Tensor], how: How) -> Tensor:
    """θ_0 + λ Σ w τ."""
    return base + how.scaling * ((1 - how.ratio) * taus[0] + how.ratio * taus[1])


def task_arithmetic(a: Tensor, b: Tensor, base: Tensor, how: How, summary: Any = None, draws: Draws | None = None) -> Tensor:
    """θ_0 + λ ((1 − ratio) τ_a + ratio τ_b); with λ = 1, θ_0 cancels and this is the linear merge."""
    return _added(base, (a - base, b - base), how)


def kept_count(n: int, share: float) -> int:
    """How many of n entries a share keeps: whole ones, and at least one."""
    return max(1, math.floor(share * n + 1e-6))  # in binary 0.29 × 100 is a little less than 29


def cut(magnitudes: np.ndarray, share: float) -> float:
    """The smallest magnitude that is kept. The array is reordered."""
    index = len(magnitudes) - kept_count(len(magnitudes), share)
    magnitudes.partition(index)
    return float(magnitudes[index])


def cuts(pieces: Pieces, how: How, draws: Draws) -> tuple[float, float]:
    """The magnitude below which the entries of each task vector are trimmed; ties with the last kept one are kept too.

    Departs:  tensor by tensor, so that a merge streams, as mergekit does; the paper trims the whole task vector at once
    """
    if how.kept == 1:
        return 0.0, 0.0
    n = sum(len(a) for a, _, _ in pieces())
    of_a, of_b = np.empty(n, np.float32), np.empty(n, np.float32)
    start = 0
    for a, b, base in pieces():
        end = start + len(a)
        for model, magnitudes in ((a, of_a), (b, of_b)):
            torch.sub(model, base, out=torch.from_numpy(magnitudes[start:end])).abs_()
        start = end
    return cut(of_a, how.kept), cut(of_b, how.kept)


def trimmed(tau: Tensor, least: float) -> Tensor:
    """TIES, step 1: entries smaller than the cut become zero."""
    below = float(np.nextafter(np.float32(least), np.float32(0)))  # hardshrink drops equals too; a mask is three times slower
    return torch.nn.functional.hardshrink(tau, below)


def elected(taus: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """TIES, steps 2 and 3: γ = sgn(Σ w τ), then the weighted mean of the entries that have this sign.

    Shapes:   K times [N], K weights  ->  [N]
    Departs:  the paper's weights are equal; where the sum is zero the result is zero (PEFT and mergekit elect plus)
    """
    weighted = [weight * tau for weight, tau in zip(weights, taus, strict=True)]
    sign = functools.reduce(torch.add, weighted).sign()
    total, share = torch.zeros_like(sign), torch.zeros_like(sign)
    for weight, entry in zip(weights, weighted, strict=True):
        along = entry.mul_(sign).clamp_(min=0)  # its size where it agrees, else zero
        total.add_(along)
        share.add_(along.sign_(), alpha=weight)
    return total.mul_(sign).div_(share.clamp_(min=1e-12))  # where nobody agrees both are zero


def ties(a: Tensor, b: Tensor, base: Tensor, how: How, summary: tuple[float, float], draws: Draws | None = None) -> Tensor:
    """θ_0 + λ τ_m: trim, elect sign, merge those that agree."""
    taus = [trimmed(tau, least) for tau, least in zip((a - base, b - base), summary, strict=True)]
    return base + how.scaling * elected(taus, (1 - how.ratio, how.ratio))


def masks(n: int, how: How, draws: Draws) -> list[Tensor]:
    """Which entries of each task vector survive, each with probability 1 − p."""
    return [torch.from_numpy(rng.random(n, dtype=np.float32) < how.survived) for rng in draws]


def dropped(tau: Tensor, mask: Tensor, survived: float) -> Tensor:
    """DARE: m ⊙ τ / (1 − p), whose expectation over masks is τ."""
    return tau * mask / survived


def _dropped(a: Tensor, b: Tensor, base: Tensor, how: How, summary: Any, draws: Draws) -> list[Tensor]:
    """Both task vectors after DARE; `summary` holds other divisors than 1 − p, or nothing."""
    factors = summary or (how.survived, how.survived)
    both = zip((a - base, b - base), masks(len(a), how, draws), factors, strict=True)
    return [dropped(tau, mask, factor) for tau, mask, factor in both]


def dare_linear(a: Tensor, b: Tensor, base: Tensor, how: How, summary: Any, draws: Draws) -> Tensor:
    """Task arithmetic on task vectors after DARE."""
    return _added(base, _dropped(a, b, base, how, summary, draws), how)


def dare_ties(a: Tensor, b: Tensor, base: Tensor, how: How, summary: Any, draws: Draws) -> Tensor:
    """TIES with DARE's random dropping instead of trimming; the mean of those that agree, where mergekit takes the sum."""
    return base + how.scaling * elected(_dropped(a, b, base, how, summary, draws), (1 - how.ratio, how.ratio))


def surviving_norm(pieces: Pieces, how: How, draws: Draws) -> tuple[float, float]:
    """The share of each task vector's L1 norm that its mask keeps; mergekit divides by it instead of 1 − p."""
    sums = np.zeros((2, 2))
    for a, b, base in pieces():
        for which, (tau, mask) in enumerate(zip((a - base, b - base), masks(len(a), how, draws), strict=True)):
            magnitudes = tau.abs().double()
            sums[which] += float(magnitudes.sum()), float((magnitudes * mask).sum())
    of_a, of_b = (float(kept / total) if kept else 1.0 for total, kept in sums)
    return of_a, of_b


def agreement(pieces: Pieces, how: How, draws: Draws) -> float:
    """Model stock's t = 2 cos θ / (1 + cos θ) with θ, the angle between both task vectors.

    Departs:  t = 0 for an obtuse θ, where the formula leaves the segment and divides by zero for opposite vectors
    """
    cosine = min(1.0, max(0.0, _cosine((a - base, b - base) for a, b, base in pieces()) or 0.0))
    return 2 * cosine / (1 + cosine)


def model_stock(a: Tensor, b: Tensor, base: Tensor, how: How, summary: float, draws: Draws | None = None) -> Tensor:
    """t (θ_a + θ_b) / 2 + (1 − t) θ_0: one point, no ratio."""
    return torch.lerp(base, (a + b) / 2, summary)


def singular(pieces: Pieces, how: How, draws: Draws) -> matrices.Components | None:
    """The leading singular components of both task matrices; None for what is no matrix."""
    a, b, base = next(pieces())
    return matrices.joined([matrices.components(model - base, how.rank) for model in (a, b)]) if a.ndim == 2 else None


def tsv_m(
    a: Tensor, b: Tensor, base: Tensor, how: How, summary: matrices.Components | None, draws: Draws | None = None
) -> Tensor:  # fmt: skip
    """θ_0 + λ U_⊥ Σ V_⊥ᵀ (`matrices.decorrelated`); of vectors θ_0 + λ times the mean of both τ. One point, no ratio."""
    return torch.add(base, (a + b) / 2 - base if summary is None else matrices.decorrelated(summary), alpha=how.scaling)


def iso_c(a: Tensor, b: Tensor, base: Tensor, how: How, summary: Any = None, draws: Draws | None = None) -> Tensor:
    """θ_0 + λ σ̄ U Vᵀ with U Σ Vᵀ = τ_a + τ_b and σ̄, the mean of Σ; of vectors θ_0 + λ times the mean of both τ. No ratio."""
    return torch.add(base, (a + b) / 2 - base if a.ndim != 2 else matrices.isotropic(a - base + (b - base)), alpha=how.scaling)


RULES: dict[str, Rule] = {
    "linear": Rule(linear, "Wortsman et al. 2022, model soups (arXiv 2203.05482); WiSE-FT (2109.01903)"),
    "slerp": Rule(slerp, "Shoemake 1985, section 3.3", summarise=angle),
    "task_arithmetic": Rule(task_arithmetic, "Ilharco et al. 2023 (arXiv 2212.04089), section 2", based=True),
    "ties": Rule(ties, "Yadav et al. 2023 (arXiv 2306.01708), algorithm 1", summarise=cuts, based=True),
    "dare_linear": Rule(dare_linear, "Yu et al. 2024 (arXiv 2311.03099), section 3", based=True),
    "dare_ties": Rule(dare_ties, "Yu et al. 2024 with Yadav et al. 2023", based=True),
    "dare_linear_l1": Rule(dare_linear, "mergekit's rescaling to the same L1 norm", summarise=surviving_norm, based=True),
    "dare_ties_l1": Rule(dare_ties, "mergekit's rescaling to the same L1 norm", summarise=surviving_norm, based=True),
    "model_stock": Rule(model_stock, "Jang et al. 2024 (arXiv 2403.19522), equation 2", agreement, based=True, rated=False),
    "expo": Rule(expo, "Zheng et al. 2024 (arXiv 2404.16792), equation 1", beyond=True),
    "fisher": Rule(fisher, "Matena and Raffel 2022 (arXiv 2111.09832), section 3", weighed=True),
    "tsv_m": Rule(tsv_m, "Gargiulo et al. 2025 (arXiv 2412.00081), algorithm 1", singular, based=True, rated=False, whole=True,
                  measure=lambda summary: None if summary is None else matrices.interference(summary)),
    "iso_c": Rule(iso_c, "Marczak et al. 2025 (arXiv 2502.04959), algorithm 1", based=True, rated=False, whole=True),
}  # fmt: skip


def seed_of(seed: int, key: str) -> list[int]:
    """The seed of one tensor's draws; it depends on no other tensor and on no order."""
    return [seed, int.from_bytes(hashlib.sha256(key.encode()).digest()[:8])]


def streamed(
    name: str, a: Weights, b: Weights, base: Weights | None, how: How, seed: int = 0,
    blocks: Collection[int | None] | None = None, fisher: Sequence[Weights] = (),
) -> Iterator[tuple[str, Tensor]]:  # fmt: skip
    """Two models merged by a rule, weight by weight with its name.

    What only A has (a tower and a projector, where B is a plain language model) comes from A. What has no base, or no Fisher
    information where that weighs, is merged linearly. With `blocks` only these decoder blocks are merged, the rest is A's; None
    in it stands for all that is no block.

    Raises:   ValueError where B has what A lacks, or a task vector is zero
    """
    if extra := sorted(set(b) - set(a)):
        raise ValueError(f"b has {len(extra)} tensors that a lacks, first {extra[:3]}")
    based, base = RULES[name].based, base or {}
    for which, model in (("a", a), ("b", b)) if based else ():
        if all(torch.equal(model[key], base[key]) for key in base if key in model):
            raise ValueError(f"the task vector of {which} is zero: it is the base, weight by weight")
    for key in a:
        if key not in b or (blocks is not None and block_of(key) not in blocks):
            yield key, a[key]
            continue
        whole = all(key in of for of in ([base] if based else fisher))
        of = [diagonal[key] for diagonal in fisher] if whole else []
        yield key, merged(name if whole else "linear", a[key], b[key], base.get(key), how, seed_of(seed, key), of)


def sample(tensor: Tensor, n: int = 2**16) -> Tensor:
    """At most about `n` weights of a tensor, evenly spaced: enough to tell merges of the same two models apart, which differ
    in every tensor that they merge, in a fraction of the memory. Shapes:   any  ->  flat"""
    return tensor.flatten()[:: -(-tensor.numel() // n)].clone()


def near(one: Weights, other: Weights, gap: float) -> bool:
    """Whether no weight of two models of one shape differs by more than `gap`."""
    return all(bool((one[key] - other[key]).abs().max() <= gap) for key in one)
