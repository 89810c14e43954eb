"""Results of finished stages of several studies as frames, for the gallery and the claims. Loads no model, makes nothing."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from vlsafe import analysis
from vlsafe.core import store
from vlsafe.core.schema import to_row
from vlsafe.publish import provenance
from vlsafe.study import pocket
from vlsafe.study.graph import STAGES, planned, read_by
from vlsafe.study.study import Study, project_root

MODEL = ("backbone", "seed", "stage", "recipe")
# Frames of notebook 05 by name: stage, file, and whose it is where the file does not say so itself.
INSIDE = {
    "layers": ("probe/layers", "layers.parquet", ()), "sets": ("probe/layers", "sets.parquet", ()),
    "drift": ("probe/drift", "drift.parquet", ()), "alike": ("probe/drift", "alike.parquet", ()),
    "vectors": ("probe/objectives", "vectors.parquet", ()), "gradients": ("probe/objectives", "gradients.parquet", ()),
    "patched": ("causal/transplants", "raw.parquet", ()), "directed": ("causal/directions", "raw.parquet", ()),
    "seeing": ("probe/seeing", "seeing.parquet", ()), "moved": ("probe/seeing", "moved.parquet", ()),
    "curves": ("probe/localisation", "curves.parquet", ("backbone", "seed")),
    "scaling": ("probe/localisation", "scaling.parquet", ("backbone", "seed")),
}  # fmt: skip

FRAMES = {name: stage for name, (stage, _, _) in INSIDE.items()} | {
    **dict.fromkeys(("raw", "texts"), "an examination (examination/*)"), "perplexity": "judging/perplexity",
    "audit": "screen/filtered", "validation": "a tuned model (safety/*)", "published": "printed numbers",
    **dict.fromkeys(("panel", "merged"), "a merge (merge/*)"), "located": "probe/localisation",
    "frozen": "the SPPFT grid (sppft/*)", "searched": "a search for the worst case (worst/*)",
    "losses": "a training of stage 2 (instruct/*)", "people": "labels of people, which packages hold",
    "miniature": "the committed ledger of the miniature and another scale's",
    "remedy": "examination/safety.mtl-full and examination/safety.mtl-pcgrad-full",
}  # fmt: skip
"""Name of a frame that the gallery reads -> the stages that it is of."""


def results(studies: Sequence[Study], grid: str = "default") -> dict[str, pd.DataFrame]:
    """The frames that `gallery.make` takes, by name; a frame none of whose stages is finished is left out.

    `texts`: answers. `perplexity`: of answers under the parents. `raw`: raw tables, a row per item × model × judge, with
    whether all seeds share their items, as where benchmarks are loaded (`shared`). `audit`: the screened rows of each seed.
    `validation`: validation lines of all tuned checkpoints. `published`: numbers that others have printed, `official`: whether
    these studies answered the same items. `panel`, `merged`: panel answers and validation lines of all merges. `losses`: those
    of the steps of stage 2. `people`: a judge against them. `searched`: trials of the search for the worst case. `miniature`:
    its ledger.
    """
    of = partial(read_by_all, studies, grid=grid)
    screens = {study.run("screen/filtered").folder: study for study in reversed(studies)}  # backbones share them, maybe seeds too
    by_seed, official = list(screens.values())[::-1], studies[0].scale.source == "load" and not studies[0].packed
    raw = read(studies, of("tables"), "raw.parquet")
    frames = {
        "raw": raw if raw is None else raw.assign(shared=studies[0].scale.loaded is not None),
        "texts": read(studies, of("tables"), "responses.parquet", ("backbone", "seed"), optional=True),
        "audit": read(by_seed, ["screen/filtered"], "audit.parquet", ("seed",)),
        "validation": read(studies, of("tuned"), "validation.parquet", MODEL),
        "published": provenance.published(project_root() / "env" / "published").assign(official=official),
        "panel": read(studies, of("merging"), "panel.parquet"),
        "merged": read(studies, of("merging"), "validation.parquet"),
        "searched": trials(studies, of("durability")),
        "perplexity": read(studies, of("fluency"), "perplexity.parquet"),
        "losses": losses(studies, grid),
        "people": people(studies),
        "miniature": miniature(studies),
    }
    return {name: frame for name, frame in frames.items() if frame is not None} | probing_frames(studies, grid)


def trials(studies: Sequence[Study], names: Sequence[str]) -> pd.DataFrame | None:
    """The trials of every search for the worst case, with the most harm so far under the scale's bound."""
    lines = read(studies, names, "validation.parquet", optional=True)
    return None if lines is None else analysis.durability.searched(lines, studies[0].scale.durability.loss)


def people(studies: Sequence[Study]) -> pd.DataFrame | None:
    """How far a judge agrees with people who labelled answers that a package ships, from the stage that read them."""
    rows = [
        {"judge": pocket.JUDGE, "people": kind, **found}
        for study, name, _ in list(finished(studies, ["world/corpora"]))[:1] if study.packed
        for kind, found in study.numbers(name)["judge"].items()
    ]  # fmt: skip
    return pd.DataFrame(rows) if rows else None


def miniature(studies: Sequence[Study]) -> pd.DataFrame | None:
    """The committed ledger of the miniature, for that of a scale that loads to stand beside."""
    path = project_root() / "figures" / "mini" / "T09_claims.csv"
    loaded = any(study.scale.loaded for study in studies)
    return pd.read_csv(path, dtype={"claim": str}) if path.exists() and loaded else None


def losses(studies: Sequence[Study], grid: str = "default") -> pd.DataFrame | None:
    """The loss of every step of every finished recipe of stage 2. Units:    nats per token"""
    frames = [
        pd.DataFrame({"loss": json.loads((folder / "losses.json").read_text(encoding="utf-8"))})
        .rename_axis("step").reset_index().assign(backbone=study.backbone, seed=study.seed, recipe=name.partition("/")[2])
        for study, name, folder in finished(studies, read_by_all(studies, "adaptation", grid))
        if study.adopted is None  # others have trained that model
    ]  # fmt: skip
    return pd.concat(frames, ignore_index=True) if frames else None


def probing_frames(studies: Sequence[Study], grid: str = "default") -> dict[str, pd.DataFrame]:
    """What notebook 05 and its pictures read, by the names of INSIDE, of those stages that are finished.

    And `located`: the band of each study; `remedy`: raw rows of multitask tuning with and without conflicts; `frozen`: those of
    the SPPFT grid, which only the grid "full" has.
    """
    frames = {name: read(studies, [stage], file, columns) for name, (stage, file, columns) in INSIDE.items()}
    located = [
        {"backbone": study.backbone, "seed": study.seed, "start": found["band"][0], "end": found["band"][1]}
        | {key: found[key] for key in ("located", "reason", "prompts", "p")}
        for study, name, _ in finished(studies, ["probe/localisation"])
        for found in [study.numbers(name)]
    ]
    probed = read_by_all(studies, "probing", grid)
    remedies = ["safety/mtl-full", *(name for name in probed if name.startswith("safety/"))]
    frames |= {
        "located": pd.DataFrame(located) if located else None,
        "remedy": read(studies, [f"examination/{name.replace('/', '.')}" for name in remedies], "raw.parquet"),
        "frozen": read(studies, [name for name in probed if name.startswith("sppft/")], "raw.parquet", optional=True),
    }  # a study may have no random sets
    return {name: frame for name, frame in frames.items() if frame is not None}


def read_by_all(studies: Sequence[Study], word: str, grid: str = "default") -> list[str]:
    """The stages that a notebook reads of any of the studies, whose backbones may have different ones."""
    return list(dict.fromkeys(name for study in studies for name in read_by(study, word, grid)))


def missing(studies: Sequence[Study], grid: str = "default") -> dict[str, str]:
    """The stages that some of the studies have no valid run of, and why: the scale does without them, they are not made yet, or
    the grid "full" alone has them.
    """
    without = {name: reason for study in studies for name, reason in study.left_out(grid).items()}
    lacking: dict[str, list[str]] = {}
    for study in studies:
        for name in planned(study, grid):
            if not list(finished([study], [name])):
                lacking.setdefault(name, []).append(f"{study.backbone} seed {study.seed}")
    for name, units in lacking.items():
        without[name] = "not made yet" + (f": {', '.join(units)}" if len(units) < len(studies) else "")
    own = {name for study in studies for name in planned(study, grid)}
    wide = dict.fromkeys(name for study in studies for name in planned(study, "full") if not name.endswith(".full"))
    return without | {name: 'the grid "full" alone has it' for name in wide if name not in own}


def finished(studies: Sequence[Study], names: Sequence[str]) -> Iterator[tuple[Study, str, Path]]:
    """Every stage of every study whose results are there, and its folder.

    For a sweep of merges that only the grid "full" makes, the default one stands in, which is a part of it.
    """
    for study in studies:
        without = study.left_out("full") if study.adopted else {}
        for planned_name in (name for name in names if name not in without):
            for name in dict.fromkeys((planned_name, planned_name.removesuffix(".full"))):
                if name in STAGES and store.readable(study.run(name)):
                    yield study, name, study.run(name).folder
                    break


def made_by(studies: Sequence[Study], names: Sequence[str]) -> list[dict[str, object]]:
    """What made each finished run, once."""
    runs = {folder: study.run(name) for study, name, folder in finished(studies, names)}
    kept = ("backbone", "seed", "stage", "recipe", "digest", "commit", "packages", "seconds")
    return [{key: manifest[key] for key in kept} for manifest in map(store.manifest_of, runs.values())]


def read(
    studies: Sequence[Study], names: Sequence[str], file: str, columns: Sequence[str] = (), optional: bool = False
) -> pd.DataFrame | None:
    """One file of several stages of several studies as one frame; None where none of them is finished.

    `columns`: which of backbone, seed, stage and recipe to put before the file's own columns. An `optional` file may be missing.
    """
    frames = []
    for study, name, folder in finished(studies, names):
        if (folder / file).exists() or not optional:
            values = dict(zip(MODEL, (study.backbone, study.seed, *name.split("/", 1)), strict=True))
            frame = pd.read_parquet(folder / file)
            frame = frame.assign(**{column: _objects(frame[column]) for column in frame.select_dtypes("str")})
            for place, column in enumerate(columns):
                frame.insert(place, column, values[column])
            frames.append(frame)
    return pd.concat(frames, ignore_index=True) if frames else None


def _objects(texts: pd.Series) -> pd.Series:
    """Texts as objects, of which small groups are taken faster; equal ones are one object: a quarter of the memory."""
    codes, found = pd.factorize(texts)
    return pd.Series(np.append(found.astype(object), np.nan)[codes], texts.index, object)


def studies_in_store(study: Study) -> list[Study]:
    """All studies of a scale that have runs in the run store, the one passed in first."""
    folders = sorted((study.root / study.scale.name).glob("*/seed*"))
    units = [(folder.parent.name, int(number)) for folder in folders if (number := folder.name.removeprefix("seed")).isdecimal()]
    others = [unit for unit in units if unit[0] in study.scale.backbones and unit != (study.backbone, study.seed)]
    return [study, *(dataclasses.replace(study, backbone=backbone, seed=seed) for backbone, seed in others)]


def answers(studies: Sequence[Study], grid: str = "default") -> pd.DataFrame:
    """What every finished model answered in its full examination, with the prompt: what `human.export` takes.

    Raises:   ValueError where nothing was examined yet, or the store holds archived results, without prompts
    """
    from vlsafe.evaluation import human  # its statistics take a while to import

    frames, names = [], [name for name in read_by_all(studies, "tables", grid) if name.startswith(("examination/", "merge/"))]
    for study in studies:
        if store.status(study.run("world/corpora")) == "without weights":
            raise ValueError(f"{study.root} holds archived results without the prompts; export where the runs were made")
        if not any(True for _ in finished([study], names)):
            continue  # and no world is made
        prompts = pd.DataFrame(map(to_row, study.items())).rename(columns={"id": "item"})
        for _, _, folder in finished([study], names):
            raw, responses = (pd.read_parquet(folder / file) for file in ("raw.parquet", "responses.parquet"))
            answered = raw.loc[raw["exam"] == "full", human.KEY[2:]].drop_duplicates(["item", "model"])  # one row per response
            answered = answered.merge(responses[["item", "model", "text"]].drop_duplicates(), on=["item", "model"])
            frames.append(answered.merge(prompts[["item", "turns", "images"]], on="item"))
    if not frames:
        raise ValueError("no examination is made yet; `make reproduce` makes them")
    return pd.concat(frames, ignore_index=True)
