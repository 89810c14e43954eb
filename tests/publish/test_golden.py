"""The miniature's golden numbers, and the generated parts of README: both compared with what is committed or cached."""

import json
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest

from vlsafe.core import store
from vlsafe.publish import golden, readme
from vlsafe.study.study import Study

ROOT = Path(__file__).parents[2]
RECORDED = json.loads((ROOT / golden.FILE).read_text(encoding="utf-8"))


def comparable(recorded_on):
    """The numbers that can be compared here: all on the processor of the record, else those that nothing was trained for."""
    return {
        name
        for name, number in golden.GOLDEN.items()
        if recorded_on == golden.processor() or not number.absolute + number.relative
    }


def deviations(recorded, now):
    """What is further from its record than its tolerance, in words; new and vanished numbers too."""
    lines = [f"{name} is {'not recorded' if name in now else 'no longer measured'}" for name in set(recorded) ^ set(now)]
    for name in recorded.keys() & now.keys():
        allowed = golden.GOLDEN[name].absolute + golden.GOLDEN[name].relative * abs(recorded[name])
        if abs(now[name] - recorded[name]) > allowed:
            lines.append(f"{name} was {recorded[name]:.4f} and is {now[name]:.4f}; {allowed:.4f} is allowed")
    return sorted(lines)


def test_the_miniature_is_as_it_was_recorded():
    study = Study.open(RECORDED["scale"], RECORDED["backbone"], RECORDED["seed"], ROOT / "runs")
    if absent := golden.missing(study):
        pytest.skip(f"no cached run of {absent[0]} in runs/; `make reproduce` makes it")
    names, now = comparable(RECORDED["environment"]["processor"]), golden.measure(study)
    then = {name: value for name, value in RECORDED["numbers"].items() if name in names}
    assert not deviations(then, {name: now[name] for name in then}), f"recorded with {RECORDED['environment']}"


def test_on_another_processor_only_what_is_not_trained_is_compared():
    assert comparable(golden.processor()) == set(golden.GOLDEN)
    elsewhere = comparable("another")
    assert "items of all benchmarks" in elsewhere and "text ASR of the adapted model" not in elsewhere


def test_a_record_is_of_a_clean_tree_and_holds_every_number():
    assert set(RECORDED["numbers"]) == set(golden.GOLDEN) and len(golden.GOLDEN) >= 12
    assert re.fullmatch(r"[0-9a-f]{7,40}", RECORDED["environment"]["commit"])


def test_what_moves_beyond_its_tolerance_is_named():
    now = dict(RECORDED["numbers"])
    assert deviations(now, now) == []
    name = "items of all benchmarks"
    assert deviations(now, {**now, name: now[name] + 1}) == [
        f"{name} was {now[name]:.4f} and is {now[name] + 1:.4f}; 0.0000 is allowed"
    ]
    near = "text ASR of the adapted model"
    assert deviations(now, {**now, near: now[near] + 0.149}) == []
    assert len(deviations(now, {**now, near: now[near] + 0.151})) == 1
    assert deviations(now, {k: v for k, v in now.items() if k != near}) == [f"{near} is no longer measured"]


def test_nothing_is_recorded_from_a_tree_with_changes(tmp_path, monkeypatch):
    study = Study.open("mini", "mini-chat", 0, tmp_path)
    told = store.environment()
    monkeypatch.setattr(store, "environment", lambda: {**told, "commit": "abc123-dirty"})
    with pytest.raises(ValueError, match=r"clean tree, this one is at abc123-dirty; commit first"):
        golden.record(study, tmp_path / "golden.json")
    monkeypatch.setattr(store, "environment", lambda: {**told, "commit": "abc123"})
    with pytest.raises(ValueError, match=r"world/corpora is not valid in .*; `make reproduce`"):
        golden.record(study, tmp_path / "golden.json")
    assert not (tmp_path / "golden.json").exists()


def test_readme_says_what_the_committed_artefacts_say():
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        text = path.read_text(encoding="utf-8")
        assert readme.generated(text, ROOT / "figures/mini") == text, "run `vlsafe readme`"
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_every_picture_of_the_readme_is_an_artefact_with_its_numbers_beside_it():
    for path in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", (ROOT / "README.md").read_text(encoding="utf-8")):
        assert path.startswith("figures/mini/") and (ROOT / path).exists(), path
        assert (ROOT / path).with_suffix(".csv").exists(), path


def test_a_changed_artefact_changes_the_readme(tmp_path):
    shutil.copytree(ROOT / "figures/mini", tmp_path / "mini")
    before = readme.generated("<!-- generated: numbers -->\n<!-- end generated -->", tmp_path / "mini")
    models = pd.read_csv(tmp_path / "mini" / "T08_models.csv")
    chat = (models["backbone"] == "mini-chat") & (models["measure"] == "text_asr") & (models["recipe"] == "filtered-full")
    rates = 100 * models[chat & (models["stage"] == "instruct")]["value"]
    assert f"| {rates.mean():.0f} % ({rates.min():.0f}–{rates.max():.0f} over" in before and before.endswith(
        "<!-- end generated -->"
    )
    assert readme.generated(before, tmp_path / "mini") == before
    ends = {name: models[name].mask(chat, 0.0) for name in ("value", "value_high")}
    models.assign(**ends).to_csv(tmp_path / "mini" / "T08_models.csv", index=False)
    assert "| 0 % (0–0 over" in readme.generated(before, tmp_path / "mini")


def test_a_table_stands_in_the_readme_word_for_word_and_mistakes_are_named():
    folder = ROOT / "figures/mini"
    made = readme.generated("a\n<!-- generated: T02_degradation -->\nold\n<!-- end generated -->\nb", folder)
    assert (folder / "T02_degradation.md").read_text(encoding="utf-8").rstrip() in made and "old" not in made
    with pytest.raises(
        ValueError, match=r"unknown generated part of README\.md 'T02_degradaton'; did you mean 'T02_degradation'"
    ):
        readme.generated("<!-- generated: T02_degradaton -->\n<!-- end generated -->", folder)
    with pytest.raises(ValueError, match="does not close it"):
        readme.generated("<!-- generated: answer -->\n", folder)
