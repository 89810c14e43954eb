"""Notebook 06: merges of the adapted model with a safe partner, a sweep over rules and ratios in memory.

Every merge answers the panel and the validation pairs; no weights are written, and a sample of them stays in memory until the
sweep ends, so that equal ones are examined once. Per rule one merge is chosen by the validation pairs alone and examined in
full, on the benchmarks that the headline measures need (grid "full": on all). Two controls are treated alike: an ensemble of
both members, and (grid "full") the checkpoints of the partner's training, which is run again.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from vlsafe import analysis, evaluation, models, training
from vlsafe.core import store
from vlsafe.core.schema import MAIN_LINE, Item, Response, to_row
from vlsafe.study import tuning
from vlsafe.study.degradation import response_params
from vlsafe.study.study import KEPT, Bar, Study, drop


class Rule(NamedTuple):
    """A way to make one model of two: a merge rule, on which blocks, in which grid; `rule` is empty for the controls."""

    rule: str
    blocks: str = "all"
    grid: str = "default"


PARENT, STAGE_1, ADAPTED = (MAIN_LINE[name] for name in ("parent", "stage 1", "adapted"))
LINEAGES = {"sl-full": "child", "dpo-both-full": "child", "sibling-full": "sibling", "aligned": "parent"}
RULES: dict[str, Rule] = {
    "linear": Rule("linear"),
    "inside": Rule("linear"),  # interior merges, 0 < α < 1: the same points without the two ends
    **{name: Rule(name) for name in ("slerp", "task_arithmetic", "ties", "dare_linear", "dare_ties", "model_stock")},
    "band": Rule("linear", "band"),
    "outside": Rule("linear", "outside"),
    **{name: Rule(name, grid="full") for name in ("dare_linear_l1", "dare_ties_l1", "expo", "fisher", "tsv_m", "iso_c")},
    "random": Rule("linear", "random", grid="full"),
    "ensemble": Rule(""),
    "checkpoint": Rule("", grid="full"),
}
COMPARED = ("linear", "ensemble")  # examined in full at every ratio in the grid "full"
SAME = 1e-6  # weights nearer than this are those of one model


class Point(NamedTuple):
    """One model of a sweep: its rule, the partner's weight, and how its name shows that weight.

    `draw`: which of the random bands; `folder`: where it lies if it is a checkpoint and not a merge.
    """

    rule: str
    ratio: float | None
    place: str
    draw: int = 0
    folder: Path | None = None


def run_of(partner: str) -> str:
    """The run whose last checkpoint is the safe partner."""
    return PARENT if LINEAGES[partner] == "parent" else f"safety/{partner}"


def inputs_of(partner: str, grid: str = "default") -> tuple[str, ...]:
    """The runs that a sweep reads: both members, the bases of their task vectors, the items, the safety band; in the grid "full"
    also the helpful rows by which Fisher's merge weighs."""
    more = ("screen/filtered",) if grid == "full" else ()
    return tuple(dict.fromkeys((ADAPTED, run_of(partner), PARENT, STAGE_1, "world/corpora", tuning.PROBED, *more)))


def params(study: Study) -> Any:
    """The numbers that a sweep depends on."""
    return [study.scale.merging, response_params(study), study.scale.tuning.pairs, study.scale.threads]


def names(grid: str) -> list[str]:
    """The sweeps of a grid. Those of "full" hold what the default ones do, and stand in their place."""
    return [f"merge/{partner}{'' if grid == 'default' else '.full'}" for partner in partners(grid)]


def partners(grid: str) -> list[str]:
    """The safe partners that a grid merges with: in the default one the model tuned by SFT, and the parent."""
    return [partner for partner in LINEAGES if grid == "full" or partner in ("sl-full", "aligned")]


def points(study: Study, partner: str, grid: str) -> list[list[Point]]:
    """All models of a sweep, a list for each rule, and for each draw of a random one. Checkpoints are known after their training.

    A parent has no task vector of its own and no tuning, so rules that need them are left out, as is Fisher's merge: what weighs
    the partner there are gradients of safety rows with pictures.
    """
    spec, found = study.scale.merging, []
    for name, rule in RULES.items():
        merge = models.merge.rules.RULES.get(rule.rule)
        needs = name == "checkpoint" or (merge is not None and (merge.based or merge.weighed))
        if (rule.grid == "full" and grid != "full") or (needs and LINEAGES[partner] == "parent"):
            continue
        if name == "checkpoint" or (merge is not None and not merge.rated):
            found.append([Point(name, None, "")])
            continue
        few = spec.votes if name == "ensemble" else spec.few
        ratios = spec.ratios if name in ("linear", "inside") or grid == "full" else few
        ratios = spec.beyond if merge is not None and merge.beyond else ratios
        ratios = tuple(ratio for ratio in ratios if name != "inside" or 0 < ratio < 1)
        for draw in range(spec.random_bands if rule.blocks == "random" else 1):
            known_as = f"{name}{draw}" if rule.blocks == "random" else name
            found.append([Point(known_as, ratio, f"{ratio:.2f}", draw) for ratio in ratios])
    return found


def recipe_of(point: Point, partner: str) -> str:
    """`<rule>/<A>+<B>/<ratio>`; without the last part where there is no ratio."""
    return "/".join(part for part in (point.rule, f"{ADAPTED.partition('/')[2]}+{partner}", point.place) if part)


class Members(NamedTuple):
    """The adapted model, whose weights each merge overwrites, and its processor; the weights of the adapted model (`a`), of the
    partner (`b`) and of what both started from (`base`), which stay on disk; where the partner is; the number of decoder blocks;
    the Fisher information of both, of the adapted model over helpful rows and of the partner over safety rows, where it is used.
    """

    model: Any
    processor: Any
    a: Mapping[str, Any]
    b: Mapping[str, Any]
    base: Mapping[str, Any]
    partner: Path
    layers: int
    fisher: tuple[dict[str, Any], ...] = ()


def members(study: Study, partner: str, grid: str = "default") -> Members:
    """Both members and the base of their task vectors: the stage-1 graft for siblings, else the parent's language model. One
    model is in memory."""

    def weights(name: str) -> Mapping[str, Any]:
        rename = models.architectures.grafted if name == PARENT else str
        return models.merge.inputs.OnDisk(study.checkpoints(name)[-1], rename)

    model = models.checkpoints.ready(study.checkpoints(ADAPTED)[-1], study.scale.exam.dtype)
    base = STAGE_1 if LINEAGES[partner] == "sibling" else PARENT
    processor = models.checkpoints.load_processor(study.checkpoints(ADAPTED)[-1])
    return Members(
        model, processor, weights(ADAPTED), weights(run_of(partner)), weights(base), study.checkpoints(run_of(partner))[-1],
        len(models.architectures.language_layers(model)), weighing(study, partner) if grid == "full" else (),
    )  # fmt: skip


def weighing(study: Study, partner: str) -> tuple[dict[str, Any], ...]:
    """The diagonals of Fisher information that weigh the adapted model and a tuned partner; none for a parent."""
    if LINEAGES[partner] == "parent":
        return ()
    found = []
    for run, rows in ((ADAPTED, "general"), (run_of(partner), "safety")):
        folder = study.checkpoints(run)[-1]
        model, processor = models.checkpoints.ready(folder), models.checkpoints.load_processor(folder)
        corpus, _ = tuning.rows_of(study, rows, processor, 0)
        order = study.stream(f"fisher {rows}").permutation(len(corpus))[: study.scale.merging.weighing]
        found.append(models.merge.fisher.diagonal(model, processor, (corpus[i] for i in order)))
    return tuple(found)


def blocks_of(study: Study, point: Point, kind: str, layers: int) -> set[int | None] | None:
    """Which blocks a rule merges; None: all weights. `outside` also holds what is no block, `random` as many as the band."""
    start, end = study.numbers(tuning.PROBED)["band"]
    band: set[int | None] = set(range(start, end))
    if kind == "random":
        rng = study.stream(f"random blocks {point.draw}")
        return set(rng.choice(layers, len(band), replace=False).tolist())
    return {"all": None, "band": band, "outside": set(range(layers)) - band | {None}}[kind]


def make_sweep(study: Study, work: Path, partner: str, grid: str) -> dict[str, Any]:
    """Examine every merge of a sweep on the panel, choose one per rule on validation pairs, and examine that one in full.

    Writes validation.parquet (a row per model: ASR, refusals, helpfulness, loss, chosen), panel.parquet and raw.parquet (raw rows
    on the panel and of the chosen; as exam "ratios" those of COMPARED at every ratio), responses.parquet.

    Units:    CPU seconds per merge (the overheads returned)
    """
    sweep, items = Sweep(study, partner, members(study, partner, grid), {}, work), items_of(study, grid)
    limit = parents_bound(study) + study.scale.merging.margin
    rules, measured = points(study, partner, grid), analysis.merging.needed(*analysis.merging.HEADLINE)
    headline = [item for item in items["full"] if item.benchmark in measured]
    bar, seconds = Bar(f"merges with {partner}", sum(map(len, rules))), []
    lines, panel, full, answers = list[dict[str, Any]](), [], [], dict[str, dict[str, Response]]()
    shown = dict[str, dict[str, Response]]()
    for of_rule in rules:
        of_rule, rows = _trained_again(study, partner, work) if of_rule[0].rule == "checkpoint" else of_rule, []
        for point in of_rule:
            result, spent = sweep.examine(point, items)
            seconds += [spent] if spent else []
            rows.append(sweep.validation_row(point, items, result) | {"limit": limit})
            panel += sweep.raw_rows(point, items["panel"], result.responses, "panel")
            shown[recipe_of(point, partner)] = {i.id: result.responses[i.id] for i in items["panel"] if i.id in result.responses}
            bar(len(lines) + len(rows))
        chosen = analysis.merging.chosen(pd.DataFrame(rows), None if items["pairs"] else study.scale.merging.fixed).tolist()
        lines += [{**row, "chosen": is_best} for row, is_best in zip(rows, chosen, strict=True)]
        best, row = of_rule[chosen.index(True)], rows[chosen.index(True)]
        source = row["same_as"] or row["recipe"]
        if source not in answers:  # the panel's answers are there already
            rest = [item for item in items["full"] if item.id not in shown[row["recipe"]]]
            answers[source] = shown[row["recipe"]] | sweep.respond(best, rest)
        full += sweep.raw_rows(best, items["full"], answers[source], "full")
        shown[row["recipe"]] = answers[source]
        for point in of_rule if grid == "full" and best.rule in COMPARED else ():
            own = shown[recipe_of(point, partner)]
            own |= sweep.respond(point, [item for item in headline if item.id not in own])
            full += sweep.raw_rows(point, headline, own, "ratios")
    store.write_rows(work / "validation.parquet", lines)
    store.write_rows(work / "panel.parquet", panel)
    store.write_rows(work / "raw.parquet", full)
    kept = shown if study.scale.loaded else answers  # models judge every merge's answers, to the panel as well
    named = ((f"{study.backbone}/merge/{source}", response) for source, by in kept.items() for response in by.values())
    store.write_rows(work / "responses.parquet", [to_row(dataclasses.replace(r, model=name)) for name, r in named])
    drop(work / "training")
    return {"models": len(lines), "limit": limit, "overhead_mean": float(np.mean(seconds)), "overhead_max": max(seconds)}


def items_of(study: Study, grid: str) -> dict[str, list[Item]]:
    """The panel, all test items, the validation pairs, and validation items of the benchmarks that helpfulness is made of.

    Where the grid is not full, the first two are those of the benchmarks that the headline measures need.
    """
    test = [
        item for item in study.items() if grid == "full" or item.benchmark in analysis.merging.needed(*analysis.merging.HEADLINE)
    ]
    helpful = [item for item in study.items("validation") if item.benchmark in analysis.merging.needed("helpfulness")]
    if study.scale.loaded:
        helpful = evaluation.examine.panel(helpful, study.scale.merging.items)
    return {
        "panel": evaluation.examine.panel(test, study.scale.exam.panel),
        "full": test,
        "pairs": tuning.validation_items(study),
        "helpful": [dataclasses.replace(item, id=f"validation-{item.id}") for item in helpful],  # test items have the same ids
    }


def parents_bound(study: Study) -> float:
    """The upper bound of the parent's ASR on the validation pairs, in text: it cannot see. 1 where there are no such items and
    nothing is chosen by it."""
    folder, items = study.checkpoints(PARENT)[-1], tuning.validation_items(study)
    if not items:
        return 1.0
    model, processor = models.checkpoints.ready(folder, study.scale.exam.dtype), models.checkpoints.load_processor(folder)
    answers = responses_to(study, model, processor, False, items)
    return evaluation.validation.attack_rates(items, answers, study.scale.exam.judges)["text"].high


def responses_to(
    study: Study, model: Any, processor: Any, multimodal: bool, items: Sequence[Item], keep: Path | None = None
) -> dict[str, Response]:  # fmt: skip
    """A model's responses by item; one that cannot see is not asked about pictures. `keep`: a file of answers as they come."""
    exam, chosen, kept = study.scale.exam, evaluation.examine.answerable(items, multimodal), evaluation.engines.Kept(keep)
    more = exam.batch_size, exam.max_new_tokens, lambda done: None, kept
    responses = {r.item: r for r in evaluation.engines.respond(model, processor, chosen, "merge", *more)}
    if len(responses) < len(chosen):
        raise ValueError("two items that are asked together have one id; their answers could not be told apart")
    return responses


class Result(NamedTuple):
    """One model's responses to the panel and the validation items, its loss, and which earlier merge has the same weights."""

    responses: dict[str, Response]
    loss: float | None
    same_as: str | None = None


class Sweep(NamedTuple):
    """All merges with one partner. `examined`: some weights and the result by recipe, so that equal models are examined once."""

    study: Study
    partner: str
    members: Members
    examined: dict[str, tuple[Mapping[str, Any], Result]]
    work: Path | None = None  # where answers are kept as they come: a killed sweep asks no model again

    def examine(self, point: Point, items: Mapping[str, list[Item]]) -> tuple[Result, float]:
        """Put the panel and the validation items to one model, unless its weights were examined before.

        Units:    CPU seconds of merging, loading the weights and comparing them with earlier ones; the examination is not in it
        """
        start = time.process_time()
        model, processor, multimodal, sample = self.model(point)
        same = next((name for name, (w, _) in self.examined.items() if sample and models.merge.rules.near(sample, w, SAME)), None)
        spent = time.process_time() - start if sample else 0.0
        if same is not None:
            return self.examined[same][1]._replace(loss=None, same_as=same), spent
        loss = None
        if point.rule == "linear":
            answered = [item for item in items["pairs"] if item.options or item.reference]
            right = [dataclasses.replace(item, options=item.options[:1] or (str(item.reference),)) for item in answered]
            losses = evaluation.engines.option_losses(model, processor, right, self.study.scale.exam.batch_size)
            loss = sum(loss for (loss,) in losses) / len(losses) if losses else None
        every = [*items["panel"], *items["pairs"], *items["helpful"]]
        result = Result(responses_to(self.study, model, processor, multimodal, every, self.keep(point)), loss)
        if sample:
            self.examined[recipe_of(point, self.partner)] = sample, result
        return result, spent

    def respond(self, point: Point, items: Sequence[Item]) -> dict[str, Response]:
        """Responses of one model of the sweep, by item."""
        return responses_to(self.study, *self.model(point)[:3], items, self.keep(point))

    def keep(self, point: Point) -> Path | None:
        """The file of a model's answers while the sweep is at work."""
        return self.work and self.work / KEPT.format(recipe_of(point, self.partner).replace("/", "-"))

    def model(self, point: Point) -> tuple[Any, Any, bool, dict[str, Any] | None]:
        """The model of a point, its processor, whether it sees, and a sample of its weights where it is a merge."""
        members = self.members
        if point.folder is not None:
            model = models.checkpoints.ready(point.folder, self.study.scale.exam.dtype)
            return model, members.processor, True, None
        ratio = 0.5 if point.ratio is None else point.ratio
        if point.rule == "ensemble":
            _fill(members.model, members.a.items())
            partner = models.checkpoints.ready(members.partner, self.study.scale.exam.dtype)
            sees = LINEAGES[self.partner] != "parent"
            folder = self.study.checkpoints(ADAPTED if sees else PARENT)[-1]
            return (
                evaluation.engines.Ensemble(members.model, partner, ratio),
                models.checkpoints.load_processor(folder),
                sees,
                None,
            )
        spec, rule = self.study.scale.merging, RULES[point.rule if point.rule in RULES else "random"]
        how = models.merge.rules.How(ratio, spec.kept, spec.survived, spec.scaling, spec.rank)
        blocks = blocks_of(self.study, point, rule.blocks, members.layers)
        weighed = members.fisher if models.merge.rules.RULES[rule.rule].weighed else ()
        merged = models.merge.rules.streamed(rule.rule, members.a, members.b, members.base, how, self.study.seed, blocks, weighed)
        return members.model, members.processor, True, _fill(members.model, merged)

    def validation_row(self, point: Point, items: Mapping[str, list[Item]], result: Result) -> dict[str, Any]:
        """What one model did on validation (`validation.merge_scores`), under its name."""
        row = {"backbone": self.study.backbone, "seed": self.study.seed, "rule": point.rule, "partner": self.partner}
        row |= {"place": point.place, "recipe": recipe_of(point, self.partner), "ratio": point.ratio}
        raw = self.raw_rows(point, items["helpful"], result.responses, "validation")
        scores = evaluation.validation.merge_scores(items["pairs"], result.responses, raw, self.study.scale.exam.judges)
        return row | scores | {"loss": result.loss, "same_as": result.same_as}

    def raw_rows(
        self, point: Point, items: Sequence[Item], responses: Mapping[str, Response], exam: str
    ) -> list[dict[str, Any]]:  # fmt: skip
        """Raw rows of one model's responses to some items, those that were answered."""
        study, recipe = self.study, recipe_of(point, self.partner)
        record = {"scale": study.scale.name, "backbone": study.backbone, "seed": study.seed, "stage": "merge", "recipe": recipe}
        record |= {"model": f"{study.backbone}/merge/{recipe}", "step": 0, "exam": exam}
        found = [responses[item.id] for item in items if item.id in responses]
        return evaluation.examine.raw_table(items, found, record, study.scale.exam.judges)


def _fill(model: Any, weights: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Overwrite all weights of a model, one after the other, and return a sample of them."""
    own, samples = model.state_dict(), dict[str, Any]()
    for name, weight in weights:
        own[name].copy_(weight)
        samples[name] = models.merge.rules.sample(weight)
    if missing := own.keys() - samples.keys():
        raise ValueError(f"a merge has no weights for {len(missing)} of the model's, first {min(missing)}")
    return samples


def _trained_again(study: Study, partner: str, work: Path) -> list[Point]:
    """The checkpoints on the way to a tuned partner, its last one included: its own training, run once more."""
    start, scratch = study.checkpoints(tuning.RECIPES[partner].start)[-1], work / "training"
    rows, fit, _ = tuning.prepared(study, partner, models.checkpoints.load_processor(start))
    if not (done := scratch / "trained").exists():
        tuning.train_by(study, partner, scratch, start, rows, fit)
        done.touch()  # a kill while checkpoints are settled costs no training
    training.checkpoints.settle(scratch, models.checkpoints.load_processor(start), start)
    return [Point("checkpoint", None, folder.name, folder=folder) for folder in sorted(scratch.glob("step-*"))]
