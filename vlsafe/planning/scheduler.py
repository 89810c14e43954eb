"""What stands between the run store and Snakemake: stale receipts, what is valid, and the lock of a killed scheduler."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from vlsafe.core import store
from vlsafe.study.graph import STAGES, planned
from vlsafe.study.study import Study


def sweep(studies: Iterable[Study], deep: bool = False) -> Iterator[str]:
    """Remove the receipts of runs that are not valid, so that the scheduler makes those again; one line for each."""
    for study in studies:
        for name in planned(study, "full"):
            run = study.run(name)
            if run.receipt.exists() and (state := store.status(run, deep)) != "valid":
                run.receipt.unlink()
                yield f"{study.backbone} seed {study.seed} {name}: {state}, will be made again"


def status(studies: Iterable[Study], deep: bool = False) -> Iterator[str]:
    """One line for every stage of every study: whether its run is valid, or why the scale does without it."""
    for study in studies:
        reasons = study.left_out() | study.left_out("full")
        own = {*reasons, *planned(study), *planned(study, "full")}
        for name in (name for name in STAGES if name in own):
            state = "left out" if name in reasons else store.status(study.run(name), deep)
            others = "" if state in ("left out", "missing") else ", ".join(store.foreign(study.run(name)))
            more = f": {reasons[name]}" if name in reasons else f", with files that are not its own: {others}" if others else ""
            yield f"{state:15s} {study.backbone} seed {study.seed} {name}{more}"


def unlock(folder: Path, command: Sequence[str] = ()) -> None:
    """Remove the lock of a killed Snakemake from `folder`, and become `command`, the next one, which holds ours until it ends.

    Ours is the kernel's lock on a file: it ends with its owner, whatever kills it, and is seen from other PID namespaces. What
    the file says is for the message alone.

    Raises:   ValueError where somebody holds it
    """
    (folder / ".snakemake").mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / ".snakemake" / "owner", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.read(handle, 20).decode("ascii", "replace").strip()
        which = f" (process {owner})" if owner.isdigit() else ""
        raise ValueError(f"another `make reproduce`{which} is at work here; wait for it or stop it") from None
    except OSError as error:
        sys.stderr.write(f"{folder} keeps no locks ({error.strerror}): Snakemake's own stays; `snakemake --unlock` removes it\n")
    else:
        for lock in (folder / ".snakemake" / "locks").glob("*"):
            lock.unlink()
    if command:
        os.ftruncate(handle, 0)
        with contextlib.suppress(OSError):  # a full disk: the lock holds without its note
            os.write(handle, str(os.getpid()).encode())
        os.set_inheritable(handle, True)
        os.execvp(command[0], list(command))
    os.close(handle)
