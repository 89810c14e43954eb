"""Merging in memory: named weights in, named weights out. Names are those in memory (`layouts`)."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping

import torch

from vlsafe.models.architectures import block_of
from vlsafe.models.merge.rules import RULES, How, merged

Weights = Mapping[str, torch.Tensor]


def seed_of(seed: int, key: str) -> list[int]:
    """The seed of what is drawn for one tensor: it depends on no other tensor and on no order."""
    return [seed, int.from_bytes(hashlib.sha256(key.encode()).digest()[:8])]


def combined(
    name: str, a: Weights, b: Weights, base: Weights | None, how: How, seed: int = 0, blocks: Collection[int | None] | None = None
) -> dict[str, torch.Tensor]:
    """Two models merged by a rule.

    What only A has (a tower and a projector, where B is a plain language model) comes from A. What has no base is merged
    linearly. With `blocks` only these decoder blocks are merged, the rest is A's; None in it stands for all that is no block.

    Raises:   ValueError where B has what A lacks, or a task vector is zero
    """
    extra = set(b) - set(a)
    if extra:
        raise ValueError(f"b has {len(extra)} tensors that a lacks, first {sorted(extra)[:3]}")
    if RULES[name].based:
        refuse_zero(a, b, base or {})
    found = {}
    for key, value in a.items():
        if key not in b or (blocks is not None and block_of(key) not in blocks):
            found[key] = value
            continue
        without = RULES[name].based and key not in (base or {})
        found[key] = merged("linear" if without else name, value, b[key], (base or {}).get(key), how, seed_of(seed, key))
    return found


def refuse_zero(a: Weights, b: Weights, base: Weights) -> None:
    """Raises:   ValueError naming the model that equals the base: a zero task vector tells a merge nothing"""
    for which, model in (("a", a), ("b", b)):
        if all(torch.equal(model[key], value) for key, value in base.items() if key in model):
            raise ValueError(f"the task vector of {which} is zero: it is the base, weight by weight")


def near(one: Weights, other: Weights, gap: float) -> bool:
    """Whether no weight of two models of one shape differs by more than `gap`."""
    return all(one[key] is other[key] or bool((one[key] - other[key]).abs().max() <= gap) for key in one)
