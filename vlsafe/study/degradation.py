"""Notebook 03: the examination of every model on the way, and of the same requests under altered prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vlsafe.core import store
from vlsafe.core.schema import Item, to_row
from vlsafe.evaluation.examine import answered
from vlsafe.study.study import Bar, Study


def _examine(study: Study, name: str, folder: Path, asked: Sequence[Item], which: str) -> tuple[list[Any], list[Any]]:
    """Put to one checkpoint what it can be asked: rows of responses, and rows of the raw table."""
    from vlsafe.evaluation import examine
    from vlsafe.models import checkpoints as models_checkpoints

    exam, (stage, _, recipe) = study.scale.exam, name.partition("/")
    step = int(folder.name.split("-")[1]) if folder.name.startswith("step-") else 0
    model = f"{study.backbone}/{name}" + (f"/step-{step:06d}" if which == "panel" else "")
    chosen = examine.answerable(asked, models_checkpoints.is_multimodal(folder))
    given = answered(folder, chosen, model, exam, Bar(f"{model} {which}", len(chosen)))
    facts = {
        "scale": study.scale.name, "backbone": study.backbone, "seed": study.seed, "model": model,
        "stage": stage, "recipe": recipe, "step": step, "exam": which,
    }  # fmt: skip
    without = ("world",) if study.scale.loaded else ()  # nobody knows the truth there; `vlsafe score` marks the same responses
    return [to_row(response) for response in given], examine.raw_table(chosen, given, facts, without)


def make_examination(study: Study, work: Path, name: str) -> dict[str, Any]:
    """Every checkpoint of a run sits the panel, its last one the full examination."""
    from vlsafe.evaluation import examine

    asked, folders = study.items(), study.checkpoints(name)
    panel = examine.panel(asked, study.scale.exam.panel)
    sat = [_examine(study, name, folder, panel, "panel") for folder in folders[:-1]]
    return _written(work, [*sat, _examine(study, name, folders[-1], asked, "full")])


def make_confounds(study: Study, work: Path, name: str) -> dict[str, Any]:
    """The last checkpoint of a run answers the same requests with and without a system prompt and an empty picture."""
    from vlsafe.evaluation.benchmarks import confounds

    asked = confounds.variants(study.items(), study.stream("confounds"))
    return _written(work, [_examine(study, name, study.checkpoints(name)[-1], asked, "confounds")])


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
    from vlsafe.evaluation import examine, servers
    from vlsafe.models import checkpoints as models_checkpoints

    folder, exam = study.checkpoints(name)[-1], study.scale.exam
    asked = examine.answerable(examine.panel(study.items(), exam.panel), models_checkpoints.is_multimodal(folder))
    asked = [item for item in asked if item.scoring == "generated"]
    without, responses = ("world",) if study.scale.loaded else (), {}
    for engine, serve in (("local", ""), ("served", command)):
        responses[engine] = answered(folder, asked, name, dataclasses.replace(exam, serve=serve), lambda done: None)
    rows = {engine: examine.raw_table(asked, given, {}, without) for engine, given in responses.items()}
    return servers.agreement(rows, responses)
