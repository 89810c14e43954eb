"""The paper's own corpora, all yielding rows of the same types as the miniature's corpora.

`stream` reads one corpus row by row; pictures stay in their files. A row that cannot be converted becomes a `Refused`, in its
place, so that the reader can count and name it. Whether a row can be *trained on* is decided by `intake`, as for the miniature's
corpora: a row with a missing or corrupt picture is skipped, counted and named.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vlsafe.core import assets
from vlsafe.core.assets import Origin
from vlsafe.core.schema import Example, Pair, Picture, Stored, Turn
from vlsafe.data.files import Place, Refused, converted, names, picture, rows_of, text_of

ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
IMAGE = "<image>"
CAPTIONS, INSTRUCTIONS = "blip_laion_cc_sbu_558k.json", "llava_v1_5_mix665k.json"
FOLDERS = {  # LLaVA-Instruct's folders of pictures, and the archive that holds them under the name after the "!"
    "coco/train2017/": "coco/train2017.zip!train2017/",
    "gqa/images/": "gqa/images.zip!images/",
    "textvqa/train_images/": "textvqa/train_val_images.zip!train_images/",
    "vg/VG_100K/": "vg/images.zip!VG_100K/",
    "vg/VG_100K_2/": "vg/images2.zip!VG_100K_2/",
    "ocr_vqa/images/": "ocr_vqa/images.zip!images/",
}
# The forms of LLaVA-1.5's task data: RefCOCO's and Visual Genome's regions, TextCaps' captions, short answers of five VQA sets.
# Source: Liu et al. 2024 ("Improved baselines with visual instruction tuning"), appendix: data and their prompts.
LOOKING = re.compile(
    r"provide a short description for this region: ?\[|provide the bounding box coordinate of the region this sentence describes"
    r"|provide a one-sentence caption for the provided image|answer the question using a single word or phrase"
    r"|answer with the option's letter from the given choices directly",
    re.IGNORECASE,
)
PHRASE = 20  # words of an answer in such a form, where the request does not say it again; assumed, long book titles included
SAFE_RLHF_COLUMNS = {
    "prompt", "response_0", "response_1", "is_response_0_safe", "is_response_1_safe", "better_response_id", "safer_response_id"
}  # fmt: skip
SPA_VL_CONFIGS = {"train": "default", "validation": "validation", "harm": "test", "help": "test"}  # of its splits, on the hub


def captions(place: Place) -> Iterator[Example | Refused]:
    """LLaVA-Pretrain (558K pictures with a caption, stage 1) in the file's order; every row has a picture.

    The request before each caption is kept; LLaVA's own "plain" template would discard it (docs/departures.md). From the hub
    the archive of pictures is read in pieces.
    """
    return _llava(place, CAPTIONS, "captions", None, _in_images)


def _in_images(name: str) -> Sequence[str]:
    """Where a picture of a corpus with one folder of pictures may be."""
    return f"images/{name}", name, f"images.zip!{name}"


def instructions(place: Place) -> Iterator[Example | Refused]:
    """LLaVA-Instruct (665K conversations, stage 2) in the file's order; published archives need not be unpacked.

    About 40,700 rows are text only and have no `image` key. A script fetches OCR-VQA's pictures one by one, and some addresses
    are dead: such rows are skipped, counted and named.

    Raises:   FileNotFoundError without a local folder, as the hub has the text alone
    """

    def candidates(name: str) -> list[str]:
        if place.folder is None:
            remedy = "put them, and the JSON file, into VLSAFE_DATA/LLaVA-Instruct-150K"
            raise FileNotFoundError(f"LLaVA-Instruct's pictures are not on the hub: {remedy}")
        return [name, *(archive + name.removeprefix(folder) for folder, archive in FOLDERS.items() if name.startswith(folder))]

    return _llava(place, INSTRUCTIONS, "instructions", "instructions-text", candidates)


def _llava(
    place: Place, file: str, source: str, text_source: str | None, candidates: Callable[[str], Sequence[str]]
) -> Iterator[Example | Refused]:
    """Every row of a file, in order. `candidates` maps a picture's name to the places below the corpus where it may be.

    As in LLaVA, the placeholder is removed and the picture belongs to the first request. A text-only row lacks the `image` key
    or has null there; it keeps a placeholder in its text, and intake then skips it. Without a `text_source` it is refused.
    """

    def example(row: dict[str, Any], name: str) -> Example | Refused:
        """One row; raises KeyError or TypeError where it is none of LLaVA's."""
        image = row.get("image")
        if isinstance(image, list):
            raise TypeError("several pictures")  # LLaVA-1.5 has none of these
        turns = tuple(Turn(ROLES[turn["from"]], text_of(turn["value"])) for turn in row["conversations"])
        if not image:
            return Example(name, text_source, turns) if text_source else Refused(name, "no picture")
        turns = tuple(Turn(turn.role, turn.text.replace(IMAGE, "").strip()) for turn in turns)
        task = "look" if _looking(turns) else None
        return Example(name, source, turns, (picture(place, candidates(image)),), cluster=image, task=task)

    return converted(rows_of(place, file), example, "LLaVA")


def _looking(turns: Sequence[Turn]) -> bool:
    """Whether all requests of a conversation about a picture are for a region, a caption, or a short answer.

    Only the first request of most rows names the form, as LLaVA-1.5 merged a set's questions about one picture: later ones count
    as of that form where their answers are as short.
    """
    requests, answers = ([turn.text for turn in turns if turn.role == role] for role in ("user", "assistant"))
    later = zip(requests[1:], answers[1:], strict=False)
    named = bool(requests and LOOKING.search(requests[0]))
    return named and all(LOOKING.search(request) or len(answer.split()) <= PHRASE for request, answer in later)


def vlguard(place: Place, split: str = "train") -> Iterator[Example | Refused]:
    """VLGuard: unsafe instructions about pictures, which are refused, and safe ones, which are answered. Gated.

    As in its authors' own conversion there is one conversation per picture: an unsafe picture (its cluster is the harm) has one
    exchange, a safe one a safe and an unsafe exchange in random order. The seed is fixed, as in the authors' script; their order
    of draws is not claimed.
    """
    rng = random.Random(0)

    def example(row: dict[str, Any], name: str) -> Example:
        """One conversation about a published row's picture."""
        exchanges, image, safe = row["instr-resp"], row["image"], row["safe"]
        keys = ("safe_instruction", "unsafe_instruction") if safe else ("instruction",)
        pairs = [(text_of(exchanges[i][key]), text_of(exchanges[i]["response"])) for i, key in enumerate(keys)]
        category = None if safe else f"{row['harmful_category']}/{row['harmful_subcategory']}"
        candidates = [f"{split}/{image}", image, f"{split}.zip!{split}/{image}", f"{split}.zip!{image}"]
        stored = picture(place, candidates)
        rng.shuffle(pairs)
        turns = [turn for text, answer in pairs for turn in (Turn("user", text), Turn("assistant", answer))]
        return Example(name, "safety", tuple(turns), (stored,), cluster=category)

    return converted(rows_of(place, f"{split}.json"), example, "VLGuard")


def safe_rlhf_published(place: Place, split: str = "train") -> Iterator[Mapping[str, Any]]:
    """PKU-SafeRLHF's rows of every file of a split; ValueError for a file without the required columns.

    The columns differ in three generations: 2023 has the seven that are required, mid-2024 adds sources, the current one harm
    categories and severities.
    """
    if place.folder is None:
        from datasets import load_dataset

        yield from load_dataset(place.origin.repo, split=split, revision=place.revision, streaming=True)
        return
    patterns = (f"data/*/{split}.jsonl", f"round0/{split}.jsonl*", f"{split}.jsonl*")
    if not (files := names(place, patterns)):
        raise FileNotFoundError(f"{place.folder} below VLSAFE_DATA has none of {', '.join(patterns)}")
    for file in files:
        for number, row in enumerate(rows_of(place, file)):
            if not number and (lacking := SAFE_RLHF_COLUMNS - set(row)):
                raise ValueError(f"{file} has no columns {', '.join(sorted(lacking))}; it is not PKU-SafeRLHF")
            yield row


def safe_rlhf(place: Place) -> Iterator[Pair | Refused]:
    """PKU-SafeRLHF's preference rows in the files' order: text prompts with two answers, of which the safer one is chosen.

    Where even that answer is unsafe the pair would teach harm, and is refused (docs/departures.md); SafeRLHF keeps such pairs,
    as data of a cost model. It also compares answers by helpfulness, separately, which is not used.
    """
    return converted(safe_rlhf_published(place), _safe_rlhf_pair, "SafeRLHF", prefix="safe-rlhf")


def _safe_rlhf_pair(row: Mapping[str, Any], name: str) -> Pair | Refused:
    safer = row["safer_response_id"]
    if safer not in (0, 1) or row["better_response_id"] not in (0, 1):
        return Refused(name, "an answer's number is neither 0 nor 1")
    prompt, chosen, rejected = (text_of(row[key]) for key in ("prompt", f"response_{safer}", f"response_{1 - safer}"))
    if not (prompt.strip() and chosen.strip() and rejected.strip()):
        return Refused(name, "a text is missing")
    if not row[f"is_response_{safer}_safe"]:
        return Refused(name, "even the safer answer is unsafe")
    category = None
    if not row[f"is_response_{1 - safer}_safe"]:
        harms = row.get(f"response_{1 - safer}_harm_category") or {}  # only the current generation names them
        category = ", ".join(sorted(harm for harm, present in harms.items() if present)) or "unsafe"
    return Pair(name, "safe-rlhf", (Turn("user", prompt),), chosen, rejected, category=category)


def spa_vl_published(place: Place, split: str = "train") -> Iterator[tuple[Mapping[str, Any], Picture | None]]:
    """SPA-VL's rows of a split, and their pictures; ValueError for a Parquet file that is broken.

    A local folder may hold the hub's Parquet files (pictures inside) or the JSON list of its authors' training code, with
    pictures beside it. The training split has no categories; the others have three classes.
    """
    files = names(place, (f"**/{split}-*.parquet", f"**/{split}.parquet")) or [f"{split}.json"]
    rows: Any = ((row, f"{file}{assets.MEMBER}{n}") for file in files for n, row in enumerate(rows_of(place, file)))
    if place.folder is None:
        from datasets import Image, load_dataset

        rows = load_dataset(place.origin.repo, SPA_VL_CONFIGS[split], split=split, revision=place.revision, streaming=True)
        rows = ((row, "") for row in rows.cast_column("image", Image(decode=False)))
    for row, at in rows:
        image = row.get("image")
        if isinstance(image, dict):
            held = image.get("bytes")
            yield row, Stored(f"{place.folder}/{at}") if held and at else held
        else:
            yield row, picture(place, _in_images(image)) if isinstance(image, str) and image else None


def spa_vl(place: Place) -> Iterator[Pair | Refused]:
    """SPA-VL's training rows in order: pictures with a question and two answers; the safer and more helpful one is chosen."""

    def pair(row: tuple[Mapping[str, Any], Picture | None], name: str) -> Pair | Refused:
        columns, image = row
        question, chosen, rejected = (text_of(columns.get(key)) for key in ("question", "chosen", "rejected"))
        if image is None:
            return Refused(name, "no picture")
        if not (question.strip() and chosen.strip() and rejected.strip()):
            return Refused(name, "a text is missing")
        turn = Turn("user", question.replace(IMAGE, "").strip())
        return Pair(name, "spa-vl", (turn,), chosen, rejected, (image,), columns.get("class1"))

    return converted(spa_vl_published(place), pair, "SPA-VL", prefix="spa-vl")


class Corpus(NamedTuple):
    """The folder of a corpus below `VLSAFE_DATA`, and the function that reads its rows."""

    folder: str
    rows: Callable[[Place], Iterator[Any]]


CORPORA = {  # by the names of the miniature's corpora
    "captions": Corpus("LLaVA-Pretrain", captions),
    "instructions": Corpus("LLaVA-Instruct-150K", instructions),
    "safety": Corpus("VLGuard", vlguard),
    "safe_rlhf": Corpus("PKU-SafeRLHF", safe_rlhf),
    "spa_vl": Corpus("SPA-VL", spa_vl),
}


def place_of(name: str, origin: Origin) -> Place:
    """Where a corpus is read from: the local folder where there is one, else the hub."""
    root, folder = assets.outside(), CORPORA[name].folder
    return Place(origin, folder if root is not None and (root / folder).is_dir() else None)


def stream(name: str, origin: Origin) -> Iterator[Example | Pair | Refused]:
    """The rows of a corpus, or a random subset where the origin has a limit; the fixed seed gives all studies the same."""
    rows = CORPORA[name].rows(place_of(name, origin))
    if origin.limit is None:
        return rows
    chosen = set(np.random.default_rng(0).permutation(origin.rows or origin.limit)[: origin.limit].tolist())
    return (row for number, row in enumerate(rows) if number in chosen)


def examples(name: str, origin: Origin) -> Iterator[Example | Refused]:
    """The rows of a corpus without preference pairs."""
    return (row for row in stream(name, origin) if not isinstance(row, Pair))
