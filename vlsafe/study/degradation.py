"""Notebook 03: the examination of every model on the way, and of the same requests under altered prompts.

At a scale that is built, whose judges are all rules, generation and judging are one stage; at one that is loaded these stages
leave responses and the verdicts of rules, and `judging` asks the models that judge.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlsafe import evaluation, models
from vlsafe.core import store
from vlsafe.core.schema import Item, to_row
from vlsafe.evaluation.benchmarks import confounds
from vlsafe.evaluation.examine import Examination
from vlsafe.study.study import KEPT, Bar, Study, step_of


def examined(study: Study, name: str, folder: Path, items: Sequence[Item], exam: str, work: Path | None = None) -> Examination:
    """One checkpoint of a run, examined by the scale's engine; answers are kept in `work` as they come."""
    items = evaluation.examine.answerable(items, models.checkpoints.is_multimodal(folder))
    model = f"{study.backbone}/{name}" + (f"/step-{step_of(folder):06d}" if exam == "panel" else "")
    record = {**study.coordinates(name), "scale": study.scale.name, "model": model, "step": step_of(folder), "exam": exam}
    bar = Bar(f"{model} {exam}", len(items))
    keep = work / KEPT.format(f"{exam}-{step_of(folder)}") if work else None
    return evaluation.examine.examine(folder, items, study.scale.exam, record, bar, keep)


def make_examination(study: Study, work: Path, name: str) -> dict[str, Any]:
    """Examine every checkpoint of a run: the panel for those on the way, all items for the last one."""
    items, folders = study.items(), study.checkpoints(name)
    few = evaluation.examine.panel(items, study.scale.exam.panel)
    results = [examined(study, name, folder, few, "panel", work) for folder in folders[:-1]]
    return written(work, [*results, examined(study, name, folders[-1], items, "full", work)])


def response_params(study: Study) -> Any:
    """The numbers that responses depend on, judges that are models left aside."""
    exam, names = study.scale.exam, evaluation.judges.JUDGES
    rules = {benchmark: tuple(name for name in judges if name in names) for benchmark, judges in exam.judges.items()}
    return dataclasses.replace(exam, judges=rules, endpoints={})


def make_confounds(study: Study, work: Path, name: str) -> dict[str, Any]:
    """Examine the last checkpoint of a run on the same requests with and without a system prompt and an empty picture."""
    items = confounds.variants(study.items(), study.stream("confounds"))
    if not items:
        raise ValueError("no item of the benchmarks that are examined can be asked in altered prompts")
    return written(work, [examined(study, name, study.checkpoints(name)[-1], items, "confounds", work)])


def written(work: Path, results: Sequence[Examination]) -> dict[str, Any]:
    responses = [to_row(response) for result in results for response in result.responses]
    store.write_rows(work / "responses.parquet", responses)
    store.write_rows(work / "raw.parquet", [row for result in results for row in result.rows])
    return {"models": len(results), "responses": len(responses)}


def engines_agree(study: Study, name: str, command: str) -> list[dict[str, Any]]:
    """The panel answered by the local engine and by a server of the same checkpoint: how far they agree."""
    folder, exam = study.checkpoints(name)[-1], study.scale.exam
    items = [item for item in evaluation.examine.panel(study.items(), exam.panel) if item.scoring == "generated"]
    results = {
        engine: evaluation.examine.examine(folder, items, dataclasses.replace(exam, serve=serve), {"model": name})
        for engine, serve in (("local", ""), ("served", command))
    }
    return evaluation.servers.agreement({e: r.rows for e, r in results.items()}, {e: r.responses for e, r in results.items()})
