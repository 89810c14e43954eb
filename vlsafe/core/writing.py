"""Files: the one way to write them (beside, synced, renamed), tables, digests, and what must never be written to."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock

MANIFEST = "manifest.json"
WORK = ".vlsafe-work"


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_digests(paths: Sequence[Path]) -> list[str]:
    """SHA-256 of several files, on several processors: GPUs may be held meanwhile."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(file_digest, paths))


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A path to write to that is renamed to `path` at the end: a reader sees the old file or the new one, never half of it.

    Its name is its own: two processes, or a user's file of a likely name, do not meet. An error leaves `path` as it was. A link
    is replaced, never followed: a run's links point to models of the user's.

    Raises:   ValueError where a device or a folder is there; OSError that names `path`
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no file, and is not replaced by one")
    beside = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident():x}.tmp")
    try:
        yield beside
        sync(beside)
        os.replace(beside, path)
    except BaseException as error:
        beside.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.strerror:
            raise type(error)(error.errno, error.strerror, str(path)) from error
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file beside its place and rename it."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file beside its place and rename it."""
    with _beside(path) as beside:
        beside.write_bytes(content)


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """A folder that is written completely or not at all: yields a folder to work in, which is renamed at the end.

    That one lies alone in `<folder>.partial`, under a name that nobody else gives: by it what a killed attempt has left is known,
    and removed first. An error removes everything.

    Raises:   ValueError where the folder exists already, or the partial one holds something else
    """
    folder = Path(folder)
    refuse_existing(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(str(folder.with_name(f".{folder.name}.lock"))):
        refuse_existing(folder)  # another process may have written it while this one waited
        partial = folder.with_name(folder.name + ".partial")
        work = partial / WORK
        if os.path.lexists(partial) and (not partial.is_dir() or {path.name for path in partial.iterdir()} - {WORK}):
            raise ValueError(f"{partial} is not what a killed attempt has left; move it away, or choose another place")
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        try:
            yield work
            for path in work.rglob("*"):
                sync(path)
            os.rename(work, folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)
            with suppress(OSError):  # somebody has put something there meanwhile
                partial.rmdir()
        sync(folder.parent)


def refuse_existing(place: Path) -> None:
    """Raises:   ValueError where something is there, be it a link to nothing"""
    if os.path.lexists(place):
        raise ValueError(f"{place} exists; choose another place, or remove it")


def recorded_digest(path: Path) -> str | None:
    """The SHA-256 recorded of a file when it was written: in a manifest in its folder or the one above, or, in the Hub's cache,
    as the name of the blob that it points to. None where there is none."""
    for folder in (path.parent, path.parent.parent):
        try:
            files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
            return files[str(path.relative_to(folder))]["sha256"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
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


def refuse_inputs(outputs: Mapping[str, Path | None], inputs: Mapping[str, Path | None], ours: str = "") -> None:
    """Refuse to write where something lies that is read, also through links, or two things to one place.

    In a folder that is read nothing is written over either, unless it begins with `ours`, as an earlier result does.

    Raises:   ValueError naming both
    """
    places = {name: path for name, path in outputs.items() if path}
    for (name, path), (other, second) in itertools.combinations(places.items(), 2):
        if _same(path, second):
            raise ValueError(f"{name} and {other} are to be written to one place, {path}; choose another for one of them")
    for (name, path), (other, read) in itertools.product(places.items(), inputs.items()):
        within = read and read.is_dir() and path.exists() and path.resolve().is_relative_to(read.resolve())
        if read and (_same(path, read) or (within and not (ours and starts(path, ours)))):
            raise ValueError(f"{name} {path} would be written over what {other} reads ({read}); choose another place")


def _same(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve() or (one.exists() and other.exists() and one.samefile(other))


def starts(path: Path, text: str) -> bool:
    """Whether a file begins with a text, white space aside."""
    with path.open("rb") as file:
        return b"".join(file.read(4 * len(text) + 16).split()).startswith(text.encode())


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
