"""The guards, and the corpora that they let pass."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlsafe import store
from vlsafe.schema import Example, to_row
from vlsafe.stages.study import Bar, Study, drop, examples, items, load_tower, processor_of, tokenizer_of, world_of

GUARD_SHARE = 0.3  # of the pictures that the image guard learns from; in the corpora about 0.01 are graphic
HELD_OUT_SHARE = 0.15  # of what thresholds are set on; less, because false alarms are rare and have to be counted


def text_guard_params(study: Study) -> Any:
    return [study.scale.guard, study.scale.corpora, study.scale.threads]


def make_text_guard(study: Study, work: Path) -> dict[str, Any]:
    """Train a guard that reads, from the base model, and set its threshold on held-out labelled rows."""
    from vlsafe import guards, models, train

    world, fit, tokenizer = world_of(study), study.scale.guard, tokenizer_of(study)
    model = models.load(study.folder("base/llm"))
    rows = guards.guard_texts(world, fit.steps * fit.batch_size, world.rng("guard"))
    losses = train.sft(
        model, tokenizer, train.text_dataset(rows, tokenizer), fit, work / "training", study.seed, (),
        Bar("guard/text", fit.steps),
    )  # fmt: skip
    drop(work / "training")
    guard, held = guards.LanguageModelGuard(model, tokenizer, max_new_tokens=1), _labelled_rows(study)
    truth = [row.category is not None for row in held]
    guards.decide(guard, [row.turns for row in held], truth, study.scale.corpora.harmful_share / 2)
    guard.save(work)
    return {"loss": losses[-1], "rows": len(rows), "held_out": len(held), "threshold": guard.threshold}


def _labelled_rows(study: Study) -> list[Example]:
    """New instruction rows like the corpus's, harmful ones oftener. Captions ask for nothing and are left out.

    They ask about the deeds of the training split, as the corpus does: a guard is not asked to generalise here.
    """
    from vlsafe.miniature.corpora import instruction_rows, paint

    world, sizes = world_of(study), study.scale.corpora
    rng = world.rng("guard threshold")
    pool = paint(world, sizes.guard_pictures, 0.0, rng)
    return instruction_rows(world, pool, sizes.guard_pictures, sizes.text_only_share, HELD_OUT_SHARE, rng)


def make_image_guard(study: Study, work: Path) -> dict[str, Any]:
    """Fit a guard that looks, on features of the tower, and set its threshold on held-out pictures."""
    from vlsafe import guards
    from vlsafe.miniature.corpora import paint

    tower, processor = load_tower(study)
    world, sizes = world_of(study), study.scale.corpora
    pool = paint(world, sizes.guard_pictures, GUARD_SHARE, world.rng("guard pictures"))
    guard = guards.LinearImageGuard.fitted(tower, processor, [p.png for p in pool], [p.graphic for p in pool])
    held = paint(world, sizes.guard_pictures, HELD_OUT_SHARE, world.rng("image guard threshold"))
    guards.decide(guard, [p.png for p in held], [p.graphic for p in held], sizes.harmful_share / 2)
    guard.save(work / "guard.safetensors")
    return {"rows": len(pool), "graphic": sum(p.graphic for p in pool), "threshold": guard.threshold}


def intake_params(study: Study) -> dict[str, Any]:
    """What intake measures rows with: every backbone's chat template, and the tokens that fit into each corpus's stage."""
    scale = study.scale
    context = scale.language.context
    trained_on = {"captions": scale.projector, "instructions": scale.instruct}
    limits = {name: min(context, fit.max_length or context) for name, fit in trained_on.items()}
    return {"templates": sorted({backbone.template for backbone in scale.backbones.values()}), "limits": limits}


def intake(study: Study, corpus: str, rows: Sequence[Example]) -> list[str | None]:
    """Why each row cannot be trained on, or None. The corpora are shared: a row must fit under every backbone's template."""
    from vlsafe import mix

    params = intake_params(study)
    processors = [processor_of(study, template) for template in params["templates"]]
    return [mix.unsound(row, processors, params["limits"][corpus]) for row in rows]


def screen(rows: Sequence[Example], defects: Sequence[str | None], text: Any, image: Any) -> list[dict[str, Any]]:
    """One audit line per row in order; the guards see the sound rows only."""
    from vlsafe import mix

    sound = [row for row, defect in zip(rows, defects, strict=True) if defect is None]
    seen = iter(image.assess([data for row in sound for data in row.images]))
    worst = [max((next(seen) for _ in row.images), key=lambda a: (a.unsafe is not False, a.score), default=None) for row in sound]
    lines = iter(mix.audit(sound, text.assess([row.turns for row in sound]), worst))
    return [next(lines) if defect is None else mix.skipped(row, defect) for row, defect in zip(rows, defects, strict=True)]


def make_screen(study: Study, work: Path) -> dict[str, Any]:
    """Skip unsound rows, put the guards to the rest, write what passes and an audit line for every row."""
    from vlsafe import guards, mix

    tower, processor = load_tower(study)
    text = guards.LanguageModelGuard.load(study.folder("guard/text"))
    image = guards.LinearImageGuard.load(tower, processor, study.folder("guard/image") / "guard.safetensors")
    audit: list[dict[str, Any]] = []
    kept = {}
    for corpus in ("captions", "instructions"):
        rows = examples(study, "world/corpora", f"{corpus}.parquet")
        lines = screen(rows, intake(study, corpus, rows), text, image)
        passed = mix.screened(rows, lines)
        if not passed:
            raise ValueError(f"no row of {corpus} is left; the audit's first reason is {lines[0]['reasons']!r}")
        mix.refuse_leaks(passed, items(study))
        store.write_rows(work / f"{corpus}.parquet", [to_row(row) for row in passed])
        audit += [{"corpus": corpus, **line} for line in lines]
        kept[corpus] = len(passed)
    store.write_rows(work / "audit.parquet", audit)
    counts = {name: sum(line[name] for line in audit) for name in ("skipped", "converted")}
    return {"kept": kept, "screened": len(audit), **counts}
