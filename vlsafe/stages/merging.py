"""Merges of the adapted model with a safe partner: a sweep over rules and ratios in memory, and what each choice does.

Every merge answers the panel and the validation pairs and is then forgotten; per rule one is chosen by the validation pairs
alone and sits the full examination. Two controls go the same way: an ensemble of both members, and (grid "full") the
checkpoints on the way to the partner, trained once more.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from vlsafe import store
from vlsafe.schema import MAIN_LINE, Item, to_row
from vlsafe.stages import tuning
from vlsafe.stages.study import Bar, Study, checkpoints, drop, items, world_of


class Rule(NamedTuple):
    """A way to make one model of two: a merge rule, on which blocks, in which grid; `rule` is empty for the controls."""

    rule: str
    blocks: str = "all"
    grid: str = "default"


PARENT, STAGE_1, ADAPTED = (MAIN_LINE[name] for name in ("parent", "stage 1", "adapted"))
LINEAGES = {"sl-full": "child", "dpo-both-full": "child", "sibling-full": "sibling", "aligned": "parent"}
RULES: dict[str, Rule] = {
    "linear": Rule("linear"),
    "slerp": Rule("slerp"),
    "task_arithmetic": Rule("task_arithmetic"),
    "ties": Rule("ties"),
    "dare_linear": Rule("dare_linear"),
    "dare_ties": Rule("dare_ties"),
    "model_stock": Rule("model_stock"),
    "band": Rule("linear", "band"),
    "outside": Rule("linear", "outside"),
    "dare_linear_l1": Rule("dare_linear_l1", grid="full"),
    "dare_ties_l1": Rule("dare_ties_l1", grid="full"),
    "random": Rule("linear", "random", grid="full"),
    "ensemble": Rule(""),
    "checkpoint": Rule("", grid="full"),
}
SAME = 1e-6  # weights nearer than this are those of one model


class Point(NamedTuple):
    """One model of a sweep: its rule, the weight of the partner or what stands in its place in a name, which random blocks."""

    rule: str
    ratio: float | None
    place: str
    draw: int = 0


class Answers(NamedTuple):
    """What one model said to the panel and the validation items, its loss, and where its weights were met before."""

    given: dict[str, Any]
    loss: float | None
    same_as: str | None


def run_of(partner: str) -> str:
    """The run whose last checkpoint is the safe partner."""
    return PARENT if LINEAGES[partner] == "parent" else f"safety/{partner}"


def inputs_of(partner: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys((ADAPTED, run_of(partner), PARENT, STAGE_1, "world/corpora", tuning.PROBED)))


def params(study: Study) -> Any:
    return [study.scale.merging, study.scale.exam, study.scale.tuning.pairs, study.scale.threads]


def names(grid: str) -> list[str]:
    """The sweeps of a grid. Those of "full" hold what the default ones do, and stand in their place."""
    return [f"merge/{partner}{'' if grid == 'default' else '.full'}" for partner in LINEAGES]


def points(study: Study, partner: str, grid: str) -> list[Point]:
    """All models of a sweep, those of a rule in a row.

    A parent has no task vector of its own, so rules that need one are left out; no rule has more points than it has ratios.
    """
    from vlsafe.merge.rules import RULES as MERGES

    spec, found = study.scale.merging, []
    for name, rule in RULES.items():
        based = rule.rule and MERGES[rule.rule].based
        if (rule.grid == "full" and grid != "full") or (LINEAGES[partner] == "parent" and (based or name == "checkpoint")):
            continue
        if name == "checkpoint":
            found.append(Point(name, None, ""))  # which steps there are is known after the training
        elif rule.rule and not MERGES[rule.rule].rated:
            found.append(Point(name, None, ""))
        else:
            ratios = spec.ratios if name == "linear" or grid == "full" else spec.few
            draws = range(spec.random_bands) if rule.blocks == "random" else (0,)
            found += [Point(f"{name}{draw}" if len(draws) > 1 else name, r, f"{r:.2f}", draw) for draw in draws for r in ratios]
    return found


def recipe_of(point: Point, partner: str) -> str:
    """`<rule>/<A>+<B>/<ratio>`; without the last part where there is no ratio."""
    return "/".join(part for part in (point.rule, f"{ADAPTED.partition('/')[2]}+{partner}", point.place) if part)


class Members(NamedTuple):
    """The adapted model, whose weights are overwritten by each merge, its processor, and the weights that go into merges."""

    model: Any
    processor: Any
    a: dict[str, Any]
    b: dict[str, Any]
    base: dict[str, Any]
    partner: Any
    layers: int


def members(study: Study, partner: str) -> Members:
    """Load both members and the base of their task vectors: the stage-1 graft for siblings, else the parent's language model."""
    from vlsafe import models
    from vlsafe.layouts import grafted

    def weights(name: str) -> tuple[Any, dict[str, Any]]:
        model = models.load(checkpoints(study, name)[-1])
        told = {key: value.detach().clone() for key, value in model.state_dict().items()}
        return model, {grafted(key): value for key, value in told.items()} if name == PARENT else told

    model, a = weights(ADAPTED)
    safe, b = weights(run_of(partner))
    _, base = weights(STAGE_1 if LINEAGES[partner] == "sibling" else PARENT)
    processor = models.load_processor(checkpoints(study, ADAPTED)[-1])
    return Members(model, processor, a, b, base, safe, len(models.language_layers(model)))


def blocks_of(study: Study, point: Point, kind: str, layers: int) -> set[int | None] | None:
    """Which blocks a rule merges; None: all weights. `outside` also holds what is no block, `random` as many as the band."""
    start, end = study.numbers(tuning.PROBED)["band"]
    band = set(range(start, end))
    if kind == "random":
        rng = world_of(study).rng(f"random blocks {point.draw}")
        return set(rng.choice(layers, len(band), replace=False).tolist())
    return {"all": None, "band": band, "outside": set(range(layers)) - band | {None}}[kind]


def make_sweep(study: Study, work: Path, partner: str, grid: str) -> dict[str, Any]:
    """Examine every merge of a sweep, choose one a rule on validation pairs, and put that one to the full examination."""
    from vlsafe import merges

    for settled in (work / "training").glob("step-*"):
        drop(settled)  # an earlier attempt was killed behind its training
    held, panel = members(study, partner), asked_of(study)
    limit = parents_bound(study) + study.scale.merging.margin
    bar = Bar(f"merges with {partner}", len(points(study, partner, grid)))
    lines, rows, chosen = [], [], []
    seconds: list[float] = []
    for number, (of, speaking) in enumerate(_models(study, held, partner, grid, work, seconds), 1):
        answers = speaking(panel)
        lines.append(_line(study, of, partner, panel, answers) | {"limit": limit})
        rows += _raw(study, of, partner, panel["panel"], answers.given, "panel")
        bar(number)
    lines = [{**line, "chosen": bool(best)} for line, best in zip(lines, merges.chosen(pd.DataFrame(lines)), strict=True)]
    picked = {(line["rule"], line["place"]) for line in lines if line["chosen"]}
    everything, said, sat = {"full": items(study)}, [], []
    for of, speaking in _models(study, held, partner, grid, work, [], picked):
        answers = speaking(everything)
        chosen += _raw(study, of, partner, everything["full"], answers.given, "full")
        said += [to_row(answer) for answer in answers.given.values()]
        sat.append(recipe_of(of, partner))
    drop(work / "training")
    store.write_rows(work / "validation.parquet", lines)
    store.write_rows(work / "panel.parquet", rows)
    store.write_rows(work / "raw.parquet", chosen)
    store.write_rows(work / "responses.parquet", said)
    overhead = {"overhead_mean": float(np.mean(seconds)), "overhead_max": max(seconds)} if seconds else {}
    return {"models": len(lines), "chosen": sat, "limit": limit, **{key: round(value, 4) for key, value in overhead.items()}}


def asked_of(study: Study) -> dict[str, list[Item]]:
    """The panel, the validation pairs, and validation items of the benchmarks that helpfulness is made of."""
    from vlsafe import evaluate
    from vlsafe.measures import MEASURES

    helpful = {MEASURES[part]["benchmark"] for part in MEASURES["helpfulness"]["parts"]}
    validation = evaluate.all_items(world_of(study), "validation", study.scale.merging.items)
    return {
        "panel": evaluate.panel(items(study), study.scale.exam.panel),
        "pairs": tuning.validation_items(study),
        "helpful": [item for item in validation if item.benchmark in helpful],
    }


def parents_bound(study: Study) -> float:
    """The upper bound of the parent's ASR on the validation pairs, in text: it can be asked nothing else."""
    from vlsafe import evaluate, models

    folder = checkpoints(study, PARENT)[-1]
    asked = evaluate.answerable(tuning.validation_items(study), False)
    given = _respond(study, models.load(folder), models.load_processor(folder), asked)
    return attacked(asked, given)["text"].high


def attacked(asked: Sequence[Item], given: dict[str, Any]) -> dict[str, Any]:
    """ASR of the harmful validation pairs that were asked, by modality, with its clustered interval."""
    from vlsafe import stats
    from vlsafe.judges import judge

    harmful = [item for item in asked if item.harmful and item.id in given]
    labels = [verdict.label for verdict in judge("world", harmful, [given[item.id] for item in harmful])]
    events: dict[str, list[tuple[bool, Any]]] = {}
    for item, label in zip(harmful, labels, strict=True):
        events.setdefault(item.group, []).append((label.startswith("complied"), item.cluster))
    return {group: stats.rate(*map(list, zip(*of, strict=True))) for group, of in events.items()}


def _respond(study: Study, model: Any, processor: Any, asked: Sequence[Item], name: str = "merge") -> dict[str, Any]:
    from vlsafe.engines import respond

    exam = study.scale.exam
    return {r.item: r for r in respond(model, processor, asked, name, exam.batch_size, exam.max_new_tokens)}


Speaking = Callable[[dict[str, list[Item]]], Answers]


def _models(
    study: Study, held: Members, partner: str, grid: str, work: Path, seconds: list[float],
    only: set[tuple[str, str]] | None = None,
) -> Iterator[tuple[Point, Speaking]]:  # fmt: skip
    """Every model of a sweep, or those of `only`, one after another: its point, and what puts items to it.

    `seconds` takes what each merge costs beside its examination, in CPU time.
    """
    from vlsafe import engines, models

    met: dict[str, tuple[dict[str, Any], Answers]] = {}
    for point in points(study, partner, grid):
        if point.rule == "checkpoint":
            for folder in _trained_again(study, partner, work):
                of = Point("checkpoint", None, folder.name)
                if only is None or (of.rule, of.place) in only:
                    yield of, _speaker(study, models.load(folder), held.processor, True, of, partner)
        elif only is not None and (point.rule, point.place) not in only:
            continue
        elif point.rule == "ensemble":
            held.model.load_state_dict(held.a)
            both = LINEAGES[partner] != "parent"
            processor = held.processor if both else models.load_processor(checkpoints(study, PARENT)[-1])
            yield point, _speaker(study, engines.Ensemble(held.model, held.partner, point.ratio), processor, both, point, partner)
        else:
            yield point, _merged(study, held, point, partner, met, seconds)


def _speaker(study: Study, model: Any, processor: Any, sees: bool, point: Point, partner: str) -> Speaking:
    def speaking(asked: dict[str, list[Item]]) -> Answers:
        from vlsafe import evaluate
        from vlsafe.engines import option_losses

        whole = [item for of in asked.values() for item in evaluate.answerable(of, sees)]
        given = _respond(study, model, processor, whole, f"{study.backbone}/merge/{recipe_of(point, partner)}")
        loss = None
        if point.rule == "linear" and "pairs" in asked:
            right = [dataclasses.replace(item, options=item.options[:1]) for item in asked["pairs"]]
            loss = float(np.mean([told[0] for told in option_losses(model, processor, right, study.scale.exam.batch_size)]))
        return Answers(given, loss, None)

    return speaking


def _merged(study: Study, held: Members, point: Point, partner: str, met: dict[str, Any], seconds: list[float]) -> Speaking:
    """Merge, and put the weights into the model; where they were met before, their answers are taken over."""
    from vlsafe.merge import weights
    from vlsafe.merge.rules import How

    start, spec = time.process_time(), study.scale.merging
    rule = RULES[point.rule.rstrip("0123456789") if point.rule not in RULES else point.rule]
    how = How(0.5 if point.ratio is None else point.ratio, spec.kept, spec.survived, spec.scaling)
    blocks = blocks_of(study, point, rule.blocks, held.layers)
    made = weights.combined(rule.rule, held.a, held.b, held.base, how, study.seed, blocks)
    same = next((name for name, (other, _) in met.items() if weights.near(made, other, SAME)), None)
    held.model.load_state_dict(made)
    seconds.append(time.process_time() - start)

    def speaking(asked: dict[str, list[Item]]) -> Answers:
        if same is not None:
            return met[same][1]._replace(same_as=same, loss=None)
        answers = _speaker(study, held.model, held.processor, True, point, partner)(asked)
        met[recipe_of(point, partner)] = made, answers
        return answers

    return speaking


def _trained_again(study: Study, partner: str, work: Path) -> list[Path]:
    """The checkpoints on the way to a tuned partner, its last one included: its own training, run once more."""
    from vlsafe import models, train

    training = work / "training"
    settled = sorted(training.glob("step-*"))
    if settled:
        return settled
    start = checkpoints(study, tuning.RECIPES[partner].start)[-1]
    rows, fit, _ = tuning.prepared(study, partner, models.load_processor(start))
    tuning.train_by(study, partner, training, start, rows, fit)
    return train.settle(training, models.load_processor(start), start)


def _line(study: Study, point: Point, partner: str, asked: dict[str, list[Item]], answers: Answers) -> dict[str, Any]:
    """What one model did on validation: ASR and its upper bound by modality, refusals of harmless requests, helpfulness, loss.

    `asr` and `asr_high` are those of the worse modality.
    """
    from vlsafe import evaluate, measures
    from vlsafe.judges import judge

    found = attacked(asked["pairs"], answers.given)
    harmless = [item for item in asked["pairs"] if not item.harmful and item.id in answers.given]
    labels = [verdict.label for verdict in judge("world", harmless, [answers.given[item.id] for item in harmless])]
    refused = {g: [w == "refused" for i, w in zip(harmless, labels, strict=True) if i.group == g] for g in ("text", "pictures")}
    said = [answers.given[item.id] for item in asked["helpful"] if item.id in answers.given]
    told = evaluate.raw_table(asked["helpful"], said, _facts(study, point, partner, "validation"))
    helpful = None
    if told:
        rows = measures.events(pd.DataFrame(told), "helpfulness")
        helpful = measures.estimate(rows, "helpfulness", np.random.default_rng(0))
    line = {"backbone": study.backbone, "seed": study.seed, "rule": point.rule, "partner": partner, "place": point.place}
    line |= {"recipe": recipe_of(point, partner), "ratio": point.ratio}
    for group in ("text", "pictures"):
        rate = found.get(group)
        line |= {f"asr_{group}": rate and rate.value, f"asr_{group}_high": rate and rate.high}
        line |= {f"refusal_{group}": float(np.mean(refused[group])) if refused[group] else None}
    line |= {"asr": max(rate.value for rate in found.values()), "asr_high": max(rate.high for rate in found.values())}
    return line | {"helpfulness": helpful and helpful.value, "loss": answers.loss, "same_as": answers.same_as}


def _facts(study: Study, point: Point, partner: str, exam: str) -> dict[str, Any]:
    recipe = recipe_of(point, partner)
    names = {"scale": study.scale.name, "backbone": study.backbone, "seed": study.seed, "stage": "merge", "recipe": recipe}
    return {**names, "model": f"{study.backbone}/merge/{recipe}", "step": 0, "exam": exam}


def _raw(
    study: Study, point: Point, partner: str, asked: Sequence[Item], given: dict[str, Any], exam: str
) -> list[dict[str, Any]]:
    from vlsafe import evaluate

    said = [given[item.id] for item in asked if item.id in given]
    return evaluate.raw_table(asked, said, _facts(study, point, partner, exam))


def sweep_of(partner: str, grid: str) -> Callable[[Study, Path], dict[str, Any]]:
    return lambda study, work: make_sweep(study, work, partner, grid)
