"""A gallery of any part of a run store: what is there is drawn, what is missing is named, and nothing raises or warns."""

import html.parser
import random
import warnings
from functools import cache

import numpy as np
import pandas as pd
import pytest

from vlsafe import analysis, plots
from vlsafe.analysis import clustered, stats
from vlsafe.analysis.measures import MEASURES
from vlsafe.publish import gallery, provenance, report, results
from vlsafe.study import graph

# For the sake of time, many subsets do without recipes, measures and claims that a gallery treats as it treats others, and with
# few draws: their numbers do not matter.
LIKE_OTHERS = (
    "textsft", "grpo", "dpo-text", "dpo-image", "replay", "-lora", "-sppft", "-slow", "-fast", "sibling-full", "clean-full",
    "looking-full", "unfiltered-full", "merge/dpo", "merge/aligned",
)  # fmt: skip
SOME = ("text_asr", "multimodal_asr", "twin_refusal", "exaggerated_refusal", "helpfulness", "text_asr_guard", "mme_score")
CLAIMS = ("1", "4", "4b", "5", "7", "8", "9b", "10", "12")  # 9 needs more batches than NANO has
FEW = 20
GO_ALIKE = ("dose-", "confounds.", "mtl-full", "dpo-both-full")  # what goes with them goes as it does with others
WITHOUT_FRAMES = ("world/", "base/", "tower/", "guard/", "parent/", "projector/", "instruct/", "probe/direction")
GONE = {  # stage: the tables that nothing else can make
    "screen/filtered": {"T01_filtering_audit", "T01_guard_quality"},
    "probe/localisation": {"F09_scaling", "F10_against_random"},
    "examination/instruct.filtered-full": {"T08_precision", "T03_matched"},
    "examination/instruct.textonly-full": {"T03_matched"}, "examination/projector.filtered": {"T03_matched"},
    "probe/layers": {"F07_cka", "F07_probes"}, "probe/drift": {"F07_drift", "F11_prediction", "T03_matched"},
    "probe/objectives": {"F11_task_vectors"}, "causal/transplants": {"F10_against_random"},
    "causal/directions": {"F10_directions"},
    "merge/sl-full": {
        "T07_choice", "T07_barriers", "T07_ensembles", "T07_hypervolume", "T07_dominance", "T07_merging",
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(study):
    """The finished stages of the NANO study that subsets are taken from, by name."""
    names = [name for name in graph.planned(study) if not any(part in name for part in LIKE_OTHERS)]
    return {run[1]: run for run in results.finished([study], names)}


@pytest.fixture(scope="module")
def read():
    """Tables are read once; of merges, those that are in some claim."""

    def kept(path):
        frame = whole(path)
        swept = "/merge/" in str(path) and "recipe" in frame  # answers have none
        return frame[frame["recipe"].str.match("(inside|ensemble)/|linear/.*/0.50")] if swept else frame

    whole = pd.read_parquet
    return cache(kept)


@pytest.fixture
def part(study, runs, read, monkeypatch):
    """A function from names of stages to the frames that they alone make, and what is missing beside them."""
    numbers = study.numbers("probe/localisation")
    monkeypatch.setattr(type(study), "numbers", lambda *_: numbers)
    monkeypatch.setattr(pd, "read_parquet", lambda path: read(path).copy())
    monkeypatch.setattr(analysis.degradation, "MEASURES", {name: MEASURES[name] for name in SOME})
    compare, flip, resamples = clustered.compare, clustered.sign_flip, stats.resamples
    monkeypatch.setattr(
        clustered, "compare", lambda strata, rng, against=0.0, draws=0, level=0.95: compare(strata, rng, against, FEW)
    )
    monkeypatch.setattr(clustered, "sign_flip", lambda values, rng: flip(values, rng, FEW))
    monkeypatch.setattr(stats, "resamples", lambda n, draws, rng: resamples(n, FEW, rng))
    monkeypatch.setattr(analysis.probing._correlated, "__defaults__", (FEW,))
    monkeypatch.setattr(analysis.tuning, "SHOWN", SOME)
    monkeypatch.setattr(analysis.degradation, "OVERVIEW", SOME)
    monkeypatch.setattr(analysis.claims, "CLAIMS", tuple(claim for claim in analysis.claims.CLAIMS if claim.name in CLAIMS))

    def frames(names):
        monkeypatch.setattr(results, "finished", lambda _, wanted: [runs[name] for name in wanted if name in names])
        return results.results([study]), {name: "not made yet" for name in runs if name not in names}

    return frames


@pytest.fixture
def made(tmp_path, monkeypatch, part):
    """A function that makes the gallery of some stages and checks it, with figures where `drawn`; of tables those `wanted`."""

    def write(figure, frame, folder, name, stamp):
        figure.canvas.draw()
        limits = [axis.get_xlim() + axis.get_ylim() for axis in figure.axes]
        texts = [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]
        assert np.isfinite(limits).all() and len(frame), name
        assert not [text for text in texts if "nan" in text.replace("nano", "")], name

    monkeypatch.setattr(plots.style, "write", write)
    whole, figures = gallery.TABLES, gallery.FIGURES

    def make(names, drawn=False, wanted=lambda name: True):
        frames, missing = part(names)
        tables, pictures = {name: table for name, table in whole.items() if wanted(name)}, figures if drawn else {}
        monkeypatch.setattr(gallery, "TABLES", tables)
        monkeypatch.setattr(gallery, "FIGURES", pictures)
        if "raw" not in frames:
            with pytest.raises(ValueError, match="no examination is made yet"):
                gallery.make(frames, "nano", tmp_path, [], missing)
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            result = gallery.make(frames, "nano", tmp_path, [], missing)
        lines = result.left_out.set_index("what")
        assert set(result.written) - {gallery.LEFT_OUT} | set(lines.index) == {*tables, *pictures, *missing}
        assert not set(result.written) & set(lines.index) and lines["reason"].str.len().min() > 10
        assert {path.stem for path in tmp_path.glob("*.md")} & {*tables, gallery.LEFT_OUT} == {
            name for name in result.written if name not in pictures
        }
        return lines

    return make


def test_every_single_stage_alone(made, runs):
    measured = [name for name in runs if made({name}) is not None]
    assert len(measured) > 10 and all(name.startswith(("examination/", "judging/", "merge/")) for name in measured)


def test_all_but_one_stage(made, runs):
    """What the absence of a stage takes needs it and is named with it; where no raw table goes, only its artefacts are made."""
    whole, gone = set(made(set(runs)).index), {}
    for name in runs:
        if name.startswith(WITHOUT_FRAMES) or any(part in name for part in GO_ALIKE):
            continue
        raw = name.startswith(("examination/", "judging/", "merge/"))
        lines = made(set(runs) - {name}, wanted=lambda table, name=name, raw=raw: raw or provenance.made_of(table, name))
        more = lines[~lines.index.isin([*whole, name])]
        assert more["missing"].str.contains(name, regex=False).all(), (name, more)
        gone[name] = set(more.index)
    of_the_full_grid = {"T06_sppft", "T06_sppft_over_seeds", "T05_conflict_free", "T07_ratios", "T07_regret"}
    of_the_full_grid |= {"T10_half_lives", "T10_search", "T10_worst_case"}
    assert whole == of_the_full_grid | {"T03_seeing", "T09_beside", "F15_people"} | {"T00_hours"}  # pocket's; no run is named
    assert {stage: names for stage, names in gone.items() if names} == GONE


@pytest.mark.parametrize("drawn", [False, True])
def test_random_subsets(made, runs, drawn):
    rng = random.Random(int(drawn))
    sizes = rng.choices(range(2, len(runs) // 3), k=3 if drawn else 12)
    assert sum(made(set(rng.sample(list(runs), size)), drawn) is not None for size in sizes) >= (2 if drawn else 8)


def test_what_an_earlier_gallery_left_is_removed_and_a_report_needs_no_ledger(part, runs, tmp_path):
    frames, missing = part(set(runs))
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(gallery, "FIGURES", {})
    gallery.make(frames, "nano", tmp_path, [], missing)
    assert (tmp_path / "T04_confounds.csv").exists() and (tmp_path / "T09_claims.md").exists()
    frames, missing = part({"examination/confounds.parent"})
    written, left_out = gallery.make(frames, "nano", tmp_path, [], missing)
    monkeypatch.undo()
    assert set(written) == {"T04_confounds", "T09_claims", gallery.LEFT_OUT}  # the ledger says that nothing was measured
    assert {path.name.partition(".")[0] for path in tmp_path.iterdir()} == {*written, "provenance"}
    said = left_out.set_index("what")
    assert "examination/instruct.filtered-full" in said.loc["T02_degradation", "missing"]
    assert said.loc["F07_cka", "reason"] == "needs probe/layers" and said.loc["F07_cka", "missing"] == "probe/layers"
    text = report.report(tmp_path, tmp_path / "report.html").read_text(encoding="utf-8")
    assert text.index("What is not here and why") < text.index("T04. System prompt") and "needs probe/layers" in text


def test_a_report_shows_what_is_in_a_table_cell_by_cell(tmp_path):
    cells = ["a|b", "0.*[1-9]*", "<b>x</b> & y", "back\\slash", "`c`", "two\nlines"]
    provenance.write_table(pd.DataFrame({"model": cells}), tmp_path, "T02_degradation", "T02. A table", "")
    found, parser = [("", "")], html.parser.HTMLParser()
    parser.handle_starttag = lambda tag, _: found.append((tag, ""))
    parser.handle_data = lambda text: found.append((found[-1][0], found.pop()[1] + text))
    parser.feed(report.report(tmp_path, tmp_path / "report.html").read_text(encoding="utf-8"))
    assert [text.strip() for tag, text in found if tag == "td"] == [*cells[:-1], "two lines"]


def test_a_caption_names_the_judges_of_its_own_measures(tmp_path):
    studies = pd.DataFrame({"backbone": ["a"], "seed": [0]})
    lines = {"T04_confounds": ["confounds_asr"], "T08_models": ["figstep_asr", "text_asr"], "T09_claims": None}
    for name, measures in lines.items():
        frame = pd.DataFrame({"measure": measures} if measures else {"claim": ["1"]})
        table = (frame, frame) if name != "T04_confounds" else (frame, frame, {"sizes": ""})
        gallery._write_table(name, table, tmp_path, "mini", studies, lambda names: f"By {', '.join(names)}.")
        told = ["text_asr"] if name == "T08_models" else measures or gallery.HEADLINE
        assert (tmp_path / f"{name}.md").read_text(encoding="utf-8").rstrip().endswith(f"By {', '.join(told)}.")


def test_a_caption_names_the_studies_of_its_own_rows():
    studies = pd.DataFrame({"backbone": ["a", "a", "b", "b"], "seed": [0, 1, 0, 1]})
    for rows, wanted in (
        ({"value": [0.5]}, "a, seeds 0, 1; b, seeds 0, 1"),
        ({"value": [0.5], "low": [0.4], "high": [0.6]}, "a, seeds 0, 1; b, seeds 0, 1; 95 % intervals"),
        ({"backbone": ["a"]}, "a, seeds 0, 1"),
        ({"seed": [1]}, "a, seed 1; b, seed 1"),
        ({"backbone": ["a", "a", "b"], "seed": [0, 1, 0]}, "a, seeds 0, 1; b, seed 0"),
        ({"backbone": ["a", "b"], "seeds": [1, 2]}, "a, 1 of its 2 seeds; b, seeds 0, 1"),
    ):
        assert gallery._origin("mini", studies, pd.DataFrame(rows)) == f"Scale mini; {wanted}."


def test_hours_are_of_each_stage_once_and_answers_of_merges_by_themselves():
    stages = (("responses", "safety.sl-full"), ("responses", "merge.sl-full"), ("safety", "sl-full"), ("safety", "dpo-full"))
    kept = ("backbone", "seed", "stage", "recipe", "seconds")
    runs = [dict(zip(kept, ("a", seed, *of, 1800), strict=True)) for of in stages for seed in (0, 1)]
    found = provenance.hours(runs[:-1])
    assert found["stage"].tolist() == ["responses", "responses/merge.*", "safety"]
    assert found["runs"].tolist() == [2, 2, 3] and found["seeds"].tolist() == [2, 2, 2]
    assert found["hours"].tolist() == [1, 1, 1.5] and found["hours a seed"].tolist() == [0.5, 0.5, 0.75]


def test_every_backbone_has_lines_in_a_table_that_is_cut(tmp_path):
    frame = pd.DataFrame({"backbone": ["a"] * 300 + ["b"] * 10, "value": range(310)})
    gallery.provenance.write_table(frame, tmp_path, "T02_degradation", "T02. X", "caption")
    text = report._section(tmp_path, "T02_degradation")
    assert text.count("<td>a") == report.MOST // 2 and text.count("<td>b") == 10
    assert f"table, 310 lines, {report.MOST // 2 + 10} shown" in text


def test_a_table_without_a_line_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(gallery.analysis.merging, "regret", lambda raw, lines: raw[:0])
    raw = pd.DataFrame({"backbone": "b", "seed": 0}, index=[0])
    made = gallery.make({"raw": raw, "merged": raw}, "mini", tmp_path, [], only=("T07_regret",))
    assert made.written == [gallery.LEFT_OUT] and not (tmp_path / "T07_regret.csv").exists()
    assert made.left_out["reason"].tolist() == [gallery.NOTHING]


def test_a_gallery_that_is_killed_leaves_no_table_under_anothers_name(tmp_path, monkeypatch):
    """What a table is made of is written with it, not at the end."""
    raw = pd.DataFrame({"backbone": "b", "seed": 0}, index=[0])
    monkeypatch.setattr(gallery, "TABLES", {"T02_degradation": lambda of: (raw,), "T03_arms": lambda of: 1 / 0})
    monkeypatch.setattr(gallery, "FIGURES", {})
    monkeypatch.setattr(gallery, "_write_table", lambda *of: None)
    with pytest.raises(ZeroDivisionError):
        gallery.make({}, "mini", tmp_path, [], only=("T02_degradation", "T03_arms"))
    assert (tmp_path / "T02_degradation.provenance.json").exists()
