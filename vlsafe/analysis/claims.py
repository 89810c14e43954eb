"""The claims ledger: what the paper says, what was measured, how sure we are.

A claim is a tree of comparisons, fixed before the results (`claims.yaml`): "all" of them must hold, or "any". Each claim has
two verdicts. *Item-level*: the items are the sample and the models are fixed; verb–object pairs are resampled, seeds are strata.
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
import yaml
from scipy.stats import t as student

from vlsafe.analysis import comparisons, stats
from vlsafe.analysis.comparisons import ADAPTED, METHODS, Changes, Frames, Part, Unit, changes
from vlsafe.analysis.measures import Lacking
from vlsafe.core.scale import known
from vlsafe.core.schema import MAIN_LINE

LEVEL, SEEDS = 0.05, 3  # of a verdict; fewest seeds for a seed-level verdict
SUPPORTED, CONTRADICTED, UNDECIDED, CEILING, NOT = (
    "supported", "contradicted", "undecided", "undecided (ceiling)", "not measured"
)  # fmt: skip
PARENT = MAIN_LINE["parent"]
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
    """T09: one line per claim × backbone with both verdicts, the comparison that decides and its judges, or why nothing was
    measured; `seeds` restricts the studies.

    `frames` are as `prepared` lays them out.

    Units:    fractions; p-values are two-sided
    """
    frame = judged(results(frames, seeds))
    units = {name: [u for u in of if seeds is None or u[1] in seeds] for name, of in units_of(frames).items()}
    pairs = zip(frame["claim"], frame["backbone"], frame["item_level"] == NOT, strict=True)
    return frame.assign(reason=[unmeasured(claim, frames, units.get(b, [])) if empty else "" for claim, b, empty in pairs])


def unmeasured(name: str, frames: Frames, units: Sequence[Unit]) -> str:
    """Why none of some studies has measured a claim: the first thing that its comparisons lack."""
    parts = next(leaves(claim.decided_by) for claim in CLAIMS if claim.name == name)
    lacking = (comparisons.lacking(part, frames, unit) for unit in units for part in parts if not changes(part, frames, unit))
    return next(lacking, "no study of this backbone")


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
                judges = [comparisons.judge(part, frames) for part in parts]
                lines[claim.name, backbone] = {
                    line["part"]: line | {"judge": judge} for line, judge in zip(each, judges, strict=False)
                }
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
        clear = np.where(frame[f"{level}_holds"].eq(True), SUPPORTED, CONTRADICTED)
        unclear = np.where(frame["ceiling"].eq(True), CEILING, UNDECIDED)
        frame[f"{level}_level"] = np.select([p.isna(), p < LEVEL], [NOT, clear], unclear)
    return frame[head]


COLUMNS = [
    "item_level", "seed_level", "part", "sign", "before", "after", "against", "effect", "low", "high", "p", "p_holm", "n",
    "seeds", "detectable", "effects", "seed_low", "seed_high", "seed_p", "seed_p_holm", "seed_detectable", "sd_items", "sd_seeds",
    "judge",
]  # fmt: skip


def every_part(frames: Frames) -> pd.DataFrame:
    """One line per claim × backbone × comparison, before they are weighed against each other."""
    lines = results(frames)
    return pd.DataFrame([{"claim": name, "backbone": b, **line} for (name, b), of in lines.items() for line in of.values()])


def by_seed(frames: Frames) -> pd.DataFrame:
    """The ledger of every seed by itself, whose verdicts are item-level alone.

    Raises:   Lacking where no seed has measured anything
    """
    seeds = sorted({key[1] for key in frames["answers"]})
    if not seeds:
        raise Lacking("nothing that a claim is about was measured")
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

    decided = ledger["part"].astype(object).where(ledger["part"].notna(), ledger["reason"])
    shown = ledger[["claim", "statement", "backbone", "item_level", "seed_level"]].copy()
    shown = shown.rename(columns=lambda name: name.replace("_", " ")).assign(**{"decided by": decided})
    shown["effect"] = text("{:+.0f} [{:+.0f}, {:+.0f}]", "effect", "low", "high")
    shown["over seeds"] = text("[{:+.0f}, {:+.0f}]", "seed_low", "seed_high")
    shown["p (Holm)"] = ["" if pd.isna(p) else f"{p:.3f}" for p in ledger["p_holm"]]
    shown[["n", "seeds"]] = ledger[["n", "seeds"]].astype("Int64")
    shown["detectable"] = text("{:.0f}", "detectable")
    return shown


def beside(ledger: pd.DataFrame, other: pd.DataFrame) -> pd.DataFrame:
    """Two ledgers side by side, one line per claim: the item-level verdict of every backbone, the effect in points, and whether
    all backbones that measured the claim agree ("alike") or not ("differs"); the ledger's own backbones come first."""
    both = pd.concat([ledger, other], ignore_index=True)
    effect = both["effect"].map(lambda value: "" if pd.isna(value) else f" ({100 * value:+.0f})")
    wide = both.assign(cell=both["item_level"] + effect).pivot(index=["claim", "statement"], columns="backbone", values="cell")
    wide = wide.reindex(list(dict.fromkeys(zip(both["claim"], both["statement"], strict=True))))[
        list(dict.fromkeys(both["backbone"]))
    ]
    measured = both[both["item_level"] != NOT]
    verdicts = measured.groupby("claim")["item_level"].agg(lambda of: "alike" if of.nunique() == 1 else "differs")
    sides = measured.groupby("claim")["backbone"].agg(
        lambda of: {name in set(ledger["backbone"]) for name in of} == {True, False}
    )
    alike = [verdicts[claim] if sides.get(claim, False) else NOT for claim, _ in wide.index]
    return wide.assign(**{"both scales": alike}).reset_index()


def committed(folder: Path, names: Sequence[str]) -> pd.DataFrame:
    """Some claims of the ledger in a folder of artefacts, for the eye; no line where the folder has no ledger.

    Raises:   ValueError for a name that is no claim's
    """
    for name in names:
        known(name, [claim.name for claim in CLAIMS], "claim")
    path = folder / "T09_claims.csv"
    lines = pd.read_csv(path, dtype={"claim": str}) if path.exists() else judged({})
    lines = lines.reindex(columns=[*judged({}).columns, "reason"])  # older galleries wrote neither judges nor reasons
    return sheet(lines[lines["claim"].isin(names)]).set_index(["claim", "backbone"])


def _tree(node: Mapping[str, Any], values: Mapping[str, str]) -> Part | Joint:
    """A tree of the data file; what `use` stands beside fills the braces of the shared tree that it names."""
    if "use" in node:
        return _tree(_DATA["trees"][node["use"]], {**values, **node})
    for how in ("all", "any"):
        if how in node:
            return Joint(how, tuple(_tree(part, values) for part in node[how]))
    part = {name: node[name] for name in ("sign", "against") if name in node}
    part |= {"method": METHODS[node["method"]]} if "method" in node else {}
    before, after = (node[side].format_map(values) for side in ("before", "after"))
    runs = {"before": MAIN_LINE.get(before, before), "after": MAIN_LINE.get(after, after)}
    return Part(node["what"].format_map(values), **runs, **part, measures=tuple(node.get("measures", ("text_asr",))))


_DATA = yaml.safe_load(Path(__file__).with_name("claims.yaml").read_text(encoding="utf-8"))
CLAIMS = tuple(
    Claim(name, claim["text"], _tree(claim, {}), tuple(claim.get("only", ()))) for name, claim in _DATA["claims"].items()
)
PRECISION = {measure: MAIN_LINE[run] for run, measures in _DATA["precision"].items() for measure in measures}
TUNED, MERGED, ENSEMBLE = tuple(_DATA["tuned"]), _DATA["merged"], _DATA["ensemble"]


def is_merged(run: str) -> bool:
    """Whether a run is a merged model that claims 10 and 11 are about, and F00 shows."""
    return any(fnmatchcase(run, glob) for glob in MERGED)
