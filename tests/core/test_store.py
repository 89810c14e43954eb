import errno
import json
import os
from pathlib import Path

import pytest

from vlsafe.core import store
from vlsafe.core.store import Run


def run_of(root: Path, **changes) -> Run:
    fields = dict(root=root, scale="s", backbone="b", seed=0, stage="st", recipe="r", version=1, params={"a": 1}, inputs={})
    return Run(**{**fields, **changes})


def maker(calls, text="x"):
    def make(work):
        calls.append(text)
        (work / "sub").mkdir(exist_ok=True)
        (work / "sub" / "file.txt").write_text(text)
        return {"n": len(calls)}

    return make


def test_a_valid_run_is_made_once_and_a_changed_one_again(tmp_path):
    calls, said = [], []
    run = run_of(tmp_path)
    assert store.status(run) == "missing"
    store.ensure(run, maker(calls), said.append)
    store.ensure(run, maker(calls), said.append)
    assert calls == ["x"] and store.status(run, deep=True) == "valid" and run.receipt.exists()
    changed = run_of(tmp_path, params={"a": 2})
    assert store.status(changed) == "stale"
    store.ensure(changed, maker(calls, "y"), said.append)
    assert calls == ["x", "y"] and "stale" in said[0]
    assert run_of(tmp_path, version=2).digest != run.digest != run_of(tmp_path, inputs={"i": "d"}).digest


@pytest.mark.parametrize("harm", ["edit", "truncate", "remove", "add", "manifest", "half manifest"])
def test_tampering_is_found_and_mended(tmp_path, harm):
    calls = []
    run = run_of(tmp_path)
    folder = store.ensure(run, maker(calls), print)
    file = folder / "sub" / "file.txt"
    {
        "edit": lambda: file.write_text("z"),
        "truncate": lambda: file.write_text(""),
        "remove": file.unlink,
        "add": lambda: (folder / "more").write_text("1"),
        "manifest": (folder / "manifest.json").unlink,
        "half manifest": lambda: (folder / "manifest.json").write_text('{"digest": "'),
    }[harm]()
    assert store.status(run) == "tampered"
    store.ensure(run, maker(calls), lambda text: None)
    assert store.status(run, deep=True) == "valid" and file.read_text() == "x" and len(calls) == 2


def test_touching_or_copying_is_not_tampering_and_bit_rot_is_found_when_deep(tmp_path):
    run = run_of(tmp_path)
    file = store.ensure(run, maker([]), print) / "sub" / "file.txt"
    os.utime(file)
    assert store.status(run) == "valid"
    kept = json.loads((run.folder / "manifest.json").read_text())["files"]["sub/file.txt"]["mtime_ns"]
    file.write_text("q")
    os.utime(file, ns=(kept, kept))
    assert store.status(run) == "valid" and store.status(run, deep=True) == "tampered"


def test_a_full_disk_leaves_nothing_that_looks_complete(tmp_path):
    run = run_of(tmp_path)

    def full(work):
        (work / "big").write_text("half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        store.ensure(run, full, print)
    assert store.status(run) == "missing" and not run.folder.exists() and not run.receipt.exists()
    store.ensure(run, maker([]), print)
    assert store.status(run, deep=True) == "valid"


def test_leftovers_of_other_parameters_are_not_continued(tmp_path):
    seen = []

    def cut(work):
        (work / "left").write_text("over")
        raise RuntimeError("cut")

    def look(work):
        seen.append((work / "left").exists())

    for params, expected in (({"a": 1}, True), ({"a": 2}, False)):
        with pytest.raises(RuntimeError):
            store.ensure(run_of(tmp_path, params={"a": 1}), cut, print)
        store.ensure(run_of(tmp_path, params=params), look, print)
        assert seen.pop() is expected
        store.forget(run_of(tmp_path, params=params))


def test_empty_tables_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no rows"):
        store.write_rows(tmp_path / "t.parquet", [])


def test_older_code_is_mentioned_once_per_run_and_process(tmp_path, monkeypatch):
    said = []
    runs = [run_of(tmp_path, recipe=recipe) for recipe in "ab"]
    for run in runs:
        store.ensure(run, maker([]), said.append)
    monkeypatch.setattr(store, "source_digest", lambda: "other")
    for run in runs * 3:
        store.ensure(run, maker([]), said.append)
    assert len(said) == 2 and all("made by older code" in text for text in said) and "st/b" in said[1]
