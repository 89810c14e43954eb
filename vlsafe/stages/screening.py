"""The guards, and the corpora that they let pass."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlsafe import store
from vlsafe.schema import Example, to_row
from vlsafe.stages.study import Bar, Study, drop, examples, items, load_tower, processor_of, tokenizer_of, world_of


def make_text_guard(study: Study, work: Path) -> dict[str, Any]:
    from vlsafe import guards, models, train

    world, fit, tokenizer = world_of(study), study.scale.guard, tokenizer_of(study)
    model = models.load(study.folder("base/llm"))
    rows = guards.guard_texts(world, fit.steps * fit.batch_size, world.rng("guard"))
    losses = train.sft(
        model, tokenizer, train.text_dataset(rows, tokenizer), fit, work / "training", study.seed, (),
        Bar("guard/text", fit.steps),
    )  # fmt: skip
    drop(work / "training")
    models.save(model, work, tokenizer)
    return {"loss": losses[-1], "rows": len(rows)}


def make_image_guard(study: Study, work: Path) -> dict[str, Any]:
    from vlsafe import guards
    from vlsafe.miniature.corpora import paint

    tower, processor = load_tower(study)
    world = world_of(study)
    pool = paint(world, study.scale.corpora.guard_pictures, 0.3, world.rng("guard pictures"))
    guard = guards.LinearImageGuard.fitted(tower, processor, [p.png for p in pool], [p.graphic for p in pool])
    guard.save(work / "guard.safetensors")
    return {"rows": len(pool), "graphic": sum(p.graphic for p in pool)}


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
    seen = iter(image.assess([row.images[0] for row in sound if row.images]))
    said = text.assess([row.turns for row in sound])
    lines = iter(mix.audit(sound, said, [next(seen) if row.images else None for row in sound]))
    return [next(lines) if defect is None else mix.skipped(row, defect) for row, defect in zip(rows, defects, strict=True)]


def make_screen(study: Study, work: Path) -> dict[str, Any]:
    from vlsafe import guards, mix, models

    tower, processor = load_tower(study)
    folder = study.folder("guard/text")
    text = guards.LanguageModelGuard(models.load(folder), models.load_processor(folder))
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
