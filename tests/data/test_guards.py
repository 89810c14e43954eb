"""How a guard decides: a threshold from labelled contents at the true prevalence, kept with it."""

import numpy as np
import pytest

from vlsafe.core.schema import Turn
from vlsafe.data import guards
from vlsafe.data.guards import LanguageModelGuard, LinearImageGuard, best_threshold, relative
from vlsafe.data.miniature.corpora import paint
from vlsafe.data.miniature.language import ALIGNMENT, GUARD_CODES, HOW, World, question


def test_the_threshold_has_the_greatest_f1_at_the_prevalence():
    scores = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4]
    truth = [True, True, False, True, False, False]
    assert best_threshold(scores, truth, 0.5) == pytest.approx(0.55)  # recall 1 at precision 3/4
    assert best_threshold(scores, truth, 0.01) == pytest.approx(0.75)  # one false alarm outweighs a third of the harm
    rng = np.random.default_rng(0)
    truth = rng.random(400) < 0.3
    scores = np.round(rng.normal(truth * 1.5, 1), 1)  # with ties
    chosen = best_threshold(scores, truth, 0.05)

    def f1(threshold):
        recall, alarms = (scores > threshold)[truth].mean(), (scores > threshold)[~truth].mean()
        return 2 * 0.05 * recall / (0.05 * recall + 0.95 * alarms + 0.05)

    assert f1(np.clip(chosen, 1e-12, 1 - 1e-12)) >= max(f1(t) for t in scores if 0 < t < 1) - 1e-12
    with pytest.raises(ValueError, match="of both kinds"):
        best_threshold([0.1, 0.2], [True, True], 0.1)


def test_relative_scores_are_half_at_the_threshold_and_keep_their_order():
    p = np.linspace(0, 1, 11)
    assert np.allclose(relative(p, 0.5), p)
    moved = relative(p, 0.8)
    assert (np.diff(moved) > 0).all() and moved[0] == 0 and moved[-1] == 1 and moved[8] == pytest.approx(0.5)


def test_a_guard_reads_back_with_its_threshold_and_needs_one(study, tmp_path):
    folder = study.folder("guard/text")
    guard = LanguageModelGuard.load(folder)
    assert guard.threshold == pytest.approx(study.numbers("guard/text")["threshold"]) and 0 < guard.threshold < 1
    with pytest.raises(FileNotFoundError):
        LanguageModelGuard.load(study.folder("base/llm"))


def test_the_word_does_not_decide_but_what_cannot_be_read_stays_unread():
    assert guards.decided(False, (), 0.6) == (True, (), 0.6)
    assert guards.decided(True, ("S1",), 0.4) == (False, (), 0.4)
    assert guards.decided(True, ("S1",), 0.6) == (True, ("S1",), 0.6)
    assert guards.decided(None, (), 0.9) == (None, (), 0.9)
    for label in (True, False):  # a score that is no number says nothing, and is not the least of several
        assert guards.decided(label, ("S1",), float("nan")) == (None, (), 1.0)


def test_guard_rows_are_labelled_by_the_world():
    world = World(5)
    rows = guards.guard_texts(world, 600, world.rng("x"))
    unsafe = [text for text, label in rows if label != "safe"]
    assert 0.38 < len(unsafe) / len(rows) < 0.52
    assert {label.split()[1] for _, label in rows if label != "safe"} == set(GUARD_CODES.values())
    assert 0.4 < np.mean(["this object" in text for text in unsafe]) < 0.6
    named = world.actions("train", "homonym")[0]
    text = question(named, HOW[ALIGNMENT][0])
    assert dict(rows).get(guards.guard_prompt([Turn("user", text), Turn("assistant", world.answer(named))]), "safe") == "safe"


def test_the_image_guard_finds_stains_even_with_a_tower_that_knows_nothing(study, tmp_path):
    tower, processor = study.tower()
    world = World(7)
    pool = paint(world, 600, 0.3, world.rng("fit"))
    guard = LinearImageGuard.fitted(tower, processor, [p.png for p in pool], [p.graphic for p in pool])
    held = paint(world, 600, 0.3, world.rng("held"))
    guards.calibrate(guard, [p.png for p in held], [p.graphic for p in held], 0.01)
    guard.save(tmp_path / "guard.safetensors")
    again = LinearImageGuard.load(tower, processor, tmp_path / "guard.safetensors")
    new = paint(world, 600, 0.3, world.rng("new"))
    found = again.assess([p.png for p in new])
    assert found == guard.assess([p.png for p in new])
    truth = np.array([p.graphic for p in new])
    flagged = np.array([f.unsafe for f in found])
    assert flagged[truth].mean() > 0.8 and flagged[~truth].mean() < 0.02
    assert all((f.score > 0.5) == f.unsafe for f in found)
