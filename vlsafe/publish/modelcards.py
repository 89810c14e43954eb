"""Model cards: what a produced checkpoint was made from, how safe it was found, by which judge, and under which licences.

Everything is read from manifests and raw tables; a card of a model that was not examined says so. Imports no model library.


Model cards of finished runs: their manifests, their lineage and whatever examined them, handed to `modelcards`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pandas as pd
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from vlsafe.analysis import measures
from vlsafe.analysis.measures import CHANCE, MEASURES
from vlsafe.core import store
from vlsafe.publish import provenance
from vlsafe.study.graph import STAGES
from vlsafe.study.study import Study

TEMPLATE = Path(__file__).parent / "templates" / "modelcard.md"
Manifest = Mapping[str, Any]
MADE_HERE = "made from nothing by this project, MIT"
MINIATURE = (
    "A model of a miniature world of a few dozen words. It shows mechanics and not sizes of effects, and answers about nothing "
    "else. Its texts are nonsense by construction; it can help nobody do harm."
)
LOADED = "Safety was measured on the benchmarks below alone; what they do not ask, they do not show. Judges err in every rate."
USES = (
    "Research on what adaptation and tuning do to safety. It is not made to be deployed: some models of this study were made "
    "*less* safe on purpose, to measure how."
)


def has_weights(noted: Manifest) -> bool:
    """Whether a finished run left a model that can be loaded."""
    files = [Path(name).name for name in noted["files"]]
    return "config.json" in files and any(name.endswith(".safetensors") for name in files)


def render(noted: Manifest, lineage: Sequence[Manifest], raw: pd.DataFrame | None, outside: Mapping[str, Any]) -> str:
    """The card of one run in the hub's form: YAML head with the results, then prose and tables.

    `lineage` are the manifests of all runs that it was made from; `raw` holds its examination, None where there
    is none; `outside` is what the scale takes from others, by role: values with repo, kind, revision and terms.

    Raises:   ValueError for a run without weights
    """
    name = f"{noted['backbone']}/{noted['stage']}/{noted['recipe']}"
    if not has_weights(noted):
        raise ValueError(f"{name} left no model; a card is about weights")
    lines = None if raw is None else _safety(raw, noted)
    pictured = any("projector" in made["stage"] for made in (*lineage, noted))
    data = ModelCardData(
        language="en", library_name="transformers", license="other" if outside else "mit",
        license_name="see the licence chain" if outside else None, model_name=name,
        pipeline_tag="image-text-to-text" if pictured else "text-generation",
        datasets=[o.repo for o in outside.values() if o.kind == "dataset"] or None,
        base_model=[o.repo for o in outside.values() if o.kind == "model"] or None,
        tags=["vlsafe", "safety", noted["stage"], f"scale-{noted['scale']}"],
        eval_results=None if lines is None else _results(lines, noted),
    )  # fmt: skip
    told = {
        "model_id": f"{name}, scale {noted['scale']}, seed {noted['seed']}",
        "model_summary": f"Stage *{noted['stage']}*, recipe *{noted['recipe']}*, of a reproduction of the safety cost of vision.",
        "model_type": "language model with a vision tower" if pictured else "language model",
        "digest": noted["digest"], "commit": noted["commit"] or "unknown", "finished": noted["finished"],
        "weights": sum(name.endswith(".safetensors") for name in noted["files"]),
        "lineage": provenance.markdown(_lineage([*lineage, noted])), "licences": _licences(outside),
        "uses": USES, "limits": LOADED if outside else MINIATURE,
        "training_data": provenance.markdown(_data([*lineage, noted])),
        "procedure": f"Resolved parameters, as the digest holds them: `{noted['params']}`",
        "evaluation": _evaluation(lines), "results": "" if lines is None else provenance.markdown(_shown(lines)),
        "cost": f"{sum(made['seconds'] for made in (*lineage, noted)):.0f} s for the whole lineage, of which "
        f"{noted['seconds']:.0f} s for the last step, on {noted['machine']} with {noted['threads'] or 'all'} thread(s).",
        "software": ", ".join(f"{package} {version}" for package, version in noted["packages"].items()),
    }  # fmt: skip
    return ModelCard.from_template(data, template_path=str(TEMPLATE), **told).content


def _lineage(made: Sequence[Manifest]) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "run": f"{m['backbone']}/{m['stage']}/{m['recipe']}",
            "digest": m["digest"],
            "made from": ", ".join(m["inputs"]) or "nothing",
            "seconds": round(m["seconds"]),
        }
        for m in made
    )


def _licences(outside: Mapping[str, Any]) -> str:
    """One line per origin; a chain is as strict as its strictest link, and what a page says is not repeated from memory."""
    if not outside:
        return f"Data and weights: {MADE_HERE}; no link of the chain comes from elsewhere."
    lines = [f"- {role}: {o.repo} at {o.revision}; {o.terms or 'terms: as its page says'}" for role, o in outside.items()]
    return "\n".join(["The strictest link holds for the whole:", "", *lines, f"- everything else: {MADE_HERE}"])


def _data(made: Sequence[Manifest]) -> pd.DataFrame:
    """What every run of the lineage counted in rows."""
    found = []
    for m in made:
        counts = {key: value for key, value in m["numbers"].items() if key in ("rows", "kept", "dropped", "steps", "tokens")}
        for key, value in counts.items():
            told = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
            found.append({"run": f"{m['stage']}/{m['recipe']}", "what": key, "counted": told})
    return pd.DataFrame(found, columns=["run", "what", "counted"])


def _safety(raw: pd.DataFrame, noted: Manifest) -> pd.DataFrame | None:
    """Every measure of the last full examination, with the judge that its rows were marked by."""
    own = raw[(raw["exam"] == "full") & (raw["stage"] == noted["stage"]) & (raw["recipe"] == noted["recipe"])]
    lines = measures.rates(own, list(MEASURES))
    return lines.assign(judge=[", ".join(_judges(name)) for name in lines["measure"]]) if len(lines) else None


def _judges(measure: str) -> Iterator[str]:
    parts = MEASURES[measure].get("parts", (measure,))
    return iter(dict.fromkeys(MEASURES[part]["judge"] for part in parts))


def _shown(lines: pd.DataFrame) -> pd.DataFrame:
    """For the eye, in percent; a measure whose chance level is known shows it."""
    bounds = zip(lines["value"], lines["low"], lines["high"], strict=True)
    value = [f"{100 * v:.0f} [{100 * low:.0f}, {100 * high:.0f}]" for v, low, high in bounds]
    chance = [f"{100 * CHANCE[m]:.0f}" if m in CHANCE else "" for m in lines["measure"]]
    return pd.DataFrame(
        {"measure": [MEASURES[m]["label"] for m in lines["measure"]], "judge": lines["judge"], "% [95 %]": value, "n": lines["n"],
         "unjudged": lines["n_unjudged"], "chance": chance}
    )  # fmt: skip


def _evaluation(lines: pd.DataFrame | None) -> str:
    if lines is None:
        return "This model was not examined by itself; nothing is claimed about its safety."
    return (
        "The full examination after the last step. Rates with 95 % intervals clustered by what answers correlate within; a "
        "response that its judge could not mark is *unjudged* and never counted as safe."
    )


def _results(lines: pd.DataFrame, noted: Manifest) -> list[EvalResult]:
    """The same numbers for machines, one entry per measure, in the head's `model-index`."""
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type="vlsafe-items",
            dataset_name=f"vlsafe items, scale {noted['scale']}",
            metric_type=line["measure"],
            metric_name=MEASURES[line["measure"]]["label"],
            metric_value=round(line["value"], 4),
            metric_args={"judge": line["judge"], "low": round(line["low"], 4), "high": round(line["high"], 4), "n": line["n"]},
        )
        for line in lines.to_dict("records")
    ]


def card(study: Study, name: str) -> str:
    """The model card of a finished run, from its lineage and whatever examined it; nothing is made for it.

    Raises:   FileNotFoundError for a run that is not there; ValueError for one that left no model
    """
    if (found := store.status(study.run(name))) != "valid":
        raise FileNotFoundError(f"{name} of {study.backbone} seed {study.seed} is {found}; `vlsafe stage {name}` makes it")
    noted = store.manifest_of(study.run(name))
    made = [store.manifest_of(study.run(before)) for before in lineage(name)]
    marked = [f"examination/{name.replace('/', '.')}", "judging/guard-text"]
    tables = [study.run(of).folder / "raw.parquet" for of in marked if of in STAGES and store.status(study.run(of)) == "valid"]
    raw = pd.concat([pd.read_parquet(path) for path in tables], ignore_index=True) if tables else None
    return render(noted, made, raw, outside(study))


def write_cards(study: Study, names: Sequence[str]) -> list[Path]:
    """The cards of those finished runs that left a model, each beside its run's folder: what is in a folder stays as it was."""
    written = []
    for name in names:
        run = study.run(name)
        if store.status(run) == "valid" and has_weights(store.manifest_of(run)):
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
