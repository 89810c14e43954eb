"""The named units of work. Each reads runs from the cellar and writes one; `STAGES` is the whole graph.

A stage is `<stage>/<recipe>`. Snakemake runs them in order and in parallel; a notebook that finds something missing
calls the same functions. Numbers come from the scale, never from here.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vlsafe import store
from vlsafe.scales import Scale, as_plain, known, load_scale
from vlsafe.schema import Example, Item, from_row, to_row

SHARED = "shared"  # in place of a backbone: runs that do not depend on one


def project_root() -> Path:
    """The nearest folder upwards that holds the Snakefile; the working folder where there is none.

    So a notebook finds the same cellar from JupyterLab, which starts in `notebooks`, and from papermill, which does not.
    """
    here = Path.cwd()
    return next((folder for folder in (here, *here.parents) if (folder / "Snakefile").exists()), here)


@dataclass(frozen=True)
class Study:
    """One backbone and one seed at one scale, in one cellar."""

    scale: Scale
    backbone: str
    seed: int
    root: Path

    @classmethod
    def open(cls, scale: str | Path, backbone: str, seed: int, root: str | Path) -> Study:
        """Check every argument before any work.

        Raises:   ValueError or FileNotFoundError naming the argument and the nearest known value
        """
        loaded = load_scale(scale)
        loaded.backbone(backbone)
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise ValueError(f"a seed is a non-negative integer, not {seed!r}")
        return cls(loaded, backbone, seed, Path(root).absolute() if str(root) else project_root() / "runs")

    def run(self, name: str) -> store.Run:
        """Where the result of a stage lies and what it must be."""
        stage = STAGES[known(name, STAGES, "stage")]
        kind, _, recipe = name.partition("/")
        inputs = {needed: self.run(needed).digest for needed in stage.inputs}
        backbone = SHARED if stage.shared else self.backbone
        params = as_plain(stage.params(self))
        return store.Run(self.root, self.scale.name, backbone, self.seed, kind, recipe, stage.version, params, inputs)

    def folder(self, name: str) -> Path:
        """The finished run of a stage; it and what it needs are made first where they are missing."""
        stage = STAGES[known(name, STAGES, "stage")]
        run = self.run(name)
        if store.status(run) != "valid":
            for needed in stage.inputs:
                self.folder(needed)
            print(f"{name}: making it, {stage.cost} at mini on one core", file=sys.stderr, flush=True)
        return store.ensure(run, lambda work: _prepared(stage, self, work), lambda text: print(text, file=sys.stderr))

    def numbers(self, name: str) -> dict[str, Any]:
        """What a finished stage wrote down about itself."""
        self.folder(name)
        return store.read_manifest(self.run(name))["numbers"]

    def rows(self, name: str, file: str) -> list[dict[str, Any]]:
        """A Parquet table of a finished run."""
        return store.read_rows(self.folder(name) / file)


@dataclass(frozen=True)
class Stage:
    """How a run is made. Raise `version` when its results change. `cost` is a measured duration, for humans."""

    make: Callable[[Study, Path], Mapping[str, Any] | None]
    inputs: tuple[str, ...]
    params: Callable[[Study], Any]
    cost: str
    version: int = 1
    shared: bool = False


def _prepared(stage: Stage, study: Study, work: Path) -> Mapping[str, Any] | None:
    """Make a run on the scale's number of threads: the bits of a training depend on it."""
    import torch

    torch.set_num_threads(study.scale.threads)
    return stage.make(study, work)


class _Bar:
    """A progress bar with time left that is fed absolute counts."""

    def __init__(self, what: str, total: int) -> None:
        self.bar = tqdm(total=total, desc=what, file=sys.stderr, mininterval=20.0, leave=False)

    def __call__(self, done: int) -> None:
        self.bar.update(done - self.bar.n)
        if done >= self.bar.total:
            self.bar.close()


# --- the miniature ----------------------------------------------------------------------------------------------------


def _world(study: Study):
    from vlsafe.miniature.language import World

    return World(study.seed)


def _make_world(study: Study, work: Path) -> dict[str, Any]:
    from vlsafe import evaluate
    from vlsafe.miniature import corpora

    world, sizes = _world(study), study.scale.corpora
    pool = corpora.paint(world, sizes.pictures, sizes.harmful_share / 2, world.rng("pool"))
    store.write_rows(
        work / "pictures.parquet",
        [{"png": p.png, "graphic": p.graphic, **as_plain(p.scene)} for p in pool],
    )
    written: dict[str, list[Any]] = {
        "captions": corpora.caption_rows(world, pool, sizes.captions, world.rng("captions")),
        "instructions": corpora.instruction_rows(
            world, pool, sizes.instructions, sizes.text_only_share, sizes.harmful_share / 2, world.rng("instructions")
        ),
        "safety": corpora.safety_rows(world, sizes.safety, world.rng("safety")),
        "safe_rlhf": corpora.preference_pairs(world, sizes.pairs, False, world.rng("safe_rlhf")),
        "spa_vl": corpora.preference_pairs(world, sizes.pairs, True, world.rng("spa_vl")),
        "items": evaluate.all_items(world, "test", study.scale.exam.full),
    }
    for name, rows in written.items():
        store.write_rows(work / f"{name}.parquet", [to_row(row) for row in rows])
    deeds = {kind: {split: len(deeds) for split, deeds in by.items()} for kind, by in world.splits.items()}
    return {"rows": {name: len(rows) for name, rows in written.items()}, "deeds": deeds}


def examples(study: Study, name: str, file: str) -> list[Example]:
    """Training rows of a finished run."""
    return [from_row(Example, row) for row in study.rows(name, file)]


def items(study: Study) -> list[Item]:
    """The benchmark items of the study's world."""
    return [from_row(Item, row) for row in study.rows("world/corpora", "items.parquet")]


def _tokenizer(study: Study, template: str | None = None):
    from vlsafe import chat
    from vlsafe.miniature.language import vocabulary

    tokenizer = chat.build_tokenizer(vocabulary(), study.scale.language.context)
    if template:
        tokenizer.chat_template = chat.template(template)
    return tokenizer


def _processor(study: Study, template: str | None = None):
    from vlsafe import chat

    spec = study.scale.vision
    return chat.build_processor(_tokenizer(study, template), spec.image_size, spec.patch_size, spec.feature_strategy)


def _make_tower(study: Study, work: Path) -> dict[str, Any]:
    from vlsafe import models, towers
    from vlsafe.miniature.language import OBJECTS
    from vlsafe.miniature.pictures import Scene, caption, short_captions

    rows = study.rows("world/corpora", "pictures.parquet")
    scenes = [Scene(row["thing"], row["colour"], row["kind"], row["side"]) for row in rows]
    processor = _processor(study)
    shown = towers.pixels(processor, [row["png"] for row in rows])
    captions = [(*short_captions(scene), caption(scene)) for scene in scenes]
    groups = [2 * OBJECTS.index(scene.thing) + (scene.kind == "word") for scene in scenes]
    model = models.build_clip(study.scale.vision, processor.tokenizer, study.seed)
    fit = study.scale.tower
    loss = towers.fit_clip(model, processor.tokenizer, shown, captions, groups, fit, study.seed, _Bar("tower/clip", fit.steps))
    models.save(model, work, processor)
    return {"loss": loss, "zero_shot": _zero_shot(study, model, processor)}


def _zero_shot(study: Study, model: Any, processor: Any) -> dict[str, float]:
    """Object accuracy on held-out renderings of every thing, icons and printed words apart."""
    from vlsafe import towers
    from vlsafe.miniature.corpora import draw_scene
    from vlsafe.miniature.language import OBJECTS
    from vlsafe.miniature.pictures import draw

    rng = _world(study).rng("held-out renderings")
    prompts = {"icon": ("{}", "a {}"), "word": ("{}", "the word {}")}
    found = {}
    for kind, asked in prompts.items():
        things = [thing for thing in OBJECTS for _ in range(8)]
        pictures = [draw(draw_scene(thing, rng, kind), study.seed, rng, held_out=True) for thing in things]
        guess = towers.zero_shot(model, processor.tokenizer, towers.pixels(processor, pictures), OBJECTS, asked)
        found[kind] = sum(OBJECTS[int(g)] == thing for g, thing in zip(guess, things, strict=True)) / len(things)
    return found


def load_tower(study: Study):
    """The study's CLIP and a processor for its pictures."""
    from transformers import CLIPModel

    return CLIPModel.from_pretrained(study.folder("tower/clip")).eval(), _processor(study)


def _make_base(study: Study, work: Path) -> dict[str, Any]:
    from vlsafe import models, train
    from vlsafe.miniature import corpora

    world, tokenizer = _world(study), _tokenizer(study)
    model = models.build_llm(study.scale.language, tokenizer, study.seed)
    fit = study.scale.pretraining
    texts = corpora.pretraining_texts(world, fit.steps * fit.batch_size, world.rng("pretraining"))
    losses = train.sft(
        model, tokenizer, train.text_dataset(texts, tokenizer), fit, work / "training", study.seed, (),
        _Bar("base/llm", fit.steps),
    )  # fmt: skip
    _drop(work / "training")
    models.save(model, work, tokenizer)
    return {"loss": losses[-1]}


def _drop(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)


def _make_parent(study: Study, work: Path) -> dict[str, Any]:
    from vlsafe import models, train
    from vlsafe.miniature import corpora

    world, spec = _world(study), study.scale.backbone(study.backbone)
    tokenizer = _tokenizer(study, spec.template)
    chats = corpora.alignment_chats(
        world, spec.fit.steps * spec.fit.batch_size, spec.refusal_share, spec.borderline_share,
        spec.answered_categories, world.rng(f"alignment {study.backbone}"),
    )  # fmt: skip
    model = models.load(study.folder("base/llm"))
    rows = train.chat_dataset(chats, with_images=False)
    losses = train.sft(
        model, tokenizer, rows, spec.fit, work / "training", study.seed, (), _Bar("parent/aligned", spec.fit.steps)
    )
    _drop(work / "training")
    models.save(model, work, tokenizer)
    return {"loss": losses[-1], "rows": len(chats)}


# --- guards and screening -------------------------------------------------------------------------------------------


def _make_text_guard(study: Study, work: Path) -> dict[str, Any]:
    from vlsafe import guards, models, train

    world, fit, tokenizer = _world(study), study.scale.guard, _tokenizer(study)
    model = models.load(study.folder("base/llm"))
    rows = guards.guard_texts(world, fit.steps * fit.batch_size, world.rng("guard"))
    losses = train.sft(
        model, tokenizer, train.text_dataset(rows, tokenizer), fit, work / "training", study.seed, (),
        _Bar("guard/text", fit.steps),
    )  # fmt: skip
    _drop(work / "training")
    models.save(model, work, tokenizer)
    return {"loss": losses[-1], "rows": len(rows)}


def _make_image_guard(study: Study, work: Path) -> dict[str, Any]:
    from vlsafe import guards
    from vlsafe.miniature.corpora import paint

    tower, processor = load_tower(study)
    world = _world(study)
    pool = paint(world, study.scale.corpora.guard_pictures, 0.3, world.rng("guard pictures"))
    guard = guards.LinearImageGuard.fitted(tower, processor, [p.png for p in pool], [p.graphic for p in pool])
    guard.save(work / "guard.safetensors")
    return {"rows": len(pool), "graphic": sum(p.graphic for p in pool)}


def _make_screen(study: Study, work: Path) -> dict[str, Any]:
    from vlsafe import guards, mix, models

    tower, processor = load_tower(study)
    folder = study.folder("guard/text")
    text = guards.LanguageModelGuard(models.load(folder), models.load_processor(folder))
    image = guards.LinearImageGuard.load(tower, processor, study.folder("guard/image") / "guard.safetensors")
    audit: list[dict[str, Any]] = []
    kept = {}
    for corpus in ("captions", "instructions"):
        rows = examples(study, "world/corpora", f"{corpus}.parquet")
        seen = iter(image.assess([row.images[0] for row in rows if row.images]))
        lines = mix.audit(rows, text.assess([row.turns for row in rows]), [next(seen) if row.images else None for row in rows])
        passed = mix.screened(rows, lines)
        if not passed:
            raise ValueError(f"the guards dropped every row of {corpus}; see how they are trained (`guard` in the scale)")
        mix.refuse_leaks(passed, items(study))
        store.write_rows(work / f"{corpus}.parquet", [to_row(row) for row in passed])
        audit += [{"corpus": corpus, **line} for line in lines]
        kept[corpus] = len(passed)
    store.write_rows(work / "audit.parquet", audit)
    return {"kept": kept, "screened": len(audit)}


# --- adaptation -----------------------------------------------------------------------------------------------------


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
    losses = train.sft(model, processor, data, fit, work, study.seed, _milestones(study, fit.steps), _Bar(name, fit.steps))
    train.settle(work, processor)
    store.write_text(work / "losses.json", json.dumps(losses))
    return {"rows": len(rows), "moving_weights": moving, "loss": losses[-1]}


def _make_projector(study: Study, work: Path) -> dict[str, Any]:
    from vlsafe import models

    tower, _ = load_tower(study)
    processor = _processor(study, study.scale.backbone(study.backbone).template)
    parent = models.load(study.folder("parent/aligned"))
    model = models.graft(parent, tower, processor, study.scale.vision, study.seed)
    models.save(model, work / "step-000000", processor)
    return _adapt(study, work, model, processor, "captions", "projector", study.scale.projector)


def _make_instruct(study: Study, work: Path) -> dict[str, Any]:
    from vlsafe import models

    start = checkpoints(study, "projector/filtered")[-1]
    model, processor = models.load(start), models.load_processor(start)
    return _adapt(study, work, model, processor, "instructions", "full", study.scale.instruct)


def checkpoints(study: Study, name: str) -> list[Path]:
    """The model folders of a finished training in the order of their steps; the last one is its result."""
    folder = study.folder(name)
    return sorted(folder.glob("step-*")) or [folder]


# --- examination ----------------------------------------------------------------------------------------------------


def _make_examination(study: Study, work: Path, name: str) -> dict[str, Any]:
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
            exam.max_new_tokens, _Bar(f"{model_name} {which}", len(chosen)),
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


def _examination_of(name: str) -> Callable[[Study, Path], dict[str, Any]]:
    return lambda study, work: _make_examination(study, work, name)


def _exam_params(study: Study) -> Any:
    return study.scale.exam


# --- the graph ------------------------------------------------------------------------------------------------------

STAGES: dict[str, Stage] = {
    "world/corpora": Stage(
        _make_world, (), lambda s: [s.scale.corpora, s.scale.exam.full], "10 s", shared=True
    ),
    "tower/clip": Stage(
        _make_tower, ("world/corpora",), lambda s: [s.scale.vision, s.scale.tower, s.scale.threads], "75 s", shared=True
    ),
    "base/llm": Stage(
        _make_base, (),
        lambda s: [s.scale.language, s.scale.pretraining, s.scale.threads], "100 s", shared=True,
    ),
    "guard/text": Stage(
        _make_text_guard, ("base/llm",), lambda s: [s.scale.guard, s.scale.threads], "15 s", shared=True
    ),
    "guard/image": Stage(
        _make_image_guard, ("tower/clip",), lambda s: s.scale.corpora.guard_pictures, "10 s", shared=True
    ),
    "screen/filtered": Stage(
        _make_screen, ("world/corpora", "guard/text", "guard/image", "tower/clip"), lambda s: [], "20 s", shared=True
    ),
    "parent/aligned": Stage(
        _make_parent, ("base/llm",),
        lambda s: [s.scale.backbone(s.backbone), s.scale.language.context, s.scale.threads], "40 s",
    ),
    "projector/filtered": Stage(
        _make_projector, ("parent/aligned", "tower/clip", "screen/filtered"),
        lambda s: [s.scale.projector, s.scale.vision, s.scale.checkpoints, s.scale.threads], "60 s",
    ),
    "instruct/filtered-full": Stage(
        _make_instruct, ("projector/filtered", "screen/filtered"),
        lambda s: [s.scale.instruct, s.scale.checkpoints, s.scale.threads], "30 s",
    ),
    "examination/parent.aligned": Stage(
        _examination_of("parent/aligned"), ("parent/aligned", "world/corpora"), _exam_params, "8 s"
    ),
    "examination/projector.filtered": Stage(
        _examination_of("projector/filtered"), ("projector/filtered", "world/corpora"), _exam_params, "25 s"
    ),
    "examination/instruct.filtered-full": Stage(
        _examination_of("instruct/filtered-full"), ("instruct/filtered-full", "world/corpora"), _exam_params, "30 s"
    ),
}  # fmt: skip


def examinations() -> Iterator[str]:
    """The stages whose results are raw tables."""
    return (name for name in STAGES if name.startswith("examination/"))
