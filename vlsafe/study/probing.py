"""Notebook 05: where the parent keeps its safety, which layers adaptation and tuning move, whether their gradients conflict."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlsafe import evaluation, inspection, models, training
from vlsafe.core import store
from vlsafe.core.schema import MAIN_LINE, Item
from vlsafe.study import adaptation, tuning
from vlsafe.study.study import Study, drop, step_of

PARENT, STAGE_1, ADAPTED = (MAIN_LINE[name] for name in ("parent", "stage 1", "adapted"))
LOCALISATION, DIRECTION = "probe/localisation", "probe/direction"
TUNED = ("safety/sl-full", "safety/dpo-both-full")  # compared with the parent beside the adapted model
SIBLING = "safety/sibling-full"
ARMS = tuple(f"instruct/{name}" for name, recipe in adaptation.RECIPES.items() if recipe.grid == "default" and not recipe.dose)
TASKS = {  # pair of task vectors -> (start, end) of the safety one; the other is always stage 2's
    "sibling": (STAGE_1, SIBLING), "sl": (ADAPTED, TUNED[0]), "dpo": (ADAPTED, TUNED[1]),
}  # fmt: skip


def model_columns(study: Study, run: str, folder: Path) -> dict[str, Any]:
    """The columns that name the model in a checkpoint's folder: backbone, seed, stage, recipe, step."""
    return {**study.coordinates(run), "step": step_of(folder)}


def validation_part(study: Study) -> list[Item]:
    """The validation part of the official items; none in the miniature, whose prompts are written when they are needed."""
    return study.items("validation") if study.scale.loaded else []


def nothing_to_choose_by(study: Study) -> str | None:
    """Why a scale lacks what is chosen on validation items alone."""
    free = study.scale.loaded and not study.scale.exam.validation
    return "a layer is chosen on validation items, and exam.validation is 0" if free else None


def parent_of(study: Study) -> tuple[Any, Any]:
    """The parent, and how it reads prompts. Where others have trained the adapted model: that model with its parent's language
    weights, because the parent itself may have another template, other tokens and another mask."""
    folder = study.folder(PARENT)
    whole = study.checkpoints(ADAPTED)[-1] if study.adopted else folder
    model = models.checkpoints.ready(whole, study.scale.exam.dtype)
    if study.adopted:
        models.checkpoints.put_language(model, models.checkpoints.language_places(folder))
    return model, models.checkpoints.load_processor(whole)


def make_localisation(study: Study, work: Path) -> dict[str, Any]:
    """Locate the parent's safety band; where none is found, the published one at the same relative depth stands in, marked so."""
    (model, processor), search = parent_of(study), study.scale.search
    free = study.scale.loaded and not study.scale.exam.validation  # then every item is reported, and nothing may be chosen
    official = study.items() if free else validation_part(study)
    items = evaluation.prompts.localisation_prompts(study.world(), search.prompts, official)
    normal, harmful = (
        inspection.states.last_states(model, processor, evaluation.prompts.conversations(items[kind]))
        for kind in ("normal", "harmful")
    )
    curves = inspection.states.angular_gap(normal, harmful, search.pairs, study.stream("localisation"))

    @functools.cache
    def refused(band: tuple[int, int], factor: float) -> np.ndarray:
        with inspection.states.scaled(model, band, factor):
            labels = evaluation.prompts.judged(model, processor, items["scary"], "xstest-strings", study.scale.exam.batch_size, 4)
        return labels == "2_full_refusal"

    def refusals(band: tuple[int, int], factor: float) -> int:
        return int(refused(band, factor).sum())

    layers = range(len(curves["gap"]))
    published = (round(6 * len(layers) / 32), max(1, round(15 * len(layers) / 32)))  # [6, 15) of 32 layers
    if free:
        counts = tuple((*published, factor, refusals(published, factor)) for factor in search.factors)
        located = inspection.states.Located(None, "exam.validation is 0: there are no items to choose a band by", counts)
    else:
        located = inspection.states.localise(curves["gap"], refusals, search.factors)
    store.write_rows(work / "curves.parquet", [{"layer": i, **{k: float(v[i]) for k, v in curves.items()}} for i in layers])
    columns = ("start", "end", "factor", "refusals")
    store.write_rows(work / "scaling.parquet", [dict(zip(columns, count, strict=True)) for count in located.counts])
    factor = located.counts[-1][2]
    bands = list(dict.fromkeys(count[:2] for count in located.counts if count[2] == factor != 1.0))
    chance = None
    if bands and not free:
        clusters = np.array([item.cluster for item in items["scary"]])
        scaled = np.stack([refused(band, factor) for band in bands])
        chance = inspection.states.by_chance(scaled, refused((0, 0), 1.0), clusters, study.stream("chance"))
    return {
        "band": list(located.band or published), "located": located.band is not None, "reason": located.reason,
        "prompts": len(items["scary"]), "p": chance,
    }  # fmt: skip


def make_direction(study: Study, work: Path) -> dict[str, Any]:
    """The parent's refusal direction in every layer, and the layer whose ablation makes it comply most.

    Prompts are about validation verb–object pairs; everything that uses the direction is about test ones.
    """
    from safetensors.torch import save_file

    (model, processor), exam = parent_of(study), study.scale.exam
    items = evaluation.prompts.probing_prompts(
        study.world(), "validation", study.scale.probing.prompts, ["text"], validation_part(study)
    )
    last = inspection.states.last_states(model, processor, evaluation.prompts.conversations(items), exam.batch_size)
    harmful = evaluation.prompts.attributes(items)["harmful"].to_numpy(copy=True)
    means = {"harmful": last[harmful].mean(0), "harmless": last[~harmful].mean(0)}
    directions, rows = inspection.causal.difference_of_means(last[harmful], last[~harmful]), []
    for layer, direction in enumerate(directions):
        with inspection.causal.ablated(model, direction):
            labels = evaluation.prompts.judged(model, processor, items, exam.judges, exam.batch_size, exam.max_new_tokens)
        complied = np.char.startswith(labels, "complied")
        shares = {"complied_harmful": float(complied[harmful].mean()), "complied_harmless": float(complied[~harmful].mean())}
        rows.append({"layer": layer, **shares, "score": sum(shares.values()) / 2})
    save_file({"direction": directions, **means}, work / "direction.safetensors")
    store.write_rows(work / "layers.parquet", rows)
    best = max(rows, key=lambda row: row["score"])  # of equals the first
    return {"layer": best["layer"], "score": best["score"], "prompts": len(items)}


def refusal_directions(study: Study) -> dict[str, Any]:
    """The parent's refusal "direction" of every layer, and the means "harmless" and "harmful" between which it runs; [L, D]."""
    from safetensors.torch import load_file

    return load_file(study.folder(DIRECTION) / "direction.safetensors")


def make_layers(study: Study, work: Path) -> dict[str, Any]:
    """How alike each model and its reference are in every layer: end points in full, checkpoints of stage 2 on fewer prompts.

    The reference has the parent's language weights. The states of the end points stay on disk.
    """
    probing, parent, batch_size = study.scale.probing, study.folder(PARENT), study.scale.exam.batch_size
    directions, rows, sets = refusal_directions(study), [], []
    world, official = study.world(), study.items() if study.scale.loaded else []
    sizes = (probing.prompts, probing.along)
    many, few = (evaluation.prompts.probing_prompts(world, "test", n, official=official) for n in sizes)
    of_many, of_few = evaluation.prompts.attributes(many), evaluation.prompts.attributes(few)
    for run in study.inputs("probe/layers")[2:]:  # all but the parent and its direction
        folder = study.checkpoints(run)[-1]
        model, states = model_columns(study, run, folder), work / "states" / run.replace("/", ".")
        pair = inspection.states.keep_pair(folder, parent, evaluation.prompts.conversations(many), states, batch_size)
        rows += inspection.states.compare_prompts(pair, of_many, directions).assign(**model).to_dict("records")
        sets += [row | model for row in inspection.states.compare_sets(pair, of_many)]
    for folder in study.checkpoints(ADAPTED)[:-1]:
        model = model_columns(study, ADAPTED, folder)
        pair = inspection.states.keep_pair(folder, parent, evaluation.prompts.conversations(few), work / "passing", batch_size)
        rows += inspection.states.compare_prompts(pair, of_few, directions, probes=False).assign(**model).to_dict("records")
        drop(work / "passing")
    store.write_rows(work / "prompts.parquet", of_many[["item", "group", "harmful", "cluster"]].to_dict("records"))
    store.write_rows(work / "layers.parquet", rows)
    store.write_rows(work / "sets.parquet", sets)
    return {"prompts": len(many), "prompts_along": len(few)}


def make_drift(study: Study, work: Path) -> dict[str, Any]:
    """How far the weights of all checkpoints have moved from the parent's, and how alike their states on text are."""
    official = study.items() if study.scale.loaded else []
    items = evaluation.prompts.probing_prompts(study.world(), "test", study.scale.probing.along, ["text"], official)
    attributes, conversations = evaluation.prompts.attributes(items), evaluation.prompts.conversations(items)

    def states_of(model: Any, processor: Any) -> Any:
        return inspection.states.last_states(model, processor, conversations, study.scale.exam.batch_size)

    parent, reference = models.checkpoints.language_places(study.folder(PARENT)), states_of(*parent_of(study))
    drift, alike, n = [], [], 0
    for run in study.inputs("probe/drift")[1:]:  # all but the parent
        folders = study.checkpoints(run)
        n += len(folders)
        for folder in folders:
            places, model = models.checkpoints.language_places(folder), model_columns(study, run, folder)
            drift += [row | model for row in inspection.states.drift(parent, places, with_rank=folder == folders[-1])]
            loaded = models.checkpoints.ready(folder, study.scale.exam.dtype), models.checkpoints.load_processor(folder)
            rows = inspection.states.compare_states(states_of(*loaded), reference, attributes.drop(columns="group"))
            alike += [model | row for row in rows.to_dict("records")]
    store.write_rows(work / "drift.parquet", drift)
    store.write_rows(work / "alike.parquet", alike)
    return {"checkpoints": n, "prompts": len(items)}


def make_objectives(study: Study, work: Path) -> dict[str, Any]:
    """Whether safety tuning and stage 2 want the same of the weights: cosines of task vectors, and of gradients on the way."""

    def ends(*runs: str) -> Any:
        return tuple(models.checkpoints.language_places(study.checkpoints(run)[-1]) for run in runs)

    model, stage_2 = {"backbone": study.backbone, "seed": study.seed}, ends(STAGE_1, ADAPTED)
    vectors = [
        {**model, "pair": name, **row}
        for name, task in TASKS.items()
        for row in inspection.states.alignment(stage_2, ends(*task))
    ]
    store.write_rows(work / "vectors.parquet", vectors)
    folders = [study.checkpoints(STAGE_1)[-1], *study.checkpoints(ADAPTED)]
    processor = models.checkpoints.load_processor(folders[0])
    dataset = {"vl": tuning.rows_of(study, "general", None, 0)[0], "safety": tuning.rows_of(study, "safety", processor, 0)[0]}
    chosen, rows = np.unique(np.linspace(0, len(folders) - 1, study.scale.probing.gradient_points).round().astype(int)), []
    for number in chosen:
        step = step_of(folders[number]) if number else 0
        drop(work / "gradients")
        files = [file for task in dataset for file in _gradients(study, folders[number], task, dataset[task], work / "gradients")]
        rows += [{**model, "layer": row["layer"], "step": step} | row for row in inspection.states.compare_gradients(files)]
    drop(work / "gradients")
    store.write_rows(work / "gradients.parquet", rows)
    return {"points": len(chosen), "batches": study.scale.probing.gradient_batches}


def _gradients(study: Study, folder: Path, task: str, rows: Sequence[Any], work: Path) -> list[Path]:
    """The gradients of a few batches of one task at a checkpoint, one file each; the model does not move."""
    from safetensors.torch import save_file

    fit = dataclasses.replace(study.scale.instruct, steps=study.scale.probing.gradient_batches, grouped=False)  # each row once
    size, rng = fit.steps * fit.batch_size, study.stream(f"gradients {task}")
    dataset = training.datasets.chat_dataset(
        [rows[i] for i in rng.choice(len(rows), size, replace=len(rows) < size)], with_images=True
    )
    model, files = models.trainable.choose(models.checkpoints.load(folder), "full", study.scale.lora), list[Path]()
    work.mkdir(exist_ok=True)

    def save() -> None:
        gradients = {
            k: w.grad.contiguous() for k, w in models.architectures.language_weights(model).items() if w.grad is not None
        }
        files.append(work / f"{task}-{len(files):03d}.safetensors")
        save_file(gradients, files[-1])

    training.trainers.gradients(
        model, models.checkpoints.load_processor(folder), dataset, fit, work / f"trainer-{task}", study.seed, save
    )
    return files
