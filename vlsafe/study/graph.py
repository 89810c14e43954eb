"""The named units of work. Each reads runs from the run store and writes one; `STAGES` is the whole graph.

A stage is `<stage>/<recipe>`. Snakemake runs them in order and in parallel; a notebook that finds something missing
calls the same functions. Numbers come from the scale, never from here.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from functools import partial
from typing import Any

from vlsafe.core.presets import mapping_at
from vlsafe.core.scale import known
from vlsafe.core.schema import MAIN_LINE
from vlsafe.evaluation.benchmarks import ADDED
from vlsafe.study import (
    adaptation,
    adopted,
    causal,
    degradation,
    durability,
    filtering,
    judging,
    merging,
    pocket,
    probing,
    tuning,
    world,
)
from vlsafe.study.study import Stage, Study, project_root

FURTHER = {"durability/": durability.make_durability, "worst/": durability.make_worst}


def responses_of(name: str) -> str:
    """The stage that generates what the stage of this name, an examination or the like, has judged; empty for any other."""
    found = name.startswith(("examination/", "merge/", *FURTHER))
    return f"responses/{name.removeprefix('examination/').replace('/', '.')}" if found else ""


def _judged(name: str, stage: Stage) -> dict[str, Stage]:
    """A stage that leaves responses with their verdicts; where models are loaded, whose judges are models too, it is two: one
    generates, and the one of the stage's name has the responses judged."""
    source = responses_of(name)
    inputs = tuple(  # official items are files; a merge was chosen before anybody judged it
        responses_of(needed) if needed.startswith("merge/") else needed for needed in stage.inputs if needed != "world/corpora"
    )
    make = partial(judging.make_judged, source=source)
    judging_stage = Stage(make, (source,), judging.judged_params, 0, estimate="not measured")
    return {
        source: dataclasses.replace(stage, inputs=inputs, only="load", version=1, estimate="not measured"),
        name: dataclasses.replace(stage, load=judging_stage),
    }


def _examination(
    run: str, cost: int, name: str = "", make: Callable[..., Any] = degradation.make_examination
) -> dict[str, Stage]:  # fmt: skip
    stage = Stage(partial(make, name=run), (run, "world/corpora"), degradation.response_params, cost)
    return _judged(f"examination/{name or run.replace('/', '.')}", stage)


def _without(study: Study, *things: str) -> str | None:
    """Why a scale that loads lacks a stage: it does without one of these things from outside."""
    if study.packed:  # its own stages make all of them
        return None
    lacking = [name for name in things if study.scale.loaded and getattr(study.scale.loaded, name) is None]
    return f"the scale does without {' and '.join(map(repr, lacking))}" if lacking else None


def _not_tuned(study: Study, name: str) -> str | None:
    return tuning.unless(study, name) or _without(study, *tuning.read_from_outside(name))


STAGES: dict[str, Stage] = {
    "world/corpora": Stage(
        world.make_world, (), lambda s: [s.scale.corpora, s.scale.exam.full, *ADDED], 10, version=2, shared=True,
        load=world.WORLD, pack=pocket.WORLD,
    ),
    "tower/clip": Stage(
        world.make_tower, ("world/corpora",), lambda s: [s.scale.vision, s.scale.tower, s.scale.threads], 110, version=2,
        shared=True, load=world.TOWER, pack=pocket.VISION,
    ),
    "base/llm": Stage(
        world.make_base, (), lambda s: [s.scale.language, s.scale.pretraining, s.scale.threads], 100, version=2, shared=True,
        load=world.BASE, pack=pocket.BASE,
    ),
    "guard/text": Stage(
        filtering.make_text_guard, ("base/llm",), lambda s: [s.scale.guard, s.scale.corpora, s.scale.threads], 25, version=2,
        shared=True, load=filtering.TEXT_GUARD, pack=pocket.TEXT_GUARD,
    ),
    "guard/image": Stage(
        filtering.make_image_guard, ("tower/clip",), lambda s: [s.scale.corpora.guard_pictures, s.scale.corpora.harmful_share],
        10, version=2, shared=True, load=filtering.IMAGE_GUARD, pack=pocket.IMAGE_GUARD,
    ),
    "screen/filtered": Stage(
        filtering.make_screen, ("world/corpora", "guard/text", "guard/image", "tower/clip"), filtering.intake_params, 20,
        version=2, shared=True, load=filtering.SCREEN, pack=pocket.SCREEN,
    ),
    "parent/aligned": Stage(world.make_parent, ("base/llm",), world.parent_params, 60, load=world.PARENT, pack=pocket.PARENT),
    "projector/filtered": Stage(
        adaptation.make_projector, ("parent/aligned", "tower/clip", "screen/filtered"),
        lambda s: [s.scale.projector, s.scale.vision, s.scale.checkpoints, s.scale.threads], 60,
    ),
    "probe/localisation": Stage(
        probing.make_localisation, ("parent/aligned",), lambda s: [s.scale.search, s.scale.exam.batch_size, *s.choosing], 2
    ),
    **_examination("parent/aligned", 8),
    **_examination("projector/filtered", 14),
}  # fmt: skip
for _name, _recipe in adaptation.RECIPES.items():
    STAGES[f"instruct/{_name}"] = Stage(
        partial(adaptation.make_instruct, name=_name),
        ("projector/filtered", "screen/filtered") + (("probe/localisation",) if _recipe.method == "sppft" else ())
        + (("world/corpora",) if _recipe.dose else ()),
        partial(adaptation.recipe_params, name=_name), 55, version=2 if _recipe.method == "lora" else 1,
        unless=partial(adaptation.unless, name=_name),
    )  # fmt: skip
    STAGES |= _examination(f"instruct/{_name}", 8)
for _name, _run in (("parent", MAIN_LINE["parent"]), (adaptation.MAIN, MAIN_LINE["adapted"])):
    STAGES |= _examination(_run, 8, f"confounds.{_name}", degradation.make_confounds)

LONG = {"mtl-full": 75, "mtl-pcgrad-full": 100, "sl-replay-full": 60, "dpo-both-full": 35, "dpo-both-lora": 35}  # seconds
for _name, _tuned in tuning.RECIPES.items():
    STAGES[f"safety/{_name}"] = Stage(
        partial(tuning.make_tuned, name=_name), tuning.inputs_of(_name), partial(tuning.recipe_params, name=_name),
        LONG.get(_name, 20), version=2,
        unless=partial(_not_tuned, name=_name),
    )  # fmt: skip
    STAGES |= _examination(f"safety/{_name}", 10)
STAGES |= {
    "probe/direction": Stage(
        probing.make_direction, ("parent/aligned",),
        lambda s: [s.scale.probing.prompts, s.scale.exam.max_new_tokens, *s.choosing], 10,
        unless=probing.nothing_to_choose_by,
    ),
    "probe/layers": Stage(
        probing.make_layers, ("parent/aligned", probing.DIRECTION, probing.ADAPTED, *probing.TUNED),
        lambda s: [s.scale.probing.prompts, s.scale.probing.along, *s.choosing], 30,
    ),
    "probe/drift": Stage(
        probing.make_drift, ("parent/aligned", *probing.ARMS, *probing.TUNED, probing.SIBLING),
        lambda s: [s.scale.probing.along, *s.choosing] if s.choosing else s.scale.probing.along, 8, gathers=True,
    ),
    "probe/seeing": Stage(
        pocket.make_seeing, ("world/corpora", "parent/aligned", *pocket.SEEING), degradation.response_params, 60, version=2,
        unless=pocket.unpacked, only="load",
    ),
    "probe/objectives": Stage(
        probing.make_objectives,
        ("world/corpora", "screen/filtered", probing.STAGE_1, probing.ADAPTED, *probing.TUNED, probing.SIBLING),
        lambda s: [
            s.scale.instruct, s.scale.probing.gradient_batches, s.scale.probing.gradient_points, s.scale.threads, *s.choosing,
        ], 30,
    ),
    "causal/transplants": Stage(
        causal.make_transplants, ("world/corpora", "parent/aligned", probing.STAGE_1, probing.ADAPTED, causal.LOCALISATION),
        lambda s: [*causal.exam_params(s), s.scale.probing.widths, s.scale.probing.random_sets], 100,
    ),
    "causal/directions": Stage(
        causal.make_directions, ("world/corpora", "parent/aligned", probing.ADAPTED, probing.DIRECTION),
        lambda s: [*causal.exam_params(s), s.scale.probing.strengths, s.scale.probing.random_directions], 30,
    ),
}  # fmt: skip
for _name in causal.FROZEN_SETS:
    STAGES[_name] = Stage(
        partial(causal.make_frozen, which=_name.partition("/")[2]),
        ("world/corpora", "screen/filtered", probing.STAGE_1, causal.LOCALISATION),
        lambda s: [*causal.exam_params(s), *adaptation.stage_2(s, causal.SPPFT), s.scale.probing.frozen_sets, s.scale.threads],
        480,
    )  # fmt: skip
for _name, _stage in adopted.stages(STAGES).items():
    STAGES[_name] = dataclasses.replace(STAGES[_name], adopt=_stage)
GRIDS = ("default", "full")
ONLY_FULL = (*causal.FROZEN_SETS, *(f"{kind}{name}" for kind in FURTHER for name in durability.MODELS))
OPTIONAL = (  # of some grids alone
    "safety/", "examination/safety.", "responses/safety.", "judging/", "sppft/", "merge/", "responses/merge.",
    *FURTHER, *(f"responses/{kind[:-1]}." for kind in FURTHER),
)  # fmt: skip
for _grid in GRIDS:
    STAGES[tuning.judging(_grid)] = Stage(
        partial(tuning.make_judging, grid=_grid), (tuning.GUARD, "world/corpora", *tuning.REFERENCES, *tuning.examined(_grid)),
        lambda s: None, 15, unless=lambda s: _without(s, "text_guard"), gathers=True,
    )  # fmt: skip
    STAGES[judging.perplexity(_grid)] = Stage(
        partial(judging.make_perplexity, grid=_grid),
        (judging.PARENT, "world/corpora", *tuning.REFERENCES, *tuning.examined(_grid), *merging.names(_grid)),
        lambda s: s.scale.exam.batch_size, 20, gathers=True,
    )  # fmt: skip
    for _partner, _name in zip(merging.partners(_grid), merging.names(_grid), strict=True):
        STAGES |= _judged(_name, Stage(
            partial(merging.make_sweep, partner=_partner, grid=_grid), merging.inputs_of(_partner, _grid), merging.params, 85,
            version=3 if _grid == "default" else 5,
        ))  # fmt: skip
for _kind, _make in FURTHER.items():
    for _name in durability.MODELS:
        _stage = Stage(partial(_make, model=_name), durability.inputs_of(_name), durability.params, 120)
        STAGES |= _judged(f"{_kind}{_name}", _stage)


def left_out(study: Study, grid: str = "default") -> dict[str, str]:
    """The stages of a grid that the study's scale does without, and why."""
    without: dict[str, str] = {}
    for name in _grid_names(grid):
        stage = study.stage(name)
        reason = adopted.unless(study, name) or STAGES[name].unless(study)
        for needed in stage.inputs if not (reason or stage.gathers) else ():
            if needed in without:
                why = without[needed]
                reason = why if why.startswith("without ") else f"without {needed}, because {why}"
                break
        if reason:
            without[name] = reason
    return {name: reason for name, reason in without.items() if STAGES[name].only in ("", study.scale.source)}


def planned(study: Study, grid: str = "default") -> list[str]:
    """The stages of a grid that the study's scale has, in the order of STAGES."""
    without = left_out(study, grid)
    return [name for name in _grid_names(grid) if name not in without and STAGES[name].only in ("", study.scale.source)]


def _grid_names(grid: str) -> list[str]:
    known(grid, GRIDS, "grid")
    tuned = tuning.examined(grid)
    chosen = {
        *tuned,
        tuning.judging(grid),
        judging.perplexity(grid),
        *merging.names(grid),
        *(ONLY_FULL if grid == "full" else ()),
    }
    chosen |= {name.replace("examination/safety.", "safety/") for name in tuned}
    chosen |= set(map(responses_of, chosen))
    beyond = {run for name, recipe in adaptation.RECIPES.items() if grid != "full" == recipe.grid for run in _runs(name)}
    return [name for name in STAGES if name in chosen or not (name.startswith(OPTIONAL) or name in beyond)]


def _runs(recipe: str) -> list[str]:
    """The stages of a recipe of stage 2."""
    return [f"instruct/{recipe}", examination := f"examination/instruct.{recipe}", responses_of(examination)]


def read_by(study: Study, word: str, grid: str = "default") -> list[str]:
    """The stages of the study's scale that a notebook reads, by its word; "tuned" are the trainings of notebook 04, "tables" all
    raw tables.

    Raises:   ValueError for an unknown word or grid
    """
    names = planned(study, grid)
    remedy = [f"safety/{recipe}" for recipe in tuning.RECIPES if tuning.RECIPES[recipe].objective == "pcgrad"]
    degradation = [name for name in names if name.startswith("examination/") and "/safety." not in name]
    compared = [*tuning.REFERENCES, *tuning.examined(grid), tuning.judging(grid)]
    inside = [name for name in names if name.startswith(("probe/", "causal/"))]
    words = {
        "world": ["world/corpora", "tower/clip", "base/llm", "parent/aligned"],
        "filtering": ["screen/filtered"],
        "adaptation": [f"instruct/{name}" for name in adaptation.RECIPES],
        "degradation": degradation,
        "tuning": compared,
        "tuned": [name for name in names if name.startswith("safety/")],
        "probing": [*inside, *remedy, *map(tuning.examination, remedy), *causal.FROZEN_SETS],
        "merging": merging.names(grid),
        "durability": [name for name in names if name.startswith(tuple(FURTHER))],
        "fluency": [judging.perplexity(grid)],
        "tables": [*degradation, *compared, *merging.names(grid), *(name for name in names if name.startswith(tuple(FURTHER)))],
    }
    words["claims"] = words["tables"]
    return [name for name in dict.fromkeys(words[known(word, words, "word of a notebook")]) if name in names]


def jobs(study: Study, grid: str = "default") -> list[tuple[str, ...]]:
    """The stages of a grid in groups that one process makes in a row: a model with its examination, the examinations of a parent.

    A process takes six seconds to start, which is what a small stage takes. What a long chain waits for stands alone. So does
    every stage of a group with one that needs a GPU: it takes far longer than a start, none may hold GPUs that another one of
    its group needs, and one that fails takes nothing else with it.
    """
    names = planned(study, grid)
    groups = [("tower/clip", "guard/image"), ("examination/parent.aligned", "examination/confounds.parent", "probe/localisation")]
    groups += [(f"instruct/{name}", f"examination/instruct.{name}") for name in adaptation.RECIPES]
    groups += [(f"safety/{name}", f"examination/safety.{name}") for name in tuning.RECIPES]
    groups += [("probe/direction", "probe/layers"), ("judging/guard-text", "judging/perplexity")]
    groups += [(one,) for one in (*merging.names(grid), "examination/projector.filtered", "examination/confounds.filtered-full")]
    groups = [tuple(stage for name in group for stage in (responses_of(name), name) if stage in names) for group in groups]
    groups = [group for group in groups if group and not any(gpus(study, name) for name in group)]
    grouped = {name for group in groups for name in group}
    return groups + [(name,) for name in names if name not in grouped]


def urgency(study: Study, grid: str = "default") -> dict[tuple[str, ...], int]:
    """How long the chain is that waits for a job, itself included, in seconds at mini: the longest chain goes first.

    What notebook 03 waits for precedes all else: it answers the question that people come with.
    """
    work = jobs(study, grid)
    job_of = {name: job for job in work for name in job}
    waiting: dict[tuple[str, ...], set[tuple[str, ...]]] = {job: set() for job in work}
    for job in work:
        for needed in {job_of[needed] for name in job for needed in study.inputs(name)} - {job}:
            waiting[needed].add(job)

    @functools.cache
    def chain(job: tuple[str, ...]) -> int:
        return 5 + sum(STAGES[name].cost for name in job) + max(map(chain, waiting[job]), default=0)

    @functools.cache
    def awaited(job: tuple[str, ...]) -> bool:
        return not first.isdisjoint(job) or any(map(awaited, waiting[job]))

    first, longest = set(read_by(study, "degradation", grid)), sum(map(chain, work))
    return {job: chain(job) + longest * awaited(job) for job in work}


# What a job requests from the scheduler at loaded scales, all assumed: minutes, after which it is queued again and goes on from
# its last checkpoint, and megabytes; the first process of a launched training gathers weights and optimiser state.
REQUESTS = {0: {"runtime": 240, "mem_mb": 16_000}, 1: {"runtime": 720, "mem_mb": 64_000}, 8: {"runtime": 1440, "mem_mb": 400_000}}
READERS = ("world/corpora", "base/llm", "tower/clip", "guard/text", "guard/image")  # at loaded scales they compute nothing


def needs(study: Study, job: tuple[str, ...]) -> dict[str, int]:
    """What the stages of a job need; a world that is built needs one core and nothing else.

    `tasks` is 0 with GPUs: Slurm's plugin would start the job once for every GPU otherwise.
    """
    many = max(gpus(study, name) for name in job)
    granted = {"gpu": many, "tasks": 0} if many else {}
    if study.scale.source == "build":
        return granted
    return {**REQUESTS[8 if many > 1 else many], "threads": max(many, 1) * study.scale.threads, **granted}


def gpus(study: Study, name: str) -> int:
    """How many GPUs a stage needs at most: one, or those of the configuration by which it is trained. None on the CPU, where
    models that are built stay unless the scale's `device` says otherwise; those from packages use a GPU where they see one."""
    kind, _, recipe = name.partition("/")
    if study.scale.loaded is None:
        return int(study.scale.device == "cuda")
    judged_elsewhere = responses_of(name) in STAGES and not study.scale.loaded.judges
    small = study.packed and study.scale.device != "cuda"
    if study.scale.device == "cpu" or small or judged_elsewhere or name in READERS:
        return 0
    fits = dict.fromkeys(("instruct", "sppft", "durability", "worst"), lambda: study.scale.instruct)
    fits |= {"projector": lambda: study.scale.projector, "safety": lambda: tuning.base_fit(study, recipe)}
    launch = fits[kind]().launch if kind in fits else ""
    configuration = mapping_at(project_root() / launch) if launch else {"num_processes": 1}
    return 0 if configuration.get("use_cpu") else int(configuration["num_processes"])
