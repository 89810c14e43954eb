"""Gradients that do not work against each other: the rule by hand, the order of rows, a step without conflict, resumption."""

import collections
import dataclasses
import json
from functools import partial

import numpy as np
import pytest
import torch
from datasets import Dataset

from vlsafe.core.scale import Corpora, Fit
from vlsafe.data.miniature import corpora
from vlsafe.data.miniature.language import World
from vlsafe.models import architectures, checkpoints, trainable
from vlsafe.training import datasets, processes, trainers

WORLD = World(0)


def test_the_rule_by_hand():
    """(1, 0) and (-1, 1): each loses its part against the other, (1/2, 1/2) and (0, 1), and neither sum points against either."""
    a, b = [torch.tensor([1.0]), torch.tensor([0.0])], [torch.tensor([-1.0]), torch.tensor([1.0])]
    result, cosine = trainers.without_conflict(a, b)
    assert [float(x) for x in result] == [0.5, 1.5] and cosine == pytest.approx(-(0.5**0.5))
    for task in (a, b):
        assert sum(float(x @ y) for x, y in zip(result, task, strict=True)) >= 0
    agreeing, cosine = trainers.without_conflict(a, a)
    assert [float(x) for x in agreeing] == [2.0, 0.0] and cosine == pytest.approx(1.0)
    assert trainers.without_conflict(a, [torch.zeros(1), torch.zeros(1)]) == (a, 0.0)


def test_rows_are_seen_in_proportion_and_none_again_before_all():
    leading = trainers.task_shares(5905, 1200, 361, 8)
    assert set(leading) == {1, 2} and sum(leading) / (361 * 8) == pytest.approx(1200 / 7105, abs=0.001)
    rows = trainers.task_order(40, [False] * 48, trainers.task_shares(40, 8, 30, 4), 4, 2, np.random.default_rng(0))
    assert len(rows) == 30 * 8 and set(rows) == set(range(48))
    seen = collections.Counter(rows)
    assert max(seen[i] for i in range(40)) - min(seen[i] for i in range(40)) <= 1
    for step in range(30):
        tasks = [row >= 40 for row in rows[8 * step : 8 * step + 8]]
        assert tasks == sorted(tasks, reverse=True) and 2 <= sum(tasks) < 8 and sum(tasks) % 2 == 0
    with pytest.raises(ValueError, match="at least two micro-batches"):
        trainers.task_shares(5, 5, 3, 1)


@pytest.mark.parametrize("many, at_once, taken", [(1, 4, 32), (1, None, 8), (8, 4, 8), (8, 1, 16)])
def test_micro_batches_hold_one_task_and_where_grouped_one_modality(many, at_once, taken):
    """Counted on the rows as the processes take them, also where `at_once` splits a step further than the fit says."""
    rng, first = np.random.default_rng(1), 300
    data = Dataset.from_dict({"task": [i >= first for i in range(420)], "pictures": rng.integers(0, 2, 420).tolist()})
    fit = Fit(steps=30, batch_size=128, learning_rate=1e-3, micro_batches=8, at_once=at_once, grouped=True)
    ordered, leading = trainers.without_mixed_tasks(data, first, fit, many, np.random.default_rng(0))
    size = processes.per_process(fit, many) * many
    assert len(ordered) == 30 * 128 and processes.micro_batches(fit, many) == taken and size * taken == 128
    tasks, pictured = list(ordered["task"]), list(ordered["pictures"])
    parts = [slice(at, at + size) for at in range(0, len(tasks), size)]
    assert sum(len(set(tasks[part])) == 1 for part in parts) / len(parts) == 1.0
    assert sum(len(set(pictured[part])) == 1 for part in parts) / len(parts) == 1.0
    assert [sum(tasks[step * 128 : step * 128 + 128]) // size for step in range(30)] == leading
    assert all(tasks[step * 128] and not tasks[step * 128 + 127] for step in range(30)), "the second task's come first"
    assert {(task, bool(n)) for task, n in zip(tasks, pictured, strict=True)} == {(a, b) for a in (0, 1) for b in (0, 1)}


@pytest.fixture(scope="module")
def setting(study):
    pool = corpora.paint(WORLD, 51, 0, WORLD.rng("p"))
    rows = corpora.instruction_rows(WORLD, pool, 24, Corpora(text_only_share=0.3), 0, WORLD.rng("r")) + corpora.safety_rows(
        WORLD, 8, WORLD.rng("s")
    )
    fit = dataclasses.replace(study.scale.instruct, steps=4, micro_batches=4)
    return study.checkpoints("projector/filtered")[-1], datasets.chat_dataset(rows, True), fit


def trained(study, setting, folder, stop=None):
    start, data, fit = setting
    model = trainable.choose(checkpoints.load(start), "full", study.scale.lora)

    def progress(step):
        if step == stop:
            raise KeyboardInterrupt

    history = trainers.sft_without_conflict(model, checkpoints.load_processor(start), data, 24, fit, folder, 0, (2, 4), progress)
    return history, model.state_dict()


def test_without_a_conflict_a_step_is_plain_multitask_tunings(study, setting, tmp_path, monkeypatch):
    """With the rule replaced by a plain sum, weights end where the trainer's own accumulation and clipping take them."""
    start, data, fit = setting
    monkeypatch.setattr(trainers, "without_conflict", lambda a, b: ([x + y for x, y in zip(a, b, strict=True)], 0.0))
    _, mine = trained(study, setting, tmp_path / "mine")
    model = trainable.choose(checkpoints.load(start), "full", study.scale.lora)
    order = trainers.task_order(24, [False] * 32, trainers.task_shares(24, 8, 4, 4), 4, 2, np.random.default_rng(0))
    own = {"max_length": None, "assistant_only_loss": True, "train_sampling_strategy": "sequential"}
    processor, folder = checkpoints.load_processor(start), tmp_path / "plain"
    trainers._run(trainers.SFT, own, model, processor, data.select(order), fit, folder, 0, (), lambda step: None)
    before = checkpoints.load(start).state_dict()
    moved = [key for key in mine if not torch.equal(before[key], mine[key])]
    assert len(moved) > 20
    for key in mine:
        torch.testing.assert_close(mine[key], model.state_dict()[key], atol=2e-5, rtol=1e-3, msg=key)


def test_a_killed_training_without_conflict_ends_with_the_same_bits(study, setting, tmp_path):
    history, whole = trained(study, setting, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        trained(study, setting, tmp_path / "cut", stop=3)
    again, resumed = trained(study, setting, tmp_path / "cut")
    assert [r["task_cosine"] for r in again] == [r["task_cosine"] for r in history] and len(history) == 4
    assert all(-1 <= r["task_cosine"] <= 1 for r in history) and len({r["task_cosine"] for r in history}) == 4
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_each_gradient_is_that_of_its_own_task(study, setting, tmp_path, monkeypatch):
    """The first step's, held against those of each task's rows alone."""
    start, data, fit = setting
    found, plain = [], trainers.without_conflict
    monkeypatch.setattr(trainers, "without_conflict", lambda *tasks: (found.append(list(map(flat, tasks))), plain(*tasks))[1])
    history, _ = trained(study, setting, tmp_path / "both")
    ordered, leading = trainers.without_mixed_tasks(data, 24, fit, 1, np.random.default_rng(0))
    border = leading[0] * fit.batch_size // fit.micro_batches
    alone = []
    for task in (range(border, fit.batch_size), range(border)):
        model = trainable.choose(checkpoints.load(start), "full", study.scale.lora)
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        one = dataclasses.replace(fit, steps=1, batch_size=len(task), micro_batches=1)
        note = partial(noted, alone, weights)
        rows, folder = ordered.select(task), tmp_path / str(len(alone))
        trainers.gradients(model, checkpoints.load_processor(start), rows, one, folder, 0, note)
    similar = torch.nn.functional.cosine_similarity
    assert [float(similar(*pair, dim=0)) for pair in zip(found[0], alone, strict=True)] == pytest.approx([1, 1], abs=1e-3)
    assert history[0]["task_cosine"] == pytest.approx(float(similar(*alone, dim=0)), abs=1e-3)


def flat(gradients):
    return torch.cat([gradient.flatten() for gradient in gradients])


def noted(into, weights):
    into.append(flat([torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in weights]))


def test_gradients_are_noted_and_nothing_moves(study, setting, tmp_path):
    start, data, fit = setting
    model = trainable.choose(checkpoints.load(start), "full", study.scale.lora)
    before, noted = {k: v.clone() for k, v in model.state_dict().items()}, []
    name = "layers.0.mlp.up_proj.weight"

    def note():
        noted.append(architectures.language_weights(model)[name].grad.clone())

    trainers.gradients(model, checkpoints.load_processor(start), data, fit, tmp_path, 0, note)
    assert len(noted) == fit.steps and all(float(gradient.norm()) > 0 for gradient in noted)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_stage_notes_the_cosine_of_every_step(study):
    history = json.loads((study.folder("safety/mtl-pcgrad-full") / "history.json").read_text())
    assert len(history) == study.numbers("safety/mtl-pcgrad-full")["steps"] == study.numbers("safety/mtl-full")["steps"]
    assert all(-1 <= record["task_cosine"] <= 1 for record in history)
