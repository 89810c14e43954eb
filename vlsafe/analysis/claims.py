"""The claims ledger: what the paper says, what was measured, how sure we are.

A claim is a tree of comparisons of the registry (`env/claims.yaml`): "all" of them must hold, or "any". Each claim has two
verdicts. *Item-level*: the items are the sample and the models are fixed; verb–object pairs are resampled, seeds are strata.
*Seed-level*: the training runs are the sample (`stats.over_seeds`). Both are decided after Holm's correction, and neither where
seeds disagree beyond their own intervals. What was not measured has no verdict.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import starmap
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import yaml

from vlsafe.analysis import clustered, comparisons, stats
from vlsafe.analysis.clustered import Stratum
from vlsafe.analysis.comparisons import ADAPTED, Changes, Frames, Part, Unit, changes
from vlsafe.analysis.measures import Lacking, points, signed
from vlsafe.core.schema import MAIN_LINE

LEVEL, SEEDS = 0.05, 3  # of a verdict; fewest seeds for a seed-level verdict
SUPPORTED, CONTRADICTED, UNDECIDED, CEILING, DIFFERS, NOT = (
    "supported", "contradicted", "undecided", "undecided (ceiling)", "differs by seed", "not measured"
)  # fmt: skip
REGISTERED, EXPLORATORY = "registered", "exploratory"


class Joint(NamedTuple):
    """Comparisons of which all or any must hold."""

    how: str
    parts: tuple[Part | Joint, ...]


class Claim(NamedTuple):
    """A statement of the paper or about it, and what decides it; `only`: of these backbones; `rule`: the digest of its entry.

    `interest` is the smallest effect that would matter. `family` and `status` are what Holm's correction runs over.
    """

    name: str
    text: str
    decided_by: Part | Joint
    only: tuple[str, ...]
    status: str
    family: str
    interest: float
    rule: str


def prepared(frames: Frames) -> dict[str, Any]:
    """The frames as `ledger` and `precision` take them."""
    used = {measure for claim in CLAIMS for part in leaves(claim.decided_by) for measure in part.measures}
    return comparisons.prepared(frames, used | set(PRECISION))


def leaves(tree: Part | Joint) -> list[Part]:
    """The comparisons of a tree, in order."""
    return [tree] if isinstance(tree, Part) else [leaf for part in tree.parts for leaf in leaves(part)]


def compared(part: Part, studies: Mapping[Unit, Changes], shared: bool = False) -> dict[str, Any]:
    """A comparison over studies of one backbone: seeds as strata, then each seed by itself and seeds as the sample. Clusters of
    one name are one only where all seeds were asked the same items (`shared`)."""
    own = not shared or part.method in comparisons.OF_THE_STUDY
    pooled = [
        Stratum(s.weight / len(studies), s.least, s.most, [f"{seed} {c}" for c in s.clusters] if own else s.clusters)
        for (_, seed), one in studies.items() for s in one.strata
    ]  # fmt: skip
    whole = clustered.compare(pooled, np.random.default_rng(0), part.against)
    single = [clustered.compare(one.strata, np.random.default_rng(unit[1]), part.against) for unit, one in studies.items()]
    before, after = (float(np.mean([one[side] for one in studies.values()])) for side in (1, 2))
    least, most = comparisons.bounds(part)
    room = most - before - part.against if part.sign > 0 else before + part.against - least
    line = {name: getattr(whole, name).item() for name in ("effect", "low", "high", "p", "detectable")}
    line |= {"part": part.what, "sign": part.sign, "before": before, "after": after, "against": part.against}
    strict = part.sign * part.against >= 0  # where the threshold leaves leeway, nothing has to change
    clear = line["p"] < LEVEL and abs(line["effect"] - part.against) >= line["detectable"]  # more than what a bound brings about
    ceiling = bool(strict and not clear and room < line["detectable"])
    n = whole.n if own else max(sum(len(s.least) for s in one.strata) for one in studies.values())  # shared items count once
    line |= {"n": n, "seeds": len(studies), "ceiling": ceiling, "differs": False, "seed_p": 1.0}
    reach = max(sum(abs(s.weight) * max(1.0, np.abs(s.least).max()) for s in one.strata) for one in studies.values())
    effects, se, p = (np.array([getattr(one, name).item() for one in single]) for name in ("effect", "se", "p"))
    se = np.where(se > 0, se, [reach / one.n for one in single])  # where every item changed alike, a bootstrap sees no spread
    line |= {"effects": effects.round(4).tolist(), "sd_items": float(np.sqrt(np.mean(se**2)))}
    return line | (stats.over_seeds(effects, se, p, part.against, reach) if len(effects) > 1 else {})


class Weight(NamedTuple):
    """P-values for and against, and the comparisons that they hang on."""

    support: float
    contradict: float
    supporting: str
    contradicting: str


def weigh(tree: Part | Joint, lines: Mapping[str, Mapping[str, Any]], p: str) -> Weight:
    """P-values of a tree from those of its parts: of "all" the greatest, of "any" the least times their number.

    Where seeds disagree, a part counts for neither side.

    Source:   intersection-union test (Berger 1982) and Bonferroni's bound
    """
    if isinstance(tree, Part):
        line = lines[tree.what]
        holds, value = tree.sign * (line["effect"] - tree.against) > 0, 1.0 if line.get("differs") else line[p]
        support, contradict = (value, 1.0) if holds else (1.0, value)
        return Weight(support, contradict, tree.what, tree.what)
    parts = [weigh(part, lines, p) for part in tree.parts]
    pro = _joined([(part.support, part.supporting) for part in parts], tree.how == "all")
    con = _joined([(part.contradict, part.contradicting) for part in parts], tree.how == "any")  # "any" fails if every part does
    return Weight(pro[0], con[0], pro[1], con[1])


def _joined(parts: list[tuple[float, str]], every: bool) -> tuple[float, str]:
    p, deciding = (max if every else min)(parts, key=lambda part: part[0])
    return p if every else min(1.0, len(parts) * p), deciding


def hindered(tree: Part | Joint, lines: Mapping[str, Mapping[str, Any]], by: str) -> bool:
    """Whether a tree cannot hold because of a ceiling or of seeds that differ (`by`): "any" only if that is so of every part."""
    if isinstance(tree, Part):
        return bool(lines[tree.what][by])
    return (any if tree.how == "all" else all)(hindered(part, lines, by) for part in tree.parts)


def matters(tree: Part | Joint, lines: Mapping[str, Mapping[str, Any]], interest: float) -> str:
    """Whether the effect is one that matters: "yes" where the whole interval lies beyond `interest`, "no" where none of it does,
    else "open"; of "all" every part has to, of "any" one. A threshold with leeway asks for no effect: "".
    """
    if isinstance(tree, Part):
        line = lines[tree.what]
        least, most = sorted(tree.sign * (line[end] - tree.against) for end in ("low", "high"))
        return "" if tree.sign * tree.against < 0 else "yes" if least >= interest else "no" if most < interest else "open"
    parts = {matters(part, lines, interest) for part in tree.parts} - {""}
    enough, every = ("no", "yes") if tree.how == "all" else ("yes", "no")
    return enough if enough in parts else every if parts == {every} else "open" if parts else ""


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
            if of or claim.only:
                lines[claim.name, backbone] = {
                    part.what: _once(part, {u: whole[u][i] for u in whole}, frames) for i, part in enumerate(parts) if whole
                }
    return lines


def _once(part: Part, studies: Mapping[Unit, Changes], frames: Frames) -> dict[str, Any]:
    """A comparison and its judges; claims share some, and several tables show them."""
    key, memory = (part._replace(what=""), *studies), frames["compared"]
    if key not in memory:
        memory[key] = compared(part, studies, frames["shared"]) | {"judge": comparisons.judge(part, frames)}
    return memory[key] | {"part": part.what}


def judged(lines: Lines) -> pd.DataFrame:
    """Verdicts from the comparisons of all claims; Holm's family is that of the registry, of one backbone and status."""
    claims, rows = {claim.name: claim for claim in CLAIMS}, []
    for (name, backbone), of in lines.items():
        claim = claims[name]
        row: dict[str, Any] = {"claim": name, "statement": claim.text, "backbone": backbone, "registry": REGISTRY}
        row |= {column: getattr(claim, column) for column in ("status", "family", "interest", "rule")}
        if of:
            item, seed = (weigh(claim.decided_by, of, p) for p in ("p", "seed_p"))
            row |= of[item.contradicting if item.contradict < item.support else item.supporting]
            row |= {"p": min(item[:2]), "seed_p": min(seed[:2]), "matters": matters(claim.decided_by, of, claim.interest)}
            decided = seed if min(seed[:2]) < 1 else item  # one seed, and seeds that differ, decide nothing
            of_seeds = of[decided.contradicting if decided.contradict < decided.support else decided.supporting]
            row |= {name: of_seeds.get(name) for name in OVER_SEEDS}
            row |= {f"seed_{name}": of_seeds[name] for name in ("part", "sign", "against")}
            row |= {by: hindered(claim.decided_by, of, by) for by in ("ceiling", "differs")}
            for level, weight in (("item", item), ("seed", seed)):  # of "all", one part that fails is enough
                fails = weight.contradict < weight.support and not of[weight.contradicting]["ceiling"]
                row |= {f"{level}_holds": weight.support < weight.contradict, f"{level}_fails": fails}
        rows.append(row)
    head = ["claim", "statement", "status", "family", "backbone", *COLUMNS]
    frame = pd.DataFrame(rows).reindex(columns=[*head, *VERDICT])
    for p in ("p", "seed_p"):
        frame[f"{p}_holm"] = stats.holm(frame[p], [frame[key] for key in ("backbone", "family", "status")])
    few = (frame["seeds"].fillna(0) < SEEDS) & frame["seed_p"].notna()
    for level, p in (("item", frame["p_holm"]), ("seed", frame["seed_p_holm"].mask(few, 1.0))):
        names = (f"{level}_holds", f"{level}_fails", "ceiling", "differs")
        holds, fails, ceiling, differs = (frame[name].eq(True) for name in names)
        cases = {NOT: p.isna(), SUPPORTED: (p < LEVEL) & holds, DIFFERS: (p >= LEVEL) & differs}
        cases[CEILING] = ceiling & ~((p < LEVEL) & fails)
        frame[f"{level}_level"] = np.select(list(cases.values()), list(cases), np.where(p < LEVEL, CONTRADICTED, UNDECIDED))
    return frame.assign(matters=frame["matters"].astype(object).where(frame["item_level"] != CONTRADICTED, "").fillna(""))[head]


VERDICT = ("item_holds", "seed_holds", "item_fails", "seed_fails", "ceiling", "differs")
COLUMNS = [
    "item_level", "seed_level", "part", "sign", "before", "after", "against", "effect", "low", "high", "p", "p_holm", "n",
    "seeds", "detectable", "interest", "matters", "seed_part", "seed_sign", "seed_against", "effects", "seed_low",
    "seed_high", "seed_p", "seed_p_holm", "seed_detectable", "sd_items", "sd_seeds", "heterogeneity", "judge", "rule", "registry",
]  # fmt: skip
OVER_SEEDS = ("effects", "seed_low", "seed_high", "seed_detectable", "sd_items", "sd_seeds", "heterogeneity")


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
                line = compared(part, found, frames["shared"])
                lines.append({"backbone": backbone, "measure": measure} | {name: line.get(name) for name in columns})
    found = pd.DataFrame(lines, columns=["backbone", "measure", *columns])
    return found.assign(seed_detectable=found["seed_detectable"].where(found["seed_detectable"] <= 1))


def sheet(ledger: pd.DataFrame) -> pd.DataFrame:
    """T09 for the eye, in points."""

    def text(form: Callable[..., str], *columns: str) -> list[str]:
        return ["" if any(map(pd.isna, row)) else form(*row) for row in ledger[list(columns)].to_numpy()]

    decided = ledger["part"].astype(object).where(ledger["part"].notna(), ledger["reason"])
    head = ["claim", "statement", "status", "backbone", "item_level", "seed_level", "matters"]
    shown = ledger[head].copy()
    shown = shown.rename(columns=lambda name: name.replace("_", " ")).assign(**{"decided by": decided})
    shown["threshold"] = [signed(value) if value else "" for value in ledger["against"].fillna(0)]
    shown["effect"] = text(points, "effect", "low", "high")
    shown["over seeds"] = text(lambda low, high: f"[{signed(low)}, {signed(high)}]", "seed_low", "seed_high")
    others = ledger["seed_part"].notna() & (ledger["seed_part"] != ledger["part"])
    means = [f" ({signed(np.mean(of))})" if other else "" for of, other in zip(ledger["effects"], others, strict=True)]
    shown["over seeds, decided by"] = ledger["seed_part"].astype(object).where(others, "") + means
    for name, column in {"p (Holm)": "p_holm", "seed p (Holm)": "seed_p_holm", "heterogeneity": "heterogeneity"}.items():
        shown[name] = ["" if pd.isna(p) else f"{p:.3f}" for p in ledger[column]]
    shown[["n", "seeds"]] = ledger[["n", "seeds"]].astype("Int64")
    shown["detectable"], shown["over seeds, detectable"] = (
        text(lambda share: f"{100 * share:.0f}", name) for name in ("detectable", "seed_detectable")
    )
    return shown.assign(**{"not capable": ledger["flagged"]}) if "flagged" in ledger else shown


def written(folder: Path) -> pd.DataFrame:
    """The ledger in a folder of artefacts, with the `other` part of a claim of two; without a line where the folder has none."""
    path = folder / "T09_claims.csv"
    lines = pd.read_csv(path, dtype={"claim": str}) if path.exists() else judged({})
    lines = lines.reindex(columns=[*judged({}).columns, "reason", "flagged"])
    keys, parts = ["claim", "backbone"], folder / "T09_parts.csv"
    other = _other_parts(pd.read_csv(parts, dtype={"claim": str}), lines) if parts.exists() else lines[:0]
    lines = lines.join(other.set_index(keys)[["part", "effect", "low", "high"]].add_prefix("other_"), on=keys)
    effects = [json.loads(text) if isinstance(text, str) else [] for text in lines["effects"]]
    return lines.assign(flagged=lines["flagged"].fillna(""), effects=effects)


def _other_parts(parts: pd.DataFrame, lines: pd.DataFrame) -> pd.DataFrame:
    """Of each claim of two parts the one that does not decide, of T09's parts and lines."""
    keys = ["claim", "backbone"]
    two = parts[parts.groupby(keys)["part"].transform("size") == 2]
    return two.merge(lines[[*keys, "part"]], on=keys, suffixes=("", "_decides")).query("part != part_decides")


def entries(registry: Mapping[str, Any]) -> dict[str, Any]:
    """The claims of a registry with shared trees written out: what is compared, and digested, of an entry."""
    return {name: _written_out(claim, {}, registry["trees"]) for name, claim in registry["claims"].items()}


def _written_out(node: Any, values: Mapping[str, str], trees: Mapping[str, Any]) -> Any:
    """A node of the data file; what `use` stands beside fills the braces of the shared tree that it names."""
    if isinstance(node, list):
        return [_written_out(part, values, trees) for part in node]
    if not isinstance(node, dict):
        return node.format_map(values) if isinstance(node, str) else node
    if "use" in node:
        tree = _written_out(trees[node["use"]], {**values, **node}, trees)
        return {name: value for name, value in node.items() if name in HEAD} | tree
    return {name: _written_out(value, values, trees) for name, value in node.items()}


def _tree(node: Mapping[str, Any]) -> Part | Joint:
    for how in ("all", "any"):
        if how in node:
            return Joint(how, tuple(map(_tree, node[how])))
    fields = {name: node[name] for name in Part._fields if name in node}
    runs = {side: MAIN_LINE.get(node[side], node[side]) for side in ("before", "after")}
    return Part(**fields | runs | {"measures": tuple(node.get("measures", ("text_asr",)))})


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:12]


def _claim(name: str, entry: Mapping[str, Any]) -> Claim:
    head = {"status": entry["status"], "family": entry["family"], "interest": entry["interest"]}
    return Claim(name, entry["text"], _tree(entry), tuple(entry.get("only", ())), **head, rule=rule(entry))


def rule(entry: Mapping[str, Any]) -> str:
    """The digest of a claim's entry: of all that decides it, so neither of its status nor of its wording."""
    return _digest({name: value for name, value in entry.items() if name not in ("status", "text")})


HEAD = ("text", "status", "family", "interest", "only")
_DATA = yaml.safe_load(Path(__file__).with_name("claims.yaml").read_text(encoding="utf-8"))
REGISTRY = _digest(_DATA)
CLAIMS = tuple(sorted(starmap(_claim, entries(_DATA).items()), key=lambda claim: claim.status != REGISTERED))
PRECISION = {measure: MAIN_LINE[run] for run, measures in _DATA["precision"].items() for measure in measures}
TUNED, MERGED, ENSEMBLE = tuple(_DATA["tuned"]), _DATA["merged"], _DATA["ensemble"]


def is_merged(run: str) -> bool:
    """Whether a run is a merged model that claims 10 and 11 are about, and F00 shows."""
    return any(fnmatchcase(run, glob) for glob in MERGED)
