"""The same stages where the world is loaded and not built: the paper's corpora, and the guards that screen them.

A corpus of half a million rows with pictures does not fit into memory and takes guards days: rows go through in parts,
their pictures stay where they lie, and every audit line is on disk before the next part begins. A killed screen goes on
after its last line.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from vlsafe import store
from vlsafe.outside import Origin
from vlsafe.schema import Example, Pair, Stored, to_row
from vlsafe.sources import CORPORA, Refused, examples, missing, place_of, stream
from vlsafe.stages.screening import intake_params, screen
from vlsafe.stages.study import Bar, Stage, Study, wanted

PART = 512  # rows that go through intake and guards together; a kill costs at most as many
NAMED = 1000  # how many refused rows and missing pictures of a corpus are named one by one
SCREENED = ("captions", "instructions")
EXAMPLES = (*SCREENED, "safety")
_TEXTS = {name: pa.string() for name in ("id", "source", "category", "cluster", "task", "description", "chosen", "rejected")}
_NESTED = {
    "turns": pa.list_(pa.struct({"role": pa.string(), "text": pa.string()})),
    "images": pa.list_(pa.struct({"bytes": pa.binary(), "path": pa.string()})),
}
COLUMNS = {
    kind: pa.schema([(name, {**_TEXTS, **_NESTED}[name]) for name in kind.__dataclass_fields__]) for kind in (Example, Pair)
}
AUDIT = pa.schema(
    [(name, pa.string()) for name in ("corpus", "id", "source", "category", "text_codes", "reasons")]
    + [(name, pa.bool_()) for name in ("has_picture", "kept", "skipped")]
    + [("text_score", pa.float64()), ("image_score", pa.float64()), ("converted", pa.int64())]
)


def corpora_params(study: Study) -> Any:
    """Where the corpora come from; those that a scale does without are None."""
    return {name: _identity(getattr(study.scale.loaded, name)) for name in CORPORA}


def _identity(origin: Origin | None) -> list[Any] | None:
    """What of an origin changes its rows. The commit of a first download is noted in the manifest and not here: results would
    otherwise be stale wherever that note is not at hand."""
    return None if origin is None else [origin.repo, origin.revision, origin.limit]


def _read_from(name: str, origin: Origin) -> str:
    place = place_of(name, origin)
    return f"{place.folder} below VLSAFE_DATA" if place.folder else place.address


class Noticed(NamedTuple):
    """What was noticed on the way through a corpus."""

    refused: Counter[str]
    pictures: Counter[str]
    named: list[list[str]]


def make_corpora(study: Study, work: Path) -> dict[str, Any]:
    """Read every corpus that the scale wants into rows without their pictures, and count what is not as published.

    Raises:   FileNotFoundError where a corpus is not there (a scale that says `null` for it does without); ValueError where
              more of its pictures are missing than `missing_share`: then it is the wrong folder
    """
    told: dict[str, Any] = {"from": {}, "rows": {}, "refused": {}, "missing_pictures": {}, "published": {}}
    named = {}
    for name in CORPORA:
        origin = getattr(study.scale.loaded, name)
        if origin is None:
            continue
        noticed = Noticed(Counter(), Counter(), [])
        rows = (to_row(row) for row in _noticed(stream(name, origin), noticed))
        n = store.write_stream(work / f"{name}.parquet", rows, COLUMNS[Example if name in EXAMPLES else Pair])
        _refuse_wrong_folder(name, n, noticed, wanted(study, "missing_share"))
        told["from"][name] = _read_from(name, origin)
        told["rows"][name], told["refused"][name] = n, dict(noticed.refused)
        told["missing_pictures"][name], named[name] = noticed.pictures["missing"], noticed.named
        told["published"][name] = published = origin.limit or origin.rows
        if published not in (None, n + noticed.refused.total()):
            print(f"{name}: {n + noticed.refused.total():,} rows, where {published:,} were expected", file=sys.stderr)
    store.write_text(work / "refused.json", json.dumps(named, indent=1))
    return told


def _noticed(rows: Iterable[Example | Pair | Refused], noticed: Noticed) -> Iterator[Example | Pair]:
    """The rows that are rows; the others, and missing pictures, are counted, and the first of them named."""
    for row in rows:
        absent = [] if isinstance(row, Refused) else [p.place for p in row.images if isinstance(p, Stored) and missing(p)]
        if isinstance(row, Refused):
            noticed.refused[row.reason] += 1
        else:
            noticed.pictures["missing"] += len(absent)
            noticed.pictures["all"] += len(row.images)
            yield row
        if (absent or isinstance(row, Refused)) and len(noticed.named) < NAMED:
            noticed.named.append([row.id, row.reason if isinstance(row, Refused) else f"no picture {absent[0]}"])


def _refuse_wrong_folder(name: str, n: int, noticed: Noticed, allowed: float) -> None:
    lost, pictures = noticed.pictures["missing"], noticed.pictures["all"]
    if not n:
        raise ValueError(f"{name} has no row that can be read ({noticed.refused.total()} refused); is this its file?")
    if lost > allowed * pictures:
        first = next(reason for _, reason in noticed.named if reason.startswith("no picture"))
        raise ValueError(f"{name}: {lost:,} of {pictures:,} pictures are missing, first: {first}; is this the official layout?")


def screen_params(study: Study) -> Any:
    """What decides which rows pass, beside the guards: the two corpora and what intake measures them with."""
    corpora = {name: _identity(getattr(study.scale.loaded, name)) for name in SCREENED}
    parents = sorted([one.repo, one.revision] for one in wanted(study, "parents").values())
    return [corpora, intake_params(study), study.scale.vision, parents]


def processors(study: Study) -> list[Any]:
    """One per backbone: a row must fit under every backbone's tokens and template."""
    from vlsafe import chat

    spec, parents, tower = study.scale.vision, wanted(study, "parents"), wanted(study, "tower")
    return [
        chat.hub_processor(parents[name], tower, backbone.template, spec.patch_size, spec.feature_strategy)
        for name, backbone in study.scale.backbones.items()
    ]


def make_screen(study: Study, work: Path) -> dict[str, Any]:
    """Intake and both guards over the two large corpora; what passes, and an audit line for every row."""
    from vlsafe import guards, mix

    text, image = (guards.opened(study.folder(f"guard/{kind}")) for kind in ("text", "image"))
    readers, limits, kept = processors(study), intake_params(study)["limits"], {}
    for name in SCREENED:
        lines = work / f"{name}.jsonl"

        def marked(rows: Sequence[Example], limit: int = limits[name]) -> list[dict[str, Any]]:
            return screen(rows, [mix.unsound(row, readers, limit) for row in rows], text, image)

        append_lines(lines, examples(name, wanted(study, name)), marked, Bar(f"screen {name}", wanted(study, name).rows or 0))
        rows = (to_row(row) for row in mix.passing(map(_shell, examples(name, wanted(study, name))), _read(lines)))
        kept[name] = store.write_stream(work / f"{name}.parquet", rows, COLUMNS[Example])
        if not kept[name]:
            raise ValueError(f"no row of {name} is left; the audit's first reason is {next(_read(lines))['reasons']!r}")
    audit = ({"corpus": name, **line} for name in SCREENED for line in _read(work / f"{name}.jsonl"))
    counts: Counter[str] = Counter()
    screened = store.write_stream(work / "audit.parquet", _counted(audit, counts), AUDIT)
    for name in SCREENED:
        (work / f"{name}.jsonl").unlink()
    sources = {name: _read_from(name, wanted(study, name)) for name in SCREENED}
    return {"from": sources, "kept": kept, "screened": screened, "skipped": counts["skipped"], "converted": counts["converted"]}


def _counted(lines: Iterable[dict[str, Any]], counts: Counter[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        counts.update({name: int(line[name]) for name in ("skipped", "converted")})
        yield line


def _shell(row: Example | Refused) -> Example:
    """A refused row as an empty one: its audit line says why it is not kept."""
    return Example(row.id, "", ()) if isinstance(row, Refused) else row


def append_lines(
    path: Path, rows: Iterable[Example | Refused], marked: Callable[[Sequence[Example]], list[dict[str, Any]]],
    progress: Callable[[int], None] = lambda done: None,
) -> None:  # fmt: skip
    """One audit line per row of a corpus, a part at a time, each part on disk before the next one is looked at.

    What an earlier attempt wrote is kept: half a line at its end is cut off, and it goes on with the row after the last whole
    one, so that no row is lost and none is there twice.

    Raises:   ValueError where the last line is about another row than the corpus has there
    """
    from vlsafe import mix

    done, last = store.whole_lines(path)
    iterator = iter(rows)
    for row in itertools.islice(iterator, done - 1, done) if done else ():
        if row.id != (told := json.loads(last)["id"]):
            raise ValueError(f"{path.name} ends with {told!r} where the corpus has {row.id!r}; the corpus has changed meanwhile")
    with open(path, "a", encoding="utf-8") as file:
        for part in store.parts(iterator, PART):
            readable = iter(marked([row for row in part if isinstance(row, Example)]))
            lines = [mix.skipped(_shell(row), row.reason) if isinstance(row, Refused) else next(readable) for row in part]
            file.writelines(json.dumps(line) + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
            done += len(part)
            progress(done)


def _read(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8") as file:
        yield from map(json.loads, file)


def pointed(which: str) -> Callable[[Study, Path], dict[str, Any]]:
    """A stage that notes which guard of the hub is meant; its weights stay in the hub's cache."""

    def make(study: Study, work: Path) -> dict[str, Any]:
        from vlsafe.guards import hub

        return hub.point(wanted(study, which), work)

    return make


def guard_params(which: str) -> Callable[[Study], Any]:
    def params(study: Study) -> Any:
        guard = getattr(study.scale.loaded, which)
        return guard and [_identity(guard.origin), guard.labels, guard.threshold]

    return params


WORLD = Stage(make_corpora, (), corpora_params, 0, told="minutes (not measured)", shared=True, seedless=True)
TEXT_GUARD, IMAGE_GUARD = (
    Stage(pointed(which), (), guard_params(which), 0, told="a second", shared=True, seedless=True)
    for which in ("text_guard", "image_guard")
)
SCREEN = Stage(
    make_screen, ("guard/text", "guard/image"), screen_params, 0, told="days of a GPU (not measured)", shared=True, seedless=True
)
