"""Prompts about the miniature's world for inspecting models: probing, locating a safety band, examining interventions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from vlsafe.core.schema import Item
from vlsafe.data.miniature.language import HOW, World
from vlsafe.evaluation.benchmarks.howtos import howto, show, spread, twins
from vlsafe.evaluation.engines import respond
from vlsafe.evaluation.examine import answerable, panel
from vlsafe.evaluation.judges import judge

MODALITIES = {"text": None, "picture": "icon", "typographic": "word"}  # and how a picture shows the thing
LOCALISATION = {"normal": ("plain",), "harmful": ("harmful",), "scary": ("homonym", "safe_context")}  # and its kinds of actions
INTERVENTION = ("sorry_bench", "mm_safetybench", "xstest", "mmbench", "mme", "seed_bench")  # attacks, benign twins, helpfulness


def probing_prompts(world: World, split: str, n: int, modalities: Sequence[str] = tuple(MODALITIES)) -> list[Item]:
    """At most `n` how-tos of each kind and modality; harmless ones ask for the same verbs as harmful ones (benign twins)."""
    items = []
    for modality in modalities:
        for kind, actions in (("harmful", world.actions(split, "harmful")), ("benign", twins(world, split))):
            rng, picture = world.rng(f"probed {split} {modality} {kind}"), MODALITIES[modality]
            for action, k in spread(actions, HOW, n, rng):
                image = show(world, action.thing, picture, rng) if picture else None
                items.append(howto(world, "probing", modality, action, HOW, k, image))
    return items


def localisation_prompts(world: World, n: int) -> dict[str, list[Item]]:
    """At most `n` how-tos of each kind; their verb–object pairs, of the validation split, are neither trained on nor tested."""
    items: dict[str, list[Item]] = {}
    for kind, actions in LOCALISATION.items():
        pairs = [(action, k) for action in world.actions("validation", *actions) for k in range(len(HOW))]
        chosen = [pairs[i] for i in world.rng(f"probed {kind}").permutation(len(pairs))[:n]]
        items[kind] = [howto(world, kind, kind, action, HOW, k) for action, k in chosen]
    return items


def intervention_items(items: Sequence[Item], size: int, multimodal: bool) -> list[Item]:
    """The panel on which a model is examined after an intervention, about `size` items of each benchmark."""
    return answerable([item for item in panel(items, size) if item.benchmark in INTERVENTION], multimodal)


def conversations(items: Sequence[Item]) -> list[tuple[Any, Any]]:
    """Turns and pictures of each item: prompts as the functions of `inspection` take them."""
    return [(item.turns, item.images) for item in items]


def attributes(items: Sequence[Item]) -> pd.DataFrame:
    """One row per item: its id, cluster (verb–object pair), group (modality), and whether it is harmful."""
    return pd.DataFrame([{"item": i.id, "cluster": i.cluster, "group": i.group, "harmful": i.harmful} for i in items])


def judged(model: Any, processor: Any, items: Sequence[Item], by: str, batch_size: int, max_new_tokens: int) -> np.ndarray:
    """The labels of the judge `by` on what a model in memory responds, in the order of the items."""
    responses = respond(model, processor, items, "", batch_size, max_new_tokens)
    return np.array([verdict.label for verdict in judge(by, items, responses)])
