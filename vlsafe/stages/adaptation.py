"""Vision-language adaptation in two stages, and the examination of every model on the way."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vlsafe import store
from vlsafe.scales import Exam, Fit
from vlsafe.schema import MAIN_LINE, Item, to_row
from vlsafe.stages.study import Bar, Study, checkpoints, examples, items, load_tower, processor_of, project_root, stream


class Recipe(NamedTuple):
    """One way to run stage 2: a data arm (`mix.ARMS`), a method (`trainable.METHODS`), a multiple of the usual rate."""

    data: str = "filtered"
    method: str = "full"
    rate: str = "usual"


MAIN = MAIN_LINE["adapted"].partition("/")[2]
RECIPES: dict[str, Recipe] = {
    MAIN: Recipe(),
    "unfiltered-full": Recipe(data="unfiltered"),
    "clean-full": Recipe(data="clean"),
    "looking-full": Recipe(data="looking"),
    "textonly-full": Recipe(data="textonly"),
    "filtered-lora": Recipe(method="lora"),
    "filtered-sppft": Recipe(method="sppft"),
    "filtered-full-slow": Recipe(rate="slow"),
    "filtered-full-fast": Recipe(rate="fast"),
}


def recipe_params(study: Study, name: str) -> Any:
    """The numbers that a recipe of stage 2 depends on."""
    scale, recipe = study.scale, RECIPES[name]
    fit, milestones = stage_2(study, name)
    return [list(recipe), fit, milestones, scale.lora if recipe.method == "lora" else None, scale.threads]


def stage_2(study: Study, name: str) -> tuple[Fit, list[int]]:
    """The fit of a recipe, and the steps after which it leaves a checkpoint."""
    scale, recipe = study.scale, RECIPES[name]
    rate = {"usual": 1.0, "slow": scale.rates[0], "fast": scale.rates[1]}[recipe.rate]
    rate *= scale.lora.rate if recipe.method == "lora" else 1.0
    fit = dataclasses.replace(scale.instruct, learning_rate=scale.instruct.learning_rate * rate)
    return fit, _milestones(scale.checkpoints if name == MAIN else scale.arm_checkpoints, fit.steps)


def _milestones(checkpoints: Sequence[int], steps: int) -> list[int]:
    """The checkpoints that lie inside a training, and its last step."""
    return [step for step in checkpoints if step < steps] + [steps]


def trained(
    study: Study, work: Path, start: Path, rows: Sequence[Any], method: str, fit: Fit, milestones: list[int], name: str,
    band: tuple[int, int] | None = None, blocks: Sequence[int] = (),
) -> dict[str, Any]:  # fmt: skip
    """Train the model in the folder `start` and leave every milestone, the last included, as a model folder.

    A kill after the training, while digests of what it left are taken, costs no training.
    """
    from vlsafe import launch, models, train

    if (done := work / "trained.json").exists():
        return json.loads(done.read_text(encoding="utf-8"))
    data = train.chat_dataset(rows, with_images=True)
    job = launch.Job(
        "sft", method, str(start), str(work), fit, study.scale.lora, study.seed, tuple(milestones), band, blocks=tuple(blocks)
    )
    history, moving = launch.trained(job, data, Bar(name, fit.steps), project_root())
    train.settle(work, models.load_processor(start), start, fit.saved)
    losses = [record["loss"] for record in history]
    store.write_text(work / "losses.json", json.dumps(losses))
    told = {"rows": len(rows), "moving_weights": moving, "loss": losses[-1]}
    store.write_text(done, json.dumps(told))
    return told


def make_projector(study: Study, work: Path) -> dict[str, Any]:
    """Stage 1: graft the tower onto the parent, then train the projector alone on captions; step 0 is the random graft."""
    from vlsafe import models

    tower, _ = load_tower(study)
    processor = processor_of(study, study.scale.backbone(study.backbone).template)
    parent = models.load(study.folder("parent/aligned"))
    graft = models.graft(parent, tower, processor, study.scale.vision, study.seed)
    models.save(graft, work / "step-000000", processor)
    fit, rows = study.scale.projector, examples(study, "screen/filtered", "captions.parquet")
    milestones = _milestones(study.scale.checkpoints, fit.steps)
    return trained(study, work, work / "step-000000", rows, "projector", fit, milestones, "projector")


def make_instruct(study: Study, work: Path, name: str) -> dict[str, Any]:
    """Stage 2 by a recipe, always from the same stage-1 checkpoint."""
    from vlsafe import mix

    recipe, (fit, milestones) = RECIPES[name], stage_2(study, name)
    start = checkpoints(study, "projector/filtered")[-1]
    raw = examples(study, "world/corpora", "instructions.parquet") if mix.ARMS[recipe.data][0] == "raw" else []
    rows = mix.arm(recipe.data, {"raw": raw, "screened": examples(study, "screen/filtered", "instructions.parquet")})
    located = study.numbers("probe/localisation") if recipe.method == "sppft" else None
    band = tuple(located["band"]) if located else None
    told = trained(study, work, start, rows, recipe.method, fit, milestones, name, band)
    return {**told, **({"band": located["band"], "band_located": located["located"]} if located else {})}


def instruct_of(name: str) -> Callable[[Study, Path], dict[str, Any]]:
    return lambda study, work: make_instruct(study, work, name)


def answered(folder: Path, asked: Sequence[Item], model: str, exam: Exam, progress: Callable[[int], None]) -> list[Any]:
    """Responses by the scale's engine, in the order of the items. Options are ranked locally, whoever writes the answers:
    servers do not tell likelihoods."""
    from vlsafe import engines, models, serving

    written = [item for item in asked if item.scoring == "generated"] if exam.serve else []
    ranked = [item for item in asked if item.scoring != "generated"] if exam.serve else asked
    given = serving.respond(exam.serve, folder, written, model, exam.max_new_tokens) if written else []
    if ranked:
        here, processor = models.ready(folder, exam.dtype), models.load_processor(folder)
        given += engines.respond(here, processor, ranked, model, exam.batch_size, exam.max_new_tokens, progress)
    by_item = {response.item: response for response in given}
    return [by_item[item.id] for item in asked]


def _examine(study: Study, name: str, folder: Path, asked: Sequence[Item], which: str) -> tuple[list[Any], list[Any]]:
    """Put to one checkpoint what it can be asked: rows of responses, and rows of the raw table."""
    from vlsafe import evaluate, models

    exam, (stage, _, recipe) = study.scale.exam, name.partition("/")
    step = int(folder.name.split("-")[1]) if folder.name.startswith("step-") else 0
    model = f"{study.backbone}/{name}" + (f"/step-{step:06d}" if which == "panel" else "")
    chosen = evaluate.answerable(asked, models.is_multimodal(folder))
    given = answered(folder, chosen, model, exam, Bar(f"{model} {which}", len(chosen)))
    facts = {
        "scale": study.scale.name, "backbone": study.backbone, "seed": study.seed, "model": model,
        "stage": stage, "recipe": recipe, "step": step, "exam": which,
    }  # fmt: skip
    without = ("world",) if study.scale.loaded else ()  # nobody knows the truth there; `vlsafe score` marks the same responses
    return [to_row(response) for response in given], evaluate.raw_table(chosen, given, facts, without)


def make_examination(study: Study, work: Path, name: str) -> dict[str, Any]:
    """Every checkpoint of a run sits the panel, its last one the full examination."""
    from vlsafe import evaluate

    asked, folders = items(study), checkpoints(study, name)
    panel = evaluate.panel(asked, study.scale.exam.panel)
    sat = [_examine(study, name, folder, panel, "panel") for folder in folders[:-1]]
    return _written(work, [*sat, _examine(study, name, folders[-1], asked, "full")])


def make_confounds(study: Study, work: Path, name: str) -> dict[str, Any]:
    """The last checkpoint of a run answers the same requests with and without a system prompt and an empty picture."""
    from vlsafe.benchmarks import confounds

    asked = confounds.variants(items(study), stream(study, "confounds"))
    return _written(work, [_examine(study, name, checkpoints(study, name)[-1], asked, "confounds")])


def _written(work: Path, sat: Sequence[tuple[list[Any], list[Any]]]) -> dict[str, Any]:
    responses, raw = ([row for rows in part for row in rows] for part in zip(*sat, strict=True))
    store.write_rows(work / "responses.parquet", responses)
    store.write_rows(work / "raw.parquet", raw)
    return {"models": len(sat), "responses": len(responses)}


def confounds_of(name: str) -> Callable[[Study, Path], dict[str, Any]]:
    return lambda study, work: make_confounds(study, work, name)


def examination_of(name: str) -> Callable[[Study, Path], dict[str, Any]]:
    return lambda study, work: make_examination(study, work, name)


def exam_params(study: Study) -> Any:
    return study.scale.exam


def engines_agree(study: Study, name: str, command: str) -> list[dict[str, Any]]:
    """The panel answered by the local engine and by a server of the same checkpoint: how far they agree."""
    from vlsafe import evaluate, models, serving

    folder, exam = checkpoints(study, name)[-1], study.scale.exam
    asked = evaluate.answerable(evaluate.panel(items(study), exam.panel), models.is_multimodal(folder))
    asked = [item for item in asked if item.scoring == "generated"]
    without, responses = ("world",) if study.scale.loaded else (), {}
    for engine, serve in (("local", ""), ("served", command)):
        responses[engine] = answered(folder, asked, name, dataclasses.replace(exam, serve=serve), lambda done: None)
    rows = {engine: evaluate.raw_table(asked, given, {}, without) for engine, given in responses.items()}
    return serving.agreement(rows, responses)
