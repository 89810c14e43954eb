"""Rows as TRL takes them: conversations, plain texts, preference pairs, prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import Dataset, Features, Image, List, Value

from vlsafe.core import assets
from vlsafe.core.schema import Example, Pair, Picture, Stored, Turn

IMAGE_LENGTH = 17  # words that a picture counts for where rows are sorted by length; an order, not a token count


def chat_dataset(rows: Sequence[Example], with_images: bool) -> Dataset:
    """Rows as TRL takes them. Text-only rows among pictures carry an empty list, never a missing value."""
    table: dict[str, list[Any]] = {"messages": [[{"role": t.role, "content": t.text} for t in row.turns] for row in rows]}
    table["length"] = [sum(len(t.text.split()) for t in row.turns) + IMAGE_LENGTH * len(row.images) for row in rows]
    features: dict[str, Any] = {"messages": List({"role": Value("string"), "content": Value("string")})}
    features["length"] = Value("int64")
    if with_images:
        table["images"] = [[_cell(picture) for picture in row.images] for row in rows]
        table["pictures"] = [len(row.images) for row in rows]
        features |= {"images": List(Image(mode="RGB")), "pictures": Value("int64")}
    return Dataset.from_dict(table, features=Features(features))


def _cell(picture: Picture) -> dict[str, Any]:
    """A stored file is named and read when its row is; members of archives are read now."""
    path = assets.outside_path(picture.place) if isinstance(picture, Stored) and assets.MEMBER not in picture.place else None
    return {"bytes": None, "path": str(path)} if path else {"bytes": bytes(picture), "path": None}


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


def pair_dataset(pairs: Sequence[Pair], with_images: bool) -> Dataset:
    """Preference rows as TRL takes them: the whole conversation is the prompt, only the two last answers are compared."""
    spoken = {"prompt": [pair.turns for pair in pairs]}
    spoken |= {name: [(Turn("assistant", getattr(pair, name)),) for pair in pairs] for name in ("chosen", "rejected")}
    table: dict[str, list[Any]] = {
        name: [[{"role": t.role, "content": t.text} for t in turns] for turns in of] for name, of in spoken.items()
    }
    features: dict[str, Any] = {name: List({"role": Value("string"), "content": Value("string")}) for name in spoken}
    words = [sum(len(t.text.split()) for part in spoken.values() for t in part[n]) for n in range(len(pairs))]
    table["length"] = [n + IMAGE_LENGTH * len(pair.images) for n, pair in zip(words, pairs, strict=True)]
    features["length"] = Value("int64")
    if with_images:
        table["images"] = [[_cell(picture) for picture in pair.images] for pair in pairs]
        table["pictures"] = [len(pair.images) for pair in pairs]
        features |= {"images": List(Image(mode="RGB")), "pictures": Value("int64")}
    return Dataset.from_dict(table, features=Features(features))


def prompt_dataset(pairs: Sequence[Pair]) -> Dataset:
    """The text prompts of preference rows, each with its place among them, by which a reward finds the row again."""
    turns = List({"role": Value("string"), "content": Value("string")})
    told = [[{"role": t.role, "content": t.text} for t in pair.turns] for pair in pairs]
    features = Features({"prompt": turns, "number": Value("int64")})
    return Dataset.from_dict({"prompt": told, "number": list(range(len(pairs)))}, features=features)
