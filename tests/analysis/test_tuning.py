"""T05, F05 and F06 against numbers counted by hand."""

import numpy as np
import pandas as pd
import pytest
from analysis.test_adaptation import answers

from vlsafe.analysis import clustered, measures, tuning
from vlsafe.plots import style
from vlsafe.plots import tuning as plots_tuning

LINES = pd.DataFrame(
    {"backbone": "b", "seed": 0, "stage": "safety", "recipe": r, "step": 2, "tokens": 50, "chosen": chosen}
    for r in ("sl-full", "dpo-text-full")
    for chosen in (True, False)
)  # fmt: skip


def raw(**models):
    """asr and helpful of twelve items per tuned recipe, beside a parent (0 of 12) and an adapted model (9, 8)."""
    frames = [answers("instruct", "filtered-full", 9, "full", 9, 8)]
    parent = answers("parent", "aligned", 0, "full", 0, 0)
    frames.append(parent[parent["benchmark"] == "sorry_bench"])
    frames += [answers("safety", r.replace("_", "-"), 2, "full", *counts) for r, counts in models.items()]
    return pd.concat(frames, ignore_index=True)


def test_flipping_signs_by_hand():
    rng = np.random.default_rng(0)
    assert clustered.sign_flip([0.1] * 3, rng) == pytest.approx(0.25, abs=0.02)  # two of eight flips are as far out
    assert clustered.sign_flip([0.0, 0.0], rng) == 1.0
    assert clustered.sign_flip([-0.1] * 12, rng) < 0.002
    with pytest.raises(ValueError, match="at least one cluster"):
        clustered.sign_flip([], rng)


@pytest.mark.parametrize("measure", ["text_asr", "helpfulness"])
def test_contributions_sum_up_to_the_difference(measure):
    table = raw(sl_full=(2, 5))
    difference = measures.differences(table, "instruct/filtered-full", ["safety/sl-full"], [measure])["difference"].iloc[0]
    of_both = table[table["stage"] != "parent"]
    ((_, judged, left_out),) = measures.paired(of_both, "instruct/filtered-full", measure)
    found = clustered.compare(measures.changes(judged, measure), np.random.default_rng(0))
    assert found.contributions.shape == (found.n_clusters, 1)
    assert found.contributions.sum() == pytest.approx(difference) != 0 and left_out == 0


def test_holm_over_methods_and_headlines_alone():
    names = ["text_asr", "multimodal_asr", "siuo_asr", "text_asr"]
    changes = pd.DataFrame({"backbone": "b", "seed": [0, 0, 0, 1], "measure": names, "p": [0.01, 0.04, 0.001, 0.03]})
    assert tuning.holm(changes)["p_holm"].fillna(-1).tolist() == pytest.approx([0.02, 0.04, -1, 0.03])


def test_methods_by_hand():
    """SL complies with 2 of 12 instead of 9, and is right in 5 instead of 8; DPO changes nothing."""
    found = tuning.methods(raw(sl_full=(2, 5), dpo_text_full=(9, 8)), LINES)
    text = found[found["measure"] == "text_asr"].set_index("recipe")
    assert text["value"].to_dict() == pytest.approx(
        {"filtered-full": 0.75, "aligned": 0, "sl-full": 1 / 6, "dpo-text-full": 0.75}
    )
    sl, dpo = text.loc["sl-full"], text.loc["dpo-text-full"]
    assert sl["adapted_difference"] == pytest.approx(-7 / 12) and sl["parent_difference"] == pytest.approx(2 / 12)
    assert sl["adapted_difference_high"] < 0 and 0.01 < sl["adapted_p"] < 0.03  # 2 of 2 ** 7 flips
    assert sl["adapted_p"] <= sl["adapted_p_holm"] and dpo["adapted_p_holm"] == 1
    assert (sl["step"], sl["tokens"]) == (2, 50) and pd.isna(text.loc["aligned", "step"])
    helpful = found[found["measure"] == "helpfulness"].set_index("recipe")
    assert helpful.loc["sl-full", "adapted_difference"] < 0 and np.isnan(helpful.loc["sl-full", "parent_difference"])
    shown = tuning.sheet(found).set_index("recipe")
    assert shown.loc["sl-full", "Δ text ASR"].startswith("-58 [") and shown.loc["sl-full", "step"] == 2
    assert pd.isna(shown.loc["aligned", "Holm p < 0.05"]) and len(shown) == 4
    with pytest.raises(ValueError, match="no full examination of a tuned model"):
        tuning.methods(raw(), LINES)


def test_transfer_tells_where_safety_was_taught_and_tested():
    found = tuning.transfer(tuning.methods(raw(sl_full=(2, 5), dpo_text_full=(9, 8)), LINES))
    assert found[["taught_on", "recipe", "tested_on"]].values.tolist() == [
        ["pictures", "sl-full", "text"], ["pictures", "sl-full", "pictures"],
        ["text", "dpo-text-full", "text"], ["text", "dpo-text-full", "pictures"],
    ]  # fmt: skip
    assert found["adapted_difference"].tolist() == pytest.approx([-7 / 12, -7 / 12, 0, 0])


def test_a_front_by_hand():
    """Of b and d, alike in helpfulness, b is safer; c is as safe as a and less helpful; e lacks a measure; f equals a."""
    values = {"a": (0.1, 0.3), "b": (0.5, 0.9), "c": (0.1, 0.2), "d": (0.6, 0.9), "e": (0.9, None), "f": (0.1, 0.3)}
    points = pd.DataFrame([
        {"backbone": "x", "seed": seed, "name": name, "what": what, "value": value}
        for seed in (0, 1) for name, of in values.items() for what, value in zip(("text_asr", "helpfulness"), of, strict=True)
        if value is not None
    ])  # fmt: skip
    assert tuning.front(points)["name"].tolist() == ["a", "b", "e", "f"]


def test_a_tuning_of_one_seed_is_held_against_that_seed():
    values = {("instruct", "adapted", 0): (0.3, 0.0), ("instruct", "adapted", 1): (0.5, 0.1), ("safety", "DPO", 1): (0.1, 0.2)}
    rows = pd.DataFrame([
        {"backbone": "x", "seed": seed, "stage": stage, "name": name, "kind": name, "what": what, "value": value}
        for (stage, name, seed), of in values.items()
        for what, value in {"text_asr": of[0], "twin_refusal": of[1], "helpfulness": 0.5}.items()
    ])  # fmt: skip
    said = plots_tuning._safest(tuning.by_text_asr(rows))
    assert said == (
        "Safest at about equal helpfulness, DPO (1 of 2 seeds): text ASR 50 → 10 %, harmless picture requests refused 10 → 20 %"
    )


def test_a_model_of_fewer_seeds_is_called_so():
    seeds = {"adapted": (0, 1, 2), "sl": (0, 1, 2), "dpo": (2,)}
    rows = [
        {"backbone": "x", "seed": seed, "name": name, "kind": name, "what": "text_asr", "value": 0.1 * seed}
        for name, of in seeds.items()
        for seed in of
    ]
    assert list(dict.fromkeys(tuning.by_text_asr(pd.DataFrame(rows))["name"])) == ["adapted", "sl", "dpo (1 of 3 seeds)"]


def test_the_pictures_tell_their_numbers():
    table = raw(sl_full=(2, 5), dpo_text_full=(9, 8))
    points = tuning.plane(tuning.methods(table, LINES))
    assert set(points["kind"]) == {"parent", "adapted", "SFT", "DPO"}
    text = points[points["what"] == "text_asr"]
    assert text["name"].tolist() == ["parent", "adapted", "sequential SFT", "DPO on text"] and set(points["what"]) <= set(
        tuning.AXES
    )
    title = plots_tuning.tradeoff(points, "mini").get_suptitle()
    same = "text ASR 75 → 75 %, with pictures 75 → 75 %"  # SL is safer, and 25 points less helpful
    assert title == f"Safest at about equal helpfulness, DPO on text: {same}"
    alone = plots_tuning.tradeoff(points[points["name"] != "DPO on text"], "mini").get_suptitle()
    assert alone.startswith("None is about as helpful; safest, sequential SFT: ") and alone.endswith("67 → 42 %")


def test_refusals_by_kind_of_request():
    rows = raw(sl_full=(2, 5))
    twins = rows[rows["benchmark"] == "mm_safetybench"].assign(harmful=False, label="refused", event=False)
    found = tuning.refusals(pd.concat([rows, twins]))
    assert (
        set(found["what"]) == {"MM-SafetyBench twins"} and (found["value"] == 1).all() and set(found["modality"]) == {"pictures"}
    )
    title = plots_tuning.refusals(found, "mini").get_suptitle()
    assert title.startswith("Harmless requests refused, mean over kinds: 100 % adapted, 100 % tuned")
    stand_in = twins.assign(benchmark="pocket_text", group="benign")
    of_pocket = tuning.refusals(pd.concat([rows, stand_in]))
    assert set(of_pocket["what"]) == {"benign prompts"}  # a benchmark that stands in goes by its own name


def test_labels_keep_their_order_and_their_distance():
    assert style.spread([0.0, 1.0, 30.0], gap=5.0) == [0.0, 5.0, 30.0]
    assert style.spread([], gap=5.0) == []
