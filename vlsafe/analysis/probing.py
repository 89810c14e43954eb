"""F07, F08 and F11 in numbers: which layers moved, which way, and whether that foretells anything. Imports no model library.

Prompts about one verb–object pair are alike, so every interval over prompts draws whole verb–object pairs. Weights are not a sample: their numbers
have no interval within a seed, only a range over seeds, or what chance alone would give.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from vlsafe.analysis import measures

UNIT = ["backbone", "seed"]
MODEL = [*UNIT, "stage", "recipe", "step"]
COLUMNS = ("cosine", "cosine_centred", "increment", "increment_centred", "projection", "projection_reference")
PROBES = ("probe_own", "probe_reference", "probe_transferred")
OUTCOMES = ("text_asr", "multimodal_asr")
DRAWS = 1000


def spread(values: np.ndarray, clusters: Sequence[Any], rng: np.random.Generator, draws: int = DRAWS) -> np.ndarray:
    """Column means of values as they are, then over bootstrap samples of whole clusters.

    Shapes:   values [N, K], clusters [N]  ->  [1 + draws, K]
    """
    _, index = np.unique([str(cluster) for cluster in clusters], return_inverse=True)
    n = int(index.max()) + 1
    sums, sizes = np.zeros((n, values.shape[1])), np.bincount(index)
    np.add.at(sums, index, values)
    counts = np.vstack([np.ones(n), rng.multinomial(n, np.full(n, 1 / n), size=draws)])
    return counts @ sums / (counts @ sizes)[:, None]


def interval(drawn: np.ndarray) -> dict[str, Any]:
    """The value itself, which comes first, and the 95 % percentile interval of the draws behind it.

    Shapes:   [1 + draws]  ->  value, low, high
    """
    low, high = np.nanquantile(drawn[1:], [0.025, 0.975]) if np.isfinite(drawn[1:]).any() else (np.nan, np.nan)
    return {"value": float(drawn[0]), "low": float(low), "high": float(high)}


def similarity(prompts: pd.DataFrame) -> pd.DataFrame:
    """F07 and F08: one line per model × modality × layer × measure × kind of prompt (harmful, benign, and their difference).

    `prompts` holds a line per prompt × layer. The difference is harmful less benign: where it is negative, harmful prompts moved
    more. Projections are in units of the parent's own gap on text: 0 its harmless mean, 1 its harmful mean.
    """
    lines = []
    for key, part in prompts.groupby([*MODEL, "group"], sort=False):
        told, drawn = dict(zip([*MODEL, "group"], key, strict=True)), {}
        rng = np.random.default_rng(told["seed"])
        for harmful, of in part.groupby("harmful"):
            wide = of.pivot(index=["item", "cluster"], columns="layer", values=list(COLUMNS))
            found = spread(wide.to_numpy(float), wide.index.get_level_values("cluster"), rng)
            drawn["harmful" if harmful else "benign"] = found, wide.columns, len(wide)
        drawn["difference"] = drawn["harmful"][0] - drawn["benign"][0], drawn["harmful"][1], len(part["item"].unique())
        for kind, (found, columns, n) in drawn.items():
            for place, (measure, layer) in enumerate(columns):
                line = {"layer": layer, "measure": measure, "kind": kind, "n": n}
                lines.append(told | line | interval(found[:, place]))
    return pd.DataFrame(lines)


def last(lines: pd.DataFrame) -> pd.DataFrame:
    """The adapted model after its last step."""
    of = lines[lines["stage"] == "instruct"]
    return of[of["step"] == of["step"].max()]


def probes(prompts: pd.DataFrame) -> pd.DataFrame:
    """Held-out AUC of the linear probes for harm: the model's own, the reference's, and the reference's read on the model."""
    lines, scored = [], prompts.dropna(subset=["probe_own"])
    for key, part in scored.groupby([*MODEL, "group", "layer"], sort=False):
        told = dict(zip([*MODEL, "group", "layer"], key, strict=True))
        for name in PROBES:
            drawn = auc(part[name], part["harmful"], part["cluster"], np.random.default_rng(told["seed"]))
            lines.append(told | {"measure": name, "n": len(part)} | interval(drawn))
    return pd.DataFrame(lines)


def auc(
    scores: Sequence[float], harmful: Sequence[bool], clusters: Sequence[Any], rng: np.random.Generator, draws: int = 300
) -> np.ndarray:
    """How often a harmful prompt scores above a harmless one, ties half, as it is and over bootstrap samples of clusters.

    Shapes:   [N]  ->  [1 + draws]
    """
    values, truth = np.asarray(scores, float), np.asarray(harmful, bool)
    _, index = np.unique([str(cluster) for cluster in clusters], return_inverse=True)
    n = int(index.max()) + 1
    weights = np.vstack([np.ones(n), rng.multinomial(n, np.full(n, 1 / n), size=draws)])[:, index]
    above = values[truth][:, None] - values[~truth][None]
    won = (above > 0) + 0.5 * (above == 0)
    pairs = weights[:, truth].sum(1) * weights[:, ~truth].sum(1)
    return ((weights[:, truth] @ won) * weights[:, ~truth]).sum(1) / np.where(pairs > 0, pairs, np.nan)


def alignments(sets: pd.DataFrame) -> pd.DataFrame:
    """CKA with the interval of its jackknife error."""
    return sets.assign(value=sets["cka"], low=sets["cka"] - 1.96 * sets["error"], high=sets["cka"] + 1.96 * sets["error"])


def drift(weights: pd.DataFrame) -> pd.DataFrame:
    """Per model × layer × module: length of the change against that of the weights, and effective rank as a share of the full.

    Module "all" is the whole block, told at every step; single modules only at a model's last. What is in no block stands at
    layer -1.
    """
    weights = weights.assign(layer=weights["layer"].fillna(-1).astype(int))
    final = weights[weights["step"] == weights.groupby(MODEL[:-1])["step"].transform("max")]
    frames = []
    for by, module in (([*MODEL, "layer", "module"], None), ([*MODEL, "layer"], "all")):
        of = weights if module else final
        found = of.groupby(by, sort=False).agg(
            norm=("norm", "sum"), change=("change", "sum"), rank=("rank", "sum"), n=("n", "sum")
        )
        ranked = of.dropna(subset=["rank"]).groupby(by, sort=False)["full_rank"].sum()
        found["drift"], found["rank_share"] = np.sqrt(found["change"] / found["norm"]), found["rank"] / ranked
        frames.append(found.reset_index().assign(**({"module": module} if module else {})))
    columns = [*MODEL, "layer", "module", "drift", "rank_share", "n"]
    return pd.concat(frames, ignore_index=True)[columns]


def drift_sheet(lines: pd.DataFrame) -> pd.DataFrame:
    """`drift` for the eye: the drift of each block after the last step, in percent, one line per model."""
    whole = lines[lines["module"] == "all"]
    whole = whole[whole["step"] == whole.groupby(MODEL[:-1])["step"].transform("max")]
    return whole.pivot(index=MODEL, columns="layer", values="drift").mul(100).round(1).reset_index()


def prediction(weights: pd.DataFrame, alike: pd.DataFrame, raw: pd.DataFrame) -> pd.DataFrame:
    """Whether what is seen early in stage 2 predicts the attack success at its end, over recipes and seeds.

    Rank correlations at every step that all recipes share, over all points, and as the mean over studies of the
    correlation within one ("within"), which no difference between seeds can make. The interval redraws studies where
    there are at least three, recipes otherwise.

    Predictors: `drift`, relative change of all blocks' weights; `harmful` and `benign`, one less the centred cosine to
    the parent on text; `selective`, the difference of these two.
    """
    final = measures.rates(raw[(raw["stage"] == "instruct") & (raw["exam"] == "full")], OUTCOMES, [*UNIT, "recipe"])
    outcomes = final.pivot(index=[*UNIT, "recipe"], columns="measure", values="value")
    seen = early(weights, alike)
    lines = []
    for step, points in seen.groupby("step"):
        joined = points.drop(columns="step").join(outcomes, on=[*UNIT, "recipe"], how="inner")
        for predictor in ("drift", "harmful", "benign", "selective"):
            for outcome in OUTCOMES:
                told = {"step": step, "predictor": predictor, "outcome": outcome, "n": len(joined)}
                told |= {"studies": joined.groupby(UNIT).ngroups}
                lines += [told | {"over": over} | interval(found) for over, found in _correlated(joined, predictor, outcome)]
    return pd.DataFrame(lines)


def early(weights: pd.DataFrame, alike: pd.DataFrame) -> pd.DataFrame:
    """The predictors of every recipe of stage 2, at the steps before the last that all recipes share."""
    by = [*UNIT, "recipe", "step"]
    weights, alike = (frame[frame["stage"] == "instruct"] for frame in (weights, alike))
    blocks = weights.dropna(subset=["layer"]).groupby(by)[["change", "norm"]].sum()
    moved = 1 - alike.groupby([*by, "harmful"])["cosine_centred"].mean().unstack("harmful")
    found = pd.DataFrame({"drift": np.sqrt(blocks["change"] / blocks["norm"]), "harmful": moved[True], "benign": moved[False]})
    found = found.assign(selective=found["harmful"] - found["benign"]).reset_index()
    shared = set.intersection(*(set(steps) for _, steps in found.groupby([*UNIT, "recipe"])["step"]))
    return found[found["step"].isin(shared - {found["step"].max()})]


def _correlated(points: pd.DataFrame, x: str, y: str, draws: int = 1000) -> Iterator[tuple[str, np.ndarray]]:
    """Rank correlation over all points and, with several studies, the mean within them, as is and over bootstrap samples."""
    rng, studies = np.random.default_rng(0), [part[[x, y]].to_numpy(float) for _, part in points.groupby(UNIT)]
    if len(studies) >= 3:
        drawn = [rng.integers(len(studies), size=len(studies)) for _ in range(draws)]
        rho = np.array([rank_correlation(part) for part in studies])
        yield (
            "all",
            np.array([rank_correlation(np.concatenate([studies[i] for i in of])) for of in (range(len(studies)), *drawn)]),
        )
        yield "within", np.array([_mean(rho), *(_mean(rho[of]) for of in drawn)])
        return
    redrawn = [[part[rng.integers(len(part), size=len(part))] for part in studies] for _ in range(draws)]
    yield "all", np.array([rank_correlation(np.concatenate(parts)) for parts in (studies, *redrawn)])
    if len(studies) > 1:
        yield "within", np.array([_mean(np.array([rank_correlation(of) for of in parts])) for parts in (studies, *redrawn)])


def _mean(values: np.ndarray) -> float:
    """Mean of the numbers among them; not a number where there is none."""
    return float(values[np.isfinite(values)].mean()) if np.isfinite(values).any() else float("nan")


def rank_correlation(points: np.ndarray) -> float:
    """Spearman's, of the two columns; not a number where one of them is constant.

    Shapes:   [N, 2]  ->  in [-1, 1]
    """
    ranks = rankdata(points, axis=0)
    ranks = ranks - ranks.mean(0)
    size = np.sqrt((ranks**2).sum(0)).prod()
    return float(ranks.prod(1).sum() / size) if size > 0 else float("nan")


def task_vectors(vectors: pd.DataFrame) -> pd.DataFrame:
    """F11, left: cosine of stage 2's task vector with a safety tuning's, per block, and how far random vectors would reach.

    Weights are no sample; `chance` is 1.96 / sqrt(n), which random directions of n weights exceed in one case of twenty.
    """
    blocks = vectors.dropna(subset=["layer"]).astype({"layer": int})
    found = blocks.groupby([*UNIT, "pair", "layer"], sort=False)[["inner", "a", "b", "n"]].sum().reset_index()
    size = np.sqrt(found["a"] * found["b"])
    return found.assign(value=found["inner"] / size.where(size > 0), chance=1.96 / np.sqrt(found["n"]))[
        [*UNIT, "pair", "layer", "value", "chance", "n"]
    ]


def gradients(pairs: pd.DataFrame) -> pd.DataFrame:
    """F11, right: mean cosine of two batches' gradients, of one task and of the two tasks, per step × layer.

    Two batches of one task are the yardstick: noise alone keeps them from 1. Interval: jackknife over batches.
    """
    kind = pairs["task_a"].where(pairs["task_a"] == pairs["task_b"], "both")
    lines = []
    for key, part in pairs.assign(kind=kind).groupby([*UNIT, "step", "layer", "kind"], sort=False):
        batches = np.unique(part[["a", "b"]])
        kept = [part.loc[(part[["a", "b"]] != batch).all(axis=1), "cosine"] for batch in batches]
        without = np.array([cosines.mean() for cosines in kept if len(cosines)])
        error = np.sqrt((len(without) - 1) * without.var()) if len(without) > 1 else np.nan
        value = part["cosine"].mean()
        told = dict(zip([*UNIT, "step", "layer", "kind"], key, strict=True))
        lines.append(told | {"value": value, "low": value - 1.96 * error, "high": value + 1.96 * error, "batches": len(batches)})
    return pd.DataFrame(lines)
