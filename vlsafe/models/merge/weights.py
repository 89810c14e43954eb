"""Merging in memory: named weights in, named weights out. Names are those in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping

import torch

from vlsafe.models.architectures import block_of
from vlsafe.models.merge.rules import RULES, How, merged

Weights = Mapping[str, torch.Tensor]


def seed_of(seed: int, key: str) -> list[int]:
    """The seed of one tensor's draws; it depends on no other tensor and on no order."""
    return [seed, int.from_bytes(hashlib.sha256(key.encode()).digest()[:8])]


def combined(
    name: str, a: Weights, b: Weights, base: Weights | None, how: How, seed: int = 0, blocks: Collection[int | None] | None = None
) -> dict[str, torch.Tensor]:
    """Two models merged by a rule.

    What only A has (a tower and a projector, where B is a plain language model) comes from A. What has no base is merged
    linearly. With `blocks` only these decoder blocks are merged, the rest is A's; None in it stands for all that is no block.

    Raises:   ValueError where B has what A lacks, or a task vector is zero
    """
    if extra := sorted(set(b) - set(a)):
        raise ValueError(f"b has {len(extra)} tensors that a lacks, first {extra[:3]}")
    based, base = RULES[name].based, base or {}
    for which, model in (("a", a), ("b", b)) if based else ():
        if all(torch.equal(model[key], value) for key, value in base.items() if key in model):
            raise ValueError(f"the task vector of {which} is zero: it is the base, weight by weight")
    weights = dict(a)
    for key in a:
        if key in b and (blocks is None or block_of(key) in blocks):
            rule = "linear" if based and key not in base else name
            weights[key] = merged(rule, a[key], b[key], base.get(key), how, seed_of(seed, key))
    return weights


def near(one: Weights, other: Weights, gap: float) -> bool:
    """Whether no weight of two models of one shape differs by more than `gap`."""
    return all(one[key] is other[key] or bool((one[key] - other[key]).abs().max() <= gap) for key in one)
