"""Errors that no other try can mend: the scheduler's next attempt ends at once with the same words.

A scheduler tries again what was killed, ran into its time limit or lost its machine, and cannot tell that from an error. So a
job that ends in a lasting error leaves a note beside its first run, which later attempts find. The first attempt of a new call of
the scheduler does not look at it.
"""

from __future__ import annotations

import errno
import re
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import BrokenExecutor
from contextlib import contextmanager

from vlsafe.core.store import Run, write_text

PASSING = (ConnectionError, TimeoutError, MemoryError, ChildProcessError, BrokenExecutor)  # filelock's Timeout is a TimeoutError
MACHINES = {errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EIO, errno.ESTALE, errno.EAGAIN, errno.EMFILE, errno.ENFILE}
TORCH = {"OutOfMemoryError", "AcceleratorError", "DistError"}  # by name: most commands do without torch
# What libraries report as a plain RuntimeError: memory of the host, a process or a device that is gone.
WORDS = re.compile(r"out of memory|can't allocate memory|CUDA error|NCCL|gloo|DataLoader worker|Connection (closed|reset)", re.I)

LONGEST = 900  # characters of a line of an error; assumed


def passing(error: BaseException) -> bool:
    """Whether another try may end otherwise: a connection, a process, memory, room on a disk or a lock was lacking."""
    if isinstance(error, PASSING) or (isinstance(error, OSError) and error.errno in MACHINES):
        return True
    named = TORCH & {kind.__name__ for kind in type(error).__mro__}
    return bool(named) or (type(error) is RuntimeError and WORDS.search(str(error)) is not None)


@contextmanager
def lasting(runs: Sequence[Run], attempt: int) -> Iterator[None]:
    """Make the runs of a job, which the scheduler tries for the `attempt`-th time, counted from 1.

    Raises:   ValueError where an earlier attempt at the same runs ended in an error that no other try can mend
    """
    note = runs[0].folder.with_name(f"{runs[0].recipe}.failed")
    identity = " ".join(run.digest for run in runs) + "\n"
    if attempt <= 1:
        note.unlink(missing_ok=True)
    elif note.exists() and (text := note.read_text(encoding="utf-8")).startswith(identity):
        text = text.removeprefix(identity)
        raise ValueError(f"the first attempt ended so:\n{text}\nIt is not tried again, since another try would end the same")
    try:
        yield
    except Exception as error:
        if not passing(error):
            note.parent.mkdir(parents=True, exist_ok=True)
            write_text(note, identity + "".join(traceback.format_exception(error)).rstrip())
        raise


def shortened(line: str) -> str:
    """A line of an error, without the middle where it quotes a damaged file without end."""
    return line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} … {line[-LONGEST // 3 :]}"
