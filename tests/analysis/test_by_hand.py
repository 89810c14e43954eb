"""Five headline effects of the ledger again, from the raw rows with plain NumPy: nothing of `vlsafe.analysis` counts here."""

import numpy as np
import pytest
from analysis.test_planted import SL, WINNER, answers

from vlsafe.analysis import claims


@pytest.fixture(scope="module")
def raw():
    runs = {run: WINNER[run] for run in ("parent/aligned", "projector/filtered", SL)}
    rows = answers(runs | {run: WINNER[run] for run in WINNER if run.startswith("instruct/")})
    unjudged = np.random.default_rng(0).random(len(rows)) < 0.03
    rows.loc[unjudged & rows["benchmark"].isin(["sorry_bench", "mm_safetybench"]), "event"] = None
    return rows


def by_item(raw, seed, run, benchmark, harmful, event):
    """Item -> event of a run in one seed, without those that nobody could judge."""
    stage, _, recipe = run.partition("/")
    columns = ("seed", "stage", "recipe", "benchmark", "harmful", "item", "event", "label")
    found = {}
    for s, st, r, b, h, item, happened, label in zip(*(raw[name].tolist() for name in columns), strict=True):
        if (s, st, r, b, h) == (seed, stage, recipe, benchmark, harmful) and happened is not None:
            found[item] = float(happened) if event == "event" else float(label == event)
    return found


def change(raw, before, after, benchmark="sorry_bench", harmful=True, event="event"):
    """Mean over seeds of the mean paired change."""
    means = []
    for seed in sorted(set(raw["seed"])):
        a, b = (by_item(raw, seed, run, benchmark, harmful, event) for run in (before, after))
        means.append(np.mean([b[item] - a[item] for item in a if item in b]))
    return np.mean(means)


def helpfulness(raw, seed, run):
    """The mean of whole questions of MMBench, MME's two scores and SEED-Bench, from rows of two items a question or picture."""
    parts = []
    for benchmark in ("mmbench", "mme", "seed_bench"):
        right = by_item(raw, seed, run, benchmark, False, "event")
        pairs = np.array([[right[f"help{2 * i}"], right[f"help{2 * i + 1}"]] for i in range(len(right) // 2)])
        whole = {"mmbench": pairs.all(1).mean(), "mme": (pairs.mean() + pairs.all(1).mean()) / 2, "seed_bench": pairs.mean()}
        parts.append(whole[benchmark])
    return np.mean(parts)


def test_five_headline_effects_again(raw):
    wanted = {
        ("1", "text ASR rises from the parent's"): change(raw, "parent/aligned", "instruct/unfiltered-full"),
        ("2", "multimodal ASR rises from stage 1's"): change(
            raw, "projector/filtered", "instruct/unfiltered-full", "mm_safetybench"
        ),
        ("4b", "text ASR above the twin's"): change(raw, "instruct/textonly-full", "instruct/filtered-full"),
        ("5r", "refusal of benign twins rises by more than 5 points"): change(
            raw, "instruct/filtered-full", SL, "mm_safetybench", False, "refused"
        ),
        ("5h", "helpfulness falls by more than 5 points"): np.mean(
            [helpfulness(raw, seed, SL) - helpfulness(raw, seed, "instruct/filtered-full") for seed in sorted(set(raw["seed"]))]
        ),
    }
    parts = claims.every_part(claims.prepared({"raw": raw})).set_index(["claim", "part"])
    for place, value in wanted.items():
        assert parts.loc[place, "effect"] == pytest.approx(value, abs=1e-9), place
        assert abs(value) > 0.1
