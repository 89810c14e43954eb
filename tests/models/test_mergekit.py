"""Our merges against mergekit's own, end to end on the same tiny LLaVAs. It is an optional extra: MERGEKIT names its command."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from models.test_merge_files import combined, llavas  # noqa: F401
from safetensors.torch import load_file, save_file

from vlsafe.models.merge import rules
from vlsafe.models.merge.rules import How

COMMAND = shutil.which(os.environ.get("MERGEKIT", "mergekit-yaml"))
pytestmark = [
    pytest.mark.skipif(
        COMMAND is None, reason="mergekit is not installed: pip install '.[mergekit]' in the repository, or name it in MERGEKIT"
    ),
    pytest.mark.filterwarnings("ignore"),
]
RATIO, KEPT = 0.3, 0.5


def configuration(rule, place):
    """A merge in mergekit's words; slerp's base is a itself, and TIES divides by the weights of those that agree."""
    models = [
        {"model": str(place / which), "parameters": {"weight": w, "density": KEPT}} for which, w in (("a", 0.7), ("b", 0.3))
    ]
    if rule == "slerp":
        return {"merge_method": rule, "base_model": str(place / "a"), "models": models, "parameters": {"t": RATIO}}
    config = {"merge_method": rule, "models": models, "dtype": "float32"}
    if rule != "linear":
        config |= {"base_model": str(place / "base"), "parameters": {"normalize": rule == "ties"}}
    return config


@pytest.fixture(scope="module")
def started(llavas):  # noqa: F811
    """Models of one ancestor whose task vectors have a part in common: no equal magnitudes, no task vectors that point apart."""
    shutil.copytree(llavas / "a", llavas / "base")
    base = load_file(llavas / "base" / "model.safetensors")
    for seed, name in enumerate(("a", "b")):
        shared, own = (torch.Generator().manual_seed(s) for s in (7, seed))
        tensors = {
            key: value + 0.05 * (torch.randn(value.shape, generator=shared) + torch.randn(value.shape, generator=own))
            for key, value in sorted(base.items())
        }
        save_file(tensors, llavas / name / "model.safetensors", metadata={"format": "pt"})
    return llavas


@pytest.mark.parametrize("rule", ["linear", "slerp", "task_arithmetic", "ties", "model_stock"])
def test_agreement_with_mergekit(rule, started, tmp_path):
    (tmp_path / "merge.yaml").write_text(json.dumps(configuration(rule, started)))
    subprocess.run([COMMAND, str(tmp_path / "merge.yaml"), str(tmp_path / "out")], check=True, capture_output=True)
    theirs = {key: value for file in (tmp_path / "out").glob("*.safetensors") for key, value in load_file(file).items()}
    a, b, base = (load_file(started / name / "model.safetensors") for name in ("a", "b", "base"))
    based = rules.RULES[rule].based
    ours = combined(rule, a, b, base if based else None, How(RATIO, kept=KEPT))
    assert set(theirs) == set(ours) and len(ours) > 50
    for key, value in ours.items():
        if rule == "slerp" and torch.cosine_similarity(a[key].flatten(), b[key].flatten(), dim=0).abs() > 0.9995:
            continue  # there mergekit is linear
        assert (value - theirs[key].float()).abs().max() < 1e-6, key


def test_the_l1_variant_is_mergekits_on_the_same_mask(started, tmp_path):
    """Its own function on our mask, in its own interpreter."""
    tau = torch.randn(500, generator=torch.Generator().manual_seed(0))
    how, base = How(1.0, survived=0.3), torch.zeros(500)
    mask = rules.masks(500, how, rules.streams(0))[1]
    save_file({"tau": tau, "mask": mask.float()}, tmp_path / "in.safetensors")
    code = (
        "from safetensors.torch import load_file, save_file; from mergekit.sparsify import RescaleNorm, rescaled_masked_tensor\n"
    )
    code += "tensors = load_file('in.safetensors')\n"
    code += "save_file({'kept': rescaled_masked_tensor(tensors['tau'], tensors['mask'], RescaleNorm.l1)}, 'out.safetensors')"
    python = Path(COMMAND).resolve().parent / "python"
    subprocess.run([str(python), "-c", code], check=True, cwd=tmp_path, capture_output=True)
    theirs = load_file(tmp_path / "out.safetensors")["kept"]
    assert (rules.merged("dare_linear_l1", torch.zeros(500), tau, base, how) - theirs).abs().max() < 1e-6
