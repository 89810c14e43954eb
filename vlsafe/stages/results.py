"""What the gallery and the claims read: results of finished stages of several studies as frames. Loads no model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pandas as pd

from vlsafe import cards, modelcards, store
from vlsafe.stages import STAGES, merging, planned, probed, tables
from vlsafe.stages.study import Study, project_root


def results(studies: Sequence[Study], grid: str = "default") -> dict[str, pd.DataFrame]:
    """The frames that `gallery.make` takes, by name, of those stages of a grid that are made. Nothing is made here.

    `raw`: raw tables, one row per item × model × judge. `audit`: the screened rows of each seed. `tried`: validation lines
    of all tuned checkpoints. `published`: numbers that others have printed. `panel`, `merged`: panel answers and validation
    lines of all merges. A frame none of whose stages is made is left out.
    """
    once = list({study.seed: study for study in studies}.values())  # a screen does not depend on the backbone
    tuned = [name for name in planned(grid) if name.startswith("safety/")]
    found = {
        "raw": read(studies, tables(grid), "raw.parquet"),
        "audit": read(once, ["screen/filtered"], "audit.parquet", ("seed",)),
        "tried": read(studies, tuned, "validation.parquet", ("backbone", "seed", "stage", "recipe")),
        "published": cards.published(project_root() / "env" / "published"),
        "panel": read(studies, merging.names(grid), "panel.parquet"),
        "merged": read(studies, merging.names(grid), "validation.parquet"),
    }
    return {name: frame for name, frame in found.items() if frame is not None} | inside(studies, grid)


# Frames of notebook 05 by name: stage, file, and whose it is where the file does not say so itself.
INSIDE = {
    "layers": ("probe/layers", "layers.parquet", ()), "sets": ("probe/layers", "sets.parquet", ()),
    "drift": ("probe/drift", "drift.parquet", ()), "alike": ("probe/drift", "alike.parquet", ()),
    "vectors": ("probe/objectives", "vectors.parquet", ()), "gradients": ("probe/objectives", "gradients.parquet", ()),
    "patched": ("causal/transplants", "raw.parquet", ()), "directed": ("causal/directions", "raw.parquet", ()),
    "curves": ("probe/localisation", "curves.parquet", ("backbone", "seed")),
    "scaling": ("probe/localisation", "scaling.parquet", ("backbone", "seed")),
}  # fmt: skip


def inside(studies: Sequence[Study], grid: str = "default") -> dict[str, pd.DataFrame]:
    """What notebook 05 and its pictures read, by the names of INSIDE, of those stages that are made.

    And `located`: the band of each study; `remedy`: raw rows of multitask tuning with and without conflicts; `validated`:
    their checkpoints; `frozen`: raw rows of the SPPFT grid, which only the grid "full" has.
    """
    found = {name: read(studies, [stage], file, whose) for name, (stage, file, whose) in INSIDE.items()}
    bands = []
    for study, name, _ in made(studies, ["probe/localisation"]):
        told = study.numbers(name)
        line = {"backbone": study.backbone, "seed": study.seed, "start": told["band"][0], "end": told["band"][1]}
        bands.append(line | {key: told[key] for key in ("located", "reason", "prompts")})
    found["located"] = pd.DataFrame(bands) if bands else None
    remedies = ["safety/mtl-full", *(name for name in probed() if name.startswith("safety/"))]
    found["remedy"] = read(studies, [f"examination/{name.replace('/', '.')}" for name in remedies], "raw.parquet")
    found["validated"] = read(studies, remedies, "validation.parquet", ("backbone", "seed", "recipe"))
    frozen = [
        folder / "raw.parquet" for *_, folder in made(studies, [name for name in probed(grid) if name.startswith("sppft/")])
    ]
    frames = [pd.read_parquet(file) for file in frozen if file.exists()]  # a study may have no random sets
    found["frozen"] = pd.concat(frames, ignore_index=True) if frames else None
    return {name: frame for name, frame in found.items() if frame is not None}


def made(studies: Sequence[Study], names: Sequence[str]) -> Iterator[tuple[Study, str, Path]]:
    """Every stage of every study whose run is valid, and its folder."""
    for study in studies:
        for name in names:
            if store.status(run := study.run(name)) == "valid":
                yield study, name, run.folder


def read(studies: Sequence[Study], names: Sequence[str], file: str, whose: Sequence[str] = ()) -> pd.DataFrame | None:
    """One file of several stages of several studies as one frame; None where none of them is made.

    `whose`: which of backbone, seed, stage and recipe to put before the file's own columns.
    """
    frames = []
    for study, name, folder in made(studies, names):
        stage, _, recipe = name.partition("/")
        told = {"backbone": study.backbone, "seed": study.seed, "stage": stage, "recipe": recipe}
        frame = pd.read_parquet(folder / file)
        for place, column in enumerate(whose):
            frame.insert(place, column, told[column])
        frames.append(frame)
    return pd.concat(frames, ignore_index=True) if frames else None


def card(study: Study, name: str) -> str:
    """The model card of a finished run, from its lineage and whatever examined it; nothing is made for it.

    Raises:   FileNotFoundError for a run that is not there; ValueError for one that left no model
    """
    if (found := store.status(study.run(name))) != "valid":
        raise FileNotFoundError(f"{name} of {study.backbone} seed {study.seed} is {found}; `vlsafe stage {name}` makes it")
    noted = store.told(study.run(name))
    origins = [store.told(study.run(before)) for before in lineage(name)]
    marked = [f"examination/{name.replace('/', '.')}", "judging/guard-text"]
    tables = [study.run(of).folder / "raw.parquet" for of in marked if of in STAGES and store.status(study.run(of)) == "valid"]
    raw = pd.concat([pd.read_parquet(path) for path in tables], ignore_index=True) if tables else None
    return modelcards.card(noted, origins, raw, outside(study))


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


def across(study: Study) -> list[Study]:
    """All studies of a scale that have runs in the cellar, the given one first."""
    places = sorted((study.root / study.scale.name).glob("*/seed*"))
    found = [(place.parent.name, int(place.name.removeprefix("seed"))) for place in places]
    known = [place for place in found if place[0] in study.scale.backbones and place != (study.backbone, study.seed)]
    return [study, *(dataclasses.replace(study, backbone=backbone, seed=seed) for backbone, seed in known)]


def answers(studies: Sequence[Study], grid: str = "default") -> pd.DataFrame:
    """What every finished model answered in its full examination, with the prompt: what `human.export` takes.

    Raises:   ValueError where nothing was examined yet
    """
    frames = []
    for study in studies:
        prompts = pd.DataFrame(study.rows("world/corpora", "items.parquet")).rename(columns={"id": "item"})
        for _, _, folder in made([study], [name for name in tables(grid) if name.startswith(("examination/", "merge/"))]):
            raw, said = (pd.read_parquet(folder / file) for file in ("raw.parquet", "responses.parquet"))
            judged = raw[(raw["exam"] == "full") & (raw["judge"] == "world")].merge(
                said[["item", "model", "text"]], on=["item", "model"]
            )
            frames.append(judged.merge(prompts[["item", "turns", "images"]], on="item"))
    if not frames:
        raise ValueError("no examination is made yet; `make reproduce` makes them")
    return pd.concat(frames, ignore_index=True)
