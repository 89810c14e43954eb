"""Model cards of finished runs: their manifests, their lineage and whatever examined them, handed to `modelcards`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pandas as pd

from vlsafe import modelcards, store
from vlsafe.stages import STAGES
from vlsafe.stages.study import Study


def card(study: Study, name: str) -> str:
    """The model card of a finished run, from its lineage and whatever examined it; nothing is made for it.

    Raises:   FileNotFoundError for a run that is not there; ValueError for one that left no model
    """
    if (found := store.status(study.run(name))) != "valid":
        raise FileNotFoundError(f"{name} of {study.backbone} seed {study.seed} is {found}; `vlsafe stage {name}` makes it")
    noted = store.told(study.run(name))
    made = [store.told(study.run(before)) for before in lineage(name)]
    marked = [f"examination/{name.replace('/', '.')}", "judging/guard-text"]
    tables = [study.run(of).folder / "raw.parquet" for of in marked if of in STAGES and store.status(study.run(of)) == "valid"]
    raw = pd.concat([pd.read_parquet(path) for path in tables], ignore_index=True) if tables else None
    return modelcards.card(noted, made, raw, outside(study))


def write_cards(study: Study, names: Sequence[str]) -> list[Path]:
    """The cards of those finished runs that left a model, each beside its run's folder: what is in a folder stays as it was."""
    written = []
    for name in names:
        run = study.run(name)
        if store.status(run) == "valid" and modelcards.has_weights(store.told(run)):
            written.append(run.folder.with_name(f"{run.recipe}.card.md"))
            store.write_text(written[-1], card(study, name))
    return written


def lineage(name: str) -> list[str]:
    """All stages that a run is made from, the first ones first."""
    return list(dict.fromkeys(each for needed in STAGES[name].inputs for each in (*lineage(needed), needed)))


def outside(study: Study) -> Mapping[str, Any]:
    """What a study takes from others, by role: everything with a repository among what its scale loads."""
    loaded = getattr(study.scale, "loaded", None)
    if loaded is None:
        return {}
    found = {field.name: getattr(loaded, field.name) for field in fields(loaded)}
    found = {role: getattr(value, "origin", value) for role, value in found.items()} | {"parent": loaded.parents[study.backbone]}
    return {role: origin for role, origin in found.items() if hasattr(origin, "repo")}
