"""What the gallery and the claims read: results of finished stages of several studies as frames. Loads no model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pandas as pd

from vlsafe import cards, store
from vlsafe.stages import tables, tried
from vlsafe.stages.study import Study, project_root


def results(studies: Sequence[Study], grid: str = "default") -> dict[str, pd.DataFrame]:
    """The frames that `gallery.make` takes, by name; what is missing is made.

    `raw`: raw tables, one row per item × model × judge. `audit`: the screened rows of each seed. `tried`: validation lines
    of all tuned checkpoints. `published`: what others have printed.
    """
    seeds = {study.seed: study for study in studies}  # a screen does not depend on the backbone
    audits = [
        pd.DataFrame(study.rows("screen/filtered", "audit.parquet")).assign(seed=seed)[lambda f: ["seed", *f.columns[:-1]]]
        for seed, study in seeds.items()
    ]
    return {
        "raw": read(studies, tables(grid), "raw.parquet"),
        "audit": pd.concat(audits, ignore_index=True),
        "published": cards.published(project_root() / "env" / "published"),
        "tried": pd.DataFrame([line for study in studies for line in tried(study, grid)]),
    }


def read(studies: Sequence[Study], names: Sequence[str], file: str) -> pd.DataFrame:
    """One file of several stages of several studies as one frame."""
    return pd.concat([pd.read_parquet(study.folder(name) / file) for study in studies for name in names], ignore_index=True)


def across(study: Study, grid: str = "default") -> list[Study]:
    """The given study, whether made or not, and all others of its scale and cellar whose raw tables are finished."""
    found = [study]
    for folder in sorted((study.root / study.scale.name).glob("*/seed*")):
        other = dataclasses.replace(study, backbone=folder.parent.name, seed=int(folder.name.removeprefix("seed")))
        known = other.backbone in study.scale.backbones and other != study
        if known and all(store.status(other.run(name)) == "valid" for name in tables(grid)):
            found.append(other)
    return found


def answers(studies: Sequence[Study], grid: str = "default") -> pd.DataFrame:
    """What every finished model answered in its full examination to what people can rate, with the prompt: what `human` takes."""
    frames = []
    for study in studies:
        names = [n for n in tables(grid) if n.startswith("examination/") and store.status(study.run(n)) == "valid"]
        prompts = pd.DataFrame(study.rows("world/corpora", "items.parquet"))[["id", "turns", "images"]].rename(
            columns={"id": "item"}
        )
        for name in names:
            raw, said = (read([study], [name], file) for file in ("raw.parquet", "responses.parquet"))
            judged = raw[(raw["exam"] == "full") & (raw["judge"] == "world")]
            frames.append(
                judged.merge(said[["item", "model", "text"]], on=["item", "model"]).merge(
                    prompts[["item", "turns", "images"]], on="item"
                )
            )
    return pd.concat(frames, ignore_index=True)
