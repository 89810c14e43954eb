"""LLaVA-Instruct, the mix of 665K conversations, for stage 2. About 40,700 rows are text only and have no `image` key.

Its pictures are below the folder in the layout of LLaVA's README; the published archives need not be unpacked. A script
fetches OCR-VQA's one by one, and some addresses are dead: such rows are skipped, counted and named.
"""

from __future__ import annotations

from collections.abc import Iterator

from vlsafe.core.schema import Example
from vlsafe.data.sources import llava
from vlsafe.data.sources.files import Place, Refused

FOLDER = "LLaVA-Instruct-150K"
FILE = "llava_v1_5_mix665k.json"
FOLDERS = {  # the README's folders of pictures, and the archive that holds them under the name after the "!"
    "coco/train2017/": "coco/train2017.zip!train2017/",
    "gqa/images/": "gqa/images.zip!images/",
    "textvqa/train_images/": "textvqa/train_val_images.zip!train_images/",
    "vg/VG_100K/": "vg/images.zip!VG_100K/",
    "vg/VG_100K_2/": "vg/images2.zip!VG_100K_2/",
    "ocr_vqa/images/": "ocr_vqa/images.zip!images/",
}


def candidates(name: str) -> list[str]:
    """Where a picture may be: a file, or a member of its archive."""
    return [name, *(archive + name.removeprefix(folder) for folder, archive in FOLDERS.items() if name.startswith(folder))]


def rows(place: Place) -> Iterator[Example | Refused]:
    """Conversations in the file's order. The hub has their text alone.

    Raises:   FileNotFoundError where there is no local folder, and so no picture
    """
    for row in llava.rows(place, FILE, "instructions", candidates):
        if isinstance(row, Example) and row.images and place.folder is None:
            remedy = f"put them, and the JSON file, into VLSAFE_DATA/{FOLDER}"
            raise FileNotFoundError(f"LLaVA-Instruct's pictures are not on the hub: {remedy}")
        yield row if isinstance(row, Refused) or row.images else Example(row.id, "instructions-text", row.turns)
