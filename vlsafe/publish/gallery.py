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
from vlsafe.publish import provenance

Frames = Mapping[str, pd.DataFrame]
Tables = dict[str, tuple[Any, ...]]
"""Name of a table -> the frame, its title, and where it needs them the form for the eye and more of a caption."""
Figures = dict[str, tuple[Figure, pd.DataFrame]]
"""Name of a figure -> the picture and what it draws."""


def load(folders: Sequence[Path], file: str) -> pd.DataFrame:
    """One file of several runs as one frame."""
    return pd.concat([pd.read_parquet(folder / file) for folder in folders], ignore_index=True)


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
        for name, (frame, title, *more) in tables.items():
            shown, caption = more or (None, "")
            provenance.write_table(frame, folder, name, title, f"{origin} {caption}".strip(), shown)
        for name, (figure, frame) in figures.items():
            plots.style.write(figure, frame, folder, name, provenance.stamp(name, scale, runs))
        written += [*tables, *figures]
    for name in written:
        provenance.write_stamp(folder, provenance.stamp(name, scale, runs))
    (folder / "provenance.json").write_text(json.dumps(list(runs), indent=1) + "\n", encoding="utf-8")
    return written


def _adaptation(frames: Frames, scale: str) -> tuple[Tables, Figures]:
    """T01 to T04, F01 to F03."""
    raw, audit = frames["raw"], frames["audit"]
    labels = {name: spec["label"] for name, spec in MEASURES.items()}
    arms, confounds = analysis.adaptation.arms(raw), analysis.adaptation.confounds(raw)
    most = (lines.groupby("measure")["n"].max().items() for lines in (arms, confounds))
    sizes, sizes_confounds = (", ".join(f"{labels[name]} {int(n)}" for name, n in counts) for counts in most)
    dynamics, categories = analysis.degradation.dynamics(raw), analysis.degradation.by_category(raw)
    index = [*analysis.adaptation.UNIT, "stage", "recipe", "condition"]
    tables: Tables = {
        "T01_filtering_audit": (analysis.filtering.filtering_audit(audit), "T01. What the guards dropped"),
        "T01_guard_quality": (analysis.filtering.guard_quality(audit),
            "T01. Precision and recall of the guards against the known truth"),
        "T02_degradation": (analysis.degradation.degradation(raw), "T02. Parent and adapted model on every measure"),
        "T03_arms": (
            arms, "T03. Data, method and rate of stage 2; in percent; Δ: paired difference from the main recipe",
            analysis.adaptation.sheet(arms),
            f"n: {sizes}. Equal helpfulness: linear between checkpoints, items of the panel alone, level: the best of the least "
            'helpful recipe that gains at least half of what the main one gains over stage 1 (others: reached "never"). '
            "Bootstrap intervals have no width where all items agree."),
        "T03_arms_over_seeds": (analysis.adaptation.over_seeds(arms),
            "T03. The same over seeds: mean, range, each seed; differences are from the main recipe"),
        "T04_confounds": (
            confounds, "T04. System prompt and empty pictures; in percent; Δ: paired difference from neither, the same model",
            analysis.adaptation.compact(confounds, index), f"n: {sizes_confounds} a condition; paired by verb–object pair."),
    }  # fmt: skip
    figures = {
        "F01_guard_scores": (plots.filtering.guard_scores(audit, scale), analysis.filtering.score_counts(audit)),
        "F02_dynamics": (plots.degradation.dynamics(dynamics, labels, scale), dynamics),
        "F03_categories": (plots.degradation.by_category(categories, scale), categories),
    }
    return tables, figures


def _tuning(frames: Frames, scale: str) -> tuple[Tables, Figures]:
    """T05, F05 and F06."""
    tuned = analysis.tuning.methods(frames["raw"], frames["validation"])
    plane, refused = analysis.tuning.plane(tuned), analysis.tuning.refusals(frames["raw"])
    tables: Tables = {
        "T05_safety_tuning": (tuned,
            "T05. Safety tuning; in percent; Δ: paired difference from the adapted model", analysis.tuning.sheet(tuned),
            "Step and tokens: of the checkpoint that validation pairs chose. Holm: over methods and these five measures, per "
            "backbone and seed; p-values by flipping the signs of clusters. Against the parent and all benchmarks: the CSV."),
        "T05_transfer": (analysis.tuning.transfer(tuned),
            "T05. Safety taught on text, on pictures or on both: change of ASR on each, in fractions"),
        "T05_checkpoints": (frames["validation"],
            "T05. What every checkpoint did on the validation pairs, and which one was chosen"),
    }  # fmt: skip
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
        "F07_probes": (probing.probes(frames["layers"]), "F07. Held-out AUC of linear probes for harm, per layer"),
        "F07_cka": (probing.alignments(frames["sets"]), "F07. CKA of model and reference, jackknife over verb–object pairs"),
        "F07_drift": (drift,
            "F07. Drift of weights from the parent after the last step, per block, in percent", probing.drift_sheet(drift),
            "Layer -1: what is in no block. Every step, single modules and the effective rank of the change: the CSV."),
        "F09_scaling": (frames["scaling"], "F09. Harmless prompts that the parent refuses when a band is scaled"),
        "F10_against_random": (causal.against_random(frames["patched"], located),
            "F10. The located and the best band of each width against other sets of as many blocks"),
        "F10_directions": (causal.directed(frames["directed"]),
            "F10. The parent's refusal direction ablated and added, random directions beside"),
        "F11_task_vectors": (vectors, "F11. Cosine of task vectors per layer; chance: what random vectors reach"),
        "F11_prediction": (probing.prediction(frames["drift"], frames["alike"], frames["raw"]),
            "F11. Rank correlation of what is seen early in stage 2 with the attack success at its end"),
        "T05_conflict_free": (causal.remedy(frames["remedy"]),
            "T05. Multitask tuning with conflict-free gradients; difference: from plain multitask tuning, paired"),
    }  # fmt: skip
    figures = {
        "F07_layer_similarity": (plots.probing.similarity(similar, scale), probing.last(similar)),
        "F08_layers_over_steps": (plots.probing.similarity_over_steps(similar, scale), gap[gap["stage"] == "instruct"]),
        "F09_localisation": (plots.probing.localisation(frames["curves"], frames["scaling"], located, scale), frames["curves"]),
        "F10_transplants": (plots.probing.transplants(patched, scale), patched),
        "F11_objectives": (plots.probing.objectives(vectors, gradients, scale), gradients),
    }
    if "frozen" in frames:
        frozen = causal.frozen(frames["frozen"], frames["patched"], located)
        tables["T06_sppft"] = (frozen, "T06. SPPFT: the located band, all bands of its width, random sets of as many blocks")
        tables["T06_sppft_over_seeds"] = (causal.frozen_over_seeds(frozen), "T06. The same over seeds")
    return tables, figures


def _merging(frames: Frames, scale: str) -> tuple[Tables, Figures]:
    """T07, F12 and F13."""
    merging = analysis.merging
    merged = merging.methods(frames["raw"], frames["merged"])
    verdict, swept = merging.verdicts(merged), merging.sweep(frames["panel"], frames["merged"])
    plane, answer = merging.plane(frames["raw"]), merging.answer(verdict)
    tables: Tables = {
        "T07_merging": (
            merged,
            "T07. Merges at the ratio that validation pairs chose; in percent; Δ: paired difference from the adapted model",
            merging.sheet(merged, verdict),
            f"Does merging dominate? {answer} Clear: Holm p < 0.05 over rules, partners, five measures. "
            "All references: the CSV."),
        "T07_dominance": (verdict, "T07. Each merge against each tuning and its ensemble, on five headline measures"),
        "T07_hypervolume": (merging.hypervolumes(frames["raw"]),
            "T07. Area under the front of 1 − ASR against helpfulness, from (0, 0); the more models, the larger it can be"),
        "T07_ensembles": (merging.against_ensemble(frames["panel"]),
            "T07. From the output ensemble to the linear merge at the same ratio, paired on the panel; in fractions"),
        "T07_barriers": (merging.barriers(frames["merged"]), "T07. Loss barrier on the line to each partner, nats per answer"),
        "T07_choice": (frames["merged"], "T07. What every merge did on the validation pairs, and which one was chosen"),
    }  # fmt: skip
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
        "T08_models": (
            lines, "T08. Every model on every benchmark, in percent: mean over seeds (lowest–highest)",
            analysis.degradation.overview(lines), "Intervals and each seed: the CSV."),
        "T08_precision": (claims.precision(prepared),
            "T08. What each benchmark could have shown: adapted model against its predecessor, in fractions", None,
            "Detectable: found in nine of ten comparisons, at 5 %; sd_items, sd_seeds: of one seed's difference."),
        "T08_published": (provenance.compare_published(frames["published"], lines),
            "T08. Published numbers beside ours, as fractions"),
        "T09_claims": (ledger, "T09. What the paper claims, what was measured, how sure we are; in points", claims.sheet(ledger),
            "Item-level: items are the sample, Holm over the claims of a backbone; seed-level: seeds are the sample, "
            "t-interval and sign. Detectable: found in nine of ten comparisons over items. No verdict is written by hand."),
        "T09_by_seed": (claims.by_seed(prepared), "T09. Each seed by itself, in fractions: item-level verdicts alone"),
        "T09_parts": (claims.every_part(prepared),
            "T09. Every comparison that a claim hangs on, in fractions; p-values uncorrected"),
        "F15_agreement": (pairs, "F15. Judges against each other: answers to harmful requests, and the ranking of the models"),
    }  # fmt: skip
    figures = {
        "F14_claims": (plots.claims.forest(ledger, scale), ledger),
        "F15_judges": (plots.claims.judges(judged, pairs, scale), judged),
        "F00_answer": (plots.claims.lineage(points, scale), points),
    }
    return tables, figures


INSIDE = {
    "raw", "layers", "sets", "drift", "alike", "vectors", "gradients", "patched", "directed", "curves", "scaling", "located",
    "remedy",
}  # fmt: skip
FAMILIES = {
    _adaptation: {"raw", "audit"}, _tuning: {"raw", "validation"}, _probing: INSIDE, _merging: {"raw", "panel", "merged"},
    _claims: {"raw", "published"},
}  # fmt: skip
"""What makes tables and figures -> the frames that it needs."""
