"""Errors that the scheduler's next attempt cannot mend, and those that it can."""

import errno
import subprocess
from concurrent.futures.process import BrokenProcessPool

import filelock
import pytest
import torch

from vlsafe import cli
from vlsafe.core import failures
from vlsafe.study.study import Study

PASSING = [
    ConnectionAbortedError("the server is gone"), BrokenPipeError(), TimeoutError("late"), filelock.Timeout("a.lock"),
    MemoryError(), ChildProcessError("killed"), BrokenProcessPool(), OSError(errno.ENOSPC, "full"),
    OSError(errno.EIO, "disk"), torch.OutOfMemoryError("CUDA out of memory"), torch.AcceleratorError("a device is gone", 1),
    torch.distributed.DistBackendError("NCCL error"), RuntimeError("CUDA error: uncorrectable ECC error"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer"),
    RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed"),
]  # fmt: skip
LASTING = [
    ValueError("a number is wrong"), KeyError("backbone"), FileNotFoundError(errno.ENOENT, "no picture"), TypeError("None"),
    PermissionError(errno.EACCES, "locked"), NotImplementedError("not here"), RuntimeError("the weights are whole"),
    AssertionError(), subprocess.CalledProcessError(1, "git"),
]  # fmt: skip


@pytest.mark.parametrize("error", PASSING, ids=repr)
def test_another_try_may_mend_what_the_machine_lacked(error):
    assert failures.passing(error)


@pytest.mark.parametrize("error", LASTING, ids=repr)
def test_another_try_cannot_mend_a_mistake(error):
    assert not failures.passing(error)


@pytest.fixture
def tried(tmp_path, monkeypatch, capsys):
    """Try a stage that ends in an error: how often it was begun so far, and what the command said."""
    begun = []

    def attempt(error, number, seed=0):
        def folder(self, name):
            begun.append(name)
            raise error

        monkeypatch.setattr(Study, "folder", folder)
        line = ["stage", "base/llm", "parent/aligned", "--root", str(tmp_path), "--seed", str(seed), "--attempt", str(number)]
        try:
            code = cli.main(line)
        except Exception as raised:
            assert raised is error
            code = 1
        assert code
        return len(begun), capsys.readouterr().err

    return attempt


@pytest.mark.parametrize("error", [ValueError("the scale is wrong"), KeyError("backbone")], ids=repr)
def test_a_lasting_error_ends_later_attempts_at_once_with_its_words(tried, error):
    assert tried(error, 1)[0] == 1
    for number in (2, 3):
        count, words = tried(error, number)
        assert count == 1 and "not tried again" in words and f"{type(error).__name__}: {error}" in words and "Traceback" in words
    assert tried(error, 2, seed=1)[0] == 2, "another study's attempts are its own"
    assert tried(error, 1)[0] == 3, "a new call of the scheduler tries again"


def test_a_passing_error_is_tried_again_and_so_is_what_was_killed(tried, tmp_path):
    assert [tried(ConnectionAbortedError("gone"), number)[0] for number in (1, 2, 3)] == [1, 2, 3]
    assert tried(KeyboardInterrupt(), 1)[0] == 4
    assert tried(ConnectionAbortedError("gone"), 2)[0] == 5
    assert not list(tmp_path.rglob("*.failed"))


def test_a_note_of_other_runs_does_not_count(tried, tmp_path, monkeypatch):
    """As when the scale has been corrected between two attempts."""
    tried(ValueError("wrong"), 1)
    [note] = tmp_path.rglob("*.failed")
    note.write_text("0123456789abcdef 0123456789abcdef\nan older error")
    assert tried(ValueError("wrong"), 2)[0] == 2
