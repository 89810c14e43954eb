"""What lies in a place that may hold responses: rows, one mapping, or a folder, whatever they mean.

Rows come as JSON lines, as one JSON list, or as a table (CSV, TSV, XLSX), in which an empty cell is None: whether a model wrote
nothing or nothing was written down, a table cannot say.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vlsafe.core.texts import read_json, read_lines, read_table, read_text

Row = Mapping[str, Any]
SHOWN, LONGEST = 8, 30  # keys that an error names, and characters of each


class Content(NamedTuple):
    """What a place holds: the keys of its first row or of its mapping, or the names of a folder's files; and the rows, if any."""

    path: Path
    keys: tuple[str, ...]
    rows: Iterable[Row] = ()
    mapping: Row | None = None

    def numbered(self) -> Iterator[tuple[str, Row]]:
        """Where each row stands, and the row."""
        for number, row in enumerate(self.rows, 1):
            if not isinstance(row, dict):
                raise ValueError(f"row {number} of {self.path} is no JSON object but {type(row).__name__}")
            yield f"row {number} of {self.path}", row


def listed(keys: Iterable[Any]) -> str:
    """The first keys, in one line."""
    words = [" ".join(str(key).split())[:LONGEST] for key in keys]
    return ", ".join(words[:SHOWN] + ["…"] * (len(words) > SHOWN)) or "nothing"


def contents(path: Path) -> Content:
    """What a place holds, read no further than is needed to tell.

    Raises:   FileNotFoundError; ValueError naming the file where it cannot be read or holds nothing
    """
    if path.is_dir():
        return Content(path, tuple(sorted(one.name for one in path.iterdir() if not one.name.startswith("."))))
    if path.suffix.lower() == ".xlsx":
        return _of_rows(path, _workbook(path))
    if path.suffix.lower() in (".csv", ".tsv"):
        return _of_rows(path, map(_cells, read_table(path, (), "," if path.suffix.lower() == ".csv" else "\t")))
    text = read_text(path).lstrip()
    if text.startswith("[") or (path.suffix != ".jsonl" and text.startswith("{") and not _is_object(text.partition("\n")[0])):
        value = read_json(path)
        return _of_rows(path, value if isinstance(value, list) else [value], value if isinstance(value, dict) else None)
    lines = read_lines(path)
    first = next(lines, None)
    alone = first if "\n" not in text.rstrip() else None
    return _of_rows(path, itertools.chain([] if first is None else [first], lines), alone)


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _of_rows(path: Path, rows: Iterable[Any], mapping: Row | None = None) -> Content:
    rows = iter(rows)
    first = next(rows, None)
    if first is None:
        raise ValueError(f"{path} holds no rows")
    keys = tuple(map(str, first)) if isinstance(first, dict) else ()
    return Content(path, keys, itertools.chain([first], rows), mapping)


def _cells(row: Mapping[str, Any]) -> dict[str, Any]:
    """A table's row: whole numbers as they are read, empty cells as None."""
    return {key: _cell(value) for key, value in row.items()}


def _cell(value: Any) -> str | None:
    whole = int(value) if isinstance(value, float) and value.is_integer() else value
    return None if value is None or value == "" else str(whole)


def _workbook(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a workbook's first sheet. Texts that begin with "=" are formulas to Excel, and texts here.

    Raises:   ValueError naming the extra where its reader is not installed, or where the file is damaged
    """
    try:
        import openpyxl
    except ImportError:
        raise ValueError(f"{path} needs openpyxl: `pip install openpyxl`, or save the sheet as CSV") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of styles and extensions that concern nobody here
            with contextlib.closing(openpyxl.load_workbook(path, read_only=True)) as book:
                sheet = book.worksheets[0]
                sheet.reset_dimensions()  # some writers state them wrongly
                table = list(sheet.iter_rows(values_only=True))
    except FileNotFoundError:
        raise
    except Exception as error:  # archive, XML and numbers raise what they like
        raise ValueError(f"{path} is no whole .xlsx file ({type(error).__name__}); write it again") from None
    header = [str(cell) for cell in table[0]] if table else []
    rows = (row[: len(header)] for row in table[1:] if any(cell is not None for cell in row))
    return (_cells(dict(itertools.zip_longest(header, row))) for row in rows)
