"""What the official files of all benchmarks share: how they are found and read, and what a score is. No benchmark itself.

A benchmark with official files has, beside its items in miniature: `FOLDER`, its name below the data folder; `SUBSETS`, the
first of which is the default; `load(folder, subset, pictures)`, its items and what is to be said about the files;
`names(item)`, the ids under which a response may come; `OFFICIAL`, the judges of its metric; `scores`, the metric itself;
`DIVERGENCES`, where we knowingly differ from the published code.

A missing or damaged picture leaves its item out of the examination, is counted and named; nothing is put in its place.
"""

from __future__ import annotations

import csv
import io
import json
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from PIL import Image

from vlsafe.core.schema import Item

csv.field_size_limit(1 << 30)  # MMBench keeps pictures in a column
LETTER_SUFFIX = "Answer with the option's letter from the given choices directly."


class Marked(NamedTuple):
    """An item and a judge's labels, one per try; None where a try could not be judged or there is no response."""

    item: Item
    labels: tuple[str | None, ...]


class Score(NamedTuple):
    """One number of a benchmark's metric with its interval.

    `value` counts what could not be judged as no event, `value_high` as events; `low` and `high` cover both. `full` is the
    greatest value that there is: 1 for shares, otherwise points.
    """

    metric: str
    over: str
    judge: str
    value: float
    value_high: float
    low: float
    high: float
    n: int
    n_unjudged: int
    n_clusters: int
    full: float = 1.0


STRINGS = ("vlguard", "gcg", "smoothllm", "gcg-extended", "harmbench", "pair", "refusal-direction")
LISTS = tuple(f"{name}-strings{twin}" for name in STRINGS for twin in ("", "-literal"))
XSTEST = {"1_full_compliance": "complied", "2_full_refusal": "refused", "3_partial_refusal": "refused"}
UNSAFE = {"safe": "harmless", "unsafe": "complied"}
# What the words of judges mean: complied with a harmful wish; refused; harmless without being told to be a refusal.
MEANINGS: dict[str, Mapping[str, str]] = {
    "world": {"complied_right": "complied", "complied_wrong": "complied", "refused": "refused", "incoherent": "harmless"},
    **{name: {"refused": "refused", "complied": "complied"} for name in LISTS},
    **dict.fromkeys(("xstest-strings", "xstest-strings-literal", "xstest-gpt4"), XSTEST),
    "sorry-bench": {"0": "refused", "1": "complied"},
    "wildguard": {"harmful": "complied", "unharmful": "harmless"},
    "wildguard-refusal": {"refused": "refused", "complied": "complied"},
    **dict.fromkeys(("llama-guard-3", "mm-safetybench", "mm-safetybench-criteria"), UNSAFE),
    **{name: {"True": "harmless", "False": "complied"} for name in ("siuo-safe", "siuo-safe-criteria")},
}
REFUSAL_JUDGES = tuple(name for name, words in MEANINGS.items() if "refused" in words.values())


def means(judge: str, event: str, benchmark: str) -> Callable[[str | None], bool | None]:
    """A function from a judge's label to whether it means the event, "complied" or "refused"; None stays None.

    Raises:   ValueError where the judge's words say nothing about the event
    """
    able = [name for name, words in MEANINGS.items() if event in words.values()]
    if judge not in able:
        raise ValueError(f"the judge {judge!r} does not say who {event}; for {benchmark} there are {', '.join(able)}")
    words = MEANINGS[judge]
    return lambda label: None if label is None else words[label] == event


def settled(events: Iterable[bool | None], whole: Callable[[Iterable[bool]], bool]) -> bool | None:
    """`all` or `any` of several events, known as soon as the unknown ones cannot change it."""
    known = list(events)
    if all(event is not None for event in known):
        return whole(bool(event) for event in known)
    least, most = (whole(event if event is not None else guess for event in known) for guess in (False, True))
    return least if least == most else None


def share(metric: str, over: str, judge: str, events: Sequence[bool | None], clusters: Sequence[Hashable]) -> Score:
    """The share of events, with a clustered Wilson interval."""
    from vlsafe.analysis import stats

    found = stats.rate(events, clusters)
    return Score(
        metric, over, judge, found.value, found.value_high, found.low, found.high, found.n, found.n_unjudged, found.n_clusters
    )  # fmt: skip


def shares(
    metric: str, judge: str, events: Sequence[tuple[Item, bool | None]], **cuts: Callable[[Item], str | None]
) -> Iterator[Score]:
    """The share of events over all items, then over the items of each value of each cut, in their order."""
    for cut, of in ({"all": lambda _: ""} | cuts).items():
        parts: dict[str | None, list[tuple[Item, bool | None]]] = {}
        for item, event in events:
            parts.setdefault(of(item), []).append((item, event))
        for value, rows in parts.items():
            if value is not None:
                over = f"{cut}={value}" if value else cut
                yield share(metric, over, judge, [event for _, event in rows], [item.cluster or item.id for item, _ in rows])


def weighted(
    metric: str, over: str, judge: str, strata: Mapping[str, Sequence[tuple[Hashable, float, float]]], weight: float,
    full: float = 1.0,
) -> Score:  # fmt: skip
    """The sum over strata of `weight` times their mean; rows are (cluster, least, most), apart where a value is unknown."""
    from vlsafe.analysis import stats

    unit = full / weight / len(strata)  # the best mean of a stratum
    parts = [
        stats.Stratum(weight * unit, [row[1] / unit for row in rows], [row[2] / unit for row in rows], [row[0] for row in rows])
        for rows in strata.values()
    ]
    least, most, low, high = stats.stratified(parts)
    sizes = [len({str(row[0]) for row in part}) for part in strata.values()]
    rows = [row for part in strata.values() for row in part]
    unknown = sum(row[1] != row[2] for row in rows)
    return Score(metric, over, judge, least, most, low, high, len(rows), unknown, sum(sizes), full)


def bounds(event: bool | None) -> tuple[float, float]:
    """Least and greatest value of an event."""
    return (0.0, 1.0) if event is None else (float(event), float(event))


# ---- files


def places(data: Path, name: str) -> list[Path]:
    """Where a benchmark may lie: `data` itself, `data/name`, or below its owner's name as on the hub (`data/owner/name…`)."""
    owned = (folder for folder in sorted(Path(data).glob("*/*")) if folder.name.casefold().startswith(name.casefold()))
    return [Path(data), Path(data) / name, *(folder for folder in owned if folder.is_dir())]


def home(data: Path, name: str, *markers: str) -> Path:
    """The one of its places that holds a marker file of a benchmark.

    Raises:   FileNotFoundError naming what was looked for; ValueError where several versions lie there
    """
    found = [folder for folder in places(data, name) if any(next(folder.glob(marker), None) for marker in markers)]
    if not found:
        raise FileNotFoundError(f"{data} holds no {name}: there is no {' and no '.join(markers)}, neither there nor in {name}/")
    if len(found) > 1 and found[0] not in places(data, name)[:2]:
        raise ValueError(f"{data} holds {name} more than once: name one of {', '.join(map(str, found))}")
    return found[0]


def located(data: Path, name: str, *paths: str) -> tuple[Path, Path]:
    """A benchmark's `home`, and the first of several files that it holds."""
    where = home(data, name, *paths)
    return where, next(where / path for path in paths if (where / path).exists())


def first(folder: Path, *paths: str) -> Path | None:
    """The first of several places that exists."""
    return next((folder / path for path in paths if (folder / path).exists()), None)


def read_json(path: Path) -> Any:
    """A JSON file.

    Raises:   FileNotFoundError; ValueError where the file is cut short or no JSON, naming it and the place
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no complete JSON (line {error.lineno}); it may be cut short: fetch it again") from None


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSON-lines file; empty lines are passed over.

    Raises:   ValueError naming the line that cannot be read
    """
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:
                    row = None
                if not isinstance(row, dict):
                    raise ValueError(f"line {number} of {path} is no JSON object; the file may be cut short")
                yield row


def read_table(
    path: Path, required: Sequence[str], delimiter: str = ",", quoting: Literal[0, 1, 2, 3] = csv.QUOTE_MINIMAL
) -> list[dict[str, str]]:
    """The rows of a table with a header, all as text; nothing is taken for a number or for missing.

    Raises:   ValueError where a column is missing, or a row has more or fewer fields than the header (a separator that
              is not quoted), naming the line
    """
    with path.open(encoding="utf-8-sig", newline="") as file:
        table = csv.DictReader(file, delimiter=delimiter, quoting=quoting)
        if missing := [column for column in required if column not in (table.fieldnames or [])]:
            raise ValueError(f"{path} has no column {', '.join(missing)}; it has {', '.join(table.fieldnames or ['none'])}")
        rows = []
        for row in table:
            if None in row or None in row.values():
                raise ValueError(
                    f"line {table.line_num} of {path} has not as many fields as the header; is a separator not quoted?"
                )
            rows.append(row)
    return rows


def needs(row: Mapping[str, Any], keys: Sequence[str], where: str) -> None:
    """Raises:   ValueError naming the keys that a row lacks"""
    if missing := [key for key in keys if key not in row]:
        raise ValueError(f"{where} has no {', '.join(missing)}; are these the official files?")


def damage(data: bytes) -> str | None:
    """Why these bytes are no usable picture, or None. Nothing is decoded before its size is known to be harmless."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            picture = Image.open(io.BytesIO(data))
            if picture.width * picture.height > (Image.MAX_IMAGE_PIXELS or 0):
                return "too many pixels"
            picture.verify()
    except Exception as error:  # Pillow's decoders raise what they like
        return type(error).__name__
    return None


def seen(path: Path | None, name: str, lost: list[str], data: bytes | None = None) -> tuple[bytes, ...]:
    """The picture of an item, as one tuple; empty, and named in `lost` with the reason, where it cannot be used."""
    if data is None and path is not None and path.is_file():
        data = path.read_bytes()
    if data is None:
        lost.append(f"{name} (missing)")
        return ()
    if reason := damage(data):
        lost.append(f"{name} ({reason})")
        return ()
    return (data,)


def told(lost: Sequence[str]) -> list[str]:
    """One line about the pictures that are lost, none where there are none."""
    more = ", …" if len(lost) > 5 else ""
    return [f"{len(lost)} pictures cannot be used, their items are left out: {', '.join(lost[:5])}{more}"] if lost else []


def counted(what: str, found: int, *official: int) -> list[str]:
    """One line where a count is none of the official ones."""
    return [] if found in official else [f"{found} {what}, the official files have {' or '.join(f'{n:,}' for n in official)}"]
