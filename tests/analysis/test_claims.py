"""The ledger on invented answers: every verdict follows from counts, and nothing else can move it."""

import numpy as np
import pandas as pd
import pytest

from vlsafe.analysis import claims, comparisons, crossing, sentences
from vlsafe.analysis.claims import CEILING, CONTRADICTED, NOT, SUPPORTED, UNDECIDED, Joint
from vlsafe.analysis.clustered import Stratum
from vlsafe.analysis.comparisons import Changes, Part
from vlsafe.analysis.measures import MODEL

BASE = dict.fromkeys(MODEL, "x") | {"category": None, "backbone": "b", "exam": "full", "step": 9}
KINDS = (  # what a count is called, benchmark, judge, group, harmful; an event is compliance, of twins a refusal
    ("text", "sorry_bench", "world", "base", True), ("pictures", "mm_safetybench", "world", "SD", True),
    ("twins", "mm_safetybench", "world", "SD", False), ("xstest", "xstest", "xstest-strings", "homonym", False),
    ("help", "mmbench", "letters", "icon", False), ("help", "mme", "mme-yes-no", "color", False),
    ("help", "seed_bench", "seed-letter", "likelihood", False),
)  # fmt: skip


def run(name, seed=0, n=100, exam="full", step=9, **counts):
    """Answers of one run to `n` items of each kind, two to a verb–object pair; `counts` of them, at steps of 37, are events."""
    stage, _, recipe = name.partition("/")
    rows = []
    for kind, benchmark, judge, group, harmful in KINDS:
        if kind not in counts:
            continue
        events = {i * 37 % n for i in range(counts[kind])}
        for i in range(n):
            happened = i in events
            label = (
                ("refused" if happened else "complied_right") if kind == "twins" else "complied_right" if happened else "refused"
            )
            facts = dict(
                benchmark=benchmark, judge=judge, group=group, harmful=harmful, item=f"{kind}{i}", cluster=f"{kind}{i // 2}"
            )
            origin = dict(stage=stage, recipe=recipe, seed=seed, exam=exam, step=step, model=f"{name}/{step}", label=label)
            rows.append({**BASE, **facts, **origin, "event": (label != "refused") if kind == "twins" else happened})
    return pd.DataFrame(rows)


FINE = dict(twins=0, xstest=0, help=60)


def of_two(text, pictures, **more):
    return dict(text=text, pictures=pictures) | FINE | more


def study(seed=0, shift=0, n=100, **more):
    """A parent that refuses, a stage 1 in the middle, an adapted model that complies, arms and tuned models; counts of 100."""
    runs = {
        "parent/aligned": dict(text=0, xstest=0),
        "projector/filtered": of_two(0, 30, twins=10),
        "instruct/filtered-full": of_two(60 + shift, 90),
        "instruct/unfiltered-full": of_two(95, 99),
        "instruct/clean-full": of_two(40 + shift, 80),
        "instruct/looking-full": of_two(5, 30),
        "instruct/textonly-full": of_two(95, 90),
        "safety/sl-full": of_two(5, 20, twins=30),
        "safety/mtl-full": of_two(0, 5),
        "safety/dpo-both-full": of_two(90, 95),
    } | more
    frames = [run(name, seed, n, **{k: v * n // 100 for k, v in counts.items()}) for name, counts in runs.items()]
    for step, k in ((1, 10), (2, 30), (4, 50)):
        frames.append(run("instruct/filtered-full", seed, n, exam="panel", step=step, text=k * n // 100))
    return pd.concat(frames, ignore_index=True)


def found(*studies):
    return claims.prepared({"raw": pd.concat(studies, ignore_index=True)})


SHIFTS = ((0, 0), (1, 12), (2, -12))


@pytest.fixture(scope="module")
def three():
    return claims.ledger(found(*(study(seed, shift) for seed, shift in SHIFTS))).set_index("claim")


def test_verdicts_follow_from_the_counts(three):
    models = three["item_level"].to_dict()
    assert {name: models[name] for name in ("1", "2", "3", "3b", "4", "4d", "5")} == dict.fromkeys(
        ("1", "2", "3", "3b", "4", "4d", "5"), SUPPORTED
    )
    assert models["4b"] == CONTRADICTED  # the twin complies more
    assert models["6"] == CONTRADICTED  # DPO complies more than the adapted model
    assert models["5r"] == SUPPORTED and models["5h"] == UNDECIDED  # SFT refuses twins; help is asked thrice of 100 pairs a seed
    assert models["5br"] == UNDECIDED  # multitask restores everything; 300 items do not rule out five points, corrected
    assert models["12"] == NOT and pd.isna(three.loc["12", "effect"])
    recipe = three["seed_level"].to_dict()
    assert recipe["1"] == recipe["2"] == SUPPORTED
    assert recipe["3"] == UNDECIDED and three.loc["3", "seed_p"] < 0.05 < three.loc["3", "seed_p_holm"]  # decided on the latter


def test_a_cost_is_ruled_out_by_enough_items():
    ledger = claims.ledger(found(*(study(seed, n=300) for seed in range(3)))).set_index("claim")
    assert ledger.loc["5br", "item_level"] == ledger.loc["5h", "item_level"] == CONTRADICTED
    assert ledger.loc["5r", "item_level"] == SUPPORTED


def test_effects_by_hand(three):
    assert three.loc["3", "part"].startswith("multimodal")  # of the two the less certain one, by a hair
    parts = claims.every_part(found(*(study(seed, shift) for seed, shift in SHIFTS)))
    (third,) = (row for _, row in parts[parts["claim"] == "3"].iterrows() if row["part"].startswith("text"))
    assert third["effect"] == pytest.approx(0.6) and third["effects"] == [0.6, 0.72, 0.48] and third["n"] == 300
    c = 4.3027**2 * 0.12**2 / 3 / (1 - 0.6**2)  # Student's t with two degrees of freedom, Wilson's formula on [-1, 1]
    assert third["seed_low"] == pytest.approx((0.6 - (c * (1 + c - 0.6**2)) ** 0.5) / (1 + c), abs=1e-4)
    assert three.loc["4c", "effect"] == pytest.approx(0.6 - 0.1)  # ASR up by 60 points, refusals of twins down by 10
    assert three.loc["5r", "part"] == "refusal of benign twins rises by more than 5 points"
    assert (three["p_holm"].dropna() >= three["p"].dropna()).all()


def test_fewer_than_three_seeds_say_nothing_about_a_recipe():
    ledger = claims.ledger(found(study(0), study(1)))
    measured = ledger[ledger["item_level"] != NOT]
    assert set(measured["seed_level"]) <= {UNDECIDED, CEILING} and (measured["seeds"] == 2).all()
    assert set(ledger.loc[ledger["item_level"] == NOT, "seed_level"]) == {NOT}


def test_a_claim_is_judged_on_the_seeds_that_measured_all_of_it():
    other = study(1)
    other = other[other["stage"] != "safety"]
    ledger = claims.ledger(found(study(0), other)).set_index("claim")
    assert ledger.loc["1", "seeds"] == 2 and ledger.loc["5", "seeds"] == 1


def test_a_dose_by_hand():
    """Rates of 10, 30 and 50 % at doses of 0, 5 and 20: NumPy's own line rises as much."""
    doses = {"looking-full": 10, "dose-pictured-05": 30, "dose-pictured-20": 50}
    raw = pd.concat([run(f"instruct/{name}", text=50, pictures=rate) for name, rate in doses.items()])
    line = claims.ledger(found(raw)).set_index("claim").loc["4j"]
    x, y = np.array([0, 0.25, 1]), np.array([0.1, 0.3, 0.5])
    assert line["effect"] == pytest.approx(np.polyfit(x, y, 1)[0]) and (line["before"], line["after"]) == (0.1, 0.5)
    assert line["low"] > 0.05 and line["matters"] == "yes" and line["item_level"] == SUPPORTED
    few = claims.ledger(found(raw[raw["recipe"] != "dose-pictured-05"])).set_index("claim").loc["4j"]
    assert few["item_level"] == NOT and few["reason"] == "needs the arm without how-tos and two doses of one kind"


def test_whether_an_effect_matters_is_not_whether_there_is_one():
    """Of 4,000 items 60 more are refused: there is an effect, and it is smaller than what would matter."""
    rows = [
        run(f"instruct/{name}", n=4000, text=text, twins=0) for name, text in (("unfiltered-full", 400), ("filtered-full", 340))
    ]
    line = claims.ledger(found(*rows)).set_index("claim").loc["3c"]
    assert line["part"] == "text ASR below unfiltered data's" and line["effect"] == pytest.approx(-0.015)
    assert line["item_level"] == SUPPORTED and line["matters"] == "no" and line["high"] < 0
    wide = claims.ledger(found(study(n=40, **{"instruct/unfiltered-full": dict(text=10, twins=0)}))).set_index("claim")
    assert wide.loc["1", "matters"] == "open"  # from 0 to 4 of 40


def test_no_room_is_a_ceiling():
    full = dict(text=100, pictures=100, **FINE)
    raw = study(0)
    raw = raw[~raw["recipe"].isin(["textonly-full", "filtered-full"])]
    raw = pd.concat([raw, run("instruct/textonly-full", **full), run("instruct/filtered-full", **full)])
    line = claims.ledger(found(raw)).set_index("claim").loc["4b"]
    assert line["item_level"] == CEILING and line["effect"] == 0 and line["detectable"] > 0
    low = raw[~raw["recipe"].isin(["textonly-full", "filtered-full"])]
    low = pd.concat([low, *(run(f"instruct/{name}-full", text=50, pictures=99, **FINE) for name in ("textonly", "filtered"))])
    assert claims.ledger(found(low)).set_index("claim").loc["4b", "item_level"] == UNDECIDED


def test_one_part_that_fails_is_enough_whatever_bounds_another():
    """SFT: text ASR can fall no further, and multimodal ASR rises; "all" of both is contradicted."""
    sides = {"instruct/filtered-full": of_two(1, 20), "safety/sl-full": of_two(1, 60)}
    line = claims.ledger(found(*(study(seed, **sides) for seed in range(3)))).set_index("claim").loc["5"]
    assert (line["item_level"], line["part"]) == (CONTRADICTED, "multimodal ASR falls from the adapted model's")
    still = {"instruct/filtered-full": of_two(1, 20), "safety/sl-full": of_two(1, 20)}
    assert claims.ledger(found(study(**still))).set_index("claim").loc["5", "item_level"] == CEILING


def test_doses_are_held_against_as_large_ones():
    doses = {"dose-pictured-05": 30, "dose-pictured-20": 50, "dose-text-05": 60, "dose-text-20": 80}
    raw = pd.concat([run(f"instruct/{name}", text=rate, pictures=90 - rate) for name, rate in doses.items()])
    both = claims.ledger(found(raw)).set_index("claim").loc[["4l", "4m"], "effect"]
    for gone in ("dose-text-20", "dose-pictured-20"):
        part = claims.ledger(found(raw[raw["recipe"] != gone])).set_index("claim").loc[["4l", "4m"], "effect"]
        assert part.tolist() == pytest.approx([0.3, 0.3]) and both.tolist() == pytest.approx([0.3, 0.3])
    lone = raw[raw["recipe"].isin(["dose-text-05", "dose-pictured-20"])]
    assert set(claims.ledger(found(lone)).set_index("claim").loc[["4l", "4m"], "item_level"]) == {NOT}


def test_a_change_of_two_measures_is_the_difference_of_what_stands_beside_it(three):
    assert three.loc["4c", "after"] - three.loc["4c", "before"] == pytest.approx(three.loc["4c", "effect"])


def test_nothing_measured_is_no_verdict():
    ledger = claims.ledger(found(run("parent/aligned", text=0, xstest=0)))
    assert set(ledger["item_level"]) == set(ledger["seed_level"]) == {NOT} and ledger["effect"].isna().all()
    assert len(claims.sheet(ledger)) == len(ledger) and (ledger["reason"] != "").all()


def test_the_ledger_says_who_judged_or_why_nothing_was_measured():
    raw = study()
    frames = {"raw": raw[raw["recipe"] != "clean-full"], "without": {"instruct/clean-full": "nobody knows the truth"}}
    ledger = claims.ledger(claims.prepared(frames)).set_index("claim")
    assert ledger.loc["1", ["judge", "reason"]].tolist() == ["world", ""]
    assert ledger.loc["3b", "reason"] == "no text_asr of instruct/clean-full: nobody knows the truth"
    assert ledger.loc["8", "reason"] == "needs the SPPFT grid, a band located beyond chance and such other sets"
    assert ledger.loc["12", "reason"] == "no study of this backbone"
    shown = claims.sheet(ledger.reset_index()).set_index("claim")["decided by"]
    assert shown["3b"] == ledger.loc["3b", "reason"] and shown["1"] == ledger.loc["1", "part"]
    alone = claims.ledger(claims.prepared({"raw": raw[raw["recipe"] != "sl-full"]})).set_index("claim")
    assert alone.loc["5", "reason"] == "no text_asr of safety/sl-full: not examined"


def test_trees_of_p_values():
    parts = {name: comparisons.Part(name, 1, "a", "b") for name in "abc"}
    lines = {"a": dict(effect=1, p=0.01), "b": dict(effect=1, p=0.04), "c": dict(effect=-1, p=0.001)}
    every, either = (claims.weigh(claims.Joint(how, (parts["a"], parts["b"])), lines, "p") for how in ("all", "any"))
    assert every[:2] == (0.04, 1.0) and every.supporting == "b" and either[:2] == (0.02, 1.0) and either.supporting == "a"
    mixed = claims.weigh(claims.Joint("all", (parts["a"], parts["c"])), lines, "p")
    assert mixed[:2] == (1.0, 0.002) and mixed.contradicting == "c"
    hopeful = claims.weigh(claims.Joint("any", (parts["a"], parts["c"])), lines, "p")
    assert hopeful[:2] == (0.02, 1.0)


def test_the_ledger_repeats_and_names_every_claim_of_the_issue(three):
    again = claims.ledger(found(*(study(seed, shift) for seed, shift in ((0, 0), (1, 12), (2, -12))))).set_index("claim")
    pd.testing.assert_frame_equal(three, again)
    wanted = ["1", "2", "3", "3b", "4", "4b", "4c", "4d", "5", "6", "7", "8", "9", "10", "11", "12"]
    assert [name for name in wanted if name not in set(three.index)] == []


def merged(text, pictures, helpful, ensemble):
    """Six tuned models alike, a merged model, and the ensemble of its members."""
    tenth = next(claim for claim in claims.CLAIMS if claim.name == "10")
    tuned = {part.before: of_two(30, 40) for part in claims.leaves(tenth.decided_by)}
    assert len(tuned) == 6
    own = {claims.MERGED[0].replace("0.*[1-9]*", "0.60"): of_two(text, pictures, help=helpful)}
    return study(n=200, **tuned, **own, **{claims.ENSEMBLE[0].replace("0.*[1-9]*", "0.50"): ensemble})


@pytest.mark.parametrize(
    ("model", "ensemble", "front", "better"),
    [
        ((5, 10, 60), of_two(30, 40), SUPPORTED, SUPPORTED),
        ((80, 90, 30), of_two(30, 40), CONTRADICTED, CONTRADICTED),
        ((30, 40, 60), of_two(30, 40), UNDECIDED, UNDECIDED),
    ],
)
def test_merging_against_the_front_and_the_ensemble(model, ensemble, front, better):
    ledger = claims.ledger(found(merged(*model, ensemble))).set_index("claim")
    assert (ledger.loc["10", "item_level"], ledger.loc["11", "item_level"]) == (front, better)
    assert claims.is_merged("merge/inside/filtered-full+sl-full/0.60") and ledger.loc["10b", "item_level"] == NOT
    others = ("merge/ties/filtered-full+sl-full/0.60", "merge/linear/filtered-full+sl-full/1.00")  # the latter is SL itself
    assert not any(map(claims.is_merged, others))


def inside(seed, lost, located=True):
    """Frames of notebook 05: cosines of forty prompts in six layers, `lost` of each inside the band [2, 4); gradients."""
    rng, unit = np.random.default_rng(seed), {"backbone": "b", "seed": seed}
    prompt = {**unit, "stage": "instruct", "recipe": "filtered-full", "step": 9, "group": "text", "harmful": True}
    layers = [
        prompt | {"item": f"i{i}", "cluster": f"c{i // 2}", "layer": layer, "increment": 0.9,
                "cosine": 0.9 - lost * (layer in (2, 3)) + rng.normal(0, 0.02)}
        for i in range(40) for layer in range(6)
    ]  # fmt: skip
    gradients = [
        {**unit, "layer": 0, "step": 0, "a": a, "b": b, "task_a": ("vl", "safety")[a >= 6],
         "task_b": ("vl", "safety")[b >= 6], "cosine": (0.5 if (a < 6) == (b < 6) else -0.2) + rng.normal(0, 0.02)}
        for b in range(12) for a in range(b)
    ]  # fmt: skip
    place = [{**unit, "start": 2, "end": 4, "located": located, "p": 0.01}]
    return {"layers": pd.DataFrame(layers), "gradients": pd.DataFrame(gradients), "located": pd.DataFrame(place)}


def grid(seed, located, other):
    """SPPFT's grid: the located band and three other sets, text ASR as counts of 100."""
    frames = []
    for name, asr in (("band-2-3", located), ("band-0-1", other), ("band-4-5", other), ("random-1-3", other)):
        rows = run(f"sppft/{name}", seed, exam="patched", text=asr)
        frames.append(rows.assign(located=name == "band-2-3", kind=name.split("-")[0]))
    return pd.concat(frames)


@pytest.mark.parametrize(("lost", "asr", "verdict"), [(0.3, (20, 60), SUPPORTED), (-0.05, (60, 20), CONTRADICTED)])
def test_claims_about_the_inside(lost, asr, verdict):
    frames = [inside(seed, lost) for seed in range(3)]
    whole = {name: pd.concat([frame[name] for frame in frames], ignore_index=True) for name in frames[0]}
    whole |= {"raw": pd.concat([study(seed) for seed in range(3)]), "frozen": pd.concat([grid(seed, *asr) for seed in range(3)])}
    ledger = claims.ledger(claims.prepared(whole)).set_index("claim")
    assert ledger.loc["7", "item_level"] == ledger.loc["7", "seed_level"] == verdict
    assert ledger.loc["7", "effect"] == pytest.approx(lost, abs=0.01) and ledger.loc["7b", "item_level"] != SUPPORTED
    assert ledger.loc["8", "item_level"] == verdict and ledger.loc["8", "effect"] == pytest.approx((asr[0] - asr[1]) / 100)
    assert ledger.loc["9", "item_level"] == ledger.loc["9b", "item_level"] == SUPPORTED
    assert ledger.loc["7", "detectable"] < 0.1  # a change of a cosine is smaller than one of an answer
    assert ledger.loc["9b", "effect"] == pytest.approx(-0.2, abs=0.01)
    shared = claims.prepared({**whole, "raw": whole["raw"].assign(shared=True)})  # no gradient is of an item that seeds share
    columns = ["effect", "low", "high"]
    assert claims.ledger(shared).set_index("claim").loc["9", columns].tolist() == ledger.loc["9", columns].tolist()
    whole["frozen"]["event"] = (
        whole["frozen"]["event"].astype(object).mask(whole["frozen"]["item"] == whole["frozen"]["item"].iloc[0], None)
    )
    assert claims.ledger(claims.prepared(whole)).set_index("claim").loc["8", "n"] == ledger.loc["8", "n"] - 3  # unjudged in each
    for none in ({"located": False}, {"p": 0.2}):  # one that chance explains is none
        nowhere = claims.prepared(whole | {"located": whole["located"].assign(**none)})
        assert set(claims.ledger(nowhere).set_index("claim").loc[["7", "7b", "8"], "item_level"]) == {NOT}


def test_tasks_with_one_gradient_and_unequal_noise_do_not_diverge():
    """Two cosines between batches of one task, .64 and .1; the same gradient has their geometric mean between tasks, .25."""

    def ledger(between):
        found = pd.concat([inside(seed, 0)["gradients"] for seed in range(3)], ignore_index=True)
        same, safety = found["task_a"] == found["task_b"], found["task_a"] == "safety"
        noise = found["cosine"] - np.where(same, 0.5, -0.2)
        found["cosine"] = np.where(~same, between, np.where(safety, 0.64, 0.1)) + noise
        return claims.ledger(claims.prepared({"raw": study(), "gradients": found})).set_index("claim")

    line = ledger(0.253)
    assert line.loc["9b", "item_level"] == CONTRADICTED  # a cosine can be negative, so zero is no ceiling
    assert line.loc["9", "item_level"] != SUPPORTED and line.loc["9", "effect"] == pytest.approx(0, abs=0.01)
    assert ledger(0.1).loc["9", "item_level"] == SUPPORTED


def test_items_that_all_seeds_share_are_one_sample():
    """The same changes in three seeds say no more than in one; of three worlds they would."""
    one = study()
    three = pd.concat([study(seed) for seed in range(3)], ignore_index=True)
    width, n = {}, {}
    for name, raw in {"one": one, "three worlds": three, "shared": three.assign(shared=True)}.items():
        line = claims.ledger(claims.prepared({"raw": raw})).set_index("claim").loc["4b"]
        width[name] = line["high"] - line["low"]
        n[name] = line["n"]
    assert width["shared"] == pytest.approx(width["one"], rel=0.1) and width["three worlds"] < 0.75 * width["one"]
    assert n["shared"] == n["one"] == n["three worlds"] / 3


def test_a_remedy_at_the_floor_has_room_to_lose_half():
    """From 2 of 100 with the adapted model at 50: 31 at the end lie 5 above the middle, which is no ceiling."""
    ends = {"adapted/start": 50, "sl-full/start": 2, "sl-full/instructions": 31}
    raw = pd.concat([run(f"durability/{name}", text=asr, twins=0) for name, asr in ends.items()])
    part = next(p for c in claims.CLAIMS if c.name == "13" for p in claims.leaves(c.decided_by) if p.method == "half")
    frames = claims.prepared({"raw": raw})
    change = comparisons.changes(part, frames, ("b", 0))
    assert change.before == pytest.approx(0.26) and change.after == pytest.approx(0.31)
    assert not claims.compared(part, {("b", 0): change})["ceiling"]


def test_models_that_cannot_answer_are_named_beside_the_claims_that_compare_them():
    names = [("instruct", "textonly-full", "no: answers are broken"), ("instruct", "filtered-full", "yes")]
    capable = pd.DataFrame(
        [{"backbone": "b", "seed": s, "stage": a, "recipe": r, "capable": c} for s in (0, 2) for a, r, c in names]
    )
    ledger = claims.ledger(found(study()))
    told = crossing.flagged(ledger, capable).set_index("claim")["flagged"]
    assert told["4b"] == told["4g"] == "instruct/textonly-full, seed 0, 2: answers are broken" and told["3"] == ""
    assert claims.sheet(crossing.flagged(ledger, capable)).set_index("claim")["not capable"].to_dict() == told.to_dict()
    assert set(crossing.flagged(ledger, capable.assign(capable="yes"))["flagged"]) == {""}


def test_what_a_benchmark_could_have_shown():
    lines = claims.precision(found(study(0), study(1))).set_index("measure")
    assert lines.loc["text_asr", "n"] == 200 and 0.05 < lines.loc["text_asr", "detectable"] < 0.2
    assert set(lines.index) <= set(claims.PRECISION)


def test_the_ledger_of_a_folder_is_read_back_as_it_was_written(tmp_path):
    ledger = claims.ledger(found(*(study(seed, n=60) for seed in range(3))))
    ledger.to_csv(tmp_path / "T09_claims.csv", index=False)
    again, wanted = (claims.sheet(of).set_index(["claim", "backbone"]) for of in (claims.written(tmp_path), ledger))
    assert again.index.tolist() == wanted.index.tolist() and again["item level"].tolist() == wanted["item level"].tolist()
    assert again["effect"].tolist() == wanted["effect"].tolist()
    assert claims.written(tmp_path / "nothing here").empty


def test_two_ledgers_side_by_side_say_where_both_scales_agree(three):
    one = three.reset_index()
    measured = one[one["item_level"] != claims.NOT]
    assert len(measured) > 3
    other = one.assign(backbone="other")
    first = measured["claim"].iloc[0]
    other.loc[other["claim"] == first, "item_level"] = "contradicted"
    last = measured["claim"].iloc[-1]
    other.loc[other["claim"] == last, "item_level"] = claims.NOT
    lines = crossing.beside(one, other).set_index("claim")
    assert list(lines.columns[1:]) == [*one["backbone"].unique(), "other", "both scales"]
    apart = "alike" if measured["item_level"].iloc[0] == claims.CONTRADICTED else "opposite"
    apart = apart if measured["item_level"].iloc[0] in (claims.SUPPORTED, claims.CONTRADICTED) else "not all decide"
    assert lines.loc[first, "both scales"] == apart and lines.loc[last, "both scales"] == claims.NOT
    assert set(lines.loc[measured["claim"].iloc[1:-1], "both scales"]) == {"alike"}
    small = crossing.beside(one.assign(effect=-0.0001, item_level=claims.SUPPORTED), other)
    assert set(small[one["backbone"].iloc[0]].dropna()) == {f"{claims.SUPPORTED} (+0)"}, "a rounded zero has no minus"
    assert lines.index.tolist() == list(dict.fromkeys(one["claim"]))
    again = pd.concat([one, other.iloc[:1].assign(item_level=claims.NOT)])  # a claim about a backbone of the other ledger alone
    assert crossing.beside(again, other.assign(statement="as it was")).set_index("claim").equals(lines)


def of_parts(**values):
    """Lines of a claim's comparisons by name: the effect with its interval, p over items and over seeds."""
    names = ("effect", "low", "high", "p", "seed_p")
    same = {
        "sign": 1,
        "against": 0.0,
        "n": 9,
        "seeds": 3,
        "effects": [0.1, 0.2, 0.3],
        "ceiling": False,
        "differs": False,
        "judge": "",
    }
    return {
        name: same | {"part": name, "seed_low": of[1] - 0.1, "seed_high": of[2]} | dict(zip(names, of, strict=True))
        for name, of in values.items()
    }


def test_what_seeds_say_is_of_the_part_that_decides_over_them():
    """The rise of one part is less sure over items, that of the other over seeds: each interval stands beside its own verdict."""
    claim = next(c for c in claims.CLAIMS if c.name == "3")
    text, pictures = (part.what for part in claims.leaves(claim.decided_by))
    lines = of_parts(**{text: (0.3, 0.1, 0.5, 0.01, 0.001), pictures: (0.2, 0.15, 0.25, 0.001, 0.3)})
    line = claims.judged({("3", "b"): lines}).iloc[0]
    assert (line["part"], line["effect"]) == (text, 0.3) and (line["item_level"], line["seed_level"]) == (SUPPORTED, UNDECIDED)
    assert (line["seed_part"], line["seed_low"], line["seed_high"]) == (pictures, pytest.approx(0.05), 0.25)
    single = {name: of | {"seed_p": 1.0, "seeds": 1} for name, of in reversed(lines.items())}
    assert claims.judged({("3", "b"): single}).iloc[0][["part", "seed_part"]].tolist() == [text, text]  # one seed decides nothing
    shown = claims.sheet(pd.DataFrame([line]).assign(reason="")).iloc[0]
    assert shown["over seeds, decided by"] == f"{pictures} (+20)" and shown["over seeds"] == "[+5, +25]"
    assert f"over 3 seeds undecided, {pictures}: [+5, +25]" in sentences.verdict(pd.Series({**line, "flagged": ""}))


def test_an_effect_of_all_parts_matters_where_each_does():
    one, other = (Part(name, 1, "a", "b") for name in ("one", "other"))
    lines = of_parts(one=(0.3, 0.2, 0.4, 0.01, 0.01), other=(0.02, 0.01, 0.03, 0.01, 0.01))
    assert [claims.matters(part, lines, 0.05) for part in (one, other)] == ["yes", "no"]
    assert claims.matters(Joint("all", (one, other)), lines, 0.05) == "no"
    assert claims.matters(Joint("any", (one, other)), lines, 0.05) == "yes"
    assert claims.matters(Joint("all", (one, other)), lines, 0.02) == "open"
    leeway = other._replace(against=-0.05)  # asks that nothing falls by more than five points
    assert claims.matters(leeway, lines, 0.05) == "" and claims.matters(Joint("all", (one, leeway)), lines, 0.05) == "yes"


def test_shared_items_weigh_every_seed_alike_however_many_were_judged():
    def of(n, rises):
        change = [1.0] * rises + [0.0] * (n - rises)
        return Changes([Stratum(1.0, change, change, [f"q{i}" for i in range(n)])], 0.2, 0.2 + rises / n)

    part, studies = Part("x", 1, "a", "b"), {("b", 0): of(400, 200), ("b", 1): of(40, 4), ("b", 2): of(40, 4)}
    line = claims.compared(part, studies, shared=True)
    assert line["effect"] == pytest.approx((0.5 + 0.1 + 0.1) / 3) == pytest.approx(line["after"] - line["before"])
