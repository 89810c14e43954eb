"""Write every table and figure from the raw tables present. The only module that writes into `figures/`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from vlsafe import analysis, plots
from vlsafe.analysis.measures import MEASURES
from vlsafe.publish import provenance, results

Frames = Mapping[str, pd.DataFrame]
Tables = dict[str, tuple[Any, ...]]
"""Name of a table -> the frame, and where it needs them the form for the eye and what fills its caption's braces."""
Figures = dict[str, tuple[Figure, pd.DataFrame]]
"""Name of a figure -> the picture and what it draws."""


def make(frames: Frames, scale: str, folder: Path, runs: Sequence[dict[str, Any]]) -> list[str]:
    """Every table and figure whose frames are there, each with its CSV twin and a sidecar of the runs behind it, and one of all.

    `frames` are those of `publish.results`, `runs` the manifests behind them. An artefact is left out where FAMILIES says that
    it needs more.

    Raises:   ValueError where there is no raw table at all
    """
    if "raw" not in frames:
        raise ValueError("no examination is made yet; `make reproduce` makes them")
    raw = frames["raw"]
    seeds = sorted(int(seed) for seed in raw["seed"].unique())
    origin = f"Scale {scale}, seeds {seeds}, backbones {sorted(raw['backbone'].unique())}; 95 % intervals."
    written: list[str] = []
    for family, needed in FAMILIES.items():
        if not needed <= set(frames):
            continue
        tables, figures = family(frames, scale)
        for name, (frame, *more) in tables.items():
            shown, *values = more or [None]
            text = provenance.ARTEFACTS["tables"][name]
            caption = text.get("caption", "").format_map(dict(*values))
            provenance.write_table(frame, folder, name, text["title"], f"{origin} {caption}".strip(), shown)
        for name, (figure, frame) in figures.items():
            plots.style.write(figure, frame, folder, name, provenance.stamp(name, scale, runs))
        written += [*tables, *figures]
    for name in written:
        stamp = json.dumps(provenance.stamp(name, scale, runs), indent=1, sort_keys=True) + "\n"
        (folder / f"{name}.provenance.json").write_text(stamp, encoding="utf-8")
    (folder / "provenance.json").write_text(json.dumps(list(runs), indent=1) + "\n", encoding="utf-8")
    return written


def _adaptation(frames: Frames, scale: str) -> tuple[Tables, Figures]:
    """T01 to T04, F01 to F03."""
    raw, audit, adaptation, filtering = frames["raw"], frames["audit"], analysis.adaptation, analysis.filtering
    labels = {name: spec["label"] for name, spec in MEASURES.items()}
    arms, confounds = adaptation.arms(raw), adaptation.confounds(raw)
    sizes, sizes_confounds = (
        {"sizes": ", ".join(f"{labels[name]} {int(n)}" for name, n in lines.groupby("measure")["n"].max().items())}
        for lines in (arms, confounds)
    )
    dynamics, categories = analysis.degradation.dynamics(raw), analysis.degradation.by_category(raw)
    index = [*adaptation.UNIT, "stage", "recipe", "condition"]
    tables: Tables = {
        "T01_filtering_audit": (filtering.filtering_audit(audit),),
        "T01_guard_quality": (filtering.guard_quality(audit),),
        "T02_degradation": (analysis.degradation.degradation(raw),),
        "T03_arms": (arms, adaptation.sheet(arms), sizes),
        "T03_arms_over_seeds": (adaptation.over_seeds(arms),),
        "T04_confounds": (confounds, adaptation.compact(confounds, index), sizes_confounds),
    }
    figures = {
        "F01_guard_scores": (plots.filtering.guard_scores(audit, scale), filtering.score_counts(audit)),
        "F02_dynamics": (plots.degradation.dynamics(dynamics, labels, scale), dynamics),
        "F03_categories": (plots.degradation.by_category(categories, scale), categories),
    }
    return tables, figures


def _tuning(frames: Frames, scale: str) -> tuple[Tables, Figures]:
    """T05, F05 and F06."""
    tuned = analysis.tuning.methods(frames["raw"], frames["validation"])
    plane, refused = analysis.tuning.plane(tuned), analysis.tuning.refusals(frames["raw"])
    tables: Tables = {
        "T05_safety_tuning": (tuned, analysis.tuning.sheet(tuned)),
        "T05_transfer": (analysis.tuning.transfer(tuned),),
        "T05_checkpoints": (frames["validation"],),
    }
    figures = {
        "F05_tradeoff": (plots.tuning.tradeoff(plane, scale), plane),
        "F06_exaggerated_refusal": (plots.tuning.refusals(refused, scale), refused),
    }
    return tables, figures


def _probing(frames: Frames, scale: str) -> tuple[Tables, Figures]:
    """F07 to F11, and T06 where its grid was made."""
    probing, causal = analysis.probing, analysis.causal
    similar, located = probing.similarity(frames["layers"]), frames["located"]
    patched, drift = causal.transplants(frames["patched"], located), probing.drift(frames["drift"])
    vectors, gradients = probing.task_vectors(frames["vectors"]), probing.gradients(frames["gradients"])
    gap = similar[(similar["measure"] == "cosine_centred") & (similar["kind"] == "difference")]
    tables: Tables = {
        "F07_probes": (probing.probes(frames["layers"]),),
        "F07_cka": (probing.alignments(frames["sets"]),),
        "F07_drift": (drift, probing.drift_sheet(drift)),
        "F09_scaling": (frames["scaling"],),
        "F10_against_random": (causal.against_random(frames["patched"], located),),
        "F10_directions": (causal.directed(frames["directed"]),),
        "F11_task_vectors": (vectors,),
        "F11_prediction": (probing.prediction(frames["drift"], frames["alike"], frames["raw"]),),
        "T05_conflict_free": (causal.remedy(frames["remedy"]),),
    }
    figures = {
        "F07_layer_similarity": (plots.probing.similarity(similar, scale), probing.last(similar)),
        "F08_layers_over_steps": (plots.probing.similarity_over_steps(similar, scale), gap[gap["stage"] == "instruct"]),
        "F09_localisation": (plots.probing.localisation(frames["curves"], frames["scaling"], located, scale), frames["curves"]),
        "F10_transplants": (plots.probing.transplants(patched, scale), patched),
        "F11_objectives": (plots.probing.objectives(vectors, gradients, scale), gradients),
    }
    if "frozen" in frames:
        frozen = causal.frozen(frames["frozen"], frames["patched"], located)
        tables |= {"T06_sppft": (frozen,), "T06_sppft_over_seeds": (causal.frozen_over_seeds(frozen),)}
    return tables, figures


def _merging(frames: Frames, scale: str) -> tuple[Tables, Figures]:
    """T07, F12 and F13."""
    merging = analysis.merging
    merged = merging.methods(frames["raw"], frames["merged"])
    verdict, swept = merging.verdicts(merged), merging.sweep(frames["panel"], frames["merged"])
    plane, answer = merging.plane(frames["raw"]), merging.answer(verdict)
    tables: Tables = {
        "T07_merging": (merged, merging.sheet(merged, verdict), {"answer": answer}),
        "T07_dominance": (verdict,),
        "T07_hypervolume": (merging.hypervolumes(frames["raw"]),),
        "T07_ensembles": (merging.against_ensemble(frames["panel"]),),
        "T07_barriers": (merging.barriers(frames["merged"]),),
        "T07_choice": (frames["merged"],),
    }
    figures = {
        "F12_ratio_sweep": (plots.merging.sweep(swept, scale), swept),
        "F13_merge_fronts": (plots.merging.fronts(plane, answer, scale), plane),
    }
    return tables, figures


def _claims(frames: Frames, scale: str) -> tuple[Tables, Figures]:
    """T08, T09, F00, F14 and F15."""
    claims, agreement = analysis.claims, analysis.agreement
    prepared, lines = claims.prepared(frames), analysis.degradation.everything(frames["raw"])
    ledger, points, wide = claims.ledger(prepared), plots.claims.lineage_points(lines), agreement.verdicts(frames["raw"])
    judged, pairs = agreement.rates(wide), agreement.pairs(wide)
    tables: Tables = {
        "T08_models": (lines, analysis.degradation.overview(lines)),
        "T08_precision": (claims.precision(prepared),),
        "T08_published": (provenance.compare_published(frames["published"], lines),),
        "T09_claims": (ledger, claims.sheet(ledger)),
        "T09_by_seed": (claims.by_seed(prepared),),
        "T09_parts": (claims.every_part(prepared),),
        "F15_agreement": (pairs,),
    }
    figures = {
        "F14_claims": (plots.claims.forest(ledger, scale), ledger),
        "F15_judges": (plots.claims.judges(judged, pairs, scale), judged),
        "F00_answer": (plots.claims.lineage(points, scale), points),
    }
    return tables, figures


FAMILIES = {
    _adaptation: {"raw", "audit"}, _tuning: {"raw", "validation"}, _probing: {*results.INSIDE, "raw", "located", "remedy"},
    _merging: {"raw", "panel", "merged"}, _claims: {"raw", "published"},
}  # fmt: skip
"""What makes tables and figures -> the frames that it needs."""
