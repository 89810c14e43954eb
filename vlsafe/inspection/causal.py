"""Interventions: another model's blocks put into a model, a direction taken out of its states or added to them.

What correlates with a loss of safety need not have caused it; here something is changed and the model examined again. The
examination is an argument: this module knows neither benchmarks nor judges. Every intervention is undone bit for bit.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel

from vlsafe.inspection.states import hooked, replaced
from vlsafe.models.architectures import address, language_layers, language_weights

Rows = list[dict[str, Any]]
Examine = Callable[[PreTrainedModel, str], Rows]  # a model and the name of the intervention -> rows of results
EVERYTHING = -1  # in place of a block: what belongs to none: embeddings, final norm and head


class Patch(NamedTuple):
    """What is transplanted together: numbers of blocks, and their kind (band, random, rest, blocks, all, reverse)."""

    kind: str
    blocks: tuple[int, ...]

    @property
    def name(self) -> str:
        """Unique among the patches of one model: band-2-3, rest, all-0-1-2."""
        return "-".join([self.kind, *(str(block) for block in self.blocks if block != EVERYTHING)])


def bands(layers: int, widths: Sequence[int]) -> list[Patch]:
    """All bands of neighbouring blocks of the given widths."""
    return [Patch("band", tuple(range(at, at + width))) for width in widths for at in range(layers - width + 1)]


def random_sets(layers: int, width: int, n: int, rng: np.random.Generator) -> list[Patch]:
    """`n` different sets of `width` blocks from `rng`, none of them a band; fewer where there are fewer, none at width 1."""
    known = {patch.blocks for patch in bands(layers, [width])}
    if math.comb(layers, width) <= 5000:
        others = [blocks for blocks in itertools.combinations(range(layers), width) if blocks not in known]
        return [Patch("random", others[i]) for i in sorted(rng.permutation(len(others))[:n])]
    chosen: list[Patch] = []
    while len(chosen) < n:  # of very many sets hardly any is drawn twice
        blocks = tuple(sorted(map(int, rng.permutation(layers)[:width])))
        if blocks not in known:
            known.add(blocks)
            chosen.append(Patch("random", blocks))
    return chosen


def transplanted(model: PreTrainedModel, donor: Mapping[str, torch.Tensor],
                 blocks: Collection[int]) -> AbstractContextManager[None]:  # fmt: skip
    """Replace a model's weights in some blocks by a donor's for the time of a `with` block.

    Raises:   ValueError where a block is not in the model, or the donor lacks a weight of it or has one of another shape
    """
    beyond = set(blocks) - {EVERYTHING, *range(len(language_layers(model)))}
    layers = {None if block == EVERYTHING else block for block in blocks}
    own = {name: weight for name, weight in language_weights(model).items() if address(name)[0] in layers}
    if beyond or set(own) - set(donor):
        raise ValueError(f"blocks {sorted(beyond)} are not in the model, or the donor lacks {sorted(set(own) - set(donor))[:3]}")
    if other := [name for name, weight in own.items() if donor[name].shape != weight.shape]:
        raise ValueError(f"the donor's {other[0]} has another shape: {[*donor[other[0]].shape]}, not {[*own[other[0]].shape]}")
    return replaced(own.values(), (donor[name] for name in own))


def transplants(model: PreTrainedModel, donor: Mapping[str, torch.Tensor], patches: Sequence[Patch], examine: Examine,
                done: Callable[[int], None] = lambda n: None) -> Rows:  # fmt: skip
    """Examine a model with each patch of a donor in it, one after another."""
    rows: Rows = []
    for number, patch in enumerate(patches, 1):
        with transplanted(model, donor, patch.blocks):
            rows += [{**row, "kind": patch.kind, "blocks": patch.name} for row in examine(model, patch.name)]
        done(number)
    return rows


def ablated(model: PreTrainedModel, direction: torch.Tensor) -> AbstractContextManager[None]:
    """Project a direction [D], of any length, out of the residual stream wherever it enters or leaves a block, at all positions.

    Source:   Arditi et al. 2024, section 2.4, directional ablation (on the stream at the blocks' borders, where
              theirs also hooks what attention and MLP add within a block)
    """
    unit = (direction / direction.norm()).to(model.device, model.dtype)  # once: a captured step of decoding copies nothing

    def without(state: torch.Tensor) -> torch.Tensor:
        return state - (state @ unit)[..., None] * unit

    return hooked(model, without)


def added(model: PreTrainedModel, vector: torch.Tensor, layer: int) -> AbstractContextManager[None]:
    """Add a vector [D] to the output of one block, at all positions (activation addition, Arditi et al. 2024, section 2.4)."""
    vector = vector.to(model.device, model.dtype)
    return hooked(model, lambda state: state + vector, [layer], entering=False)


def difference_of_means(harmful: torch.Tensor, harmless: torch.Tensor) -> torch.Tensor:
    """The refusal direction [L, D]: from the mean of the harmless states [M, L, D] to that of the harmful ones [N, L, D].

    Source:   Arditi et al. 2024, section 2.3
    """
    return harmful.mean(0) - harmless.mean(0)
