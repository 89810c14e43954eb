"""Rows in the format of TRL: conversations, plain texts, preference pairs, prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, List, Value, load_from_disk

from vlsafe.core.schema import Example, Pair, Picture, Stored, Turn
from vlsafe.models.chat import open_picture

IMAGE_LENGTH = 17  # words that a picture counts for where rows are sorted by length; an order, not a token count
MESSAGES = List({"role": Value("string"), "content": Value("string")})
IMAGES = List({"place": Value("string"), "bytes": Value("binary")})  # of each picture one of the two


def _messages(turns: Sequence[Turn]) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.text} for turn in turns]


def _dataset(columns: Mapping[str, Sequence[Sequence[Turn]]], rows: Sequence[Example | Pair], with_images: bool) -> Dataset:
    """Columns of conversations, with each row's length and pictures. A row without pictures has an empty list, never a null.

    A stored picture is a place until a worker takes its row (`opened`), so that nothing holds or writes it a second time.
    """
    table: dict[str, list[Any]] = {name: [_messages(turns) for turns in column] for name, column in columns.items()}
    parts = zip(*columns.values(), strict=True)
    words = [sum(len(turn.text.split()) for turns in row for turn in turns) for row in parts]
    table["length"] = [n + IMAGE_LENGTH * len(row.images) for n, row in zip(words, rows, strict=True)]
    features: dict[str, Any] = dict.fromkeys(columns, MESSAGES) | {"length": Value("int64")}
    if with_images:
        table["images"] = [[_cell(picture) for picture in row.images] for row in rows]
        table["pictures"] = [len(row.images) for row in rows]
        features |= {"images": IMAGES, "pictures": Value("int64")}
    return opened(Dataset.from_dict(table, features=Features(features)))


def _cell(picture: Picture) -> dict[str, Any]:
    return {"place": picture.place} if isinstance(picture, Stored) else {"bytes": bytes(picture)}


class Pictured(Dataset):
    """Rows with a transform, without which a column is read: the library transforms every row for it, and so would decode all
    pictures for their rows' lengths, before the first step."""

    def __getitem__(self, key: Any) -> Any:
        return self.with_format(None)[key] if isinstance(key, str) and self.format["type"] else super().__getitem__(key)


def opened(data: Dataset) -> Dataset:
    """The same rows, whose pictures are read and decoded when a row is taken."""
    if "images" not in data.column_names:
        return data
    rows = Pictured(data.data, data.info, data.split, fingerprint=data._fingerprint)
    return rows.with_transform(_pictures, ["images"], output_all_columns=True)


def save(data: Dataset, folder: Path) -> None:
    """Write rows, of stored pictures their places; `load` reads them back."""
    data.with_format(None).save_to_disk(folder)


def load(folder: Path) -> Dataset:
    """Rows that `save` has written, as they were."""
    return opened(load_from_disk(folder))


def _pictures(batch: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "images": [
            [open_picture(Stored(one["place"]) if one["place"] else one["bytes"]) for one in row] for row in batch["images"]
        ]
    }


def chat_dataset(rows: Sequence[Example], with_images: bool) -> Dataset:
    """Conversations for SFT."""
    return _dataset({"messages": [row.turns for row in rows]}, rows, with_images)


def pair_dataset(pairs: Sequence[Pair], with_images: bool) -> Dataset:
    """Preference pairs for DPO: the whole conversation is the prompt, only the two final answers are compared."""
    answers = {name: [(Turn("assistant", getattr(pair, name)),) for pair in pairs] for name in ("chosen", "rejected")}
    return _dataset({"prompt": [pair.turns for pair in pairs], **answers}, pairs, with_images)


def prompt_dataset(pairs: Sequence[Pair]) -> Dataset:
    """The text prompts of preference pairs for GRPO, each with its row number, by which the reward finds the pair."""
    table = {"prompt": [_messages(pair.turns) for pair in pairs], "number": list(range(len(pairs)))}
    return Dataset.from_dict(table, features=Features({"prompt": MESSAGES, "number": Value("int64")}))


def text_dataset(texts: Sequence[Sequence[str]], tokenizer: Any) -> Dataset:
    """Texts as token ids between BOS and EOS; loss on every second part (the continuations) and on EOS."""
    columns: dict[str, list[Any]] = {"input_ids": [], "labels": []}
    for text in texts:
        ids, labels = [tokenizer.bos_token_id], [-100]
        for number, part in enumerate(tokenizer(list(text)).input_ids):
            ids += part
            labels += part if number % 2 else [-100] * len(part)
        columns["input_ids"].append([*ids, tokenizer.eos_token_id])
        columns["labels"].append([*labels, tokenizer.eos_token_id])
    columns["length"] = [len(ids) for ids in columns["input_ids"]]
    return Dataset.from_dict(columns)
