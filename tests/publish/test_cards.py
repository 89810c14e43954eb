"""Where artefacts come from, whether two result sets agree, published numbers, the report; and 07 on a machine without torch."""

import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pandas as pd
import pytest
import yaml
from conftest import NANO
from huggingface_hub import ModelCard
from PIL import Image

from vlsafe import cli
from vlsafe.analysis import degradation
from vlsafe.core.scale import as_plain
from vlsafe.plots import claims as plots_claims
from vlsafe.publish import gallery, modelcards, provenance, report
from vlsafe.study.study import Study

RUN = {"packages": {"numpy": "2.0"}, "commit": "abc", "backbone": "b", "seed": 0}
RUNS = [
    {**RUN, "stage": "screen", "recipe": "filtered", "digest": "d0"},
    {**RUN, "stage": "examination", "recipe": "parent.aligned", "digest": "d1", "packages": {"numpy": "2.1"}, "seed": 2},
    {**RUN, "stage": "examination", "recipe": "safety.sl-full", "digest": "d2"},
]


def test_a_stamp_names_the_runs_that_an_artefact_reads():
    assert provenance.stamp("T01_filtering_audit", "mini", RUNS)["runs"] == {"b/seed0/screen/filtered": "d0"}
    told = provenance.stamp("T08_models", "mini", RUNS)
    assert told["runs"] == {"b/seed2/examination/parent.aligned": "d1", "b/seed0/examination/safety.sl-full": "d2"}
    assert told["packages"] == {"numpy": "2.0, 2.1"} and told["seeds"] == [0, 2] and told["commits"] == ["abc"]
    assert len(provenance.stamp("T99_of_tomorrow", "mini", RUNS)["runs"]) == 3


@pytest.fixture
def results(tmp_path):
    """Two folders with one table each: the second in another order, one number moved by 0.003."""
    frame = pd.DataFrame({"recipe": ["a", None, None], "seed": [0, 0, 1], "value": [0.1, 0.2, 0.3], "n": [10, 10, 10]})
    for name, of in (("one", frame), ("two", frame.iloc[::-1].assign(value=[0.303, 0.2, 0.1]))):
        (tmp_path / name).mkdir()
        of.to_csv(tmp_path / name / "T02.csv", index=False)
    return tmp_path


def test_result_sets_are_compared_within_a_tolerance(results, capsys):
    pair = [str(results / "one"), str(results / "two")]
    assert cli.main(["diff", *pair]) == 0 and "no difference" in capsys.readouterr().out
    assert cli.main(["diff", *pair, "--atol", "0.001"]) == 1
    line = provenance.differences(results / "one", results / "two", 0.001).iloc[0]
    assert (line["file"], line["what"], line["cells"]) == ("T02.csv", "value", 1) and line["largest"] == pytest.approx(0.003)
    assert cli.main(["diff", pair[0], str(results)]) == 2 and "no CSV file" in capsys.readouterr().err
    (results / "two" / "T02.csv").write_bytes("ä".encode("utf-16"))
    assert cli.main(["diff", *pair]) == 2 and "T02.csv is no table of ours" in capsys.readouterr().err


def test_numbers_in_lists_are_compared_one_by_one(tmp_path):
    for name, effects in (("one", "[0.5208, -0.25]"), ("two", "[0.5218, -0.25]")):
        (tmp_path / name).mkdir()
        frame = pd.DataFrame({"claim": ["1", "2"], "effects": [effects, "[0.1]"]})
        frame.to_csv(tmp_path / name / "T09.csv", index=False)
    assert not len(provenance.differences(tmp_path / "one", tmp_path / "two", 0.01))
    found = provenance.differences(tmp_path / "one", tmp_path / "two", 1e-4)
    assert found[["what", "cells"]].to_numpy().tolist() == [["effects 0", 1]]
    frame.assign(effects=["[0.5218, -0.25, 0.3]", "[0.1]"]).to_csv(tmp_path / "two" / "T09.csv", index=False)
    found = provenance.differences(tmp_path / "one", tmp_path / "two", 0.01)
    assert found["what"].tolist() == ["column effects 2 only in the second"]


def test_missing_files_lines_columns_and_numbers_are_differences(results):
    frame = pd.read_csv(results / "two" / "T02.csv")
    frame.drop(columns="n").iloc[:2].assign(value=[float("nan"), 0.2]).to_csv(results / "two" / "T02.csv", index=False)
    frame.to_csv(results / "two" / "T03.csv", index=False)
    found = provenance.differences(results / "one", results / "two", 0.01)
    assert found["what"].tolist() == [
        "column n only in the first",
        "lines only in the first",
        "value",
        f"only in {results / 'two'}",
    ]
    assert found["cells"].tolist()[:3] == [3, 1, 1]


def test_published_numbers_are_checked_and_stand_beside_ours(tmp_path):
    ours = pd.DataFrame(
        {"stage": "instruct", "recipe": "filtered-full", "measure": "mme_score", "backbone": "b", "value": [0.4, 0.6]}
    )
    ours = pd.concat([ours, ours.assign(measure="text_asr")])
    head = "model,measure,value,maximum,tolerance,source\n"
    (tmp_path / "a.csv").write_text(f"{head}L,mme_score,1500,2000,499,table 1\nM,mme_score,1500,2000,500,table 2\n")
    found = provenance.compare_published(provenance.published(tmp_path), ours)
    line = found.iloc[0]
    assert line["fraction"] == 0.75 and line["ours, b"] == 0.5 and found["agrees, b"].tolist()[:3] == ["no", "yes", ""]
    assert found["measure"].tolist()[2:] == ["text_asr"]
    assert found["value"].notna().sum() == 2 and found["ours, b"].notna().sum() == 3
    own = provenance.compare_published(provenance.published(tmp_path).assign(official=False), ours)
    assert set(own["agrees, b"]) == {""}, "items of ours are no benchmark's"
    (tmp_path / "b.csv").write_text(f"{head}L,mme_score,1,2,,x\n")
    with pytest.raises(ValueError, match="every value has a tolerance above 0"):
        provenance.published(tmp_path)
    (tmp_path / "b.csv").write_text(f"{head}L,mme_scor,1,2,1,x\n")
    with pytest.raises(ValueError, match="did you mean 'mme_score'"):
        provenance.published(tmp_path)
    (tmp_path / "b.csv").write_text(f"{head}L,mme_score,3,2,1,x\n")
    with pytest.raises(ValueError, match="between 0 and its maximum"):
        provenance.published(tmp_path)
    (tmp_path / "b.csv").write_text("model,value\nL,3\n")
    with pytest.raises(ValueError, match="needs the columns"):
        provenance.published(tmp_path)
    assert provenance.published(tmp_path / "nowhere").empty


def test_the_known_published_numbers_are_in_the_repository():
    found = provenance.published(Path(__file__).parents[2] / "env" / "published").set_index(["model", "measure"])
    assert found.loc["LLaVA-1.5 7B", "value"].to_dict() == {
        "mme_perception": 1510.7,
        "mmbench_circular": 64.3,
        "seed_likelihood": 58.6,
    }
    assert found.loc["LLaVA-1.5 13B", "value"].to_dict() == {
        "mme_perception": 1531.3,
        "mmbench_circular": 67.7,
        "seed_likelihood": 61.6,
    }


def test_nothing_is_replaced_that_somebody_did_not_name(tmp_path, monkeypatch, capsys):
    """The ledger by a report, figures of many studies by those of one; and what is not there is said to be removed by nobody."""
    (tmp_path / "T09_claims.md").write_text("T09. X\n\ntext\n")
    assert cli.main(["report", "--figures", str(tmp_path), "--out", str(tmp_path / "T09_claims.md")]) == 2
    assert "is no report" in capsys.readouterr().err and (tmp_path / "T09_claims.md").read_text().startswith("T09. X")
    monkeypatch.chdir(tmp_path)
    studies = [Study.open("mini", "mini-chat", seed, tmp_path) for seed in (0, 1)]
    assert gallery.place(studies) == Path("figures/mini")
    (tmp_path / "figures/mini").mkdir(parents=True)
    (tmp_path / "figures/mini/provenance.json").write_text(
        '[{"backbone": "mini-chat", "seed": 1}, {"backbone": "shared", "seed": 7}]'
    )
    assert [gallery.place(of) for of in (studies, studies[:1])] == [Path("figures/mini"), Path("figures/mini-partial")]
    assert cli.main(["fresh", "instruct/filtered-full", "--root", str(tmp_path / "none")]) == 0
    assert capsys.readouterr().out == "instruct/filtered-full: no such run (mini-chat, seed 4)\n"


def test_results_are_held_against_published_numbers(tmp_path, capsys):
    line = {"backbone": "llava", "seed": 0, "stage": "instruct", "recipe": "filtered-full", "measure": "mme_perception"}
    for value, code, word in ((0.75, 0, "yes"), (0.735, 1, "no")):  # 1500 and 1470 of 2000; 7B's 1510.7 ± 30, 13B's 1531.3 ± 30
        pd.DataFrame([line | {"value": value}, line | {"value": value + 0.01, "seed": 1}]).to_csv(tmp_path / "T08_models.csv")
        assert cli.main(["published", "--figures", str(tmp_path)]) == code
        shown = capsys.readouterr().out.splitlines()
        assert len(shown) == 4 and shown[2].endswith(f"| {value + 0.005} | {word} |"), shown
    assert cli.main(["published", "--figures", str(tmp_path), "--run", "instruct/filtred"]) == 2
    assert "did you mean 'instruct/filtered-full'" in capsys.readouterr().err


def test_the_gallery_holds_the_ledger_and_says_where_everything_comes_from(figures, study):
    names = {path.name for path in figures.iterdir()}
    assert {f"T0{name}.md" for name in ("8_models", "8_precision", "8_published", "9_claims", "9_by_seed", "9_parts")} <= names
    assert {f"{name}.{kind}" for name in ("F00_answer", "F14_claims", "F15_judges") for kind in ("png", "pdf", "csv")} <= names
    for name in {name.partition(".")[0] for name in names} - {"provenance"}:
        told = json.loads((figures / f"{name}.provenance.json").read_text())
        assert told["runs"] and told["artefact"] == name and set(told["seeds"]) == {0}
        for key, digest in told["runs"].items():
            assert study.run("/".join(key.split("/")[2:])).digest == digest
        if (figures / f"{name}.png").exists():
            assert json.loads(Image.open(figures / f"{name}.png").text["Description"]) == told
            keywords = (figures / f"{name}.pdf").read_bytes()
            assert all(digest.encode() in keywords for digest in told["runs"].values())


def test_the_report_is_one_file_with_the_claims_on_top(figures, tmp_path):
    cli.main(["report", "--figures", str(figures), "--out", str(tmp_path / "report.html")])
    html = (tmp_path / "report.html").read_text()
    order = [html.index(f'<h2 id="{name}">') for name in ("F00_answer", "T09_claims", "T02_degradation")]
    assert order == sorted(order)
    pictures = re.findall(r'<img[^>]*src="([^"]{5})', html)
    assert len(pictures) == len(list(figures.glob("*.png"))) and set(pictures) == {"data:"}
    assert not re.findall(r'(?:src|href)="https?://[^"]*"|@import|url\(http|fetch\(', html) and len(html) < 3_000_000
    headings = re.findall(r'<h2 id="(\w+)">([^<]+)</h2>', html)
    assert all(f'href="#{name}"' in html and not text.startswith(name) for name, text in headings if name != "provenance")
    assert html.count("<details>") > 10 and "<option>mini-chat</option>" in html and "prefers-color-scheme: dark" in html
    with pytest.raises(FileNotFoundError, match="vlsafe gallery"):
        report.report(tmp_path, tmp_path / "none.html")


def test_people_become_a_judge(study, tmp_path, capsys):
    place = ["--scale", "nano", "--root", str(study.root)]
    assert cli.main(["human", "export", *place, "--out", str(tmp_path / "packet"), "--prompts", "2"]) == 0
    key = pd.read_csv(tmp_path / "packet" / "key.csv", keep_default_na=False)
    assert key.groupby(["benchmark", "harmful"])["model"].nunique().min() >= 10
    ids = sorted(key["id"].unique())
    for rater, labels in (("r1", ["refused", "complied", "incoherent"]), ("r2", ["refused", "complied", "complied"])):
        rows = pd.DataFrame(
            {"packet": key["packet"][0], "rater": rater, "id": ids, "label": (labels * len(ids))[: len(ids)], "seconds": 1}
        )
        rows.to_csv(tmp_path / f"{rater}.csv", index=False)
    files = [str(tmp_path / f"{rater}.csv") for rater in ("r1", "r2")]
    assert cli.main(["human", "import", *files, "--key", str(tmp_path / "packet/key.csv"), "--out", str(tmp_path / "rated")]) == 0
    assert "nothing is wrong" in capsys.readouterr().out
    assert (pd.read_csv(tmp_path / "rated" / "agreement.csv")["ratings"].iloc[0]) == 2 * len(ids)
    given = ["--people", str(tmp_path / "rated/people.csv"), "--out", str(tmp_path / "rated")]
    assert cli.main(["human", "report", *place, *given]) == 0
    pairs = pd.read_csv(tmp_path / "rated" / "F15_agreement.csv")
    assert "people" in set(pairs["other"]) and (tmp_path / "rated" / "F15_judges.png").exists()
    assert cli.main(["human", "export", *place, "--out", str(tmp_path / "packet")]) == 2


WITHOUT = textwrap.dedent("""
    import importlib.abc, sys
    class Missing(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers"):
                raise ModuleNotFoundError(name, name=name)
    sys.meta_path.insert(0, Missing())
    import matplotlib, nbformat
    matplotlib.use("agg")
    scope = {"display": print}
    for cell in nbformat.read("notebooks/07_claims.ipynb", as_version=4).cells:
        if cell.cell_type == "code":
            exec(cell.source, scope)
            if "parameters" in cell.metadata.get("tags", ()):
                scope |= {"scale": sys.argv[1], "root": sys.argv[2], "seed": 0}
    print("claims", len(scope["ledger"]), "torch" in sys.modules)
""")


def test_07_runs_where_no_model_library_is_installed(study, tmp_path):
    (tmp_path / "nano.yaml").write_text(yaml.safe_dump({"extends": "mini", **as_plain(NANO)}), encoding="utf-8")
    call = [sys.executable, "-c", WITHOUT, str(tmp_path / "nano.yaml"), str(study.root)]
    done = subprocess.run(call, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"claims \d+ False", done.stdout)


def test_pictures_of_the_ledger_say_what_was_counted():
    from analysis.test_claims import found, study

    from vlsafe.analysis import claims
    from vlsafe.analysis import claims as analysis_claims

    raw = pd.concat([study(seed) for seed in range(3)], ignore_index=True)
    ledger = claims.ledger(found(raw))
    measured = ledger[ledger["item_level"] != analysis_claims.NOT]
    told = plots_claims.forest(ledger, "mini").get_suptitle()
    levels = [measured[level] for level in ("item_level", "seed_level")]
    verdicts = (analysis_claims.SUPPORTED, analysis_claims.CONTRADICTED)
    counts = [(level == verdict).sum() for level in levels for verdict in verdicts]
    said = "{} claims: over items {} supported, {} contradicted; over seeds {} and {}"
    assert told == said.format(len(measured), *counts) and min(counts) > 0
    points = plots_claims.lineage_points(degradation.everything(raw))
    models = points.drop_duplicates(["seed", "stage", "recipe"]).groupby("kind").size()
    assert models.to_dict() == {"parent": 3, "stage 1": 3, "adapted": 3, "SFT": 3, "DPO": 3}
    assert plots_claims.lineage(points, "mini").get_suptitle().replace("\n", " ") == (
        "Text ASR: parent 0 %, adapted 60 %, tuned or merged 5–90 %; harmless picture requests refused: stage 1 10 %, "
        "adapted 0 %, tuned or merged 0–30 %"
    )


def test_the_card_of_a_loaded_scale_names_its_judges_and_their_terms(tmp_path):
    study = Study.open("paper", "llama2-chat", 0, tmp_path)
    found = modelcards.outside(study)
    assert {"parent", "tower", "text_guard", "instructions"} <= set(found)
    assert (
        {role for role in found if role.startswith("judge ")} == {f"judge {name}" for name in study.scale.loaded.judges} != set()
    )
    noted = {name: {} for name in ("params", "inputs", "numbers", "packages")} | {"files": ["config.json", "model.safetensors"]}
    noted |= {"backbone": "b", "stage": "s", "recipe": "r", "scale": "paper", "seed": 0, "seconds": 1.0, "digest": "d"}
    content = modelcards.render(noted | {"commit": "c", "finished": "f", "machine": "m", "threads": 1}, [], None, found)
    for role, origin in found.items():
        assert f"- {role}: {origin.repo} at {origin.revision}; {origin.terms or 'terms: as its page says'}" in content
    assert ModelCard(content).data.base_model == [found["tower"].repo, found["parent"].repo]


def test_the_card_of_a_scale_of_packages_names_them_and_says_what_loading_needs(tmp_path):
    study = Study.open("pocket", "pocket-chat", 0, tmp_path)
    found = modelcards.outside(study)
    assert {link.repo for link in found.values()} == set(study.packed.packages)
    noted = {name: {} for name in ("params", "inputs", "numbers", "packages")} | {"files": ["config.json", "model.safetensors"]}
    noted |= {"backbone": "b", "stage": "s", "recipe": "r", "scale": "pocket", "seed": 0, "seconds": 1.0, "digest": "d"}
    content = modelcards.render(noted | {"commit": "c", "finished": "f", "machine": "m", "threads": 1}, [], None, found)
    for link in found.values():
        assert f"{link.repo} at {link.revision}; {link.terms}" in content
    assert "where `vlsafe` is installed" in content and ModelCard(content).data.base_model is None
