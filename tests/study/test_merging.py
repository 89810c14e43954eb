"""T07, F12 and F13 against numbers counted by hand; and what the sweeps of the NANO study wrote."""

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from analysis.test_adaptation import answers
from transformers import LlamaConfig, LlamaForCausalLM

from vlsafe.analysis import merging
from vlsafe.analysis import merging as analysis_merging
from vlsafe.core.scale import Merging, as_plain
from vlsafe.evaluation import engines, examine
from vlsafe.evaluation.engines import option_losses, respond
from vlsafe.models import chat, checkpoints
from vlsafe.models.merge import rules
from vlsafe.models.merge.rules import How
from vlsafe.plots import merging as plots_merging
from vlsafe.study import graph
from vlsafe.study import merging as study_merging

PAIR = "filtered-full+sl-full"


def lines(*points, rule="linear", limit=0.1):
    """Validation lines of (ratio, asr, asr_high, helpfulness)."""
    names = ("ratio", "asr", "asr_high", "helpfulness")
    told = {"backbone": "b", "seed": 0, "rule": rule, "partner": "sl-full", "limit": limit, "loss": None, "same_as": None}
    made = [told | dict(zip(names, point, strict=True)) | {"recipe": f"{rule}/{PAIR}/{point[0]:.2f}"} for point in points]
    return pd.DataFrame(made)


def picked(*points, **more):
    found = lines(*points, **more)
    return found.loc[analysis_merging.chosen(found), "ratio"].tolist()


def test_the_ratio_is_the_most_helpful_of_the_safe_ones_else_the_safest():
    assert picked((0.1, 0.2, 0.30, 0.9), (0.5, 0.0, 0.08, 0.7), (0.7, 0.0, 0.08, 0.8), (0.9, 0.0, 0.05, 0.6)) == [0.7]
    assert picked((0.1, 0.2, 0.30, 0.9), (0.5, 0.1, 0.20, 0.7), (0.7, 0.1, 0.20, 0.8)) == [0.7]  # none is safe: lowest ASR
    assert picked((0.3, 0.05, 0.1, 0.8), (0.5, 0.0, 0.1, 0.8)) == [0.5]  # of equals the safer
    assert picked((0.3, 0.0, 0.1, 0.8), (0.5, 0.0, 0.1, 0.8)) == [0.3]  # of equals in both the first
    assert picked((0.3, 0.04, 0.1, None), (0.5, 0.0, 0.1, None)) == [0.5]  # text alone
    both = pd.concat([lines((0.3, 0, 0.1, 0.8)), lines((0.5, 1, 1.0, 0.8), rule="ties")], ignore_index=True)
    assert analysis_merging.chosen(both).all()  # one a rule
    ends = [(0.0, 0.0, 0.0, 0.9), (0.5, 0.3, 0.4, 0.5), (1.0, 0.0, 0.0, 0.9)]
    assert picked(*ends) == [0.0] and picked(*ends, rule="ensemble") == [0.5]  # an ensemble with one member is none
    assert lines(*ends, rule="ensemble").loc[lambda of: analysis_merging.chosen(of, 0.9), "ratio"].tolist() == [0.5]


def test_a_barrier_by_hand():
    """Losses 1, 3, 2.2, 2: straight 1, 1.25, 1.75, 2; the greatest excess is 1.75 at a quarter."""
    told = lines((0.0, 0, 0, 0), (0.25, 0, 0, 0), (0.75, 0, 0, 0), (1.0, 0, 0, 0)).assign(loss=[1.0, 3.0, 2.2, 2.0])
    (line,) = analysis_merging.barriers(told).to_dict("records")
    assert line["barrier"] == pytest.approx(1.75) and line["at"] == 0.25 and line["lowest"] == 0.0
    flat = analysis_merging.barriers(told.assign(loss=[1.0, 0.5, 0.5, 2.0])).iloc[0]
    assert flat["barrier"] == 0 and flat["lowest"] == 0.25


def test_a_hypervolume_by_hand():
    """(0.5, 0.8) and (0.9, 0.2) dominate 0.4 + 0.08; a point that another one beats adds nothing."""
    points = np.array([[[0.5, 0.8], [0.9, 0.2]], [[0.5, 0.8], [0.4, 0.1]], [[0.3, -0.2], [0.0, 0.0]]])
    assert analysis_merging.hypervolume(points).tolist() == pytest.approx([0.48, 0.4, 0.0])


def raw(**merged):
    """asr and helpful of twelve items: adapted (12, 8), SL (6, 8), an ensemble (6, 8), and merges by rule."""
    frames = [answers("instruct", "filtered-full", 9, "full", 12, 8), answers("safety", "sl-full", 2, "full", 6, 8)]
    frames += [
        answers("merge", f"{rule}/{PAIR}/0.50", 0, "full", *counts) for rule, counts in {"ensemble": (6, 8), **merged}.items()
    ]
    return pd.concat(frames, ignore_index=True)


def test_dominating_is_better_in_something_and_worse_in_nothing():
    table = raw(linear=(0, 8), ties=(0, 1), slerp=(6, 8), dare_ties=(12, 8))
    found = merging.methods(table, lines((0.5, 0, 0, 0)).assign(chosen=True))
    against = found[found["reference"] == "sl"].set_index(["rule", "measure"])["difference"]
    assert against["linear", "text_asr"] == pytest.approx(-0.5) and against["ties", "helpfulness"] == pytest.approx(-7 / 12)
    assert set(found["reference"].dropna()) == {"adapted", "sl", "ensemble"}
    few = found.assign(p_holm=found["p_holm"].where(found["difference"].abs() < 0.4, 0.01))  # twelve items resolve little
    told = merging.verdicts(few)
    sl = told[told["reference"] == "sl"].set_index("rule")["verdict"].to_dict()
    assert sl == {
        "ensemble": "not resolved", "linear": "dominates", "ties": "trades", "slerp": "not resolved", "dare_ties": "is dominated"
    }  # fmt: skip
    line = told[(told["reference"] == "sl") & (told["rule"] == "ties")].iloc[0]
    assert line["better"] == "text ASR, multimodal ASR" and line["worse"] == "helpfulness"
    assert analysis_merging.answer(told).startswith("Nothing can be said")  # refusals were not asked
    said = merging.answer(told.assign(whole=True))
    assert said.startswith(
        "Yes, some: 1 of 4 merges of two tuned models dominate those of sequential SFT, the ensemble that were examined "
        "in their seed (sequential SFT: dominates: 1,"
    )
    assert analysis_merging.answer(told[told["rule"] != "linear"].assign(whole=True)).startswith("No: 0 of 3")
    end = told.assign(whole=True, recipe=told["recipe"].str.replace("linear/filtered-full+sl-full/0.50", f"linear/{PAIR}/1.00"))
    assert analysis_merging.answer(end).startswith("No: 0 of 3")  # α = 1 is SL itself
    parent = told.assign(whole=True, partner=told["partner"].where(told["rule"] != "linear", "aligned"))
    assert analysis_merging.answer(parent).startswith("No: 0 of 3")  # no merge of two tuned models
    alone = told[(told["rule"] != "linear") | (told["reference"] != "ensemble")].assign(whole=True)
    assert analysis_merging.answer(alone).startswith("No: 0 of 4")  # nobody compared the winner with its ensemble


def test_rules_are_held_against_the_linear_merge_between_the_ends():
    table = raw(inside=(6, 8), linear=(6, 8), ties=(0, 8), dare_ties=(12, 8))
    found = merging.methods(table, lines((0.5, 0, 0, 0)).assign(chosen=True))
    few = found.assign(p_holm=found["p_holm"].where(found["difference"].abs() < 0.4, 0.01))
    told = merging.verdicts(few).assign(whole=True)
    linear = told[told["reference"] == "linear"].set_index("rule")["verdict"].to_dict()
    assert linear == {
        "ensemble": "not resolved", "linear": "not resolved", "ties": "dominates", "dare_ties": "is dominated"
    }  # fmt: skip
    assert " 1 of 3 merges of two tuned models dominate " in merging.answer(told)  # the linear merge counts once under two names
    assert merging.beyond_linear(told) == (
        "Of 2 merges by other rules, one for each rule, partner and seed, 1 dominate the linear one (ties 1), and it dominates 1."
    )
    assert "No merge by another rule" in merging.beyond_linear(told[told["reference"] != "linear"])


def at_ratios(*curves, seeds=(0,)):
    """Linear merges and ensembles at ratios 0, .5 and 1 on all test items: attacks of twelve that succeed, right answers."""
    frames = [
        answers("merge", f"{rule}/{PAIR}/{ratio:.2f}", 0, "full", asr, helpful).assign(exam="ratios", seed=seed)
        for seed in seeds for rule, points in zip(("linear", "ensemble"), curves, strict=True)
        for ratio, (asr, helpful) in zip((0.0, 0.5, 1.0), points, strict=True)
    ]  # fmt: skip
    harmless = [frame[frame["benchmark"] == "mm_safetybench"].assign(harmful=False, event=False, label="complied_right",
                item=lambda of: "twin" + of["item"]) for frame in frames]  # fmt: skip
    return pd.concat([*frames, *harmless], ignore_index=True)


def test_a_backbone_without_all_items_is_drawn_from_its_panel():
    raw = at_ratios([(12, 8), (3, 8), (2, 8)], [(12, 8), (9, 8), (2, 8)])
    other = raw.assign(exam="panel", recipe=raw["recipe"].str.replace("+sl-full", "+aligned"))
    panel = pd.concat([raw.assign(exam="panel"), raw.assign(exam="panel", backbone="c"), other], ignore_index=True)
    found = merging.at_most_items(raw, panel)
    partner = found["recipe"].str.split("/").str[1].str.partition("+")[2]
    exams = found.groupby(["backbone", partner])["exam"].unique().map(list).to_dict()
    assert exams == {("b", "sl-full"): ["ratios"], ("b", "aligned"): ["panel"], ("c", "sl-full"): ["panel"]}
    assert set(merging.at_most_items(raw.assign(exam="full"), panel)["exam"]) == {"panel"}


def test_bands_over_ratios_hold_their_lines_and_tell_merge_and_ensemble_apart():
    table = merging.ratios(at_ratios([(12, 8), (3, 8), (2, 8)], [(12, 8), (9, 8), (2, 8)], seeds=(0, 1)), draws=400)
    text = table[table["measure"] == "text_asr"].set_index(["rule", "ratio"])
    assert text.loc["linear", "value"].tolist() == pytest.approx([1.0, 3 / 12, 2 / 12]) and set(text["seeds"]) == {2}
    assert text.loc["linear - ensemble", "value"].tolist() == pytest.approx([0.0, -0.5, 0.0])
    assert ((text["low"] <= text["value"]) & (text["value"] <= text["high"])).all()
    low, high = text.loc[("linear", 0.5), ["low", "high"]]
    single = np.quantile(np.random.default_rng(0).binomial(12, 0.25, 9999) / 12, [0.025, 0.975])
    assert high - low > np.ptp(single) * 0.9  # a band for all ratios is no narrower than an interval for one


def test_the_regret_is_what_the_best_ratio_has_more_than_the_chosen_one():
    """Scores at 0, .5, 1 of twelve: (0 + 0 + 12 + h) / 48 and so on, h the same: the middle is best, by 9 + 9 over the start."""
    raw = at_ratios([(12, 8), (3, 8), (5, 8)], [(12, 8), (9, 8), (2, 8)])
    chosen = lines((0.0, 0, 0, 0), (0.5, 0, 0, 0)).assign(chosen=[True, False])
    (line,) = merging.regret(raw, chosen, draws=100).to_dict("records")
    assert line["rule"] == "linear" and (line["chosen"], line["best"]) == (0.0, 0.5)
    assert line["regret"] == pytest.approx((9 + 9) / 12 / 4) and line["regret_low"] <= line["regret"] <= line["regret_high"]
    (none,) = merging.regret(raw, chosen.assign(chosen=[False, True]), draws=100).to_dict("records")
    assert none["regret"] == 0


def test_holm_runs_over_all_rules_and_measures_of_one_reference():
    found = merging.methods(raw(linear=(0, 8), ties=(0, 8)), lines((0.5, 0, 0, 0)).assign(chosen=True))
    of = found[found["reference"] == "ensemble"].sort_values("p")
    assert len(of) == 6 and of["p_holm"].iloc[0] == pytest.approx(min(1.0, 6 * of["p"].iloc[0]))
    assert found[found["rule"] == "ensemble"]["reference"].isin(["adapted", "sl"]).all()  # not with itself


def test_the_pictures_and_fronts_tell_their_numbers():
    table = raw(linear=(1, 8), ties=(3, 11))
    points = merging.plane(table)
    assert set(points["kind"]) == {"merged", "ensemble", "SFT", "adapted"}
    merged = [f"{rule} + sequential SFT" for rule in ("linear, 0 ≤ α ≤ 1", "ties", "ensemble")]
    assert points.drop_duplicates("name")["name"].tolist() == ["adapted", *merged[:2], "sequential SFT", merged[2]]
    told = plots_merging.fronts(points, "No: 0 of 2 merges dominate every tuning (sl: 2 trades).", "mini").get_suptitle()
    assert told == "Does merging dominate? No: 0 of 2 merges dominate every tuning"
    areas = analysis_merging.hypervolumes(table, draws=50).set_index(["measure", "family"])
    text = areas.loc["text_asr"]
    assert text.loc["merged", "area"] == pytest.approx(11 / 12 * 8 / 12 + 9 / 12 * 3 / 12)
    assert text.loc["ensemble", "merges_exceed_by"] == pytest.approx(text.loc["merged", "area"] - 0.5 * 8 / 12)
    assert text.loc["sl", "models"] == text.loc["tuned", "models"] == 1
    panel = table[table["stage"] == "merge"].assign(exam="panel")
    told = pd.concat([lines((0.5, 0, 0, 0), rule=rule).assign(chosen=True) for rule in ("linear", "ties", "ensemble")])
    rates = merging.sweep(panel, told)
    assert rates.set_index(["rule", "measure"]).loc[("linear", "text_asr"), "value"] == pytest.approx(1 / 12)
    title = plots_merging.sweep(rates, "mini").get_suptitle()
    chosen = "Weight α that validation chose"
    assert title == f"{chosen}: SFT 0.5 (no merge in 0 of 1 studies)"
    same = analysis_merging.against_ensemble(panel).set_index("measure")["difference"]
    assert same["text_asr"] == pytest.approx(-5 / 12) and same["helpfulness"] == pytest.approx(0)


# --- what the stages wrote ------------------------------------------------------------------------------------------


def test_a_sweep_holds_every_point_and_the_choice_of_each_rule(study):
    for partner, name in zip(study_merging.partners("default"), study_merging.names("default"), strict=True):
        found = pd.DataFrame(study.rows(name, "validation.parquet"))
        planned = [
            study_merging.recipe_of(point, partner) for way in study_merging.points(study, partner, "default") for point in way
        ]
        assert found["recipe"].tolist() == planned
        assert found.groupby("rule")["chosen"].sum().eq(1).all()
        panel, full = (pd.DataFrame(study.rows(name, f"{file}.parquet")) for file in ("panel", "raw"))
        assert set(panel["recipe"]) == set(planned) and set(full["recipe"]) == set(found.loc[found["chosen"], "recipe"])
        assert set(panel["exam"]) == {"panel"} and set(full["exam"]) == {"full"} and set(full["stage"]) == {"merge"}
        assert partner == "aligned" or set(full["item"]) == {item.id for item in study_merging.items_of(study, "default")["full"]}
        based = {"ties", "task_arithmetic", "dare_linear", "model_stock"} & set(found["rule"])
        assert bool(based) == (partner != "aligned")
        assert study.numbers(name)["overhead_max"] < 0.3


def test_the_ends_of_the_linear_sweep_are_the_members(study):
    """At 0 the panel's answers are the adapted model's, at 1 the partner's, letter for letter of the label."""
    panel = pd.DataFrame(study.rows("merge/sl-full", "panel.parquet"))
    for ratio, name in (("0.00", "examination/instruct.filtered-full"), ("1.00", "examination/safety.sl-full")):
        # rankings by an untrained model hang on the last bit, which depends on who shares the batch
        mine = panel[(panel["recipe"] == f"linear/{PAIR}/{ratio}") & (panel["judge"] != "seed-letter")]
        theirs = pd.DataFrame(study.rows(name, "raw.parquet")).query("exam == 'full'")
        both = mine.merge(theirs, on=["item", "judge"])
        assert len(both) == len(mine) > 40 and (both["label_x"] == both["label_y"]).all()


def test_task_arithmetic_is_not_examined_twice(study):
    found = pd.DataFrame(study.rows("merge/sl-full", "validation.parquet")).set_index("recipe")
    assert found.loc[f"task_arithmetic/{PAIR}/0.50", "same_as"] == f"linear/{PAIR}/0.50"
    assert found.loc[[f"linear/{PAIR}/0.50", f"ties/{PAIR}/0.50"], "same_as"].isna().all()


def test_a_parents_merge_keeps_projector_and_tower_and_has_no_task_vector(study):
    held = study_merging.members(study, "aligned")
    made = dict(rules.streamed("linear", held.a, held.b, held.base, How(1.0)))
    parent = checkpoints.load(study.folder("parent/aligned")).state_dict()
    for key, value in made.items():
        own = "vision_tower" in key or "multi_modal_projector" in key
        assert torch.equal(value, held.a[key] if own else parent[key.replace("language_model.", "")]), key
    with pytest.raises(ValueError, match="the task vector of b is zero"):
        dict(rules.streamed("ties", held.a, held.b, held.base, How(0.5)))


def test_lineages_have_the_base_that_they_started_from(study):
    child, sibling = (study_merging.members(study, name).base for name in ("sl-full", "sibling-full"))
    graft = checkpoints.load(study.checkpoints("projector/filtered")[-1]).state_dict()
    assert all(torch.equal(graft[key], value) for key, value in child.items()) and not any("projector" in key for key in child)
    assert set(sibling) == set(graft) and all(torch.equal(graft[key], value) for key, value in sibling.items())


HELD = """
import json, re, sys
from pathlib import Path
from types import SimpleNamespace
from vlsafe.models import checkpoints
from vlsafe.models.merge import inputs, rules
from vlsafe.core.presets import MINI
from vlsafe.study import merging

def held():  # bytes of memory that no file backs
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

a, b, base = (Path(sys.argv[1]) / name for name in ("a", "b", "base"))
study = SimpleNamespace(scale=MINI, seed=0, numbers=lambda name: {"band": (0, 1)}, checkpoints=lambda name: [a])
before, during, plain = held(), [0], rules.merged
checkpoints.load_processor = lambda folder: None
rules.merged = lambda *rest: (during.append(held() - before), plain(*rest))[1]
model = checkpoints.ready(a)
members = merging.Members(model, None, *map(inputs.OnDisk, (a, b, base)), b, len(model.model.layers))
sweep = merging.Sweep(study, "sl-full", members, {})
for rule in ("linear", "slerp", "ties", "dare_linear", "model_stock", "ensemble"):
    result = sweep.model(merging.Point(rule, 0.5, "0.50"))[0]
    during.append(held() - before)
    print(json.dumps([rule, max(during)]))
    during[:] = [0]
"""


def test_a_sweep_holds_the_result_alone_and_an_ensemble_its_two_models(tmp_path):
    """Members and base stay on disk: what is held beside the imports is one model in fp32 and a few tensors, for every rule, and
    not six models."""
    config = LlamaConfig(vocab_size=100, hidden_size=512, intermediate_size=2048, num_hidden_layers=5, num_attention_heads=8)
    for seed, name in enumerate(("a", "b", "base")):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).bfloat16()
        checkpoints.save(model, tmp_path / name)
    size = 4 * sum(weight.numel() for weight in model.parameters())
    freed = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back to the system, so that none is counted
    done = subprocess.run([sys.executable, "-c", HELD, str(tmp_path)], capture_output=True, text=True, env=freed)
    assert done.returncode == 0, done.stderr
    held = {rule: most / size for rule, most in map(json.loads, done.stdout.splitlines())}
    assert len(held) == 6 and held.pop("ensemble") < 2.4 and max(held.values()) < 1.5, held


def test_a_killed_sweep_asks_no_model_again_what_it_has_answered(study, tmp_path, monkeypatch):
    """Killed after three models: neither their texts nor their letters are made again; the tables are those without a kill."""
    work, greedy, losses, examined = [], engines._greedy, engines.option_losses, []

    def until(sweep, point, items, plain=study_merging.Sweep.examine):
        if len(examined) == 3:
            raise KeyboardInterrupt
        examined.append(point)
        return plain(sweep, point, items)

    monkeypatch.setattr(study_merging.Sweep, "examine", until)
    with pytest.raises(KeyboardInterrupt):
        study_merging.make_sweep(study, tmp_path, "sl-full", "default")
    assert len(list(tmp_path.glob("answers-*.jsonl"))) == 3
    monkeypatch.undo()
    monkeypatch.setattr(engines, "_greedy", lambda *rest: (work.append("texts"), greedy(*rest))[1])
    monkeypatch.setattr(engines, "option_losses", lambda *rest, **more: (work.append(len(rest[2])), losses(*rest, **more))[1])

    def watched(sweep, point, items, plain=study_merging.Sweep.examine):
        work.clear()
        found = plain(sweep, point, items)
        pairs = sum(bool(item.options or item.reference) for item in items["pairs"])
        again = [n for n in work if n == "texts" or n not in (0, pairs)]  # the loss of the pairs is computed again
        assert bool(again) == (point not in examined) or found[0].same_as, (point, work)
        return found

    monkeypatch.setattr(study_merging.Sweep, "examine", watched)
    study_merging.make_sweep(study, tmp_path, "sl-full", "default")
    for file in ("validation.parquet", "panel.parquet", "raw.parquet"):
        pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / file), study.frame("merge/sl-full", file))
    assert not list(study.folder("merge/sl-full").glob("answers-*"))


def test_bands_and_what_lies_outside_are_all_there_is(study):
    point, layers = study_merging.Point("band", 0.5, "0.50"), 2
    band, outside, drawn = (study_merging.blocks_of(study, point, kind, layers) for kind in ("band", "outside", "random"))
    assert band | outside == {0, 1, None} and not band & outside and len(drawn) == len(band) and drawn <= {0, 1}
    assert study_merging.blocks_of(study, point, "all", layers) is None


def test_an_ensemble_at_its_ends_is_its_members_and_in_between_their_mean(study, monkeypatch):
    first, second = (checkpoints.load(study.checkpoints(name)[-1]) for name in ("instruct/filtered-full", "parent/aligned"))
    processor = checkpoints.load_processor(study.folder("parent/aligned"))
    asked = [item for item in study.items() if not item.images][:40]
    said = {}
    for name, model in (("a", first), ("b", second), *((r, engines.Ensemble(first, second, r)) for r in (0.0, 1.0))):
        said[name] = [answer.text for answer in respond(model, processor, asked, "m", 16, 6)]
    assert said[0.0] == said["a"] and said[1.0] == said["b"]
    monkeypatch.setattr(first.generation_config, "eos_token_id", [first.generation_config.eos_token_id])  # as Llama 3 has several
    assert [answer.text for answer in respond(engines.Ensemble(first, second, 0.0), processor, asked, "m", 16, 6)] == said["a"]
    pair = [dataclasses.replace(item, options=("yes.", "no."), scoring="likelihood") for item in asked[:4]]
    word = [dataclasses.replace(item, options=item.options[:1], scoring="generated") for item in pair]
    inputs = chat.prompt_batch(processor, [item.turns for item in word], [()] * 4)
    both = [model(**inputs).logits.softmax(-1) for model in (first, second)]
    mixed = engines.Ensemble(first, second, 0.25)(**inputs).logits.exp()
    assert torch.allclose(mixed, 0.75 * both[0] + 0.25 * both[1], atol=1e-6)
    assert np.array(option_losses(engines.Ensemble(first, second, 0.5), processor, pair, 8)).shape == (4, 2)
    with pytest.raises(ValueError, match="greedily"):
        engines.Ensemble(first, second, 0.5).generate(**inputs, max_new_tokens=2, do_sample=True, use_cache=True)


def test_the_full_grid_trains_checkpoints_again_and_keeps_none(study, tmp_path):
    """The last of them is the tuned model itself, where the tuning chose its last one; nothing of the training stays."""
    work = tmp_path / "work"
    work.mkdir()
    few = dataclasses.replace(study.scale.merging, ratios=(0.5,), few=(0.5,), random_bands=1)
    wide = dataclasses.replace(study, scale=dataclasses.replace(study.scale, merging=few))
    tuned = study.checkpoints("safety/sl-full")[-1]
    (same,) = [point.folder for point in study_merging._trained_again(wide, "sl-full", work) if point.place == tuned.name]
    assert all(
        torch.equal(v, w) for v, w in zip(checkpoints.load(same).parameters(), checkpoints.load(tuned).parameters(), strict=True)
    )
    study_merging.make_sweep(wide, work, "sl-full", "full")
    raw = pd.read_parquet(work / "raw.parquet")
    assert {name.partition("/")[0].rstrip("0") for name in raw["recipe"]} == {*study_merging.RULES}
    assert set(raw["item"]) == {item.id for item in study.items()} and not (work / "training").exists()


def test_rules_of_the_full_grid_alone_leave_default_sweeps_and_their_digests_alone(study):
    more = {name for name, rule in study_merging.RULES.items() if rule.grid == "full"}
    assert {"expo", "fisher", "tsv_m", "iso_c"} < more and not {"beyond", "rank", "weighing"} & as_plain(Merging()).keys()
    assert as_plain(Merging(beyond=(1.2,)))["beyond"] == [1.2]
    for partner in study_merging.partners("default"):
        default, full = f"merge/{partner}", f"merge/{partner}.full"
        assert graph.STAGES[default].version == 3 and graph.STAGES[full].version == 5  # sweeps of older full grids lack them
        assert "screen/filtered" in graph.STAGES[full].inputs and "screen/filtered" not in graph.STAGES[default].inputs
        ways = {grid: study_merging.points(study, partner, grid) for grid in graph.GRIDS}
        assert not more & {way[0].rule for way in ways["default"]}
        ratios = {way[0].rule: [point.ratio for point in way] for way in ways["full"]}
        assert ratios["expo"] == [1.1, 1.25, 1.5] and ("tsv_m" in ratios) == ("fisher" in ratios) == (partner != "aligned")


def test_results_and_gallery_know_the_merges(study):
    assert set(study_merging.names("default")) <= set(graph.read_by(study, "tables")) and not set(
        study_merging.names("full")
    ) & set(graph.planned(study))
    assert set(study_merging.names("full")) <= set(graph.planned(study, "full")) and not set(
        study_merging.names("default")
    ) & set(graph.planned(study, "full"))
    narrow, wide = (study_merging.items_of(study, grid) for grid in graph.GRIDS)
    assert wide["full"] == study.items() and wide["panel"] == examine.panel(study.items(), study.scale.exam.panel)
    assert {item.benchmark for item in narrow["full"]} == {
        "sorry_bench", "mm_safetybench", "xstest", "mmbench", "mme", "seed_bench"
    }  # fmt: skip
    assert {item.id for item in narrow["panel"]} <= {item.id for item in wide["panel"]}
