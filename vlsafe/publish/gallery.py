"""Write every table and figure from the raw tables present. The only room that writes into `figures/`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from vlsafe.analysis import adaptation, agreement, causal, claims, degradation, measures, merging, probing, tuning
from vlsafe.analysis import claims as analysis_claims
from vlsafe.analysis import degradation as analysis_degradation
from vlsafe.analysis import filtering as analysis_filtering
from vlsafe.analysis import merging as analysis_merging
from vlsafe.analysis import probing as analysis_probing
from vlsafe.analysis import tuning as analysis_tuning
from vlsafe.plots import claims as plots_claims
from vlsafe.plots import degradation as plots_degradation
from vlsafe.plots import filtering, style
from vlsafe.plots import merging as plots_merging
from vlsafe.plots import probing as plots_probing
from vlsafe.plots import tuning as plots_tuning
from vlsafe.publish import provenance as publish_provenance


def load(folders: Sequence[Path], file: str) -> pd.DataFrame:
    """One file of several runs as one frame."""
    return pd.concat([pd.read_parquet(folder / file) for folder in folders], ignore_index=True)


def make(found: Mapping[str, pd.DataFrame], scale: str, folder: Path, provenance: Sequence[dict[str, Any]]) -> list[str]:
    """Every table and figure whose frames are there, each with its CSV twin and a sidecar of the runs behind it, and one of all.

    `found` are the results of `stages.results` by name. An artefact is left out where FAMILIES says that it needs more.

    Raises:   ValueError where there is no raw table at all
    """
    if "raw" not in found:
        raise ValueError("no examination is made yet; `make reproduce` makes them")
    raw = found["raw"]
    seeds = sorted(int(seed) for seed in raw["seed"].unique())
    origin = f"Scale {scale}, seeds {seeds}, backbones {sorted(raw['backbone'].unique())}; 95 % intervals."
    written: list[str] = []
    for family, needed in FAMILIES.items():
        if not needed <= set(found):
            continue
        sheets, pictures = family(found, scale)
        for name, (frame, title, *more) in sheets.items():
            shown, told = more or (None, "")
            publish_provenance.write(frame, folder, name, {"title": title, "caption": f"{origin} {told}".strip()}, shown)
        for name, (figure, frame) in pictures.items():
            style.write(figure, frame, folder, name, publish_provenance.stamp(name, scale, provenance))
        written += [*sheets, *pictures]
    for name in written:
        publish_provenance.write_stamp(folder, publish_provenance.stamp(name, scale, provenance))
    (folder / "provenance.json").write_text(json.dumps(list(provenance), indent=1) + "\n", encoding="utf-8")
    return written


Written = dict[str, tuple[Any, ...]]
"""Name of a table -> the frame, its title, and where it needs them the form for the eye and more of a caption."""
Drawn = dict[str, tuple[Figure, pd.DataFrame]]
"""Name of a figure -> the picture and what it draws."""


def _adaptation(found: Mapping[str, pd.DataFrame], scale: str) -> tuple[Written, Drawn]:
    """T01 to T04, F01 to F03."""
    raw, audit = found["raw"], found["audit"]
    labels = {name: spec["label"] for name, spec in measures.MEASURES.items()}
    compared, confounds = adaptation.arms(raw), adaptation.confounds(raw)
    n, asked = (lines.groupby("measure")["n"].max() for lines in (compared, confounds))
    sizes = ", ".join(f"{labels[name]} {int(n[name])}" for name in n.index)
    dynamics, categories = degradation.dynamics(raw), degradation.by_category(raw)
    drawn = {
        "F01_guard_scores": (filtering.guard_scores(audit, scale), analysis_filtering.score_counts(audit)),
        "F02_dynamics": (plots_degradation.dynamics(dynamics, labels, scale), dynamics),
        "F03_categories": (plots_degradation.by_category(categories, scale), categories),
    }
    written: Written = {
        "T01_filtering_audit": (analysis_filtering.filtering_audit(audit), "T01. What the guards dropped"),
        "T01_guard_quality": (
            analysis_filtering.guard_quality(audit),
            "T01. Precision and recall of the guards against the known truth",
        ),
        "T02_degradation": (analysis_degradation.degradation(raw), "T02. Parent and adapted model on every measure"),
        "T03_arms": (
            compared,
            "T03. Data, method and rate of stage 2; in percent; Δ: paired difference from the main recipe",
            adaptation.sheet(compared),
            f"n: {sizes}. Equal helpfulness: linear between checkpoints, items of the panel alone, level: the best of the least "
            'helpful recipe that gains at least half of what the main one gains over stage 1 (others: reached "never"). '
            "Bootstrap intervals have no width where all items agree.",
        ),
        "T03_arms_over_seeds": (
            adaptation.over_seeds(compared),
            "T03. The same over seeds: mean, range, each seed; differences are from the main recipe",
        ),
        "T04_confounds": (
            confounds,
            "T04. System prompt and empty pictures; in percent; Δ: paired difference from neither, the same model",
            adaptation.compact(confounds, [*adaptation.UNIT, "stage", "recipe", "condition"]),
            f"n: {', '.join(f'{labels[name]} {int(size)}' for name, size in asked.items())} a condition; paired by verb–object pair.",
        ),
    }
    return written, drawn


def _tuning(found: Mapping[str, pd.DataFrame], scale: str) -> tuple[Written, Drawn]:
    """T05, F05 and F06."""
    tuned = tuning.methods(found["raw"], found["tried"])
    plane, refused = tuning.plane(tuned), tuning.refusals(found["raw"])
    drawn = {
        "F05_tradeoff": (plots_tuning.tradeoff(plane, scale), plane),
        "F06_exaggerated_refusal": (plots_tuning.refusals(refused, scale), refused),
    }
    written: Written = {
        "T05_safety_tuning": (
            tuned,
            "T05. Safety tuning; in percent; Δ: paired difference from the adapted model",
            analysis_tuning.sheet(tuned),
            "Step and tokens: of the checkpoint that validation pairs chose. Holm: over methods and these five measures, per "
            "backbone and seed; p-values by flipping the signs of clusters. Against the parent and all benchmarks: the CSV.",
        ),
        "T05_transfer": (
            analysis_tuning.transfer(tuned),
            "T05. Safety taught on text, on pictures or on both: change of ASR on each, in fractions",
        ),
        "T05_checkpoints": (found["tried"], "T05. What every checkpoint did on the validation pairs, and which one was chosen"),
    }
    return written, drawn


def _probing(found: Mapping[str, pd.DataFrame], scale: str) -> tuple[Written, Drawn]:
    """F07 to F11, and T06 where its grid was made."""
    similar, located = probing.similarity(found["layers"]), found["located"]
    patched = causal.transplants(found["patched"], located)
    vectors, gradients = probing.task_vectors(found["vectors"]), probing.gradients(found["gradients"])
    drifted = probing.drift(found["drift"])
    gap = similar[(similar["measure"] == "cosine_centred") & (similar["kind"] == "difference")]
    drawn = {
        "F07_layer_similarity": (plots_probing.similarity(similar, scale), analysis_probing.last(similar)),
        "F08_layers_over_steps": (plots_probing.similarity_over_steps(similar, scale), gap[gap["stage"] == "instruct"]),
        "F09_localisation": (plots_probing.localisation(found["curves"], found["scaling"], located, scale), found["curves"]),
        "F10_transplants": (plots_probing.transplants(patched, scale), patched),
        "F11_objectives": (plots_probing.objectives(vectors, gradients, scale), gradients),
    }
    written: Written = {
        "F07_probes": (analysis_probing.probes(found["layers"]), "F07. Held-out AUC of linear probes for harm, per layer"),
        "F07_cka": (
            analysis_probing.alignments(found["sets"]),
            "F07. CKA of model and reference, jackknife over verb–object pairs",
        ),
        "F07_drift": (
            drifted,
            "F07. Drift of weights from the parent after the last step, per block, in percent",
            analysis_probing.drift_sheet(drifted),
            "Layer -1: what is in no block. Every step, single modules and the effective rank of the change: the CSV.",
        ),
        "F09_scaling": (found["scaling"], "F09. Harmless prompts that the parent refuses when a band is scaled"),
        "F10_against_random": (
            causal.against_random(found["patched"], located),
            "F10. The located and the best band of each width against other sets of as many blocks",
        ),
        "F10_directions": (
            causal.directed(found["directed"]),
            "F10. The parent's refusal direction ablated and added, random directions beside",
        ),
        "F11_task_vectors": (vectors, "F11. Cosine of task vectors per layer; chance: what random vectors reach"),
        "F11_prediction": (
            analysis_probing.prediction(found["drift"], found["alike"], found["raw"]),
            "F11. Rank correlation of what is seen early in stage 2 with the attack success at its end",
        ),
        "T05_conflict_free": (
            causal.remedy(found["remedy"]),
            "T05. Multitask tuning with conflict-free gradients; difference: from plain multitask tuning, paired",
        ),
    }
    if "frozen" in found:
        frozen = causal.frozen(found["frozen"], found["patched"], located)
        written["T06_sppft"] = (frozen, "T06. SPPFT: the located band, all bands of its width, random sets of as many blocks")
        written["T06_sppft_over_seeds"] = (causal.frozen_over_seeds(frozen), "T06. The same over seeds")
    return written, drawn


INSIDE = {
    "raw", "layers", "sets", "drift", "alike", "vectors", "gradients", "patched", "directed", "curves", "scaling", "located",
    "remedy",
}  # fmt: skip


def _claims(found: Mapping[str, pd.DataFrame], scale: str) -> tuple[Written, Drawn]:
    """T08, T09, F00, F14 and F15."""
    laid, lines = claims.prepared(found), degradation.everything(found["raw"])
    ledger, points = claims.ledger(laid), plots_claims.lineage_points(lines)
    wide = agreement.verdicts(found["raw"])
    judged, pairs = agreement.rates(wide), agreement.pairs(wide)
    drawn = {
        "F14_claims": (plots_claims.forest(ledger, scale), ledger),
        "F15_judges": (plots_claims.judges(judged, pairs, scale), judged),
        "F00_answer": (plots_claims.lineage(points, scale), points),
    }
    written: Written = {
        "T08_models": (
            lines, "T08. Every model on every benchmark, in percent: mean over seeds (lowest–highest)", analysis_degradation.overview(lines),
            "Intervals and each seed: the CSV.",
        ),
        "T08_precision": (
            analysis_claims.precision(laid),
            "T08. What each benchmark could have shown: adapted model against its predecessor, in fractions",
            None,
            "Detectable: found in nine of ten comparisons, at 5 %; sd_items, sd_seeds: of one seed's difference.",
        ),
        "T08_published": (publish_provenance.beside(found["published"], lines), "T08. Published numbers beside ours, as fractions"),
        "T09_claims": (
            ledger,
            "T09. What the paper claims, what was measured, how sure we are; in points",
            analysis_claims.sheet(ledger),
            "Item-level: items are the sample, Holm over the claims of a backbone; seed-level: seeds are the sample, "
            "t-interval and sign. Detectable: found in nine of ten comparisons over items. No verdict is written by hand.",
        ),
        "T09_by_seed": (analysis_claims.by_seed(laid), "T09. Each seed by itself, in fractions: item-level verdicts alone"),
        "T09_parts": (analysis_claims.every_part(laid), "T09. Every comparison that a claim hangs on, in fractions; p-values uncorrected"),
        "F15_agreement": (pairs, "F15. Judges against each other: answers to harmful requests, and the ranking of the models"),
    }  # fmt: skip
    return written, drawn


def _merging(found: Mapping[str, pd.DataFrame], scale: str) -> tuple[Written, Drawn]:
    """T07, F12 and F13."""
    merged = merging.methods(found["raw"], found["merged"])
    verdict, swept = merging.verdicts(merged), merging.sweep(found["panel"], found["merged"])
    plane, told = merging.plane(found["raw"]), merging.answer(verdict)
    drawn = {
        "F12_ratio_sweep": (plots_merging.sweep(swept, scale), swept),
        "F13_merge_fronts": (plots_merging.fronts(plane, told, scale), plane),
    }
    written: Written = {
        "T07_merging": (
            merged,
            "T07. Merges at the ratio that validation pairs chose; in percent; Δ: paired difference from the adapted model",
            analysis_merging.sheet(merged, verdict),
            f"Does merging dominate? {told} Clear: Holm p < 0.05 over rules, partners, five measures. All references: the CSV.",
        ),
        "T07_dominance": (verdict, "T07. Each merge against each tuning and its ensemble, on five headline measures"),
        "T07_hypervolume": (
            analysis_merging.hypervolumes(found["raw"]),
            "T07. Area under the front of 1 − ASR against helpfulness, from (0, 0); the more models, the larger it can be",
        ),
        "T07_ensembles": (
            analysis_merging.against_ensemble(found["panel"]),
            "T07. From the output ensemble to the linear merge at the same ratio, paired on the panel; in fractions",
        ),
        "T07_barriers": (
            analysis_merging.barriers(found["merged"]),
            "T07. Loss barrier on the line to each partner, nats per answer",
        ),
        "T07_choice": (found["merged"], "T07. What every merge did on the validation pairs, and which one was chosen"),
    }
    return written, drawn


FAMILIES = {
    _adaptation: {"raw", "audit"}, _tuning: {"raw", "tried"}, _probing: INSIDE, _merging: {"raw", "panel", "merged"},
    _claims: {"raw", "published"},
}  # fmt: skip
"""What makes tables and figures -> the frames that it needs."""
