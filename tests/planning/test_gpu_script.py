"""Every line of `tests/gpu.sh` at tiny sizes on the CPU: the script is run where a GPU is rented, and has to work at once."""

import dataclasses
from types import SimpleNamespace

import gpu
import pytest
import torch
from conftest import NANO

from vlsafe.training import checkpoints, trainers

TINY = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.fixture
def tiny(monkeypatch):
    """The script at the shapes of NANO, its model where there is no GPU; a GPU's calls do nothing, and it has 80 GB."""
    tuned = dataclasses.replace(gpu.PAPER.tuning, preference=NANO.tuning.preference)
    numbers = {"language": NANO.language, "vision": NANO.vision, "instruct": NANO.instruct, "projector": NANO.projector}
    few = dataclasses.replace(gpu.PAPER.traffic, screened=12, instructions=8)
    paper = dataclasses.replace(gpu.PAPER, **numbers, tuning=tuned, traffic=few)
    plain = dataclasses.replace(paper.backbone(gpu.BACKBONE), language={})
    monkeypatch.setattr(gpu, "PAPER", dataclasses.replace(paper, backbones={gpu.BACKBONE: plain}))
    for name, value in {"GPU": "cpu", "SEEN": [torch.profiler.ProfilerActivity.CPU], "NEW": 3, "GUARD": TINY, "WORDS": 40,
                        "EXCHANGES": 4, "SECONDS": 1e9}.items():  # fmt: skip
        monkeypatch.setattr(gpu, name, value)
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    card = SimpleNamespace(total_memory=80 * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: card)

    def found(train):  # what a trial on a GPU would leave
        def run(*rest):
            (rest[-4] / checkpoints.AT_ONCE).write_text("[2, false, 0.001]")
            return train(*rest)

        return run

    trials = {name: found(getattr(trainers, name)) for name in ("sft_history", "dpo")}
    monkeypatch.setattr(gpu, "trainers", SimpleNamespace(**trials, tokens_seen=trainers.tokens_seen))
    return card


def lines():
    gpu.tuned("stage 1", "projector", gpu.PAPER.projector, 4, 1)
    gpu.tuned("stage 2, LoRA", "lora", gpu.PAPER.instruct, 4, 1)
    gpu.preferred("full", 6, 1)
    gpu.answered()
    gpu.guarded()
    gpu.profiled()


def test_every_line_is_measured(tiny, monkeypatch, capsys):
    monkeypatch.setitem(gpu.ROWS, "stage 1", 4)
    monkeypatch.setitem(gpu.ROWS, "stage 2, LoRA", 4)
    lines()
    out = capsys.readouterr().out
    rows = [row.strip("| \n").split(" | ") for row in out.splitlines() if row.startswith("|")]
    named = ["stage 1", "stage 2, LoRA", "DPO, full", "3 tokens, 16 prompts", "3 tokens, 64 prompts", "an ensemble", "guard"]
    assert [row[0] for row in rows] == named
    assert not any("skipped" in cell or "FAILED" in cell for row in rows for cell in row), out
    planned = [row for row in rows if row[0] != "an ensemble"]
    assert all(any(cell.startswith("peak ") for cell in row) and any(cell.startswith("plan ") for cell in row) for row in planned)
    assert out.count("  busy ") == 2 and "exchanges/s" in out


def test_what_is_too_small_or_too_late_is_skipped_by_name(tiny, monkeypatch, capsys):
    """A card that the plan does not fit is told so before anything is tried; a profile that lacks its model says so."""
    tiny.total_memory = 1
    gpu.tuned("stage 1", "projector", gpu.PAPER.projector, 4, 1)
    gpu.guarded()
    monkeypatch.setattr(gpu, "time", SimpleNamespace(perf_counter=lambda: gpu.BEGUN))  # a busy machine takes no time from the ten
    monkeypatch.setattr(gpu, "SECONDS", 10.0)
    gpu.profiled()
    rows = [row for row in capsys.readouterr().out.splitlines() if row.startswith("|")]
    assert len(rows) == 4 and all("skipped: " in row for row in rows), rows
    assert all("does not fit this card (the plan is" in row for row in rows[:2]) and "the profile before it" in rows[3]
