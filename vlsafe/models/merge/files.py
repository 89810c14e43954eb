"""Streaming merge of checkpoints: tensor by tensor and in pieces, written completely or not at all, without a model in memory.

The result has the shards, names and precisions of A; it needs no more memory than one tensor in fp32 and a few pieces. Damage
is detected in headers and lengths, in weights that are not finite, and in any byte where a digest was recorded, in a vlsafe
manifest or as the name of a Hub blob. The format has no checksum: elsewhere a flipped bit that leaves a number goes unnoticed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from vlsafe.core import store
from vlsafe.core.scale import known
from vlsafe.models.architectures import canonical, family_of, grafted, language_name
from vlsafe.models.checkpoints import read_tensor
from vlsafe.models.merge.rules import RULES, How, seed_of, streams

PIECE = 2**18  # elements; some fp32 pieces fit into a processor's cache
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
INDEX = "model.safetensors.index.json"
BESIDE = (".json", ".jinja", ".txt", ".model")  # config, tokenizer, processor, template; never code
LEFT = (store.MANIFEST, "trainer_state.json", "adapter_config.json", "config.json")  # the config is written last


class Entry(NamedTuple):
    """A tensor in a file: the shard that holds it, its name there, its dtype as the format calls it, its shape."""

    shard: Path
    name: str
    dtype: str
    shape: tuple[int, ...]


class Checkpoint(NamedTuple):
    """A model folder: its shards, its tensors by their names in memory, and the names of those that are merged."""

    folder: Path
    shards: tuple[Path, ...]
    tensors: dict[str, Entry]
    keys: set[str]


def merge(
    name: str, folders: Mapping[str, Path], out: Path, how: How, seed: int = 0, language_only: bool = False
) -> dict[str, Any]:
    """Merge the checkpoints `folders["a"]` and `["b"]`, with `["base"]` where the rule asks for it, into the folder `out`.

    With `language_only` everything but the language model comes from A, and B and the base may be plain language models.

    Raises:   ValueError before a byte is written where names, shapes or vocabularies differ, a task vector is zero, a file
              is damaged, or `out` exists; ValueError naming the tensor, and nothing stays, where a weight is not finite
    """
    rule = RULES[known(name, RULES, "merge rule")]
    how.checked()
    if rule.based != ("base" in folders):
        raise ValueError(f"{name} {'needs a base' if rule.based else 'has no use for a base'} (--base)")
    models = {which: checkpoint(folder, language_only) for which, folder in folders.items()}
    a = models["a"]
    lines = [line for which in models if which != "a" for line in differences(a, models[which], which)]
    if lines:
        raise ValueError(f"these checkpoints cannot be merged\n{chr(10).join(lines)}")
    for model in models.values():
        verify(model)
    refuse_zero(models)
    with store.whole(out) as work:
        files = {shard.name: _shard(name, models, shard, work, how, seed) for shard in a.shards}
        for path in sorted(a.folder.iterdir()):
            if path.suffix in BESIDE and path.name not in LEFT:
                shutil.copyfile(path, work / path.name)
        record = {"rule": name, **how._asdict(), "seed": seed, "language_only": language_only}
        store.write_text(work / store.MANIFEST, json.dumps({"merge": record, "files": files}, indent=1) + "\n")
        shutil.copyfile(a.folder / "config.json", work / "config.json")
    return {"tensors": len(a.tensors), "bytes": sum(file["bytes"] for file in files.values()), "shards": len(files)}


def checkpoint(folder: Path, language_only: bool = False) -> Checkpoint:
    """Read the headers of a model folder.

    Raises:   FileNotFoundError or ValueError, with the remedy, where it holds no safetensors or they do not fit their index;
              ValueError with `language_only` for an unknown vision-language type
    """
    folder = Path(folder)
    if not (folder / "config.json").exists():
        inside = sorted(path.name for path in folder.glob("step-*"))
        raise FileNotFoundError(f"{folder} holds no model (no config.json)" + (f"; try {folder / inside[-1]}" if inside else ""))
    indexed = (folder / INDEX).exists()
    mapped = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"] if indexed else {}
    shards = [folder / name for name in sorted(set(mapped.values())) or ["model.safetensors"]]
    for shard in shards:
        if not shard.exists():
            raise FileNotFoundError(f"{shard} is missing; only safetensors are read")
    headers = {shard: header(shard)[1] for shard in shards}
    present = {name: shard.name for shard, entries in headers.items() for name in entries}
    if indexed and present != mapped:
        name, file = min(set(present.items()) ^ set(mapped.items()))
        raise ValueError(f"{folder / file} is damaged, or not the shard that its index tells of: they disagree on {name}")
    rename = grafted if language_only and not family_of(folder).vision else canonical
    tensors = {
        rename(name): Entry(shard, name, entry["dtype"], tuple(entry["shape"]))
        for shard, entries in headers.items() for name, entry in entries.items()
    }  # fmt: skip
    keys = {key for key in tensors if not language_only or language_name(key) is not None}
    return Checkpoint(folder, tuple(shards), tensors, keys)


def header(shard: Path) -> tuple[bytes, dict[str, dict[str, Any]]]:
    """The header of a shard as bytes, and its tensors' entries in the order of their places.

    Raises:   ValueError, naming the file, where it is cut short or its header is not valid
    Source:   the safetensors format: eight bytes of length, JSON, then the tensors without gaps
    """
    try:
        with safe_open(shard, "pt"):  # the library checks the header, every place, and the length of the file
            pass
    except SafetensorError as error:
        raise ValueError(f"{shard} is truncated or damaged: {error}") from error
    with open(shard, "rb") as file:
        first = file.read(8)
        first += file.read(struct.unpack("<Q", first)[0])
    entries = json.loads(first[8:])
    entries.pop("__metadata__", None)
    return first, dict(sorted(entries.items(), key=lambda entry: entry[1]["data_offsets"]))


def differences(a: Checkpoint, other: Checkpoint, which: str, most: int = 6) -> list[str]:
    """What keeps two checkpoints from being merged, a line each (`what (count): name, name, …`); none where nothing does."""
    pairs = {key: (a.tensors[key], other.tensors[key]) for key in sorted(a.keys & other.keys)}
    mine, theirs = vocabulary(a.folder), vocabulary(other.folder)
    tokens = set() if mine is None or theirs is None else mine.items() ^ theirs.items()
    lists = {
        f"only in a, not in {which}": a.keys - other.keys,
        f"only in {which}, not in a": other.keys - a.keys,
        f"other shapes in a and {which}": {
            f"{key} {list(one.shape)} and {list(two.shape)}" for key, (one, two) in pairs.items() if one.shape != two.shape
        },
        f"no floating-point numbers, and not equal in a and {which}": {
            key for key, (one, two) in pairs.items() if one.shape == two.shape
            and not {one.dtype, two.dtype} <= set(FLOATS) and not torch.equal(read_tensor(one[:2]), read_tensor(two[:2]))
        },
        f"other tokens in a and {which}": {repr(token) for token, _ in tokens},
    }  # fmt: skip
    return [
        f"  {what} ({len(names)}): {', '.join(sorted(names)[:most])}{', …' if len(names) > most else ''}"
        for what, names in lists.items() if names
    ]  # fmt: skip


def vocabulary(folder: Path) -> dict[str, int] | None:
    """The tokens of a checkpoint's tokenizer with their ids, added ones included; None where it has no tokenizer.json."""
    if not (folder / "tokenizer.json").exists():
        return None
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    words = tokenizer["model"]["vocab"]
    ids = words if isinstance(words, dict) else {word: i for i, (word, *_) in enumerate(words)}
    return {**ids, **{added["content"]: added["id"] for added in tokenizer.get("added_tokens", ())}}


def verify(model: Checkpoint) -> None:
    """Compare every shard with the digest that was recorded of it, where there is one.

    Raises:   ValueError naming a shard that has been changed since
    """
    for shard in model.shards:
        digest = store.recorded_digest(shard)
        if digest is not None and store.file_digest(shard) != digest:
            raise ValueError(f"{shard} is damaged: its content is not the one that was recorded when it was written")


def refuse_zero(models: Mapping[str, Checkpoint]) -> None:
    """Raises:   ValueError naming the model that equals its base: a merge learns nothing from a zero task vector"""
    for which in ("a", "b") if "base" in models else ():
        folder, tensors = models[which].folder, models[which].tensors
        pairs = ((tensors[key], models["base"].tensors[key]) for key in models[which].keys)
        if all(torch.equal(read_tensor(one[:2]), read_tensor(other[:2]).to(FLOATS.get(one.dtype))) for one, other in pairs):
            raise ValueError(f"the task vector of {which} ({folder.name}) is zero: it is its base, weight by weight")


def _pieces(entries: Sequence[Entry | None]) -> Iterator[Any]:
    """The flat fp32 pieces of tensors of one shape, None for one that is None."""
    flat: list[Any] = [None if entry is None else read_tensor(entry[:2]).reshape(-1) for entry in entries]
    for start in range(0, len(flat[0]), PIECE):
        yield tuple(None if values is None else values[start : start + PIECE].float() for values in flat)


def _combined(name: str, key: str, models: Mapping[str, Checkpoint], how: How, seed: int) -> Iterator[torch.Tensor]:
    """The pieces of one merged tensor, in A's precision.

    Raises:   ValueError naming a tensor with a weight that is not a number
    """
    rule, seeds = RULES[name], seed_of(seed, key)
    entries = [models[which].tensors[key] if which in models else None for which in ("a", "b", "base")]
    summary, draws = rule.summarise(lambda: _pieces(entries), how, streams(seeds)), streams(seeds)
    for piece in _pieces(entries):
        for entry, values in zip(entries, piece, strict=True):
            if entry and not torch.isfinite(values.sum()) and not torch.isfinite(values).all():
                raise ValueError(f"{entry.shard} is damaged: {entry.name} has weights that are not finite")
        yield rule.combine(*piece, how, summary, draws).to(FLOATS[models["a"].tensors[key].dtype])


def _shard(name: str, models: Mapping[str, Checkpoint], shard: Path, work: Path, how: How, seed: int) -> dict[str, Any]:
    """Write one shard: A's header, which fits the result byte by byte, then every tensor in its place."""
    keys = {entry.name: key for key, entry in models["a"].tensors.items() if entry.shard == shard}
    first, entries = header(shard)
    hashed = hashlib.sha256(first)

    def pieces() -> Iterator[torch.Tensor]:
        for key in map(keys.__getitem__, entries):
            entry = models["a"].tensors[key]
            taken = entry.dtype not in FLOATS or key not in models["a"].keys
            yield from [read_tensor(entry[:2]).reshape(-1)] if taken else _combined(name, key, models, how, seed)

    def write(piece: torch.Tensor) -> None:
        data = memoryview(piece.contiguous().view(torch.uint8).numpy())
        file.write(data)
        hashed.update(data)

    with open(work / shard.name, "wb", buffering=0) as file, ThreadPoolExecutor(1) as writer:
        file.write(first)
        written = writer.submit(lambda: None)
        for piece in pieces():  # the next one is computed while this one is written and hashed
            written.result()
            written = writer.submit(write, piece)
        written.result()
        return {"bytes": file.tell(), "sha256": hashed.hexdigest()}
