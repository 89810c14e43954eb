"""Computed sentences: what they call a change, that their numbers are the tables', and that none contradicts a ledger."""

import itertools
import re
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from vlsafe.analysis import claims, openings, sentences
from vlsafe.analysis.measures import MEASURES
from vlsafe.core.schema import MAIN_LINE
from vlsafe.publish import notebooks

ROOT = Path(__file__).parents[2]
MINI = ROOT / "figures" / "mini"


ENDS = ("value", "low", "high")


def test_numbers_have_signs_and_no_negative_zero():
    assert [sentences.signed(value) for value in (0.123, -0.126, 0.0, -0.0, 0.002, -0.0002)] == [
        "+12", "-13", "+0", "+0", "+0.2", "+0"
    ]  # fmt: skip
    assert sentences.points(0.1, -0.004, 0.2) == "+10 [-0.4, +20]"
    rates = pd.DataFrame({"value": [0.1, 0.3], "before": [0.126, None], "low": [0.02, 0.2], "high": [0.2, 0.4]})
    assert sentences.percent(rates) == "20 % (10–30 over 2 seeds)" and sentences.percent(rates, "before") == "13 %"
    shared = pd.concat([rates[:1], rates[:1]])
    assert sentences.percent(shared.reset_index(drop=True)) == "10 % [2, 20] (one model, shared by 2 seeds)"
    assert sentences.percent(shared.reset_index(drop=True).assign(value=0.0)) == "0 % (0–0 over 2 seeds)"
    assert sentences.percent(rates[:1]) == "10 % [2, 20]" and sentences.percent(rates[:0]) == "(not measured)"
    assert sentences.listed(["a"]) == "a" and sentences.listed("abc") == "a, b and c"


def lines(**models):
    """Differences in text ASR of models, one (difference, low, high) per seed."""
    return pd.DataFrame([
        {"recipe": name, "seed": seed, "measure": "text_asr", "difference": value, "difference_low": low, "difference_high": high}
        for name, seeds in models.items() for seed, (value, low, high) in enumerate(seeds)
    ])  # fmt: skip


def test_a_change_is_one_where_its_interval_lies_on_one_side_of_zero_in_every_seed():
    said = sentences.compared(lines(a=[(-0.2, -0.3, -0.1)], b=[(0.2, 0.1, 0.3)], c=[(0.2, -0.01, 0.4)]), "text_asr")
    assert said == "Text ASR, points: lower: a (-20 [-30, -10]); higher: b (+20 [+10, +30]); not told apart: c (+20 [-1, +40])."
    seeds = lines(a=[(-0.2, -0.3, -0.1), (-0.4, -0.5, -0.3)], b=[(0.2, 0.1, 0.3), (-0.2, -0.3, -0.1)],
                  c=[(-0.2, -0.3, -0.1), (-0.1, -0.2, 0.1)])  # fmt: skip
    assert sentences.compared(seeds, "text_asr") == (
        "Text ASR, points: lower: a (-30, -40 to -20 over 2 seeds); not told apart: c (-15, -20 to -10 over 2 seeds); "
        "seeds disagree: b (+0, -20 to +20 over 2 seeds)."
    )
    nothing = sentences.compared(lines(a=[(None, None, None)]), "text_asr")
    assert nothing == "text ASR: nothing to compare."


def test_the_best_is_the_least_attacked_or_the_most_helpful_and_who_overlaps_is_named():
    rates = pd.DataFrame([
        {"recipe": name, "measure": measure, "value": value, "low": value - 0.05, "high": value + 0.05}
        for measure, values in {"text_asr": (0.1, 0.14, 0.4), "helpfulness": (0.5, 0.9, 0.7)}.items()
        for name, value in zip("abc", values, strict=True)
    ])  # fmt: skip
    assert sentences.winners(rates, ["text_asr", "helpfulness", "siuo_asr"]) == (
        "Least text ASR: a, 10 % [5, 15]; not told from b; most helpfulness: b, 90 % [85, 95]."
    )


def test_what_adaptation_changed_and_after_which_layers():
    table = pd.DataFrame({
        "label": ["text ASR", "exaggerated refusal", "FigStep"],
        "parent_value": [0.1, 0.1, None], "instruct_value": [0.5, 0.06, 0.3],
        "difference": [0.4, -0.04, None], "low": [0.3, -0.1, None], "high": [0.5, 0.02, None],
    })  # fmt: skip
    assert sentences.changed(table) == (
        "Text ASR rises, from 10 to 50 %, by +40 [+30, +50] points; exaggerated refusal does not change beyond its interval, "
        "from 10 to 6 %, by -4 [-10, +2] points."
    )
    gap = pd.DataFrame({"group": ["text"] * 3 + ["picture"], "layer": [0, 1, 2, 0], "value": [-0.1, -0.3, 0.1, 0.2],
                        "low": [-0.2, -0.4, -0.1, -0.1], "high": [-0.01, -0.2, 0.2, 0.4]})  # fmt: skip
    assert sentences.parted(gap, "they differ") == (
        "text: they differ after layers 0 and 1, most after 1 (-0.300 [-0.400, -0.200]); picture: they differ after no layer."
    )


LEDGER = claims.written(MINI)


@pytest.mark.parametrize("notebook", list(openings.OPENINGS))
def test_the_first_output_of_a_notebook_is_its_answer_by_the_committed_tables(notebook):
    cells = nbformat.read(ROOT / "notebooks" / f"{notebook}.ipynb", as_version=4).cells
    assert len(cells) <= 30
    first = next(output for cell in cells if cell.cell_type == "code" for output in cell.outputs)
    text = first["data"]["text/markdown"]
    assert text.startswith("**The answer.**") and text.endswith(openings.opening(notebook, MINI)), "run `make notebooks`"
    assert set(notebooks.NOTEBOOKS) == set(openings.OPENINGS)


@pytest.mark.parametrize("notebook", list(openings.OPENINGS))
def test_no_answer_contradicts_the_ledger_and_its_numbers_are_the_ledgers(notebook):
    found, head = 0, []
    for line in openings.opening(notebook, MINI).splitlines():
        first, *cells = line.removeprefix("| ").removesuffix(" |").split(" | ")
        head = [cell.strip("`") for cell in cells] if first == "claim" else head
        rows = LEDGER[(LEDGER["statement"] == first.removesuffix(" (exploratory)")) & (LEDGER["item_level"] != claims.NOT)]
        of = rows.drop_duplicates("backbone").set_index("backbone")
        assert not len(of) or {name for name, cell in zip(head, cells, strict=True) if cell} == set(of.index)
        for backbone, cell in zip(head, cells, strict=True) if len(of) else ():
            pattern = r"\*\*(.+?)\*\*(?: but too small to matter)? \((?:([^:;]+): )?([+-][\d.]+) "
            for verdict, part, effect in re.findall(pattern, cell):
                assert verdict == of.loc[backbone, "item_level"] and part in ("", of.loc[backbone, "part"]), (first, backbone)
                assert float(effect) == pytest.approx(100 * of.loc[backbone, "effect"], abs=0.5)
                found += 1
    assert found >= (notebook != "00_world")


MODELS = pd.read_csv(MINI / "T08_models.csv")
RATE = MODELS.assign(run=MODELS["stage"] + "/" + MODELS["recipe"]).groupby(["measure", "run", "backbone"])["value"]


def ends(backbone, measure, start):
    """Means over seeds of a rate before and after, as the title has them."""
    return " to ".join(f"{100 * RATE.mean()[measure, MAIN_LINE[model], backbone]:.0f} %" for model in (start, "adapted"))


def test_the_title_is_answered_by_the_ledger():
    said = openings.title(MODELS, LEDGER)
    third = LEDGER[(LEDGER["claim"] == openings.RISE) & (LEDGER["item_level"] != claims.NOT)]
    of = LEDGER[LEDGER["effect"].notna()].set_index(["claim", "backbone"])
    seeing, asked = of.loc[openings.SEEING], of.loc[openings.HOWTOS]
    seeds = sentences.listed(sorted({str(of["seed"].nunique()) for _, of in MODELS.groupby("backbone")}))
    means = f" (means of {seeds} seeds): "
    assert said.startswith(f"Adaptation does{openings.HARDLY}{means}in `") == (third["item_level"] == claims.SUPPORTED).all()
    one = openings.title(MODELS[MODELS["seed"] == 4], LEDGER)
    assert re.match(rf"Adaptation does(?: in part| not)?{openings.HARDLY} \(one seed\): in `", one), "a single seed has no mean"
    few = openings.title(MODELS[(MODELS["seed"] == 4) | (MODELS["backbone"] != "mini-tulu")], LEDGER)
    assert few.startswith(f"Adaptation does{openings.HARDLY}: in `mini-chat` (means of 8 seeds) text ASR goes from ")
    assert f"in `mini-tulu` (one seed) {one.partition('in `mini-tulu` ')[2].partition('. ')[0]}. " in few
    for backbone in third["backbone"]:
        text, pictures = ends(backbone, "text_asr", "parent"), ends(backbone, "multimodal_asr", "stage 1")
        assert f"in `{backbone}` text ASR goes from {text}, multimodal ASR from {pictures}" in said
        assert f"{sentences.signed(seeing.loc[backbone, 'effect'])} (`{backbone}`)" in said.partition(openings.WITHOUT)[2]
        assert f"{sentences.signed(asked.loc[backbone, 'effect'])} (`{backbone}`)" in said.partition(openings.HOWTOS_ADD)[2]
    lone = LEDGER[~LEDGER["claim"].isin((*openings.ALONE, openings.HOWTOS)) | (LEDGER["backbone"] != "mini-tulu")]
    other = LEDGER[LEDGER["claim"].isin((openings.SEEING, openings.HOWTOS))].assign(backbone="another")
    for ledger in (lone, pd.concat([lone, other])):  # a parent without one of the two, and one that T08 does not know
        last = openings.title(MODELS, ledger.drop_duplicates(["claim", "backbone"])).partition(openings.WITHOUT)[2]
        assert "(`mini-chat`)" in last and "mini-tulu" not in last and "another" not in last
    for claim, end in itertools.product(openings.ALONE, ("low", "high")):  # seeing alone may matter in one parent
        of = (LEDGER["claim"] == claim) & (LEDGER["backbone"] == "mini-qwen")
        much = LEDGER.assign(**{end: LEDGER[end].mask(of, {"low": -0.06, "high": 0.06}[end])})
        assert openings.HARDLY not in openings.title(MODELS, much)
    assert openings.HARDLY not in openings.title(MODELS, LEDGER[LEDGER["claim"] != "4i"])
    fallen = LEDGER.assign(item_level=LEDGER["item_level"].where(LEDGER["claim"] != openings.RISE, claims.CONTRADICTED))
    first = openings.title(MODELS, fallen)
    assert first.startswith(f"Adaptation does not{means}") and first.count(f": **{claims.CONTRADICTED}** (multimodal ASR") == len(
        third
    )
    for level in (claims.UNDECIDED, claims.CEILING, claims.DIFFERS):
        unsure = LEDGER.assign(item_level=LEDGER["item_level"].where(LEDGER["claim"] != openings.RISE, level))
        assert openings.title(MODELS, unsure).startswith(f"{openings.UNDECIDED}{means}")
    half = fallen.copy()
    half.loc[(half["claim"] == openings.RISE) & (half["backbone"] == "mini-chat"), "item_level"] = claims.SUPPORTED
    assert openings.title(MODELS, half).startswith("Adaptation does in part")


def test_what_every_parent_contradicts():
    listed = openings.contradicted(LEDGER).splitlines()
    measured = LEDGER[LEDGER["item_level"] != claims.NOT]
    every = measured.groupby("claim")["item_level"].agg(lambda of: len(of) == 3 and set(of) == {claims.CONTRADICTED})
    assert len(listed) == every.sum() > 1
    first = LEDGER[LEDGER["claim"] == "4b"]
    sizes = [f"{sentences.points(line.effect, line.low, line.high)} (`{line.backbone}`)" for line in first.itertuples()]
    over = (first["seed_level"] == claims.CONTRADICTED).sum()
    assert f"- *{first['statement'].iloc[0]}*: {', '.join(sizes)}; contradicted over seeds in {over} of 3." in listed
    (merging,) = (line for line in listed if line.startswith("- *Merging dominates every tuning method (with sequential SFT)*"))
    parts = LEDGER[LEDGER["claim"] == "10"].set_index("backbone")["part"]
    assert all(f"(`{name}`: {part})" in merging for name, part in parts.items())
    assert [" (exploratory): " in line for line in listed] == sorted(" (exploratory): " in line for line in listed)
    assert openings.contradicted(LEDGER[LEDGER["claim"] == "3"]) == ""


def test_a_threshold_stands_beside_its_own_part():
    merging, names = LEDGER["claim"] == "10", LEDGER["backbone"] == "mini-tulu"
    other = LEDGER.assign(against=LEDGER["against"].where(~(merging & names), -0.05))
    (line,) = (said for said in openings.contradicted(other).splitlines() if "every tuning method (with sequential SFT)" in said)
    assert line.count(", threshold +5)") == 2 and line.count(", threshold -5)") == 1 and "; contradicted over seeds" in line


def test_seeds_without_a_value_are_in_no_mean_and_in_no_count():
    three = pd.DataFrame({"backbone": "mini-chat", "seed": [0, 1, 2], "recipe": "x", "change": [0.12, None, None]})
    assert sentences.across(three, "It changes by", "change", {"recipe": "x"}) == "- It changes by +12 points (`mini-chat`)."
    lacking = MODELS[(MODELS["seed"] == 4) | (MODELS["recipe"] != "filtered-full")]
    said = openings.title(lacking, LEDGER)
    alone = openings.title(MODELS[MODELS["seed"] == 4], LEDGER)
    assert said == alone and "means of" not in said


def test_every_safety_benchmark_before_and_after():
    head, _, *lines = openings.fell(MODELS).splitlines()
    assert head.endswith("".join(f"| `{name}` " for name in MODELS["backbone"].unique()) + "|")
    for measure, start in (("text_asr", "parent"), ("figstep_asr", "stage 1")):
        cells = []
        for backbone in MODELS["backbone"].unique():
            of = [100 * RATE.get_group((measure, MAIN_LINE[model], backbone)) for model in (start, "adapted")]
            rates = [f"{one.mean():.0f} % ({one.min():.0f}–{one.max():.0f} over {len(one)} seeds)" for one in of]
            cells.append(" → ".join(rates))
        assert f"| {MEASURES[measure]['label']} | {' | '.join(cells)} |" in lines
    assert openings.fell(MODELS[MODELS["stage"] == "parent"]) == ""


def test_dpo_by_the_modality_of_its_pairs():
    text = 100 * RATE.get_group(("multimodal_asr", "safety/dpo-text-full", "mini-chat"))
    line = f"| multimodal ASR after DPO on pairs in words | {text.mean():.0f} % ({text.min():.0f}–{text.max():.0f} over "
    assert openings.without_pictures(MODELS).splitlines()[2].startswith(line)
    assert openings.without_pictures(MODELS[MODELS["stage"] == "parent"]) == ""


def test_what_outlasts_harmless_text():
    lives = pd.read_csv(MINI / "T10_half_lives.csv")
    said = openings.lasting(lives)
    assert said.startswith("- Fine-tuned again: mini-chat, 30 steps on harmless text: ")
    assert "answers" not in said and "DPO" in said
    assert openings.lasting(lives[:0]) == ""


def test_what_the_answer_rests_on_is_a_line_each():
    shown = openings.answers(MODELS, LEDGER).set_index("")
    start = len(openings.RATES)
    back = shown.index.get_loc(openings.BACK)
    assert shown[f"`{MODELS['backbone'].iloc[0]}`"].iloc[back].startswith("text ASR ") and back == start + 3
    beside = {f"{MEASURES[name]['label']}, stage 1 → adapted" for name in ("multimodal_asr_strings", "figstep_asr", "siuo_asr")}
    assert set(shown.index[start : start + 3]) == beside and shown.iloc[start].str.fullmatch(r"\d+ % \(.*\) → \d+ % \(.*\)").all()
    seeing, words = shown.index[[start + 4, start + 5]]
    for backbone in MODELS["backbone"].unique():
        cells = shown[f"`{backbone}`"]
        for place, (measure, model) in enumerate(openings.RATES.values()):
            of = 100 * RATE.get_group((measure, MAIN_LINE[model], backbone))
            assert cells.iloc[place] == f"{of.mean():.0f} % ({of.min():.0f}–{of.max():.0f} over {len(of)} seeds)"
            assert shown.index[place].endswith(f", {model}")
        own = LEDGER[(LEDGER["backbone"] == backbone) & (LEDGER["item_level"] != claims.NOT)].set_index("claim")
        for name, claim, sign in ((seeing, openings.SEEING, 1), (words, "4b", -1)):
            assert float(cells[name].split()[0]) == pytest.approx(100 * sign * own.loc[claim, "effect"], abs=0.51)
        for claim in (openings.RISE, openings.CLEAN):
            (verdict,) = cells[[name for name in shown.index if name.startswith(f"claim {claim}: ")]]
            assert verdict.startswith(f"{own.loc[claim, 'item_level']} (")
    assert "(exploratory)" in seeing and "(exploratory)" not in words
    broken = LEDGER.assign(flagged=LEDGER["flagged"].where(LEDGER["claim"] != "4b", "instruct/textonly-full, seed 0: broken"))
    flagged = openings.answers(MODELS, broken).set_index("").loc[words].str.contains("not capable: instruct/textonly-full")
    assert flagged.all() and len(flagged) >= 2


def test_a_title_that_is_not_decided_names_the_weakest_part():
    other = LEDGER[~LEDGER["claim"].isin((*openings.ALONE, openings.HOWTOS))]
    other = other.assign(item_level=other["item_level"].where(other["claim"] != openings.RISE, claims.DIFFERS))
    first = openings.title(MODELS, other)
    of = other[(other["claim"] == openings.RISE) & (other["item_level"] != claims.NOT)]
    for line in of.itertuples():
        size = sentences.points(line.effect, line.low, line.high)
        pictures = ends(line.backbone, "multimodal_asr", "stage 1")
        assert f"multimodal ASR from {pictures}: **{line.item_level}** ({line.part}: {size}, n = " in first
    assert re.match(rf"{openings.UNDECIDED} \(means of \d+ seeds\): in `mini-chat` ", first) and openings.WITHOUT not in first
    words = openings.title(MODELS[MODELS["measure"] == "text_asr"], other)
    assert "text ASR goes from" in words and ", multimodal ASR from" not in words


def test_an_undecided_claim_of_two_parts_tells_the_other_one():
    parts = pd.read_csv(MINI / "T09_parts.csv", dtype={"claim": str})
    parts = parts[(parts["claim"] == "3c") & (parts["backbone"] == "mini-chat")].set_index("part")
    of = LEDGER[(LEDGER["claim"] == "3c") & (LEDGER["backbone"] == "mini-chat")]
    (line,) = of.assign(item_level=claims.UNDECIDED).itertuples()
    other = parts.loc[line.other_part]
    assert line.other_part != line.part and set(parts.index) == {line.part, line.other_part}
    assert sentences.verdict(line).endswith(
        f"; {line.other_part}: {sentences.points(other['effect'], other['low'], other['high'])})"
    )
    (held,) = of.assign(item_level=claims.SUPPORTED).itertuples()
    assert line.other_part not in sentences.verdict(held)
    assert LEDGER.loc[LEDGER["claim"].isin(["1", "10"]), "other_part"].isna().all()  # of one part, and of many


def test_whether_the_located_band_is_a_place_of_its_own():
    ends = {"a": [(0.2, 0.1, 0.3), (0.1, -0.1, 0.2)], "b": [(-0.2, -0.3, -0.1)]}
    table = pd.DataFrame([
        {"backbone": name, "which": "located", "measure": "text_asr", "width": width, "difference": value,
         "difference_low": low, "difference_high": high}
        for name, of in ends.items() for width, (value, low, high) in enumerate(of, 2)
    ])  # fmt: skip
    assert sentences.placed(table) == (
        "- The located band (2–3 blocks wide) against other sets of as many blocks, put back: clearly less text safety in 1 of 3 "
        "studies, clearly more in 1; text ASR is higher by +15 (`a`) and -20 (`b`) points."
    )
    assert sentences.placed(table.assign(which="best")) == ""


def test_a_claim_of_one_seed_says_so():
    one = LEDGER[LEDGER["claim"] == "3"].assign(seeds=1, seed_low=float("nan"), seed_high=float("nan"))
    assert sentences.verdicts(one, ["3"]).count(", one seed)") == one["backbone"].nunique()
    single = LEDGER.assign(seed_low=LEDGER["seed_low"].where(LEDGER["claim"] != openings.SEEING))
    shown = openings.answers(MODELS, single)
    seeing = shown.loc[shown[""].str.startswith("trained to see"), "`mini-chat`"].item()
    assert re.search(r"\]; one seed, n = \d+$", seeing) and not shown.astype(str).map(lambda cell: "nan" in cell).any(axis=None)


def test_rates_of_one_seed_have_their_interval_over_items():
    columns = ["backbone", "seed", "measure", "n"] + [f"{stage}_{end}" for stage in ("parent", "instruct") for end in ENDS]
    one = pd.DataFrame([["some", 0, "text_asr", 453.0, 0.04, 0.02, 0.07, 0.38, 0.32, 0.44]], columns=columns).assign(
        difference=0.34
    )
    columns = ["backbone", "seed", "stage", "recipe", "measure", "n", *ENDS]
    ends = {"parent/aligned": (0.04, 0.02, 0.07), "instruct/filtered-full": (0.38, 0.32, 0.44)}
    models = pd.DataFrame([["some", 0, *run.split("/"), "text_asr", 453.0, *of] for run, of in ends.items()], columns=columns)
    cells = ["4 % [2, 7] (one seed, n = 453)", "38 % [32, 44] (one seed, n = 453)"]
    assert openings.answers(models, LEDGER[:0])["`some`"].tolist() == cells
    assert openings.title(models, LEDGER[:0]) == f"{openings.UNDECIDED}."
    assert sentences.rates(one, "parent", ["text_asr", "twin_refusal"]) == "- `some`: text ASR 4 % [2, 7]."
    two = pd.concat([models, models.assign(seed=1, value=models["value"] + 0.04)])
    assert openings.answers(two, LEDGER[:0])["`some`"].tolist() == ["6 % (4–8 over 2 seeds)", "40 % (38–42 over 2 seeds)"]


def test_what_nobody_measured_is_one_line():
    said = sentences.verdicts(LEDGER.assign(item_level=claims.NOT), ["3", "5"])
    names = [LEDGER.loc[LEDGER["claim"] == claim, "statement"].iloc[0] for claim in ("3", "5")]
    assert said == f"- Not measured: *{'; '.join(names)}*."


def test_the_worst_case_of_each_remedy():
    table = pd.DataFrame([
        {"backbone": "a", "seed": seed, "model": model, "measure": "text_asr", "before": before, "value": after, "n": 9,
         "difference": after - before, "difference_low": after - before - 0.05, "difference_high": after - before + 0.05}
        for model, seeds in {"sl-full": [(0.1, 0.3), (0.2, 0.9)], "merged": [(0.2, 0.4)] * 2}.items()
        for seed, (before, after) in enumerate(seeds)
    ])  # fmt: skip
    said = "- The worst fine-tuning of those that keep helpfulness takes text ASR of `a` (percent; seeds: "
    assert sentences.worst(table) == said + (
        "2) of sequential SFT from 15 (10–20) to 60 (30–90), +45 [-92, +99]; of merged with SFT from 20 (20–20) "
        "to 40 (40–40), +20 [-3, +41]."
    )
    one = table[table["seed"] == 0].assign(low=0.2, high=0.5)
    assert sentences.worst(one) == said + (
        "1) of sequential SFT from 10 to 30 [20, 50], +20 [+15, +25]; of merged with SFT from 20 to 40 [20, 50], +20 [+15, +25]."
    )


def test_how_often_nothing_was_merged():
    lines = [("linear", "a", 1.0), ("linear", "a", 0.9), ("linear", "b", 0.0), ("slerp", "a", 1.0)]
    table = pd.DataFrame(lines, columns=["rule", "partner", "ratio"]).assign(chosen=True)
    assert sentences.unmerged(table).endswith("nothing is merged, in 1 of 2 studies with `a` and 1 of 1 studies with `b`.")
    assert sentences.unmerged(table[table["rule"] == "slerp"]) == ""


def test_what_is_too_small_to_matter_is_called_so():
    line = LEDGER[LEDGER["item_level"] == claims.SUPPORTED].iloc[[0]]
    small, large = (sentences.verdicts(line.assign(matters=matters), line["claim"].tolist()) for matters in ("no", "yes"))
    assert "**supported** but too small to matter (" in small and "too small" not in large
    against = line.assign(matters="no", item_level=claims.CONTRADICTED)
    assert "too small" not in sentences.verdicts(against, line["claim"].tolist())


def test_a_model_with_its_parents_language_weights_by_hand():
    rates = {"text_asr": 0.1, "multimodal_asr": 0.2, "twin_refusal": 0.3, "helpfulness": 0.7}
    line = {"backbone": "a", "recipe": "linear/filtered-full+aligned/1.00"}
    seeds = [dict(line, measure=name, value=rate + more) for more in (0.0, 0.1) for name, rate in rates.items()]
    other = dict(line, recipe="linear/filtered-full+aligned/0.90", measure="text_asr", value=0.9)
    assert sentences.restored(pd.DataFrame([*seeds, other])).endswith(
        "where validation chooses that: text ASR 15 % (10–20 over 2 seeds), multimodal ASR 25 % (20–30 over 2 seeds), refusal of "
        "harmless picture requests 35 % (30–40 over 2 seeds), helpfulness 75 % (70–80 over 2 seeds)."
    )
    assert sentences.restored(pd.DataFrame([other])) == ""


def test_changes_over_seeds_and_missed_bounds_by_hand():
    table = pd.DataFrame({"backbone": ["a", "a", "b"], "measure": "m", "recipe": ["x", "x", "x"], "difference": [0.1, -0.3, 0.2]})
    assert sentences.across(table, "It changes by", "difference", {"measure": "m", "recipe": "x"}) == (
        "- It changes by -10 points (-30 to +10 over 2 seeds) (`a`) and +20 points (`b`)."
    )
    assert sentences.across(table, "It changes by", "difference", {"recipe": "y"}) == ""
    gates = pd.DataFrame({"backbone": "a", "measure": ["m", "n"], "why": ["it sees", "it reads"], "holds": [3, 1], "seeds": 3})
    assert sentences.missed(gates) == "- Bounds missed: `a` n (it reads) in 2 of 3 seeds."
    assert sentences.missed(gates[:1]) == "- No bound is missed."
    bands = pd.DataFrame({"backbone": "a", "measure": "text_asr", "kind": "band", "width": [1, 1, 2], "start": [0.0, 1.0, 1.0],
                          "located": [False, False, True], "change": [-0.2, -0.1, -0.05]})  # fmt: skip
    assert sentences.transplanted(bands) == (
        "- The parent's blocks put back, text ASR changes in `a`: the located band by -5 points, block 0, the best single one, "
        "by -20 points."
    )


def test_where_nothing_is_committed_the_answer_says_so(tmp_path):
    assert all(openings.opening(notebook, tmp_path) == openings.NOTHING for notebook in openings.OPENINGS)
    assert claims.written(tmp_path).empty


def test_what_holds_is_counted_by_status_and_level():
    rows = [("a", "registered", claims.SUPPORTED, claims.SUPPORTED), ("a", "registered", claims.SUPPORTED, claims.UNDECIDED),
            ("a", "registered", claims.CONTRADICTED, claims.UNDECIDED), ("a", "registered", claims.NOT, claims.NOT)]  # fmt: skip
    ledger = pd.DataFrame(rows, columns=["backbone", "status", "item_level", "seed_level"]).assign(seeds=3)
    assert sentences.counted(ledger) == (
        "- `a`, 3 seeds: of 3 registered claims measured 2 hold over items, 1 of these over seeds too; contradicted: 1."
    )
