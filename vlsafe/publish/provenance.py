"""What stands beside the results: stamps, tables as files, differences of two result sets, published numbers.

Loads no model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from vlsafe.analysis.measures import MEASURES, Lacking
from vlsafe.core import store
from vlsafe.core.scale import known
from vlsafe.core.schema import MAIN_LINE

DRAWN_BY = ("matplotlib", "numpy", "pandas", "scipy", "statsmodels")
# Numbers that say which line it is.
COORDINATES = ("seed", "step", "layer", "start", "end", "width", "ratio", "strength", "factor", "claim")
PUBLISHED = ["model", "measure", "value", "maximum", "tolerance", "source"]
ARTEFACTS = yaml.safe_load((Path(__file__).parent / "templates" / "artefacts.yaml").read_text(encoding="utf-8"))


def stamp(artefact: str, scale: str, manifests: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What an artefact is made of: its runs with their digests, commits and versions, and what drew it. No time, no path."""
    runs = [run for run in manifests if made_of(artefact, f"{run['stage']}/{run['recipe']}")]
    versions = pd.DataFrame([run["packages"] for run in runs]).sort_index(axis=1)
    return {
        "artefact": artefact, "scale": scale, "drawn_by_commit": store.commit(),
        "drawn_by": {name: store.version(name) for name in DRAWN_BY},
        "backbones": sorted({run["backbone"] for run in runs}), "seeds": sorted({run["seed"] for run in runs}),
        "commits": sorted({str(run["commit"]) for run in runs}),
        "packages": {name: ", ".join(sorted(set(column.dropna()))) for name, column in versions.items()},
        "runs": {f"{r['backbone']}/seed{r['seed']}/{r['stage']}/{r['recipe']}": r["digest"] for r in runs},
    }  # fmt: skip


def made_of(artefact: str, stage: str, reason: str = "") -> bool:
    """Whether an artefact's numbers may stand in a stage's run. The `reason` why it is not there may name those that it needs;
    where it needs something else, such as printed numbers, there is no such stage."""
    own = [] if reason.startswith("needs ") else ARTEFACTS["runs"].get(artefact.partition("_")[0], ["*"])
    return any(fnmatchcase(stage, glob) for glob in re.findall(r"[a-z]+/[\w.*-]+", reason) or own)


def studies_in(folder: Path) -> set[tuple[str, int]]:
    """Backbone and seed of the studies that a folder's tables are of."""
    runs = json.loads(path.read_text(encoding="utf-8")) if (path := folder / "provenance.json").exists() else []
    return {(run["backbone"], run["seed"]) for run in runs if run["backbone"] != "shared"}


def hours(manifests: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """How long the runs behind a gallery took, a row for each backbone and stage, of which merges' answers are one.

    Units:    hours of the clock, of the try that made a run whole
    Raises:   Lacking where no run is named
    """
    if not manifests:
        raise Lacking("the runs behind it are not named")
    runs = pd.DataFrame(manifests)
    runs["stage"] += np.where(runs["recipe"].str.startswith("merge.") & (runs["stage"] == "responses"), "/merge.*", "")
    found = runs.groupby(["backbone", "stage"], sort=False)
    lines = found.agg(runs=("seconds", "size"), seeds=("seed", "nunique"), hours=("seconds", lambda each: each.sum() / 3600))
    return lines.assign(**{"hours a seed": lines["hours"] / lines["seeds"]}).reset_index()


def write_table(
    frame: pd.DataFrame, folder: Path, name: str, title: str, caption: str, shown: pd.DataFrame | None = None
) -> None:
    """A table as CSV for the sceptic and Markdown for the eye (`shown`, where that is another form), to four places."""
    folder.mkdir(parents=True, exist_ok=True)
    rounded = frame.round(4)
    store.write_text(folder / f"{name}.csv", rounded.to_csv(index=False))
    text = markdown(rounded if shown is None else shown)
    store.write_text(folder / f"{name}.md", f"{title}\n\n{text}\n\n{caption}\n")


def markdown(frame: pd.DataFrame) -> str:
    """A frame as a Markdown table; missing values are empty cells, and what Markdown would take for its own is escaped."""
    cells = frame.astype(object).where(frame.notna(), "").astype(str)
    cells = cells.replace({r"([\\|*`])": r"\\\1", r"\s*\n\s*": " "}, regex=True)
    head = "| " + " | ".join(map(str, frame.columns)) + " |\n|" + "---|" * len(frame.columns)
    return "\n".join([head, *("| " + " | ".join(row) + " |" for row in cells.itertuples(index=False))])


def differences(a: Path, b: Path, atol: float) -> pd.DataFrame:
    """What differs between the CSV files of two folders by more than `atol`: file, what, in how many cells, by how much at most.

    Lines are matched by their words and COORDINATES, so a changed order is no difference.

    Raises:   FileNotFoundError where a folder holds no CSV file
    """
    names = {folder: {path.name for path in folder.glob("*.csv")} for folder in (a, b)}
    if empty := [folder for folder in (a, b) if not names[folder]]:
        raise FileNotFoundError(f"{empty[0]} holds no CSV file: it is no folder of results")
    lines = [{"file": name, "what": f"only in {a if name in names[a] else b}"} for name in names[a] ^ names[b]]
    for name in names[a] & names[b]:
        lines += [{"file": name, **line} for line in _table_differences(_csv(a / name), _csv(b / name), atol)]
    return pd.DataFrame(lines, columns=["file", "what", "cells", "largest"]).sort_values("file", kind="stable", ignore_index=True)


def _csv(path: Path) -> pd.DataFrame:
    """A table in which a list of numbers, as of the effects by seed, is a column per number."""
    try:
        frame = pd.read_csv(path)
    except ValueError as error:  # also what is no UTF-8, empty or ragged
        raise ValueError(f"{path} is no table of ours: {error}") from None
    for column in [name for name in frame if frame[name].astype(str).str.startswith("[").any()]:
        numbers = frame.pop(column).str.strip("[]").str.split(",", expand=True)
        frame = frame.join(numbers.apply(pd.to_numeric, errors="coerce").add_prefix(f"{column} "))
    return frame


def _table_differences(one: pd.DataFrame, two: pd.DataFrame, atol: float) -> list[dict[str, Any]]:
    """The differences of two tables: columns and lines that only one has, and numbers that lie apart."""
    lines = [
        {"what": f"column {column} only in the {place}", "cells": len(frame)}
        for place, frame, other in (("first", one, two), ("second", two, one))
        for column in frame.columns.difference(other.columns)
    ]
    shared = [column for column in one.columns if column in two.columns]
    numbers = [c for c in shared if c not in COORDINATES and all(pd.api.types.is_numeric_dtype(f[c]) for f in (one, two))]
    keys = [column for column in shared if column not in numbers]
    one, two = (_keyed(frame, keys) for frame in (one, two))
    for place, alone in (("first", one.index.difference(two.index)), ("second", two.index.difference(one.index))):
        lines += [{"what": f"lines only in the {place}", "cells": len(alone)}] * bool(len(alone))
    both = one.index.intersection(two.index)
    for column in numbers:
        x, y = (frame.loc[both, column].to_numpy(float) for frame in (one, two))
        apart = ~np.isclose(x, y, rtol=0, atol=atol, equal_nan=True)
        if apart.any():
            largest = np.nanmax(np.abs(x - y)[apart]) if not np.isnan((x - y)[apart]).all() else np.nan
            lines.append({"what": column, "cells": int(apart.sum()), "largest": float(largest)})
    return lines


def _keyed(frame: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """Lines by their keys as text; equal keys are told apart by their order."""
    words = [["" if pd.isna(v) else f"{v:g}" if isinstance(v, int | float) else str(v) for v in frame[key]] for key in keys]
    text = pd.Series(["|".join(of) for of in zip(*words, strict=True)] if words else "", index=frame.index, dtype=object)
    return frame.set_index(text + "|" + text.groupby(text).cumcount().astype(str))


def published(folder: Path) -> pd.DataFrame:
    """Published numbers, from every CSV of a folder, as fractions of their maximum; empty where there is none.

    Raises:   ValueError for other columns, an unknown measure (with the nearest known one), a number outside [0, maximum], or one
              without a source or a tolerance
    """
    frames = []
    for path in sorted(folder.glob("*.csv")):
        frame = _csv(path)
        if list(frame.columns) != PUBLISHED:
            raise ValueError(f"{path.name} needs the columns {', '.join(PUBLISHED)}; it has {', '.join(frame.columns)}")
        if wrong := [name for name in ("value", "maximum", "tolerance") if frame[name].dtype.kind not in "if"]:
            raise ValueError(f"{path.name}: a {wrong[0]} is a number with a point, without a sign of percent")
        for measure in frame["measure"]:
            known(measure, MEASURES, f"measure in {path.name}")
        if not frame["value"].between(0, frame["maximum"]).all() or frame["source"].isna().any():
            raise ValueError(f"{path.name}: every value lies between 0 and its maximum, and has a source")
        if not (frame["tolerance"] > 0).all():
            raise ValueError(f"{path.name}: every value has a tolerance above 0, in its own unit")
        frames.append(frame)
    printed = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=PUBLISHED)
    return printed.assign(fraction=(printed["value"] / printed["maximum"]).astype(float))


def compare_published(printed: pd.DataFrame, lines: pd.DataFrame, run: str = MAIN_LINE["adapted"]) -> pd.DataFrame:
    """Published numbers beside a model's mean over seeds per backbone, from T08's lines, and whether it lies within the tolerance
    ("yes", "no"; empty where items of ours stand for the official ones); then one line for each other measure of ours.

    Units:    fractions; the value, its maximum and tolerance are as printed
    """
    ours = lines[lines["stage"] + "/" + lines["recipe"] == run].groupby(["measure", "backbone"])["value"].mean().unstack()
    without = [measure for measure in MEASURES if measure in ours.index and measure not in set(printed["measure"])]
    whole = pd.concat([printed, pd.DataFrame({"measure": without})], ignore_index=True)
    for backbone in ours:
        own = whole["measure"].map(ours[backbone])
        apart, unknown = (own - whole["fraction"]).abs() * whole["maximum"], own.isna() | whole["value"].isna()
        unknown |= ~whole.get("official", pd.Series(True, whole.index)).eq(True)
        agrees = np.where(apart <= whole["tolerance"], "yes", "no")
        whole[f"ours, {backbone}"], whole[f"agrees, {backbone}"] = own, np.where(unknown, "", agrees)
    return whole


def held(printed: pd.DataFrame, folder: Path, run: str) -> tuple[pd.DataFrame, bool]:
    """`compare_published` of a model in a gallery's folder, the measures that it has; and whether there is a published model with
    which all of them agree.

    Raises:   FileNotFoundError where the folder has no T08; ValueError for a model that it does not have, and for one without any
              measure that was published
    """
    path = folder / "T08_models.csv"
    if not path.exists():
        raise FileNotFoundError(f"{folder} holds no results of models (T08_models.csv); run `vlsafe gallery` first")
    if printed.empty:
        raise FileNotFoundError("env/published holds no published numbers (*.csv); run this where the Snakefile is")
    lines = _csv(path)
    if missing := {"stage", "recipe", "measure", "backbone", "value"} - set(lines):
        raise ValueError(f"{path} is no table of ours: it has no column {', '.join(sorted(missing))}")
    known(run, set(lines["stage"] + "/" + lines["recipe"]), "run in T08_models.csv")
    frame = compare_published(printed, lines, run)
    own, agrees = (frame.filter(like=f"{column}, ") for column in ("ours", "agrees"))
    held_to = {model: set(agrees.loc[of.index].to_numpy().ravel()) - {""} for model, of in frame.groupby("model")}
    if not any(held_to.values()):
        raise ValueError(f"{run} of {path} has no measure with a published number: {', '.join(sorted(set(printed['measure'])))}")
    return frame[own.notna().any(axis=1)], {"yes"} in held_to.values()
