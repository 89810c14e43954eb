"""Interventions: another model's blocks put into a model, a direction taken out of its states or added to them.

What correlates with a loss of safety need not have caused it; here something is changed and the model examined again. The
examination is an argument: this room knows neither benchmarks nor judges. Every intervention is undone bit for bit.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel

from vlsafe.models.architectures import address, language_layers, language_weights

Rows = list[dict[str, Any]]
Examine = Callable[[PreTrainedModel, str], Rows]
"""A model and the name of what was done to it -> rows of results."""
EVERYTHING = -1  # in place of a block: embeddings, final norm and head


class Patch(NamedTuple):
    """What is transplanted together: blocks by number, and what kind of set they are (band, random, rest, all, reverse)."""

    kind: str
    blocks: tuple[int, ...]

    @property
    def name(self) -> str:
        """Unique among the patches of one model: band-2-3, rest, all-0-1-2."""
        return "-".join([self.kind, *(str(block) for block in self.blocks if block != EVERYTHING)])


def bands(layers: int, widths: Sequence[int]) -> list[Patch]:
    """All bands of neighbouring blocks of the given widths."""
    return [
        Patch("band", tuple(range(start, start + width))) for width in widths for start in range(layers - width + 1)
    ]  # fmt: skip


def random_sets(layers: int, width: int, n: int, rng: np.random.Generator) -> list[Patch]:
    """`n` different sets of `width` blocks of which none is a band; fewer where there are not so many, at width 1 none.

    Draws:    from `rng`
    """
    known = {patch.blocks for patch in bands(layers, [width])}
    if math.comb(layers, width) <= 5000:
        others = [blocks for blocks in itertools.combinations(range(layers), width) if blocks not in known]
        chosen = [others[i] for i in sorted(rng.permutation(len(others))[:n])]
    else:  # of very many sets hardly any is drawn twice
        drawn = (tuple(sorted(map(int, rng.permutation(layers)[:width]))) for _ in itertools.count())
        chosen = list(itertools.islice(_new(drawn, known), n))
    return [Patch("random", blocks) for blocks in chosen]


def _new(drawn: Iterator[tuple[int, ...]], known: set[tuple[int, ...]]) -> Iterator[tuple[int, ...]]:
    for blocks in drawn:
        if blocks not in known:
            known.add(blocks)
            yield blocks


def weights_of(model: PreTrainedModel, blocks: Collection[int]) -> dict[str, torch.Tensor]:
    """The language weights of some blocks; EVERYTHING stands for those that belong to no block."""
    wanted = {None if block == EVERYTHING else block for block in blocks}
    return {name: weight for name, weight in language_weights(model).items() if address(name)[0] in wanted}


@contextmanager
def transplanted(model: PreTrainedModel, donor: Mapping[str, torch.Tensor], blocks: Collection[int]) -> Iterator[None]:
    """A donor's weights in the place of a model's own, for some blocks, and the model's own again afterwards.

    Raises:   ValueError where a block is not in the model, or the donor lacks a weight of it
    """
    beyond = set(blocks) - {EVERYTHING, *range(len(language_layers(model)))}
    own = weights_of(model, blocks)
    if beyond or set(own) - set(donor):
        raise ValueError(f"blocks {sorted(beyond)} are not in the model, or the donor lacks {sorted(set(own) - set(donor))[:3]}")
    kept = {name: weight.detach().clone() for name, weight in own.items()}
    try:
        with torch.no_grad():
            for name, weight in own.items():
                weight.copy_(donor[name])
        yield
    finally:
        with torch.no_grad():
            for name, weight in own.items():
                weight.copy_(kept[name])


def transplants(
    model: PreTrainedModel, donor: Mapping[str, torch.Tensor], patches: Sequence[Patch], examine: Examine,
    done: Callable[[int], None] = lambda n: None,
) -> Rows:  # fmt: skip
    """Examine a model with each patch of a donor in it, one after another."""
    rows: Rows = []
    for number, patch in enumerate(patches, 1):
        with transplanted(model, donor, patch.blocks):
            rows += [{**row, "kind": patch.kind, "blocks": patch.name} for row in examine(model, patch.name)]
        done(number)
    return rows


@contextmanager
def ablated(model: PreTrainedModel, direction: torch.Tensor) -> Iterator[None]:
    """Take a direction out of the residual stream wherever it enters or leaves a block, at all positions.

    Shapes:   direction  [D], of any length
    Source:   Arditi et al. 2024, section 2.4, directional ablation (on the stream at the blocks' borders, where
              theirs also hooks what attention and MLP add within a block)
    """
    unit = direction / direction.norm()

    def without(state: torch.Tensor) -> torch.Tensor:
        here = unit.to(state)
        return state - (state @ here)[..., None] * here

    with _changed(model, without, range(len(language_layers(model)))):
        yield


@contextmanager
def added(model: PreTrainedModel, vector: torch.Tensor, layer: int) -> Iterator[None]:
    """Add a vector to what one block puts out, at all positions.

    Shapes:   vector  [D]
    Source:   Arditi et al. 2024, section 2.4, activation addition
    """
    with _changed(model, lambda state: state + vector.to(state), [layer], entering=False):
        yield


@contextmanager
def _changed(
    model: PreTrainedModel, change: Callable[[torch.Tensor], torch.Tensor], which: Sequence[int], entering: bool = True
) -> Iterator[None]:
    """Put a function between the blocks: on what the chosen ones put out, and on what enters the first one."""
    layers = language_layers(model)

    def leaving(_: Any, __: Any, out: Any) -> Any:
        return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)

    hooks = [layers[i].register_forward_hook(leaving) for i in which]
    if entering:
        hooks.append(layers[0].register_forward_pre_hook(lambda _, inputs: (change(inputs[0]), *inputs[1:])))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def difference_of_means(harmful: torch.Tensor, harmless: torch.Tensor) -> torch.Tensor:
    """The refusal direction of every layer: from the mean of the harmless states to the mean of the harmful ones.

    Shapes:   [N, L, D], [M, L, D]  ->  [L, D]
    Source:   Arditi et al. 2024, section 2.3
    """
    return harmful.mean(0) - harmless.mean(0)
