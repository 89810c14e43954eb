"""Write every table and figure from the raw tables present. The only room that writes into `figures/`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from vlsafe import arms, figures, fronts, mergeplots, merges, tables, tradeoff


def load(folders: Sequence[Path], file: str) -> pd.DataFrame:
    """One file of several runs as one frame."""
    return pd.concat([pd.read_parquet(folder / file) for folder in folders], ignore_index=True)


def make(found: Mapping[str, pd.DataFrame], scale: str, folder: Path, provenance: Sequence[dict[str, Any]]) -> list[str]:
    """Every table and figure whose frames are there, with its CSV twin, and one provenance file of the runs behind them.

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
            tables.write(frame, folder, name, {"title": title, "caption": f"{origin} {told}".strip()}, shown)
        for name, (figure, frame) in pictures.items():
            figures.write(figure, frame, folder, name)
        written += [*sheets, *pictures]
    (folder / "provenance.json").write_text(json.dumps(list(provenance), indent=1) + "\n", encoding="utf-8")
    return written


Written = dict[str, tuple[Any, ...]]
"""Name of a table -> the frame, its title, and where it needs them the form for the eye and more of a caption."""
Drawn = dict[str, tuple[Figure, pd.DataFrame]]
"""Name of a figure -> the picture and what it draws."""


def _adaptation(found: Mapping[str, pd.DataFrame], scale: str) -> tuple[Written, Drawn]:
    """T01 to T04, F01 to F03."""
    raw, audit = found["raw"], found["audit"]
    labels = {name: spec["label"] for name, spec in tables.MEASURES.items()}
    compared, confounds = arms.arms(raw), arms.confounds(raw)
    n, asked = (lines.groupby("measure")["n"].max() for lines in (compared, confounds))
    sizes = ", ".join(f"{labels[name]} {int(n[name])}" for name in n.index)
    dynamics, categories = tables.dynamics(raw), tables.by_category(raw)
    drawn = {
        "F01_guard_scores": (figures.guard_scores(audit, scale), tables.score_counts(audit)),
        "F02_dynamics": (figures.dynamics(dynamics, labels, scale), dynamics),
        "F03_categories": (figures.by_category(categories, scale), categories),
    }
    written: Written = {
        "T01_filtering_audit": (tables.filtering_audit(audit), "T01. What the guards dropped"),
        "T01_guard_quality": (
            tables.guard_quality(audit),
            "T01. Precision and recall of the guards against the known truth",
        ),
        "T02_degradation": (tables.degradation(raw), "T02. Parent and adapted model on every measure"),
        "T03_arms": (
            compared,
            "T03. Data, method and rate of stage 2; in percent; Δ: paired difference from the main recipe",
            arms.sheet(compared),
            f"n: {sizes}. Equal helpfulness: linear between checkpoints, items of the panel alone, level: the best of the least "
            'helpful recipe that gains at least half of what the main one gains over stage 1 (others: reached "never"). '
            "Bootstrap intervals have no width where all items agree.",
        ),
        "T03_arms_over_seeds": (
            arms.over_seeds(compared),
            "T03. The same over seeds: mean, range, each seed; differences are from the main recipe",
        ),
        "T04_confounds": (
            confounds,
            "T04. System prompt and empty pictures; in percent; Δ: paired difference from neither, the same model",
            arms.compact(confounds, [*arms.UNIT, "stage", "recipe", "condition"]),
            f"n: {', '.join(f'{labels[name]} {int(size)}' for name, size in asked.items())} a condition; paired by deed.",
        ),
    }
    return written, drawn


def _tuning(found: Mapping[str, pd.DataFrame], scale: str) -> tuple[Written, Drawn]:
    """T05, F05 and F06."""
    tuned = tradeoff.methods(found["raw"], found["tried"])
    plane, refused = tradeoff.plane(tuned), tradeoff.refusals(found["raw"])
    drawn = {
        "F05_tradeoff": (fronts.plane(plane, scale), plane),
        "F06_exaggerated_refusal": (fronts.refusals(refused, scale), refused),
    }
    written: Written = {
        "T05_safety_tuning": (
            tuned,
            "T05. Safety tuning; in percent; Δ: paired difference from the adapted model",
            tradeoff.sheet(tuned),
            "Step and tokens: of the checkpoint that validation pairs chose. Holm: over methods and these five measures, per "
            "backbone and seed; p-values by flipping the signs of clusters. Against the parent and all benchmarks: the CSV.",
        ),
        "T05_transfer": (
            tradeoff.transfer(tuned),
            "T05. Safety taught on text, on pictures or on both: change of ASR on each, in fractions",
        ),
        "T05_checkpoints": (found["tried"], "T05. What every checkpoint did on the validation pairs, and which one was chosen"),
    }
    return written, drawn


def _merging(found: Mapping[str, pd.DataFrame], scale: str) -> tuple[Written, Drawn]:
    """T07, F12 and F13."""
    merged = merges.methods(found["raw"], found["merged"])
    verdict, swept = merges.verdicts(merged), merges.sweep(found["panel"], found["merged"])
    plane, told = merges.plane(found["raw"]), merges.answer(verdict)
    drawn = {
        "F12_ratio_sweep": (mergeplots.sweep(swept, scale), swept),
        "F13_merge_fronts": (mergeplots.fronts(plane, told, scale), plane),
    }
    written: Written = {
        "T07_merging": (
            merged,
            "T07. Merges at the ratio that validation pairs chose; in percent; Δ: paired difference from the adapted model",
            merges.sheet(merged, verdict),
            f"Does merging dominate? {told} Clear: Holm p < 0.05 over rules, partners, five measures. All references: the CSV.",
        ),
        "T07_dominance": (verdict, "T07. Each merge against each tuning and its ensemble, on five headline measures"),
        "T07_hypervolume": (
            merges.hypervolumes(found["raw"]),
            "T07. Area under the front of 1 − ASR against helpfulness, from (0, 0); the more models, the larger it can be",
        ),
        "T07_ensembles": (
            merges.against_ensemble(found["panel"]),
            "T07. From the output ensemble to the linear merge at the same ratio, paired on the panel; in fractions",
        ),
        "T07_barriers": (merges.barriers(found["merged"]), "T07. Loss barrier on the line to each partner, nats per answer"),
        "T07_choice": (found["merged"], "T07. What every merge did on the validation pairs, and which one was chosen"),
    }
    return written, drawn


FAMILIES = {
    _adaptation: {"raw", "audit"},
    _tuning: {"raw", "tried"},
    _merging: {"raw", "panel", "merged"},
}
"""What makes tables and figures -> the frames that it needs."""
