"""Find a corpus and read its files row by row, whatever the rows mean.

A corpus is read from `VLSAFE_DATA/<folder>`, in the layout that its makers describe, or, where there is no such folder, from
the hub (its cache first, so that a machine without a network can read it too). JSON files of a gigabyte are read in pieces:
one row of a list is in memory at a time. Every error names the file and the row.
"""

from __future__ import annotations

import functools
import gzip
import json
import lzma
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import fsspec
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError

from vlsafe.core import assets
from vlsafe.core.assets import Origin
from vlsafe.core.schema import Stored

PIECE = 2**20  # characters read at a time
LONGEST = 2**26  # characters of one row; a file with a longer one counts as broken; assumed
SPACE, COMMA = re.compile(r"\s*"), re.compile(r"\s*,?\s*")
_opened = functools.partial(fsspec.open, mode="rt", compression="infer", encoding="utf-8-sig")
Row = TypeVar("Row")


class Refused(NamedTuple):
    """A row that cannot be converted, and why; the readers of a corpus count and name them."""

    id: str
    reason: str


@dataclass(frozen=True)
class Place:
    """Where one corpus is read from: `folder` below `VLSAFE_DATA`, or (None) the hub's `origin`."""

    origin: Origin
    folder: str | None = None

    @property
    def address(self) -> str:
        """The repository at its revision, as an address of `fsspec`."""
        return f"hf://datasets/{self.origin.repo}@{self.revision}"

    @property
    def revision(self) -> str:
        """The commit, where one is known."""
        return assets.pinned(self.origin.repo, self.origin.revision)


def path_of(place: Place, name: str) -> Path:
    """One file of a corpus; FileNotFoundError names the file and the remedy."""
    if place.folder is not None:
        path = assets.outside_path(f"{place.folder}/{name}")
        if not path.is_file():
            raise FileNotFoundError(f"{place.folder} below VLSAFE_DATA has no {name}; is this the official layout? {_REMEDY}")
        return path
    try:
        return Path(huggingface_hub.hf_hub_download(place.origin.repo, name, repo_type="dataset", revision=place.revision))
    except GatedRepoError:
        terms = place.origin.terms or "see its page"
        raise FileNotFoundError(f"{place.origin.repo} is gated: {terms}, and log in to the hub") from None
    except (EntryNotFoundError, OSError) as error:
        problem = f"is neither here nor on the hub ({type(error).__name__})"
        raise FileNotFoundError(f"{name} of {place.origin.repo} {problem}; {_REMEDY}") from None


_REMEDY = "`vlsafe download` fetches it, `vlsafe doctor` lists what is missing"


def names(place: Place, patterns: Sequence[str]) -> list[str]:
    """The files of a local corpus that match the first pattern with any match, sorted."""
    if place.folder is None:
        return []
    folder = assets.outside_path(place.folder)
    matches = (sorted(str(path.relative_to(folder)) for path in folder.glob(pattern)) for pattern in patterns)
    return next(filter(None, matches), [])


def picture(place: Place, candidates: Sequence[str]) -> Stored:
    """The first candidate that exists: a file, or a member of an archive ("images.zip!a.jpg"), below the corpus.

    Where none exists, the first one: opening it then fails with its name. On the hub only archives are searched.

    Raises:   ValueError for a name that leads out of the corpus's folder
    """
    if bad := next((name for name in candidates if not assets.inside(name.replace(assets.MEMBER, "/"))), None):
        raise ValueError(f"the picture's name {bad!r} leads out of the folder of {place.origin.repo}")
    base = place.address if place.folder is None else place.folder
    pictures = [Stored(f"{base}/{name}") for name in candidates]
    return next((one for one in pictures if not missing(one)), pictures[0])


def missing(picture: Stored) -> bool:
    """Whether a picture does not exist."""
    file, _, member = picture.place.partition(assets.MEMBER)
    if "://" in file:
        return not member or member not in assets.members(file)
    if member and file.endswith(assets.PARQUET):
        return False  # its row was read
    return not assets.outside_path(file).is_file() or bool(member and member not in assets.members(file))


def rows_of(place: Place, name: str) -> Iterator[dict[str, Any]]:
    """The rows of one file of a corpus, one by one: a Parquet file, JSON lines (also .xz, .gz), or one JSON list."""
    yield from rows_in(path_of(place, name))


def rows_in(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file in one of these formats."""
    read = _parquet if path.suffix == ".parquet" else json_lines if ".jsonl" in path.suffixes else json_list
    yield from read(path)


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(64):
                yield from batch.to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path.name} is not a whole Parquet file ({type(error).__name__}); download it again") from None


def json_list(path: Path) -> Iterator[dict[str, Any]]:
    """The mappings of a JSON list, one by one, however long the list; ValueError names the file and the row that is broken."""
    decode, number, at = json.JSONDecoder().raw_decode, 0, 1
    try:
        with _opened(str(path)) as file:
            text = file.read(PIECE).lstrip()
            if text[:1] != "[":
                raise ValueError(f"{path.name} is no JSON list")
            while True:
                at = next((COMMA if number else SPACE).finditer(text, at)).end()
                if text[at : at + 1] == "]" and not (text[at + 1 :] + file.read(PIECE)).strip():
                    return
                try:
                    row, at = decode(text, at)
                except RecursionError:
                    raise ValueError(f"row {number} of {path.name} holds lists in lists in lists, too deep to be read") from None
                except ValueError as error:  # of JSON, or a number of thousands of digits
                    text, at = text[at:], 0
                    if len(text) >= LONGEST or not (more := file.read(PIECE)):
                        problem = f"it breaks off or is broken after row {number} ({getattr(error, 'msg', 'a number too long')})"
                        raise ValueError(f"{path.name} is not a whole JSON list: {problem}; download it again") from None
                    text += more
                    continue
                if not isinstance(row, dict):
                    raise ValueError(f"row {number} of {path.name} is no mapping but {type(row).__name__}")
                yield row
                number += 1
                if at > PIECE:
                    text, at = text[at:], 0
    except UnicodeDecodeError:
        raise ValueError(f"{path.name} holds bytes that are no UTF-8 after row {number}; download it again") from None


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file of one JSON mapping per line, plain or compressed (.xz, .gz); ValueError names the file and the line."""
    number = 0
    try:
        with _opened(str(path)) as file:
            for number, line in enumerate(file, 1):  # noqa: B007 (the errors name it)
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise ValueError("no mapping")
                    yield row
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile):
        raise ValueError(f"{path.name} breaks off or is damaged after line {number}; download it again") from None
    except (ValueError, RecursionError) as error:
        kind = error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__
        raise ValueError(f"{path.name}, line {number}, is not one JSON mapping ({kind}); download it again") from None


def converted(rows: Iterable[Any], convert: Callable[[Any, str], Row], kind: str, prefix: str = "") -> Iterator[Row | Refused]:
    """Every row through `convert(row, name)`; one of another form becomes a `Refused`.

    Published ids may repeat (a picture has several conversations), so the name is the id (or `prefix`) with the row's number.
    """
    for number, row in enumerate(rows):
        name = f"{prefix or row.get('id', '')}#{number}"
        try:
            yield convert(row, name)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            yield Refused(name, f"not a {kind} row ({type(error).__name__})")


def text_of(value: Any) -> str:
    """A text; "" for anything else: empty texts are counted later."""
    return value if isinstance(value, str) else ""
