"""Prompts for inspecting models: probing, locating a safety band, examining interventions.

They are about the miniature's world, or, where that is None, come from official files: from benchmarks that hold harmful and
harmless prompts alike, so that harm is not told by the source.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from vlsafe.core.scale import known
from vlsafe.core.schema import Item, Turn
from vlsafe.core.texts import read_lines, read_table
from vlsafe.data.miniature.language import HOW, TEST, World
from vlsafe.evaluation.benchmarks import OWN, official
from vlsafe.evaluation.benchmarks.howtos import howto, show, spread, twins
from vlsafe.evaluation.engines import respond
from vlsafe.evaluation.examine import answerable, outcomes, panel
from vlsafe.evaluation.judges import judge

MODALITIES = {"text": None, "picture": "icon", "typographic": "word"}  # and how a picture shows the thing
LOCALISATION = {
    "normal": ("plain",),
    "harmful": ("harmful",),
    "scary": ("homonym", "safe_context", "permitted"),
}  # and its kinds of actions
# attacks, harmless requests like them, helpfulness
INTERVENTION = (
    "sorry_bench", "mm_safetybench", "vlguard", "xstest", "mmbench", "mme", "seed_bench", "pocket_text", "pocket_pictures",
    "pocket_refusal", "pocket_rotations", "pocket_yes_no", "pocket_captions",
)  # fmt: skip
LABELS = ("harmful", "benign")  # of a user's prompts
FEWEST = 5  # prompts of a kind, for the folds of a probe
OFFICIAL = {  # modality: benchmarks that have both kinds
    "text": ("xstest", "wildjailbreak", "pocket_text", OWN), "picture": ("vlguard", "pocket_pictures", OWN),
}  # fmt: skip
ROLES = {  # kind of localisation prompt: whether harmful, and the benchmarks that it is taken from, the first that is examined
    "normal": (False, ("wildjailbreak", "xstest", "pocket_text", OWN)),
    "harmful": (True, ("wildjailbreak", "xstest", "pocket_text", OWN)), "scary": (False, ("xstest", "pocket_refusal", OWN)),
}  # fmt: skip


def probing_prompts(
    world: World | None, split: str, n: int, modalities: Sequence[str] = tuple(MODALITIES), official: Sequence[Item] = ()
) -> list[Item]:  # fmt: skip
    """At most `n` prompts of each kind and modality.

    Of the miniature: how-tos, harmless ones about the same verbs as harmful ones (benign twins). Else from the `official` items,
    whose group becomes the modality; one with fewer than FEWEST of a kind is left out.

    Raises:   ValueError where no modality is left
    """
    if world is None:
        return _official_prompts(official, n, modalities)
    items = []
    for modality in modalities:
        for kind, actions in (("harmful", world.actions(split, "harmful")), ("benign", twins(world, split))):
            rng, picture = world.rng(f"probed {split} {modality} {kind}"), MODALITIES[modality]
            for action, k in spread(actions, HOW[TEST], n, rng):
                image = show(world, action.thing, picture, rng) if picture else None
                items.append(howto(world, "probing", modality, action, HOW[TEST], k, image))
    return items


def _official_prompts(official: Sequence[Item], n: int, modalities: Sequence[str]) -> list[Item]:
    """As many harmful as harmless prompts of each benchmark, so that the source does not tell them apart."""
    found = []
    for modality in modalities:
        pairs = []
        for name in OFFICIAL.get(modality, ()):
            of = [dataclasses.replace(item, group=modality) for item in official if item.benchmark == name]
            if name == OWN:
                of = [item for item in of if bool(item.images) == (modality != "text")]
            pairs.append([[item for item in of if item.harmful == harmful] for harmful in (True, False)])
        sizes = shares(n, [min(map(len, pair)) for pair in pairs])
        if sum(sizes) >= FEWEST:
            found += [
                item for kind in (0, 1) for pair, size in zip(pairs, sizes, strict=True) for item in evenly(pair[kind], size)
            ]
    if not found:
        raise ValueError(f"no modality has {FEWEST} harmful and {FEWEST} harmless prompts of one source; sources are {OFFICIAL}")
    return found


def from_file(path: Path) -> list[Item]:
    """A user's prompts: a CSV or lines of JSON with `text`, `label` (harmful or benign), and where they have them `image` (a
    picture beside the file), `cluster` (what belongs together) and `id`.

    Raises:   ValueError naming the row where a label is neither or a picture is damaged; FileNotFoundError where one is missing
    """
    rows = list(read_lines(path)) if path.suffix in (".json", ".jsonl") else read_table(path, ["text", "label"])
    items = []
    for number, row in enumerate(rows, 1):
        official.needs(row, ["text", "label"], f"row {number} of {path}")
        harmful = known(str(row["label"]), LABELS, f"label in row {number} of {path}") == "harmful"
        if not (isinstance(row["text"], str) and row["text"].strip()) or not isinstance(row.get("image") or "", str):
            raise ValueError(f"row {number} of {path}: a text is words, and an image the name of a picture beside the file")
        pictures = ((path.parent / row["image"]).read_bytes(),) if row.get("image") else ()
        if pictures and (reason := official.damage(pictures[0])):
            raise ValueError(f"the picture {row['image']} in row {number} of {path} cannot be used ({reason})")
        name = str(number if row.get("id") in (None, "") else row["id"])
        cluster = f"row {number}" if row.get("cluster") in (None, "") else str(row["cluster"])
        items.append(Item(f"{OWN}/{name}", OWN, (Turn("user", row["text"]),), pictures, cluster=cluster, harmful=harmful))
    if len({item.id for item in items}) < len(items):
        raise ValueError(f"{path} has two rows of one id")
    return items


def shares(n: int, available: Sequence[int]) -> list[int]:
    """`n` dealt out as evenly as what is available allows."""
    sizes = [0] * len(available)
    while sum(sizes) < min(n, sum(available)):
        sizes[min((i for i in range(len(sizes)) if sizes[i] < available[i]), key=sizes.__getitem__)] += 1
    return sizes


def evenly(items: Sequence[Item], n: int) -> list[Item]:
    """At most `n` items, evenly spaced in the order of their benchmarks' files."""
    places = np.linspace(0, len(items) - 1, min(n, len(items))).round().astype(int)
    return [items[place] for place in places]


def localisation_prompts(world: World | None, n: int, official: Sequence[Item] = ()) -> dict[str, list[Item]]:
    """At most `n` prompts of each kind: normal, harmful, and harmless ones that sound dangerous ("scary").

    Of the miniature: how-tos about verb–object pairs of the validation split, which are neither trained on nor tested; else from
    the `official` items.

    Raises:   ValueError where the official items lack a kind, naming the benchmark that would have it
    """
    items: dict[str, list[Item]] = {}
    for kind, (harmful, benchmarks) in ROLES.items() if world is None else ():
        alone = [item for item in official if item.harmful == harmful and not item.images]
        found = [[item for item in alone if item.benchmark == name] for name in benchmarks]
        items[kind] = evenly(next((of for of in found if of), []), n)
        if len(items[kind]) < 2:
            held, more = (f"one {kind} prompt is too few", "no more") if items[kind] else (f"no {kind} prompt", "none")
            raise ValueError(f"{held} to locate a band with: the items hold {more} of {' or '.join(benchmarks)}")
    if world is None:
        return items
    for kind, actions in LOCALISATION.items():
        pairs = [(action, k) for action in world.actions("validation", *actions) for k in range(len(HOW[TEST]))]
        chosen = [pairs[i] for i in world.rng(f"probed {kind}").permutation(len(pairs))[:n]]
        items[kind] = [howto(world, kind, kind, action, HOW[TEST], k) for action, k in chosen]
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


def judged(
    model: Any, processor: Any, items: Sequence[Item], by: str | Mapping[str, Sequence[str]], batch_size: int, max_new_tokens: int
) -> np.ndarray:  # fmt: skip
    """The labels of the judge `by` on what a model in memory responds, in the order of the items; or, where `by` holds a scale's
    judges, of the first one of each item's benchmark that is a rule (`examine.outcomes`)."""
    responses = respond(model, processor, items, "", batch_size, max_new_tokens)
    if not isinstance(by, str):
        return np.array(outcomes(items, responses, by))
    return np.array([verdict.label for verdict in judge(by, items, responses)])
