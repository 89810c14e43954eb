"""Further fine-tunings of NANO models, whole and killed half-way; which rows they see."""

import pandas as pd
import pytest

from vlsafe.analysis import durability as counted
from vlsafe.publish import results
from vlsafe.study import degradation, durability, graph


@pytest.fixture(scope="module")
def made(study):
    """The adapted model and SL's, fine-tuned again on every kind of rows, and the worst case of SL's."""
    for name in ("durability/adapted", "durability/sl-full", "worst/sl-full"):
        study.folder(name)
    return study


def test_every_checkpoint_of_every_attack_is_examined(made):
    raw = made.frame("durability/sl-full")
    assert set(raw["recipe"]) == {f"sl-full/{kind}" for kind in (durability.START, *made.scale.durability.rows)}
    steps = raw.groupby("recipe")["step"].unique().map(sorted)
    assert steps["sl-full/harmful"] == [1]  # a tenth of NANO's five steps
    assert set(raw.loc[raw["recipe"] == "sl-full/text", "exam"]) == {"full"}
    before = made.frame("examination/safety.sl-full")
    same = ["item", "benchmark", "judge", "label"]
    start = raw[raw["recipe"] == "sl-full/start"].merge(before[before["exam"] == "full"], on=same[:3], suffixes=("", "_before"))
    assert len(start) and (start["label"] == start["label_before"]).all()
    assert not list(made.folder("durability/sl-full").glob("*/"))  # no model stays
    both = pd.concat([raw, made.frame("durability/adapted")], ignore_index=True)
    lines = counted.curves(both)  # one checkpoint, so nothing is on the way
    assert set(lines["step"]) == {0, 1} and set(lines["rows"]) == set(made.scale.durability.rows)
    assert set(counted.half_lives(both, 50)["model"]) == {"sl-full"}


def test_the_worst_case_is_of_a_trial_that_was_tried_and_its_trials_are_in_the_manifest(made):
    lines, numbers = made.frame("worst/sl-full", "validation.parquet"), made.numbers("worst/sl-full")
    assert len(numbers["trials"]) == made.scale.durability.trials == lines["trial"].max()
    assert lines["chosen"].sum() == 1 and set(lines["model"]) == {"sl-full"}
    chosen = lines[lines["chosen"]].iloc[0]
    assert numbers["chosen"] == {"trial": chosen["trial"], "step": chosen["step"]}
    assert set(made.frame("worst/sl-full")["recipe"]) == {"sl-full"}
    searched = results.trials([made], graph.read_by(made, "durability", "full"))
    assert set(searched["model"]) == {"sl-full"}
    found = searched[searched["chosen"]].iloc[0]  # at the scale's bound, which the table of trials shows
    assert found["permitted"] and found["harm"] == searched["best"].iloc[-1] == searched.loc[searched["permitted"], "harm"].max()


def test_what_was_killed_half_way_ends_as_without_a_kill(made, tmp_path, monkeypatch):
    """Killed in the examination of an attack and in a trial; what is there by then is not made again."""
    examined, calls = degradation.examined, []

    def until(limit):
        def wrapped(*arguments, **more):
            if len(calls) == limit:
                raise KeyboardInterrupt
            calls.append(arguments[1])
            return examined(*arguments, **more)

        return wrapped

    monkeypatch.setattr(degradation, "examined", until(3))
    with pytest.raises(KeyboardInterrupt):
        durability.make_durability(made, tmp_path, "sl-full")
    monkeypatch.setattr(degradation, "examined", until(None))
    durability.make_durability(made, tmp_path, "sl-full")
    assert len(calls) == len(set(calls)) == 5
    for file in durability.TABLES:
        pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / file), made.frame("durability/sl-full", file))


def test_a_search_that_was_killed_half_way_ends_as_without_a_kill(made, tmp_path, monkeypatch):
    attacked, calls = durability.attacked, []

    def killed(*arguments):
        if len(calls) == 4:
            calls.append(None)
            raise KeyboardInterrupt
        calls.append(arguments[2])
        return attacked(*arguments)

    monkeypatch.setattr(durability, "attacked", killed)
    with pytest.raises(KeyboardInterrupt):
        durability.make_worst(made, tmp_path, "sl-full")
    durability.make_worst(made, tmp_path, "sl-full")
    tried = [call for call in calls if call][: made.scale.durability.trials]
    assert tried == durability.attacks_of(made)
    pd.testing.assert_frame_equal(
        pd.read_parquet(tmp_path / "validation.parquet"), made.frame("worst/sl-full", "validation.parquet")
    )


def test_the_merge_that_validation_chose_is_what_is_fine_tuned(made, tmp_path):
    folder = durability.start_of(made, "merged", tmp_path)
    lines = made.frame(durability.MERGED, "validation.parquet")
    (chosen,) = lines[(lines["rule"] == "inside") & lines["chosen"]].to_dict("records")
    items = [item for item in made.items() if item.benchmark == "sorry_bench"]
    result = degradation.examined(made, "x/y", folder, items, "full")
    merged = made.frame(durability.MERGED)
    merged = merged[(merged["recipe"] == chosen["recipe"]) & (merged["exam"] == "full") & (merged["benchmark"] == "sorry_bench")]
    assert {row["item"]: row["label"] for row in result.rows} == dict(zip(merged["item"], merged["label"], strict=True))


def test_rows_of_attacks_in_the_miniature_are_new_and_what_they_are_called(made):
    n, before = 60, {row.turns for row in made.examples("screen/filtered", "instructions.parquet")}
    rows = {kind: durability.rows_of(made, kind, n) for kind in made.scale.durability.rows}
    assert all(len(of) == n for of in rows.values())
    assert not any(row.images for row in rows["text"]) and sum(bool(row.images) for row in rows["instructions"]) > 40
    assert sum(row.task == "how-to" for row in rows["howtos"]) > 5 > sum(row.task == "how-to" for row in rows["instructions"])
    assert sum(row.category is not None for row in rows["harmful"]) >= 1
    assert not any(row.category for kind in ("instructions", "text", "howtos") for row in rows[kind])
    assert sum(row.turns in before for row in rows["instructions"]) < n / 2
    assert [row.turns for row in durability.rows_of(made, "text", n)] == [row.turns for row in rows["text"]]


def test_further_fine_tunings_are_of_the_full_grid_alone(study):
    names = {f"{kind}{model}" for kind in graph.FURTHER for model in durability.MODELS}
    assert names <= set(graph.planned(study, "full")) and not names & set(graph.planned(study))
    assert set(graph.read_by(study, "durability", "full")) == names <= set(graph.read_by(study, "tables", "full"))
    assert durability.MERGED in study.inputs("durability/merged") and durability.MERGED in graph.planned(study, "full")
