"""What stands between the run store and Snakemake: stale receipts, and the lock that a killed scheduler leaves behind."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from vlsafe.core import store
from vlsafe.study.graph import planned
from vlsafe.study.study import Study


def sweep(studies: Iterable[Study], deep: bool = False) -> Iterator[str]:
    """Remove the receipts of runs that are not valid, so that the scheduler makes those again; one line for each."""
    for study in studies:
        for name in planned(study, "full"):
            run = study.run(name)
            if run.receipt.exists() and (status := store.status(run, deep)) != "valid":
                run.receipt.unlink()
                yield f"{study.backbone} seed {study.seed} {name}: {status}, will be made again"


def unlock(folder: Path) -> None:
    """Remove the lock of a killed Snakemake from `folder`, and note the caller's parent as the owner of the next one.

    Raises:   ValueError where the owner of the lock is alive
    """
    owner = folder / ".snakemake" / "owner"
    if owner.exists() and _alive(int(owner.read_text())):
        raise ValueError(f"another `make reproduce` (process {owner.read_text()}) is at work here; wait for it or stop it")
    for lock in (folder / ".snakemake" / "locks").glob("*"):
        lock.unlink()
    owner.parent.mkdir(exist_ok=True)
    owner.write_text(str(os.getppid()))


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except OSError as error:  # there is none, or it is somebody else's
        return isinstance(error, PermissionError)
    return process != os.getppid()
