"""Training on two processors over gloo: the same training as on one, and a stop where it would silently be another."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from vlsafe.core.scale import Fit, LoraSpec, as_plain
from vlsafe.core.schema import Turn
from vlsafe.models import checkpoints, trainable
from vlsafe.training import checkpoints as training_checkpoints
from vlsafe.training import datasets, launch, processes, trainers

EMBEDDING = "model.language_model.embed_tokens.weight"
HERE = Path(__file__).parents[1]
ALONE = {"num_machines": 1, "machine_rank": 0, "use_cpu": True, "mixed_precision": "no", "num_processes": 2}
DDP = {**ALONE, "distributed_type": "MULTI_GPU"}
FSDP = {
    **ALONE,
    "distributed_type": "FSDP",
    "fsdp_config": {
        "fsdp_version": 2, "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "fsdp_reshard_after_forward": True,
        "fsdp_state_dict_type": "FULL_STATE_DICT", "fsdp_cpu_ram_efficient_loading": False, "fsdp_offload_params": False,
        "fsdp_activation_checkpointing": False,
    },
}  # fmt: skip


def job(begun, folder, **changes):
    start = begun.checkpoints("projector/filtered")[-1]
    fit = dataclasses.replace(begun.scale.instruct, steps=6, projector_rate=None, grouped=True, **changes)
    return launch.Job("sft", "full", str(start), str(folder), fit, LoraSpec(), 0, (3, 6))


def written(tmp_path, configuration):
    path = tmp_path / "accelerate.yaml"
    path.write_text(yaml.safe_dump(configuration))
    return str(path)


def trained(of, data, steps=None, home=Path("/")):
    """Losses and final weights; killed after `steps` where these are given."""

    def progress(step):
        if steps and step >= steps:
            raise KeyboardInterrupt

    history, _ = launch.trained(of, data, progress, home)
    ended = load_file(Path(of.folder) / f"checkpoint-{of.fit.steps}" / "model.safetensors")
    return [line["loss"] for line in history], {name: weight.clone() for name, weight in ended.items()}


def apart(one, other):
    return max(float((one[key] - other[key]).abs().max()) for key in one)


@pytest.mark.processes
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_train_as_one_and_go_on_with_the_same_bits(begun, rows, tmp_path, monkeypatch, request, kind):
    """Losses within 2e-6 of one process; one whole checkpoint; a resumed training ends with the bits of an undisturbed one."""
    if kind == "ddp":  # as a user's starts: sharded, but for the worker; DDP in test_faults.py
        request.getfixturevalue("forked")
    monkeypatch.setattr(launch, "WORKER", (str(HERE / "sharded_worker.py"),) if kind == "fsdp2" else launch.WORKER)
    alone, weights = trained(job(begun, tmp_path / "one"), rows)
    configuration = written(tmp_path, FSDP if kind == "fsdp2" else DDP)
    losses, whole = trained(job(begun, tmp_path / "two", launch=configuration), rows)
    assert len(losses) == 6 and np.abs(np.subtract(losses, alone)).max() < 2e-6
    assert set(whole) - set(weights) <= {"lm_head.weight"} and apart(weights, whole) < 1e-4
    assert torch.equal(whole.get("lm_head.weight", whole[EMBEDDING]), whole[EMBEDDING])  # tied; sharded, it is written twice
    folder = tmp_path / "two" / "checkpoint-3"
    noted = json.loads((folder / training_checkpoints.COMPLETE).read_text())
    assert {"model.safetensors", "rng_state_0.pth", "rng_state_1.pth"} <= set(noted)
    assert not [name for name in noted if "fsdp" in name], "weights are written once"
    again = tmp_path / "again"
    again.mkdir()
    os.rename(folder, again / "checkpoint-3")
    resumed, ended = trained(job(begun, again, launch=configuration), rows)
    assert resumed == losses and all(torch.equal(whole[key], ended[key]) for key in whole)


@pytest.mark.processes
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_tasks_without_conflict_train_on_two_processes_as_on_one(begun, tmp_path, monkeypatch, kind, forked):
    """The two gradients that are compared are those of all processes, whole or sharded: without a sum at every micro-batch
    a process would compare its own rows' gradient (DDP) or none at all (FSDP2)."""
    monkeypatch.setattr(launch, "WORKER", (str(HERE / "sharded_worker.py"),) if kind == "fsdp2" else launch.WORKER)
    examples = begun.examples("screen/filtered", "instructions.parquet")

    def answered(rows, word):
        return [dataclasses.replace(row, turns=(*row.turns[:-1], Turn("assistant", f"{word} " * 12))) for row in rows]

    both = [*answered(examples[:50], "bread"), *answered(examples[:30], "sorry")]
    data, cosines, ended = datasets.chat_dataset(both, with_images=True), {}, {}
    for name in ("one", "two"):
        folder = tmp_path / name
        where = {"launch": written(tmp_path, FSDP if kind == "fsdp2" else DDP)} if name == "two" else {}
        of = dataclasses.replace(job(begun, folder, micro_batches=4, learning_rate=1e-3, **where), objective="pcgrad", first=50)
        history, _ = launch.trained(of, data, lambda step: None, Path("/"))
        cosines[name] = [record["task_cosine"] for record in history]
        ended[name] = load_file(folder / "checkpoint-6" / "model.safetensors")
    assert min(cosines["one"]) < 0 and len(cosines["one"]) == 6, "a step has a conflict"
    assert cosines["two"] == pytest.approx(cosines["one"], abs=1e-4)
    assert apart(ended["one"], ended["two"]) < 1e-4


@pytest.mark.processes
def test_one_process_where_two_were_asked_for_is_stopped(begun, rows, tmp_path, capfd):
    """accelerate starts one process for this configuration, and says nothing."""
    lone = written(tmp_path, {**DDP, "distributed_type": "MULTI_CPU"})
    with pytest.raises(ValueError, match="RuntimeError: 2 processes were requested and 1 is training"):
        trained(job(begun, tmp_path / "x", launch=lone), rows)


@pytest.mark.processes
def test_whole_weights_where_sharded_ones_were_asked_for_are_stopped(begun, rows, tmp_path, forked):
    """On processors accelerate turns FSDP into DDP, and says nothing."""
    with pytest.raises(ValueError, match="accelerate has silently turned FSDP off"):
        trained(job(begun, tmp_path / "x", launch=written(tmp_path, FSDP)), rows)


@pytest.mark.processes
def test_a_head_whose_gradient_would_not_be_summed_is_stopped(begun, rows, tmp_path, monkeypatch, forked):
    monkeypatch.setattr(launch, "WORKER", (str(HERE / "sharded_worker.py"),))
    monkeypatch.setenv("HEAD_ALONE", "1")
    with pytest.raises(ValueError, match="its gradient would not be summed over processes"):
        trained(job(begun, tmp_path / "x", launch=written(tmp_path, FSDP)), rows)


def test_sharded_steps_of_mixed_rows_are_refused(begun, rows, tmp_path, monkeypatch):
    monkeypatch.setenv(processes.SHARDED, "1")
    monkeypatch.setattr(launch, "_loader", lambda fit: lambda start, prepared: prepared(checkpoints.load(start)))
    mixed = job(begun, tmp_path / "x")
    with pytest.raises(ValueError, match="needs `grouped: true`"):
        trained(dataclasses.replace(mixed, fit=dataclasses.replace(mixed.fit, grouped=False)), rows)
    with pytest.raises(ValueError, match="rows 2 to 3 of the order mix pictures and plain text"):
        processes.refuse_mixed([True, True, False, True], 2)
    processes.refuse_mixed([True, True, False, False], 2)


def test_a_moving_tower_and_low_precision_are_refused(begun):
    model = checkpoints.load(begun.checkpoints("projector/filtered")[-1])
    with pytest.raises(RuntimeError, match=r"vision_tower.* is trainable.*could not be resumed"):
        processes.refuse_unsound_shards(model)
    trainable.choose(model, "full", LoraSpec())
    with pytest.raises(RuntimeError, match="master weights are float32"):
        processes.refuse_unsound_shards(model.to(torch.bfloat16))


@pytest.mark.parametrize("many", [1, 2, 4])
def test_every_step_has_one_modality_and_the_same_rows_on_any_number_of_processes(many):
    rng = np.random.default_rng(5)
    lengths, pictured = rng.integers(5, 90, 203).tolist(), (rng.random(203) < 0.7).tolist()
    fit = Fit(steps=40, batch_size=16, learning_rate=1e-3, micro_batches=2, grouped=True)
    order, alone = (processes.grouped_order(lengths, pictured, fit, n, np.random.default_rng(0)) for n in (many, 1))
    assert len(order) == 640
    for at in range(0, 640, 16):
        assert Counter(order[at : at + 16]) == Counter(alone[at : at + 16])
        assert len({pictured[i] for i in order[at : at + 16]}) == 1
    for at in range(0, 640, 8):  # all that work at one time pad to about one length
        longest = [max(lengths[i] for i in order[place : place + 8 // many]) for place in range(at, at + 8, 8 // many)]
        assert max(longest) == max(lengths[i] for i in order[at : at + 8])
        assert min(longest) >= sorted((lengths[i] for i in order[at : at + 8]), reverse=True)[many - 1]
    seen = Counter(order[:192])
    assert len(seen) > 180, "a round takes almost every row once"


def test_rows_that_cannot_be_dealt_evenly_are_refused():
    with pytest.raises(ValueError, match="128 rows a step cannot be split over 3 processes in 2 micro-batches"):
        processes.per_process(Fit(steps=1, batch_size=128, learning_rate=1e-3), 3)


@pytest.mark.parametrize(
    ("batch", "at_once", "parts"), [(16, 3, 8), (32, 12, 4), (32, 5, 8), (64, 10, 8), (15, 4, 5), (16, 16, 2)]
)
def test_fewer_rows_at_once_lose_none_of_a_step(batch, at_once, parts):
    fit = Fit(steps=1, batch_size=batch, learning_rate=1e-3, micro_batches=2 if batch % 2 == 0 else 1, at_once=at_once)
    assert processes.micro_batches(fit, 1) == parts and processes.per_process(fit, 1) * parts == batch


def test_a_step_that_its_micro_batches_do_not_divide_is_refused_on_one_process_too():
    with pytest.raises(ValueError, match="10 rows a step cannot be split over 1 processes in 4 micro-batches"):
        processes.per_process(Fit(steps=1, batch_size=10, learning_rate=1e-3, micro_batches=4), 1)


def test_the_command_of_several_nodes_starts_once_on_each(monkeypatch):
    monkeypatch.setattr(launch.subprocess, "check_output", lambda line, text: "n1\nn2\n")
    slurm = {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]"}
    line = launch.command(Path("c.yaml"), Path("it's a job.json"), 16, slurm)
    assert line[:6] == ["srun", "--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "bash", "-c"]
    assert "--main_process_ip n1" in " ".join(line) and "--num_processes 16" in " ".join(line)
    shell = line[6].replace('exec "$@"', "echo").replace('"$SLURM_NODEID"', "1")
    said = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True).stdout
    assert said == "--machine_rank 1 -m vlsafe.training.launch it's a job.json\n"
    assert launch.command(Path("c.yaml"), Path("job.json"), 8, {})[:2] == [sys.executable, "-m"]


def test_a_fit_for_gpus_says_so_where_there_are_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match=r"trained on GPUs and there are none here, .*`vlsafe dryrun`"):
        launch.process_count(yaml.safe_load((HERE.parent / "env/accelerate/fsdp2.yaml").read_text()), {})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for name in ("ddp", "fsdp2"):
        configuration = yaml.safe_load((HERE.parent / f"env/accelerate/{name}.yaml").read_text())
        assert launch.process_count(configuration, {}) == 4
        assert launch.process_count(configuration, {"SLURM_JOB_NUM_NODES": "2"}) == 8


def test_stage_1_crops_what_every_later_stage_pads(begun, rows, tmp_path, monkeypatch):
    """Both read the same folder, and what is saved with stage 1's checkpoints pads."""
    start = shutil.copytree(begun.checkpoints("projector/filtered")[0], tmp_path / "start")
    processor, padding = checkpoints.load_processor(start), []
    processor.image_processor = LlavaImageProcessorPil.from_dict(processor.image_processor.to_dict(), do_pad=True)
    processor.save_pretrained(start)
    monkeypatch.setattr(trainers, "sft_history", lambda _, used, *__: padding.append(used.image_processor.do_pad) or [])
    for method in ("projector", "full"):
        launch._work(dataclasses.replace(job(begun, tmp_path), method=method, start=str(start)), rows, lambda step: None)
    assert padding == [False, True] and checkpoints.load_processor(start).image_processor.do_pad


def test_a_job_is_read_as_it_was_written(begun, tmp_path):
    of = dataclasses.replace(job(begun, tmp_path), objective="dpo", preference=begun.scale.tuning.preference, band=(1, 2))
    (tmp_path / "job.json").write_text(json.dumps(as_plain(of)))
    read = launch.Job.read(tmp_path / "job.json")
    assert as_plain(read) == as_plain(of) and read.fit == of.fit
