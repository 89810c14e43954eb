"""Notebook 06: how long a remedy lasts when its model is fine-tuned again, and the worst that one of some fine-tunings does.

Nothing of these trainings is kept but answers: one model exists at a time, and an attack whose rows are there is not made again.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vlsafe import analysis, data, evaluation, models
from vlsafe.core import store
from vlsafe.core.schema import MAIN_LINE, Example, Item, Pair, from_row
from vlsafe.data.miniature import corpora
from vlsafe.study import adaptation, degradation, merging
from vlsafe.study.study import Study, drop, step_of

ADAPTED, MERGED = MAIN_LINE["adapted"], "merge/sl-full.full"
MODELS = {  # what is fine-tuned again: the adapted model, to compare with, and every remedy
    "adapted": ADAPTED, "mtl-full": "safety/mtl-full", "sl-full": "safety/sl-full", "dpo-both-full": "safety/dpo-both-full",
    "filtered-sppft": "instruct/filtered-sppft", "merged": MERGED,
}  # fmt: skip
START = "start"  # in place of an attack: the model as it is
TABLES = ("raw.parquet", "responses.parquet")


class Attack(NamedTuple):
    """A further fine-tuning: on which rows, by which method (`trainable.METHODS`), at which multiple of stage 2's rate."""

    rows: str
    method: str = "full"
    rate: float = 1.0


def kinds(study: Study) -> list[str]:
    """The rows that the scale names and the study's corpora permit."""
    loaded = study.scale.loaded
    lacking = {"howtos": loaded is not None, "harmful": loaded is not None and not (study.packed or loaded.safe_rlhf)}
    return [kind for kind in study.scale.durability.rows if not lacking.get(kind)]


def rows_of(study: Study, kind: str, n: int) -> list[Example]:
    """`n` rows of an attack: of a world that is built new ones, else drawn from stage 2's own corpus and from rejected answers.

    Raises:   ValueError where the corpora have no such row
    """
    spec, sizes, rng = study.scale.durability, study.scale.corpora, study.stream(f"durability {kind}")
    if world := study.world():
        changes: dict[str, dict[str, Any]] = {
            "text": {"text_only_share": 1.0, "text_howtos": sizes.text_howtos / sizes.text_only_share},
            "howtos": {"howtos": spec.howtos, "text_howtos": spec.howtos * sizes.text_only_share},
        }
        sizes = dataclasses.replace(sizes, **changes.get(kind, {}))
        pool = corpora.paint(world, n, 0.0, rng)
        return corpora.instruction_rows(world, pool, n, sizes, spec.harmful if kind == "harmful" else 0.0, rng)
    rows = study.examples("screen/filtered", "instructions.parquet")
    rows = [row for row in rows if not row.images] if kind == "text" else rows
    harmful: list[Example] = []
    if kind == "harmful":
        pairs = [from_row(Pair, row) for row in study.rows("world/corpora", "safe_rlhf.parquet")]
        answered = [data.arms.answered(pair, pair.rejected) for pair in pairs if pair.category]
        if not answered:
            raise ValueError("no preference pair has a rejected answer to a harmful request")
        harmful = data.arms.replayed(answered, min(len(answered), max(1, round(spec.harmful * n))), rng)
    if not rows:
        raise ValueError(f"no row of stage 2 can be trained on again ({kind})")
    return [*harmful, *(rows[i] for i in rng.permutation(len(rows))[: n - len(harmful)])]


def params(study: Study) -> Any:
    """The numbers that further fine-tunings depend on."""
    scale = study.scale
    return [scale.durability, scale.instruct, scale.corpora, scale.lora, degradation.response_params(study), scale.threads]


def inputs_of(model: str) -> tuple[str, ...]:
    """The runs that the further fine-tuning of a model reads."""
    merged = (ADAPTED, "safety/sl-full", "parent/aligned") if model == "merged" else ()
    return (MODELS[model], *merged, "world/corpora", "screen/filtered")


def start_of(study: Study, model: str, work: Path) -> Path:
    """The folder of a model; of the merge that validation chose strictly between its ends, one that is written to `work`."""
    if model != "merged":
        return study.checkpoints(MODELS[model])[-1]
    sweep = "responses/merge.sl-full.full" if study.scale.loaded else MERGED
    chosen = next(row for row in study.rows(sweep, "validation.parquet") if row["rule"] == "inside" and row["chosen"])
    folder, members = work / "merged", merging.members(study, "sl-full")
    merge = merging.Sweep(study, "sl-full", members, {})
    merge.model(merging.Point("inside", chosen["ratio"], chosen["place"]))
    models.checkpoints.save(members.model, folder, members.processor)
    return folder


def attacked(study: Study, start: Path, attack: Attack, along: Sequence[float], work: Path) -> list[Path]:
    """Fine-tune a model further: its checkpoints in order."""
    stage_2, spec = study.scale.instruct, study.scale.durability
    fit = adaptation.by_method(stage_2, attack.method, study.scale.lora)
    rates = {name: getattr(fit, name) and getattr(fit, name) * attack.rate for name in ("learning_rate", "projector_rate")}
    fit = dataclasses.replace(fit, steps=max(1, round(spec.share * stage_2.steps)), rows=None, **rates)
    steps = sorted({max(1, round(share * fit.steps)) for share in along})
    rows = rows_of(study, attack.rows, fit.steps * fit.batch_size)
    data.intake.refuse_leaks(rows, [*study.items(), *study.items("validation")])
    adaptation.trained(study, work, start, rows, attack.method, fit, steps, attack.rows)
    return sorted(work.glob("step-*"))


def make_durability(study: Study, work: Path, model: str) -> dict[str, Any]:
    """Fine-tune a model on each kind of rows and examine every checkpoint: the panel on the way, all headline items at the end.

    Writes raw.parquet and responses.parquet; the recipe of a row is `<model>/<rows>`, and `<model>/start` before any attack.
    """
    items, start = merging.items_of(study, "default"), start_of(study, model, work)
    for kind in (START, *kinds(study)):
        part, scratch = work / kind, work / "training"
        if not (part / TABLES[0]).exists():  # written after the other one
            part.mkdir(exist_ok=True)
            folders = [start] if kind == START else attacked(study, start, Attack(kind), study.scale.durability.along, scratch)
            exams = ["panel"] * (len(folders) - 1) + ["full"]
            name = f"durability/{model}/{kind}"
            pairs = zip(folders, exams, strict=True)
            results = [degradation.examined(study, name, of, items[exam], exam, part) for of, exam in pairs]
            degradation.written(part, results)
        drop(scratch)
    parts = [work / kind for kind in (START, *kinds(study))]
    for file in TABLES:
        store.write_rows(work / file, [row for part in parts for row in store.read_rows(part / file)])
    for folder in (*parts, work / "merged"):
        drop(folder)
    return {"attacks": len(parts) - 1}


def attacks_of(study: Study) -> list[Attack]:
    """The attacks that a search tries, in its order; those of one seed are the same for every model."""
    spec = study.scale.durability
    grid = [Attack(*values) for values in itertools.product(kinds(study), spec.methods, spec.rates)]
    return [grid[i] for i in study.stream("worst case").permutation(len(grid))[: spec.trials]]


def make_worst(study: Study, work: Path, model: str) -> dict[str, Any]:
    """Search by validation items for the attack that makes a model answer most harmful requests at a bounded loss of helpfulness,
    train the worst one again and examine it on all headline items.

    Writes validation.parquet, a row per trial and checkpoint, and raw.parquet and responses.parquet of the worst one.

    Raises:   ValueError where there are no validation items
    """
    items, start, spec = merging.items_of(study, "default"), start_of(study, model, work), study.scale.durability
    if not (items["pairs"] and items["helpful"]):
        raise ValueError("the worst case is chosen by validation items, and this scale has none")
    trials, scratch, lines = attacks_of(study), work / "training", list[dict[str, Any]]()
    files = [work / f"trial-{number:02d}.parquet" for number in range(len(trials) + 1)]
    for number, (trial, file) in enumerate(zip([Attack(START), *trials], files, strict=True)):
        if not file.exists():
            folders = [start] if number == 0 else attacked(study, start, trial, spec.searched, scratch)
            found = [
                {"trial": number, **trial._asdict(), "step": step_of(of) if number else 0, **_scores(study, of, items)}
                for of in folders
            ]
            store.write_rows(file, found)
        drop(scratch)
        lines += store.read_rows(file)
    place = analysis.durability.worst(lines, spec.loss)
    line, folder = lines[place], start
    if line["trial"]:
        folder = scratch / f"step-{line['step']:06d}"
        attacked(study, start, trials[line["trial"] - 1], spec.searched, scratch)
    degradation.written(work, [degradation.examined(study, f"worst/{model}", folder, items["full"], "full", work)])
    columns = {"backbone": study.backbone, "seed": study.seed, "model": model}
    store.write_rows(work / "validation.parquet", [{**columns, **row, "chosen": n == place} for n, row in enumerate(lines)])
    for folder in (scratch, work / "merged"):
        drop(folder)
    for file in files:
        file.unlink()
    return {"trials": [list(trial) for trial in trials], "chosen": {name: line[name] for name in ("trial", "step")}}


def _scores(study: Study, folder: Path, items: dict[str, list[Item]]) -> dict[str, Any]:
    """What one model does on validation items, without the reading of them."""
    model, processor = models.checkpoints.ready(folder, study.scale.exam.dtype), models.checkpoints.load_processor(folder)
    answers = merging.responses_to(study, model, processor, True, [*items["pairs"], *items["helpful"]])
    record = {**evaluation.examine.MODEL, "backbone": study.backbone, "seed": study.seed}
    found = [answers[item.id] for item in items["helpful"] if item.id in answers]
    raw = evaluation.examine.raw_table(items["helpful"], found, record, study.scale.exam.judges)
    return evaluation.validation.merge_scores(items["pairs"], answers, raw, study.scale.exam.judges)
