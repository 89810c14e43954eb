"""Notebook 05: interventions and how models respond then: transplanted blocks, removed or added directions, frozen blocks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from vlsafe import evaluation, inspection, models
from vlsafe.core import store
from vlsafe.study import adaptation
from vlsafe.study.degradation import response_params
from vlsafe.study.probing import ADAPTED, DIRECTION, LOCALISATION, PARENT, STAGE_1, refusal_directions
from vlsafe.study.study import KEPT, Bar, Study, drop, step_of

FROZEN_SETS = ("sppft/bands", "sppft/random")
SPPFT = "filtered-sppft"  # the recipe of stage 2 whose frozen blocks are varied
Rows = list[dict[str, Any]]


def exam_params(study: Study) -> list[Any]:
    """The numbers that every examination of an intervention depends on."""
    return [response_params(study), study.scale.probing.items]


def examiner(study: Study, folder: Path, stage: str, work: Path) -> Callable[..., Rows]:
    """An examination to hand to `inspection.causal`: a model in memory and its name -> rows of the raw table.

    The model is one of the checkpoint in `folder`, whose processor it takes. Answers are kept in `work`, by these names.
    """
    processor, exam = models.checkpoints.load_processor(folder), study.scale.exam
    sees = models.checkpoints.is_multimodal(folder)
    items = evaluation.prompts.intervention_items(study.items(), study.scale.probing.items, sees)
    rules = evaluation.judges.JUDGES  # too many models are examined here for judges that are models
    marks = {name: [judge for judge in judges if judge in rules] for name, judges in exam.judges.items()}

    def examination(model: Any, recipe: str, step: int = 0, stage: str = stage) -> Rows:
        name = f"{study.backbone}/{stage}/{recipe}/step-{step:06d}"
        kept = evaluation.engines.Kept(work / KEPT.format(f"{stage}-{recipe}-{step}"))
        more = exam.batch_size, exam.max_new_tokens, lambda done: None, kept
        responses = evaluation.engines.respond(model, processor, items, name, *more)
        record = {"scale": study.scale.name, "backbone": study.backbone, "seed": study.seed, "model": name}
        return evaluation.examine.raw_table(
            items, responses, {**record, "stage": stage, "recipe": recipe, "step": step, "exam": "patched"}, marks
        )

    return examination


def examine_checkpoints(folders: Sequence[Path], dtype: str, examine: Callable[..., Rows], stage: str, recipe: str) -> Rows:
    """Checkpoints of one training, examined as an intervention is: the curve that gives attack success at equal helpfulness."""
    return [row for folder in folders for row in examine(models.checkpoints.ready(folder, dtype), recipe, step_of(folder), stage)]


def make_transplants(study: Study, work: Path) -> dict[str, Any]:
    """The parent's blocks in the adapted model, by bands and random sets; the adapted model's in the parent at the located width.

    The parent has the adapted vision tower and projector there: it is the adapted model with the parent's language weights.
    """
    probing, band = study.scale.probing, study.numbers(LOCALISATION)["band"]
    folders, start = study.checkpoints(ADAPTED), study.checkpoints(STAGE_1)[-1]
    dtype, examine = study.scale.exam.dtype, examiner(study, folders[-1], "causal", work)
    model = models.checkpoints.ready(folders[-1], dtype)
    own = {name: weight.detach().clone() for name, weight in models.architectures.language_weights(model).items()}
    parent = {
        name: models.checkpoints.read_tensor(place)
        for name, place in models.checkpoints.language_places(study.folder(PARENT)).items()
    }
    n, width, rng = len(models.architectures.language_layers(model)), band[1] - band[0], study.stream("random blocks")
    widths = sorted({w for w in (*probing.widths, width) if w < n})
    every = (*range(n), inspection.causal.EVERYTHING)
    patches = inspection.causal.bands(n, widths)
    patches += [patch for w in widths for patch in inspection.causal.random_sets(n, w, probing.random_sets, rng)]
    patches += [inspection.causal.Patch(*of) for of in (("rest", every[-1:]), ("blocks", every[:-1]), ("all", every))]
    reverse = [inspection.causal.Patch("reverse", patch.blocks) for patch in inspection.causal.bands(n, [width]) if width < n]
    curve = examine(models.checkpoints.ready(start, dtype), "filtered", 0, "projector")
    curve += examine_checkpoints(folders, dtype, examine, *ADAPTED.split("/"))
    rows = [{**row, "kind": "curve", "blocks": None} for row in curve]
    rows += inspection.causal.transplants(model, parent, patches, examine, Bar("transplants", len(patches)))
    with inspection.causal.transplanted(model, parent, every):
        rows += inspection.causal.transplants(model, own, reverse, examine)
    store.write_rows(work / "raw.parquet", rows)
    return {"patches": len(patches) + len(reverse), "band": band, "items": len({row["item"] for row in rows})}


def make_directions(study: Study, work: Path) -> dict[str, Any]:
    """The refusal direction removed from the parent and from the adapted model, and added to the adapted one; random ones beside.

    A random direction is as long as the refusal direction itself.
    """
    import torch

    probing, layer = study.scale.probing, study.numbers(DIRECTION)["layer"]
    direction, rng = refusal_directions(study)["direction"][layer], study.stream("random directions")
    drawn = [torch.from_numpy(rng.normal(size=len(direction))).float() for _ in range(probing.random_directions)]
    others = [other / other.norm() * direction.norm() for other in drawn]
    rows: Rows = []
    for run, strengths in ((PARENT, ()), (ADAPTED, probing.strengths)):
        folder = study.checkpoints(run)[-1]
        model, examine = models.checkpoints.ready(folder, study.scale.exam.dtype), examiner(study, folder, "directed", work)
        for what, strength, number, operation in _operations(model, layer, direction, others, strengths):
            columns = {"of": run, "what": what, "strength": strength, "number": number}
            with operation:
                rows += [row | columns for row in examine(model, f"{run.replace('/', '.')}-{what}-{strength:g}-{number}")]
    store.write_rows(work / "raw.parquet", rows)
    return {"layer": layer, "directions": len(others)}


def _operations(model: Any, layer: int, direction: Any, others: Sequence[Any], strengths: Sequence[float]) -> Iterator[tuple]:
    """What is done to a model, at which strength, with which random direction (0 for the refusal direction), as a context."""
    yield "none", 0.0, 0, contextlib.nullcontext()
    yield "ablated", 1.0, 0, inspection.causal.ablated(model, direction)
    for k, other in enumerate(others):
        yield "ablated-random", 1.0, k, inspection.causal.ablated(model, other)
    for strength in strengths:
        yield "added", strength, 0, inspection.causal.added(model, strength * direction, layer)
        for k, other in enumerate(others):
            yield "added-random", strength, k, inspection.causal.added(model, strength * other, layer)


def make_frozen(study: Study, work: Path, which: str) -> dict[str, Any]:
    """Stage 2 with a set of blocks frozen, once for each band of the located width, or for random sets of as many blocks.

    Only rows are kept: one model exists at a time, and a set whose rows are there is not trained again.
    """
    band, start = study.numbers(LOCALISATION)["band"], study.checkpoints(STAGE_1)[-1]
    n, width = len(models.architectures.language_layers(models.checkpoints.load(start))), band[1] - band[0]
    patches = inspection.causal.bands(n, [width])
    if which == "random":
        patches = inspection.causal.random_sets(n, width, study.scale.probing.frozen_sets, study.stream("random frozen blocks"))
    files = {patch: work / f"{patch.name}.parquet" for patch in patches}
    (fit, milestones), scratch = adaptation.stage_2(study, SPPFT), work / "training"
    examine, dataset, rows = examiner(study, start, "sppft", work), study.examples("screen/filtered", "instructions.parquet"), []
    for patch, file in files.items():
        if not file.exists():
            drop(scratch)
            adaptation.trained(study, scratch, start, dataset, "sppft", fit, milestones, patch.name, blocks=patch.blocks)
            columns = {"kind": patch.kind, "blocks": patch.name, "located": patch.blocks == tuple(range(*band))}
            folders = sorted(scratch.glob("step-*"))
            results = examine_checkpoints(folders, study.scale.exam.dtype, examine, "sppft", patch.name)
            store.write_rows(file, [row | columns for row in results])
            drop(scratch)
        rows += store.read_rows(file)
    if rows:
        store.write_rows(work / "raw.parquet", rows)
    for file in files.values():
        file.unlink()
    return {"sets": len(patches), "width": width, "band": band}
