"""SPA-VL: pictures with a question and two answers, of which the safer and more helpful one is chosen.

A local folder may hold the hub's Parquet files (pictures inside) or the JSON list of its authors' training code, with pictures
beside it. The training split has no categories; the others have three classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from vlsafe.core.schema import Pair, Picture, Turn
from vlsafe.data.sources.files import Place, Refused, json_list, names, path_of, picture, text_of

SPLITS = {  # the configuration and the split on the hub
    "train": ("default", "train"), "validation": ("validation", "validation"), "harm": ("test", "harm"), "help": ("test", "help"),
}  # fmt: skip


def raw(place: Place, split: str = "train") -> Iterator[tuple[Mapping[str, Any], Picture | None]]:
    """The published rows of a split, and their pictures; ValueError for a Parquet file that is broken."""
    if place.folder is None or (files := names(place, (f"**/{split}-*.parquet", f"**/{split}.parquet"))):
        parquet = _streamed(place, split) if place.folder is None else _local_parquet(place, files)
        yield from ((row, (row.get("image") or {}).get("bytes")) for row in parquet)
        return
    for row in json_list(path_of(place, f"{split}.json")):
        image = row.get("image")
        yield row, picture(place, (f"images/{image}", image, f"images.zip!{image}")) if image else None


def _streamed(place: Place, split: str) -> Iterator[Mapping[str, Any]]:
    from datasets import Image, load_dataset

    config, name = SPLITS[split]
    rows = load_dataset(place.origin.repo, config, split=name, revision=place.revision, streaming=True)
    yield from rows.cast_column("image", Image(decode=False))


def _local_parquet(place: Place, files: list[str]) -> Iterator[Mapping[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for name in files:
        try:
            with pq.ParquetFile(path_of(place, name)) as file:
                for batch in file.iter_batches(64):
                    yield from batch.to_pylist()
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"{name} is not a whole Parquet file ({type(error).__name__}); download it again") from None


def rows(place: Place) -> Iterator[Pair | Refused]:
    """Preference rows of the training split, in order."""
    for number, (row, image) in enumerate(raw(place)):
        name = f"spa-vl#{number}"
        question, chosen, rejected = (text_of(row.get(key)) for key in ("question", "chosen", "rejected"))
        if image is None:
            yield Refused(name, "no picture")
        elif not (question.strip() and chosen.strip() and rejected.strip()):
            yield Refused(name, "a text is missing")
        else:
            turn = Turn("user", question.replace("<image>", "").strip())
            yield Pair(name, "spa-vl", (turn,), chosen, rejected, (image,), row.get("class1"))
