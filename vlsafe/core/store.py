"""The run store: run folders, manifests, digests, atomic completion, locks.

A run is the result of one stage. It is valid when its manifest has the digest that the stage expects now and its files are
unchanged. Work happens in `<recipe>.partial`, which is renamed last: a folder without that suffix is complete or has been
tampered with. The store decides what is valid, the scheduler only the order.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import functools
import glob
import hashlib
import importlib.metadata
import itertools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from vlsafe.core import texts
from vlsafe.core.scale import alike
from vlsafe.core.writing import (
    MANIFEST,
    WORK,
    file_digest,
    file_digests,
    parts,
    read_rows,
    recorded_digest,
    refuse_inputs,
    sync,
    whole,
    whole_lines,
    write_bytes,
    write_rows,
    write_stream,
    write_text,
)  # fmt: skip

NOTE, OWNER = ".digest", "scale.json"
RECORDED = {"bytes", "mtime_ns", "sha256"}  # of every file, in a manifest
ELSEWHERE = "elsewhere"  # in a manifest: files that `publish.archive` has left where the run was made
FULL = 16 * 2**20  # bytes; with less free, any error is reported as a full disk: libraries word it in many ways
PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "tokenizers", "numpy", "pillow")
UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)  # of a place that can still be read
SHOWN = 5  # names in a message
PROJECT = Path(__file__).resolve().parents[2]
version = functools.cache(importlib.metadata.version)  # of an installed package
_NOTIFIED: set[Path | str] = set()  # runs of which this process has said what is to be said, and older code
Status = Literal["valid", "without weights", "missing", "stale", "tampered"]  # the second: as `publish.archive` leaves it


@dataclass(frozen=True)
class Run:
    """The place of a stage's result and what identifies it; `recipe` distinguishes the runs of one stage.

    `inputs` maps a name to the digest of another run; `params` are the resolved numbers that the result depends on.
    """

    root: Path
    scale: str
    backbone: str
    seed: int
    stage: str
    recipe: str
    version: int
    params: Mapping[str, Any]
    inputs: Mapping[str, str]

    @property
    def folder(self) -> Path:
        """The finished run."""
        return self.root / self.scale / self.backbone / f"seed{self.seed}" / self.stage / self.recipe

    @property
    def partial(self) -> Path:
        """The run while it is being computed."""
        return self.folder.with_name(self.folder.name + ".partial")

    @property
    def receipt(self) -> Path:
        """A copy of the manifest beside the folder, for the scheduler, which may delete it without harm."""
        return self.folder.with_name(self.folder.name + ".json")

    @property
    def digest(self) -> str:
        """Identity of the result: stage, version, parameters, seed, inputs."""
        identity = [self.stage, self.recipe, self.version, self.seed, self.backbone, self.params, dict(self.inputs)]
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def status(run: Run, deep: bool = False) -> Status:
    """Whether a run can be used. Files are compared by size and time, by content where the time differs or when `deep`."""
    manifest = read_manifest(run)
    if manifest is None:
        return "tampered" if run.folder.exists() else "missing"
    if manifest.get("digest") != run.digest:
        return "stale"
    for name, record in manifest["files"].items():
        path = run.folder / name
        if not path.is_file():
            return "tampered"
        stat = path.stat()
        changed = deep or stat.st_mtime_ns != record["mtime_ns"]
        if stat.st_size != record["bytes"] or (changed and file_digest(path) != record["sha256"]):
            return "tampered"
    return "without weights" if manifest.get(ELSEWHERE) else "valid"


def readable(run: Run) -> bool:
    """Whether the results of a finished run are here, with or without what they were made from."""
    return status(run) in ("valid", "without weights")


def foreign(run: Run) -> list[str]:
    """Files in a finished run that are not its own, such as `.DS_Store` or a user's notes: nothing reads or judges them."""
    own = {MANIFEST, NOTE, *(read_manifest(run) or {"files": ()})["files"]}
    return sorted(
        str(path.relative_to(run.folder)) for path in _files(run.folder) if str(path.relative_to(run.folder)) not in own
    )


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


def _of_system(name: Path) -> bool:
    """Whether a file system or a viewer has left a file: `.nfs…`, `.DS_Store`, `.ipynb_checkpoints/…`, `Thumbs.db`."""
    return any(part.startswith(".") or part in ("Thumbs.db", "desktop.ini") for part in name.parts)


def read_manifest(run: Run) -> dict[str, Any] | None:
    """The manifest of a finished run, or None where there is none that can be read."""
    return _manifest_in(run.folder)


def _manifest_in(folder: Path) -> dict[str, Any] | None:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return None
    files = manifest.get("files") if isinstance(manifest, dict) and "digest" in manifest else None
    sound = isinstance(files, dict) and all(isinstance(of, dict) and set(of) >= RECORDED for of in files.values())
    return manifest if sound else None


def whole_run(folder: Path) -> bool:
    """Whether a folder holds a run with the files that its manifest lists, by their content."""
    files = (_manifest_in(folder) or {}).get("files")
    return isinstance(files, dict) and all(
        (folder / name).is_file() and file_digest(folder / name) == record["sha256"] for name, record in files.items()
    )


def manifest_of(run: Run) -> dict[str, Any]:
    """The manifest of a finished run.

    Raises:   FileNotFoundError where there is none that can be read
    """
    manifest = read_manifest(run)
    if manifest is None:
        name = f"{run.stage}/{run.recipe} of {run.backbone} seed {run.seed}"
        raise FileNotFoundError(f"{name} is not there; `vlsafe stage` makes it")
    return manifest


def ensure(run: Run, make: Callable[[Path], Mapping[str, Any] | None], say: Callable[[str], object]) -> Path:
    """The folder of a valid run, computed first if it is missing.

    `make` gets the `.partial` folder, which may hold files of a killed attempt of the *same* digest, and returns numbers for
    the manifest. One process computes a run at a time; others wait for it.

    Raises:   whatever `make` raises; the partial folder then stays, without looking complete
    """
    state: Status = "valid"
    try:
        run.folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(str(run.folder) + ".lock"):
            if (state := status(run)) != "valid":
                if state != "missing":
                    say(f"{run.stage}/{run.recipe}: the run on disk is {state}; making it again")
                _make(run, make, say)
            manifest = (run.folder / MANIFEST).read_text(encoding="utf-8")
            if not run.receipt.exists() or run.receipt.read_text(encoding="utf-8") != manifest:
                write_text(run.receipt, manifest)
    except OSError as error:
        if error.errno not in UNWRITABLE or status(run) != "valid":
            raise
    if state == "valid":
        _notify(run, say)
    return run.folder


def _notify(run: Run, say: Callable[[str], object]) -> None:
    """Say once in a process which files in a run are not its own, and of the first run of older code that it is."""
    if run.folder in _NOTIFIED:
        return
    if (made_by := manifest_of(run)["source"]) not in {source_digest(), *_NOTIFIED}:
        name = f"{run.stage}/{run.recipe}"
        say(f"{name}: made by older code ({made_by}), as other runs may be; `vlsafe fresh {name}` removes it")
    _NOTIFIED.update((run.folder, made_by))
    if names := foreign(run):
        say(f"{run.stage}/{run.recipe}: not its own, and ignored: {', '.join(names[:SHOWN])}{', …' * (len(names) > SHOWN)}")


def _make(run: Run, make: Callable[[Path], Mapping[str, Any] | None], say: Callable[[str], object]) -> None:
    work, note = run.partial, run.partial / NOTE
    if work.exists() and (not note.exists() or note.read_text(encoding="utf-8") != run.digest):
        _put_aside(run, say)
    if not work.exists() and (kept := _aside(run, run.digest)).exists():
        os.rename(kept, work)
    work.mkdir(exist_ok=True)
    started = time.monotonic()
    try:
        if not note.exists():  # never written twice: an attempt whose note is lost counts as another's
            write_text(note, run.digest)
        numbers = make(work)
        write_text(work / MANIFEST, json.dumps(_manifest(run, work, numbers, time.monotonic() - started), indent=1))
    except Exception as error:
        if (free := shutil.disk_usage(run.root).free) < FULL:
            message = (
                f"the run store's disk is full ({free / 1e6:.0f} MB free) and {run.stage}/{run.recipe} stopped; make room and "
                "run the same command again, it goes on from what is complete"
            )
            raise OSError(errno.ENOSPC, message) from error
        raise
    _discard(run, say)  # an older run stays until there is something in its place
    os.rename(work, run.folder)
    (run.folder / NOTE).unlink()  # last: a kill while digests are taken, which takes minutes, must not cost a training
    sync(run.folder.parent)


def _aside(run: Run, digest: str) -> Path:
    return run.partial.with_name(f"{run.partial.name}.{digest}")


def _put_aside(run: Run, say: Callable[[str], object]) -> None:
    """Keep what an attempt with other numbers has left: it may be hours of training, to go on from with these numbers again."""
    note = run.partial / NOTE
    digest = note.read_text(encoding="utf-8") if note.exists() else ""
    if re.fullmatch("[0-9a-f]{16}", digest) and any(path.name != NOTE for path in _files(run.partial)):
        kept = _aside(run, digest)
        shutil.rmtree(kept, ignore_errors=True)
        os.rename(run.partial, kept)
        say(f"{run.stage}/{run.recipe}: an attempt with other numbers is kept as {kept.name}; `vlsafe fresh` removes it")
    else:
        shutil.rmtree(run.partial)


def _discard(run: Run, say: Callable[[str], object]) -> None:
    """Remove a run so that a kill in the middle leaves no folder that looks complete; what others put there goes beside it."""
    if not run.folder.exists():
        return
    others = [Path(name) for name in foreign(run) if read_manifest(run) and not _of_system(Path(name))]
    beside = run.folder.with_name(f"{run.folder.name}.foreign")
    for name in others:
        (beside / name).parent.mkdir(parents=True, exist_ok=True)
        os.rename(run.folder / name, free(beside / name))
    if others:
        say(f"{run.stage}/{run.recipe}: {', '.join(map(str, others[:SHOWN]))}, not its own, moved to {beside.name}")
    shutil.rmtree(doomed := _doomed(run), ignore_errors=True)
    os.rename(run.folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)  # on NFS a file that somebody reads stays as .nfs…


def _doomed(run: Run) -> Path:
    return run.folder.with_name(f"{run.folder.name}.doomed")


def free(path: Path) -> Path:
    """A path, or the first numbered one beside it that nobody uses."""
    numbered = (path.with_name(f"{path.name}.{number}") for number in itertools.count(2))
    return path if not path.exists() else next(other for other in numbered if not other.exists())


def _manifest(run: Run, work: Path, numbers: Mapping[str, Any] | None, seconds: float) -> dict[str, Any]:
    files, paths = {}, sorted(p for p in _files(work) if p.name != MANIFEST and not _of_system(p.relative_to(work)))
    for path, digest in zip(paths, file_digests(paths), strict=True):
        sync(path)
        stat = path.stat()
        files[str(path.relative_to(work))] = {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": digest}
    return {
        "digest": run.digest, "stage": run.stage, "recipe": run.recipe, "version": run.version, "scale": run.scale,
        "backbone": run.backbone, "seed": run.seed, "params": run.params, "inputs": dict(run.inputs),
        "numbers": dict(numbers or {}), "seconds": round(seconds, 2), "source": source_digest(), **environment(),
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "files": files,
    }  # fmt: skip


@lru_cache(maxsize=1)
def environment() -> dict[str, Any]:
    """Commit, package versions, processor: what else a result may depend on. No path, no host name."""
    return {
        "commit": commit(), "packages": {name: version(name) for name in PACKAGES},
        "python": platform.python_version(), "machine": platform.machine(), "threads": os.environ.get("OMP_NUM_THREADS"),
    }  # fmt: skip


@lru_cache(maxsize=1)
def commit() -> str | None:
    """The commit of the package's source, with "-dirty" where it was edited since; None outside its own repository: a copy that
    was unpacked inside another one is not of that one's commit."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}  # a hook's point elsewhere

    def git(*arguments: str) -> str:
        call = ["git", *arguments]
        return subprocess.check_output(call, cwd=PROJECT, env=own, stderr=subprocess.DEVNULL, text=True).strip()

    try:
        git("ls-files", "--error-unmatch", "vlsafe/core/store.py")
        if Path(git("rev-parse", "--show-toplevel")) != PROJECT:
            return None
        return git("describe", "--always", "--dirty", "--abbrev=12")
    except (OSError, subprocess.CalledProcessError):
        return None


@lru_cache(maxsize=1)
def source_digest() -> str:
    """Digest of the package's source and data files; a result records which code computed it."""
    hashed = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*")):
        if path.suffix in (".py", ".jinja", ".yaml", ".json", ".txt"):
            hashed.update(path.name.encode() + path.read_bytes())
    return hashed.hexdigest()[:12]


def refuse_other_scale(root: Path, name: str, origin: str, scale: Mapping[str, Any]) -> None:
    """Refuse a scale in whose place the runs of another one lie: a file of the same stem elsewhere, with other numbers.

    Raises:   ValueError naming both files
    """
    record = root / name / OWNER
    if not record.is_file():
        return
    owner = texts.read_json(record)
    if owner["file"] != origin and not alike(owner["scale"], scale):
        raise ValueError(
            f"{root / name} holds the runs of {owner['file']}, and {origin} has other numbers; give one of them another `name:`, "
            f"or remove {record} if these runs are no longer needed"
        )


def claim(root: Path, name: str, origin: str, scale: Mapping[str, Any]) -> None:
    """Note which scale file's runs lie in a place, for `refuse_other_scale`; raises as it does."""
    (root / name).mkdir(parents=True, exist_ok=True)
    with FileLock(str(root / name / OWNER) + ".lock"):
        refuse_other_scale(root, name, origin, scale)
        record, text = root / name / OWNER, json.dumps({"file": origin, "scale": scale}, indent=1)
        if not record.exists() or (
            origin == json.loads(record.read_text(encoding="utf-8"))["file"] and record.read_text() != text
        ):
            write_text(record, text)


def forget(run: Run) -> bool:
    """Remove a run, finished or partial, and its receipt; whether there was any.

    Raises:   ValueError where another process is making it
    """
    if not run.folder.parent.exists():
        return False
    with alone(run.folder):
        left = [_doomed(run), run.partial, *run.partial.parent.glob(f"{glob.escape(run.partial.name)}.*")]
        there = any(path.exists() for path in (run.folder, run.receipt, *left))
        _discard(run, lambda text: sys.stderr.write(f"{text}\n"))
        for work in left:
            shutil.rmtree(work, ignore_errors=True)
        run.receipt.unlink(missing_ok=True)
    return there


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """The folder of a run that no other process makes for as long as the block lasts.

    Raises:   ValueError where one does
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        held = FileLock(f"{folder}.lock").acquire(timeout=0)
    except Timeout:
        run = "/".join(folder.parts[-2:])
        raise ValueError(f"{run} is being made by another process; stop it first, or wait for it") from None
    with held:
        yield
