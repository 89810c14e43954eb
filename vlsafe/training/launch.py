"""One training, here or on several processes: the same entry point for one, for two, and for the GPUs of several nodes.

A fit that names an `accelerate` configuration is trained by processes of its own, started from the stage and told by files
what to do; all others in the process that asks. What is trained, and how, is `train`'s; this room starts and watches.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset, load_from_disk

from vlsafe.core.scale import Fit, LoraSpec, Preference, as_plain
from vlsafe.core.store import write_text
from vlsafe.models import architectures, checkpoints, trainable
from vlsafe.training import processes, trainers

WORKER: tuple[str, ...] = ("-m", "vlsafe.training.launch")  # what every process of a launched training runs


@dataclass(frozen=True)
class Job:
    """A training in words that another process can read. `start` is a model folder, `folder` where checkpoints go."""

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
    first: int = 0  # how many rows are the first task's, where the objective tells two apart

    @classmethod
    def read(cls, path: Path) -> Job:
        told = json.loads(path.read_text(encoding="utf-8"))
        told["fit"], told["lora"] = Fit(**told["fit"]), LoraSpec(**told["lora"])
        if told["preference"]:
            told["preference"] = Preference(**{**told["preference"], "fit": Fit(**told["preference"]["fit"])})
        return cls(**told)


def trained(job: Job, data: Dataset, progress: trainers.Progress, home: Path) -> tuple[trainers.History, int]:
    """Train, and tell what was logged and how many weights could move. `home` is the folder that `launch` is a path in.

    Raises:   ChildProcessError when launched processes fail; the same call goes on from the last whole checkpoint
    """
    return _launched(job, data, progress, home / job.fit.launch) if job.fit.launch else _work(job, data, progress)


def _work(job: Job, data: Dataset, progress: trainers.Progress) -> tuple[trainers.History, int]:
    """What every process of a training does."""
    start = Path(job.start)
    torch.manual_seed(job.seed)  # adapters start at random, before a trainer sets its seed
    model = checkpoints.load(start)
    os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = ",".join(architectures.block_names(model))  # what accelerate shards by
    model = trainable.choose(model, job.method, job.lora, job.band, job.blocks)
    moving, processor = trainable.moving(model), checkpoints.load_processor(start)
    how = (Path(job.folder), job.seed, job.milestones, progress)
    if job.preference is not None:
        history = trainers.dpo(model, checkpoints.load(start), processor, data, job.preference, job.fit, *how)
    elif job.objective == "pcgrad":
        history = trainers.sft_without_conflict(model, processor, data, job.first, job.fit, *how)
    else:
        history = trainers.sft_history(model, processor, data, job.fit, *how)
    return history, moving


def _launched(job: Job, data: Dataset, progress: trainers.Progress, configuration: Path) -> tuple[trainers.History, int]:
    """Write the job down, start its processes, watch them, and read what they wrote."""
    told = yaml.safe_load(configuration.read_text(encoding="utf-8"))
    many, notes = wanted(told, os.environ), Path(job.folder) / "job"
    shutil.rmtree(notes, ignore_errors=True)
    notes.mkdir(parents=True)
    data.save_to_disk(notes / "data")
    write_text(notes / "job.json", json.dumps(as_plain(job)))
    asked = {processes.ASKED: str(many), processes.LAUNCH: str(int(told["distributed_type"] == "FSDP"))}
    run = command(configuration, notes / "job.json", many, os.environ)
    with subprocess.Popen(run, env={**os.environ, **asked}, preexec_fn=processes.die_with_parent) as launched:
        try:
            while launched.poll() is None:
                time.sleep(0.5)
                if (notes / "step").exists():
                    progress(int((notes / "step").read_text() or 0))
        except BaseException:
            launched.send_signal(signal.SIGTERM)  # its agent stops the workers
            raise
    if launched.returncode:
        raise ChildProcessError(
            f"{many} training processes of {configuration.name} ended with code {launched.returncode}; the reason stands above. "
            "The same command goes on from the last whole checkpoint"
        )
    history, moving = json.loads((notes / "result.json").read_text(encoding="utf-8"))
    shutil.rmtree(notes)
    return history, moving


def wanted(configuration: Mapping[str, Any], environment: Mapping[str, str]) -> int:
    """How many processes a configuration means here: as many as it says on processors, at most one per GPU otherwise.

    Raises:   ValueError where it needs GPUs and there are none
    """
    asked = int(configuration["num_processes"])
    if configuration.get("use_cpu"):
        return asked
    nodes = int(environment.get("SLURM_JOB_NUM_NODES", "1"))
    if not torch.cuda.device_count():
        raise ValueError(
            "this fit is trained on GPUs and there are none here; `vlsafe dryrun` says what it costs, scale `mini` needs none"
        )
    return min(asked, torch.cuda.device_count()) * nodes


def command(configuration: Path, job: Path, many: int, environment: Mapping[str, str]) -> list[str]:
    """The command line that starts a training: on this machine, or once on every node of a Slurm job."""
    nodes = int(environment.get("SLURM_JOB_NUM_NODES", "1"))
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(configuration),
        "--num_processes",
        str(many),
    ]
    if nodes == 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        return [*launch, "--main_process_port", str(port), *WORKER, str(job)]
    port = 20000 + int(environment["SLURM_JOB_ID"]) % 20000
    launch += ["--num_machines", str(nodes), "--main_process_port", str(port)]
    launch += ["--main_process_ip", _first_host(environment["SLURM_JOB_NODELIST"])]
    rank = 'exec "$@" --machine_rank "$SLURM_NODEID" ' + " ".join([*WORKER, f"'{job}'"])
    return ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "bash", "-c", rank, "launch", *launch]


def _first_host(nodes: str) -> str:
    told = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    return told.stdout.split()[0]


def main(argv: list[str]) -> None:
    """One process of a launched training."""
    processes.die_with_parent()
    path, first = Path(argv[0]), os.environ.get("RANK", "0") == "0"

    def progress(step: int) -> None:
        if first:
            (path.parent / "step").write_text(str(step), encoding="utf-8")

    told = _work(Job.read(path), load_from_disk(path.parent / "data"), progress)
    if first:
        write_text(path.parent / "result.json", json.dumps(told))


if __name__ == "__main__":
    main(sys.argv[1:])
