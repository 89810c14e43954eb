"""F07, F08 and F11 in numbers: which layers changed, which way, and whether an early checkpoint predicts the end.

Prompts about one verb–object pair are alike, so every interval over prompts resamples whole pairs. Weights are not a sample:
their numbers have no interval within a seed, only a range over seeds, or what chance alone would give.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from vlsafe.analysis import measures, stats
from vlsafe.analysis.measures import UNIT, groups
from vlsafe.analysis.stats import percentiles

MODEL = [*UNIT, "stage", "recipe", "step"]
COLUMNS = ("cosine", "cosine_centred", "increment", "increment_centred", "projection", "projection_reference")
PROBES = ("probe_own", "probe_reference", "probe_transferred")
OUTCOMES = ("text_asr", "multimodal_asr")
FEW = 5  # of fewer studies no resample says how they spread
DRAWS = 1000


def spread(values: np.ndarray, clusters: Sequence[Any], rng: np.random.Generator, draws: int = DRAWS) -> np.ndarray:
    """Column means of values as they are, then over bootstrap samples of whole clusters.

    Shapes:   values [N, K], clusters [N]  ->  [1 + draws, K]
    """
    index, sizes = stats.clusters_of(clusters)
    counts = stats.resamples(len(sizes), draws, rng)
    return counts @ stats.totals(values, index, len(sizes)) / (counts @ sizes)[:, None]


def similarity(prompts: pd.DataFrame) -> pd.DataFrame:
    """F07 and F08: one line per model × modality × layer × measure × kind of prompt (harmful, benign, and their difference).

    `prompts` holds a line per prompt × layer. The difference is harmful less benign: where it is negative, harmful prompts
    changed more. Projections are in units of the parent's own gap on text: 0 its harmless mean, 1 its harmful mean.
    """
    lines = []
    for model, part in groups(prompts, [*MODEL, "group"]):
        rng, drawn = np.random.default_rng(model["seed"]), {}
        for harmful, rows in part.groupby("harmful"):
            wide = rows.pivot(index=["item", "cluster"], columns="layer", values=list(COLUMNS))
            means = spread(wide.to_numpy(float), wide.index.get_level_values("cluster"), rng)
            drawn["harmful" if harmful else "benign"] = means, len(wide)
        drawn["difference"] = drawn["harmful"][0] - drawn["benign"][0], part["item"].nunique()
        for kind, (means, n) in drawn.items():
            for place, (measure, layer) in enumerate(wide.columns):
                line = {"layer": layer, "measure": measure, "kind": kind, "n": n}
                lines.append(model | line | percentiles(means[:, place]))
    return pd.DataFrame(lines)


def last(lines: pd.DataFrame) -> pd.DataFrame:
    """The adapted model after its last step."""
    of = lines[lines["stage"] == "instruct"]
    return of[of["step"] == of.groupby(UNIT)["step"].transform("max")]


def probes(prompts: pd.DataFrame) -> pd.DataFrame:
    """Held-out AUC of the linear probes for harm: the model's own, the reference's, and the reference's applied to the model."""
    lines = []
    for key, rows in groups(prompts.dropna(subset=["probe_own"]), [*MODEL, "group", "layer"]):
        for name in PROBES:
            drawn = auc(rows[name], rows["harmful"], rows["cluster"], np.random.default_rng(key["seed"]))
            lines.append(key | {"measure": name, "n": len(rows)} | percentiles(drawn))
    return pd.DataFrame(lines)


def auc(
    scores: Sequence[float], harmful: Sequence[bool], clusters: Sequence[Any], rng: np.random.Generator, draws: int = 300
) -> np.ndarray:
    """How often a harmful prompt scores above a harmless one, ties half, as it is and over bootstrap samples of clusters.

    Shapes:   [N]  ->  [1 + draws]
    """
    values, truth = np.asarray(scores, float), np.asarray(harmful, bool)
    index, sizes = stats.clusters_of(clusters)
    weights = stats.resamples(len(sizes), draws, rng)[:, index]
    above = values[truth][:, None] - values[~truth][None]
    won = (above > 0) + 0.5 * (above == 0)
    pairs = weights[:, truth].sum(1) * weights[:, ~truth].sum(1)
    return ((weights[:, truth] @ won) * weights[:, ~truth]).sum(1) / np.where(pairs > 0, pairs, np.nan)


def alignments(sets: pd.DataFrame) -> pd.DataFrame:
    """CKA with the interval of its jackknife error."""
    return sets.assign(value=sets["cka"], low=sets["cka"] - 1.96 * sets["error"], high=sets["cka"] + 1.96 * sets["error"])


def drift(weights: pd.DataFrame) -> pd.DataFrame:
    """Per model × layer × module: length of the change against that of the weights, and effective rank as a share of the full.

    Module "all" is the whole block, at every step; single modules only at a model's last. What is in no block stands at layer -1.
    """
    weights = weights.assign(layer=weights["layer"].fillna(-1).astype(int))
    final = weights[weights["step"] == weights.groupby(MODEL[:-1])["step"].transform("max")]
    by = [*MODEL, "layer", "module"]
    rows = pd.concat([final, weights.assign(module="all")], ignore_index=True)
    rows["ranked"] = rows["full_rank"].where(rows["rank"].notna())
    sums = rows.groupby(by, sort=False)[["norm", "change", "rank", "n"]].sum()
    ranked = rows.groupby(by, sort=False)["ranked"].sum(min_count=1)
    sums = sums.assign(drift=np.sqrt(sums["change"] / sums["norm"]), rank_share=sums["rank"] / ranked)
    return sums.reset_index()[[*by, "drift", "rank_share", "n"]]


def drift_sheet(lines: pd.DataFrame) -> pd.DataFrame:
    """`drift` for the eye: the drift of each block after the last step, in percent, one line per model."""
    whole = lines[lines["module"] == "all"]
    whole = whole[whole["step"] == whole.groupby(MODEL[:-1])["step"].transform("max")]
    return whole.pivot(index=MODEL, columns="layer", values="drift").mul(100).round(1).reset_index()


def prediction(weights: pd.DataFrame, alike: pd.DataFrame, raw: pd.DataFrame) -> pd.DataFrame:
    """Whether an early checkpoint of stage 2 predicts the attack success at its end, over recipes and seeds.

    Rank correlations at every step that all recipes share, over all points, and as the mean over studies of the
    correlation within one ("within"), which no difference between seeds can make. The interval resamples studies where
    there are at least FEW, recipes otherwise.

    Predictors: `drift`, relative change of all blocks' weights; `harmful` and `benign`, one less the centred cosine to
    the parent on text; `selective`, the difference of these two.

    Raises:   Lacking where no recipe was examined at its end, or all have other checkpoints
    """
    final = measures.rates(raw[(raw["stage"] == "instruct") & (raw["exam"] == "full")], OUTCOMES, [*UNIT, "recipe"])
    if final.empty:
        raise measures.Lacking("there is no full examination of a model of stage 2")
    outcomes = final.pivot(index=[*UNIT, "recipe"], columns="measure", values="value")
    lines = []
    for step, points in early(weights, alike).groupby("step"):
        joined = points.drop(columns="step").join(outcomes, on=[*UNIT, "recipe"], how="inner")
        if joined.empty:
            raise measures.Lacking("no recipe that left early checkpoints was examined at its end")
        for predictor in ("drift", "harmful", "benign", "selective"):
            for outcome in [name for name in OUTCOMES if name in outcomes]:
                line = {"step": step, "predictor": predictor, "outcome": outcome, "n": len(joined)}
                line |= {"studies": joined.groupby(UNIT).ngroups}
                lines += [line | {"over": over} | percentiles(drawn) for over, drawn in _correlated(joined, predictor, outcome)]
    if not lines:
        raise measures.Lacking("no checkpoint before the last one is shared by all recipes")
    return pd.DataFrame(lines)


def prediction_sheet(lines: pd.DataFrame) -> pd.DataFrame:
    """`prediction` for the eye: one line per predictor and step, a column per outcome."""
    cell = lines.apply(lambda line: f"{line.value:+.2f} [{line.low:+.2f}, {line.high:+.2f}]", axis=1)
    return lines.assign(cell=cell).pivot(index=["over", "predictor", "step"], columns="outcome", values="cell")


def early(weights: pd.DataFrame, alike: pd.DataFrame) -> pd.DataFrame:
    """The predictors of every recipe of stage 2, at the steps before the last that all recipes share."""
    by = [*UNIT, "recipe", "step"]
    weights, alike = (frame[frame["stage"] == "instruct"] for frame in (weights, alike))
    blocks = weights.dropna(subset=["layer"]).groupby(by)[["change", "norm"]].sum()
    moved = 1 - alike.groupby([*by, "harmful"])["cosine_centred"].mean().unstack("harmful")
    points = pd.DataFrame({"drift": np.sqrt(blocks["change"] / blocks["norm"]), "harmful": moved[True], "benign": moved[False]})
    points = points.assign(selective=points["harmful"] - points["benign"]).reset_index()
    shared = set.intersection(*(set(steps) for _, steps in points.groupby([*UNIT, "recipe"])["step"]))
    return points[points["step"].isin(shared - {points["step"].max()})]


def _correlated(points: pd.DataFrame, x: str, y: str, draws: int = 1000) -> Iterator[tuple[str, np.ndarray]]:
    """Rank correlation over all points and, with several studies, the mean within them, as is and over bootstrap samples: of
    studies, or where these are few of the recipes within each."""
    rng, studies = np.random.default_rng(0), [part[[x, y]].to_numpy(float) for _, part in points.groupby(UNIT)]
    if len(studies) >= FEW:
        drawn = [rng.integers(len(studies), size=len(studies)) for _ in range(draws)]
        samples = [[studies[i] for i in sample] for sample in (range(len(studies)), *drawn)]
    else:
        samples = [studies, *([part[rng.integers(len(part), size=len(part))] for part in studies] for _ in range(draws))]
    yield "all", np.array([rank_correlation(np.concatenate(parts)) for parts in samples])
    if len(studies) > 1:
        within = {id(part): rank_correlation(part) for parts in samples for part in parts}
        yield "within", np.array([_mean(np.array([within[id(part)] for part in parts])) for parts in samples])


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
    for key, rows in groups(pairs.assign(kind=kind), [*UNIT, "step", "layer", "kind"]):
        batches = np.unique(rows[["a", "b"]])
        kept = [rows.loc[(rows[["a", "b"]] != batch).all(axis=1), "cosine"] for batch in batches]
        without = np.array([cosines.mean() for cosines in kept if len(cosines)])
        error = np.sqrt((len(without) - 1) * without.var()) if len(without) > 1 else np.nan
        value = rows["cosine"].mean()
        lines.append(key | {"value": value, "low": value - 1.96 * error, "high": value + 1.96 * error, "batches": len(batches)})
    return pd.DataFrame(lines)
