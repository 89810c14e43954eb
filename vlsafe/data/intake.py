"""Intake checks whether a model can be trained on a row; the audit says of every row whether it is kept, and why not.

Intake comes before the guards and is about form: a row that cannot be trained on is skipped, counted and named, never fatal, and
never reaches a guard. `screen` runs intake and guards over rows in memory, `append_lines` over a large corpus in resumable parts.
Unusual pictures are converted: an 8-bit picture of another mode than RGB (palette, grey, CMYK, with transparency) becomes RGB,
as in LLaVA, and is counted. Deeper ones are skipped: Pillow would clip them.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from vlsafe.core import store
from vlsafe.core.assets import TooLarge
from vlsafe.core.schema import Example, Item, Pair, content_digest, messages
from vlsafe.data.arms import answered
from vlsafe.data.files import Refused
from vlsafe.models.chat import image_tokens

Row = TypeVar("Row", Example, Pair)

MODES = ("RGB", "1", "L", "LA", "P", "PA", "RGBA", "RGBX", "CMYK", "YCbCr")
SIDE = 8  # pixels; assumed: about half a patch of CLIP's
PIXELS = 2**26  # assumed; less than what makes Pillow warn of a decompression bomb
PART = 512  # rows that go through intake and guards together; a kill loses at most as many
ASPECT = 10  # assumed: a centre crop of anything longer shows less than a tenth of it


def unsound(row: Example, processors: Sequence[Any], limit: int) -> str | None:
    """Why a row cannot be trained on, or None. Checks its texts, its pictures, its length, in this order.

    Units:    `limit` in tokens, image tokens included; it holds under every processor's chat template
    """
    if reason := _unsound_text(row, processors) or _unsound_picture(row):
        return reason
    length = max(tokens(row, processor) for processor in processors)
    return f"longer than the context ({length} > {limit})" if length > limit else None


def _unsound_text(row: Example, processors: Sequence[Any]) -> str | None:
    roles = " ".join(turn.role for turn in row.turns).removeprefix("system ")
    if not re.fullmatch("user assistant( user assistant)*", roles):
        return "turns out of order"
    for turn in row.turns:
        if turn.role != "system" and not (turn.text or "").strip():
            return "instruction empty" if turn.role == "user" else "answer empty"
    if any(re.search("[\ud800-\udfff]", turn.text or "") for turn in row.turns):
        return "half a character in the text"  # a lone surrogate, which no tokenizer takes
    control = {token for processor in processors for token in processor.tokenizer.all_special_tokens}
    if any(token in (turn.text or "") for turn in row.turns for token in control):
        return "control token in the text"  # an "<image>" that is only text would ask for features of no picture
    return None


def _unsound_picture(row: Example) -> str | None:
    for data in row.images:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                picture = Image.open(io.BytesIO(bytes(data)))
                short, long = sorted(picture.size)
                if short * long > PIXELS:
                    return "picture too large"
                if short < SIDE or long > ASPECT * short:
                    return f"picture too {'small' if short < SIDE else 'long'} ({picture.width} x {picture.height})"
                if picture.mode not in MODES:
                    return f"picture of mode {picture.mode}"
                picture.convert("RGB")  # decodes all of it: a truncated file fails here and not in the middle of a training
        except FileNotFoundError:
            return "picture missing"
        except (Image.DecompressionBombWarning, Image.DecompressionBombError, TooLarge):
            return "picture too large"
        except Exception:  # decoders of broken files raise OSError, SyntaxError, ValueError, struct.error, TypeError …
            return "picture corrupt"
    return None


def tokens(row: Example, processor: Any) -> int:
    """The length of a row in tokens as the model reads it: in its chat template, every picture as so many image tokens."""
    text = processor.apply_chat_template(messages(row.turns, len(row.images)), tokenize=False)
    with_placeholders = len(processor.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    return with_placeholders + sum(n - 1 for n in image_tokens(processor, row.images))


def unsound_pair(pair: Pair, processors: Sequence[Any], limit: int) -> str | None:
    """Why a preference row cannot be trained on, or None. It may have no picture, and several turns.

    A row with equal answers expresses no preference. A row that is too long with either answer is dropped, never cut: the cut
    would remove answers or image tokens.

    Raises:   ValueError naming a row without a prompt or without one of its answers
    """
    if not pair.turns or pair.chosen is None or pair.rejected is None:
        raise ValueError(f"the preference row {pair.id!r} lacks its prompt or one of its answers; is this its file?")
    if pair.chosen.strip() == pair.rejected.strip():
        return "chosen equals rejected"
    reasons = (unsound(answered(pair, answer), processors, limit) for answer in (pair.chosen, pair.rejected))
    return next((reason for reason in reasons if reason), None)


def sound(
    rows: Sequence[Row], check: Callable[[Row, Sequence[Any], int], str | None], processors: Sequence[Any], limit: int
) -> tuple[list[Row], list[list[str]]]:
    """The rows that can be trained on (ValueError where none is left), and the id of every other one with the reason."""
    reasons = [check(row, processors, limit) for row in rows]
    kept = [row for row, reason in zip(rows, reasons, strict=True) if reason is None]
    if not kept:
        first = f", the first, {rows[0].id!r}, because: {reasons[0]}" if rows else ""
        raise ValueError(f"none of {len(rows)} rows can be trained on{first}")
    return kept, [[row.id, reason] for row, reason in zip(rows, reasons, strict=True) if reason]


def tally(refused: Iterable[Sequence[str]]) -> dict[str, int]:
    """How many rows were refused for each reason; sizes that a reason ends with, in brackets, are not told apart."""
    return dict(Counter(reason.split(" (")[0] for _, reason in refused))


def _line(row: Example, reasons: Sequence[str], **measured: Any) -> dict[str, Any]:
    """An audit line; where intake refused the row, `skipped` is True and no guard assessed it."""
    columns = dict(id=row.id, source=row.source, category=row.category, has_picture=bool(row.images))
    empty = dict(text_score=None, text_codes="", image_score=None)
    return columns | empty | dict(reasons=",".join(reasons), kept=not reasons, skipped=False, converted=0) | measured


def audit(rows: Sequence[Example], text: Sequence[Any], image: Sequence[Any | None]) -> list[dict[str, Any]]:
    """One audit line per row: the guards' assessments, whether it is kept, and the true category to evaluate the guards.

    A row is dropped when a guard calls it unsafe, and also when a guard's answer could not be parsed ("unread"): then it is not
    known to be safe. `converted` counts its pictures that are not RGB.

    Shapes:   N rows, N text assessments, N image assessments (None: no picture)  ->  N lines
    """
    lines = []
    for row, of_text, of_image in zip(rows, text, image, strict=True):
        assessments = [(name, one) for name, one in (("text", of_text), ("image", of_image)) if one]
        reasons = [name for name, one in assessments if one.unsafe]
        reasons += [f"{name} unread" for name, one in assessments if one.unsafe is None]
        converted = sum(Image.open(io.BytesIO(bytes(data))).mode != "RGB" for data in row.images)
        scores = dict(text_score=of_text.score, image_score=of_image.score if of_image else None)
        lines.append(_line(row, reasons, text_codes=",".join(of_text.categories), converted=converted, **scores))
    return lines


def passing(rows: Iterable[Example], lines: Iterable[dict[str, Any]], unfiltered: bool = False) -> Iterator[Example]:
    """The rows that the audit keeps, in order, or all that intake has not skipped, whatever guards say of them.

    Raises:   ValueError where the audit is about other rows
    """
    for row, line in zip(rows, lines, strict=True):
        if row.id != line["id"]:
            raise ValueError(f"the audit has {line['id']!r} where the corpus has {row.id!r}")
        if line["kept"] or (unfiltered and not line["skipped"]):
            yield row


def refuse_leaks(training: Iterable[Example | Pair], items: Iterable[Item]) -> None:
    """Raise ValueError where a training row holds a benchmark prompt as one of its requests, pictures included.

    Only pictures of rows whose request is that of an item are read: those of half a million rows take hours.
    """
    by_text: dict[str, list[Item]] = {}
    for item in items:
        by_text.setdefault(content_digest(replace(item, images=())), []).append(item)
    leaked: dict[str, None] = {}
    for row in training:
        for turn in (turn for turn in row.turns if turn.role == "user"):
            request = Example(row.id, row.source, (turn,), row.images)
            if same := by_text.get(content_digest(replace(request, images=()))):
                prompt = content_digest(request)
                leaked.update(dict.fromkeys(item.id for item in same if content_digest(item) == prompt))
    if leaked:
        raise ValueError(f"{len(leaked)} benchmark prompts are also in training rows, first {next(iter(leaked))!r}")


def screen(rows: Sequence[Example], processors: Sequence[Any], limit: int, text: Any, image: Any) -> list[dict[str, Any]]:
    """One audit line per row, in order. A row must fit under every processor's template; guards assess the sound rows only.

    Units:    `limit` in tokens
    """
    defects = [unsound(row, processors, limit) for row in rows]
    kept = [row for row, defect in zip(rows, defects, strict=True) if defect is None]
    results = iter(image.assess([picture for row in kept for picture in row.images]))
    pictures = [[next(results) for _ in row.images] for row in kept]
    worst = [max(of, key=lambda one: (one.unsafe is not False, one.score), default=None) for of in pictures]
    lines = iter(audit(kept, text.assess([row.turns for row in kept]), worst))
    return [_line(row, [defect], skipped=True) if defect else next(lines) for row, defect in zip(rows, defects, strict=True)]


def append_lines(
    path: Path, rows: Iterable[Example | Refused], assess: Callable[[Sequence[Example]], list[dict[str, Any]]],
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
            readable = iter(assess([row for row in part if isinstance(row, Example)]))
            for row in part:
                line = _line(shell(row), [row.reason], skipped=True) if isinstance(row, Refused) else next(readable)
                file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
            done += len(part)
            progress(done)


def shell(row: Example | Refused) -> Example:
    """A refused row as an empty example: its audit line says why it is not kept."""
    return Example(row.id, "", ()) if isinstance(row, Refused) else row
