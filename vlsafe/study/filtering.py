"""Notebook 01: the guards, and the corpora that they let pass.

A corpus of half a million rows with pictures does not fit into memory and takes guards days: at a loaded scale rows go
through in parts, their pictures stay where they lie, and every audit line is on disk before the next part begins. A killed
screen goes on after its last line.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from vlsafe import data, models, training
from vlsafe.core import store
from vlsafe.core.schema import Example, to_row
from vlsafe.study.study import Bar, Stage, Study, drop
from vlsafe.study.world import COLUMNS, SCREENED, identity, read_from

GUARD_SHARE = 0.3  # of the pictures that the image guard learns from; in the corpora about 0.01 are graphic
HELD_OUT_SHARE = 0.15  # of what thresholds are set on; less, because false alarms are rare and have to be counted
AUDIT = pa.schema(
    [(name, pa.string()) for name in ("corpus", "id", "source", "category", "text_codes", "reasons")]
    + [(name, pa.bool_()) for name in ("has_picture", "kept", "skipped")]
    + [("text_score", pa.float64()), ("image_score", pa.float64()), ("converted", pa.int64())]
)


def make_text_guard(study: Study, work: Path) -> dict[str, Any]:
    """Train a guard that reads, from the base model, and set its threshold on held-out labelled rows."""
    world, fit, tokenizer = study.world(), study.scale.guard, study.tokenizer()
    model = models.checkpoints.load(study.folder("base/llm"))
    rows = data.guards.guard_texts(world, fit.steps * fit.batch_size, world.rng("guard"))
    losses = training.trainers.sft(
        model, tokenizer, training.datasets.text_dataset(rows, tokenizer), fit, work / "training", study.seed, (),
        Bar("guard/text", fit.steps),
    )  # fmt: skip
    drop(work / "training")
    guard, held = data.guards.LanguageModelGuard(model, tokenizer, max_new_tokens=1), _labelled_rows(study)
    truth = [row.category is not None for row in held]
    data.guards.calibrate(guard, [row.turns for row in held], truth, study.scale.corpora.harmful_share / 2)
    guard.save(work)
    return {"loss": losses[-1], "rows": len(rows), "held_out": len(held), "threshold": guard.threshold}


def _labelled_rows(study: Study) -> list[Example]:
    """New instruction rows like the corpus's, harmful ones oftener. Captions ask for nothing and are left out.

    They ask about the verb–object pairs of the training split, as the corpus does: a guard is not asked to generalise here.
    """
    world, sizes = study.world(), study.scale.corpora
    rng = world.rng("guard threshold")
    pool = data.miniature.corpora.paint(world, sizes.guard_pictures, 0.0, rng)
    return data.miniature.corpora.instruction_rows(world, pool, sizes.guard_pictures, sizes, HELD_OUT_SHARE, rng)


def make_image_guard(study: Study, work: Path) -> dict[str, Any]:
    """Fit a guard that looks, on features of the tower, and set its threshold on held-out pictures."""
    tower, processor = study.tower()
    world, sizes = study.world(), study.scale.corpora
    pool = data.miniature.corpora.paint(world, sizes.guard_pictures, GUARD_SHARE, world.rng("guard pictures"))
    guard = data.guards.LinearImageGuard.fitted(tower, processor, [p.png for p in pool], [p.graphic for p in pool])
    held = data.miniature.corpora.paint(world, sizes.guard_pictures, HELD_OUT_SHARE, world.rng("image guard threshold"))
    data.guards.calibrate(guard, [p.png for p in held], [p.graphic for p in held], sizes.harmful_share / 2)
    guard.save(work / "guard.safetensors")
    return {"rows": len(pool), "graphic": sum(p.graphic for p in pool), "threshold": guard.threshold}


def intake_params(study: Study) -> dict[str, Any]:
    """What intake measures rows with: every backbone's chat template, and the tokens that fit into each corpus's stage."""
    scale = study.scale
    context = scale.language.context
    trained_on = {"captions": scale.projector, "instructions": scale.instruct}
    limits = {name: min(context, fit.max_length or context) for name, fit in trained_on.items()}
    return {"templates": sorted({backbone.template for backbone in scale.backbones.values()}), "limits": limits}


def make_screen(study: Study, work: Path) -> dict[str, Any]:
    """Skip unsound rows, put the guards to the rest, write what passes and an audit line for every row."""
    tower, processor = study.tower()
    text = data.guards.LanguageModelGuard.load(study.folder("guard/text"))
    image = data.guards.LinearImageGuard.load(tower, processor, study.folder("guard/image") / "guard.safetensors")
    return screened(study, work, text, image)


def screened(study: Study, work: Path, text: Any, image: Any, unfiltered: bool = False) -> dict[str, Any]:
    """The same with guards that are here; `unfiltered`: also the instructions that intake passes, whatever guards say of them."""
    params = intake_params(study)
    processors = [study.processor(template) for template in params["templates"]]
    audit: list[dict[str, Any]] = []
    kept = {}
    for corpus in SCREENED:
        rows = study.examples("world/corpora", f"{corpus}.parquet")
        lines = data.intake.screen(rows, processors, params["limits"][corpus], text, image)
        passed = list(data.intake.passing(rows, lines))
        if not passed:
            raise ValueError(f"no row of {corpus} is left; the audit's first reason is {lines[0]['reasons']!r}")
        data.intake.refuse_leaks(passed, study.items())
        store.write_rows(work / f"{corpus}.parquet", [to_row(row) for row in passed])
        if unfiltered and corpus == "instructions":
            sound = data.intake.passing(rows, lines, unfiltered=True)
            store.write_rows(work / "unfiltered.parquet", [to_row(row) for row in sound])
        audit += [{"corpus": corpus, **line} for line in lines]
        kept[corpus] = len(passed)
    store.write_rows(work / "audit.parquet", audit)
    counts = {name: sum(line[name] for line in audit) for name in ("skipped", "converted")}
    return {"kept": kept, "screened": len(audit), **counts}


def screen_params(study: Study) -> Any:
    """What decides which rows pass, beside the guards: the two corpora and what intake measures them with."""
    corpora = {name: identity(getattr(study.scale.loaded, name)) for name in SCREENED}
    parents = sorted([one.repo, one.revision] for one in study.asset("parents").values())
    return [corpora, intake_params(study), study.scale.vision, parents]


def _processors(study: Study) -> list[Any]:
    """One per backbone: a row must fit under every backbone's tokens and template."""
    parents, tower = study.asset("parents"), study.asset("tower")
    return [
        models.chat.hub_processor(parents[name], tower, backbone.template, study.scale.vision)
        for name, backbone in study.scale.backbones.items()
    ]


def screen_loaded(study: Study, work: Path) -> dict[str, Any]:
    """Intake and both guards over the two large corpora; what passes, and an audit line for every row.

    `unfiltered.parquet` holds the instructions that intake passes, whatever the guards say of them.
    """
    text, image = (data.guards.opened(study.folder(f"guard/{kind}")) for kind in ("text", "image"))
    readers, limits, kept = _processors(study), intake_params(study)["limits"], {}
    for name in SCREENED:
        lines = work / f"{name}.jsonl"

        def audit_of(rows: Sequence[Example], limit: int = limits[name]) -> list[dict[str, Any]]:
            return data.intake.screen(rows, readers, limit, text, image)

        corpus, bar = study.asset(name), Bar(f"screen {name}", study.asset(name).rows or 0)
        data.intake.append_lines(lines, data.sources.examples(name, corpus), audit_of, bar)
        for file, unfiltered in {name: False, **({"unfiltered": True} if name == "instructions" else {})}.items():
            corpus_rows = map(data.intake.shell, data.sources.examples(name, corpus))
            passed = data.intake.passing(corpus_rows, data.files.json_lines(lines), unfiltered)
            kept[file] = store.write_stream(work / f"{file}.parquet", map(to_row, passed), COLUMNS[Example])
        if not kept[name]:
            raise ValueError(
                f"no row of {name} is left; the audit's first reason is {next(data.files.json_lines(lines))['reasons']!r}"
            )
    audit = ({"corpus": name, **line} for name in SCREENED for line in data.files.json_lines(work / f"{name}.jsonl"))
    screened = store.write_stream(work / "audit.parquet", audit, AUDIT)
    counts = pd.read_parquet(work / "audit.parquet", columns=["skipped", "converted"]).sum().map(int).to_dict()
    for name in SCREENED:
        (work / f"{name}.jsonl").unlink()
    origins = {name: read_from(name, study.asset(name)) for name in SCREENED}
    return {"from": origins, "kept": kept, "screened": screened, **counts}


def pointed(study: Study, work: Path, which: str) -> dict[str, Any]:
    """Note which guard of the hub is meant; its weights stay in the hub's cache."""
    return data.guards.point(study.asset(which), work)


def guard_params(study: Study, which: str) -> Any:
    """What a guard of the hub is and how it decides."""
    guard = getattr(study.scale.loaded, which)
    return guard and [identity(guard.origin), guard.labels, guard.threshold]


TEXT_GUARD, IMAGE_GUARD = (
    Stage(partial(pointed, which=of), (), partial(guard_params, which=of), 0, estimate="a second", shared=True, seedless=True)
    for of in ("text_guard", "image_guard")
)
SCREEN = Stage(
    screen_loaded, ("guard/text", "guard/image"), screen_params, 0, version=2, estimate="days of a GPU (not measured)",
    shared=True, seedless=True,
)  # fmt: skip
