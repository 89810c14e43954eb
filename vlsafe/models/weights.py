"""Weights on disk: which files of a folder are the model, and which tensors they hold. Only headers are read.

Files are chosen as transformers chooses them, so that what is merged or compared is what would be loaded. Damage is detected in
headers and lengths, and against an index.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors import SafetensorError, safe_open

if TYPE_CHECKING:
    import torch

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"  # as in transformers.utils, which is slow to import
POINTER = b"version https://git-lfs"  # how a Git LFS pointer begins
Place = tuple[Path, str]
"""A file in safetensors, and the key of a tensor in it."""


class Entry(NamedTuple):
    """A tensor in a file: the shard that holds it, its name there, its dtype as the format calls it, its shape."""

    shard: Path
    name: str
    dtype: str
    shape: tuple[int, ...]


def shards(folder: Path) -> tuple[Path, ...]:
    """The files in which the weights of a model folder are; an index beside a single file is not looked at.

    Raises:   FileNotFoundError or ValueError, with the remedy, where it is no model folder, holds no safetensors, or has files
              that are not what their name says
    """
    first, mapped = listed(folder)
    found = sorted(set(mapped.values())) if mapped else [first]
    if outside := [name for name in found if Path(name).name != name]:
        raise ValueError(f"{folder / first} names files outside the folder: {', '.join(outside[:6])}")
    for name in found:
        if not (folder / name).exists():
            raise FileNotFoundError(f"{folder / name} is missing; only safetensors are read{_instead(folder)}")
        refuse_pointer(folder / name)
    return tuple(folder / name for name in found)


def listed(folder: Path) -> tuple[str, dict[str, str]]:
    """The file that transformers opens first, and the table in it of tensors and files, which a single file lacks.

    Source:   transformers 5.23, `_get_resolved_checkpoint_files`: the config's `transformers_weights`, one file, the index
    """
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"{folder} holds no model (no config.json){_instead(folder)}")
    usual = SINGLE if (folder / SINGLE).exists() or not (folder / INDEX).exists() else INDEX
    first = read_object(folder / "config.json").get("transformers_weights") or usual
    return first, mapping(folder / first) if first.endswith(".index.json") else {}


def _instead(folder: Path) -> str:
    """What a folder is that is no model in safetensors, with the remedy."""
    if not folder.exists():
        return "; there is no such folder"
    if folder.is_file():
        return "; it is a file, name its folder"
    if (folder / "adapter_config.json").exists():
        base = read_object(folder / "adapter_config.json").get("base_model_name_or_path")
        return f"; it is a LoRA adapter of {base}: add it to its base first (peft's `merge_and_unload`) and save the model"
    if any(folder.glob("*.bin")):
        return "; its weights are pickles: load it in transformers and save it, which writes safetensors"
    inside = sorted(path.name for path in folder.glob("step-*"))
    return f"; try {folder / inside[-1]}" if inside else ""


def refuse_pointer(path: Path) -> None:
    """Raises:   ValueError for a Git LFS pointer, which stands for a file that was not fetched"""
    with open(path, "rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise ValueError(f"{path} is a Git LFS pointer, not the file itself; `git lfs pull` in its repository fetches it")


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:   ValueError, naming the file, where it is something else
    """
    refuse_pointer(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON, or is cut short: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object")
    return value


def mapping(index: Path) -> dict[str, str]:
    """Tensor -> file, as an index has it.

    Raises:   ValueError, naming the file, where it has no such table
    """
    mapped = read_object(index).get("weight_map")
    if not isinstance(mapped, dict) or not mapped or not all(isinstance(name, str) for name in mapped.values()):
        raise ValueError(f"{index} has no `weight_map` of tensors and files; it is no index of safetensors, or is damaged")
    return mapped


def entries(folder: Path) -> list[Entry]:
    """All tensors of a model folder.

    Raises:   as `shards`; ValueError where a file is damaged or does not fit the index
    """
    headers = {shard: header(shard)[1] for shard in shards(folder)}
    present = [(name, shard.name) for shard, held in headers.items() for name in held]
    _, mapped = listed(folder)
    if mapped and (different := set(present) ^ set(mapped.items())):
        name, file = min(different)
        raise ValueError(f"{folder / file} is damaged, or not the shard that its index tells of: they disagree on {name}")
    return [
        Entry(shard, name, entry["dtype"], tuple(entry["shape"]))
        for shard, held in headers.items()
        for name, entry in held.items()
    ]


def header(shard: Path) -> tuple[bytes, dict[str, dict[str, Any]]]:
    """The header of a shard as bytes, and its tensors' entries in the order of their places.

    Raises:   ValueError, naming the file, where it is cut short or its header is not valid
    Source:   the safetensors format: eight bytes of length, JSON, then the tensors without gaps
    """
    try:
        with safe_open(shard, "np"):  # the library checks the header, every place, and the length of the file
            pass
    except SafetensorError as error:
        raise ValueError(f"{shard} is truncated or damaged: {error}") from error
    with open(shard, "rb") as file:
        first = file.read(8)
        first += file.read(struct.unpack("<Q", first)[0])
    held = json.loads(first[8:])
    held.pop("__metadata__", None)
    return first, dict(sorted(held.items(), key=lambda entry: entry[1]["data_offsets"]))


def read_tensor(place: Place) -> torch.Tensor:
    """A memory-mapped tensor of a checkpoint; its file is opened for it alone, so that no other pages stay in memory."""
    with safe_open(place[0], "pt") as tensors:
        return tensors.get_tensor(place[1])
