"""Operations on models and what comes of them: transplanted blocks, a removed or added direction, blocks frozen in training."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from vlsafe.core import store
from vlsafe.core.schema import Item
from vlsafe.study import adaptation
from vlsafe.study.probing import ADAPTED, PARENT, STAGE_1, directions
from vlsafe.study.study import Bar, Study, drop

EXAMINED = ("sorry_bench", "mm_safetybench", "xstest", "mmbench", "mme", "seed_bench")
"""What an intervention is examined on: attack success, twins and exaggerated refusal, helpfulness."""
PROBED, FROZEN = "probe/localisation", "instruct/filtered-sppft"
FROZEN_SETS = ("sppft/bands", "sppft/random")
Rows = list[dict[str, Any]]


def exam_params(study: Study) -> Any:
    """The numbers that every examination of an intervention depends on."""
    return [study.scale.exam, study.scale.probing.items]


def asked_of(study: Study, multimodal: bool) -> list[Item]:
    """The panel of an intervention's examination."""
    from vlsafe.evaluation import examine as evaluation_examine

    chosen = evaluation_examine.panel(study.items(), study.scale.probing.items)
    return evaluation_examine.answerable([item for item in chosen if item.benchmark in EXAMINED], multimodal)


def examiner(study: Study, folder: Path, stage: str) -> Callable[..., Rows]:
    """An examination to hand to `causal`: a model in memory and a name -> rows of the raw table. Its processor is `folder`'s."""
    from vlsafe.evaluation import examine as evaluation_examine
    from vlsafe.evaluation.engines import respond
    from vlsafe.models import checkpoints

    processor, exam = checkpoints.load_processor(folder), study.scale.exam
    asked = asked_of(study, checkpoints.is_multimodal(folder))

    def examine(model: Any, recipe: str, step: int = 0, stage: str = stage) -> Rows:
        name = f"{study.backbone}/{stage}/{recipe}/step-{step:06d}"
        given = respond(model, processor, asked, name, exam.batch_size, exam.max_new_tokens)
        whose = {"scale": study.scale.name, "backbone": study.backbone, "seed": study.seed, "model": name}
        return evaluation_examine.raw_table(
            asked, given, {**whose, "stage": stage, "recipe": recipe, "step": step, "exam": "patched"}
        )

    return examine


def along(study: Study, run: str, examine: Callable[..., Rows]) -> Rows:
    """All checkpoints of a training, examined as an intervention is: the curve that gives attack success at equal helpfulness."""
    from vlsafe.models import checkpoints

    stage, _, recipe = run.partition("/")
    found = ((folder, int(folder.name.split("-")[1])) for folder in study.checkpoints(run))
    return [row for folder, step in found for row in examine(checkpoints.load(folder), recipe, step, stage)]


def make_transplants(study: Study, work: Path) -> dict[str, Any]:
    """The parent's blocks in the adapted model, by bands and random sets; the adapted model's in the parent at the located width.

    With everything of the parent's but the eyes, the model is the parent behind the adapted model's tower and projector:
    that is where the reverse begins.
    """
    from vlsafe.inspection import causal
    from vlsafe.models import architectures, checkpoints

    probing, band = study.scale.probing, study.numbers(PROBED)["band"]
    folder, start = study.checkpoints(ADAPTED)[-1], study.checkpoints(STAGE_1)[-1]
    model, examine = checkpoints.load(folder), examiner(study, folder, "causal")
    own = {name: weight.detach().clone() for name, weight in architectures.language_weights(model).items()}
    parent = {name: checkpoints.read_tensor(place) for name, place in checkpoints.language_places(study.folder(PARENT)).items()}
    n, width, rng = len(architectures.language_layers(model)), band[1] - band[0], study.world().rng("random blocks")
    widths = sorted({w for w in (*probing.widths, width) if w < n})
    every = (*range(n), causal.EVERYTHING)
    patches = causal.bands(n, widths)
    patches += [patch for w in widths for patch in causal.random_sets(n, w, probing.random_sets, rng)]
    patches += [causal.Patch("rest", (causal.EVERYTHING,)), causal.Patch("blocks", every[:-1]), causal.Patch("all", every)]
    bar = Bar("transplants", len(patches))
    rows = [row | {"kind": "curve", "blocks": None} for row in examine(checkpoints.load(start), "filtered", 0, "projector")]
    rows += [row | {"kind": "curve", "blocks": None} for row in along(study, ADAPTED, examine)]
    rows += causal.transplants(model, parent, patches, examine, bar)
    reverse = [causal.Patch("reverse", patch.blocks) for patch in causal.bands(n, [width])] if width < n else []
    with causal.transplanted(model, parent, every):
        rows += causal.transplants(model, own, reverse, examine)
    store.write_rows(work / "raw.parquet", rows)
    return {"patches": len(patches) + len(reverse), "band": band, "items": len(asked_of(study, True))}


def transplant_params(study: Study) -> Any:
    """The numbers that transplants depend on."""
    return [*exam_params(study), study.scale.probing.widths, study.scale.probing.random_sets]


def make_directions(study: Study, work: Path) -> dict[str, Any]:
    """The refusal direction taken out of the parent and of the adapted model, and added to the adapted one; random ones beside.

    A random direction is as long as the refusal direction itself.
    """
    import torch

    from vlsafe.models import checkpoints

    probing, layer = study.scale.probing, study.numbers("probe/direction")["layer"]
    direction = directions(study)["direction"][layer]
    rng = study.world().rng("random directions")
    drawn = [torch.from_numpy(rng.normal(size=len(direction))).float() for _ in range(probing.random_directions)]
    others = [other / other.norm() * direction.norm() for other in drawn]
    rows: Rows = []
    for run in (PARENT, ADAPTED):
        folder = study.checkpoints(run)[-1]
        model, examine = checkpoints.load(folder), examiner(study, folder, "directed")
        for what, strength, number, how in _operations(
            model, layer, direction, others, probing.strengths if run == ADAPTED else ()
        ):
            with how:
                sat = examine(model, f"{run.replace('/', '.')}-{what}-{strength:g}-{number}")
            rows += [row | {"of": run, "what": what, "strength": strength, "number": number} for row in sat]
    store.write_rows(work / "raw.parquet", rows)
    return {"layer": layer, "directions": len(others)}


def _operations(model: Any, layer: int, direction: Any, others: Sequence[Any], strengths: Sequence[float]) -> Iterator[tuple]:
    """What is done to a model, at which strength, with which direction (0: the refusal direction, or the first random one)."""
    from vlsafe.inspection import causal

    yield "none", 0.0, 0, contextlib.nullcontext()
    yield "ablated", 1.0, 0, causal.ablated(model, direction)
    for k, other in enumerate(others):
        yield "ablated-random", 1.0, k, causal.ablated(model, other)
    for strength in strengths:
        yield "added", strength, 0, causal.added(model, strength * direction, layer)
        for k, other in enumerate(others):
            yield "added-random", strength, k, causal.added(model, strength * other, layer)


def direction_params(study: Study) -> Any:
    """The numbers that operations with directions depend on."""
    return [*exam_params(study), study.scale.probing.strengths, study.scale.probing.random_directions]


def make_frozen(study: Study, work: Path, which: str) -> dict[str, Any]:
    """Stage 2 with a set of blocks frozen, once for each band of the located width, or for random sets of as many blocks.

    Only answers are kept: one model exists at a time, and a set whose answers are there is not trained again.
    """
    from vlsafe.inspection import causal
    from vlsafe.models import architectures, checkpoints

    band, start = study.numbers(PROBED)["band"], study.checkpoints(STAGE_1)[-1]
    n, width = len(architectures.language_layers(checkpoints.load(start))), band[1] - band[0]
    patches = causal.bands(n, [width])
    if which == "random":
        rng = study.world().rng("random frozen blocks")
        patches = causal.random_sets(n, width, study.scale.probing.frozen_sets, rng)
    examine, rows = examiner(study, start, "sppft"), []
    for patch in patches:
        file = work / f"{patch.name}.parquet"
        if not file.exists():
            told = {"kind": patch.kind, "blocks": patch.name, "located": patch.blocks == tuple(range(*band))}
            store.write_rows(file, [row | told for row in _frozen(study, work / "training", start, patch, examine)])
        rows += store.read_rows(file)
    if rows:
        store.write_rows(work / "raw.parquet", rows)
    for patch in patches:
        (work / f"{patch.name}.parquet").unlink()
    return {"sets": len(patches), "width": width, "band": band}


def _frozen(study: Study, work: Path, start: Path, patch: Any, examine: Callable[..., Rows]) -> Rows:
    """Answers of all checkpoints of one training, whose models are then dropped."""
    from vlsafe.models import checkpoints

    fit, milestones = adaptation.stage_2(study, FROZEN.partition("/")[2])
    rows = study.examples("screen/filtered", "instructions.parquet")
    drop(work)
    adaptation.trained(study, work, start, rows, "sppft", fit, milestones, patch.name, blocks=patch.blocks)
    folders = [(folder, int(folder.name.split("-")[1])) for folder in sorted(work.glob("step-*"))]
    sat = [row for folder, step in folders for row in examine(checkpoints.load(folder), patch.name, step)]
    drop(work)
    return sat


def frozen_by(which: str) -> Callable[[Study, Path], dict[str, Any]]:
    return lambda study, work: make_frozen(study, work, which)


def frozen_params(study: Study) -> Any:
    """The numbers that the SPPFT grid depends on."""
    fit, milestones = adaptation.stage_2(study, FROZEN.partition("/")[2])
    return [*exam_params(study), fit, milestones, study.scale.probing.frozen_sets, study.scale.threads]
