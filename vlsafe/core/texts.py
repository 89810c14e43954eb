"""Text files of others, read as they are or refused in one line that names file, line and remedy."""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

csv.field_size_limit(1 << 30)  # MMBench keeps pictures in a column
SHOWN = 30  # characters of a column's name, which may be a row where the header is missing; assumed
STARTS = {
    b"\x1f\x8b": "a gzip file: unpack it", b"PK\x03\x04": "a zip file: unpack it", b"\xfd7zXZ": "an xz file: unpack it",
    b"BZh": "a bzip2 file: unpack it", b"\xff\xfe": "UTF-16: save it as UTF-8", b"\xfe\xff": "UTF-16: save it as UTF-8",
    b"PAR1": "a Parquet file: save it as JSON lines or CSV",
    b"version https://git-lfs": "a pointer of Git LFS: fetch what it points to",
}  # fmt: skip
HALF = re.compile(r"\\u[dD][89a-fA-F]")  # an escape in JSON that is half a character, perhaps without its other half


def read_text(path: Path) -> str:
    """A text file in UTF-8, with or without its mark at the start.

    Raises:   FileNotFoundError; ValueError naming the file, and the line, where it is something else: compressed, UTF-16, latin-1
    """
    content = path.read_bytes()
    if what := next((what for start, what in STARTS.items() if content.startswith(start)), None):
        raise ValueError(f"{path} is {what}")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        where = f"line {content.count(10, 0, error.start) + 1} of {path}"
        raise ValueError(
            f"{where} holds the byte 0x{content[error.start]:02x}, which is no UTF-8 there; save it as UTF-8"
        ) from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ValueError(f"line {line} of {path} holds a zero byte; is it UTF-16 or cut short? Save it as UTF-8")
    return text


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number and text of the lines that are not empty. Lines end with "\\n" alone: texts hold U+2028, form feeds and U+0085."""
    lines = enumerate(read_text(path).split("\n"), 1)
    return ((number, line.removesuffix("\r")) for number, line in lines if line.strip())


def _json(text: str) -> Any:
    """Raises:   json.JSONDecodeError for anything that is no JSON, also where the library raises something else"""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, lists in lists in lists …
        raise json.JSONDecodeError(str(error), "", 0) from None


def _refuse_halves(value: Any, where: str) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{where} holds half a character (a lone surrogate such as \\ud83d): write it again from its source"
        ) from None


def read_json(path: Path) -> Any:
    """A JSON file.

    Raises:   FileNotFoundError; ValueError where the file is cut short or no JSON, naming it and the place
    """
    text = read_text(path)
    try:
        value = _json(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no complete JSON (line {error.lineno}); it may be cut short: fetch it again") from None
    if HALF.search(text):
        for number, row in enumerate(value if isinstance(value, list) else [value], 1):
            _refuse_halves(row, f"row {number} of {path}")
    return value


def read_lines(path: Path, cut: str = "") -> Iterator[dict[str, Any]]:
    """The rows of a JSON-lines file; empty lines are passed over, and what begins with `cut` and breaks off.

    Raises:   ValueError naming the line that cannot be read
    """
    for number, line in text_lines(path):
        try:
            row = _json(line)
        except json.JSONDecodeError:
            row = None
        if not isinstance(row, dict):
            if cut and line.startswith(cut):
                continue
            raise ValueError(f"line {number} of {path} is no JSON object; the file may be cut short")
        if HALF.search(line):
            _refuse_halves(row, f"line {number} of {path}")
        yield row


def read_table(path: Path, required: Sequence[str], delimiter: str = ",") -> list[dict[str, str]]:
    """The rows of a table with a header, all as text; nothing is taken for a number or for missing.

    Raises:   ValueError where a column is missing, or, naming the line, where a row has more or fewer fields than the header (a
              separator that is not quoted) or a quote is not closed, or two columns have one name
    """
    table = csv.DictReader(io.StringIO(read_text(path), newline=""), delimiter=delimiter, strict=True)
    rows = []
    try:
        if twice := [name for name, n in Counter(table.fieldnames or ()).items() if n > 1]:
            raise ValueError(f"{path} has several columns {twice[0]!r}")
        if missing := [column for column in required if column not in (table.fieldnames or [])]:
            there = ", ".join(" ".join(name.split())[:SHOWN] for name in table.fieldnames or ["none"])
            raise ValueError(f"{path} has no column {', '.join(missing)}; it has {there}")
        for row in table:
            if None in row or None in row.values():
                where = f"line {table.line_num} of {path}"
                raise ValueError(f"{where} has not as many fields as the header; is a separator not quoted?")
            rows.append(row)
    except csv.Error as error:
        raise ValueError(f"line {table.line_num} of {path} cannot be read as a table ({error}); is a quote not closed?") from None
    return rows


def frozen(entry: Any) -> Any:
    """An entry of a data file, with tuples for its lists."""
    if isinstance(entry, dict):
        return {key: frozen(value) for key, value in entry.items()}
    return tuple(map(frozen, entry)) if isinstance(entry, list) else entry


def repeats(words: Sequence[str]) -> bool:
    """Whether fewer than half of the runs of three words are different, or fewer than a third of a dozen words and more."""
    runs = list(zip(words, words[1:], words[2:], strict=False))
    return len(set(runs)) < len(runs) / 2 or (12 <= len(words) <= 60 and len(set(words)) < len(words) / 3)
