"""Run intake and guards over rows: one audit line per row, in memory for small corpora, in resumable parts for large ones."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from vlsafe.core import store
from vlsafe.core.schema import Example
from vlsafe.data import intake
from vlsafe.data.sources.files import Refused

PART = 512  # rows that go through intake and guards together; a kill loses at most as many


def screen(rows: Sequence[Example], processors: Sequence[Any], limit: int, text: Any, image: Any) -> list[dict[str, Any]]:
    """One audit line per row, in order. A row must fit under every processor's template; guards assess the sound rows only.

    Units:    `limit` in tokens
    """
    defects = [intake.unsound(row, processors, limit) for row in rows]
    sound = [row for row, defect in zip(rows, defects, strict=True) if defect is None]
    results = iter(image.assess([picture for row in sound for picture in row.images]))
    pictures = [[next(results) for _ in row.images] for row in sound]
    worst = [max(of, key=lambda one: (one.unsafe is not False, one.score), default=None) for of in pictures]
    lines = iter(intake.audit(sound, text.assess([row.turns for row in sound]), worst))
    return [next(lines) if defect is None else intake.skipped(row, defect) for row, defect in zip(rows, defects, strict=True)]


def append_lines(
    path: Path, rows: Iterable[Example | Refused], audit: Callable[[Sequence[Example]], list[dict[str, Any]]],
    progress: Callable[[int], None] = lambda done: None,
) -> None:  # fmt: skip
    """Append one audit line per row of a corpus, a part at a time, each part on disk before the next one begins.

    The lines of an interrupted attempt are kept: half a line at the end is cut off, and the next row follows the last whole
    line, so that no row is lost or repeated.

    Raises:   ValueError where the last line is about another row than the corpus has there
    """
    done, last = store.whole_lines(path)
    iterator = iter(rows)
    for row in itertools.islice(iterator, done - 1, done) if done else ():
        if row.id != (id_ := json.loads(last)["id"]):
            raise ValueError(f"{path.name} ends with {id_!r} where the corpus has {row.id!r}; the corpus has changed meanwhile")
    with open(path, "a", encoding="utf-8") as file:
        for part in store.parts(iterator, PART):
            readable = iter(audit([row for row in part if isinstance(row, Example)]))
            lines = [intake.skipped(shell(row), row.reason) if isinstance(row, Refused) else next(readable) for row in part]
            file.writelines(json.dumps(line) + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
            done += len(part)
            progress(done)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The audit lines of a file, read one by one."""
    with open(path, encoding="utf-8") as file:
        yield from map(json.loads, file)


def shell(row: Example | Refused) -> Example:
    """A refused row as an empty example: its audit line says why it is not kept."""
    return Example(row.id, "", ()) if isinstance(row, Refused) else row
