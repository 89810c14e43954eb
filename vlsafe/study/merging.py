"""Merges of the adapted model with a safe partner: a sweep over rules and ratios in memory, and what each choice does.

Every merge answers the panel and the validation pairs and is then forgotten; per rule one is chosen by the validation pairs
alone and sits the full examination, of the benchmarks that the headline measures need (grid "full": of all). Two controls go
the same way: an ensemble of both members, and (grid "full") the checkpoints on the way to the partner, trained once more.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vlsafe.core import store
from vlsafe.core.schema import MAIN_LINE, Item, Response, to_row
from vlsafe.study import tuning
from vlsafe.study.study import Bar, Study, drop


class Rule(NamedTuple):
    """A way to make one model of two: a merge rule, on which blocks, in which grid; `rule` is empty for the controls."""

    rule: str
    blocks: str = "all"
    grid: str = "default"


PARENT, STAGE_1, ADAPTED = (MAIN_LINE[name] for name in ("parent", "stage 1", "adapted"))
LINEAGES = {"sl-full": "child", "dpo-both-full": "child", "sibling-full": "sibling", "aligned": "parent"}
RULES: dict[str, Rule] = {
    "linear": Rule("linear"),
    "inside": Rule("linear"),  # the same points but the two ends, at which nothing is merged
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
    """One model of a sweep: its rule, the weight of the partner, what stands in that place in its name; which of the random
    bands, and where it lies, if it is no merge but a checkpoint.
    """

    rule: str
    ratio: float | None
    place: str
    draw: int = 0
    folder: Path | None = None


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


def points(study: Study, partner: str, grid: str) -> list[list[Point]]:
    """All models of a sweep, a list for each rule. Which checkpoints there are is known after their training.

    A parent has no task vector of its own and no tuning, so rules that need them are left out.
    """
    from vlsafe.models.merge.rules import RULES as MERGES

    spec, found = study.scale.merging, []
    for name, rule in RULES.items():
        merge = MERGES.get(rule.rule)
        needs = name == "checkpoint" or (merge is not None and merge.based)
        if (rule.grid == "full" and grid != "full") or (needs and LINEAGES[partner] == "parent"):
            continue
        if name == "checkpoint" or (merge is not None and not merge.rated):
            found.append([Point(name, None, "")])
            continue
        few = spec.votes if name == "ensemble" else spec.few
        ratios = spec.ratios if name in ("linear", "inside") or grid == "full" else few
        ratios = tuple(ratio for ratio in ratios if name != "inside" or 0 < ratio < 1)
        for draw in range(spec.random_bands if rule.blocks == "random" else 1):
            known_as = f"{name}{draw}" if rule.blocks == "random" else name
            found.append([Point(known_as, ratio, f"{ratio:.2f}", draw) for ratio in ratios])
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
    from vlsafe.models import architectures, checkpoints
    from vlsafe.models import checkpoints as models_checkpoints
    from vlsafe.models.architectures import grafted

    def weights(name: str) -> tuple[Any, dict[str, Any]]:
        model = models_checkpoints.load(study.checkpoints(name)[-1])
        told = {key: value.detach().clone() for key, value in model.state_dict().items()}
        return model, {grafted(key): value for key, value in told.items()} if name == PARENT else told

    model, a = weights(ADAPTED)
    safe, b = weights(run_of(partner))
    _, base = weights(STAGE_1 if LINEAGES[partner] == "sibling" else PARENT)
    processor = checkpoints.load_processor(study.checkpoints(ADAPTED)[-1])
    return Members(model, processor, a, b, base, safe, len(architectures.language_layers(model)))


def blocks_of(study: Study, point: Point, kind: str, layers: int) -> set[int | None] | None:
    """Which blocks a rule merges; None: all weights. `outside` also holds what is no block, `random` as many as the band."""
    start, end = study.numbers(tuning.PROBED)["band"]
    band: set[int | None] = set(range(start, end))
    if kind == "random":
        rng = study.world().rng(f"random blocks {point.draw}")
        return set(rng.choice(layers, len(band), replace=False).tolist())
    return {"all": None, "band": band, "outside": set(range(layers)) - band | {None}}[kind]


def make_sweep(study: Study, work: Path, partner: str, grid: str) -> dict[str, Any]:
    """Examine every merge of a sweep, choose one a rule on validation pairs, and put that one to the full examination."""
    import numpy as np
    import pandas as pd

    from vlsafe.analysis import merging

    for settled in (work / "training").glob("step-*"):
        drop(settled)  # an earlier attempt was killed behind its training
    held, asked = members(study, partner), asked_of(study, grid)
    limit = parents_bound(study) + study.scale.merging.margin
    ways = points(study, partner, grid)
    bar, met, seconds = Bar(f"merges with {partner}", sum(map(len, ways))), dict[str, Any](), []
    lines, panel, full, said = list[dict[str, Any]](), [], [], {}
    for way in ways:
        way, told = _trained_again(study, partner, work) if way[0].rule == "checkpoint" else way, []
        for point in way:
            sat, spent = _examined(study, held, point, partner, asked, met)
            seconds += [spent] if spent else []
            told.append(_line(study, point, partner, asked["pairs"], asked["helpful"], sat) | {"limit": limit})
            panel += _raw(study, point, partner, asked["panel"], sat.given, "panel")
            bar(len(lines) + len(told))
        picked = merging.chosen(pd.DataFrame(told)).tolist()
        lines += [{**line, "chosen": best} for line, best in zip(told, picked, strict=True)]
        best, source = way[picked.index(True)], told[picked.index(True)]["same_as"] or told[picked.index(True)]["recipe"]
        if source not in said:
            said[source] = _spoken(study, *_speaker(study, held, best, partner)[:3], asked["full"])
        full += _raw(study, best, partner, asked["full"], said[source], "full")
    drop(work / "training")
    store.write_rows(work / "validation.parquet", lines)
    store.write_rows(work / "panel.parquet", panel)
    store.write_rows(work / "raw.parquet", full)
    responses = [
        dataclasses.replace(r, model=f"{study.backbone}/merge/{source}") for source, of in said.items() for r in of.values()
    ]
    store.write_rows(work / "responses.parquet", [to_row(response) for response in responses])
    return {"models": len(lines), "limit": limit, "overhead_mean": float(np.mean(seconds)), "overhead_max": max(seconds)}


def asked_of(study: Study, grid: str) -> dict[str, list[Item]]:
    """The panel, all test items, the validation pairs, and validation items of the benchmarks that helpfulness is made of.

    Where the grid is not full, the first two are those of the benchmarks that the headline measures need.
    """
    from vlsafe.analysis.merging import HEADLINE, needed
    from vlsafe.evaluation import examine

    test = [item for item in study.items() if grid == "full" or item.benchmark in needed(*HEADLINE)]
    validation = examine.all_items(study.world(), "validation", study.scale.merging.items)
    helpful = [item for item in validation if item.benchmark in needed("helpfulness")]
    return {
        "panel": examine.panel(test, study.scale.exam.panel),
        "full": test,
        "pairs": tuning.validation_items(study),
        "helpful": [dataclasses.replace(item, id=f"validation-{item.id}") for item in helpful],  # test items have the same ids
    }


def parents_bound(study: Study) -> float:
    """The upper bound of the parent's ASR on the validation pairs, in text: it can be asked nothing else."""
    from vlsafe.models import checkpoints as models_checkpoints

    folder, asked = study.checkpoints(PARENT)[-1], tuning.validation_items(study)
    given = _spoken(study, models_checkpoints.load(folder), models_checkpoints.load_processor(folder), False, asked)
    return attacked(asked, given)["text"].high


def attacked(asked: Sequence[Item], given: Mapping[str, Response]) -> dict[str | None, Any]:
    """ASR of the harmful validation pairs that were asked, by modality, with its clustered interval."""
    from vlsafe.analysis import stats

    labels, found = labelled(asked, given, harmful=True), {}
    for group in dict.fromkeys(item.group for item, _ in labels):
        of = [(item, label) for item, label in labels if item.group == group]
        found[group] = stats.rate([label.startswith("complied") for _, label in of], [item.cluster for item, _ in of])
    return found


def labelled(asked: Sequence[Item], given: Mapping[str, Response], harmful: bool) -> list[tuple[Item, str]]:
    """The harmful or the harmless items that were asked, with the world's labels of the answers."""
    from vlsafe.evaluation.judges import judge

    of = [item for item in asked if item.harmful == harmful and item.id in given]
    return list(zip(of, (verdict.label for verdict in judge("world", of, [given[item.id] for item in of])), strict=True))


def _spoken(study: Study, model: Any, processor: Any, sees: bool, asked: Sequence[Item]) -> dict[str, Response]:
    """What a model answers, by item; one that sees nothing is not asked about pictures."""
    from vlsafe.evaluation import examine
    from vlsafe.evaluation.engines import respond

    exam, whole = study.scale.exam, examine.answerable(asked, sees)
    if len({item.id for item in whole}) < len(whole):
        raise ValueError("two items that are asked together have one id; their answers could not be told apart")
    return {r.item: r for r in respond(model, processor, whole, "merge", exam.batch_size, exam.max_new_tokens)}


class Sat(NamedTuple):
    """What one model said to the panel and the validation items, its loss, and where its weights were met before."""

    given: dict[str, Response]
    loss: float | None
    same_as: str | None = None


def _examined(
    study: Study, held: Members, point: Point, partner: str, asked: Mapping[str, list[Item]], met: dict[str, Any]
) -> tuple[Sat, float]:
    """Put the panel and the validation items to one model, unless its weights were met before; and what merging it cost.

    Units:    seconds of CPU time beside the examination
    """
    from vlsafe.evaluation.engines import option_losses
    from vlsafe.models.merge import weights

    start = time.process_time()
    model, processor, sees, made = _speaker(study, held, point, partner)
    same = next((name for name, (other, _) in met.items() if made and weights.near(made, other, SAME)), None)
    spent = time.process_time() - start if made else 0.0
    if same is not None:
        return met[same][1]._replace(loss=None, same_as=same), spent
    loss = None
    if point.rule == "linear":
        right = [dataclasses.replace(item, options=item.options[:1]) for item in asked["pairs"]]
        told = option_losses(model, processor, right, study.scale.exam.batch_size)
        loss = sum(losses[0] for losses in told) / len(told)
    sat = Sat(_spoken(study, model, processor, sees, [*asked["panel"], *asked["pairs"], *asked["helpful"]]), loss)
    if made:
        met[recipe_of(point, partner)] = made, sat
    return sat, spent


def _speaker(study: Study, held: Members, point: Point, partner: str) -> tuple[Any, Any, bool, dict[str, Any] | None]:
    """The model of a point, its processor, whether it sees, and its weights where it is a merge."""
    from vlsafe.evaluation import engines
    from vlsafe.models import checkpoints as models_checkpoints
    from vlsafe.models.merge import weights
    from vlsafe.models.merge.rules import How

    if point.folder is not None:
        return models_checkpoints.load(point.folder), held.processor, True, None
    ratio = 0.5 if point.ratio is None else point.ratio
    if point.rule == "ensemble":
        held.model.load_state_dict(held.a)
        sees = LINEAGES[partner] != "parent"
        processor = held.processor if sees else models_checkpoints.load_processor(study.checkpoints(PARENT)[-1])
        return engines.Ensemble(held.model, held.partner, ratio), processor, sees, None
    spec, rule = study.scale.merging, RULES[point.rule if point.rule in RULES else "random"]
    how = How(ratio, spec.kept, spec.survived, spec.scaling)
    blocks = blocks_of(study, point, rule.blocks, held.layers)
    made = weights.combined(rule.rule, held.a, held.b, held.base, how, study.seed, blocks)
    held.model.load_state_dict(made)
    return held.model, held.processor, True, made


def _trained_again(study: Study, partner: str, work: Path) -> list[Point]:
    """The checkpoints on the way to a tuned partner, its last one included: its own training, run once more."""
    from vlsafe.models import checkpoints as models_checkpoints
    from vlsafe.training import checkpoints as training_checkpoints

    start, training = study.checkpoints(tuning.RECIPES[partner].start)[-1], work / "training"
    rows, fit, _ = tuning.prepared(study, partner, models_checkpoints.load_processor(start))
    tuning.train_by(study, partner, training, start, rows, fit)
    settled = training_checkpoints.settle(training, models_checkpoints.load_processor(start), start)
    return [Point("checkpoint", None, folder.name, folder=folder) for folder in settled]


def _line(
    study: Study, point: Point, partner: str, pairs: Sequence[Item], helpful: Sequence[Item], sat: Sat
) -> dict[str, Any]:  # fmt: skip
    """What one model did on validation: ASR and its upper bound by modality, refusals of harmless requests, helpfulness, loss.

    `asr` and `asr_high` are those of the worse modality.
    """
    import pandas as pd

    from vlsafe.analysis import measures

    found, refused = attacked(pairs, sat.given), dict[str | None, list[bool]]()
    for item, label in labelled(pairs, sat.given, harmful=False):
        refused.setdefault(item.group, []).append(label == "refused")
    rows = _raw(study, point, partner, helpful, sat.given, "validation")
    events = measures.events(pd.DataFrame(rows), "helpfulness") if rows else None
    told = measures.estimate(events, "helpfulness") if rows else None
    line = {"backbone": study.backbone, "seed": study.seed, "rule": point.rule, "partner": partner, "place": point.place}
    line |= {"recipe": recipe_of(point, partner), "ratio": point.ratio}
    for group in ("text", "pictures"):
        rate = found.get(group)
        line |= {f"asr_{group}": rate and rate.value, f"asr_{group}_high": rate and rate.high}
        line |= {f"refusal_{group}": sum(refused[group]) / len(refused[group]) if group in refused else None}
    line |= {"asr": max(rate.value for rate in found.values()), "asr_high": max(rate.high for rate in found.values())}
    return line | {"helpfulness": told and told.value, "loss": sat.loss, "same_as": sat.same_as}


def _raw(
    study: Study, point: Point, partner: str, asked: Sequence[Item], given: Mapping[str, Response], exam: str
) -> list[dict[str, Any]]:  # fmt: skip
    from vlsafe.evaluation import examine

    recipe = recipe_of(point, partner)
    facts = {"scale": study.scale.name, "backbone": study.backbone, "seed": study.seed, "stage": "merge", "recipe": recipe}
    facts |= {"model": f"{study.backbone}/merge/{recipe}", "step": 0, "exam": exam}
    return examine.raw_table(asked, [given[item.id] for item in asked if item.id in given], facts)


def sweep_of(partner: str, grid: str) -> Callable[[Study, Path], dict[str, Any]]:
    return lambda study, work: make_sweep(study, work, partner, grid)
