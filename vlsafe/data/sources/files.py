"""Where a corpus lies, and its files read row by row: nothing here knows what a row means.

A corpus is read from `VLSAFE_DATA/<folder>`, in the layout that its makers describe, or, where there is no such folder, from
the hub (its cache first, so that a machine without a network can do it too). JSON files of a gigabyte are read in pieces:
a list is held one row at a time. Every error names the file and the row.
"""

from __future__ import annotations

import gzip
import json
import lzma
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from vlsafe.core import assets
from vlsafe.core.assets import Origin
from vlsafe.core.schema import Stored

PIECE = 2**20  # characters read at a time
LONGEST = 2**26  # characters of one row, beyond which a file is taken for broken; assumed
OPENERS: dict[str, Callable[..., IO[str]]] = {".xz": lzma.open, ".gz": gzip.open}


class Refused(NamedTuple):
    """A row that no example can be made of, and why; whoever reads a corpus counts and names them."""

    id: str
    reason: str


@dataclass(frozen=True)
class Place:
    """Where one corpus is read from: `folder` below `VLSAFE_DATA`, or (None) the hub's `origin`."""

    origin: Origin
    folder: str | None = None

    @property
    def address(self) -> str:
        """What `fsspec` calls the repository at its revision."""
        return f"hf://datasets/{self.origin.repo}@{self.revision}"

    @property
    def revision(self) -> str:
        """The commit, where one is known."""
        return assets.pinned(self.origin.repo, self.origin.revision)


def locate(origin: Origin, folder: str) -> Place:
    """The local folder where there is one, else the hub."""
    root = assets.outside()
    return Place(origin, folder if root is not None and (root / folder).is_dir() else None)


def path_of(place: Place, name: str) -> Path:
    """One file of a corpus.

    Raises:   FileNotFoundError naming the file and the remedy
    """
    if place.folder is not None:
        path = assets.outside_path(f"{place.folder}/{name}")
        if not path.is_file():
            raise FileNotFoundError(f"{place.folder} below VLSAFE_DATA has no {name}; is this the official layout? {_REMEDY}")
        return path
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(hf_hub_download(place.origin.repo, name, repo_type="dataset", revision=place.revision))
    except GatedRepoError:
        terms = place.origin.terms or "see its page"
        raise FileNotFoundError(f"{place.origin.repo} is gated: {terms}, and log in to the hub") from None
    except (LocalEntryNotFoundError, EntryNotFoundError, RepositoryNotFoundError, OSError) as error:
        told = f"({type(error).__name__})"
        raise FileNotFoundError(f"{name} of {place.origin.repo} is neither here nor on the hub {told}; {_REMEDY}") from None


_REMEDY = "`vlsafe download` fetches it, `vlsafe doctor` lists what is missing"


def names(place: Place, patterns: Sequence[str]) -> list[str]:
    """The files of a local corpus that fit the first pattern which any file fits, sorted."""
    if place.folder is None:
        return []
    folder = assets.outside_path(place.folder)
    found = (sorted(str(path.relative_to(folder)) for path in folder.glob(pattern)) for pattern in patterns)
    return next((paths for paths in found if paths), [])


def picture(place: Place, candidates: Sequence[str]) -> Stored:
    """The first of the candidates that is there: files, or members of archives ("images.zip!a.jpg"), below the corpus.

    Where none is, the first one: whoever opens it finds it missing, and says so. On the hub only archives are looked into.

    Raises:   ValueError for a name that leads out of the corpus's folder
    """
    if bad := next((name for name in candidates if not assets.inside(name.replace(assets.MEMBER, "/"))), None):
        raise ValueError(f"the picture's name {bad!r} leads out of the folder of {place.origin.repo}")
    base = place.address if place.folder is None else place.folder
    places = [Stored(f"{base}/{name}") for name in candidates]
    return next((there for there in places if not missing(there)), places[0])


def missing(picture: Stored) -> bool:
    """Whether a picture is not there."""
    file, _, member = picture.place.partition(assets.MEMBER)
    if "://" in file:
        return not member or member not in assets.members(file)
    return not assets.outside_path(file).is_file() or bool(member and member not in assets.members(file))


def json_list(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSON list, one after another, however long the list.

    Raises:   ValueError naming the file and the row where it is no list of mappings, broken or cut short
    """
    decoder = json.JSONDecoder()
    with _opened(path) as file:
        text, number, at = _next_piece(path, file, 0), 0, 0
        at = _skip(text, 0, "")
        if text[at : at + 1] != "[":
            raise ValueError(f"{path.name} is no JSON list")
        at += 1
        while True:
            at = _skip(text, at, "," if number else "")
            if text[at : at + 1] == "]" and not (text[at + 1 :] + file.read(PIECE)).strip():
                return
            try:
                row, at = decoder.raw_decode(text, at)
            except json.JSONDecodeError as error:
                text, at = text[at:], 0
                more = _next_piece(path, file, number) if len(text) < LONGEST else ""
                if not more:
                    said = f"it breaks off or is broken after row {number} ({error.msg})"
                    raise ValueError(f"{path.name} is not a whole JSON list: {said}; download it again") from None
                text += more
                continue
            if not isinstance(row, dict):
                raise ValueError(f"row {number} of {path.name} is no mapping but {type(row).__name__}")
            yield row
            number += 1
            if at > PIECE:
                text, at = text[at:], 0


def _skip(text: str, at: int, also: str) -> int:
    """The place of the next character that is neither white space nor, once, the separator."""
    while at < len(text) and (text[at].isspace() or (also and text[at] == also)):
        also = "" if text[at] == also else also
        at += 1
    return at


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file of one JSON mapping per line, plain or compressed (.xz, .gz).

    Raises:   ValueError naming the file and the line
    """
    number = 0
    try:
        with _opened(path) as file:
            for number, line in enumerate(file, 1):  # noqa: B007 (told in the errors)
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise ValueError("no mapping")
                    yield row
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile):
        raise ValueError(f"{path.name} breaks off or is damaged after line {number}; download it again") from None
    except ValueError as error:
        kind = error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__
        raise ValueError(f"{path.name}, line {number}, is not one JSON mapping ({kind}); download it again") from None


def _opened(path: Path) -> IO[str]:
    return OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8-sig")


def _next_piece(path: Path, file: IO[str], number: int) -> str:
    try:
        return file.read(PIECE)
    except UnicodeDecodeError:
        raise ValueError(f"{path.name} holds bytes that are no UTF-8 after row {number}; download it again") from None


def text_of(value: Any) -> str:
    """A text, empty where there is none: an empty one is counted as such later."""
    return value if isinstance(value, str) else ""
