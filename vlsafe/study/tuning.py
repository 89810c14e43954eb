"""Notebook 04: safety tuning by SFT, DPO and GRPO, the choice of a checkpoint, and the reward's guard as a judge.

Every recipe goes one way: rows that can be trained on, a training with a few checkpoints, and one of these chosen by
what it does on validation pairs, about verb–object pairs that are neither trained on nor tested.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vlsafe import data, evaluation, models, training
from vlsafe.core import store
from vlsafe.core.scale import Fit, known
from vlsafe.core.schema import MAIN_LINE, Item, Pair, from_row
from vlsafe.study.adaptation import by_method, following, frozen_band
from vlsafe.study.study import Bar, Study, drop, project_root, step_of
from vlsafe.study.world import NAMED


class Recipe(NamedTuple):
    """One way to tune: where it starts, by which objective, on which corpora, by which method (`trainable.METHODS`).

    Recipes of the grid "full" are made on demand; PCGrad is notebook 05's.
    """

    start: str
    objective: str
    corpora: tuple[str, ...]
    method: str = "full"
    grid: str = "default"


STAGE_1, ADAPTED = MAIN_LINE["stage 1"], MAIN_LINE["adapted"]
RECIPES: dict[str, Recipe] = {
    "mtl-full": Recipe(STAGE_1, "sft", ("general", "safety")),
    "sl-full": Recipe(ADAPTED, "sft", ("safety",)),
    "sl-replay-full": Recipe(ADAPTED, "sft", ("safety", "replay"), grid="full"),
    "textsft-full": Recipe(ADAPTED, "sft", ("chosen",), grid="full"),
    "sibling-full": Recipe(STAGE_1, "sft", ("safety",)),
    "dpo-text-full": Recipe(ADAPTED, "dpo", ("safe_rlhf",)),
    "dpo-image-full": Recipe(ADAPTED, "dpo", ("spa_vl",)),
    "dpo-both-full": Recipe(ADAPTED, "dpo", ("safe_rlhf", "spa_vl")),
    "grpo-text-full": Recipe(ADAPTED, "grpo", ("safe_rlhf",), grid="full"),
    "mtl-pcgrad-full": Recipe(STAGE_1, "pcgrad", ("general", "safety"), grid="full"),
    "sl-lora": Recipe(ADAPTED, "sft", ("safety",), "lora", "full"),
    "sl-sppft": Recipe(ADAPTED, "sft", ("safety",), "sppft", "full"),
    "dpo-both-lora": Recipe(ADAPTED, "dpo", ("safe_rlhf", "spa_vl"), "lora", "full"),
    "dpo-both-sppft": Recipe(ADAPTED, "dpo", ("safe_rlhf", "spa_vl"), "sppft", "full"),
}
GUARD, PROBED = "guard/text", "probe/localisation"
TRAINED = 16  # bytes a trainable weight: float32 weight and gradient, AdamW's two moments
JUDGE = "guard-text"  # what the reward's guard is called where it judges
# Whose answers to harmful requests the reward's guard is put to.
JUDGED = ("sorry_bench", "mm_safetybench", "pocket_text", "pocket_pictures")


def inputs_of(name: str) -> tuple[str, ...]:
    """The runs that a recipe reads."""
    recipe = RECIPES[name]
    needed = {"screen/filtered": {"general", "replay"} & set(recipe.corpora), GUARD: recipe.objective == "grpo"}
    needed[PROBED] = recipe.method == "sppft"
    return (recipe.start, "world/corpora", *(run for run, is_needed in needed.items() if is_needed))


def read_from_outside(name: str) -> set[str]:
    """The things from outside that a recipe reads itself where models are loaded."""
    recipe = RECIPES[name]
    own = {"safe_rlhf" if corpus == "chosen" else corpus for corpus in recipe.corpora} - {"general", "replay"}
    return own | ({"text_guard"} if recipe.objective == "grpo" else set())


def unless(study: Study, name: str) -> str | None:
    """Why a scale does without a recipe: it names it. Raises:   ValueError where it names one that does not exist"""
    named = [known(each, RECIPES, "recipe of safety tuning") for each in study.scale.tuning.without]
    return f"the scale leaves the recipe {name!r} out (`tuning.without`)" if name in named else None


def recipe_params(study: Study, name: str) -> Any:
    """The numbers that a recipe depends on."""
    scale, recipe = study.scale, RECIPES[name]
    own = {"dpo": scale.tuning.preference, "grpo": scale.tuning.rollout}.get(recipe.objective)
    replay = scale.tuning.replay if "replay" in recipe.corpora else None
    lora = scale.lora if recipe.method == "lora" else None
    chosen_by = [scale.tuning.pairs, scale.tuning.milestones, scale.exam.max_new_tokens]
    return [list(recipe[:4]), base_fit(study, name), own, replay, lora, chosen_by, _limit(study), scale.threads, *study.choosing]


def base_fit(study: Study, name: str) -> Fit:
    """The fit of a recipe before its steps grow with its rows. Multitask tuning is stage 2 with more rows, by stage 2's fit."""
    scale, recipe = study.scale, RECIPES[name]
    fits = {"sft": scale.tuning.sft, "dpo": scale.tuning.preference.fit, "grpo": scale.tuning.rollout.fit}
    fit = scale.instruct if "general" in recipe.corpora else fits[recipe.objective]
    if recipe.objective == "pcgrad":
        fit = dataclasses.replace(fit, micro_batches=scale.tuning.task_batches)
    return by_method(fit, recipe.method, scale.lora)


def _limit(study: Study) -> int:
    return min(study.scale.language.context, study.scale.tuning.sft.max_length or study.scale.language.context)


def rows_of(study: Study, name: str, processor: Any, n_before: int) -> tuple[list[Any], list[list[str]]]:
    """The rows of one corpus that can be trained on, and the id of every other one with the reason."""
    if name in ("general", "replay"):
        rows = study.examples("screen/filtered", "instructions.parquet")  # intake was part of the screen
        if name == "general":
            return rows, []
        return data.arms.replayed(rows, round(study.scale.tuning.replay * n_before), study.stream("replay")), []
    if name == "safety":
        return data.intake.sound(
            study.examples("world/corpora", "safety.parquet"), data.intake.unsound, [processor], _limit(study)
        )
    file = "safe_rlhf" if name == "chosen" else name
    pairs = [from_row(Pair, row) for row in study.rows("world/corpora", f"{file}.parquet")]
    kept, refused = data.intake.sound(pairs, data.intake.unsound_pair, [processor], _limit(study))
    return ([data.arms.answered(pair, pair.chosen) for pair in kept] if name == "chosen" else kept), refused


def _corpora(study: Study, name: str, processor: Any) -> tuple[list[Any], dict[str, Any]]:
    """All rows of a recipe, its first corpus first, and what to note of them. No benchmark prompt may be among them."""
    rows: list[Any] = []
    record: dict[str, Any] = {}
    sizes, refused = {}, {}
    for corpus in RECIPES[name].corpora:
        more, refused[corpus] = rows_of(study, corpus, processor, len(rows))
        rows += more
        sizes[corpus] = len(more)
        if corpus == "replay":
            record["replayed"] = [row.id for row in more]
    data.intake.refuse_leaks(rows, [*study.items(), *study.items("validation")])
    record["refused"] = {corpus: named[:NAMED] for corpus, named in refused.items()}
    return rows, {"rows": sizes, "dropped": {corpus: data.intake.tally(named) for corpus, named in refused.items()}, **record}


def make_tuned(study: Study, work: Path, name: str) -> dict[str, Any]:
    """Train by a recipe, choose a checkpoint, keep that one, and note what all of them did on the validation pairs.

    What is done is left in files, so that a kill in the choice costs no training.
    """
    scratch, done = work / "training", work / "history.json"
    start = study.checkpoints(RECIPES[name].start)[-1]
    rows, fit, record = prepared(study, name, models.checkpoints.load_processor(start))
    if not done.exists():
        history = train_by(study, name, scratch, start, rows, fit, record["rows"][RECIPES[name].corpora[0]])
        store.write_text(done, json.dumps(history))
    if not (work / "validation.parquet").exists():
        training.checkpoints.settle(scratch, models.checkpoints.load_processor(start), start, fit.saved)
        history = json.loads(done.read_text(encoding="utf-8"))
        validated = _validated(study, [start, *sorted(scratch.glob("step-*"))], training.trainers.tokens_seen(history))
        best = max(validated[1:], key=lambda line: line["score"])  # of equals the first, which took the fewest steps
        store.write_rows(work / "validation.parquet", [{**line, "chosen": line is best} for line in validated])
    best = next(line for line in store.read_rows(work / "validation.parquet") if line["chosen"])
    store.write_text(work / "refused.json", json.dumps(record.pop("refused"), indent=1))
    if "replayed" in record:
        store.write_text(work / "replayed.json", json.dumps(record.pop("replayed")))
    folder = f"step-{best['step']:06d}"
    if (scratch / folder).exists():
        shutil.move(scratch / folder, work / folder)
    drop(scratch)
    band = frozen_band(study, RECIPES[name].method)
    return {**record, **band, "steps": fit.steps, **{f"chosen_{key}": best[key] for key in ("step", "tokens", "score")}}


def prepared(study: Study, name: str, processor: Any) -> tuple[list[Any], Fit, dict[str, Any]]:
    """The rows of a recipe, its fit with the steps that they take (its own are for its first corpus alone, or for as many rows as
    it says), and what to note of them."""
    rows, record = _corpora(study, name, processor)
    first, fit = record["rows"][RECIPES[name].corpora[0]], base_fit(study, name)
    return rows, following(fit, len(rows), first), record


def train_by(
    study: Study, name: str, folder: Path, start: Path, rows: Sequence[Any], fit: Fit, first: int = 0
) -> list[dict[str, float]]:
    """Train the model in the folder `start` by a recipe's objective: what was logged.

    `first`: how many rows are of its first corpus, for an objective that tells corpora apart.
    """
    recipe, tuning, bar = RECIPES[name], study.scale.tuning, Bar(name, fit.steps)
    milestones = tuple(sorted({max(1, round(share * fit.steps)) for share in (*tuning.milestones, 1.0)}))
    if recipe.objective == "grpo":
        return _rewarded(study, name, folder, start, rows, fit, milestones, bar)
    band = tuple(frozen_band(study, RECIPES[name].method).get("band", ())) or None
    job = training.launch.Job(
        recipe.objective, recipe.method, str(start), str(folder), fit, study.scale.lora, study.seed, milestones, band,
        tuning.preference if recipe.objective == "dpo" else None, first=first,
    )  # fmt: skip
    pictured = any(row.images for row in rows)
    dataset = (
        training.datasets.pair_dataset(rows, pictured)
        if recipe.objective == "dpo"
        else training.datasets.chat_dataset(rows, with_images=True)
    )
    return training.launch.trained(job, dataset, bar, project_root())[0]


def _rewarded(
    study: Study, name: str, folder: Path, start: Path, rows: Sequence[Any], fit: Fit, milestones: Sequence[int], bar: Bar
) -> list[dict[str, float]]:
    """What GRPO logged. It trains in this process: its reward is a model of this study and not a file that others could read.

    Raises:   ValueError where the model, its gradients and AdamW's state do not fit one GPU: before it samples anything
    """
    if fit.launch:
        raise ValueError("GRPO is trained in one process; leave `launch` out of tuning.rollout.fit")
    model = models.trainable.choose(models.checkpoints.load(start), "full", study.scale.lora)
    needed, there = TRAINED * model.num_parameters(only_trainable=True), models.devices.memory()
    if there and needed > there:
        raise ValueError(f"GRPO is not sharded: weights, gradients and optimiser take {needed / 1e9:.0f} GB and this GPU has "
                         f"{there / 1e9:.0f}; `tuning: {{without: [{name}]}}` in the scale leaves it out")  # fmt: skip
    reward = data.guards.reward_by(data.guards.opened(study.folder(GUARD)), rows, study.scale.tuning.rollout.reward)
    spec = dataclasses.replace(study.scale.tuning.rollout, fit=fit)
    how = (folder, study.seed, milestones, bar)
    return training.trainers.grpo(
        model, reward, models.checkpoints.load_processor(start), training.datasets.prompt_dataset(rows), spec, *how
    )


def _validated(study: Study, folders: Sequence[Path], tokens: Sequence[int]) -> list[dict[str, Any]]:
    """What the start (step 0) and every checkpoint do on the validation pairs.

    Without validation pairs the last checkpoint counts, as in the paper.
    """
    steps = [0, *(step_of(folder) for folder in folders[1:])]
    if study.scale.tuning.pairs:
        scores = evaluation.validation.checkpoint_scores(folders, validation_items(study), study.scale.exam)
    else:
        scores = [{"score": float(step)} for step in steps]
    return [{"step": step, "tokens": tokens[step - 1] if step else 0, **row} for step, row in zip(steps, scores, strict=True)]


def validation_items(study: Study) -> list[Item]:
    """The items that checkpoints and merges are chosen by: the miniature's preference pairs, or official requests."""
    if study.scale.loaded:
        return evaluation.validation.official_items(
            study.items("validation"), study.scale.tuning.pairs or study.scale.merging.requests
        )
    return evaluation.validation.preference_items(study.world(), study.scale.tuning.pairs)


def examination(name: str) -> str:
    """The stage that examines a tuned model."""
    return f"examination/{name.replace('/', '.')}"


def examined(grid: str = "default") -> list[str]:
    """The examinations of the tuned models of a grid; "full" holds the default one."""
    return [f"examination/safety.{name}" for name, recipe in RECIPES.items() if grid == "full" or recipe.grid == grid]


REFERENCES = tuple(f"examination/{MAIN_LINE[name].replace('/', '.')}" for name in ("parent", "adapted"))


def judging(grid: str) -> str:
    """The stage in which the reward's guard judges what a grid has tuned."""
    return f"judging/guard-text{'' if grid == 'default' else '.full'}"


def make_judging(study: Study, work: Path, grid: str = "default") -> dict[str, Any]:
    """Raw rows of the reward's own guard on stored responses, beside the verdicts of the other judges in the same table."""
    guard, items, rows = data.guards.opened(study.folder(GUARD)), study.items(), []
    for name in (needed for needed in study.inputs(judging(grid)) if needed.startswith("examination/")):
        raw = [row for row in study.rows(name, "raw.parquet") if row["exam"] == "full"]
        harmful = {row["item"]: row for row in raw if row["benchmark"] in JUDGED and row["harmful"]}.values()
        rows += evaluation.examine.guard_rows(guard, JUDGE, items, list(harmful), study.rows(name, "responses.parquet"))
    store.write_rows(work / "raw.parquet", rows)
    return {"rows": len(rows)}
