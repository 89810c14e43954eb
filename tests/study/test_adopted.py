"""Somebody else's model: `vlsafe examine` and `vlsafe probe` on tiny random models in the hub's layout, with invented rows."""


import official_files
import pandas as pd
import processors
import pytest

from vlsafe import cli

TWO = ["xstest", "vlguard"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Official files of all benchmarks, and one LLaVA with its parent."""
    place = tmp_path_factory.mktemp("adopted")
    official_files.everything(place / "data")
    processors.published("llava", place / "tiny")
    processors.published_parent("llava", place / "parent")
    return place


@pytest.fixture(autouse=True)
def at_home(home, tmp_path, monkeypatch):
    monkeypatch.setenv("VLSAFE_DATA", str(home / "data"))
    monkeypatch.chdir(tmp_path)


def run(*typed):
    assert cli.main([str(part) for part in typed]) == 0


def test_a_model_and_its_parent_are_examined_on_words_and_pictures(home, tmp_path, capsys):
    run("examine", home / "tiny", "--parent", home / "parent", "--benchmarks", *TWO, "--max-new-tokens", 6, "--out", "out")
    table = pd.read_csv(tmp_path / "out" / "T02_degradation.csv").set_index("measure")
    assert table.loc["exaggerated_refusal", ["parent_n", "instruct_n", "n"]].tolist() == [10, 10, 10]
    assert table.loc["contrast_compliance", "low"] <= table.loc["contrast_compliance", "difference"]
    assert table.loc["vlguard_refusal", "instruct_n"] == 2 and pd.isna(table.loc["vlguard_refusal", "parent_n"])
    said = capsys.readouterr().out
    assert "| exaggerated refusal | " in said and "out/report.html" in said
    assert "T02. Parent and adapted model" in (tmp_path / "out" / "report.html").read_text()
