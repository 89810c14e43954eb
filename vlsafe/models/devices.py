"""Where models compute: decided here and nowhere else, for this process and for the processes that it starts."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from vlsafe.core.scale import Scale, known

DEVICES = ("", "cpu", "cuda")  # empty: a GPU where there is one
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
    import torch

    wanted = os.environ.get(VARIABLE, "")
    if wanted == "cpu":
        return wanted
    here = torch.cuda.is_available()
    if wanted == "cuda" and not here:
        raise ValueError("the scale says `device: cuda` and there is no GPU here; leave it empty, or say `device: cpu`")
    return "cuda" if here else "cpu"


def memory() -> int:
    """Bytes of memory of the GPU on which models compute now; 0 where they compute on the CPU."""
    import torch

    return torch.cuda.get_device_properties().total_memory if device() == "cuda" else 0


def gpus() -> int:
    """How many GPUs a training may use now: those that are visible, none where models compute on the CPU."""
    import torch

    return 0 if os.environ.get(VARIABLE) == "cpu" else torch.cuda.device_count()
