"""ExPO, Fisher, TSV-M and Iso-C at their identities, and against matrices worked by hand or in plain NumPy."""

import json

import numpy as np
import pytest
import torch
from models.test_merge_files import combined, llavas, loaded, three  # noqa: F401
from safetensors.torch import load_file, save_file

from vlsafe import cli
from vlsafe.core.schema import Example, Turn, to_row
from vlsafe.models import checkpoints
from vlsafe.models.chat import rendered
from vlsafe.models.merge import files, fisher, matrices
from vlsafe.models.merge.rules import How, merged


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def task(columns, rows, values):
    """A 4 × 3 matrix with the named unit vectors as singular vectors."""
    return sum(v * torch.eye(4)[:, [c]] @ torch.eye(3)[[r]] for c, r, v in zip(columns, rows, values, strict=True))


def test_expo_at_one_is_the_partner_and_beyond_it_goes_on_along_the_line():
    a, b = drawn(5, 7), drawn(5, 7, seed=1)
    assert torch.equal(merged("expo", a, b, None, How(1.0)), b) and torch.equal(merged("expo", a, a, None, How(1.7)), a)
    theta_0, theta_1, alpha = a.double().numpy(), b.double().numpy(), 0.3
    assert np.allclose(merged("expo", a, b, None, How(1.3)).numpy(), theta_1 + alpha * (theta_1 - theta_0), atol=1e-6)
    assert merged("expo", torch.tensor([1.0]), torch.tensor([3.0]), None, How(1.5)).item() == 4.0
    for ratio in (0.9, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="from 1 on where a line is left"):
            merged("expo", a, b, None, How(ratio))


def test_fisher_with_equal_weights_is_linear_and_by_hand():
    """θ = (F_a θ_a + F_b θ_b) / (F_a + F_b): (1·1 + 3·5) / 4 = 4; F zero on both sides: the mean, on one: the other."""
    a, b, weights = drawn(5, 7), drawn(5, 7, seed=1), drawn(5, 7, seed=2).square()
    for ratio in (0.5, 0.25, 0.0, 1.0):
        even = merged("fisher", a, b, None, How(ratio), fisher=[weights, weights])
        assert torch.allclose(even, merged("linear", a, b, None, How(ratio)), atol=1e-6)
    assert torch.equal(merged("fisher", a, b, None, How(0.5), fisher=[weights, weights]), torch.lerp(a, b, 0.5))
    one, five = torch.full((4,), 1.0), torch.full((4,), 5.0)
    of_a, of_b = torch.tensor([1.0, 0.0, 0.0, 2.0]), torch.tensor([3.0, 0.0, 2.0, 0.0])
    assert merged("fisher", one, five, None, How(0.5), fisher=[of_a, of_b]).tolist() == [4, 3, 5, 1]
    assert merged("fisher", one, five, None, How(0.25), fisher=[of_a, of_b]).tolist() == [3, 2, 5, 1]  # (.75 + .75·5) / 1.5
    for few in ((), [of_a]):
        with pytest.raises(ValueError, match=r"fisher weighs with the Fisher information of a and of b \(--fisher\)"):
            merged("fisher", one, five, None, How(0.5), fisher=few)
    with pytest.raises(ValueError, match="linear has no use for Fisher information"):
        merged("linear", one, five, None, How(0.5), fisher=[of_a, of_b])


def procrustes(x):
    """X (XᵀX)^(−1/2), by the eigenvectors of XᵀX: the paper's whitening, not the decomposition that the package uses."""
    values, vectors = np.linalg.eigh(x.T @ x)
    return x @ vectors @ np.diag(values**-0.5) @ vectors.T


def test_tsv_m_against_plain_numpy():
    base, a, b = drawn(9, 6), drawn(9, 6, seed=1), drawn(9, 6, seed=2)
    left, values, right = [], [], []
    for model in (a, b):
        u, s, vt = np.linalg.svd((model - base).double().numpy(), full_matrices=False)
        left, values, right = [*left, u[:, :3]], [*values, *s[:3]], [*right, vt[:3].T]
    u, v = np.hstack(left), np.hstack(right)
    expected = base.double().numpy() + 0.7 * procrustes(u) @ np.diag(values) @ procrustes(v).T
    assert np.allclose(merged("tsv_m", a, b, base, How(scaling=0.7)).numpy(), expected, atol=2e-4)
    parts = matrices.joined([matrices.components(model - base, 0.5) for model in (a, b)])
    measured = np.abs((u.T @ u - np.eye(6)) @ np.diag(values) @ (v.T @ v - np.eye(6))).sum()
    assert matrices.interference(parts) == pytest.approx(measured, rel=1e-3) and measured > 1


def test_tsv_m_of_orthogonal_tasks_with_full_rank_is_their_sum_and_equal_tasks_are_one():
    tau_a, tau_b, base = task([0, 1], [0, 1], [5.0, 2.0]), task([2], [2], [3.0]), drawn(4, 3)
    whole = How(rank=1.0)
    assert torch.allclose(merged("tsv_m", base + tau_a, base + tau_b, base, whole), base + tau_a + tau_b, atol=1e-5)
    assert matrices.interference(matrices.joined([matrices.components(tau, 1.0) for tau in (tau_a, tau_b)])) < 1e-5
    few = merged("tsv_m", base + tau_a, base + tau_b, base, How(rank=0.5))  # one of three components a task
    assert torch.allclose(few, base + task([0, 2], [0, 2], [5.0, 3.0]), atol=1e-5)
    assert torch.allclose(merged("tsv_m", base + tau_a, base + tau_a, base, whole), base + tau_a, atol=1e-5)
    assert torch.equal(merged("tsv_m", base, base, base, whole), base)
    vector = merged("tsv_m", drawn(5), drawn(5, seed=1), drawn(5, seed=2), How())
    assert torch.allclose(vector, (drawn(5) + drawn(5, seed=1)) / 2, atol=1e-6)


def test_iso_c_has_equal_singular_values_and_by_hand():
    """τ = diag(5, 2) + diag(0, 1) = diag(5, 3): the mean of its singular values is 4, so Δ = 4 I."""
    zero = torch.zeros(2, 2)
    hand = merged("iso_c", torch.diag(torch.tensor([5.0, 2.0])), torch.diag(torch.tensor([0.0, 1.0])), zero, How())
    assert torch.allclose(hand, 4 * torch.eye(2), atol=1e-6)
    base, a, b = drawn(9, 6), drawn(9, 6, seed=1), drawn(9, 6, seed=2)
    change = (merged("iso_c", a, b, base, How(scaling=0.5)) - base).double().numpy()
    total = (a + b - 2 * base).double().numpy()
    values = np.linalg.svd(change, compute_uv=False)
    assert values == pytest.approx([0.5 * np.linalg.svd(total, compute_uv=False).mean()] * 6, rel=1e-4)
    assert np.allclose(change, values[0] * procrustes(total), atol=1e-4)  # singular vectors are those of the sum


# --- Fisher information -----------------------------------------------------------------------------------------------

ROWS = [Example(f"r{i}", "s", (Turn("user", question), Turn("assistant", "yes."))) for i, question in enumerate(("yes", "no ?"))]


def test_the_diagonal_is_the_mean_square_of_each_rows_gradient(llavas):  # noqa: F811
    model, processor = checkpoints.load(llavas / "language"), checkpoints.load_processor(llavas / "language")
    found = fisher.diagonal(model, processor, iter([*ROWS, None]), limit=2)  # the third is never looked at
    expected = {name: torch.zeros_like(weight) for name, weight in model.named_parameters()}
    assert torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])  # tied: one weight, counted once
    for row in ROWS:
        model.zero_grad()
        prompt, whole = (
            processor(rendered(processor, turns, 0), add_special_tokens=False, return_tensors="pt").input_ids
            for turns in (row.turns[:1], row.turns)
        )
        labels = whole.clone()
        labels[:, : prompt.shape[1]] = -100
        (model(whole, labels=labels).loss * (labels != -100).sum()).backward()
        for name, weight in model.named_parameters():
            expected[name] += weight.grad.square()
    length = torch.cat([value.flatten() for value in expected.values()]).norm()
    assert found.keys() == {*expected, "lm_head.weight"} and not any(
        weight._post_accumulate_grad_hooks for weight in model.parameters()
    )
    for name, value in expected.items():
        assert torch.allclose(found[name], value / length, atol=1e-7), name
    with pytest.raises(ValueError, match="0 rows gave no gradient"):
        fisher.diagonal(model, processor, [])
    with pytest.raises(ValueError, match="r9 does not end with an answer"):
        fisher.diagonal(model, processor, [Example("r9", "s", (Turn("user", "yes"),))])


def test_the_commands_weigh_and_merge(llavas, tmp_path, capsys):  # noqa: F811
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(to_row(row)) + "\n" for row in ROWS))
    weighed = [str(tmp_path / f"{which}.safetensors") for which in "ab"]
    for which, out in zip("ab", weighed, strict=True):
        assert cli.main(["fisher", str(llavas / which), str(rows), "--out", out]) == 0
    call = ["merge", "fisher", *(str(llavas / which) for which in "ab"), "--ratio", "0.5", "--out", str(tmp_path / "out")]
    assert cli.main(["fisher", str(llavas / "a"), str(rows), "--out", weighed[0]]) == 2 and "exists" in capsys.readouterr().err
    (tmp_path / "wrong.jsonl").write_text(rows.read_text().splitlines()[0] + '\n{"question": "x"}\n')
    assert cli.main(["fisher", str(llavas / "a"), str(tmp_path / "wrong.jsonl"), "--out", str(tmp_path / "none")]) == 2
    assert f"row 2 of {tmp_path}/wrong.jsonl: a row of Example has the wrong columns" in capsys.readouterr().err
    assert cli.main(call) == 2 and "(--fisher)" in capsys.readouterr().err
    assert cli.main([*call, "--fisher", *weighed]) == 0
    a, b = (checkpoints.load(llavas / which).state_dict() for which in "ab")
    expected = combined("fisher", a, b, None, How(0.5), fisher=[load_file(path) for path in weighed])
    result = checkpoints.load(tmp_path / "out").state_dict()
    assert all(torch.equal(result[key], value) for key, value in expected.items())
    assert sum(not torch.equal(value, torch.lerp(a[key], b[key], 0.5)) for key, value in result.items()) > 10
    save_file({"model.norm.weight": torch.ones(3)}, tmp_path / "few.safetensors")
    assert cli.main([*call[:-1], str(tmp_path / "x"), "--fisher", weighed[0], str(tmp_path / "few.safetensors")]) == 2
    assert "few.safetensors has no Fisher information of" in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_a_plain_language_model_is_weighed_by_its_own_names(llavas, tmp_path):  # noqa: F811
    rows, weighed = tmp_path / "rows.jsonl", [tmp_path / f"{which}.safetensors" for which in "ab"]
    rows.write_text("".join(json.dumps(to_row(row)) + "\n" for row in ROWS))
    for name, out in zip(("a", "language"), weighed, strict=True):
        assert cli.main(["fisher", str(llavas / name), str(rows), "--limit", "1", "--out", str(out)]) == 0
    call = ["merge", "fisher", str(llavas / "a"), str(llavas / "language"), "--ratio", "0.3", "--out", str(tmp_path / "out")]
    assert cli.main([*call, "--language-only", "--fisher", *map(str, weighed)]) == 0
    merged_one, a, b = (checkpoints.load(where).state_dict() for where in (tmp_path / "out", llavas / "a", llavas / "language"))
    of_a, of_b = map(load_file, weighed)
    for key, value in merged_one.items():
        plain = key.replace("model.language_model.", "model.")
        if plain not in b:
            assert torch.equal(value, a[key]), key
            continue
        mine, theirs = 0.7 * of_a[key].double(), 0.3 * of_b[plain].double()
        share = torch.where(mine + theirs > 0, theirs / (mine + theirs), 0.3)
        assert torch.allclose(value.double(), a[key] + share * (b[plain].double() - a[key]), atol=1e-5), key
    assert not torch.allclose(merged_one["lm_head.weight"], torch.lerp(a["lm_head.weight"], b["lm_head.weight"], 0.3), atol=1e-3)


def test_whole_matrices_and_lines_beyond_on_disk(tmp_path, capsys):
    folders, tensors = three(tmp_path)
    for name, based, how in (("tsv_m", True, How(scaling=0.7)), ("iso_c", True, How()), ("expo", False, How(1.4))):
        used = folders if based else {which: folders[which] for which in "ab"}
        result = files.merge(name, used, tmp_path / name, how)
        expected = combined(name, tensors["a"], tensors["b"], tensors["base"] if based else None, how)
        assert all(torch.equal(value, expected[key]) for key, value in loaded(tmp_path / name).items())
        assert set(result["measured"]) == ({"w3"} if name == "tsv_m" else set())
    call = [
        "merge",
        "tsv_m",
        *(str(folders[which]) for which in "ab"),
        "--base",
        str(folders["base"]),
        "--out",
        str(tmp_path / "o"),
    ]
    assert cli.main(call) == 0 and "singular task interference of 1 matrices: mean" in capsys.readouterr().out
    record = json.loads((tmp_path / "o" / "manifest.json").read_text())["merge"]
    assert record["rank"] == 0.5 and record["measured"]["w3"] > 0
    save_file({**tensors["b"], "w3": torch.full((3, 7), float("nan"))}, folders["b"] / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged: w3"):
        files.merge("tsv_m", folders, tmp_path / "damaged", How())
