"""Where models compute: decided here and nowhere else, for this process and for the processes that it starts."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import re
import socket
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

import torch
from filelock import FileLock, Timeout

from vlsafe.core.scale import Scale, known

DEVICES = ("", "cpu", "cuda")  # empty: a GPU where there is one
VISIBLE = "CUDA_VISIBLE_DEVICES"
VARIABLE = "VLSAFE_DEVICE"  # processes of a launched training inherit it


@contextlib.contextmanager
def chosen_by(scale: Scale) -> Iterator[None]:
    """Compute where a scale says: its `device`; without one, models that are built stay on the CPU, which is faster for models
    that small, and loaded ones go to a GPU where there is one.

    Raises:   ValueError for an unknown device
    """
    before = os.environ.get(VARIABLE)
    wanted = known(scale.device, DEVICES, "device") or ("cpu" if scale.source == "build" else "")
    os.environ[VARIABLE] = wanted
    try:
        yield
    finally:
        os.environ.pop(VARIABLE) if before is None else os.environ.update({VARIABLE: before})


def device() -> str:
    """Where a model is to compute now, "cuda" or "cpu".

    Raises:   ValueError where that is to be a GPU and there is none
    """
    wanted = os.environ.get(VARIABLE, "")
    if wanted == "cpu":
        return wanted
    here = torch.cuda.is_available()
    if wanted == "cuda" and not here:
        raise ValueError("the scale says `device: cuda` and there is no GPU here; leave it empty, or say `device: cpu`")
    return "cuda" if here else "cpu"


def memory() -> int:
    """Bytes of memory of the GPU on which models compute now; 0 where they compute on the CPU."""
    return torch.cuda.get_device_properties().total_memory if device() == "cuda" else 0


def gpus() -> int:
    """How many GPUs a training may use now: those that are visible, none where models compute on the CPU."""
    return 0 if os.environ.get(VARIABLE) == "cpu" else torch.cuda.device_count()


@contextlib.contextmanager
def claimed(many: int, folder: Path) -> Iterator[None]:
    """Reserve GPUs that no other stage of this run store uses: Snakemake knows how many are free, not which.

    They are chosen from those that are visible: of more than `many` as many as are free, of fewer all, since a launched training
    starts at most one process per GPU and its steps keep their rows. What a cluster's job sees, if it is no more than `many`, is
    its own already, and other jobs may know other GPUs by the same numbers: nothing is locked then.

    Raises:   ValueError where no GPU is visible; TimeoutError where too many are taken
    """
    if not many:
        yield
        return
    here = _visible()
    if not here:
        raise ValueError(f"{many} GPUs are needed and none is here; `device: cpu` in the scale computes without")
    with contextlib.ExitStack() as held:
        mine = here if VISIBLE in os.environ and len(here) <= many else _free(here, many, folder, held)
        if len(mine) < min(many, len(here)):
            raise TimeoutError(f"{many} GPUs are needed and only {len(mine)} of {len(here)} are free in this run store")
        held.enter_context(mock.patch.dict(os.environ, {VISIBLE: ",".join(mine)}))
        yield


def _visible() -> list[str]:
    """The GPUs that CUDA would show to this process, as their numbers or identifiers; it stops at the first that is neither."""
    if (listed := os.environ.get(VISIBLE)) is None:
        return [str(number) for number in range(torch.cuda.device_count())]
    names = [name.strip() for name in listed.split(",")]
    return list(itertools.takewhile(re.compile(r"\d+|(GPU|MIG)-.+").fullmatch, names))


def _free(here: Sequence[str], many: int, folder: Path, held: contextlib.ExitStack) -> list[str]:
    """Up to `many` GPUs that no other process has locked; they are locked until `held` closes."""
    folder.mkdir(parents=True, exist_ok=True)
    mine: list[str] = []
    for name in here:
        if len(mine) < many:
            with contextlib.suppress(Timeout):
                held.enter_context(FileLock(str(folder / f".gpu-{_identity(name)}.lock")).acquire(blocking=False))
                mine.append(name)
    return mine


def _identity(name: str) -> str:
    """What a GPU is called by every job that sees it: the machine, and its UUID where the driver says one, else its number."""
    return f"{socket.gethostname()}-{next((uuid for key, uuid in _uuids() if key == name or uuid.startswith(name)), name)}"


@functools.cache
def _uuids() -> list[tuple[str, str]]:
    """Number and UUID of every GPU. Asked of the driver's command: with CUDA the choice of GPUs would come too late."""
    try:
        query = ["nvidia-smi", "--query-gpu=index,uuid", "--format=csv,noheader"]
        listed = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [(number.strip(), uuid.strip()) for number, _, uuid in (line.partition(",") for line in listed.splitlines())]
