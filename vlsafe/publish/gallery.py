"""Write every table and figure that the runs present allow, and name the others."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from matplotlib.figure import Figure

from vlsafe import analysis, plots
from vlsafe.analysis.measures import HEADLINE, MEASURES, Lacking
from vlsafe.core import store
from vlsafe.publish import provenance
from vlsafe.publish.results import FRAMES
from vlsafe.study.study import Study

LEFT_OUT = "T00_left_out"


class Gallery(NamedTuple):
    """The artefacts that were written, and what could not be: what, why, and which of the stages behind it are missing."""

    written: list[str]
    left_out: pd.DataFrame


class Made:
    """The frames of `publish.results` and those of DERIVED by name, each made once.

    Raises:   Lacking where one cannot be made of what is there, or has no line
    """

    def __init__(
        self, frames: Mapping[str, pd.DataFrame], scale: str, without: Mapping[str, str], runs: Sequence[Mapping[str, Any]] = ()
    ) -> None:  # fmt: skip
        self.frames, self.scale, self.without, self.runs, self.found = frames, scale, without, runs, dict[str, Any]()

    def __getitem__(self, name: str) -> Any:
        if name not in self.found:
            try:
                self.found[name] = self._made(name)
            except Lacking as lacking:
                self.found[name] = lacking
        found = self.found[name]
        if isinstance(found, Lacking):
            raise found
        return found

    def or_none(self, name: str) -> Any:
        """A frame, or None where it cannot be made."""
        try:
            return self[name]
        except Lacking:
            return None

    def _made(self, name: str) -> Any:
        if name not in DERIVED and name not in self.frames:
            raise Lacking(f"needs {FRAMES[name]}")
        frame = DERIVED[name](self) if name in DERIVED else self.frames[name]
        if isinstance(frame, pd.DataFrame) and frame.empty:
            raise Lacking(NOTHING)
        return frame


NOTHING = "nothing of what it shows was measured"


def place(studies: Sequence[Study]) -> Path:
    """Where tables go where nobody says so: `figures/<scale>`, or beside it where that is of studies that are not among these."""
    whole = Path("figures") / studies[0].scale.name
    others = provenance.studies_in(whole)
    return whole if others <= {(of.backbone, of.seed) for of in studies} else whole.with_name(f"{whole.name}-partial")


def make(
    frames: Mapping[str, pd.DataFrame], scale: str, folder: Path, runs: Sequence[Mapping[str, Any]],
    without: Mapping[str, str] | None = None, only: Sequence[str] = (),
) -> Gallery:  # fmt: skip
    """Every table and figure that can be made of some frames, or `only` some, with CSV twins and sidecars of their runs.

    `frames` are those of `publish.results`, `runs` the manifests behind them, `without` the stages that are not there and why.
    What cannot be made is named in the table LEFT_OUT, and a file of it that an earlier gallery left in the folder is removed.

    Raises:   ValueError where there is no raw table at all
    """
    if "raw" not in frames and not only:
        raise ValueError("no examination is made yet; `make reproduce` makes them")
    raw, without = frames.get("raw", pd.DataFrame(runs).reindex(columns=["seed", "backbone"])), without or {}
    studies = raw[["backbone", "seed"]].drop_duplicates()
    of = Made(frames, scale, without, runs)
    judges = cache(partial(analysis.measures.judged_by, raw)) if "raw" in frames else lambda names: ""
    written, lacking = list[str](), dict[str, Lacking]()
    for name in only or (*TABLES, *FIGURES):
        try:
            if name in FIGURES:
                plots.style.write(*FIGURES[name](of), folder, name, provenance.stamp(name, scale, runs))
            else:
                _write_table(name, TABLES[name](of), folder, scale, studies, judges)
            written.append(name)
            _stamp(name, scale, folder, runs)
        except Lacking as error:
            lacking[name] = error
    left_out = _left_out(lacking, without)
    for name in [*lacking, *([] if len(left_out) else [LEFT_OUT])]:
        for suffix in ("csv", "md", "png", "pdf", "provenance.json"):  # of an earlier gallery
            (folder / f"{name}.{suffix}").unlink(missing_ok=True)
    if len(left_out):
        _write_table(LEFT_OUT, (left_out,), folder, scale, studies)
        written.append(LEFT_OUT)
        _stamp(LEFT_OUT, scale, folder, runs)
    store.write_text(folder / "provenance.json", json.dumps(list(runs), indent=1) + "\n")
    return Gallery(written, left_out)


def _stamp(name: str, scale: str, folder: Path, runs: Sequence[Mapping[str, Any]]) -> None:
    """Say beside an artefact which runs it is made of."""
    stamp = json.dumps(provenance.stamp(name, scale, runs), indent=1, sort_keys=True) + "\n"
    store.write_text(folder / f"{name}.provenance.json", stamp)


def _write_table(
    name: str, table: tuple[Any, ...], folder: Path, scale: str, studies: pd.DataFrame,
    judges: Callable[[tuple[str, ...]], str] = lambda names: "",
) -> None:  # fmt: skip
    """`judges` says who judged some measures: of a table the headline ones that it has, or else all that it has."""
    frame, *more = table
    if frame.empty:
        raise Lacking(NOTHING)
    shown, *values = more or [None]
    text = provenance.ARTEFACTS["tables"][name]
    has = {*frame.get("measure", HEADLINE)}
    names = tuple(each for each in HEADLINE if each in has) or tuple(sorted(has))
    said = {"judges": judges(names) if "{judges}" in text.get("caption", "") else "", "own": "", **dict(*values)}
    caption = " ".join(f"{_origin(scale, studies, frame)} {text.get('caption', '').format_map(said)}".split())
    provenance.write_table(frame, folder, name, text["title"], caption, shown)


def _origin(scale: str, studies: pd.DataFrame, frame: pd.DataFrame) -> str:
    """Which studies a table is of: of all those that its own rows name, or of as many seeds as its rows count."""
    if columns := [column for column in studies if column in frame]:
        named = set(frame[columns].itertuples(index=False, name=None))
        studies = studies[[key in named for key in studies[columns].itertuples(index=False, name=None)]]
    of, counted = [], frame.groupby("backbone")["seeds"].max() if {"backbone", "seeds"} <= {*frame} else pd.Series(dtype=float)
    for backbone, each in studies.groupby("backbone")["seed"].unique().items():
        if counted.get(backbone, len(each)) < len(each):
            of.append(f"{backbone}, {counted[backbone]:.0f} of its {len(each)} seeds")
        else:
            of.append(f"{backbone}, seed{'s' * (len(each) > 1)} {', '.join(map(str, sorted(map(int, each))))}")
    return f"Scale {scale}; {'; '.join(of)}{'; 95 % intervals' * any(str(name).endswith('low') for name in frame)}."


def _left_out(lacking: Mapping[str, Lacking], without: Mapping[str, str]) -> pd.DataFrame:
    """One line per artefact that could not be made, then one per stage that is not there."""
    lines = []
    for name, error in lacking.items():
        missing = [stage for stage in without if provenance.made_of(name, stage, str(error))]
        lines.append({"what": name, "reason": str(error), "missing": ", ".join(missing)})
    lines += [{"what": stage, "reason": reason, "missing": ""} for stage, reason in without.items()]
    return pd.DataFrame(lines, columns=["what", "reason", "missing"])


def _sizes(lines: pd.DataFrame) -> dict[str, str]:
    """How many items each measure of a table counts."""
    most = lines.groupby("measure")["n"].max()
    return {"sizes": ", ".join(f"{MEASURES[name]['label']} {int(n)}" for name, n in most.items())}


def _of_adapted(similar: pd.DataFrame) -> pd.DataFrame:
    """F08's numbers: how much further harmful prompts have moved than benign ones, at every step of stage 2."""
    gap = similar[(similar["measure"] == "cosine_centred") & (similar["kind"] == "difference")]
    return gap[gap["stage"] == "instruct"]


def _own(of: Made) -> str:
    """What benchmarks' names stand for where the items are no official ones."""
    official = of.frames.get("published", pd.DataFrame({"official": []}))["official"].all()
    return "" if official else "Names of benchmarks: items of ours in their shape (docs/departures.md)."


def _seen(of: Made) -> str:
    return analysis.merging.answer(of["verdicts"])


def _guarded(of: Made, lines: pd.DataFrame) -> pd.DataFrame:
    """Lines of models, or of merges alone, with what says whether each can answer at all."""
    keys = analysis.capability.RUN if "stage" in lines else [*analysis.measures.UNIT, "recipe"]
    found = of["capable"] if "stage" in lines else of["capable"][of["capable"]["stage"] == "merge"]
    return analysis.capability.beside(lines, found, keys)


DERIVED: dict[str, Callable[[Made], Any]] = {
    "degradation": lambda of: analysis.degradation.degradation(of["raw"]),
    "dynamics": lambda of: analysis.degradation.dynamics(of["raw"]),
    "categories": lambda of: analysis.degradation.by_category(of["raw"]),
    "arms": lambda of: analysis.adaptation.arms(of["raw"]),
    "doses": lambda of: analysis.adaptation.doses(of["raw"]),
    "far": lambda of: pd.concat([of.frames[name] for name in ("drift", "moved") if name in of.frames] or [of["drift"]]),
    "confounds": lambda of: analysis.adaptation.confounds(of["raw"]),
    "scores": lambda of: analysis.filtering.score_counts(of["audit"]),
    "tuned": lambda of: analysis.tuning.methods(of["raw"], of["validation"]),
    "plane": lambda of: analysis.tuning.plane(of["tuned"]),
    "refused": lambda of: analysis.tuning.refusals(of["raw"]),
    "similar": lambda of: analysis.probing.similarity(of["layers"]),
    "similar last": lambda of: analysis.probing.last(of["similar"]),
    "similar gap": lambda of: _of_adapted(of["similar"]),
    "drifted": lambda of: analysis.probing.drift(of["drift"]),
    "transplants": lambda of: analysis.causal.transplants(of["patched"], of["located"]),
    "task vectors": lambda of: analysis.probing.task_vectors(of["vectors"]),
    "slopes": lambda of: analysis.probing.gradients(of["gradients"]),
    "sppft": lambda of: analysis.causal.frozen(of["frozen"], of["patched"], of["located"]),
    "merges": lambda of: analysis.merging.methods(of["raw"], of["merged"]),
    "verdicts": lambda of: analysis.merging.verdicts(of["merges"]),
    "swept": lambda of: analysis.merging.sweep(analysis.merging.at_most_items(of["raw"], of["panel"]), of["merged"]),
    "fronts": lambda of: analysis.merging.plane(of["raw"]),
    "ratios": lambda of: analysis.merging.ratios(of["raw"]),
    "half-lives": lambda of: analysis.durability.half_lives(of["raw"]),
    "durable": lambda of: analysis.durability.curves(of["raw"]),
    "worst cases": lambda of: analysis.durability.worst_cases(of["raw"], of["searched"]),
    "models": lambda of: analysis.degradation.everything(of["raw"]),
    "capable": lambda of: analysis.capability.guard(of["raw"], *map(of.frames.get, ("texts", "perplexity"))),
    "lineage": lambda of: plots.claims.lineage_points(of["models"]),
    "prepared": lambda of: analysis.claims.prepared({**of.frames, "without": of.without}),
    "ledger": lambda of: analysis.crossing.flagged(
        analysis.crossing.crossed(analysis.claims.ledger(of["prepared"]), of.or_none("verdicts")), of.or_none("capable")
    ),
    "verdicts of judges": lambda of: analysis.agreement.verdicts(of["raw"]),
    "judged": lambda of: analysis.agreement.rates(of["verdicts of judges"]),
    "judge pairs": lambda of: analysis.agreement.pairs(of["verdicts of judges"]),
}
"""Name of a frame (`prepared`: of what the claims read) -> what makes it of the others."""

TABLES: dict[str, Callable[[Made], tuple[Any, ...]]] = {
    "T00_hours": lambda of: (provenance.hours(of.runs),),
    "T00_gates": lambda of: (analysis.capability.gates(of["raw"]),),
    "T01_filtering_audit": lambda of: (analysis.filtering.filtering_audit(of["audit"]),),
    "T01_guard_quality": lambda of: (analysis.filtering.guard_quality(of["audit"]),),
    "T02_degradation": lambda of: (
        analysis.capability.of_main_line(of["degradation"], of["capable"]),
        analysis.capability.of_main_line(analysis.degradation.sheet(of["degradation"]), of["capable"], ["backbone"]).rename(
            columns={"parent_capable": "parent capable", "instruct_capable": "adapted capable"}
        ),
        {"own": _own(of)},
    ),
    "T03_arms": lambda of: (of["arms"], analysis.adaptation.sheet(of["arms"]), _sizes(of["arms"])),
    "T03_arms_over_seeds": lambda of: (
        analysis.adaptation.over_seeds(of["arms"]),
        None,
        {"same": analysis.adaptation.one_training(of["arms"])},
    ),
    "T03_matched": lambda of: (analysis.adaptation.matched(of["raw"], of["far"], of["losses"]),),
    "T03_seeing": lambda of: (analysis.adaptation.seeing(of["seeing"]),),
    "T04_confounds": lambda of: (
        of["confounds"],
        analysis.measures.compact(of["confounds"], [*analysis.measures.UNIT, "stage", "recipe", "condition"]),
        _sizes(of["confounds"]),
    ),
    "T05_safety_tuning": lambda of: (_guarded(of, of["tuned"]), _guarded(of, analysis.tuning.sheet(of["tuned"]))),
    "T05_transfer": lambda of: (analysis.tuning.transfer(of["tuned"]),),
    "T05_checkpoints": lambda of: (of["validation"],),
    "T05_conflict_free": lambda of: (analysis.causal.remedy(of["remedy"]),),
    "T06_sppft": lambda of: (of["sppft"],),
    "T06_sppft_over_seeds": lambda of: (analysis.causal.frozen_over_seeds(of["sppft"]),),
    "F07_probes": lambda of: (analysis.probing.probes(of["layers"]),),
    "F07_cka": lambda of: (analysis.probing.alignments(of["sets"]),),
    "F07_drift": lambda of: (of["drifted"], analysis.probing.drift_sheet(of["drifted"])),
    "T07_merging": lambda of: (
        _guarded(of, of["merges"]),
        analysis.merging.sheet(_guarded(of, of["merges"]), of["verdicts"]),
        {"answer": _seen(of)},
    ),
    "T07_dominance": lambda of: (of["verdicts"], analysis.merging.dominance(of["verdicts"])),
    "T07_hypervolume": lambda of: (analysis.merging.hypervolumes(of["raw"]),),
    "T07_ensembles": lambda of: (analysis.merging.against_ensemble(of["panel"]),),
    "T07_ratios": lambda of: (of["ratios"],),
    "T07_regret": lambda of: (analysis.merging.regret(of["raw"], of["merged"]),),
    "T07_barriers": lambda of: (analysis.merging.barriers(of["merged"]),),
    "T07_choice": lambda of: (of["merged"],),
    "T08_capable": lambda of: (of["capable"],),
    "T08_models": lambda of: (
        _guarded(of, of["models"]),
        analysis.capability.beside(analysis.degradation.overview(of["models"]), of["capable"], ["backbone", "stage", "recipe"]),
        {"own": _own(of)},
    ),
    "T08_precision": lambda of: (analysis.claims.precision(of["prepared"]),),
    "T08_published": lambda of: (provenance.compare_published(of["published"], of["models"]),),
    "F09_scaling": lambda of: (of["scaling"],),
    "T09_claims": lambda of: (of["ledger"], analysis.claims.sheet(of["ledger"])),
    "T09_by_seed": lambda of: (analysis.claims.by_seed(of["prepared"]),),
    "T09_beside": lambda of: (analysis.crossing.beside(of["ledger"], of["miniature"]),),
    "T09_parts": lambda of: (analysis.claims.every_part(of["prepared"]),),
    "T10_half_lives": lambda of: (
        of["half-lives"],
        analysis.durability.sheet(of["half-lives"]),
        {"answer": analysis.durability.answer(of["half-lives"])},
    ),
    "T10_worst_case": lambda of: (of["worst cases"], analysis.durability.worst_sheet(of["worst cases"])),
    "T10_search": lambda of: (of["searched"], analysis.durability.search_sheet(of["searched"])),
    "F10_against_random": lambda of: (analysis.causal.against_random(of["patched"], of["located"]),),
    "F10_directions": lambda of: (analysis.causal.directed(of["directed"]),),
    "F11_task_vectors": lambda of: (of["task vectors"],),
    "F11_prediction": lambda of: (analysis.probing.prediction(of["drift"], of["alike"], of["raw"]),),
    "F15_people": lambda of: (of["people"],),
    "F15_agreement": lambda of: (of["judge pairs"],),
}
"""Name of a table -> the frame, and where it needs them the form for the eye and what fills its caption's braces."""

FIGURES: dict[str, Callable[[Made], tuple[Figure, pd.DataFrame]]] = {
    "F00_answer": lambda of: (plots.claims.lineage(of["lineage"], of.scale), of["lineage"]),
    "F01_guard_scores": lambda of: (plots.filtering.guard_scores(of["audit"], of.scale), of["scores"]),
    "F02_dynamics": lambda of: (plots.degradation.dynamics(of["dynamics"], of.scale), of["dynamics"]),
    "F03_categories": lambda of: (plots.degradation.by_category(of["categories"], of.scale), of["categories"]),
    "F04_doses": lambda of: (plots.adaptation.doses(of["doses"], of.scale), of["doses"]),
    "F05_tradeoff": lambda of: (plots.tuning.tradeoff(of["plane"], of.scale), of["plane"]),
    "F06_exaggerated_refusal": lambda of: (plots.tuning.refusals(of["refused"], of.scale), of["refused"]),
    "F07_layer_similarity": lambda of: (plots.probing.similarity(of["similar"], of.scale), of["similar last"]),
    "F08_layers_over_steps": lambda of: (plots.probing.similarity_over_steps(of["similar"], of.scale), of["similar gap"]),
    "F09_localisation": lambda of: (
        plots.probing.localisation(of["curves"], of["scaling"], of["located"], of.scale), of["curves"]
    ),
    "F10_transplants": lambda of: (plots.probing.transplants(of["transplants"], of.scale), of["transplants"]),
    "F11_objectives": lambda of: (plots.probing.objectives(of["task vectors"], of["slopes"], of.scale), of["slopes"]),
    "F12_ratio_sweep": lambda of: (plots.merging.sweep(of["swept"], of.scale, of.or_none("ratios")), of["swept"]),
    "F13_merge_fronts": lambda of: (plots.merging.fronts(of["fronts"], _seen(of), of.scale), of["fronts"]),
    "F16_durability": lambda of: (plots.merging.durability(of["durable"], of["half-lives"], of.scale), of["durable"]),
    "F14_claims": lambda of: (plots.claims.forest(of["ledger"], of.scale), of["ledger"]),
    "F15_judges": lambda of: (plots.claims.judges(of["judged"], of["judge pairs"], of.scale), of["judged"]),
}  # fmt: skip
"""Name of a figure -> the picture and what it draws."""
