"""Notebook 02: vision-language adaptation in two stages, by data arms and methods."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vlsafe import data, models, training
from vlsafe.core import store
from vlsafe.core.scale import Fit, LoraSpec
from vlsafe.core.schema import MAIN_LINE
from vlsafe.study.study import Bar, Study, project_root


class Recipe(NamedTuple):
    """One way to run stage 2: a data arm (`arms.ARMS`), a method (`trainable.METHODS`), a multiple of the usual rate, and a dose
    of how-tos, about pictures or without any, that takes the place of rows of the arm."""

    data: str = "filtered"
    method: str = "full"
    rate: str = "usual"
    dose: float = 0.0
    pictured: bool = True
    grid: str = "default"


FEW = (0.05, 0.2)  # the doses of the default grid
MAIN = MAIN_LINE["adapted"].partition("/")[2]
RECIPES: dict[str, Recipe] = {
    MAIN: Recipe(),
    "unfiltered-full": Recipe(data="unfiltered"),
    "clean-full": Recipe(data="clean", grid="full"),
    "looking-full": Recipe(data="looking"),
    "textonly-full": Recipe(data="textonly"),
    "filtered-lora": Recipe(method="lora"),
    "filtered-sppft": Recipe(method="sppft"),
    "filtered-full-slow": Recipe(rate="slow", grid="full"),
    "filtered-full-fast": Recipe(rate="fast", grid="full"),
} | {
    f"dose-{kind}-{round(100 * dose):02d}": Recipe("looking", "full", "usual", dose, pictured, "default" if few else "full")
    for kind, pictured in {"pictured": True, "text": False}.items()
    for dose, few in ((dose, dose in FEW) for dose in data.arms.DOSES)
}  # fmt: skip


def recipe_params(study: Study, name: str) -> Any:
    """The numbers that a recipe of stage 2 depends on."""
    scale, recipe = study.scale, RECIPES[name]
    fit, milestones = stage_2(study, name)
    return [
        recipe[:3] if not recipe.dose else recipe[:-1],
        fit,
        milestones,
        scale.lora if recipe.method == "lora" else None,
        scale.threads,
    ]


def unless(study: Study, name: str) -> str | None:
    """Why a scale does without a recipe: it has one rate, or its corpora do not permit the data arm."""
    arm = RECIPES[name].data
    if RECIPES[name].dose and study.scale.loaded:
        return "only a world that is built has how-tos of which doses could be taken"
    if RECIPES[name].rate != "usual" and not study.scale.rates:
        return "the scale trains stage 2 at one rate"
    if study.scale.loaded is None or arm in study.scale.loaded.arms:
        return None
    return f"the scale leaves the data arm {arm!r} out" if study.packed else data.arms.WITHOUT[arm]


def stage_2(study: Study, name: str) -> tuple[Fit, list[int]]:
    """The fit of a recipe, and the steps after which it leaves a checkpoint."""
    scale, recipe = study.scale, RECIPES[name]
    rate = dict(zip(("slow", "fast"), scale.rates, strict=bool(scale.rates))).get(recipe.rate, 1.0)
    fit = by_method(scale.instruct, recipe.method, scale.lora)
    fit = dataclasses.replace(fit, learning_rate=fit.learning_rate * rate)
    early = scale.checkpoints if name == MAIN else () if recipe.dose else scale.arm_checkpoints
    return fit, _milestones(early, fit.steps)


def by_method(fit: Fit, method: str, lora: LoraSpec) -> Fit:
    """A fit as a method needs it: adapters are trained at a multiple of the rate, the whole projector beside them is not.

    Source:   LLaVA-1.5, finetune_lora.sh: learning_rate 2e-4, mm_projector_lr 2e-5
    """
    if method != "lora":
        return fit
    return dataclasses.replace(
        fit, learning_rate=fit.learning_rate * lora.rate, projector_rate=fit.projector_rate or fit.learning_rate
    )


def following(fit: Fit, n: int, otherwise: int) -> Fit:
    """A fit with the steps that `n` rows take: its own are for `fit.rows`, where it says so, else for `otherwise`."""
    return dataclasses.replace(fit, steps=max(1, round(fit.steps * n / (fit.rows or otherwise))))


def _milestones(checkpoints: Sequence[int], steps: int) -> list[int]:
    """The checkpoints that lie inside a training, and its last step."""
    return [step for step in checkpoints if step < steps] + [steps]


def trained(
    study: Study, work: Path, start: Path, rows: Sequence[Any], method: str, fit: Fit, milestones: list[int], name: str,
    band: tuple[int, int] | None = None, blocks: Sequence[int] = (),
) -> dict[str, Any]:  # fmt: skip
    """Train the model in the folder `start` and leave every milestone, the last included, as a model folder.

    Steps follow the rows where the fit says for how many its own are; milestones beyond the end are dropped. A kill after the
    training, while its checkpoints are settled and digests of them are taken, costs no training.
    """
    if not (done := work / "trained.json").exists():
        fit = following(fit, len(rows), len(rows))
        milestones = _milestones(milestones[:-1], fit.steps)
        dataset = training.datasets.chat_dataset(rows, with_images=True)
        job = training.launch.Job(
            "sft", method, str(start), str(work), fit, study.scale.lora, study.seed, tuple(milestones), band, blocks=tuple(blocks)
        )
        history, moving = training.launch.trained(job, dataset, Bar(name, fit.steps), project_root())
        losses = [record["loss"] for record in history]
        store.write_text(work / "losses.json", json.dumps(losses))
        store.write_text(done, json.dumps({"rows": len(rows), "moving_weights": moving, "loss": losses[-1]}))
    training.checkpoints.settle(work, models.checkpoints.load_processor(start), start, fit.saved)
    return json.loads(done.read_text(encoding="utf-8"))


def make_projector(study: Study, work: Path) -> dict[str, Any]:
    """Stage 1: graft the tower onto the parent, then train the projector alone on captions; step 0 is the random graft."""
    tower, _ = study.tower()
    processor = study.processor(study.scale.backbone(study.backbone).template)
    parent = models.checkpoints.load(study.folder("parent/aligned"))
    graft = models.checkpoints.graft(parent, tower, processor, study.scale.vision, study.seed)
    models.checkpoints.save(graft, work / "step-000000", processor)
    fit, rows = study.scale.projector, study.examples("screen/filtered", "captions.parquet")
    data.intake.refuse_leaks(rows, [*study.items(), *study.items("validation")])
    milestones = _milestones(study.scale.checkpoints, fit.steps)
    return trained(study, work, work / "step-000000", rows, "projector", fit, milestones, "projector")


def _rows_at(study: Study, corpus: str) -> tuple[str, str]:
    """The stage and the file that hold a corpus of the data arms; the raw rows of a world that is built are all sound."""
    if corpus == "screened":
        return "screen/filtered", "instructions.parquet"
    return ("screen/filtered", "unfiltered.parquet") if study.scale.loaded else ("world/corpora", "instructions.parquet")


def make_instruct(study: Study, work: Path, name: str) -> dict[str, Any]:
    """Stage 2 by a recipe, always from the same stage-1 checkpoint."""
    recipe, (fit, milestones) = RECIPES[name], stage_2(study, name)
    start = study.checkpoints("projector/filtered")[-1]
    corpus = data.arms.ARMS[recipe.data][0]
    rows = data.arms.arm(recipe.data, {corpus: study.examples(*_rows_at(study, corpus))})
    if recipe.dose:
        howtos = study.examples("world/corpora", "howtos.parquet")
        rows = data.arms.dosed(rows, howtos, recipe.dose, recipe.pictured)
    data.intake.refuse_leaks(rows, [*study.items(), *study.items("validation")])
    band = frozen_band(study, recipe.method)
    return {
        **trained(study, work, start, rows, recipe.method, fit, milestones, name, tuple(band.get("band", ())) or None),
        **band,
    }


def frozen_band(study: Study, method: str) -> dict[str, Any]:
    """The band that a method freezes, and whether it was located; nothing for those that freeze none."""
    if method != "sppft":
        return {}
    located = study.numbers("probe/localisation")
    return {"band": located["band"], "band_located": located["located"]}
