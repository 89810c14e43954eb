"""T03 and T04 against numbers counted by hand."""

import numpy as np
import pandas as pd
import pytest

from vlsafe.analysis import adaptation, clustered, degradation, measures, resampling, stats
from vlsafe.analysis.measures import MODEL
from vlsafe.core.schema import Response
from vlsafe.data.miniature.language import SYSTEMS, World
from vlsafe.evaluation import examine
from vlsafe.evaluation.benchmarks import confounds

BASE = dict.fromkeys(MODEL, "x") | {"backbone": "b", "seed": 0, "category": None}
RATED = (  # benchmark, judge, group, harmful; ten items each, of which the first so many are events
    ("sorry_bench", "world", "base", True),
    ("mm_safetybench", "world", "SD", True),
    ("mmbench", "letters", "icon", False),
    ("mme", "mme-yes-no", "color", False),
    ("seed_bench", "seed-letter", "likelihood", False),
)


def answers(stage, recipe, step, exam, asr, helpful, n=10):
    """Ten items a benchmark, a cluster each; `asr` and `helpful` of ten are events; a full examination has two more items."""
    rows = []
    for benchmark, judge, group, harmful in RATED:
        for i in range(n + 2 * (exam == "full")):
            happened = i < (asr if harmful else helpful)
            facts = dict(benchmark=benchmark, judge=judge, group=group, harmful=harmful, item=f"{benchmark}{i}", cluster=f"c{i}")
            run = dict(stage=stage, recipe=recipe, step=step, exam=exam, model=f"{stage}/{recipe}/{step}")
            label = "complied_right" if happened else "refused"
            rows.append({**BASE, **facts, **run, "event": happened, "label": label})
    return pd.DataFrame(rows)


def study(**curves):
    """Curves of (step, asr, helpful), the last one being the full examination; stage 1 ends at asr 1, helpful 2."""
    frames = [answers("projector", "filtered", 9, "full", 1, 2)]
    for recipe, points in curves.items():
        for step, asr, helpful in points:
            exam = "full" if step == points[-1][0] else "panel"
            frames.append(answers("instruct", recipe.replace("_", "-"), step, exam, asr, helpful))
    return pd.concat(frames, ignore_index=True)


def at_level(raw):
    found = adaptation.equal_helpfulness(raw, draws=50)
    return found[found["measure"] == "text_asr"].set_index("recipe")


def test_a_recipe_whose_seeds_answer_alike_is_one_training():
    lines = pd.DataFrame({
        "backbone": "b", "measure": "text_refusal_probability", "recipe": ["main", "main", "twin", "twin", "alone"],
        "seed": [0, 1, 0, 1, 0], "value": [0.3, 0.4, 0.25, 0.25, 0.1],
    })  # fmt: skip
    assert adaptation.one_training(lines) == "On text one training is that of all seeds: twin (b)."
    assert adaptation.one_training(lines[lines["recipe"] == "main"]) == ""


def test_a_curve_is_read_where_it_first_reaches_a_level():
    heights = np.array([[0.0, 0.4, 0.2, 0.8], [0.5, 0.6, 0.7, 0.8], [0.0, 0.1, 0.2, 0.3], [0.0, 0.0, 0.3, 0.3]])
    values = np.tile([10.0, 20.0, 30.0, 40.0], (4, 1))
    found = stats.at_level(heights, values, np.array([0.3, 0.3, 0.4, 0.3]))
    assert found[:2].tolist() == pytest.approx([17.5, 10.0]) and np.isnan(found[2]) and found[3] == 30.0


def test_equal_helpfulness_by_hand():
    """The slow arm gets to 5 of 10 at best; the main one passes 5 at three quarters from (2: asr 3) to (6: asr 7): 6 of 10."""
    raw = study(filtered_full=[(2, 3, 2), (3, 9, 9), (4, 7, 6), (8, 9, 7)], slow=[(2, 1, 3), (4, 1, 5), (8, 3, 5)])
    found = at_level(raw)
    assert found["level"].tolist() == pytest.approx([0.5, 0.5]) and found["n"].tolist() == [10, 10]
    assert found["value"].to_dict() == pytest.approx({"filtered-full": 0.6, "slow": 0.1})  # step 3 is not shared: left out
    assert found["step"].to_dict() == pytest.approx({"filtered-full": 3.5, "slow": 4})
    assert found["difference"]["slow"] == pytest.approx(-0.5) and np.isnan(found["difference"]["filtered-full"])
    assert set(found["reached"]) == {"between"}


def test_arms_that_learn_too_little_or_begin_at_the_level_are_marked():
    """`low` gains nothing over stage 1 (2 of 10) and is left out; `quick` passes the level before its first checkpoint."""
    curves = dict(filtered_full=[(2, 3, 3), (8, 9, 5)], quick=[(2, 6, 7), (8, 9, 8)])
    alone, beside = at_level(study(**curves)), at_level(study(**curves, low=[(2, 8, 1), (8, 9, 2)]))
    assert alone["reached"].to_dict() == {"filtered-full": "between", "quick": "before the first"}
    assert beside["reached"].to_dict() == alone["reached"].to_dict() | {"low": "never"} and np.isnan(beside.loc["low", "value"])
    assert alone.loc["quick", "value"] == pytest.approx(0.1 + 3 / 5 * 0.5)  # from 2 (asr 1) to 7 (asr 6) the level 5 is 3/5
    found = at_level(study(filtered_full=[(2, 3, 1), (8, 9, 2)], quick=[(2, 6, 7), (8, 9, 8)]))
    assert set(found["reached"]) == {"start"} and found["value"].tolist() == pytest.approx([0.1] * 2)


@pytest.mark.parametrize("others", [{}, {"low": [(2, 3, 0), (8, 9, 0)]}])
def test_without_a_gain_of_the_main_recipe_no_level_is_reached(others):
    """Stage 2 takes helpfulness from 2 of 10 down to 1, and from no recipe less: there is no level to compare at."""
    raw = study(filtered_full=[(2, 3, 1), (8, 9, 1)], **others)
    found = at_level(raw)
    assert set(found["reached"]) == {"never"} and found.index.tolist() == ["filtered-full", *others]
    assert set(found) == {"backbone", "seed", "measure", "reached", "n"}
    lines = adaptation.arms(raw)
    assert lines.loc[lines["at"] == adaptation.LEVEL, ["value", "low", "high", "difference"]].isna().all(axis=None)
    sheet = adaptation.sheet(lines)
    assert set(sheet["reached"]) == {"never"} and set(sheet["text ASR, equal helpfulness"]) == {""}
    assert adaptation.over_seeds(lines).query("at == 'equal helpfulness'")["mean"].isna().all()


def test_a_bootstrap_redraws_items_once_for_all_points():
    """Two arms with the same answers differ by nothing in every draw; the clustered interval of each is not empty."""
    same = [(2, 3, 3), (8, 9, 8)]
    found = at_level(study(filtered_full=same, twin=same))
    assert found.loc["twin", ["difference", "difference_low", "difference_high"]].tolist() == [0, 0, 0]
    assert (found["low"] < found["value"]).all() and (found["value"] <= found["high"]).all()
    drawn = resampling.bootstrap(adaptation.panel(study(filtered_full=same)), ["text_asr"], np.random.default_rng(0), 4000)[
        "text_asr"
    ]
    low, high = np.quantile(drawn["filtered-full", 2][1:], [0.025, 0.975])
    wanted = clustered.paired_difference([0] * 10, [1] * 3 + [0] * 7, range(10), np.random.default_rng(1), draws=4000)
    assert (drawn["filtered-full", 2][0], low, high) == pytest.approx(wanted, abs=0.051)


def moved(**curves):
    """Squared lengths of one weight and its change, so that its distance is the one named; losses that fall as steps do."""
    rows, losses = [], []
    for recipe, points in curves.items():
        unit = dict(backbone="b", seed=0, recipe=recipe.replace("_", "-"))
        rows += [
            {**unit, "stage": "instruct", "step": step, "weight": "w", "norm": 4.0, "change": 4 * far**2} for step, far in points
        ]
        losses += [{**unit, "step": step, "loss": 5.0 - 0.1 * step * (recipe == "filtered_full")} for step in range(100)]
    return pd.DataFrame(rows), pd.DataFrame(losses)


def test_recipes_are_compared_where_their_weights_have_moved_as_far():
    """The twin moves half as far. At its end, .2, the main recipe stands at step 4 (asr 3 of 10); the twin has 8 of 10."""
    raw = study(filtered_full=[(4, 3, 3), (8, 9, 8)], twin=[(4, 6, 3), (8, 8, 8)])
    weights, losses = moved(filtered_full=[(4, 0.2), (8, 0.4)], twin=[(4, 0.1), (8, 0.2)])
    found = adaptation.matched(raw, weights, losses, draws=50).query("by == 'distance' and measure == 'text_asr'").iloc[0]
    assert (found["recipe"], found["level"], found["main_step"], found["step"]) == ("twin", 0.2, 4, 8)
    assert (found["main"], found["value"]) == (0.3, 0.8) and found["difference"] == pytest.approx(0.5)
    assert found["difference_low"] <= 0.5 <= found["difference_high"]
    same = adaptation.matched(raw, pd.concat([weights, weights]), losses, draws=50)  # two stages measured the same checkpoints
    assert same.query("by == 'distance' and measure == 'text_asr'")["level"].tolist() == [0.2]


def test_recipes_are_compared_where_their_own_loss_has_fallen_as_much():
    """Only the main recipe's loss falls, so that the twin has come nowhere: both are compared at the end of stage 1."""
    raw = study(filtered_full=[(40, 3, 3), (80, 9, 8)], twin=[(40, 6, 3), (80, 8, 8)])
    weights, losses = moved(filtered_full=[(40, 0.2), (80, 0.4)], twin=[(40, 0.1), (80, 0.2)])
    far = adaptation.progress(weights, losses).query("by == 'loss'").set_index(["recipe", "step"])["value"]
    assert far["filtered-full", 40] == pytest.approx(0.1 * (29.5 - 2)) and far["twin", 80] == 0
    found = adaptation.matched(raw, weights, losses, draws=50).query("by == 'loss' and measure == 'text_asr'").iloc[0]
    assert (found["level"], found["main_step"], found["main"], found["value"], found["difference"]) == (0, 0, 0.1, 0.1, 0)


def test_without_another_recipe_nothing_is_matched():
    weights, losses = moved(filtered_full=[(4, 0.2), (8, 0.4)])
    with pytest.raises(measures.Lacking, match="no other recipe"):
        adaptation.matched(study(filtered_full=[(4, 3, 3), (8, 9, 8)]), weights, losses, draws=5)


def test_what_a_picture_is_worth_is_a_paired_difference_of_losses():
    model = dict(backbone="b", seed=0, stage="projector", recipe="filtered", step=8, norm_ratio=1.5)
    rows = [{**model, "item": f"i{i}", "cluster": f"c{i}", "right": 2.0 + i % 3, "shuffled": 2.5 + i % 3} for i in range(30)]
    (line,) = adaptation.seeing(pd.DataFrame(rows)).to_dict("records")
    assert (line["right"], line["shuffled"], line["n"], line["norm_ratio"]) == (3.0, 3.5, 30, 1.5)
    assert 0.4 < line["difference_low"] < line["difference"] == line["difference_high"] == 0.5  # alike in all of few prompts


def test_points_with_other_items_are_refused():
    raw = study(filtered_full=[(2, 3, 3), (8, 9, 8)])
    gone = (raw["step"] == 2) & (raw["item"] == "sorry_bench0")
    rows = adaptation.panel(raw)
    with pytest.raises(ValueError, match="not examined on the same items"):
        resampling.bootstrap(pd.concat([rows, raw[gone]]), ["text_asr"], np.random.default_rng(0), 2)


def test_equal_steps_seeds_and_the_sheet():
    raw = study(filtered_full=[(2, 3, 3), (8, 9, 8)], other=[(2, 3, 3), (8, 6, 8)])
    both = pd.concat([raw, raw.assign(seed=1, event=raw["event"] & (raw["recipe"] != "other"))])
    found = adaptation.equal_steps(both)
    text = found[found["measure"] == "text_asr"].set_index(["seed", "recipe"])
    assert text.loc[(0, "other"), "difference"] == pytest.approx(-3 / 12) and set(text["step"]) == {8}
    assert np.isnan(text.loc[(0, "filtered-full"), "difference"])
    lines = adaptation.arms(raw)
    assert adaptation.sheet(lines)["step"].tolist() == [8, 8] and len(adaptation.sheet(lines)) == 2
    assert adaptation.sheet(lines).loc[1, "Δ text ASR"].startswith("-25 [")
    short = adaptation.compact(lines, ["recipe"], adaptation.STEPS)
    assert short["recipe"].tolist() == ["filtered-full", "other"] and short["text ASR"].str.startswith(("75 [", "50 [")).all()
    assert short["Δ text ASR"].tolist()[0] == ""
    seeds = adaptation.over_seeds(pd.concat([lines, lines.assign(seed=1, value=lines["value"] + 0.1)]))
    line = seeds.query("at == 'equal steps' and measure == 'text_asr' and recipe == 'other'").iloc[0]
    assert (line["n_seeds"], line["seed 0"], line["seed 1"]) == (2, 0.5, pytest.approx(0.6)) and line["mean"] == pytest.approx(
        0.55
    )


def test_the_main_line_is_all_that_T02_and_F02_read():
    raw = study(filtered_full=[(2, 3, 3), (8, 9, 8)], other=[(2, 3, 3), (8, 6, 8)])
    alone = raw[raw["recipe"] != "other"]
    pd.testing.assert_frame_equal(degradation.dynamics(raw, ["text_asr"]), degradation.dynamics(alone, ["text_asr"]))
    parent = alone[alone["stage"] == "instruct"].assign(stage="parent", recipe="aligned")
    pd.testing.assert_frame_equal(
        degradation.degradation(pd.concat([parent, raw])), degradation.degradation(pd.concat([parent, alone]))
    )


def varied():
    world = World(0)
    return confounds.variants(examine.all_items(world, "test", 14), world.rng("confounds"))


def test_confounds_ask_about_every_pair_once_in_six_conditions():
    items = varied()
    actions = {item.cluster for item in items}
    assert len({item.id for item in items}) == len(items) == 6 * len(actions) and {item.harmful for item in items} == {
        True,
        False,
    }
    for item in items:
        with_system = item.group.startswith("system+")
        assert [turn.text for turn in item.turns if turn.role == "system"] == [SYSTEMS[0]] * with_system
        assert len(item.images) == (not item.group.endswith("none"))
    pictures = {(item.cluster, item.group): item.images for item in items}
    assert all(pictures[action, "noise"] == pictures[action, "system+noise"] != pictures[action, "blank"] for action in actions)


def test_empty_pictures_are_uniform_and_dark_or_noise():
    from vlsafe.models.chat import open_picture

    shown = {item.group: np.asarray(open_picture(item.images[0])) for item in varied() if item.images}
    assert shown["blank"].std(axis=(0, 1)).max() == 0 and shown["blank"].max() < 45
    assert shown["noise"].std() > 60 and shown["noise"].shape == shown["blank"].shape == (32, 32, 3)


def test_confounds_by_hand():
    """The model complies with a picture of noise alone, and then with everything."""
    items = varied()
    texts = ["use the spoon and the wax." if "noise" in item.group else "sorry, i cannot help with that." for item in items]
    responses = [Response(item.id, item.benchmark, "m", text) for item, text in zip(items, texts, strict=True)]
    facts = {**BASE, "stage": "instruct", "recipe": "filtered-full", "exam": "confounds"}
    raw = pd.DataFrame(examine.raw_table(items, responses, facts))
    found = adaptation.confounds(raw).set_index(["measure", "condition"])
    assert found.loc["confounds_asr", "value"].to_dict() == {c: float("noise" in c) for c in confounds.CONDITIONS}
    assert found.loc[("confounds_refusal", "system+noise"), "difference"] == -1
    value, low, high = found.loc[("confounds_refusal", "blank"), ["difference", "difference_low", "difference_high"]]
    assert value == 0 and -low == high > 0  # no change among so few verb–object pairs
    assert np.isnan(found.loc[("confounds_asr", "none"), "difference"])
    assert measures.rates(raw, ["text_asr", "exaggerated_refusal"]).empty and degradation.dynamics(raw, ["confounds_asr"]).empty


def test_doses_begin_at_the_arm_that_only_looks_and_kinds_share_it():
    raw = pd.concat(
        [answers("instruct", recipe, 300, "full", asr, 6) for recipe, asr in
         (("looking-full", 1), ("dose-pictured-05", 4), ("dose-pictured-20", 9), ("dose-text-20", 2), ("filtered-full", 5))],
    )  # fmt: skip
    found = adaptation.doses(raw).query("measure == 'text_asr'").set_index(["kind", "dose"])
    assert found.index.tolist() == [("pictured", 0), ("pictured", 5), ("pictured", 20), ("text", 0), ("text", 20)]
    assert found["value"].tolist() == pytest.approx([1 / 12, 4 / 12, 9 / 12, 1 / 12, 2 / 12])
    assert found["difference"].fillna(0).tolist() == pytest.approx([0, 3 / 12, 8 / 12, 0, 1 / 12])
    with pytest.raises(measures.Lacking, match="dose of how-tos"):
        adaptation.doses(raw[raw["recipe"] == "looking-full"])


def test_a_probability_is_a_measure_and_older_tables_lack_it():
    raw = answers("instruct", "filtered-full", 300, "full", 5, 6)
    raw = raw[raw["benchmark"] == "sorry_bench"].assign(judge="xstest-strings", refusal=np.linspace(0, 1, 12))
    rate = measures.rates(raw, ["text_refusal_probability"]).iloc[0]
    assert rate["value"] == pytest.approx(0.5) and 0 < rate["low"] < 0.5 < rate["high"] < 1
    assert measures.rates(raw.drop(columns="refusal"), ["text_refusal_probability"]).empty
