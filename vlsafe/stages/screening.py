"""The guards, and the corpora that they let pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlsafe import store
from vlsafe.schema import to_row
from vlsafe.stages.study import Bar, Study, drop, examples, items, load_tower, tokenizer_of, world_of


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
