"""Profiles of the scheduler, and GPUs that stages of one machine keep to."""

import os
from pathlib import Path

import pytest
import torch
import yaml

from vlsafe.models.chat import template
from vlsafe.training import processes

PROFILES = Path(__file__).parents[2] / "env/profiles"


def test_profiles_retry_outside_of_the_rules():
    """A rule's own `retries` are spent inside one Slurm job."""
    for name in ("node", "slurm"):
        assert yaml.safe_load((PROFILES / name / "config.yaml").read_text())["retries"] >= 2
    assert "retries" not in (PROFILES.parents[1] / "Snakefile").read_text()
    assert yaml.safe_load((PROFILES / "slurm/config.yaml").read_text())["slurm-status-command"] == "squeue"


def test_stages_of_one_machine_keep_to_gpus_of_their_own(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    seen = []
    with processes.claimed(1, tmp_path):
        seen.append(os.environ.pop("CUDA_VISIBLE_DEVICES"))
        with processes.claimed(2, tmp_path):
            seen.append(os.environ.pop("CUDA_VISIBLE_DEVICES"))
            with pytest.raises(RuntimeError, match="2 GPUs are needed and only 1 of 4 are free"), processes.claimed(2, tmp_path):
                pass
    assert seen == ["0", "1,2"]
    with pytest.raises(ValueError, match="8 GPUs are needed and 4 are here"), processes.claimed(8, tmp_path):
        pass
    with processes.claimed(0, tmp_path):
        assert "CUDA_VISIBLE_DEVICES" not in os.environ
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with processes.claimed(8, tmp_path):  # a cluster has chosen
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"


CHATML = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na</e>\n<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n"
LLAMA_3 = (
    "<b><|start_header_id|>user<|end_header_id|>\n\nq</e><|start_header_id|>assistant<|end_header_id|>\n\na</e>"
    "<|start_header_id|>user<|end_header_id|>\n\nr</e><|start_header_id|>assistant<|end_header_id|>\n\n"
)
QWEN = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n" + CHATML


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("chatml", CHATML), ("qwen2.5", QWEN), ("llama3", LLAMA_3), ("mistral", "<b>[INST] q[/INST] a</e>[INST] r[/INST]")],
)
def test_templates_of_other_parents_write_what_their_makers_document(name, wanted):
    import jinja2
    from transformers.utils.chat_template_utils import _compile_jinja_template

    said = [{"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "a"), ("user", "r"))]
    made = _compile_jinja_template(template(name))
    assert isinstance(made, jinja2.Template)
    assert made.render(messages=said, bos_token="<b>", eos_token="</e>", add_generation_prompt=True) == wanted
