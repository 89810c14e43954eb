"""The row types that modules exchange: training examples, preference pairs, benchmark items, responses, verdicts.

Rows of every corpus and of every benchmark, real or miniature, have these types, which know neither models nor files. Pictures
are bytes of a picture file, so that a row means the same in memory, in a file and on another machine; those of large corpora
stay where they are (`Stored`) until their bytes are needed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, TypeVar

from vlsafe.core import assets

ROLES = ("system", "user", "assistant")
SCORINGS = ("generated", "likelihood")
# The runs that every other one is compared with: kind of model -> stage/recipe.
MAIN_LINE = {"parent": "parent/aligned", "stage 1": "projector/filtered", "adapted": "instruct/filtered-full"}
# The seed where none is named: of eight seeds of mini-chat, ordered by the adapted text ASR, the lower of the middle two.
MEDIAN_SEED = 4


@dataclass(frozen=True)
class Turn:
    """One message of a conversation; pictures of a row belong to its first user turn."""

    role: str
    text: str

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"a turn has the role {self.role!r}; the roles are {', '.join(ROLES)}")


@dataclass(frozen=True)
class Stored:
    """A picture that stays below `VLSAFE_DATA` or in an archive (`assets.outside_bytes`) until `bytes(it)`."""

    place: str

    def __bytes__(self) -> bytes:
        return assets.outside_bytes(self.place)


Picture = bytes | Stored


@dataclass(frozen=True)
class Example:
    """A training row: a whole conversation, its pictures, and metadata.

    `category` is the kind of harm (None: benign); guards are evaluated against it and never see it. Rows of one `cluster` are
    about the same thing, so that splits can be kept apart. `task` is the kind of row, where known ("how-to", "look");
    `description` says in words what its picture shows, for the text-only twin.
    """

    id: str
    source: str
    turns: tuple[Turn, ...]
    images: tuple[Picture, ...] = ()
    category: str | None = None
    cluster: str | None = None
    task: str | None = None
    description: str | None = None


@dataclass(frozen=True)
class Pair:
    """A preference row: one prompt, a chosen and a rejected answer (SafeRLHF, SPA-VL)."""

    id: str
    source: str
    turns: tuple[Turn, ...]
    chosen: str
    rejected: str
    images: tuple[Picture, ...] = ()
    category: str | None = None
    cluster: str | None = None


@dataclass(frozen=True)
class Item:
    """One benchmark prompt. `reference` is the right answer, `cluster` what its answers correlate within.

    `group` is the benchmark's own subdivision that its metric averages over (image kind, type, task). `scoring`: the response
    is generated, or it is the letter of the option to which the model gives the highest likelihood as its answer; such options
    are texts as the assistant would write them. `question` is what a judge is told was asked, where that is not the last user
    turn (FigStep's question, SORRY-Bench's base wording of a mutation); `note` is what else a judge has to know (SIUO's safety
    warning).

    Raises:   ValueError for an unknown scoring, or a ranking without at least two options
    """

    id: str
    benchmark: str
    turns: tuple[Turn, ...]
    images: tuple[Picture, ...] = ()
    reference: str | None = None
    category: str | None = None
    cluster: str | None = None
    group: str | None = None
    harmful: bool = False
    options: tuple[str, ...] = ()
    scoring: str = "generated"
    question: str | None = None
    note: str | None = None

    def __post_init__(self) -> None:
        if self.scoring not in SCORINGS:
            raise ValueError(f"the item {self.id} has the scoring {self.scoring!r}; there are {', '.join(SCORINGS)}")
        if self.scoring == "likelihood" and len(self.options) < 2:
            raise ValueError(f"the item {self.id} is to be ranked and has {len(self.options)} options")


@dataclass(frozen=True)
class Response:
    """What a model answered to an item. `truncated`: the token limit cut it off. `refusal`: the probability that it begins with a
    word that refusals begin with, after a sentence that names what is seen; None where the engine does not say, and of ranked
    options."""

    item: str
    benchmark: str
    model: str
    text: str
    truncated: bool = False
    refusal: float | None = field(default=None, compare=False)  # its last bits depend on the batch


@dataclass(frozen=True)
class Verdict:
    """A judge's verdict on a response; `label` is one of the judge's own labels or "unjudged", never a default."""

    item: str
    benchmark: str
    model: str
    judge: str
    label: str
    detail: str = field(default="")


Row = TypeVar("Row", Example, Pair, Item, Response, Verdict)


def to_row(value: Any) -> dict[str, Any]:
    """A plain dictionary for Parquet and `datasets`; pictures become `{"bytes", "path"}` as in `datasets.Image`, stored ones
    their place alone."""
    row = {name: list(cell) if isinstance(cell, tuple) else cell for name, cell in asdict(value).items()}
    if "images" in row:
        row["images"] = [
            {"bytes": None, "path": image.place} if isinstance(image, Stored) else {"bytes": image, "path": None}
            for image in value.images
        ]
    return row


def from_row(kind: type[Row], row: Mapping[str, Any]) -> Row:
    """The inverse of `to_row`. A column may be absent where its field has a default: rows may be older than the field.

    Raises:   ValueError when the row has other columns than `kind` has fields, naming the difference.
    """
    optional = {f.name for f in fields(kind) if f.default is not MISSING}
    if wrong := (set(row) ^ {f.name for f in fields(kind)}) - (optional - set(row)):
        raise ValueError(f"a row of {kind.__name__} has the wrong columns: {sorted(wrong)}")
    convert: dict[str, Callable[[Any], Any]] = {
        "turns": lambda turn: Turn(turn["role"], turn["text"]),
        "images": lambda image: Stored(image["path"]) if image["bytes"] is None else image["bytes"],
        "options": str,
    }
    values: dict[str, Any] = {name: tuple(map(convert[name], v)) if name in convert else v for name, v in row.items()}
    return kind(**values)


def content_digest(value: Example | Pair | Item) -> str:
    """Digest of the turns and pictures of a row, whatever its id: splits are disjoint when these are."""
    turns = [[turn.role, turn.text] for turn in value.turns]
    hashed = hashlib.sha256(json.dumps(turns).encode())
    for image in value.images:
        hashed.update(hashlib.sha256(bytes(image)).digest())
    return hashed.hexdigest()[:16]


def messages(turns: Iterable[Turn], n_images: int = 0) -> list[dict[str, Any]]:
    """Chat messages in the library's block form; the pictures stand before the text of the first user turn.

    Source:   LLaVA moves every image token to the front of the first human message (preprocess_multimodal).
    """
    result: list[dict[str, Any]] = []
    for turn in turns:
        images = [{"type": "image"}] * n_images if turn.role == "user" else []
        n_images -= len(images)
        result.append({"role": turn.role, "content": [*images, {"type": "text", "text": turn.text}]})
    if n_images:
        raise ValueError("a row has pictures but no user turn to carry them")
    return result
