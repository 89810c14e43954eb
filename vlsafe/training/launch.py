"""One training run, in this process or, where its fit names an `accelerate` configuration, in processes of its own, on one
node or several, which get their job and report through files."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset

from vlsafe.core import failures
from vlsafe.core.presets import mapping_at
from vlsafe.core.scale import Fit, LoraSpec, Preference, as_plain, extended
from vlsafe.core.store import write_text
from vlsafe.models import chat, checkpoints, devices, trainable
from vlsafe.training import datasets, precision, processes, trainers
from vlsafe.training.checkpoints import moved_alone

WORKER: tuple[str, ...] = ("-m", "vlsafe.training.launch")  # what every process of a launched training runs
NODES = "SLURM_JOB_NUM_NODES"


@dataclass(frozen=True)
class Job:
    """A training run that can be written to a file. `start` is a model folder, `folder` where checkpoints go."""

    objective: str
    method: str
    start: str
    folder: str
    fit: Fit
    lora: LoraSpec
    seed: int
    milestones: tuple[int, ...]
    band: tuple[int, int] | None = None
    preference: Preference | None = None
    blocks: tuple[int, ...] = ()
    first: int = 0  # how many rows are the first task's, for an objective that treats two tasks differently

    @classmethod
    def read(cls, path: Path) -> Job:
        return extended(cls, json.loads(path.read_text(encoding="utf-8")), "job")


def trained(job: Job, data: Dataset, progress: trainers.Progress, home: Path) -> tuple[trainers.History, int]:
    """Train: the log history, and how many weights were trainable. `fit.launch` is a path below the folder `home`; where it comes
    to one process, that is this one, which shards nothing.

    Raises:   ChildProcessError when launched processes are lost; the same call resumes from the last complete checkpoint.
              ValueError, in their words, when one of them ends in an error that no other try can mend
    """
    if job.fit.launch and process_count(mapping_at(path := home / job.fit.launch), os.environ) > 1:
        return _launched(job, data, progress, path)
    return _work(job, data, progress)


def _work(job: Job, data: Dataset, progress: trainers.Progress) -> tuple[trainers.History, int]:
    """What every process of a training run does."""
    start, rest = Path(job.start), (job.fit, Path(job.folder), job.seed, job.milestones, progress)
    torch.manual_seed(job.seed)  # adapters are initialised at random before the trainer sets its seed
    load = _loader(job.fit)
    model = load(start, lambda model: trainable.choose(model, job.method, job.lora, job.band, job.blocks))
    moving, processor = model.num_parameters(only_trainable=True), checkpoints.load_processor(start)
    if job.method == "projector":  # what is saved with the checkpoints still pads, as every later stage does
        model, processor = moved_alone(model), chat.cropping(processor)
    if job.preference is not None:
        return trainers.dpo(model, load(start, lambda model: model), processor, data, job.preference, *rest), moving
    if job.objective == "pcgrad":
        return trainers.sft_without_conflict(model, processor, data, job.first, *rest), moving
    return trainers.sft_history(model, processor, data, *rest), moving


def _loader(fit: Fit) -> Callable[[Path, Callable[[Any], Any]], Any]:
    """What loads a model, lets a function prepare it, and gives this process its part: all of it, unless weights are sharded."""
    if not processes.sharded():
        return lambda start, prepared: prepared(checkpoints.load(start))
    low = fit.dtype == "bfloat16"
    shard = processes.sharder(precision.SHARDED if low or fit.autocast or devices.device() == "cuda" else None)
    device = None if PartialState().is_local_main_process else "meta"

    def part(start: Path, prepared: Callable[[Any], Any]) -> Any:
        model = checkpoints.load(start, device=device)
        return shard(prepared(checkpoints.fused(model) if low else model))

    return part


def _launched(job: Job, data: Dataset, progress: trainers.Progress, path: Path) -> tuple[trainers.History, int]:
    """Write the job to files, start its processes, watch them, and read their result."""
    configuration = mapping_at(path)
    count, folder = process_count(configuration, os.environ), Path(job.folder) / "job"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    datasets.save(data, folder / "data")
    write_text(folder / "job.json", json.dumps(as_plain(job)))
    sharded = str(int(configuration["distributed_type"] == "FSDP"))
    environment = {**os.environ, processes.PROCESSES: str(count), processes.SHARDED: sharded}
    environment |= {devices.VARIABLE: "cpu"} if configuration.get("use_cpu") else {}
    line = command(path, folder / "job.json", count, os.environ)
    with subprocess.Popen(line, env=environment, preexec_fn=processes.die_with_parent) as launched:
        try:
            while launched.poll() is None:
                time.sleep(0.5)
                if (folder / "step").exists():
                    progress(int((folder / "step").read_text() or 0))
        except BaseException:
            launched.send_signal(signal.SIGTERM)  # its agent stops the workers
            raise
    if errors := sorted(folder.glob("error-*")):
        raise ValueError(f"a training process of {path.name} ended in an error: {errors[0].read_text(encoding='utf-8')}")
    if launched.returncode:
        raise ChildProcessError(f"{count} training processes of {path.name} ended with code {launched.returncode}; the reason "
                                "stands above. The same command resumes from the last complete checkpoint")  # fmt: skip
    history, moving = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    shutil.rmtree(folder)
    return history, moving


def process_count(configuration: Mapping[str, Any], environment: Mapping[str, str]) -> int:
    """How many processes a configuration starts here: as many as it says on CPUs, at most one per GPU otherwise.

    Raises:   ValueError where it needs GPUs and there are none
    """
    count = int(configuration["num_processes"])
    if configuration.get("use_cpu"):
        return count
    if not (here := devices.gpus()):
        raise ValueError("this fit is trained on GPUs and there are none here, or the scale says `device: cpu`; `vlsafe dryrun` "
                         "says what it costs, scale `mini` needs none")  # fmt: skip
    return min(count, here) * int(environment.get(NODES, "1"))


def command(configuration: Path, job: Path, count: int, environment: Mapping[str, str]) -> list[str]:
    """The command line that starts a training run: on this machine, or once on every node of a Slurm job."""
    nodes = int(environment.get(NODES, "1"))
    launch = [sys.executable, "-m", "accelerate.commands.launch"]
    launch += ["--config_file", str(configuration), "--num_processes", str(count)]
    if nodes == 1:
        return [*launch, "--main_process_port", "0", *WORKER, str(job)]  # a free one
    port = 20000 + int(environment["SLURM_JOB_ID"]) % 20000
    hosts = subprocess.check_output(["scontrol", "show", "hostnames", environment["SLURM_JOB_NODELIST"]], text=True).split()
    launch += ["--num_machines", str(nodes), "--main_process_port", str(port), "--main_process_ip", hosts[0]]
    rank = 'exec "$@" --machine_rank "$SLURM_NODEID" ' + shlex.join([*WORKER, str(job)])
    return ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "bash", "-c", rank, "launch", *launch]


def main(argv: list[str]) -> None:
    """One process of a launched training run."""
    processes.die_with_parent()
    PartialState(cpu=os.environ.get(devices.VARIABLE) == "cpu")  # on CPUs nobody else has it know of the other processes
    path, rank = Path(argv[0]), os.environ.get("RANK", "0")

    def progress(step: int) -> None:
        if rank == "0":
            (path.parent / "step").write_text(str(step), encoding="utf-8")

    try:
        result = _work(Job.read(path), datasets.load(path.parent / "data"), progress)
    except Exception as error:
        if not failures.passing(error):
            write_text(path.parent / f"error-{rank}", f"{type(error).__name__}: {error}")
        raise
    if rank == "0":
        write_text(path.parent / "result.json", json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:])
