"""Looks inside a parent before it is adapted: where it keeps its safety.

Looks inside adapted and tuned models: which layers moved, which way, and whether the objectives pull against each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlsafe.core import store
from vlsafe.core.schema import MAIN_LINE, Item, Turn
from vlsafe.study import adaptation, tuning
from vlsafe.study.study import Study, drop

PROBED = {"normal": ("plain",), "harmful": ("harmful",), "scary": ("homonym", "safe_context")}


def published_band(layers: int) -> tuple[int, int]:
    """The published safety band [6, 15) of 32 layers, at the same relative depth."""
    return round(6 * layers / 32), round(15 * layers / 32)


def _localisation_prompts(world: Any, n: int) -> dict[str, list[Item]]:
    """About `n` how-tos of each kind on verb–object pairs of the validation split, which neither training nor a test asks about."""
    from vlsafe.data.miniature.language import HOW, question

    asked: dict[str, list[Item]] = {}
    for name, kinds in PROBED.items():
        rng, actions = world.rng(f"probed {name}"), world.actions("validation", *kinds)
        pairs = [(action, k) for action in actions for k in range(len(HOW))]
        chosen = [pairs[i] for i in rng.permutation(len(pairs))[:n]]
        asked[name] = [
            Item(f"{name}-{action.verb}-{action.thing}-{k}", name, (Turn("user", question(action, HOW[k])),))
            for action, k in chosen
        ]
    return asked


def make_localisation(study: Study, work: Path) -> dict[str, Any]:
    """Look for the parent's safety band; where none is found, the published one at our depth stands in, and is named so."""
    from vlsafe.evaluation.engines import respond
    from vlsafe.evaluation.judges import judge
    from vlsafe.inspection import states
    from vlsafe.models import checkpoints

    folder, search, world = study.folder("parent/aligned"), study.scale.search, study.world()
    model, processor = checkpoints.load(folder), checkpoints.load_processor(folder)
    asked = _localisation_prompts(world, search.prompts)
    normal, harmful = (
        states.last_states(model, processor, [(item.turns, ()) for item in asked[k]]) for k in ("normal", "harmful")
    )
    curves = states.angular_gap(normal, harmful, search.pairs, world.rng("localisation"))

    def refusals(band: tuple[int, int], factor: float) -> int:
        with states.scaled(model, band, factor):
            given = respond(model, processor, asked["scary"], "scaled", study.scale.exam.batch_size, 4)
        return sum(verdict.label == "2_full_refusal" for verdict in judge("xstest-strings", asked["scary"], given))

    found = states.localise(curves["gap"], refusals, search.factors)
    layers = range(len(curves["gap"]))
    store.write_rows(work / "curves.parquet", [{"layer": i, **{k: float(v[i]) for k, v in curves.items()}} for i in layers])
    columns = ("start", "end", "factor", "refusals")
    store.write_rows(work / "scaling.parquet", [dict(zip(columns, tried, strict=True)) for tried in found.counts])
    band = found.band or published_band(len(layers))
    return {"band": list(band), "located": found.band is not None, "reason": found.reason, "prompts": len(asked["scary"])}


PARENT, STAGE_1, ADAPTED = (MAIN_LINE[name] for name in ("parent", "stage 1", "adapted"))
DIRECTION = "probe/direction"
TUNED = ("safety/sl-full", "safety/dpo-both-full")  # looked into beside the adapted model
SIBLING = "safety/sibling-full"
ARMS = tuple(f"instruct/{name}" for name in adaptation.RECIPES)
MODALITIES = {"text": None, "picture": "icon", "typographic": "word"}
TASKS = {  # pair of task vectors -> (start, end) of the safety one; the other is always stage 2's
    "sibling": (STAGE_1, SIBLING), "sl": (ADAPTED, TUNED[0]), "dpo": (ADAPTED, TUNED[1]),
}  # fmt: skip
JACKKNIFE = 20  # groups of verb–object pairs that are left out in turn for the interval of CKA


def prompts(world: Any, split: str, n: int, modalities: Sequence[str] = tuple(MODALITIES)) -> list[Item]:
    """At most `n` how-tos of each kind and modality; harmless ones ask for the same verbs as harmful ones (benign twins)."""
    from vlsafe.data.miniature.language import HOW
    from vlsafe.evaluation.benchmarks.howtos import howto, show, spread, twins

    asked = []
    for modality in modalities:
        for kind, actions in (("harmful", world.actions(split, "harmful")), ("benign", twins(world, split))):
            rng, picture = world.rng(f"probed {split} {modality} {kind}"), MODALITIES[modality]
            for action, k in spread(actions, HOW, n, rng):
                shown = show(world, action.thing, picture, rng) if picture else None
                asked.append(howto(world, "probing", modality, action, HOW, k, shown))
    return asked


def facts(study: Study, run: str, folder: Path) -> dict[str, Any]:
    """Whose numbers a line holds: study, stage, recipe, step."""
    stage, _, recipe = run.partition("/")
    step = int(folder.name.split("-")[1]) if folder.name.startswith("step-") else 0
    return {"backbone": study.backbone, "seed": study.seed, "stage": stage, "recipe": recipe, "step": step}


def _spoken(asked: Sequence[Item]) -> list[tuple[Any, Any]]:
    return [(item.turns, item.images) for item in asked]


def make_direction(study: Study, work: Path) -> dict[str, Any]:
    """The parent's refusal direction in every layer, and the layer whose ablation changes its answers most; validation verb–object pairs."""
    from safetensors.torch import save_file

    from vlsafe.evaluation.engines import respond
    from vlsafe.evaluation.judges import judge
    from vlsafe.inspection import causal
    from vlsafe.inspection import states as inspection_states
    from vlsafe.models import checkpoints

    folder, exam = study.folder(PARENT), study.scale.exam
    model, processor = checkpoints.load(folder), checkpoints.load_processor(folder)
    asked = prompts(study.world(), "validation", study.scale.probing.prompts, ["text"])
    states = inspection_states.last_states(model, processor, _spoken(asked), exam.batch_size)
    harmful = np.array([item.harmful for item in asked])
    means = {"harmful": states[harmful].mean(0), "harmless": states[~harmful].mean(0)}
    directions = causal.difference_of_means(states[harmful], states[~harmful])
    lines = []
    for layer, direction in enumerate(directions):
        with causal.ablated(model, direction):
            given = respond(model, processor, asked, "ablated", exam.batch_size, exam.max_new_tokens)
        complied = np.array([verdict.label.startswith("complied") for verdict in judge("world", asked, given)])
        told = {"harmful": float(complied[harmful].mean()), "harmless": float(complied[~harmful].mean())}
        lines.append(
            {"layer": layer, **{f"complied_{kind}": share for kind, share in told.items()}, "score": sum(told.values()) / 2}
        )
    save_file({"direction": directions, **means}, work / "direction.safetensors")
    store.write_rows(work / "layers.parquet", lines)
    best = max(lines, key=lambda line: line["score"])  # of equals the first
    return {"layer": best["layer"], "score": best["score"], "prompts": len(asked)}


def directions(study: Study) -> dict[str, Any]:
    """The parent's refusal direction and the means between which it runs, each [L, D]."""
    from safetensors.torch import load_file

    return load_file(study.folder(DIRECTION) / "direction.safetensors")


def make_layers(study: Study, work: Path) -> dict[str, Any]:
    """How alike parent and adapted model are in every layer: the end points in full, all checkpoints of stage 2 on fewer prompts.

    The states of the end points stay on disk. A tuned model is compared with the parent likewise.
    """
    probing, world = study.scale.probing, study.world()
    many, few = (prompts(world, "test", n) for n in (probing.prompts, probing.along))
    rows, sets = [], []
    for run in (ADAPTED, *TUNED):
        folder = study.checkpoints(run)[-1]
        pair = _kept(study, folder, many, work / "states" / run.replace("/", "."))
        scores = _scores(pair, many)
        rows += [line | facts(study, run, folder) for line in _compared(study, pair, many, scores)]
        sets += [line | facts(study, run, folder) for line in _alignments(pair, many)]
    for folder in study.checkpoints(ADAPTED)[:-1]:
        pair = _kept(study, folder, few, work / "passing")
        rows += [line | facts(study, ADAPTED, folder) for line in _compared(study, pair, few, {})]
        drop(work / "passing")
    store.write_rows(
        work / "prompts.parquet", [{"item": i.id, "group": i.group, "harmful": i.harmful, "cluster": i.cluster} for i in many]
    )
    store.write_rows(work / "layers.parquet", rows)
    store.write_rows(work / "sets.parquet", sets)
    return {"prompts": len(many), "prompts_along": len(few)}


def _kept(study: Study, folder: Path, asked: Sequence[Item], work: Path) -> dict[str, Path]:
    """Write the states of a model and of its reference: the parent's language weights behind the model's own eyes.

    One model is in memory: the parent's weights are streamed over the model's, once those have been used.
    """
    from vlsafe.inspection import states as inspection_states
    from vlsafe.models import checkpoints

    model, processor = checkpoints.load(folder), checkpoints.load_processor(folder)
    size, found = study.scale.exam.batch_size, {}
    for name in ("own", "reference"):
        if name == "reference":
            checkpoints.put_language(model, checkpoints.language_places(study.folder(PARENT)))
        drop(work / name)  # an earlier attempt may have been killed with more batches
        found[name] = inspection_states.keep_states(model, processor, _spoken(asked), work / name, size)
    return found


def _layers(pair: dict[str, Path], n: int) -> Iterator[tuple[int, dict[str, Any], dict[str, Any]]]:
    """Number, states and increments of every block; one layer of two models at a time."""
    from vlsafe.inspection import states as inspection_states

    before = {name: inspection_states.kept_states(folder, 0) for name, folder in pair.items()}
    for layer in range(n):
        now = {name: inspection_states.kept_states(folder, layer + 1) for name, folder in pair.items()}
        yield layer, now, {name: now[name] - before[name] for name in pair}
        before = now


def _compared(study: Study, pair: dict[str, Path], asked: Sequence[Item], scores: dict[int, Any]) -> Iterator[dict[str, Any]]:
    """One line per prompt × layer: cosines of states and of increments, raw and centred; projections; scores of the probes."""
    from torch.nn.functional import cosine_similarity

    from vlsafe.inspection import states as inspection_states

    found, groups = directions(study), np.array([item.group for item in asked])
    for layer, states, increments in _layers(pair, len(found["direction"])):
        columns = {}
        for name, sides in (("cosine", states), ("increment", increments)):
            columns[name] = cosine_similarity(sides["own"], sides["reference"], dim=-1)
            middles = [inspection_states.centred(sides[side], groups) for side in ("own", "reference")]
            columns[f"{name}_centred"] = cosine_similarity(*middles, dim=-1)
        axis, origin = found["direction"][layer], found["harmless"][layer]
        for name, side in (("projection", "own"), ("projection_reference", "reference")):
            columns[name] = (states[side] - origin) @ axis / (axis @ axis)
        columns |= scores.get(layer, {})
        for i, item in enumerate(asked):
            told = {"item": item.id, "cluster": item.cluster, "group": item.group, "harmful": item.harmful, "layer": layer}
            yield told | {name: float(values[i]) for name, values in columns.items()}


def _scores(pair: dict[str, Path], asked: Sequence[Item]) -> dict[int, dict[str, np.ndarray]]:
    """Held-out scores of probes for harm, per layer: the model's own, the reference's, the reference's read on the model."""
    from vlsafe.inspection import states as inspection_states

    groups, harmful = np.array([item.group for item in asked]), np.array([item.harmful for item in asked])
    clusters, found = np.array([item.cluster for item in asked]), {}
    for layer, states, _ in _layers(pair, _depth(pair)):
        told = {name: np.full(len(asked), np.nan) for name in ("probe_own", "probe_reference", "probe_transferred")}
        for group in np.unique(groups):
            of = groups == group
            own, reference = (states[side][of].numpy() for side in ("own", "reference"))
            told["probe_own"][of] = inspection_states.harm_scores(own, harmful[of], clusters[of])[0]
            read = inspection_states.harm_scores(reference, harmful[of], clusters[of], [own])
            told["probe_reference"][of], told["probe_transferred"][of] = read
        found[layer] = told
    return found


def _depth(pair: dict[str, Path]) -> int:
    from safetensors import safe_open

    with safe_open(next(pair["own"].glob("*.safetensors")), "pt") as tensors:
        return tensors.get_slice("states").get_shape()[1] - 1


def _alignments(pair: dict[str, Path], asked: Sequence[Item]) -> Iterator[dict[str, Any]]:
    """CKA per layer × modality, with its jackknife standard error over groups of verb–object pairs."""
    from vlsafe.inspection import states as inspection_states

    groups, clusters = np.array([item.group for item in asked]), np.array([str(item.cluster) for item in asked])
    fold = np.unique(clusters, return_inverse=True)[1] % JACKKNIFE
    for layer, states, _ in _layers(pair, _depth(pair)):
        for group in np.unique(groups):
            of = groups == group
            own, reference = (states[side] for side in ("own", "reference"))
            left_out = [of & (fold != k) for k in range(JACKKNIFE) if (of & (fold == k)).any()]
            without = np.array([inspection_states.cka(own[kept], reference[kept]) for kept in left_out])
            spread = float(np.sqrt((len(without) - 1) * without.var()))
            yield {
                "layer": layer,
                "group": group,
                "cka": inspection_states.cka(own[of], reference[of]),
                "error": spread,
                "n": int(of.sum()),
            }


def make_drift(study: Study, work: Path) -> dict[str, Any]:
    """How far the weights of all checkpoints have moved from the parent's, and how alike their states on text are."""
    import torch

    from vlsafe.inspection import states as inspection_states
    from vlsafe.models import checkpoints

    parent, batch = checkpoints.language_places(study.folder(PARENT)), study.scale.exam.batch_size
    asked = prompts(study.world(), "test", study.scale.probing.along, ["text"])
    reference = inspection_states.last_states(
        checkpoints.load(study.folder(PARENT)), checkpoints.load_processor(study.folder(PARENT)), _spoken(asked), batch
    )
    moved, alike = [], []
    for run in (*ARMS, *TUNED, SIBLING):
        folders = study.checkpoints(run)
        for folder in folders:
            places = checkpoints.language_places(folder)
            told = facts(study, run, folder)
            moved += [line | told for line in inspection_states.drift(parent, places, with_rank=folder == folders[-1])]
            states = inspection_states.last_states(
                checkpoints.load(folder), checkpoints.load_processor(folder), _spoken(asked), batch
            )
            groups = np.zeros(len(asked))
            for layer in range(states.shape[1]):
                own, parents = (inspection_states.centred(side[:, layer], groups) for side in (states, reference))
                cosines = {
                    "cosine": torch.cosine_similarity(states[:, layer], reference[:, layer]),
                    "cosine_centred": torch.cosine_similarity(own, parents),
                }
                for i, item in enumerate(asked):
                    line = {"item": item.id, "cluster": item.cluster, "harmful": item.harmful, "layer": layer}
                    alike.append(told | line | {name: float(values[i]) for name, values in cosines.items()})
    store.write_rows(work / "drift.parquet", moved)
    store.write_rows(work / "alike.parquet", alike)
    return {"checkpoints": len({(line["stage"], line["recipe"], line["step"]) for line in moved}), "prompts": len(asked)}


def make_objectives(study: Study, work: Path) -> dict[str, Any]:
    """Whether safety tuning and stage 2 want the same of the weights: cosines of task vectors, and of gradients on the way."""
    from vlsafe.inspection import states as inspection_states
    from vlsafe.models import checkpoints

    def places(run: str) -> Any:
        return checkpoints.language_places(study.checkpoints(run)[-1])

    whose = {"backbone": study.backbone, "seed": study.seed}
    stage_2 = (places(STAGE_1), places(ADAPTED))
    vectors = [
        {**whose, "pair": name, **line}
        for name, (start, end) in TASKS.items()
        for line in inspection_states.alignment(stage_2, (places(start), places(end)))
    ]
    store.write_rows(work / "vectors.parquet", vectors)
    rows = {"vl": tuning.rows_of(study, "general", None, 0)[0]}
    stations = [study.checkpoints(STAGE_1)[-1], *study.checkpoints(ADAPTED)]
    chosen = np.unique(np.linspace(0, len(stations) - 1, study.scale.probing.gradient_points).round().astype(int))
    rows["safety"] = tuning.rows_of(study, "safety", checkpoints.load_processor(stations[0]), 0)[0]
    lines = []
    for number in chosen:
        step = 0 if number == 0 else int(stations[number].name.split("-")[1])
        drop(work / "gradients")
        files = [file for task in rows for file in _gradients(study, stations[number], task, rows[task], work / "gradients")]
        names = [file.name.split("-")[0] for file in files]
        for layer, gram in inspection_states.gram(files).items():
            size = np.sqrt(np.diag(gram))
            for i in range(len(files)):
                for j in range(i):
                    told = {"layer": layer, "step": step, "a": j, "b": i, "task_a": names[j], "task_b": names[i]}
                    lines.append({**whose, **told, "cosine": float(gram[i, j] / (size[i] * size[j]))})
    drop(work / "gradients")
    store.write_rows(work / "gradients.parquet", lines)
    return {"points": len(chosen), "batches": study.scale.probing.gradient_batches}


def _gradients(study: Study, folder: Path, task: str, rows: Sequence[Any], work: Path) -> list[Path]:
    """The gradients of a few batches of one task at a checkpoint, one file each; the model does not move."""
    from safetensors.torch import save_file

    from vlsafe.models import architectures, checkpoints, trainable
    from vlsafe.training import datasets, trainers

    n = study.scale.probing.gradient_batches
    fit = dataclasses.replace(study.scale.instruct, steps=n)
    chosen = study.world().rng(f"gradients {task}").choice(len(rows), n * fit.batch_size, replace=len(rows) < n * fit.batch_size)
    data = datasets.chat_dataset([rows[i] for i in chosen], with_images=True)
    model, files = trainable.choose(checkpoints.load(folder), "full", study.scale.lora), list[Path]()
    work.mkdir(exist_ok=True)

    def note() -> None:
        files.append(work / f"{task}-{len(files):03d}.safetensors")
        save_file(
            {k: w.grad.contiguous() for k, w in architectures.language_weights(model).items() if w.grad is not None}, files[-1]
        )

    trainers.gradients(model, checkpoints.load_processor(folder), data, fit, work / f"trainer-{task}", study.seed, note)
    return files
