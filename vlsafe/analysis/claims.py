"""The claims ledger: what the paper says, what was measured, how sure we are.

A claim is a tree of comparisons, fixed before the results: "all" of them must hold, or "any". Each claim has two verdicts.
*Item-level*: the items are the sample and the models are fixed; verb–object pairs are resampled, seeds are strata.
*Seed-level*: the training runs are the sample; all seeds must lie on one side, and the t-interval over them beside it. What
was not measured has no verdict.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import t as student

from vlsafe.analysis import comparisons, stats
from vlsafe.analysis.comparisons import (
    ADAPTED,
    Changes,
    Frames,
    Part,
    Unit,
    band_similarity,
    changes,
    frozen,
    gradients,
    trend,
)  # fmt: skip
from vlsafe.core.scale import known
from vlsafe.core.schema import MAIN_LINE

LEVEL, SEEDS, MARGIN = 0.05, 3, 0.05  # of a verdict; fewest seeds for a seed-level verdict; what "the same level" allows
SUPPORTED, CONTRADICTED, UNDECIDED, CEILING, NOT = (
    "supported", "contradicted", "undecided", "undecided (ceiling)", "not measured"
)  # fmt: skip
PARENT, STAGE_1 = MAIN_LINE["parent"], MAIN_LINE["stage 1"]
DRAWS = 9999  # p-values of the ledger are corrected for some twenty claims, so their tails must be known


class Joint(NamedTuple):
    """Comparisons of which all or any must hold."""

    how: str
    parts: tuple[Part | Joint, ...]


class Claim(NamedTuple):
    """A statement of the paper or about it, and what decides it; `only`: of these backbones."""

    name: str
    text: str
    decided_by: Part | Joint
    only: tuple[str, ...] = ()


def prepared(frames: Frames) -> dict[str, Any]:
    """The frames as `ledger` and `precision` take them."""
    used = {measure for claim in CLAIMS for part in leaves(claim.decided_by) for measure in part.measures}
    return comparisons.prepared(frames, used | set(PRECISION))


def leaves(tree: Part | Joint) -> list[Part]:
    """The comparisons of a tree, in order."""
    return [tree] if isinstance(tree, Part) else [leaf for part in tree.parts for leaf in leaves(part)]


def compared(part: Part, studies: Mapping[Unit, Changes]) -> dict[str, Any]:
    """A comparison over studies of one backbone: seeds as strata, then each seed by itself and seeds as the sample."""
    pooled = [s._replace(weight=s.weight / len(studies)) for one in studies.values() for s in one.strata]
    whole = stats.compare(pooled, np.random.default_rng(0), part.against, DRAWS)
    single = [stats.compare(one.strata, np.random.default_rng(unit[1]), part.against) for unit, one in studies.items()]
    before, after = (float(np.mean([one[side] for one in studies.values()])) for side in (1, 2))
    room = part.sign * ((part.sign > 0) - before - part.against)
    line = {name: getattr(whole, name).item() for name in ("effect", "low", "high", "p", "detectable")}
    line |= {"part": part.what, "sign": part.sign, "before": before, "after": after, "against": part.against}
    strict = part.sign * part.against >= 0  # where the threshold leaves leeway, nothing has to change
    ceiling = bool(strict and line["p"] >= LEVEL and room < line["detectable"])
    line |= {"n": whole.n, "seeds": len(studies), "ceiling": ceiling}
    return line | over_seeds([one.effect.item() for one in single], [one.se.item() for one in single], part)


def over_seeds(effects: Sequence[float] | np.ndarray, se: Sequence[float], part: Part) -> dict[str, Any]:
    """The t-interval over seeds, and how much of an effect's spread is due to seeds and how much to items.

    The standard error is never below what the items alone would give. Seeds on both sides of the threshold decide nothing.
    """
    k, effects = len(effects), np.asarray(effects)
    items = float(np.sqrt(np.mean(np.square(se))))
    line = {"effects": effects.round(4).tolist(), "sd_items": items, "seed_p": 1.0}
    if k < 2:
        return line
    between = effects.var(ddof=1)
    error = np.sqrt(max(between, items**2) / k)
    half, distance = student.ppf(0.975, k - 1) * error, effects.mean() - part.against
    if len(set(np.sign(effects - part.against))) == 1 and distance != 0:
        line["seed_p"] = float(2 * student.sf(abs(distance) / error, k - 1))
    reach = student.ppf(0.975, k - 1) + student.ppf(stats.POWER, k - 1)
    ends = {"seed_low": effects.mean() - half, "seed_high": effects.mean() + half, "seed_detectable": reach * error}
    return line | ends | {"sd_seeds": float(np.sqrt(max(0.0, between - items**2)))}


class Weight(NamedTuple):
    """P-values for and against, and the comparisons that they hang on."""

    support: float
    contradict: float
    supporting: str
    contradicting: str


def weigh(tree: Part | Joint, lines: Mapping[str, Mapping[str, Any]], p: str) -> Weight:
    """P-values of a tree from those of its parts: of "all" the greatest, of "any" the least times their number.

    Source:   intersection-union test (Berger 1982) and Bonferroni's bound
    """
    if isinstance(tree, Part):
        line = lines[tree.what]
        holds = tree.sign * (line["effect"] - tree.against) > 0
        support, contradict = (line[p], 1.0) if holds else (1.0, line[p])
        return Weight(support, contradict, tree.what, tree.what)
    parts = [weigh(part, lines, p) for part in tree.parts]
    pro = _joined([(part.support, part.supporting) for part in parts], tree.how == "all")
    con = _joined([(part.contradict, part.contradicting) for part in parts], tree.how == "any")  # "any" fails if every part does
    return Weight(pro[0], con[0], pro[1], con[1])


def _joined(parts: list[tuple[float, str]], every: bool) -> tuple[float, str]:
    p, deciding = (max if every else min)(parts, key=lambda part: part[0])
    return p if every else min(1.0, len(parts) * p), deciding


Lines = Mapping[tuple[str, str], Mapping[str, Mapping[str, Any]]]
"""(claim, backbone) -> comparison -> its result; none where no study has measured all of them."""


def ledger(frames: Frames, seeds: Sequence[int] | None = None) -> pd.DataFrame:
    """T09: one line per claim × backbone with both verdicts and the comparison that decides; `seeds` restricts the studies.

    `frames` are as `prepared` lays them out.

    Units:    fractions; p-values are two-sided
    """
    return judged(results(frames, seeds))


def units_of(frames: Frames) -> dict[str, list[Unit]]:
    """The studies of each backbone, in order."""
    units = sorted({key[:2] for key in frames["answers"]})
    return {backbone: [unit for unit in units if unit[0] == backbone] for backbone, _ in units}


def results(frames: Frames, seeds: Sequence[int] | None = None) -> Lines:
    """Every comparison of every claim, over the seeds that have measured the whole claim."""
    units, lines = units_of(frames), {}
    for claim in CLAIMS:
        parts = leaves(claim.decided_by)
        for backbone in claim.only or units:
            of = [unit for unit in units.get(backbone, []) if seeds is None or unit[1] in seeds]
            found = {unit: [change for part in parts if (change := changes(part, frames, unit))] for unit in of}
            whole = {unit: each for unit, each in found.items() if len(each) == len(parts)}
            each = [compared(part, {u: whole[u][i] for u in whole}) for i, part in enumerate(parts) if whole]
            if of or claim.only:
                lines[claim.name, backbone] = {line["part"]: line for line in each}
    return lines


def judged(lines: Lines) -> pd.DataFrame:
    """Verdicts from the comparisons of all claims; Holm's family is the claims of one backbone."""
    claims, rows = {claim.name: claim for claim in CLAIMS}, []
    for (name, backbone), of in lines.items():
        row: dict[str, Any] = {"claim": name, "statement": claims[name].text, "backbone": backbone}
        if of:
            item, seed = (weigh(claims[name].decided_by, of, p) for p in ("p", "seed_p"))
            falls = item.contradict < min(LEVEL, item.support)
            row |= of[item.contradicting if falls else item.supporting]
            row |= {"p": min(item[:2]), "seed_p": min(seed[:2]), "ceiling": any(part["ceiling"] for part in of.values())}
            row |= {"item_holds": item.support < item.contradict, "seed_holds": seed.support < seed.contradict}
        rows.append(row)
    head = ["claim", "statement", "backbone", *COLUMNS]
    frame = pd.DataFrame(rows).reindex(columns=[*head, "item_holds", "seed_holds", "ceiling"])
    for p in ("p", "seed_p"):
        frame[f"{p}_holm"] = stats.holm(frame[p], [frame["backbone"]])
    few = (frame["seeds"].fillna(0) < SEEDS) & frame["seed_p"].notna()
    for level, p in (("item", frame["p_holm"]), ("seed", frame["seed_p"].mask(few, 1.0))):
        verdicts = zip(p, frame[f"{level}_holds"], frame["ceiling"], strict=True)
        frame[f"{level}_level"] = [_verdict(*evidence) for evidence in verdicts]
    return frame[head]


def _verdict(p: float, holds: bool, ceiling: bool) -> str:
    if pd.isna(p):
        return NOT
    if p < LEVEL:
        return SUPPORTED if holds else CONTRADICTED
    return CEILING if ceiling else UNDECIDED


COLUMNS = [
    "item_level", "seed_level", "part", "sign", "before", "after", "against", "effect", "low", "high", "p", "p_holm", "n",
    "seeds", "detectable", "effects", "seed_low", "seed_high", "seed_p", "seed_p_holm", "seed_detectable", "sd_items", "sd_seeds",
]  # fmt: skip


def every_part(frames: Frames) -> pd.DataFrame:
    """One line per claim × backbone × comparison, before they are weighed against each other."""
    lines = results(frames)
    return pd.DataFrame([{"claim": name, "backbone": b, **line} for (name, b), of in lines.items() for line in of.values()])


def by_seed(frames: Frames) -> pd.DataFrame:
    """The ledger of every seed by itself, whose verdicts are item-level alone."""
    seeds = sorted({key[1] for key in frames["answers"]})
    return pd.concat([ledger(frames, [seed]).assign(seed=seed) for seed in seeds], ignore_index=True)


def precision(frames: Frames) -> pd.DataFrame:
    """What each benchmark could have shown: the smallest difference found in nine of ten comparisons of the adapted model with
    its predecessor, over items and over seeds, and how the spread of that difference divides between items and seeds.
    """
    columns = ("seeds", "n", "effect", "low", "high", "detectable", "sd_items", "sd_seeds", "seed_detectable")
    lines = []
    for backbone, units in units_of(frames).items():
        for measure, before in PRECISION.items():
            part = Part(measure, 1, before, ADAPTED, (measure,))
            found = {unit: change for unit in units if (change := changes(part, frames, unit))}
            if found:
                line = compared(part, found)
                lines.append({"backbone": backbone, "measure": measure} | {name: line.get(name) for name in columns})
    return pd.DataFrame(lines)


def sheet(ledger: pd.DataFrame) -> pd.DataFrame:
    """T09 for the eye, in points."""
    points = 100 * ledger[["effect", "low", "high", "seed_low", "seed_high", "detectable"]]

    def text(form: str, *columns: str) -> list[str]:
        return ["" if any(map(pd.isna, row)) else form.format(*row) for row in points[list(columns)].to_numpy()]

    shown = ledger[["claim", "statement", "backbone", "item_level", "seed_level"]].copy()
    shown = shown.rename(columns=lambda name: name.replace("_", " ")).assign(**{"decided by": ledger["part"]})
    shown["effect"] = text("{:+.0f} [{:+.0f}, {:+.0f}]", "effect", "low", "high")
    shown["over seeds"] = text("[{:+.0f}, {:+.0f}]", "seed_low", "seed_high")
    shown["p (Holm)"] = ["" if pd.isna(p) else f"{p:.3f}" for p in ledger["p_holm"]]
    shown[["n", "seeds"]] = ledger[["n", "seeds"]].astype("Int64")
    shown["detectable"] = text("{:.0f}", "detectable")
    return shown


def committed(folder: Path, names: Sequence[str]) -> pd.DataFrame:
    """Some claims of the ledger in a folder of artefacts, for the eye; no line where the folder has no ledger.

    Raises:   ValueError for a name that is no claim's
    """
    for name in names:
        known(name, [claim.name for claim in CLAIMS], "claim")
    path = folder / "T09_claims.csv"
    lines = pd.read_csv(path, dtype={"claim": str}) if path.exists() else judged({})
    return sheet(lines[lines["claim"].isin(names)]).set_index(["claim", "backbone"])


PRECISION = {  # measures whose smallest detectable difference is printed -> with what the adapted model is compared
    "text_asr": PARENT, "wildjailbreak_asr": PARENT, "exaggerated_refusal": PARENT, "multimodal_asr": STAGE_1,
    "twin_refusal": STAGE_1, "figstep_asr": STAGE_1, "siuo_asr": STAGE_1, "mmbench_circular": STAGE_1, "mme_score": STAGE_1,
    "seed_likelihood": STAGE_1, "helpfulness": STAGE_1,
}  # fmt: skip


def _costs(after: str) -> Joint:
    """What restored safety may cost: text ASR stays above the parent's, less help, more refusals of harmless requests."""
    over = f"more than {round(100 * MARGIN)} points"
    ways = (
        ("text_asr", 1, PARENT, f"text ASR {over} above the parent's"),
        ("helpfulness", -1, ADAPTED, f"helpfulness falls by {over}"),
        ("twin_refusal", 1, ADAPTED, f"refusal of benign twins rises by {over}"),
        ("exaggerated_refusal", 1, ADAPTED, f"exaggerated refusal rises by {over}"),
    )  # fmt: skip
    return Joint("any", tuple(Part(what, sign, before, after, (m,), sign * MARGIN) for m, sign, before, what in ways))


def _text_rises(after: str) -> Part:
    return Part("text ASR rises from the parent's", 1, PARENT, after)


def _pictures_rise(after: str) -> Part:
    return Part("multimodal ASR rises from stage 1's", 1, STAGE_1, after, ("multimodal_asr",))


def _not_beaten(merged: str, by: str) -> Joint:
    """No method is better than the merged model by more than the margin in both: ASR (text and pictures) and helpfulness."""
    asr = Part(f"ASR of text plus pictures at most the margin above {by}'s", -1, f"safety/{by}", merged, BOTH, 2 * MARGIN)
    return Joint("any", (asr, Part(f"helpfulness at most the margin below {by}'s", 1, f"safety/{by}", merged, HELP, -MARGIN)))


def _beats(before: str, after: str) -> Joint:
    """No worse than the margin in anything, and better in something."""
    sides = (("text ASR", -1, ("text_asr",)), ("multimodal ASR", -1, ("multimodal_asr",)), ("helpfulness", 1, HELP))
    no_worse = tuple(Part(f"{what} no worse than the margin", s, before, after, m, -s * MARGIN) for what, s, m in sides)
    better = tuple(Part(f"{what} better", s, before, after, m) for what, s, m in sides)
    return Joint("all", (*no_worse, Joint("any", better)))


def _both_rise(after: str) -> Joint:
    return Joint("all", (_text_rises(after), _pictures_rise(after)))


def _mitigates(after: str) -> Joint:
    falls = [("text ASR", "text_asr"), ("multimodal ASR", "multimodal_asr")]
    lower = tuple(Part(f"{what} falls from the adapted model's", -1, ADAPTED, after, (measure,)) for what, measure in falls)
    return Joint("all", (*lower, _costs(after)))


TUNED = ("safety/sl-full", "safety/dpo-both-full")  # SFT and RLHF, in the claims and in F00
# Linear merges and ensembles with either, each at the ratio of an interior merge (0 < α < 1) that validation chose.
MERGED, ENSEMBLE = (
    [f"merge/{rule}/filtered-full+{run.partition('/')[2]}/0.[1-9]*" for run in TUNED] for rule in ("inside", "ensemble")
)
BOTH, HELP = ("text_asr", "multimodal_asr"), ("helpfulness",)
METHODS = tuple(
    f"{name}-full" for name in ("mtl", "sl", "sl-replay", "textsft", "sibling", "dpo-text", "dpo-image", "dpo-both", "grpo-text")
)
UNFILTERED, CLEAN, LOOKING, TWIN = (f"instruct/{data}-full" for data in ("unfiltered", "clean", "looking", "textonly"))
CLAIMS = (
    Claim("1", "Adaptation raises text ASR (unfiltered data)", _text_rises(UNFILTERED)),
    Claim("2", "Adaptation raises multimodal ASR (unfiltered data)", _pictures_rise(UNFILTERED)),
    Claim("3", "So it does with filtered data, text and pictures", _both_rise(ADAPTED)),
    Claim("3b", "So it does with data that are clean beyond doubt", _both_rise(CLEAN)),
    Claim("4", "Degradation grows along stage 2", Part("text ASR rises along it", 1, ADAPTED, ADAPTED, method=trend)),
    Claim("4b", "Pictures cause more of it than the same rows as text", Part("text ASR above the twin's", 1, TWIN, ADAPTED)),
    Claim(
        "4c", "The multimodal rise is more than lost over-refusal",
        Part("rise of multimodal ASR less the fall of twins' refusal", 1, STAGE_1, ADAPTED, ("multimodal_asr", "twin_refusal")),
    ),
    Claim("4d", "Instruction rows cause it, captions do not", Part("text ASR above that without how-tos", 1, LOOKING, ADAPTED)),
    Claim("5", "SFT lowers ASR, but not to the parent's level or at a cost (sequential)", _mitigates(TUNED[0])),
    Claim("5b", "The same of multitask SFT", _mitigates("safety/mtl-full")),
    Claim("6", "RLHF lowers ASR, but not to the parent's level or at a cost (DPO)", _mitigates(TUNED[1])),
    Claim(
        "7", "Similarity to the parent falls most in the located layers",
        Part("1 - cosine inside the band above outside", 1, PARENT, ADAPTED, ("cosine",), method=band_similarity),
    ),
    Claim(
        "7b", "So it does with each block's own increment",
        Part("1 - cosine of increments inside above outside", 1, PARENT, ADAPTED, ("increment",), method=band_similarity),
    ),
    Claim(
        "8", "Freezing them protects more than freezing other blocks",
        Part("text ASR below that of other sets", -1, "sppft/*", "sppft/located", method=frozen),
    ),
    Claim(
        "9", "The objectives diverge: gradients differ more between tasks than within",
        Part("cosine below that within a task", -1, "", "", ("between", "within"), method=gradients),
    ),
    Claim("9b", "The gradients conflict", Part("cosine of gradients below zero", -1, "", "", ("between",), method=gradients)),
    Claim(
        "10", "Merging lies on or beyond the front of all tuning methods (with sequential SFT)",
        Joint("all", tuple(_not_beaten(MERGED[0], method) for method in METHODS)),
    ),
    Claim("10b", "The same with DPO", Joint("all", tuple(_not_beaten(MERGED[1], method) for method in METHODS))),
    Claim("11", "Merging beats the ensemble of its members (with sequential SFT)", _beats(ENSEMBLE[0], MERGED[0])),
    Claim("11b", "The same with DPO", _beats(ENSEMBLE[1], MERGED[1])),
    Claim("12", "The loss is not specific to the LLaMA block", _text_rises(ADAPTED), only=("mini-qwen",)),
)  # fmt: skip


def is_merged(run: str) -> bool:
    """Whether a run is a merged model that claims 10 and 11 are about, and F00 shows."""
    return any(fnmatchcase(run, glob) for glob in MERGED)
