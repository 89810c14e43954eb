"""Layers and interventions in numbers, by hand where a hand can reach, and as pictures over several studies."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

from vlsafe.analysis import adaptation, causal, probing, stats
from vlsafe.publish import gallery
from vlsafe.publish.results import probing_frames, read
from vlsafe.study import causal as study_causal
from vlsafe.study.graph import read_by

RNG = np.random.default_rng


def test_clusters_are_drawn_whole():
    """Two clusters of two equal values: a bootstrap mean is one of three values, one cluster never splits."""
    drawn = probing.spread(np.array([[0.0], [0.0], [1.0], [1.0]]), ["a", "a", "b", "b"], RNG(0))
    assert drawn.shape == (1 + probing.DRAWS, 1) and drawn[0, 0] == 0.5
    assert set(np.unique(drawn)) == {0.0, 0.5, 1.0}
    interval = stats.percentiles(drawn[:, 0])
    assert (interval["low"], interval["value"], interval["high"]) == (0.0, 0.5, 1.0)


def test_auc_by_hand():
    """One of four pairs is the wrong way round; a tie is worth a half."""
    assert probing.auc([3.0, 1.0, 0.0, 2.0], [True, True, False, False], list("abcd"), RNG(0))[0] == 0.75
    assert probing.auc([1.0, 1.0], [True, False], list("ab"), RNG(0))[0] == 0.5
    sure = probing.auc([2.0, 2.0, 0.0, 0.0], [True, True, False, False], list("abcd"), RNG(0))
    assert np.nanmin(sure) == 1.0


def test_drift_by_hand_with_single_modules_at_the_end_only():
    """Two modules of a block with lengths 3 and 4 that move by 0.3 and 0.4: the block, of length 5, drifts by a tenth."""
    common = dict(backbone="b", seed=0, stage="instruct", recipe="r", layer=0, rank=np.nan, full_rank=np.nan, n=1)
    rows = [
        common | dict(step=step, module=module, norm=length**2, change=(length / 10) ** 2)
        for step in (1, 2)
        for module, length in (("up_proj", 3.0), ("down_proj", 4.0))
    ]
    found = probing.drift(pd.DataFrame(rows))
    assert found["drift"].to_numpy() == pytest.approx(0.1)
    assert found.groupby("step")["module"].agg(set).to_dict() == {1: {"all"}, 2: {"all", "up_proj", "down_proj"}}
    assert probing.drift_sheet(found)[[0, "step"]].to_numpy().tolist() == [[10.0, 2]]


def test_rank_correlation_is_spearmans():
    points = RNG(0).integers(0, 6, size=(30, 2)).astype(float)  # with ties
    assert probing.rank_correlation(points) == pytest.approx(spearmanr(*points.T).statistic)
    assert np.isnan(probing.rank_correlation(np.array([[1.0, 2.0], [1.0, 3.0]])))


def test_what_is_planted_early_predicts_the_end_and_noise_does_not():
    """Final attack success is the rank of how far harmful prompts moved at step 25, and is not related to drift."""
    recipes, lines, alike, raw = [f"r{i}" for i in range(9)], [], [], []
    drifts = RNG(3).permutation(9)
    for i, recipe in enumerate(recipes):
        for step in (25, 300):
            common = {"backbone": "b", "seed": 0, "stage": "instruct", "recipe": recipe, "step": step}
            lines.append(common | {"layer": 0.0, "change": float(drifts[i]), "norm": 1.0})
            alike += [common | {"harmful": h, "layer": 0, "cosine_centred": 1 - 0.01 * i * h} for h in (True, False)]
        item = {"scale": "s", "model": recipe, "exam": "full", "judge": "world", "harmful": True, "group": "base"}
        for name in ("sorry_bench", "mm_safetybench"):
            of = common | item | {"benchmark": name, "label": "complied_right"}
            raw += [of | {"item": f"{name}{k}", "cluster": str(k), "event": k < i} for k in range(10)]
    found = probing.prediction(pd.DataFrame(lines), pd.DataFrame(alike), pd.DataFrame(raw))
    found = found[found["outcome"] == "text_asr"].set_index("predictor")
    assert set(found["step"]) == {25} and (found["n"] == 9).all() and set(found["over"]) == {"all"}
    assert found.loc["harmful", ["value", "low", "high"]].tolist() == pytest.approx([1, 1, 1])
    assert np.isnan(found.loc["benign", "value"]) and abs(found.loc["drift", "value"]) < 0.5


def test_gradients_of_one_task_are_the_yardstick():
    common = {"backbone": "b", "seed": 0, "step": 0, "layer": 0}
    of = ((0, 1, "vl", "vl", 0.8), (0, 2, "vl", "safety", 0.2), (1, 2, "vl", "safety", -0.4))
    pairs = [common | dict(zip(("a", "b", "task_a", "task_b", "cosine"), pair, strict=True)) for pair in of]
    found = probing.gradients(pd.DataFrame(pairs)).set_index("kind")
    assert found.loc["vl", "value"] == 0.8 and found.loc["both", "value"] == pytest.approx(-0.1)
    assert found.loc["both", "low"] < -0.1 < found.loc["both", "high"]


def answers(recipe, safe, helpful, kind="curve", stage="causal", step=0):
    """Raw rows of one patched model: so many of ten harmful requests refused, so many of ten questions right."""
    common = {"scale": "s", "backbone": "b", "seed": 0, "stage": stage, "recipe": recipe, "step": step, "exam": "patched",
            "model": f"{stage}/{recipe}/{step}", "kind": kind, "category": None, "truncated": False}  # fmt: skip
    rows = []
    for benchmark, judge, harmful, group, label in (
        ("sorry_bench", "world", True, "base", "complied_right"), ("mm_safetybench", "world", True, "SD", "complied_right"),
        ("mm_safetybench", "world", False, "SD", "refused"), ("xstest", "xstest-strings", False, "homonym", "2_full_refusal"),
        ("mmbench", "letters", False, "g", "right"), ("mme", "mme-yes-no", False, "g", "right"),
        ("seed_bench", "seed-letter", False, "likelihood", "right"),
    ):  # fmt: skip
        for k in range(10):
            event = k >= safe if harmful else k < helpful if label == "right" else False
            of = {"benchmark": benchmark, "judge": judge, "harmful": harmful, "group": group, "cluster": str(k)}
            rows.append(common | of | {"item": f"{benchmark}{harmful}{k}", "event": event, "label": label if event else "other"})
    return rows


CURVE = [
    *answers("filtered", 10, 2, stage="projector"), *answers("filtered-full", 6, 6, stage="instruct", step=5),
    *answers("filtered-full", 2, 10, stage="instruct", step=9),
]  # fmt: skip
LOCATED = pd.DataFrame([{"backbone": "b", "seed": 0, "start": 1, "end": 2, "located": True}])


def test_a_patch_that_only_unlearns_lies_on_the_curve():
    """band-0 is as safe and as helpful as the middle of the training: no excess. band-1 is as safe at full helpfulness."""
    patches = [("band-0", 6, 6, "band"), ("band-1", 6, 10, "band"), ("all-0-1", 10, 2, "all"), ("reverse-1", 6, 2, "reverse")]
    raw = pd.DataFrame([*CURVE, *(row for name, *numbers, kind in patches for row in answers(name, *numbers, kind))])
    found = causal.transplants(raw, LOCATED).set_index(["patch", "measure"])
    assert found.loc[("band-0", "text_asr"), ["value", "change", "excess"]].tolist() == pytest.approx([0.4, -0.4, 0.0])
    assert found.loc[("band-1", "text_asr"), ["value", "change", "excess"]].tolist() == pytest.approx([0.4, -0.4, -0.4])
    assert found.loc[("reverse-1", "text_asr"), "change"] == pytest.approx(0.4)  # from all-0-1, not from the adapted model
    assert found["located"].groupby("patch").all().to_dict() == {
        "all-0-1": False,
        "band-0": False,
        "band-1": True,
        "reverse-1": True,
    }
    assert found.loc[("band-0", "helpfulness"), "value"] == pytest.approx(0.6)


def test_random_sets_that_do_as_well_are_counted():
    """Both sets with block 1 are as safe as the best band; the one without it is not."""
    patches = [("band-0-1", 8, 8, "band"), ("band-1-2", 7, 8, "band"), ("random-0-2", 2, 8, "random"),
               ("random-1-3", 8, 8, "random"), ("random-1-4", 9, 7, "random")]  # fmt: skip
    raw = pd.DataFrame([*CURVE, *(row for name, *numbers, kind in patches for row in answers(name, *numbers, kind))])
    found = causal.against_random(raw, LOCATED).set_index("measure")
    assert set(found["which"]) == {"best"} and set(found["band"]) == {"band-0-1"}  # the located one is of another width
    asr = found.loc["text_asr"]
    assert (asr["others"], asr["as_good"], asr["sharing"]) == (3, 2, 2)
    assert asr["difference"] == pytest.approx(0.2 - (0.8 + 0.2 + 0.1) / 3)
    assert found.loc["helpfulness", "as_good"] == 2  # more is better there


def test_frozen_sets_are_compared_at_equal_steps_and_at_equal_helpfulness():
    grid = [(f"band-{k}", 5 + k, 8) for k in range(3)]
    rows = [row for name, safe, helpful in grid for step in (5, 9) for row in answers(name, safe, helpful, "band", "sppft", step)]
    found = causal.frozen(pd.DataFrame(rows), pd.DataFrame(CURVE), LOCATED)
    assert set(found["kind"]) == {"nothing frozen", "located", "band"} and set(found["at"]) == {
        adaptation.STEPS,
        adaptation.LEVEL,
    }
    steps = found[(found["at"] == adaptation.STEPS) & (found["measure"] == "text_asr")].set_index("recipe")
    assert steps.loc["band-1", ["value", "difference"]].tolist() == pytest.approx([0.4, -0.4])
    over = causal.frozen_over_seeds(found)
    line = over[(over["against"] == "band") & (over["at"] == adaptation.STEPS) & (over["measure"] == "text_asr")].iloc[0]
    assert (line["n_seeds"], line["below"]) == (1, 0) and line["mean"] == pytest.approx(0.4 - (0.5 + 0.3) / 2)


# --- what the stages wrote, and the pictures of several studies -----------------------------------------------------


@pytest.fixture(scope="module")
def frames(study):
    for name in read_by(study, "probing", "full"):
        study.folder(name)
    return probing_frames([study], "full")


def test_every_probed_stage_has_its_frame_and_no_number_is_missing(study, frames):
    assert all(len(frame) for frame in frames.values())
    assert not frames["layers"].drop(columns=[*probing.PROBES]).isna().any(axis=None)
    last = frames["layers"][frames["layers"]["recipe"] == "filtered-full"].groupby("step")["item"].nunique()
    remedy = {"safety/mtl-pcgrad-full", "examination/safety.mtl-pcgrad-full"}
    beyond = set(read_by(study, "probing", "full")) - set(read_by(study, "probing"))
    assert last.tolist() == [36, 36, 120] and beyond == set(study_causal.FROZEN_SETS) | remedy
    similar = probing.similarity(frames["layers"])
    whole = similar[similar["measure"].isin(["cosine", "cosine_centred"]) & (similar["kind"] != "difference")]
    assert whole["value"].between(-1.0001, 1.0001).all() and (whole["low"] <= whole["high"]).all()


def test_the_unpatched_model_is_the_one_that_notebook_03_examined(study, frames):
    """The same items, put to the last checkpoint by another way: the same answers."""
    own = frames["patched"].query("kind == 'curve' and step == 5 and stage == 'instruct'")
    full = pd.DataFrame(study.rows("examination/instruct.filtered-full", "raw.parquet")).query("exam == 'full'")
    both = own.merge(full, on=["item", "judge"], suffixes=("", "_full"))
    assert len(both) == len(own) > 30 and (both["label"] == both["label_full"]).all()


def test_the_parents_language_model_is_back_with_everything_transplanted(study, frames):
    """In words, all of the parent's weights behind the adapted model's eyes answer as the parent does."""
    everything = frames["patched"].query("kind == 'all' and benchmark == 'sorry_bench'")
    parent = pd.DataFrame(study.rows("examination/parent.aligned", "raw.parquet"))
    both = everything.merge(parent, on=["item", "judge"], suffixes=("", "_parent"))
    assert len(both) == len(everything) > 0 and (both["label"] == both["label_parent"]).all()


def test_pictures_and_tables_of_two_parents_and_two_seeds(study, frames, tmp_path):
    """The study's own numbers under four names: every artefact is written, T06 with its grid, and without a warning."""
    found = frames | {"raw": read([study], read_by(study, "degradation"), "raw.parquet")}
    units = [(backbone, seed) for backbone in ("mini-chat", "mini-tulu") for seed in (0, 1)]
    many = {
        name: pd.concat([frame.assign(backbone=b, seed=s) for b, s in units], ignore_index=True) if "seed" in frame else frame
        for name, frame in found.items()
    }
    of, inside = gallery.Made(many, "mini", {}), ("F07", "F08", "F09", "F10", "F11", "T06", "T05_conflict_free")
    written = {name: table(of)[0] for name, table in gallery.TABLES.items() if name.startswith(inside)}
    drawn = {name: figure(of) for name, figure in gallery.FIGURES.items() if name.startswith(inside)}
    assert {name.partition("_")[0] for name in [*written, *drawn]} == {"F07", "F08", "F09", "F10", "F11", "T05", "T06"}
    for name, (figure, frame) in drawn.items():
        figure.savefig(tmp_path / f"{name}.png")
        assert len(frame) and figure.get_suptitle(), name
    over = written["F11_prediction"]
    assert set(over["over"]) == {"all", "within"} and (over["studies"] == 4).all()
