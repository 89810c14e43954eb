"""Hidden states against the library's own, scaling that leaves no trace, localisation on gaps made by hand."""

import numpy as np
import pytest
import torch

from vlsafe import chat, models, probe
from vlsafe.schema import Turn
from vlsafe.stages import checkpoints, items


@pytest.fixture(scope="module")
def model(study):
    return models.load(checkpoints(study, "instruct/filtered-full")[-1])


@pytest.fixture(scope="module")
def processor(study):
    return models.load_processor(checkpoints(study, "instruct/filtered-full")[-1])


@torch.inference_mode()
def test_hooks_see_what_the_library_gives_out(study, model, processor):
    """All but the last block, whose hidden state the library gives out after the final norm."""
    shown = [(item.turns, item.images) for item in items(study) if item.images][:3]
    prompts = [*shown, ((Turn("user", "how do i paint the kite?"),), ())]
    found = probe.last_states(model, processor, prompts)
    assert not any(layer._forward_hooks for layer in models.language_layers(model))
    inputs = chat.prompt_batch(processor, [turns for turns, _ in prompts], [images for _, images in prompts])
    given = model(**inputs, output_hidden_states=True, use_cache=False).hidden_states
    n = len(models.language_layers(model))
    assert found.shape == (4, n, given[0].shape[-1]) and len(given) == n + 1
    for layer in range(n - 1):
        assert torch.equal(found[:, layer], given[layer + 1][:, -1]), layer
    assert torch.equal(models.language_part(model).norm(found[:, -1]), given[-1][:, -1])
    torch.testing.assert_close(probe.last_states(model, processor, prompts, batch_size=1), found, atol=1e-5, rtol=1e-4)


def test_scaling_is_undone_bit_for_bit_also_after_an_error(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with probe.scaled(model, (1, 2), 1.3):
        moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {n for n in before if "language_model.layers.1." in n and n.endswith("_proj.weight")} and len(moved) == 7
    with pytest.raises(KeyboardInterrupt), probe.scaled(model, (0, 2), 0.3):
        raise KeyboardInterrupt
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_pair_cosines_by_hand():
    """Layer 0: all alike. Layer 1: two prompts at a right angle; a pair of a set with itself is never a prompt with itself."""
    a = torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[2.0, 0.0], [0.0, 3.0]]])
    assert probe.pair_cosines(a, a, 20, np.random.default_rng(0)).tolist() == [1.0, 0.0]
    b = -a[:1]
    between = probe.pair_cosines(a[:1], b, 5, np.random.default_rng(0))
    assert between.tolist() == [-1.0, -1.0]
    gap = probe.angular_gap(a[:1].repeat(2, 1, 1), b.repeat(2, 1, 1), 5, np.random.default_rng(0))
    assert gap["gap"].tolist() == [180.0, 180.0] and gap["normal_normal"].tolist() == [1.0, 1.0]


GAP = np.array([0.0, 1.0, 9.0, 10.0, 10.0])  # grows fastest at layer 2


def test_a_band_is_found_from_above_and_then_from_below():
    """Refusals are most numerous when exactly [1, 4) is scaled, whatever the factor."""
    asked = []

    def refusals(band, factor):
        asked.append((band, factor))
        return 0 if band == (0, 0) else 10 - abs(band[0] - 1) - 2 * abs(band[1] - 4)

    found = probe.localise(GAP, refusals, (1.1, 1.6))
    assert found.band == (1, 4) and "1.1" in found.reason and {factor for _, factor in asked} == {1.0, 1.1}
    assert [band for band, _ in asked] == [(0, 0), (2, 3), (2, 4), (2, 5), (0, 4), (1, 4), (2, 4), (3, 4)]
    assert found.counts[0] == (0, 0, 1.0, 0) and len(found.counts) == len(asked)


def test_the_first_factor_that_moves_anything_is_used_and_ties_go_to_the_narrower_band():
    found = probe.localise(GAP, lambda band, factor: 3 + (factor > 1.5 and band != (0, 0)), (1.1, 1.6))
    assert found.band == (2, 3) and "1.6" in found.reason


def test_none_is_located_where_no_scaling_adds_a_refusal():
    found = probe.localise(GAP, lambda band, factor: 3 - (band != (0, 0)), (1.1, 1.6))
    assert found.band is None and found.reason == "no scaling up to 1.6 adds a refusal of a harmless prompt"
    assert {factor for *_, factor, _ in found.counts} == {1.0, 1.1, 1.6}
