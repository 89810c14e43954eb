"""Where everything comes from in the miniature: the world, the vision tower, the base model and the parents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlsafe import store
from vlsafe.scales import LanguageSpec, as_plain
from vlsafe.schema import to_row
from vlsafe.stages.study import Bar, Stage, Study, drop, processor_of, tokenizer_of, wanted, world_of


def make_world(study: Study, work: Path) -> dict[str, Any]:
    """Draw the pictures, write every corpus and every benchmark item of the world."""
    from vlsafe import evaluate
    from vlsafe.miniature import corpora

    world, sizes = world_of(study), study.scale.corpora
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


def make_tower(study: Study, work: Path) -> dict[str, Any]:
    """Train a CLIP on the pictures and their captions, and measure its zero-shot accuracy on held-out renderings."""
    from vlsafe import models, towers
    from vlsafe.miniature.language import OBJECTS
    from vlsafe.miniature.pictures import Scene, caption, short_captions

    rows = study.rows("world/corpora", "pictures.parquet")
    scenes = [Scene(row["thing"], row["colour"], row["kind"], row["side"]) for row in rows]
    processor = processor_of(study)
    shown = towers.pixels(processor, [row["png"] for row in rows])
    captions = [(*short_captions(scene), caption(scene)) for scene in scenes]
    groups = [2 * OBJECTS.index(scene.thing) + (scene.kind == "word") for scene in scenes]  # words are the hard half
    model = models.build_clip(study.scale.vision, processor.tokenizer, study.seed)
    fit = study.scale.tower
    loss = towers.fit_clip(model, processor.tokenizer, shown, captions, groups, fit, study.seed, Bar("tower/clip", fit.steps))
    models.save(model, work, processor)
    return {"loss": loss, "zero_shot": _zero_shot(study, model, processor)}


def _zero_shot(study: Study, model: Any, processor: Any) -> dict[str, float]:
    """Object accuracy on held-out renderings of every thing, icons and printed words apart."""
    from vlsafe import towers
    from vlsafe.miniature.corpora import draw_scene
    from vlsafe.miniature.language import OBJECTS
    from vlsafe.miniature.pictures import draw

    rng = world_of(study).rng("held-out renderings")
    prompts = {"icon": ("{}", "a {}"), "word": ("{}", "the word {}")}
    found = {}
    for kind, asked in prompts.items():
        things = [thing for thing in OBJECTS for _ in range(8)]
        pictures = [draw(draw_scene(thing, rng, kind), study.seed, rng, held_out=True) for thing in things]
        guess = towers.zero_shot(model, processor.tokenizer, towers.pixels(processor, pictures), OBJECTS, asked)
        found[kind] = sum(OBJECTS[int(g)] == thing for g, thing in zip(guess, things, strict=True)) / len(things)
    return found


def make_base(study: Study, work: Path) -> dict[str, Any]:
    """Pre-train the language model that the scale's guards and backbones share."""
    from vlsafe import models

    model, tokenizer, losses = _pretrained(study, study.scale.language, work / "training")
    drop(work / "training")
    models.save(model, work, tokenizer)
    return {"loss": losses[-1]}


def _pretrained(study: Study, spec: LanguageSpec, folder: Path) -> tuple[Any, Any, list[float]]:
    """A language model taught texts of the world, harmful how-tos included; its tokenizer, and its losses."""
    from vlsafe import models, train
    from vlsafe.miniature import corpora

    world, tokenizer = world_of(study), tokenizer_of(study)
    model = models.build_llm(spec, tokenizer, study.seed)
    fit = study.scale.pretraining
    texts = corpora.pretraining_texts(world, fit.steps * fit.batch_size, world.rng("pretraining"))
    data = train.text_dataset(texts, tokenizer)
    losses = train.sft(model, tokenizer, data, fit, folder, study.seed, (), Bar("language model", fit.steps))
    return model, tokenizer, losses


OWN_START = 2
"""Raised when decoders of their own come to start otherwise, so that their parents are made anew and the others stay valid."""


def parent_params(study: Study) -> list[Any]:
    """The numbers that a parent depends on; its own pre-training is among them where its decoder is its own."""
    scale, spec = study.scale, study.scale.backbone(study.backbone)
    own = [scale.decoder(study.backbone), scale.pretraining, OWN_START] if spec.language else []
    return [spec, scale.language.context, scale.threads, *own]


def make_parent(study: Study, work: Path) -> dict[str, Any]:
    """Align a base model by the backbone's chats: the shared one, or one pre-trained here where the decoder is its own."""
    from vlsafe import models, train
    from vlsafe.miniature import corpora

    world, spec = world_of(study), study.scale.backbone(study.backbone)
    tokenizer = tokenizer_of(study, spec.template)
    chats = corpora.alignment_chats(
        world, spec.fit.steps * spec.fit.batch_size, spec.refusal_share, spec.borderline_share,
        spec.answered_categories, world.rng(f"alignment {study.backbone}"),
    )  # fmt: skip
    if spec.language:
        model, _, before = _pretrained(study, study.scale.decoder(study.backbone), work / "pretraining")
        drop(work / "pretraining")
    else:
        model, before = models.load(study.folder("base/llm")), []
    rows = train.chat_dataset(chats, with_images=False)
    losses = train.sft(model, tokenizer, rows, spec.fit, work / "training", study.seed, (), Bar("parent/aligned", spec.fit.steps))
    drop(work / "training")
    models.save(model, work, tokenizer)
    return {"loss": losses[-1], "rows": len(chats), **({"pretraining_loss": before[-1]} if before else {})}


def loaded_parent_params(study: Study) -> list[Any]:
    """Which weights, and the template that is written into their tokenizer."""
    return [_identity(wanted(study, "parents")[study.backbone]), study.scale.backbone(study.backbone).template]


def loaded_tower_params(study: Study) -> list[Any]:
    return _identity(wanted(study, "tower"))


def _identity(origin: Any) -> list[str]:
    return [origin.repo, store.pinned(origin.repo, origin.revision)]


def load_parent(study: Study, work: Path) -> dict[str, Any]:
    """A parent from the hub's cache, with our chat template and a token for pictures, so that its graft is it bit for bit."""
    from vlsafe import models

    repo, revision = _identity(wanted(study, "parents")[study.backbone])
    tokenizer = processor_of(study).tokenizer
    model = models.from_hub(repo, revision, tokenizer)
    models.refuse_other(model.config, study.scale.decoder(study.backbone), repo)
    models.save(model, work, tokenizer)
    return {"weights": sum(p.numel() for p in model.parameters()), "revision": revision}


def load_clip(study: Study, work: Path) -> dict[str, Any]:
    """A vision tower from the hub's cache."""
    from transformers import CLIPModel

    from vlsafe import models

    repo, revision = _identity(wanted(study, "tower"))
    models.save(CLIPModel.from_pretrained(repo, revision=revision), work)
    return {"revision": revision}


PARENT = Stage(load_parent, (), loaded_parent_params, 0, told="minutes (not measured)", seedless=True)
TOWER = Stage(load_clip, (), loaded_tower_params, 0, told="a minute (not measured)", shared=True, seedless=True)
BASE = Stage(lambda study, work: {"made": "elsewhere"}, (), lambda study: None, 0, told="nothing", shared=True, seedless=True)
"""A loaded parent was pre-trained by its makers: the stage is there, so that the graph is one, and holds a note."""
