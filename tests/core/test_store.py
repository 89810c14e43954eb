import contextlib
import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
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


@pytest.mark.parametrize("harm", ["edit", "truncate", "remove", "manifest", "half manifest"])
def test_tampering_is_found_and_mended(tmp_path, harm):
    calls = []
    run = run_of(tmp_path)
    folder = store.ensure(run, maker(calls), print)
    file = folder / "sub" / "file.txt"
    {
        "edit": lambda: file.write_text("z"),
        "truncate": lambda: file.write_text(""),
        "remove": file.unlink,
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


def test_a_disk_that_takes_no_byte_costs_no_training(tmp_path, monkeypatch):
    """The note that says whose attempt it is stays what it was; the next call finds what the first one left."""
    run = run_of(tmp_path)

    def cut(work):
        (work / "checkpoint-50").write_text("hours")
        raise RuntimeError("cut")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(RuntimeError):
        store.ensure(run, cut, print)
    with monkeypatch.context() as context:
        context.setattr(store, "write_text", full)
        context.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="No space left"):
            store.ensure(run, maker([]), print)
    seen = []
    store.ensure(run, lambda work: seen.append((work / "checkpoint-50").read_text()), print)
    assert seen == ["hours"]


@pytest.mark.parametrize("files", [[], 3, {"sub/file.txt": {}}, {"sub/file.txt": "x"}])
def test_a_manifest_without_its_records_is_no_run(tmp_path, files):
    run = run_of(tmp_path)
    store.ensure(run, maker([]), print)
    manifest = json.loads((run.folder / store.MANIFEST).read_text())
    (run.folder / store.MANIFEST).write_text(json.dumps(manifest | {"files": files}))
    assert store.status(run) == "tampered" and not store.whole_run(run.folder)


def test_what_a_killed_removal_has_left_is_removed_by_the_next_one(tmp_path):
    run = run_of(tmp_path)
    store.ensure(run, maker([]), print)
    os.rename(run.folder, run.folder.with_name("r.doomed"))  # a kill came here
    store.forget(run)
    assert [path.name for path in run.folder.parent.iterdir() if not path.name.endswith(".lock")] == []


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


def test_older_code_is_mentioned_once_in_a_process(tmp_path, monkeypatch):
    """After a change of the code every run is older: a line for each would hide everything else."""
    said = []
    monkeypatch.setattr(store, "_NOTIFIED", set())
    runs = [run_of(tmp_path, recipe=recipe) for recipe in "ab"]
    for run in runs:
        store.ensure(run, maker([]), said.append)
    monkeypatch.setattr(store, "source_digest", lambda: "other")
    for run in runs * 3:
        store.ensure(run, maker([]), said.append)
    assert len(said) == 1 and "st/a: made by older code" in said[0]


def test_what_others_put_into_a_run_is_named_ignored_and_never_lost(tmp_path):
    calls, said = [], []
    run = run_of(tmp_path)
    folder = store.ensure(run, maker(calls), said.append)
    for name in (".DS_Store", "sub/.nfs0001", ".ipynb_checkpoints/a-checkpoint.ipynb", "sub/notes.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("mine")
    assert store.status(run, deep=True) == "valid" and store.foreign(run)[-1] == "sub/notes.txt"
    store.ensure(run, maker(calls), said.append)
    assert calls == ["x"] and len(said) == 1 and "not its own, and ignored: .DS_Store, " in said[0]
    other = run_of(tmp_path, params={"a": 2})
    store.ensure(other, maker(calls, "y"), said.append)
    assert store.foreign(other) == [] and "sub/notes.txt, not its own, moved to r.foreign" in said[-1]
    assert (folder.with_name("r.foreign") / "sub" / "notes.txt").read_text() == "mine"


def test_files_of_others_are_never_written_over(tmp_path):
    said = []
    for number, text in enumerate(("week 1", "week 2", "week 3")):
        folder = store.ensure(run_of(tmp_path, params={"a": number}), maker([]), said.append)
        (folder / "notes.md").write_text(text)
    store.ensure(run_of(tmp_path, params={"a": 9}), maker([]), said.append)
    kept = sorted((path.name, path.read_text()) for path in folder.with_name("r.foreign").iterdir())
    assert kept == [("notes.md", "week 1"), ("notes.md.2", "week 2"), ("notes.md.3", "week 3")]


def test_a_run_is_replaced_only_by_a_finished_one(tmp_path):
    """A number is edited, and the machine cannot make the new run: with the old number the old one is there."""
    run, calls = run_of(tmp_path), []
    store.ensure(run, maker(calls), print)

    def broken(work):
        raise ValueError("no GPU here")

    with pytest.raises(ValueError, match="no GPU here"):
        store.ensure(run_of(tmp_path, params={"a": 2}), broken, lambda text: None)
    assert store.status(run, deep=True) == "valid"
    store.ensure(run, maker(calls), print)
    assert calls == ["x"]


def test_what_another_process_makes_is_not_removed(tmp_path):
    run = run_of(tmp_path)
    store.ensure(run, maker([]), print)
    with store.alone(run.folder), pytest.raises(ValueError, match="st/r is being made by another process"):
        store.forget(run)
    assert store.status(run) == "valid"
    store.forget(run)
    assert store.status(run) == "missing"
    store.forget(run_of(tmp_path / "nowhere"))


def test_what_a_viewer_leaves_while_a_run_is_made_is_no_part_of_it(tmp_path):
    def make(work):
        (work / "a").write_text("1")
        (work / ".DS_Store").write_text("2")

    run = run_of(tmp_path)
    folder = store.ensure(run, make, print)
    (folder / ".DS_Store").write_text("changed")
    assert list(store.manifest_of(run)["files"]) == ["a"] and store.status(run, deep=True) == "valid"


def test_an_attempt_with_other_numbers_is_kept_and_gone_on_from(tmp_path):
    """A number that is corrected after hours of training, and set back, costs no training."""
    said, seen = [], []

    def cut(work):
        (work / "step-3").write_text("trained")
        raise RuntimeError("cut")

    with pytest.raises(RuntimeError):
        store.ensure(run_of(tmp_path), cut, said.append)
    store.ensure(run_of(tmp_path, params={"a": 2}), maker([]), said.append)
    assert "an attempt with other numbers is kept as r.partial." in said[-1]
    store.ensure(run_of(tmp_path), lambda work: seen.append((work / "step-3").read_text()), said.append)
    assert seen == ["trained"] and not list(tmp_path.rglob("*.partial*"))
    with pytest.raises(RuntimeError):
        store.ensure(run_of(tmp_path, params={"a": 3}), cut, said.append)
    store.ensure(run_of(tmp_path, params={"a": 4}), maker([]), said.append)
    store.forget(run_of(tmp_path, params={"a": 4}))
    assert not list(tmp_path.rglob("*.partial*"))


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_valid_run_of_a_store_that_cannot_be_written_is_used(tmp_path, monkeypatch, code):
    """Root may write anywhere, so the refusals of the system are put in by hand; the next test has a real one."""
    calls = []
    run = run_of(tmp_path)
    store.ensure(run, maker(calls), print)

    def refuse(*_, **__):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(store, "FileLock", refuse)
    run.receipt.unlink()
    assert store.ensure(run, maker(calls), print) == run.folder and calls == ["x"]
    with pytest.raises(OSError, match=os.strerror(code)):
        store.ensure(run_of(tmp_path, params={"a": 2}), maker(calls), print)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become nobody")
def test_nobody_reads_the_valid_runs_of_somebody_else():
    root = Path(tempfile.mkdtemp(dir="/tmp"))
    run = run_of(root)
    store.ensure(run, maker([]), print)
    for path in (root, *root.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    child = os.fork()
    if not child:
        code = 1
        with contextlib.suppress(BaseException):
            os.setuid(65534)
            code = 0 if store.ensure(run, lambda work: None, lambda text: None) == run.folder else 2
        os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    shutil.rmtree(root)


def test_a_failed_write_leaves_the_old_file_and_nothing_beside(tmp_path):
    path = tmp_path / "f"
    store.write_text(path, "old")
    (tmp_path / "f.tmp").write_text("a user's")
    with pytest.raises(UnicodeEncodeError):
        store.write_text(path, "new \ud800")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"f": "old", "f.tmp": "a user's"}


def test_what_is_no_file_is_not_replaced_and_no_link_is_followed(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "device")
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(ValueError, match="device is no file"):
        store.write_text(tmp_path / "device", "new")
    assert (tmp_path / "device").is_fifo()
    store.write_text(tmp_path / "link", "new")
    assert [(tmp_path / name).read_text() for name in ("link", "real")] == ["new", "old"], "a run links a user's model"

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: .*real2"):
        store.write_text(tmp_path / "real2", "new")
    assert {path.name for path in tmp_path.iterdir()} == {"device", "link", "real"}


@pytest.mark.parametrize("name", [store.WORK, "a user's"])
def test_only_what_a_killed_attempt_has_left_is_removed(tmp_path, name):
    left = tmp_path / "out.partial" / name / "file"
    left.parent.mkdir(parents=True)
    left.write_text("half")
    if name == store.WORK:
        with store.whole(tmp_path / "out") as work:
            (work / "file").write_text("whole")
        assert not left.parent.parent.exists() and (tmp_path / "out" / "file").read_text() == "whole"
    else:
        with pytest.raises(ValueError, match=r"out.partial is not what a killed attempt has left; move it away"):
            store.whole(tmp_path / "out").__enter__()
        assert left.read_text() == "half" and not (tmp_path / "out").exists()


def test_of_two_that_write_one_folder_the_second_is_told(tmp_path):
    """It waits for the first, finds its folder and names that, not the one that it would have worked in."""
    said = []

    def second():
        with pytest.raises(ValueError, match=r"out exists; choose another place, or remove it") as refused:
            store.whole(tmp_path / "out").__enter__()
        said.append(str(refused.value))

    with store.whole(tmp_path / "out") as work:
        (work / "file").write_text("first")
        other = threading.Thread(target=second)
        other.start()
        other.join(0.3)
        assert other.is_alive() and not said
    other.join(10)
    assert said and (tmp_path / "out" / "file").read_text() == "first" and not (tmp_path / "out.partial").exists()


def test_a_kill_after_the_last_file_costs_nothing(tmp_path, monkeypatch):
    """Before the renaming the work is gone on from, after it and before the note is removed the run is there."""
    for dies, again in (("rename", ["x", "x"]), ("unlink", ["x"])):
        run, calls = run_of(tmp_path / dies), []
        with monkeypatch.context() as patch:
            patch.setattr(store.Path if dies == "unlink" else store.os, dies, lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                store.ensure(run, maker(calls), print)
        folder = store.ensure(run, lambda work, to=calls: to.append((work / "sub/file.txt").read_text()), print)
        assert store.status(run, deep=True) == "valid" and store.foreign(run) == [], list(folder.iterdir())
        assert calls == again


def test_a_copy_inside_another_repository_is_of_no_commit(tmp_path):
    """Unpacked from a zip: the repository around it knows nothing of it, whether or not the copy is at its top."""
    git = ["git", "-c", "user.name=n", "-c", "user.email=e@x", "-C", tmp_path]
    (tmp_path / "a").write_text("1")
    for call in (["init", "-q"], ["add", "a"], ["commit", "-qm", "m"]):
        subprocess.run([*git, *call], check=True)
    project = Path(store.__file__).parents[2]
    for place in (tmp_path / "copy", tmp_path):
        shutil.copytree(project / "vlsafe", place / "vlsafe", ignore=shutil.ignore_patterns("__pycache__"))
        code = "from vlsafe.core import store; print(store.PROJECT, store.commit())"
        call = [sys.executable, "-c", code]
        environment = {**os.environ, "PYTHONPATH": str(place), "GIT_DIR": str(tmp_path / ".git")}
        done = subprocess.run(call, cwd=place, env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.split() == [str(place), "None"]
