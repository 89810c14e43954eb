"""The run store: run folders, manifests, digests, atomic completion, locks.

A run is the result of one stage. It is valid when its manifest has the digest that the stage expects now and its files are
unchanged. Work happens in `<recipe>.partial`, which is renamed last: a folder without that suffix is complete or has been
tampered with. The store decides what is valid, the scheduler only the order.
"""

from __future__ import annotations

import datetime
import errno
import hashlib
import importlib.metadata
import itertools
import json
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock

MANIFEST, NOTE = "manifest.json", ".digest"
FULL = 16 * 2**20  # bytes; with less free, any error is reported as a full disk: libraries word it in many ways
PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "tokenizers", "numpy", "pillow")
_NOTIFIED: set[Path] = set()  # runs of which this process has printed that older code made them
Status = Literal["valid", "missing", "stale", "tampered"]


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
    present = {str(path.relative_to(run.folder)) for path in run.folder.rglob("*") if path.is_file()} - {MANIFEST}
    if present != set(manifest["files"]):
        return "tampered"
    for name, record in manifest["files"].items():
        path, stat = run.folder / name, (run.folder / name).stat()
        changed = deep or stat.st_mtime_ns != record["mtime_ns"]
        if stat.st_size != record["bytes"] or (changed and file_digest(path) != record["sha256"]):
            return "tampered"
    return "valid"


def read_manifest(run: Run) -> dict[str, Any] | None:
    """The manifest of a finished run, or None where there is none that can be read."""
    try:
        manifest = json.loads((run.folder / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, UnicodeDecodeError):
        return None
    return manifest if isinstance(manifest, dict) and {"digest", "files"} <= set(manifest) else None


def manifest_of(run: Run) -> dict[str, Any]:
    """The manifest of a finished run.

    Raises:   FileNotFoundError where there is none that can be read
    """
    manifest = read_manifest(run)
    if manifest is None:
        raise FileNotFoundError(
            f"{run.stage}/{run.recipe} of {run.backbone} seed {run.seed} is not there; `vlsafe stage` makes it"
        )
    return manifest


def ensure(run: Run, make: Callable[[Path], Mapping[str, Any] | None], say: Callable[[str], None]) -> Path:
    """The folder of a valid run, computed first if it is missing.

    `make` gets the `.partial` folder, which may hold files of a killed attempt of the *same* digest, and returns numbers for
    the manifest. One process computes a run at a time; others wait for it.

    Raises:   whatever `make` raises; the partial folder then stays, without looking complete
    """
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(str(run.folder) + ".lock"):
        state = status(run)
        if state != "valid":
            if state != "missing":
                say(f"{run.stage}/{run.recipe}: the run on disk is {state}; making it again")
            _make(run, make)
        elif (made_by := manifest_of(run)["source"]) != source_digest() and run.folder not in _NOTIFIED:
            _NOTIFIED.add(run.folder)
            say(f"{run.stage}/{run.recipe}: made by older code ({made_by}); `vlsafe fresh {run.stage}/{run.recipe}` removes it")
        manifest = (run.folder / MANIFEST).read_text(encoding="utf-8")
        if not run.receipt.exists() or run.receipt.read_text(encoding="utf-8") != manifest:
            write_text(run.receipt, manifest)
    return run.folder


def _make(run: Run, make: Callable[[Path], Mapping[str, Any] | None]) -> None:
    _discard(run.folder)
    work, note = run.partial, run.partial / NOTE
    if work.exists() and (not note.exists() or note.read_text(encoding="utf-8") != run.digest):
        shutil.rmtree(work)
    work.mkdir(exist_ok=True)
    note.write_text(run.digest, encoding="utf-8")
    started = time.monotonic()
    try:
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
    note.unlink()  # only now: digests of large models take minutes, and a kill meanwhile must not cost a training
    os.rename(work, run.folder)
    _sync(run.folder.parent)


def _discard(folder: Path) -> None:
    """Remove a run so that a kill in the middle cannot leave a folder that looks complete."""
    if folder.exists():
        doomed = folder.with_name(folder.name + ".doomed")
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(folder, doomed)
        shutil.rmtree(doomed)


def _manifest(run: Run, work: Path, numbers: Mapping[str, Any] | None, seconds: float) -> dict[str, Any]:
    files = {}
    for path in sorted(p for p in work.rglob("*") if p.is_file() and p.name not in (MANIFEST, NOTE)):
        _sync(path)
        stat = path.stat()
        files[str(path.relative_to(work))] = {
            "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": file_digest(path)
        }  # fmt: skip
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
        "commit": commit(), "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "python": platform.python_version(), "machine": platform.machine(), "threads": os.environ.get("OMP_NUM_THREADS"),
    }  # fmt: skip


@lru_cache(maxsize=1)
def commit() -> str | None:
    """The commit of the package's source, with "-dirty" where it was edited since; None outside a repository."""
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.check_output(describe, cwd=Path(__file__).parents[1], stderr=subprocess.DEVNULL, text=True).strip()
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


def forget(run: Run) -> None:
    """Remove a run, finished or partial, and its receipt."""
    _discard(run.folder)
    shutil.rmtree(run.partial, ignore_errors=True)
    run.receipt.unlink(missing_ok=True)


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A path to write to that is renamed to `path` at the end: a reader sees the old file or the new one, never half of it."""
    beside = path.with_name(path.name + ".tmp")
    yield beside
    os.replace(beside, path)


def write_text(path: Path, text: str) -> None:
    """Write a text file beside its place and rename it."""
    with _beside(path) as beside:
        beside.write_text(text, encoding="utf-8")
        _sync(beside)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """A folder that is written completely or not at all: yields a folder to work in, which is renamed at the end.

    What a killed attempt has left is removed first; an error removes everything.

    Raises:   ValueError where the folder exists already
    """
    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"{folder} exists; choose another place, or remove it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(str(folder.with_name(f".{folder.name}.lock"))):
        work = folder.with_name(folder.name + ".partial")
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        try:
            yield work
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
        for path in work.rglob("*"):
            _sync(path)
        os.rename(work, folder)
        _sync(folder.parent)


def recorded_digest(path: Path) -> str | None:
    """The SHA-256 recorded of a file when it was written: in a manifest in its folder or the one above, or, in the Hub's cache,
    as the name of the blob that it points to. None where there is none."""
    for folder in (path.parent, path.parent.parent):
        try:
            files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
            return files[str(path.relative_to(folder))]["sha256"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
    blob = path.resolve().name
    return blob if re.fullmatch(r"[0-9a-f]{64}", blob) else None


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows of equal columns as Parquet.

    Raises:   ValueError when there are none: an empty table has no columns and hides a mistake
    """
    table = pa.Table.from_pylist(list(rows))
    if table.num_rows == 0:
        raise ValueError(f"no rows to write to {path.name}")
    with _beside(path) as beside:
        pq.write_table(table, beside, compression="zstd")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a Parquet file."""
    return pq.read_table(path).to_pylist()


def write_stream(path: Path, rows: Iterable[Mapping[str, Any]], columns: pa.Schema, batch: int = 2048) -> int:
    """Write rows as Parquet, one batch in memory at a time; returns how many there were, possibly none."""
    written = 0
    with _beside(path) as beside, pq.ParquetWriter(beside, columns, compression="zstd") as file:
        for part in parts(rows, batch):
            file.write_table(pa.Table.from_pylist(part, schema=columns))
            written += len(part)
    return written


def whole_lines(path: Path) -> tuple[int, str]:
    """Number of complete lines of a file (0 where there is no file), and the last one. Half a line at its end is cut off."""
    if not path.exists():
        return 0, ""
    count, last, end = 0, b"", 0
    with open(path, "rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            count, last, end = count + 1, line, end + len(line)
    os.truncate(path, end)
    return count, last.decode()


def parts(rows: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Rows in lists of `size`, the last one shorter."""
    iterator = iter(rows)
    return iter(lambda: list(itertools.islice(iterator, size)), [])
