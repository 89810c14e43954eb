"""The generated parts of README.md: what stands between markers is made from the committed artefacts, never by hand.

A part begins with `<!-- generated: NAME -->` and ends with `<!-- end generated -->`. NAME is one of PARTS or a table of the
figures folder. Imports no model library.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from vlsafe.core.scale import known
from vlsafe.publish import provenance

MARKED = re.compile(r"(<!-- generated: (.+?) -->\n).*?(<!-- end generated -->)", re.S)
HEADLINE = (
    "text_asr", "multimodal_asr", "twin_refusal", "exaggerated_refusal", "helpfulness", "capability_howto-icon",
)  # fmt: skip


def generated(text: str, folder: Path) -> str:
    """A README with all its generated parts made again from the artefacts in `folder`.

    Raises:   ValueError for a name that is neither a part nor a table there, or for a marker that is never closed
    """
    if len(MARKED.findall(text)) != text.count("<!-- generated: "):
        raise ValueError(
            "README.md opens a part with `<!-- generated: NAME -->` and does not close it with `<!-- end generated -->`"
        )
    names = {*PARTS, *(path.stem for path in folder.glob("*.md"))}

    def made(found: re.Match[str]) -> str:
        name = known(found[2], names, "generated part of README.md")
        part = PARTS[name](folder) if name in PARTS else (folder / f"{name}.md").read_text(encoding="utf-8").rstrip()
        return f"{found[1]}{part}\n{found[3]}"

    return MARKED.sub(made, text)


def headline(folder: Path) -> str:
    """What adaptation did to each parent: mean over seeds and, in brackets, the least and the most, in percent."""
    found = pd.read_csv(folder / "T02_degradation.csv")
    lines = []
    for (backbone, _), of in found[found["measure"].isin(HEADLINE)].groupby(["backbone", "measure"], sort=False):
        values = {name: _over_seeds(of[f"{name}_value"]) for name in ("parent", "instruct")}
        told = {"backbone": backbone, "measure": of["label"].iloc[0], "parent": values["parent"], "adapted": values["instruct"]}
        lines.append({**told, "seeds": of["seed"].nunique(), "n per seed": int(of["instruct_n"].max())})
    return provenance.markdown(pd.DataFrame(lines))


def _over_seeds(values: pd.Series) -> str:
    known_values = 100 * values.dropna()
    if known_values.empty:
        return "cannot see"
    spread = f" [{known_values.min():.0f}, {known_values.max():.0f}]" if len(known_values) > 1 else ""
    return f"{known_values.mean():.0f}{spread}"


def costs(folder: Path) -> str:
    """What each stage took, from the manifests of the runs that the artefacts are made of.

    Raises:   ValueError where these were noted without times
    """
    runs = pd.DataFrame(json.loads((folder / "provenance.json").read_text(encoding="utf-8")))
    if "seconds" not in runs:
        raise ValueError(f"{folder}/provenance.json holds no times; `vlsafe gallery` writes it again")
    by = runs.groupby("stage", sort=False)["seconds"].agg(["size", "median", "sum"]).reset_index()
    by.columns = ["stage", "runs", "seconds each (median)", "seconds in all"]
    whole = {"stage": "all", "runs": by["runs"].sum(), "seconds each (median)": "", "seconds in all": by["seconds in all"].sum()}
    return provenance.markdown(pd.concat([by.round(0).astype(object), pd.DataFrame([whole]).round(0)], ignore_index=True))


PARTS: dict[str, Callable[[Path], str]] = {"headline": headline, "costs": costs}
