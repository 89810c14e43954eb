"""Profiles of the scheduler, and GPUs that stages of one machine keep to."""

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from vlsafe.core import failures, store
from vlsafe.models import devices
from vlsafe.models.chat import template
from vlsafe.study.study import Study

PROFILES = Path(__file__).parents[2] / "env/profiles"


def test_profiles_retry_outside_of_the_rules():
    """A rule's own `retries` are spent inside one Slurm job."""
    for name in ("node", "slurm"):
        assert yaml.safe_load((PROFILES / name / "config.yaml").read_text())["retries"] >= 2
    assert "retries" not in (PROFILES.parents[1] / "Snakefile").read_text()
    assert yaml.safe_load((PROFILES / "slurm/config.yaml").read_text())["slurm-status-command"] == "squeue"


GPUS = [f"GPU-{letter}1234567-0000" for letter in "abcdefgh"]


@pytest.fixture
def machine(monkeypatch):
    """A machine with so many GPUs, of which a process sees all, or those that a cluster's CUDA_VISIBLE_DEVICES lists."""

    def seeing(count, listed=None):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(devices, "_uuids", lambda: [(str(n), uuid) for n, uuid in enumerate(GPUS[:count])])
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if listed is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)

    return seeing


def begin(held, many, folder, listed):
    """What a job sees that starts while those in `held` run; every job starts from what the cluster has listed."""
    held.enter_context(devices.claimed(many, folder))
    seen = os.environ.pop("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = listed
    return seen


@pytest.mark.parametrize("listed", [None, "0,1,2,3,4,5,6,7", ",".join(GPUS), "3, 5,1", "GPU-b,2,GPU-a"])
def test_two_jobs_of_one_gpu_inside_an_allocation_see_different_ones(machine, tmp_path, listed):
    machine(8, listed)
    with contextlib.ExitStack() as held:
        one, two = (begin(held, 1, tmp_path, listed) for _ in range(2))
    names = (listed or "0,1").replace(" ", "").split(",")
    assert [one, two] == names[:2]
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == listed, "and leave the list as it was"
    with devices.claimed(1, tmp_path):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == names[0], "and what they had is free again"


def test_a_gpu_is_the_same_by_its_number_and_by_its_identifier(machine, tmp_path):
    machine(2, "0,1")
    with contextlib.ExitStack() as held:
        assert begin(held, 1, tmp_path, ",".join(GPUS[:2])) == "0"
        assert begin(held, 1, tmp_path, "0,1") == GPUS[1]
        with pytest.raises(TimeoutError, match="1 GPUs are needed and only 0 of 2 are free") as error:
            begin(held, 1, tmp_path, None)
        assert failures.passing(error.value), "the scheduler may try again: the other job ends some day"


def test_a_job_takes_what_there_is_and_locks_nothing_that_a_cluster_gave_it(machine, tmp_path):
    machine(1)
    with devices.claimed(8, tmp_path):  # a recipe for eight on a machine with one
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "0"
        os.environ.pop("CUDA_VISIBLE_DEVICES")
        with pytest.raises(TimeoutError, match="8 GPUs are needed and only 0 of 1"), devices.claimed(8, tmp_path):
            pass
    machine(1, "0")
    with devices.claimed(1, tmp_path), devices.claimed(8, tmp_path):  # jobs of a cluster, each sees its own as number 0
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "0"
    machine(4, "3,2,1,0")
    with devices.claimed(4, tmp_path), devices.claimed(8, tmp_path):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "3,2,1,0"


@pytest.mark.parametrize(("count", "listed"), [(0, None), (4, ""), (4, "-1"), (4, "NoDevFiles")])
def test_a_job_for_gpus_without_one_says_what_computes_without(machine, tmp_path, count, listed):
    machine(count, listed)
    with pytest.raises(ValueError, match="1 GPUs are needed and none is here; `device: cpu`"), devices.claimed(1, tmp_path):
        pass
    with devices.claimed(0, tmp_path):
        assert os.environ.get("CUDA_VISIBLE_DEVICES") == listed


@pytest.fixture
def scheduler(tmp_path):
    """Snakemake on the repository's Snakefile, with a run store of its own and nothing from outside."""
    for name in ("Snakefile", "notebooks", "env"):
        (tmp_path / name).symlink_to(PROFILES.parents[1] / name)

    def call(*options, backbone="llama2-chat", stages):
        study = Study.open("paper", backbone, 0, tmp_path / "runs")
        targets = [str(study.run(name).receipt.relative_to(tmp_path)) for name in stages]
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        environment = {**os.environ, "PYTHONPATH": str(PROFILES.parents[1]), "PATH": path}
        environment.pop("VLSAFE_DATA", None)
        line = [
            sys.executable,
            "-m",
            "snakemake",
            *options,
            "--config",
            "scale=paper",
            "seeds=0",
            f"backbones={backbone}",
            "root=runs",
        ]
        return subprocess.run([*line, "--", *targets], cwd=tmp_path, env=environment, capture_output=True, text=True), study

    return call


def test_the_profile_of_one_machine_grants_what_there_is(scheduler):
    """The same recipes with one GPU and with eight; the command is handed what was granted."""
    for have, granted in ((["--resources", "gpu=1"], {"1"}), ([], {"1", "8"})):
        ran, _ = scheduler("--profile", "env/profiles/node", *have, "-n", "-p", stages=["examination/instruct.filtered-full"])
        assert not ran.returncode, ran.stderr[-2000:]
        lines = dict(re.findall(r"vlsafe stage (\S+) .*? --gpus (\d+) --attempt 1 > ", ran.stdout + ran.stderr))
        assert set(lines.values()) - {"0"} == granted
        assert lines["guard/text"] == "0" and lines["responses/instruct.filtered-full"] == "1"
        assert lines["instruct/filtered-full"] == max(granted)


def test_a_lasting_error_is_not_tried_again_and_takes_nothing_with_it(scheduler):
    ran, study = scheduler("--cores", "1", "--retries", "2", "--keep-going", stages=["world/corpora", "base/llm"])
    corpora, base = study.run("world/corpora"), study.run("base/llm")
    assert ran.returncode and store.status(base) == "valid" and base.receipt.exists() and not corpora.receipt.exists()
    assert ran.stderr.count("world/corpora: making it") == 1, ran.stderr[-3000:]
    words = corpora.receipt.with_suffix(".log").read_text()
    assert words.startswith("vlsafe: the first attempt ended so") and "`vlsafe download`" in words and "make_corpora" in words
    assert ran.stderr.count("It is not tried again") == 2, "the second and the third attempt"


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
