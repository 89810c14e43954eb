"""Comparisons of two models on states and gradients that are written by hand."""

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from vlsafe.inspection import states


def kept(tmp_path, **sides):
    """A pair of models whose states [N, 1 + L, D] lie in two files each, as a stage leaves them."""
    for name, values in sides.items():
        (tmp_path / name).mkdir()
        for number, part in enumerate(torch.tensor(values, dtype=torch.float32).split(2)):
            save_file({"states": part.contiguous()}, tmp_path / name / f"states-{number:05d}.safetensors")
    return {name: tmp_path / name for name in sides}


def prompts(n, groups=("text",), harmful=None):
    return pd.DataFrame(
        {
            "item": [f"item-{i}" for i in range(n)], "cluster": [f"cluster-{i}" for i in range(n)],
            "group": np.resize(groups, n), "harmful": np.arange(n) % 2 == 0 if harmful is None else harmful,
        }
    )  # fmt: skip


def test_prompts_are_compared_by_states_by_increments_and_along_the_direction(tmp_path):
    """One layer, three prompts; the reference enters the block like the model and leaves it elsewhere."""
    enter = [[1.0, 0.0]] * 3
    own, reference = [[3.0, 0.0], [0.0, 2.0], [0.0, 4.0]], [[3.0, 0.0], [2.0, 0.0], [0.0, 4.0]]
    pair = kept(tmp_path, **{n: [list(p) for p in zip(enter, leave)] for n, leave in (("own", own), ("reference", reference))})  # noqa: B905
    directions = {"direction": torch.tensor([[0.0, 2.0]]), "harmless": torch.tensor([[0.0, 1.0]])}
    frame = states.compare_prompts(pair, prompts(3, ("text", "picture", "picture")), directions, probes=False)
    assert list(frame) == [
        "item", "cluster", "group", "harmful", "layer", "cosine", "cosine_centred", "increment", "increment_centred",
        "projection", "projection_reference",
    ]  # fmt: skip
    assert frame["cosine"].tolist() == [1, 0, 1] and frame["layer"].tolist() == [0, 0, 0]
    # the pictures' means are [0, 3] and [1, 2], so they stand at [0, -1], [0, 1] and [1, -2], [-1, 2]; one text has no rest
    assert frame["cosine_centred"].tolist() == pytest.approx([0, 2 / 5**0.5, 2 / 5**0.5])
    assert frame["increment"].tolist() == pytest.approx([1, -1 / 5**0.5, 1])
    assert frame["projection"].tolist() == [-0.5, 0.5, 1.5] and frame["projection_reference"].tolist() == [-0.5, -0.5, 1.5]


def test_states_in_memory_are_one_group():
    own = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[3.0, 0.0], [0.0, 3.0]]])
    frame = states.compare_states(own, own.flip(1), prompts(2))
    assert frame["layer"].tolist() == [0, 0, 1, 1] and frame["item"].tolist() == ["item-0", "item-1"] * 2
    assert frame["cosine"].tolist() == frame["cosine_centred"].tolist() == [0] * 4
    assert states.compare_states(own, 2 * own + 1, prompts(2))["cosine_centred"].tolist() == pytest.approx([1] * 4)


def test_probes_are_fitted_in_each_group():
    """Harm points up in texts and down in pictures; the model has both turned round, and a probe of its own does not mind."""
    frame, rng = prompts(80, ("text", "text", "picture", "picture")), np.random.default_rng(0)
    harmful = frame["harmful"].to_numpy()
    up = np.where(harmful == (frame["group"] == "text"), 1.0, -1.0) + 0.1 * rng.normal(size=80)
    reference = torch.tensor(np.column_stack([up, rng.normal(size=80)])).float()
    scores = states.probe_scores(-reference, reference, frame)
    for name in ("probe_own", "probe_reference"):
        assert (scores[name] > 0).tolist() == harmful.tolist()
    assert (scores["probe_transferred"] > 0).tolist() == (~harmful).tolist()


def test_cka_of_sets_has_the_error_of_leaving_clusters_out(tmp_path):
    values = np.random.default_rng(0).normal(size=(12, 3, 4))
    pair = kept(tmp_path, own=values, reference=values + 0.5 * np.random.default_rng(1).normal(size=values.shape))
    rows = list(states.compare_sets(pair, prompts(12, ("text", "picture"))))
    assert [(row["layer"], row["group"], row["n"]) for row in rows] == [
        (layer, group, 6) for layer in (0, 1) for group in ("picture", "text")
    ]
    a, b = (states.kept_states(pair[side], 1)[1::2] for side in ("own", "reference"))
    left_out = [states.cka(a[torch.arange(6) != i], b[torch.arange(6) != i]) for i in range(6)]
    assert rows[0]["cka"] == pytest.approx(states.cka(a, b))
    assert rows[0]["error"] == pytest.approx((5 / 6 * sum((x - np.mean(left_out)) ** 2 for x in left_out)) ** 0.5)


def test_gradients_are_compared_two_by_two_in_each_block(tmp_path):
    files = [tmp_path / name for name in ("vl-000.safetensors", "vl-001.safetensors", "safety-000.safetensors")]
    for file, values in zip(files, ([1.0, 0.0], [2.0, 0.0], [-3.0, 4.0]), strict=True):
        save_file({"model.layers.0.mlp.up_proj.weight": torch.tensor([values]), "lm_head.weight": torch.ones(1, 2)}, file)
    rows = list(states.compare_gradients(files))
    assert [(row["task_a"], row["task_b"], row["a"], row["b"]) for row in rows] == [
        ("vl", "vl", 0, 1), ("vl", "safety", 0, 2), ("vl", "safety", 1, 2),
    ]  # fmt: skip
    assert [row["cosine"] for row in rows] == pytest.approx([1, -0.6, -0.6]) and {row["layer"] for row in rows} == {0}
