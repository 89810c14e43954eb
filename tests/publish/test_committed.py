"""The committed tables follow from the committed results: read again from raw rows, and counted again with plain NumPy."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from vlsafe import analysis
from vlsafe.core.schema import MAIN_LINE, MEDIAN_SEED
from vlsafe.publish import archive, provenance, results
from vlsafe.study.study import Study

FIGURES = Path(__file__).parents[2] / "figures" / "mini"
ARCHIVES = sorted((FIGURES / "results").glob("*.tar.xz"))
MAIN = [f"examination/{MAIN_LINE[run].replace('/', '.')}" for run in ("parent", "stage 1", "adapted")]
MORE = [
    f"examination/{run}"
    for run in ("instruct.unfiltered-full", "instruct.textonly-full", "safety.sl-full", "safety.dpo-both-full")
]


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    root = tmp_path_factory.mktemp("results")
    for file in ARCHIVES:
        archive.unpacked(file, root)
    return results.studies_in_store(Study.open("mini", "mini-chat", 0, root))


@pytest.fixture(scope="module")
def raw(studies):
    return results.read(studies, [*MAIN, *MORE, "judging/guard-text"], "raw.parquet")


def test_every_study_behind_the_committed_tables_is_archived(studies):
    behind = pd.read_csv(FIGURES / "T08_models.csv")[["backbone", "seed"]].drop_duplicates()
    assert {(study.backbone, study.seed) for study in studies} == set(behind.itertuples(index=False, name=None))
    assert len(ARCHIVES) == len(behind)


def test_the_main_table_follows_from_the_archives(studies, raw, tmp_path):
    table = analysis.degradation.degradation(raw).round(4)
    again = analysis.capability.of_main_line(table, analysis.capability.guard(raw, texts(studies)))
    provenance.write_table(again, tmp_path, "T02_degradation", "", "")
    found, wanted = (pd.read_csv(folder / "T02_degradation.csv") for folder in (tmp_path, FIGURES))
    columns = [name for name in wanted if "low" not in name and "high" not in name]  # intervals are drawn per table
    key = ["backbone", "seed", "measure"]
    pd.testing.assert_frame_equal(
        found[columns].sort_values(key, ignore_index=True), wanted[columns].sort_values(key, ignore_index=True), atol=1e-4
    )


def test_notebooks_and_commands_are_of_the_median_seed():
    """By the rule that was written down before the eighth seed was measured (LOG.md, 2026-11-28)."""
    table = pd.read_csv(FIGURES / "T02_degradation.csv")
    adapted = table[(table["backbone"] == "mini-chat") & (table["measure"] == "text_asr")]
    ordered = adapted.sort_values(["instruct_value", "seed"])["seed"].tolist()
    assert len(ordered) >= 8 and ordered[(len(ordered) - 1) // 2] == MEDIAN_SEED
    root = FIGURES.parents[1]
    assert f"\nSEEDS     ?= $(if $(filter mini,$(SCALE)),{MEDIAN_SEED},0)\n" in (root / "Makefile").read_text(encoding="utf-8")
    for path in (root / "notebooks").glob("*.ipynb"):
        assert f"\\nseed = {MEDIAN_SEED}\\n" in path.read_text(encoding="utf-8"), path.name


def texts(studies):
    return results.read(studies, [*MAIN, *MORE], "responses.parquet", ("backbone", "seed"))


@pytest.fixture(scope="module")
def answered(raw):
    """(study, run, benchmark, harmful) -> item -> event and label of a full examination, by the judge of the miniature, read
    row by row in plain Python."""
    columns = ["backbone", "seed", "stage", "recipe", "exam", "benchmark", "harmful", "judge", "item", "event", "label", "group"]
    found = {}
    for backbone, seed, stage, recipe, exam, of, harmful, judge, item, event, label, group in zip(
        *(raw[c].tolist() for c in columns), strict=True
    ):
        if exam == "full" and judge == "world" and group in ("base", "SD", "TYPO", "SD_TYPO") and event is not None:
            key = (backbone, seed, f"{stage}/{recipe}", of, bool(harmful))
            found.setdefault(key, {})[item] = {"complied": float(event), "refused": float(label == "refused")}
    return found


EFFECTS = [  # claim, comparison's before and after, benchmark, harmful, event
    ("1", "parent", "instruct/unfiltered-full", "sorry_bench", True, "complied"),
    ("2", "stage 1", "instruct/unfiltered-full", "mm_safetybench", True, "complied"),
    ("4b", "instruct/textonly-full", "adapted", "sorry_bench", True, "complied"),
    ("5r", "adapted", "safety/sl-full", "mm_safetybench", False, "refused"),
    ("6r", "adapted", "safety/dpo-both-full", "mm_safetybench", False, "refused"),
]


@pytest.mark.parametrize(("claim", "before", "after", "benchmark", "harmful", "event"), EFFECTS)
def test_five_committed_effects_again(answered, claim, before, after, benchmark, harmful, event):
    ledger = analysis.claims.written(FIGURES)
    lines = ledger[(ledger["claim"] == claim) & (ledger["item_level"] != analysis.claims.NOT)]
    assert len(lines)
    for line in lines.itertuples():
        means = []
        for seed in sorted({key[1] for key in answered if key[0] == line.backbone}):
            runs = (MAIN_LINE.get(run, run) for run in (before, after))
            a, b = (answered.get((line.backbone, seed, run, benchmark, harmful), {}) for run in runs)
            if a and b:
                means.append(np.mean([b[item][event] - a[item][event] for item in a if item in b]))
        assert len(means) == line.seeds and np.mean(means) == pytest.approx(line.effect, abs=2e-4), line
