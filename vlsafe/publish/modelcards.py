"""Model cards: what a finished model was made from, how safe it was found, by which judge, and under which licences.

`card` reads a study's manifests and raw tables, `render` writes the card from them; a card of a model that was not examined
says so. Imports no model library.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from vlsafe.analysis import measures
from vlsafe.analysis.measures import CHANCE, MEASURES
from vlsafe.core import store
from vlsafe.publish import results
from vlsafe.study import tuning
from vlsafe.study.graph import GRIDS, STAGES
from vlsafe.study.study import Study

TAGS = {"tower": "zero-shot-image-classification"}
TEMPLATE = Path(__file__).parent / "templates" / "modelcard.md"
Manifest = Mapping[str, Any]


class Link(NamedTuple):
    """A package as a link of the licence chain, in the words of what comes from the hub."""

    repo: str
    revision: str
    terms: str
    kind: str = "package"


def write_cards(study: Study, names: Sequence[str]) -> list[Path]:
    """The cards of those finished runs that left a model, each beside its run's folder: what is in a folder stays as it was."""
    written: list[Path] = []
    for name in names if study.adopted is None else ():  # others write the cards of their models
        run = study.run(name)
        if store.status(run) == "valid" and has_weights(store.manifest_of(run)):
            written.append(run.folder.with_name(f"{run.recipe}.card.md"))
            store.write_text(written[-1], card(study, name))
    return written


def card(study: Study, name: str) -> str:
    """The model card of a finished run, from its lineage and whatever examined it; nothing is made for it.

    Raises:   FileNotFoundError for a run that is not there; ValueError for one that left no model, or holds one of others
    """
    if study.adopted:
        raise ValueError(f"{name} is a model that others have trained; its card is with them")
    if (status := store.status(study.run(name))) != "valid":
        raise FileNotFoundError(f"{name} of {study.backbone} seed {study.seed} is {status}; `vlsafe stage {name}` makes it")
    ancestors = [store.manifest_of(study.run(before)) for before in lineage(study, name)]
    judged = [tuning.judging(grid) for grid in GRIDS]  # that of the larger grid holds the other's rows
    examined_by = [
        f"examination/{name.replace('/', '.')}",
        max(reversed(judged), key=lambda of: store.status(study.run(of)) == "valid"),
    ]
    raw = results.read([study], [stage for stage in examined_by if stage in STAGES], "raw.parquet")
    return render(store.manifest_of(study.run(name)), ancestors, raw, outside(study))


def lineage(study: Study, name: str) -> list[str]:
    """All stages that a run is made from, the first ones first."""
    return list(dict.fromkeys(each for needed in study.inputs(name) for each in (*lineage(study, needed), needed)))


def outside(study: Study) -> Mapping[str, Any]:
    """What a study takes from others, by role: everything with a repository among what its scale loads, its judges included; or
    the packages that its parts come from."""
    loaded = study.scale.loaded
    if loaded is None:
        return {}
    if loaded.packed:
        of = loaded.packed.packages.values()
        return {f"package {one.name}": Link(one.name, one.version, f"licence: {one.licence}") for one in of}
    values = {field.name: getattr(loaded, field.name) for field in fields(loaded)} | {"parent": loaded.parents[study.backbone]}
    values |= {f"judge {name}": origin for name, origin in loaded.judges.items()}
    origins = {role: getattr(value, "origin", value) for role, value in values.items()}
    return {role: origin for role, origin in origins.items() if hasattr(origin, "repo")}


def has_weights(manifest: Manifest) -> bool:
    """Whether a finished run left a model that can be loaded."""
    files = [Path(name).name for name in manifest["files"]]
    return "config.json" in files and any(name.endswith(".safetensors") for name in files)


def render(manifest: Manifest, ancestors: Sequence[Manifest], raw: pd.DataFrame | None, outside: Mapping[str, Any]) -> str:
    """The card of one run in the hub's form: YAML head with the results, then prose and tables.

    `ancestors` are the manifests of all runs that it was made from; `raw` holds its examination, None where there
    is none; `outside` is what the scale takes from others, by role: values with repo, kind, revision and terms.

    Raises:   ValueError for a run without weights
    """
    name = f"{manifest['backbone']}/{manifest['stage']}/{manifest['recipe']}"
    if not has_weights(manifest):
        raise ValueError(f"{name} left no model; a card is about weights")
    rates, runs = None if raw is None else _safety(raw, manifest), [*ancestors, manifest]
    multimodal = any("projector" in run["stage"] for run in runs)
    data = ModelCardData(
        language="en", library_name="transformers", license="other" if outside else "mit",
        license_name="see the licence chain" if outside else None, model_name=name,
        pipeline_tag=TAGS.get(manifest["stage"], "image-text-to-text" if multimodal else "text-generation"),
        datasets=[origin.repo for origin in outside.values() if origin.kind == "dataset"] or None,
        base_model=[origin.repo for role, origin in outside.items() if role in ("parent", "tower")] or None,
        tags=["vlsafe", "safety", manifest["stage"], f"scale-{manifest['scale']}"],
        eval_results=None if rates is None else _results(rates, manifest),
    )  # fmt: skip
    texts = {
        "run": manifest, "runs": runs, "multimodal": multimodal, "outside": outside, "measures": MEASURES, "chance": CHANCE,
        "weights": sum(file.endswith(".safetensors") for file in manifest["files"]),
        "rates": None if rates is None else rates.to_dict("records"),
    }  # fmt: skip
    return ModelCard.from_template(data, template_path=str(TEMPLATE), **texts).content


def _safety(raw: pd.DataFrame, manifest: Manifest) -> pd.DataFrame | None:
    """Every measure of the last full examination, with the judges that its rows were marked by."""
    own = raw[(raw["exam"] == "full") & (raw["stage"] == manifest["stage"]) & (raw["recipe"] == manifest["recipe"])]
    rates = measures.rates(own, list(MEASURES))
    return None if rates.empty else rates


def _results(rates: pd.DataFrame, manifest: Manifest) -> list[EvalResult]:
    """The same numbers for machines, one entry per measure, in the head's `model-index`."""
    return [
        EvalResult(
            task_type="text-generation", dataset_type="vlsafe-items", dataset_name=f"vlsafe items, scale {manifest['scale']}",
            metric_type=row["measure"], metric_name=MEASURES[row["measure"]]["label"], metric_value=round(row["value"], 4),
            metric_args={"judge": row["judge"], "low": round(row["low"], 4), "high": round(row["high"], 4), "n": row["n"]},
        )
        for row in rates.to_dict("records")
    ]  # fmt: skip
