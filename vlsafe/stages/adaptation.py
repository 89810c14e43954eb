"""Vision-language adaptation in two stages, and the examination of every model on the way."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlsafe import store
from vlsafe.schema import to_row
from vlsafe.stages.study import Bar, Study, checkpoints, examples, items, load_tower, processor_of


def _milestones(study: Study, steps: int) -> list[int]:
    """The scale's checkpoints that lie inside a training, and its last step."""
    return [step for step in study.scale.checkpoints if step < steps] + [steps]


def _adapt(study: Study, work: Path, model: Any, processor: Any, corpus: str, method: str, fit: Any) -> dict[str, Any]:
    """Train one stage of the adaptation and leave every milestone, the last included, as a model folder."""
    from vlsafe import train, trainable

    moving = trainable.choose(model, method)
    rows = examples(study, "screen/filtered", f"{corpus}.parquet")
    data = train.chat_dataset(rows, with_images=True)
    name = f"{'projector' if method == 'projector' else 'instruct'}"
    losses = train.sft(model, processor, data, fit, work, study.seed, _milestones(study, fit.steps), Bar(name, fit.steps))
    train.settle(work, processor)
    store.write_text(work / "losses.json", json.dumps(losses))
    return {"rows": len(rows), "moving_weights": moving, "loss": losses[-1]}


def make_projector(study: Study, work: Path) -> dict[str, Any]:
    from vlsafe import models

    tower, _ = load_tower(study)
    processor = processor_of(study, study.scale.backbone(study.backbone).template)
    parent = models.load(study.folder("parent/aligned"))
    model = models.graft(parent, tower, processor, study.scale.vision, study.seed)
    models.save(model, work / "step-000000", processor)
    return _adapt(study, work, model, processor, "captions", "projector", study.scale.projector)


def make_instruct(study: Study, work: Path) -> dict[str, Any]:
    from vlsafe import models

    start = checkpoints(study, "projector/filtered")[-1]
    model, processor = models.load(start), models.load_processor(start)
    return _adapt(study, work, model, processor, "instructions", "full", study.scale.instruct)


def make_examination(study: Study, work: Path, name: str) -> dict[str, Any]:
    """Every checkpoint of a run sits the panel, its last one the full examination."""
    from vlsafe import evaluate, models
    from vlsafe.engines import respond

    asked, exam = items(study), study.scale.exam
    folders = checkpoints(study, name)
    responses, raw = [], []
    for folder in folders:
        which = "full" if folder == folders[-1] else "panel"
        step = int(folder.name.split("-")[1]) if folder.name.startswith("step-") else 0
        chosen = asked if which == "full" else evaluate.panel(asked, exam.panel)
        chosen = evaluate.answerable(chosen, models.is_multimodal(folder))
        model_name = f"{study.backbone}/{name}" + (f"/step-{step:06d}" if which == "panel" else "")
        given = respond(
            models.load(folder), models.load_processor(folder), chosen, model_name, exam.batch_size,
            exam.max_new_tokens, Bar(f"{model_name} {which}", len(chosen)),
        )  # fmt: skip
        stage, _, recipe = name.partition("/")
        facts = {
            "scale": study.scale.name, "backbone": study.backbone, "seed": study.seed, "model": model_name,
            "stage": stage, "recipe": recipe, "step": step, "exam": which,
        }  # fmt: skip
        responses += [to_row(response) for response in given]
        raw += evaluate.raw_table(chosen, given, facts)
    store.write_rows(work / "responses.parquet", responses)
    store.write_rows(work / "raw.parquet", raw)
    return {"models": len(folders), "responses": len(responses)}


def examination_of(name: str) -> Callable[[Study, Path], dict[str, Any]]:
    return lambda study, work: make_examination(study, work, name)


def exam_params(study: Study) -> Any:
    return study.scale.exam
