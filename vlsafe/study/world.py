"""Notebook 00: the world, the vision tower, the base model and the parents, built (first half) or loaded (second half)."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from vlsafe import evaluation, models, training
from vlsafe.core import assets, store
from vlsafe.core.assets import Origin
from vlsafe.core.scale import LanguageSpec, as_plain
from vlsafe.core.schema import Example, Pair, Stored, to_row
from vlsafe.data.arms import DOSES
from vlsafe.data.files import Refused, missing
from vlsafe.data.miniature import corpora, language, pictures
from vlsafe.data.sources import CORPORA, place_of, stream
from vlsafe.study.study import Bar, Stage, Study, drop

NAMED = 1000  # how many refused rows and missing pictures of a corpus are named one by one
SCREENED = ("captions", "instructions")
EXAMPLES = (*SCREENED, "safety")
_TEXTS = {name: pa.string() for name in ("id", "source", "category", "cluster", "task", "description", "chosen", "rejected")}
_NESTED = {
    "turns": pa.list_(pa.struct({"role": pa.string(), "text": pa.string()})),
    "images": pa.list_(pa.struct({"bytes": pa.binary(), "path": pa.string()})),
}
COLUMNS = {
    kind: pa.schema([(name, {**_TEXTS, **_NESTED}[name]) for name in kind.__dataclass_fields__]) for kind in (Example, Pair)
}


def make_world(study: Study, work: Path) -> dict[str, Any]:
    """Draw the pictures, write every corpus and every benchmark item of the world."""
    world, sizes = study.world(), study.scale.corpora
    pool = corpora.paint(world, sizes.pictures, sizes.harmful_share / 2, world.rng("pool"))
    store.write_rows(work / "pictures.parquet", [{"png": p.png, "graphic": p.graphic, **as_plain(p.scene)} for p in pool])
    written: dict[str, list[Any]] = {
        "captions": corpora.caption_rows(pool, sizes.captions, world.rng("captions")),
        "instructions": corpora.instruction_rows(
            world, pool, sizes.instructions, sizes, sizes.harmful_share / 2, world.rng("instructions")
        ),
        "howtos": corpora.howto_rows(world, pool, round(max(DOSES) * sizes.instructions), world.rng("howtos")),
        "safety": corpora.safety_rows(world, sizes.safety, world.rng("safety")),
        "safe_rlhf": corpora.preference_pairs(world, sizes.pairs, False, world.rng("safe_rlhf")),
        "spa_vl": corpora.preference_pairs(world, sizes.pairs, True, world.rng("spa_vl")),
        "items": evaluation.examine.all_items(world, "test", study.scale.exam.full),
    }
    for name, rows in written.items():
        store.write_rows(work / f"{name}.parquet", [to_row(row) for row in rows])
    actions = {kind: {split: len(actions) for split, actions in by.items()} for kind, by in world.splits.items()}
    return {"rows": {name: len(rows) for name, rows in written.items()}, "actions": actions}


def make_tower(study: Study, work: Path) -> dict[str, Any]:
    """Train a CLIP on the pictures and their captions, and measure its zero-shot accuracy on held-out renderings."""
    rows = study.rows("world/corpora", "pictures.parquet")
    scenes = [pictures.Scene(row["thing"], row["colour"], row["kind"], row["side"]) for row in rows]
    processor = study.processor()
    pixels = models.towers.pixels(processor, [row["png"] for row in rows])
    captions = [(*pictures.short_captions(scene), pictures.shown(scene)) for scene in scenes]
    groups = [2 * language.OBJECTS.index(s.thing) + (s.kind == "word") for s in scenes]  # words are the hard half
    model, fit = models.checkpoints.build_clip(study.scale.vision, processor.tokenizer, study.seed), study.scale.tower
    bar = Bar("tower/clip", fit.steps)
    loss = models.towers.fit_clip(model, processor.tokenizer, pixels, captions, groups, fit, study.seed, bar)
    models.checkpoints.save(model, work, processor)
    return {"loss": loss, "zero_shot": _zero_shot(study, model, processor)}


def _zero_shot(study: Study, model: Any, processor: Any) -> dict[str, float]:
    """Object accuracy on held-out renderings of every thing, icons and printed words apart."""
    rng = study.world().rng("held-out renderings")
    prompts = {"icon": ("{}", "a {}"), "word": ("{}", "the word {}")}
    accuracy = {}
    for kind, texts in prompts.items():
        things = [thing for thing in language.OBJECTS for _ in range(8)]
        drawn = [pictures.draw(pictures.draw_scene(thing, rng, kind), study.seed, rng, held_out=True) for thing in things]
        pixels = models.towers.pixels(processor, drawn)
        guesses = models.towers.zero_shot(model, processor.tokenizer, pixels, language.OBJECTS, texts)
        accuracy[kind] = sum(language.OBJECTS[int(i)] == thing for i, thing in zip(guesses, things, strict=True)) / len(things)
    return accuracy


def make_base(study: Study, work: Path) -> dict[str, Any]:
    """Pre-train the language model that the scale's guards and backbones share."""
    model, tokenizer, losses = _pretrained(study, study.scale.language, work / "training")
    drop(work / "training")
    models.checkpoints.save(model, work, tokenizer)
    return {"loss": losses[-1]}


def _pretrained(study: Study, spec: LanguageSpec, folder: Path) -> tuple[Any, Any, list[float]]:
    """A language model taught texts of the world, harmful how-tos included; its tokenizer, and its losses."""
    world, tokenizer = study.world(), study.tokenizer()
    model = models.checkpoints.build_llm(spec, tokenizer, study.seed)
    fit = study.scale.pretraining
    texts = corpora.pretraining_texts(world, fit.steps * fit.batch_size, world.rng("pretraining"))
    dataset = training.datasets.text_dataset(texts, tokenizer)
    losses = training.trainers.sft(model, tokenizer, dataset, fit, folder, study.seed, (), Bar("language model", fit.steps))
    return model, tokenizer, losses


OWN_START = 2
"""Raised when decoders of their own come to start otherwise, so that their parents are made again and the others stay valid."""


def parent_params(study: Study) -> list[Any]:
    """The numbers that a parent depends on; its own pre-training is among them where its decoder is its own."""
    scale, spec = study.scale, study.scale.backbone(study.backbone)
    own = [scale.decoder(study.backbone), scale.pretraining, OWN_START] if spec.language else []
    return [spec, scale.language.context, scale.threads, *own]


def make_parent(study: Study, work: Path) -> dict[str, Any]:
    """Align a base model by the backbone's chats: the shared one, or one pre-trained here where the decoder is its own."""
    world, spec = study.world(), study.scale.backbone(study.backbone)
    tokenizer = study.tokenizer(spec.template)
    n = spec.fit.steps * spec.fit.batch_size
    chats = corpora.alignment_chats(world, n, spec, world.rng(f"alignment {study.backbone}"))
    if spec.language:
        model, _, before = _pretrained(study, study.scale.decoder(study.backbone), work / "pretraining")
        drop(work / "pretraining")
    else:
        model, before = models.checkpoints.load(study.folder("base/llm")), []
    rows = training.datasets.chat_dataset(chats, with_images=False)
    losses = training.trainers.sft(
        model, tokenizer, rows, spec.fit, work / "training", study.seed, (), Bar("parent/aligned", spec.fit.steps)
    )
    drop(work / "training")
    models.checkpoints.save(model, work, tokenizer)
    return {"loss": losses[-1], "rows": len(chats), **({"pretraining_loss": before[-1]} if before else {})}


def identity(origin: Origin | None) -> list[Any] | None:
    """What of an origin changes its rows. The commit of a first download is noted in the manifest and not here: results would
    otherwise be stale wherever that note is not at hand."""
    return None if origin is None else [origin.repo, origin.revision, origin.limit]


def corpora_params(study: Study) -> Any:
    """Where the corpora come from; those that a scale does without are None."""
    return {name: identity(getattr(study.scale.loaded, name)) for name in CORPORA}


def read_from(name: str, origin: Origin) -> str:
    place = place_of(name, origin)
    return f"{place.folder} below VLSAFE_DATA" if place.folder else place.address


class Defects(NamedTuple):
    """What is wrong with a corpus: refused rows by reason, its pictures, and the first defects by row."""

    refused: Counter[str]
    pictures: Counter[str]
    named: list[list[str]]


def make_corpora(study: Study, work: Path) -> dict[str, Any]:
    """Read every corpus that the scale wants into rows without their pictures, and count what is not as published.

    Raises:   FileNotFoundError where a corpus is not there (a scale that says `null` for it does without); ValueError where
              more of its pictures are missing than `missing_share`: then it is the wrong folder
    """
    record: dict[str, Any] = {"from": {}, "rows": {}, "refused": {}, "missing_pictures": {}, "published": {}}
    named = {}
    for name in CORPORA:
        origin = getattr(study.scale.loaded, name)
        if origin is None:
            continue
        defects = Defects(Counter(), Counter(), [])
        rows = (to_row(row) for row in _counting(stream(name, origin), defects))
        n = store.write_stream(work / f"{name}.parquet", rows, COLUMNS[Example if name in EXAMPLES else Pair])
        _refuse_wrong_folder(name, n, defects, study.asset("missing_share"))
        record["from"][name] = read_from(name, origin)
        record["rows"][name], record["refused"][name] = n, dict(defects.refused)
        record["missing_pictures"][name], named[name] = defects.pictures["missing"], defects.named
        record["published"][name] = published = origin.limit or origin.rows
        if published not in (None, n + defects.refused.total()):
            print(f"{name}: {n + defects.refused.total():,} rows, where {published:,} were expected", file=sys.stderr)
    store.write_text(work / "refused.json", json.dumps(named, indent=1))
    return record


def _counting(rows: Iterable[Example | Pair | Refused], defects: Defects) -> Iterator[Example | Pair]:
    """The rows that are rows; the others, and missing pictures, are counted, and the first of them named."""
    for row in rows:
        absent = [] if isinstance(row, Refused) else [p.place for p in row.images if isinstance(p, Stored) and missing(p)]
        if isinstance(row, Refused):
            defects.refused[row.reason] += 1
        else:
            defects.pictures["missing"] += len(absent)
            defects.pictures["all"] += len(row.images)
            yield row
        if (absent or isinstance(row, Refused)) and len(defects.named) < NAMED:
            defects.named.append([row.id, row.reason if isinstance(row, Refused) else f"no picture {absent[0]}"])


def _refuse_wrong_folder(name: str, n: int, defects: Defects, allowed: float) -> None:
    lost, pictures = defects.pictures["missing"], defects.pictures["all"]
    if not n:
        raise ValueError(f"{name} has no row that can be read ({defects.refused.total()} refused); is this its file?")
    if lost > allowed * pictures:
        first = next(reason for _, reason in defects.named if reason.startswith("no picture"))
        raise ValueError(f"{name}: {lost:,} of {pictures:,} pictures are missing, first: {first}; is this the official layout?")


WORLD = Stage(make_corpora, (), corpora_params, 0, estimate="minutes (not measured)", shared=True, seedless=True)


def _weights(origin: Origin) -> list[str]:
    """Which weights an origin means: unlike rows, those of another commit are another model."""
    return [origin.repo, assets.pinned(origin.repo, origin.revision)]


def load_parent(study: Study, work: Path) -> dict[str, Any]:
    """A parent from the hub's cache, with our chat template and a token for pictures, so that its graft is it bit for bit."""
    repo, revision = _weights(study.asset("parents")[study.backbone])
    tokenizer = study.processor().tokenizer
    model = models.checkpoints.from_hub(repo, revision, tokenizer)
    models.checkpoints.refuse_other(model.config, study.scale.decoder(study.backbone), repo)
    models.checkpoints.save(model, work, tokenizer)
    return {"weights": sum(p.numel() for p in model.parameters()), "revision": revision}


def load_clip(study: Study, work: Path) -> dict[str, Any]:
    """A vision tower from the hub's cache."""
    from transformers import CLIPModel

    repo, revision = _weights(study.asset("tower"))
    models.checkpoints.save(models.checkpoints.from_repository(CLIPModel, repo, revision), work)
    return {"revision": revision}


PARENT = Stage(  # which weights, and the template that is written into their tokenizer
    load_parent, (), lambda s: [_weights(s.asset("parents")[s.backbone]), s.scale.backbone(s.backbone).template], 0,
    estimate="minutes (not measured)", seedless=True,
)  # fmt: skip
TOWER = Stage(
    load_clip, (), lambda s: _weights(s.asset("tower")), 0, estimate="a minute (not measured)", shared=True, seedless=True
)
BASE = Stage(
    lambda study, work: {"pretrained": "elsewhere"}, (), lambda study: None, 0, estimate="nothing", shared=True, seedless=True
)
"""A loaded parent was pre-trained by its makers: the stage is there, so that the graph is one, and holds a note."""
