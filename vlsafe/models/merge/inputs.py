"""What goes into a merge: checkpoints by the names that they share, and what keeps them from being merged.

With `language_only`, language weights go by their names within the decoder, which a model and its text parent share; else all
weights go by their names in memory. No weight is left out because its name is not understood: that is an error with names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vlsafe.core import store, writing
from vlsafe.models import weights
from vlsafe.models.architectures import (
    DERIVED,
    EMBEDDING,
    HEAD,
    Family,
    canonical,
    decoder_type,
    family_of,
    language_name,
    naming,
    part_of,
    ties,
    unrecognised,
)  # fmt: skip
from vlsafe.models.weights import Entry, read_object, read_tensor

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Words(NamedTuple):
    """Tokens with their ids, and which of them were added to the vocabulary."""

    ids: dict[str, int]
    added: set[str]


class Checkpoint(NamedTuple):
    """A model folder: its shards, its tensors by the names that models share, and the names of those that are merged; its family;
    the names of embedding and head (`tables`), whether its config ties them; its tokens, where it has a tokenizer.json."""

    folder: Path
    shards: tuple[Path, ...]
    tensors: dict[str, Entry]
    keys: set[str]
    family: Family
    tables: tuple[str, str]
    tied: bool
    words: Words | None


class Rows(NamedTuple):
    """The rows of embedding and head that are merged, of `whole` that A has; `own` of them stay A's: no other model has their
    tokens, or A has not."""

    merged: int
    whole: int
    own: tuple[int, ...] = ()

    def shared(self) -> list[int]:
        """The rows that are merged, in their order."""
        return sorted({*range(self.merged)} - {*self.own})

    def __str__(self) -> str:
        rest = f", the other {self.whole - self.merged} are A's" if self.merged < self.whole else ""
        own = f", without {len(self.own)} whose tokens differ" if self.own else ""
        return f"the first {self.merged} rows{own}{rest}"


class OnDisk(Mapping[str, torch.Tensor]):
    """The weights of a model folder as its model has them in memory, in fp32: each is read when it is looked up. A tied one has
    both names, the head's last; `rename` gives them other names."""

    def __init__(self, folder: Path, rename: Callable[[str], str] = str) -> None:
        held = checkpoint(folder)
        found = {key: held.tensors[key] for key in held.tensors if key in held.keys}
        embedding, head = held.tables
        if held.tied and (one := found.get(embedding) or found.get(head)):
            found = {embedding: one, **found, head: found.pop(head, one)}
        self.entries = {rename(key): entry for key, entry in found.items()}

    def __getitem__(self, key: str) -> torch.Tensor:
        return read_tensor(self.entries[key][:2]).float()

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def checkpoint(folder: Path, language_only: bool = False) -> Checkpoint:
    """Read the headers of a model folder.

    Raises:   FileNotFoundError or ValueError, with the remedy, where it holds no safetensors or they do not fit their index, or
              holds one tensor under two names; ValueError with `language_only` for an unknown vision-language type, and for
              names that its family does not have
    """
    folder = Path(folder)
    entries = weights.entries(folder)
    family = family_of(folder) if language_only else naming(folder)
    if language_only and (unknown := [entry.name for entry in entries if part_of(entry.name, family) is None]):
        raise ValueError(unrecognised(unknown, str(folder)))
    tensors, keys = dict[str, Entry](), set[str]()
    for entry in entries:
        within, name = _named(entry.name, family, language_only)
        if name in tensors:
            raise ValueError(f"{folder} holds one tensor under two names: {tensors[name].name} and {entry.name}")
        tensors[name] = entry
        if within or not (language_only or DERIVED.search(name)):
            keys.add(name)
    tables = (EMBEDDING, HEAD) if language_only else (f"{family.language}.{EMBEDDING}", HEAD)
    return Checkpoint(folder, weights.shards(folder), tensors, keys, family, tables, ties(folder), vocabulary(folder))


def _named(name: str, family: Family, language_only: bool) -> tuple[str | None, str]:
    """With `language_only` the name within the decoder, where it is the decoder's; and the name that models share."""
    within = language_name(name, family) if language_only else None
    return within, within or canonical(name, family)


def diagonal(path: Path, model: Checkpoint, language_only: bool = False) -> dict[str, Entry]:
    """The Fisher information of a model's weights, as `fisher.save` writes it, by the names that models share.

    Raises:   ValueError naming the file where it is damaged, or lacks weights that are merged, or has them in another shape
    """
    weights.refuse_pointer(path)
    held = [Entry(path, name, of["dtype"], tuple(of["shape"])) for name, of in weights.header(path)[1].items()]
    found = {_named(entry.name, model.family, language_only)[1]: entry for entry in held}
    if model.tied and model.tables[0] in found:
        found.setdefault(model.tables[1], found[model.tables[0]])
    lacking = [model.tensors[key].name for key in sorted(model.keys) if model.tensors[key].dtype in FLOATS
               and (key not in found or found[key].shape != model.tensors[key].shape)]  # fmt: skip
    if lacking:
        names = ", ".join(lacking[:6]) + (", …" if len(lacking) > 6 else "")
        raise ValueError(f"{path} has no Fisher information of {len(lacking)} weights of {model.folder} in their shapes: {names}")
    return found


def seed_name(model: Checkpoint, key: str) -> str:
    """The name that the draws of a tensor depend on: that in memory, of tied ones the embedding's."""
    if model.tied and key == model.tables[1] and model.tables[0] in model.tensors:
        key = model.tables[0]
    return canonical(model.tensors[key].name, model.family)


def like(a: Checkpoint, other: Checkpoint) -> Checkpoint:
    """Another checkpoint with embedding and head as A has them: one tensor stands for both where they are tied, and a second one
    that is equal is left out."""
    tensors, keys = dict(other.tensors), set(other.keys)
    for one, two in (other.tables, other.tables[::-1]):
        mine, its = {one, two} & a.keys, {one, two} & other.keys
        if other.tied and mine == {one, two} and its == {two}:
            tensors[one] = tensors[two]
            keys.add(one)
        elif a.tied and mine == {two} and its == {one, two} and same(tensors[one], tensors[two]):
            keys.remove(one)
        elif a.tied and other.tied and mine == {two} and its == {one}:
            tensors[two] = tensors[one]
            keys = keys - {one} | {two}
    return other._replace(tensors=tensors, keys=keys)


def same(one: Entry, two: Entry, rows: int | None = None) -> bool:
    """Whether two tensors, or their first rows, have equal values in the first one's precision."""
    if rows is None and one.shape != two.shape:
        return False
    mine, its = (read_tensor(entry[:2])[:rows] if rows else read_tensor(entry[:2]) for entry in (one, two))
    return torch.equal(mine, its.to(FLOATS.get(one.dtype)))


def _reads(folder: Path) -> dict[str, Any]:
    """What a decoder's config says of how its weights are read, where their shapes do not."""
    config = read_object(folder / "config.json")
    config = config.get("text_config") or config
    kept = ("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "rope_theta")
    return {name: config[name] for name in kept if config.get(name) is not None}


def refuse_different(models: Mapping[str, Checkpoint], language_only: bool) -> None:
    """Raises:   ValueError that lists, model by model, what keeps others from being merged with A"""
    a = models["a"]
    reads = {which: _reads(model.folder) for which, model in models.items()}
    for which, of in reads.items():  # weights of the same shapes, which mean something else
        for name in of.keys() & reads["a"].keys():
            if of[name] != reads["a"][name]:
                raise ValueError(f"{which} ({models[which].folder}) has {name} {of[name]!r}, a {reads['a'][name]!r}")
    if language_only:
        kinds = {which: decoder_type(model.folder) for which, model in models.items()}
        for which, kind in kinds.items():
            if kind != kinds["a"]:
                raise ValueError(f"{which} ({models[which].folder}) has a decoder of the type {kind!r}, a one of {kinds['a']!r}")
        if not a.family.language:
            raise ValueError(f"{a.folder} has no language model")
    lines = [line for which, model in models.items() if which != "a" for line in differences(a, model, which, language_only)]
    if lines:
        raise ValueError(f"these checkpoints cannot be merged\n{chr(10).join(lines)}")


def differences(a: Checkpoint, other: Checkpoint, which: str, language_only: bool = False, most: int = 6) -> list[str]:
    """What keeps two checkpoints from being merged, a line each (`what (count): name, name, …`); none where nothing does."""
    pairs = {key: (a.tensors[key], other.tensors[key]) for key in sorted(a.keys & other.keys)}
    extra = other.keys - a.keys
    untied = extra & set(other.tables) if a.tied and set(a.tables) & a.keys else set[str]()
    padded = set(a.tables) if language_only else set[str]()
    lists = {
        f"only in a, not in {which}": {a.tensors[key].name for key in a.keys - other.keys},
        f"only in {which}, not in a": {other.tensors[key].name for key in extra - untied},
        f"one tensor in a for embedding and head, two that differ in {which}": {other.tensors[key].name for key in untied},
        f"other shapes in a and {which}": {
            f"{one.name} {list(one.shape)} and {list(two.shape)}" for key, (one, two) in pairs.items()
            if one.shape != two.shape and not (key in padded and one.shape[1:] == two.shape[1:])
        },
        f"no floating-point numbers, and not equal in a and {which}": {
            one.name for one, two in pairs.values() if one.shape == two.shape
            and not {one.dtype, two.dtype} <= set(FLOATS)
            and (one.dtype != two.dtype or not torch.equal(read_tensor(one[:2]), read_tensor(two[:2])))
        },
        f"other tokens in a and {which}": {repr(token) for token in _conflicts(a.words, other.words, language_only)},
    }  # fmt: skip
    return [
        f"  {what} ({len(names)}): {', '.join(sorted(names)[:most])}{', …' if len(names) > most else ''}"
        for what, names in lists.items() if names
    ]  # fmt: skip


def _conflicts(mine: Words | None, theirs: Words | None, language_only: bool) -> set[str]:
    """Tokens of one vocabulary alone, and those with two ids; with `language_only` those of the first kind that were added to a
    vocabulary are no obstacle, as their rows stay A's."""
    if mine is None or theirs is None:
        return set()
    different = {token for token, _ in mine.ids.items() ^ theirs.ids.items()}
    if not language_only:
        return different
    return different - ((mine.added - theirs.ids.keys()) | (theirs.added - mine.ids.keys()))


def shared_rows(models: Mapping[str, Checkpoint]) -> dict[str, Rows]:
    """The rows of embedding and head that all models have, where these are not all of A's rows."""
    a, found = models["a"], dict[str, Rows]()
    tables = [set(model.words.ids.items()) for model in models.values() if model.words]
    foreign = {i for table in tables for token, i in table if not all((token, i) in other for other in tables)}
    for key in set(a.tables) & a.keys:
        whole = a.tensors[key].shape[0]
        merged = min(model.tensors[key].shape[0] for model in models.values())
        own = tuple(sorted(row for row in foreign if row < merged))
        if own or any(model.tensors[key].shape[0] > merged for model in models.values()):
            found[key] = Rows(merged, whole, own)
    return found


def vocabulary(folder: Path) -> Words | None:
    """The tokens of a checkpoint's tokenizer; None where it has no tokenizer.json.

    Raises:   ValueError, naming the file, where it is no tokenizer
    """
    path = folder / "tokenizer.json"
    if not path.exists():
        return None
    tokenizer = read_object(path)
    try:
        words, more = tokenizer["model"]["vocab"], tokenizer.get("added_tokens", ())
        ids = words if isinstance(words, dict) else {word: i for i, (word, *_) in enumerate(words)}
        added = {token["content"]: token["id"] for token in more}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no tokenizer: it lacks a vocabulary of tokens and ids") from error
    return Words({**ids, **added}, set(added))


def verify(model: Checkpoint) -> None:
    """Compare every shard with the digest that was recorded of it, where there is one.

    Raises:   ValueError naming a shard that has been changed since
    """
    for shard in model.shards:
        digest = store.recorded_digest(shard)
        if digest is not None and store.file_digest(shard) != digest:
            raise ValueError(f"{shard} is damaged: its content is not the one that was recorded when it was written")


def refuse_zero(models: Mapping[str, Checkpoint], rows: Mapping[str, Rows]) -> None:
    """Raises:   ValueError naming the model that equals its base, in the `rows` that all have: a merge learns nothing from a zero
    task vector"""
    for which in ("a", "b") if "base" in models else ():
        tensors, base = models[which].tensors, models["base"].tensors
        if all(same(tensors[key], base[key], rows[key].merged if key in rows else None) for key in models["a"].keys):
            name = models[which].folder.name
            raise ValueError(f"the task vector of {which} ({name}) is zero: it is its base, weight by weight")


def refuse_overlap(out: Path, models: Mapping[str, Checkpoint]) -> None:
    """Refuse a result that would lie in an input, or whose writing would remove one: what is left of a killed merge is removed.

    Raises:   ValueError naming both, links followed, and where `out` exists, be it as a link to nothing
    """
    writing.refuse_existing(out)
    for place in (out, out.with_name(f"{out.name}.partial"), out.with_name(f".{out.name}.lock")):
        real = place.resolve()
        for which, model in models.items():
            folder = model.folder.resolve()
            read = {folder, *(shard.resolve() for shard in model.shards)}
            if real.is_relative_to(folder) or any(path.is_relative_to(real) for path in read):
                raise ValueError(f"{place} would be written where {which} is read ({model.folder}); choose another place")
