"""LLaVA's corpora: LLaVA-Pretrain (558K pictures with a caption, stage 1), LLaVA-Instruct (665K conversations, stage 2).

LLaVA-Pretrain's request before each caption is kept; LLaVA's own "plain" template would discard it (README, departures).
About 40,700 rows of LLaVA-Instruct are text only and have no `image` key. A script fetches OCR-VQA's pictures one by one, and
some addresses are dead: such rows are skipped, counted and named. Published archives need not be unpacked; from the hub,
LLaVA-Pretrain's archive is read in pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from vlsafe.core.schema import Example, Turn
from vlsafe.data.sources.files import Place, Refused, converted, json_list, path_of, picture, text_of

ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
IMAGE = "<image>"
CAPTIONS, INSTRUCTIONS = "blip_laion_cc_sbu_558k.json", "llava_v1_5_mix665k.json"
FOLDERS = {  # the README's folders of pictures, and the archive that holds them under the name after the "!"
    "coco/train2017/": "coco/train2017.zip!train2017/",
    "gqa/images/": "gqa/images.zip!images/",
    "textvqa/train_images/": "textvqa/train_val_images.zip!train_images/",
    "vg/VG_100K/": "vg/images.zip!VG_100K/",
    "vg/VG_100K_2/": "vg/images2.zip!VG_100K_2/",
    "ocr_vqa/images/": "ocr_vqa/images.zip!images/",
}


def captions(place: Place) -> Iterator[Example | Refused]:
    """LLaVA-Pretrain in the file's order; every row has a picture."""
    for row in _rows(place, CAPTIONS, "captions", lambda name: (f"images/{name}", name, f"images.zip!{name}")):
        yield row if isinstance(row, Refused) or row.images else Refused(row.id, "no picture")


def instructions(place: Place) -> Iterator[Example | Refused]:
    """LLaVA-Instruct in the file's order; FileNotFoundError without a local folder, as the hub has the text alone."""

    def candidates(name: str) -> list[str]:
        return [name, *(archive + name.removeprefix(folder) for folder, archive in FOLDERS.items() if name.startswith(folder))]

    for row in _rows(place, INSTRUCTIONS, "instructions", candidates):
        if isinstance(row, Example) and row.images and place.folder is None:
            remedy = "put them, and the JSON file, into VLSAFE_DATA/LLaVA-Instruct-150K"
            raise FileNotFoundError(f"LLaVA-Instruct's pictures are not on the hub: {remedy}")
        yield row if isinstance(row, Refused) or row.images else Example(row.id, "instructions-text", row.turns)


def _rows(place: Place, file: str, source: str, candidates: Callable[[str], Sequence[str]]) -> Iterator[Example | Refused]:
    """Every row of a file, in order. `candidates` maps a picture's name to the places below the corpus where it may be.

    As in LLaVA, the placeholder is removed and the picture belongs to the first request. A text-only row lacks the `image` key
    or has null there; it keeps a placeholder in its text, and intake then skips it.
    """

    def example(row: dict[str, Any], name: str) -> Example:
        image = row.get("image")
        if isinstance(image, list):
            raise TypeError("several pictures")  # LLaVA-1.5 has none of these
        turns = tuple(Turn(ROLES[turn["from"]], text_of(turn["value"])) for turn in row["conversations"])
        if not image:
            return Example(name, source, turns)
        turns = tuple(Turn(turn.role, turn.text.replace(IMAGE, "").strip()) for turn in turns)
        return Example(name, source, turns, (picture(place, candidates(image)),), cluster=image)

    return converted(json_list(path_of(place, file)), example, "LLaVA")
