"""Merge rules against hand-worked numbers, against PEFT on the same mask, and against mergekit where it is installed."""

import math

import pytest
import torch
from peft.utils import merge_utils

from vlsafe.models.merge import rules
from vlsafe.models.merge.rules import RULES, How, merged

SIZES = ((1,), (2,), (50,), (7, 11))


def three(shape, seed=0, dtype=torch.float32):
    """A base and two models near it."""
    draw = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=draw)
    a, b = (base + 0.3 * torch.randn(shape, generator=draw) for _ in range(2))
    return a.to(dtype), b.to(dtype), base.to(dtype)


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["linear", "slerp"])
def test_ends_and_equal_inputs_come_back_bit_for_bit(name, dtype, shape):
    a, b, _ = three(shape, dtype=dtype)
    assert torch.equal(merged(name, a, b, None, How(0.0)), a) and torch.equal(merged(name, a, b, None, How(1.0)), b)
    assert all(torch.equal(merged(name, a, a.clone(), None, How(r)), a) for r in (0.1, 0.3, 0.5, 0.9))
    middle = merged(name, a, b, None, How(0.5))
    assert not torch.equal(middle, a) and not torch.equal(middle, b) and middle.dtype == dtype and middle.shape == a.shape


def test_slerp_goes_along_a_circle_and_is_linear_where_there_is_no_arc():
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    for ratio in (0.25, 0.5, 0.75):
        point = [math.cos(ratio * math.pi / 2), math.sin(ratio * math.pi / 2)]
        assert merged("slerp", a, b, None, How(ratio)).tolist() == pytest.approx(point, abs=1e-7)
    assert merged("slerp", a, -a, None, How(0.25)).tolist() == [0.5, 0.0]
    assert merged("slerp", a, 0 * a, None, How(0.25)).tolist() == [0.75, 0.0]


@pytest.mark.parametrize("shape", SIZES)
def test_task_arithmetic_is_the_linear_merge_and_ties_and_dare_reduce_to_it(shape):
    a, b, base = three(shape)
    whole = How(0.3, kept=1.0, survived=1.0)
    expected = merged("task_arithmetic", a, b, base, whole)
    assert torch.allclose(expected, merged("linear", a, b, None, whole), atol=1e-6)
    for name in ("dare_linear", "dare_linear_l1"):
        assert torch.allclose(merged(name, a, b, base, whole), expected, atol=1e-6), name
    for ratio, model in ((0.0, a), (1.0, b)):
        assert torch.allclose(merged("task_arithmetic", a, b, base, How(ratio)), model, atol=1e-6)
        for name in ("ties", "dare_ties", "dare_ties_l1"):  # one model alone: nothing to elect
            assert torch.allclose(merged(name, a, b, base, whole._replace(ratio=ratio)), model, atol=1e-6), name
    assert torch.allclose(merged("task_arithmetic", a, b, base, How(0.3, scaling=0.0)), base)


def test_ties_by_hand():
    """Three models on four weights; the two largest of each are kept.

    kept: [4, −3, 0, 0], [−1, 0, 3, 0], [0, −2, 0, 5]; sums 3, −5, 3, 5; means of those that agree 4, −2.5, 3, 5.
    """
    taus = torch.tensor([[4.0, -3, 1, 0.5], [-1, 0.2, 3, 0.1], [1, -2, 0.5, 5]])
    kept = [rules.trimmed(tau, rules.cut(tau.abs().numpy().copy(), 0.5)) for tau in taus]
    assert [tau.tolist() for tau in kept] == [[4, -3, 0, 0], [-1, 0, 3, 0], [0, -2, 0, 5]]
    assert rules.elected(kept, [1 / 3] * 3).tolist() == pytest.approx([4, -2.5, 3, 5])
    assert rules.elected([torch.tensor([1.0]), torch.tensor([-1.0])], [0.5, 0.5]).item() == 0  # no majority, no step
    weighed = rules.elected([torch.tensor([1.0]), torch.tensor([-1.0])], [0.6, 0.4])
    assert weighed.item() == pytest.approx(1.0)
    both = rules.elected([torch.tensor([1.0]), torch.tensor([2.0])], [0.25, 0.75])
    assert both.item() == pytest.approx(1.75)


@pytest.mark.parametrize(
    "n, share, count", [(1, 0.2, 1), (2, 0.2, 1), (2, 0.5, 1), (50, 0.2, 10), (100, 0.29, 29), (50, 1.0, 50)]
)
def test_trimming_keeps_the_largest_and_at_least_one(n, share, count):
    tau = torch.randn(n, generator=torch.Generator().manual_seed(n))
    kept = rules.trimmed(tau, rules.cut(tau.abs().numpy().copy(), share))
    assert int((kept != 0).sum()) == count == rules.kept_count(n, share)
    assert set(kept[kept != 0].abs().tolist()) == set(sorted(tau.abs().tolist())[-count:])
    same = torch.ones(n)
    assert rules.trimmed(same, rules.cut(same.numpy().copy(), share)).sum() == n  # equals are not told apart


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties"])
@pytest.mark.parametrize("shape", [(1,), (2,), (50,)])
def test_dare_keeps_the_expectation_over_draws(name, shape):
    a, b, base = three(shape)
    how = How(1.0, survived=0.5)  # b alone, so the election is no part of it
    draws = torch.stack([merged(name, a, b, base, how, seed=[s]) - base for s in range(4000)])
    assert (draws.mean(0) - (b - base)).abs().max() < 5 * (b - base).abs().max() / 4000**0.5
    assert (draws != 0).float().mean() == pytest.approx(0.5, abs=0.05)
    scaled = draws[draws != 0].abs().max() / (b - base).abs().max()
    assert scaled == pytest.approx(2.0, rel=1e-3)


def test_the_l1_variant_keeps_the_norm_and_not_the_expectation():
    a, b, base = three((50,))
    how = How(1.0, survived=0.3)
    tau, kept = b - base, merged("dare_linear_l1", a, b, base, how) - base
    assert kept.abs().sum() == pytest.approx(float(tau.abs().sum()), rel=1e-4) and (kept == 0).sum() > 20
    plain = merged("dare_linear", a, b, base, how) - base
    assert torch.equal(plain != 0, kept != 0) and not torch.allclose(plain, kept, rtol=1e-3)


def test_draws_depend_on_the_seed_alone_and_not_on_the_size_of_the_pieces():
    a, b, base = three((50,))
    how = How(0.5)
    whole = merged("dare_ties", a, b, base, how, [3, 1])
    draws, pieces = rules.streams([3, 1]), []
    for start in range(0, 50, 13):
        part = slice(start, start + 13)
        pieces.append(rules.dare_ties(a[part], b[part], base[part], how, None, draws))
    assert torch.equal(torch.cat(pieces), whole) and not torch.equal(merged("dare_ties", a, b, base, how, [3, 2]), whole)


def test_model_stock_by_hand():
    """Task vectors at 60 degrees: cos = 1/2, t = 2/3 of the way from the base to the mean. Opposite ones stay at the base."""
    base = torch.tensor([1.0, 1.0])
    a, b = base + torch.tensor([1.0, 0.0]), base + torch.tensor([0.5, 3**0.5 / 2])
    expected = base + 2 / 3 * ((a + b) / 2 - base)
    assert torch.allclose(merged("model_stock", a, b, base, How()), expected, atol=1e-6)
    assert torch.allclose(merged("model_stock", a, a, base, How()), a)
    assert torch.equal(merged("model_stock", a, 2 * base - a, base, How()), base)
    assert torch.equal(merged("model_stock", base, b, base, How()), base)


@pytest.mark.parametrize("shape", [(2,), (50,), (7, 11)])
def test_agreement_with_peft_on_the_same_mask(shape):
    a, b, base = three(shape)
    taus, equal = [a - base, b - base], torch.ones(2)
    ours = merged("ties", a, b, base, How(0.5, kept=0.5)) - base
    assert torch.allclose(ours, merge_utils.ties(taus, equal, 0.5), atol=1e-6)
    torch.manual_seed(1)
    masks = [merge_utils.random_pruning(torch.ones_like(tau), 0.5, rescale=False).bool() for tau in taus]
    torch.manual_seed(1)
    linear = merge_utils.dare_linear(taus, torch.tensor([0.7, 0.3]), 0.5)
    kept = [rules.dropped(tau, mask, 0.5) for tau, mask in zip(taus, masks, strict=True)]
    assert torch.allclose(0.7 * kept[0] + 0.3 * kept[1], linear, atol=1e-6)
    torch.manual_seed(1)
    assert torch.allclose(rules.elected(kept, [0.5, 0.5]), merge_utils.dare_ties(taus, equal, 0.5), atol=1e-6)
    weighted = merge_utils.task_arithmetic(taus, torch.tensor([0.7, 0.3]))
    assert torch.allclose(merged("task_arithmetic", a, b, base, How(0.3)) - base, weighted, atol=1e-6)


def test_what_cannot_be_merged_is_refused_by_name():
    a, b, base = three((4,))
    with pytest.raises(ValueError, match="unknown merge rule 'tie'; did you mean 'ties'"):
        merged("tie", a, b, base, How())
    with pytest.raises(ValueError, match="ties adds task vectors to what both models started from"):
        merged("ties", a, b, None, How())
    for wrong in (How(1.2), How(kept=0.0), How(survived=-0.1)):
        with pytest.raises(ValueError, match="is a share in"):
            merged("linear", a, b, None, wrong)
    empty = torch.zeros(0, 3)
    for name, rule in RULES.items():
        how = How(1.5) if rule.beyond else How()
        assert merged(name, empty, empty, empty, how, fisher=[empty] * 2 * rule.weighed).shape == (0, 3)
