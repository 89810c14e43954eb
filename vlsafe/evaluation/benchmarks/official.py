"""What the benchmarks with official files share: defaults, the meaning of judges' labels, scores, and files. No benchmark itself.

Such a benchmark has, beside its items in miniature: `FOLDER`, `OFFICIAL` and `DIVERGENCES` as `published.yaml` explains them;
`load(folder, subset, pictures)`, its items and notes about the files; `scores(marks)`, the metric itself. It may define its own
`names`, `part`, `plain`, `QUALIFIERS` and `TRIES`; otherwise those of this file hold (`own`).
"""

from __future__ import annotations

import io
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import yaml
from PIL import Image

from vlsafe.analysis import stats
from vlsafe.analysis.clustered import Stratum, stratified
from vlsafe.core.schema import Item
from vlsafe.core.texts import read_json, read_lines, read_table, read_text, text_lines  # noqa: F401 (how benchmarks read)
from vlsafe.data.miniature.corpora import listed
from vlsafe.evaluation.judges.rules import LISTS

PUBLISHED: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("published.yaml").read_text(encoding="utf-8"))


def published(name: str) -> tuple[str, dict[str, list[str]], list[str], dict[str, Any]]:
    """Folder, subsets with their judges, divergences and tables of a benchmark, as `published.yaml` explains them."""
    entry = PUBLISHED[name]
    return entry["folder"], entry["official"], entry["divergences"], entry.get("tables", {})


def letter_prompt(question: str, options: Sequence[str]) -> str:
    """LLaVA-1.5's multiple-choice wording."""
    return f"{listed(question, options)}\nAnswer with the option's letter from the given choices directly."


# ---- defaults


def own(benchmark: ModuleType, name: str) -> Any:
    """What a benchmark's module defines under a name, or the default below: `own(mme, "names")(item)`."""
    return getattr(benchmark, name, globals()[name])


def names(item: Item) -> tuple[str, ...]:
    """The ids that a response to an item may come under: the item's, also without its group (then with QUALIFIERS)."""
    return tuple(dict.fromkeys((item.id, item.id.removeprefix(f"{item.group}/"))))


def fits(benchmark: ModuleType, item: Item, row: Mapping[str, Any]) -> bool:
    """Whether a response's row may be about an item: it agrees in those QUALIFIERS that it holds."""
    values = {key: str(value_of(item)) for key, value_of in own(benchmark, "QUALIFIERS").items() if key in row}
    return all(own(benchmark, "plain")(str(row[key])) == own(benchmark, "plain")(value) for key, value in values.items())


def part(item: Item) -> str:
    """The part of the benchmark that an item belongs to; parts without any response are not scored."""
    return str(item.group)


GROUP, CATEGORY = attrgetter("group"), attrgetter("category")
QUALIFIERS: dict[str, Callable[[Item], Any]] = {}  # key of a response's row that tells items of one name apart: its value
plain = str.casefold  # values of QUALIFIERS as they are compared
TRIES: dict[str, int] = {}  # subset: how many responses to an item count, if more than one


# ---- scores


class Marked(NamedTuple):
    """An item and a judge's labels, one per try; None where a try could not be judged or there is no response."""

    item: Item
    labels: tuple[str | None, ...]


Marks = Mapping[str, Sequence[Marked]]  # judge: its labels of all items
Event = tuple[Item, bool | None]  # whether what a metric counts has happened; None: unknown


class Score(NamedTuple):
    """One number of a benchmark's metric with its interval.

    `value` counts what could not be judged as no event, `value_high` as events; `low` and `high` cover both. `full` is the
    greatest possible value: 1 for shares, otherwise points.
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


Scores = Iterator[Score]
# Judge: what its labels mean. Lists of refusal strings say one of two things, the rest is in the file.
MEANINGS: dict[str, Mapping[str, str]] = {
    **{f"{name}{twin}": {"refused": "refused", "complied": "complied"} for name in LISTS for twin in ("", "-literal")},
    **PUBLISHED["meanings"],
}


def means(judge: str, event: str, benchmark: str) -> Callable[[str | None], bool | None]:
    """A function from a judge's label to whether it means the event, "complied" or "refused"; None stays None.

    Raises:   ValueError where the judge's labels say nothing about the event
    """
    able = [name for name, labels in MEANINGS.items() if event in labels.values()]
    if judge not in able:
        raise ValueError(f"the judge {judge!r} does not say who {event}; for {benchmark} there are {', '.join(able)}")
    return lambda label: None if label is None else MEANINGS[judge][label] == event


def judged(judge: str, event: str, rows: Sequence[Marked]) -> list[Event]:
    """Whether the first response to each item is the event; raises as `means` does, unless there are no rows."""
    is_event = means(judge, event, rows[0].item.benchmark) if rows else None
    return [(row.item, is_event(row.labels[0])) for row in rows if is_event]


def right(rows: Sequence[Marked], letters: bool = False) -> list[Event]:
    """Whether the first response to each item is right; with `letters`, labels may be the letters of options.

    Raises:   ValueError where a label says nothing of that, or the file does not tell which letter is right
    """
    labels = [(row.item, row.labels[0]) for row in rows]
    for item, label in labels:
        letter = letters and label is not None and len(label) == 1
        if not letter and label not in (None, "right", "wrong", "other"):
            raise ValueError(f"the judge says {label!r} of {item.id}, which is not whether it is right")
        if letter and item.reference is None:
            raise ValueError(f"the file does not tell the right answer to {item.id}; it can be scored by its authors alone")
    return [(item, None if label is None else label in ("right", item.reference if letters else "")) for item, label in labels]


def settled(events: Iterable[bool | None], whole: Callable[[Iterable[bool]], bool]) -> bool | None:
    """`all` or `any` of several events, known as soon as the unknown ones cannot change it."""
    known = list(events)
    least, most = (whole(guess if event is None else bool(event) for event in known) for guess in (False, True))
    return least if least == most else None


def grouped(events: Iterable[Event], key: Callable[[Item], Any]) -> dict[Any, list[Event]]:
    """Events by the value of a key of their items, both in the order in which they come."""
    groups: dict[Any, list[Event]] = {}
    for item, event in events:
        groups.setdefault(key(item), []).append((item, event))
    return groups


def share(metric: str, over: str, judge: str, events: Sequence[Event]) -> Score:
    """The share of events, with a clustered Wilson interval."""
    rate = stats.rate([event for _, event in events], [item.cluster or item.id for item, _ in events])
    return Score(metric, over, judge, **asdict(rate))


def shares(
    metric: str, judge: str, events: Sequence[Event], cuts: Mapping[str, Callable[[Item], Any]] = {}, within: str = ""
) -> Scores:
    """The share of events over all items, then over the items of each value of each cut; `within` names what all of them are."""
    if events:
        yield share(metric, within or "all", judge, events)
    for cut, value_of in cuts.items():
        for value, rows in grouped(events, value_of).items():
            if value is not None:
                yield share(metric, f"{within}, {cut}={value}" if within else f"{cut}={value}", judge, rows)


def weighted(
    metric: str, over: str, judge: str, strata: Mapping[str, Sequence[tuple[Hashable, float, float]]], weight: float,
    full: float = 1.0,
) -> Score:  # fmt: skip
    """The sum over strata of `weight` times their mean; rows are (cluster, least, most), apart where a value is unknown."""
    unit = full / weight / len(strata)  # the best mean of a stratum
    parts = [
        Stratum(weight * unit, [row[1] / unit for row in rows], [row[2] / unit for row in rows], [row[0] for row in rows])
        for rows in strata.values()
    ]
    n_clusters = len({str(row[0]) for rows in strata.values() for row in rows})
    rows = [row for stratum in strata.values() for row in stratum]
    unknown = sum(row[1] != row[2] for row in rows)
    return Score(metric, over, judge, *stratified(parts), len(rows), unknown, n_clusters, full)


def bounds(event: bool | None) -> tuple[float, float]:
    """Least and greatest value of an event."""
    return (0.0, 1.0) if event is None else (float(event), float(event))


# ---- files


def load(benchmark: ModuleType, folder: Path, subset: str, pictures: bool = True) -> tuple[list[Item], list[str]]:
    """The items of a benchmark's official files, and notes about these.

    Raises:   as the benchmark's own `load`; ValueError also where a file is whole and holds something else than the official one
    """
    try:
        items, notes = benchmark.load(folder, subset, pictures)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        what = f"has no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"a file of {benchmark.NAME} in {folder} is not as the official one ({what}); fetch it again") from error
    except zipfile.BadZipFile as error:
        raise ValueError(f"an archive of {benchmark.NAME} in {folder} is not whole ({error}); fetch it again") from None
    if double := [name for name, n in Counter(item.id for item in items).items() if n > 1]:
        raise ValueError(f"{benchmark.NAME} in {folder} has {double[0]!r} twice; ids tell its items apart")
    for item in items:
        texts = (item.id, item.cluster, item.group, item.category, item.reference, item.question, item.note, *item.options)
        if not all(isinstance(text, str | None) for text in (*texts, *(turn.text for turn in item.turns))):
            raise ValueError(f"the item {item.id!r} of {benchmark.NAME} in {folder} holds something else where a text should be")
    return items, notes


def subset(benchmark: ModuleType, generated: bool = False) -> str:
    """The default subset of a benchmark, or the first one whose responses are `generated` and not ranked by likelihood."""
    return next(name for name in benchmark.OFFICIAL if not (generated and name == "likelihood"))


def places(data: Path, name: str) -> list[Path]:
    """Where a benchmark may lie: `data` itself, `data/name`, or below its owner's name as on the hub (`data/owner/name…`)."""
    owned = (folder for folder in sorted(Path(data).glob("*/*")) if folder.name.casefold().startswith(name.casefold()))
    return [Path(data), Path(data) / name, *(folder for folder in owned if folder.is_dir())]


def located(data: Path, name: str, *patterns: str) -> Path:
    """A file of a benchmark: in the one of its places that holds any, the one that fits the first pattern which any file fits.

    Raises:   FileNotFoundError naming what was looked for; ValueError where several versions lie there
    """
    files: dict[Path, Path] = {}
    for folder in places(data, name):
        for path in (path for pattern in patterns for path in folder.glob(pattern)):
            files.setdefault(folder, path)
    if not files:
        raise FileNotFoundError(f"{data} holds no {name}: there is no {' and no '.join(patterns)}, neither there nor in {name}/")
    folder, path = next(iter(files.items()))
    if len(files) > 1 and folder not in places(data, name)[:2]:
        raise ValueError(f"{data} holds {name} more than once: name one of {', '.join(map(str, files))}")
    return path


def first(folder: Path, *paths: str) -> Path | None:
    """The first of several places that exists."""
    return next((folder / path for path in paths if (folder / path).exists()), None)


def needs(row: Mapping[str, Any], keys: Sequence[str], where: str, remedy: str = "are these the official files?") -> None:
    """Raises:   ValueError naming the keys that a row lacks, and the remedy"""
    if missing := [key for key in keys if key not in row]:
        raise ValueError(f"{where} has no {', '.join(missing)}; {remedy}")


def damage(data: bytes) -> str | None:
    """Why these bytes are no usable picture, or None. Nothing is decoded before its size is known to be harmless."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))
            if image.width * image.height > (Image.MAX_IMAGE_PIXELS or 0):
                return "too many pixels"
            image.verify()
    except Exception as error:  # Pillow's decoders raise what they like
        return type(error).__name__
    return None


@dataclass
class Loader:
    """What a `load` gathers: items, notes about the files, and the pictures that cannot be used, with the reason.

    A missing or damaged picture leaves its item out of the examination, is counted and named; nothing is put in its place.
    """

    pictures: bool
    items: list[Item] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    lost: dict[str, str] = field(default_factory=dict)

    def add(self, item: Item, source: Path | bytes | None, name: str | None = None) -> None:
        """An item with its picture, if pictures are wanted; a lost one is noted by its `name` (the item's)."""
        if self.pictures:
            data = (source.read_bytes() if source.is_file() else None) if isinstance(source, Path) else source
            if data is None or (reason := damage(data)):
                self.lost[name or item.id] = "missing" if data is None else str(reason)
                return
            item = replace(item, images=(data,))
        self.items.append(item)

    def result(self) -> tuple[list[Item], list[str]]:
        """Items and notes, the last of which names the first lost pictures."""
        lost = [f"{name} ({reason})" for name, reason in self.lost.items()]
        shown = ", ".join(lost[:5]) + ", …" * (len(lost) > 5)
        note = [f"{len(lost)} pictures cannot be used, their items are left out: {shown}"] if lost else []
        return self.items, self.notes + note


def counted(what: str, n: int, *official: int) -> list[str]:
    """One line where a count is none of the official ones."""
    return [] if n in official else [f"{n} {what}, the official files have {' or '.join(f'{size:,}' for size in official)}"]
