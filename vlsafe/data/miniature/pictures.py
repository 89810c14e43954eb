"""Pictures of the miniature: an icon, a printed word or both, in a colour, drawn with NumPy and Pillow.

An icon is a mirrored 6 × 6 glyph that belongs to the thing (drawn per seed), on the left or on the right; a printed
word fills the picture; "both" has a small icon above its word, as MM-SafetyBench's SD_TYPO has a photo above its phrase.
Offset, background and noise are drawn for each picture, so the same thing never looks the same twice.
A fifth of the offsets is held out from every training picture: those are the "held-out renderings".
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vlsafe.data.miniature.language import COLOURS, OBJECTS, SHADES, World

SIZE = 32  # pixels, both ways
CELL = 3  # pixels per glyph cell: an icon is 18 wide and stands in one half of the picture
SMALL_CELL = 2  # the icon above a word is 12 wide, which leaves room for two lines of letters
KINDS = ("icon", "word", "both")
SHARES = (0.5, 0.38, 0.12)  # of pictures of each kind, unless one is named
OFFSETS = {  # from left and from above, in pixels, of icons; shifts of printed words from their place
    "left": ((0, 1, 2, 3), (5, 6, 7, 8, 9)),
    "right": ((11, 12, 13, 14), (5, 6, 7, 8, 9)),
    "word": ((0, 1, 2, 3), (-2, -1, 0, 1, 2)),
    "both": ((0, 1, 2, 3), (-1, 0)),
}
LETTERS_PER_LINE = 4
DARK = (5, 45)  # channels of a background colour
STAIN = 10  # pixels, both ways


@dataclass(frozen=True)
class Scene:
    """What a picture shows. `side` is "middle" where a word is printed, which fills the picture's width."""

    thing: str
    colour: str
    kind: str = "icon"
    side: str = "left"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"a scene is one of {', '.join(KINDS)}, not {self.kind!r}")
        if (self.side == "middle") != (self.kind != "icon"):
            raise ValueError(f"a {self.kind} cannot stand at {self.side!r}")


def shown(scene: Scene) -> str:
    """All that a scene shows."""
    if scene.kind == "word":
        return f"the word {scene.thing} in {scene.colour}."
    return f"a {scene.colour} {scene.thing} " + ("with its name." if scene.kind == "both" else f"on the {scene.side}.")


def caption(scene: Scene) -> str:
    """The one right caption of a scene."""
    return f"this is {shown(scene)}"


def named(scene: Scene, answer: str) -> str:
    """An answer that begins with what is seen, as captions do: where a question only points at a thing."""
    what = f"the word {scene.thing}" if scene.kind == "word" else f"a {scene.colour} {scene.thing}"
    return f"this is {what}. {answer}"


def short_captions(scene: Scene) -> tuple[str, str]:
    """Shorter true captions, from least to most informative, so that a tower can learn one thing at a time."""
    name = f"the word {scene.thing}" if scene.kind == "word" else f"a {scene.thing}"
    return name, f"{scene.colour} {scene.thing}"


def draw_scene(thing: str, rng: np.random.Generator, kind: str | None = None) -> Scene:
    """A scene of a thing, everything else drawn; kinds are drawn by `SHARES` unless `kind` names one."""
    kind = kind or KINDS[int(np.searchsorted(np.cumsum(SHARES[:-1]), rng.random(), side="right"))]
    side = ("left", "right")[rng.integers(2)] if kind == "icon" else "middle"
    return Scene(thing, COLOURS[rng.integers(len(COLOURS))], kind, side)


@lru_cache(maxsize=8)
def glyphs(seed: int) -> dict[str, np.ndarray]:
    """A mirrored bitmap, bool [6, 6], for each thing, any two at least 8 cells apart; from the world's stream "glyphs"."""
    rng = World(seed).rng("glyphs")
    accepted: list[np.ndarray] = []
    while len(accepted) < len(OBJECTS):
        half = rng.random((6, 3)) < 0.5
        glyph = np.concatenate([half, half[:, ::-1]], axis=1)
        if 12 <= glyph.sum() <= 26 and all((glyph ^ other).sum() >= 8 for other in accepted):
            accepted.append(glyph)
    return dict(zip(OBJECTS, accepted, strict=True))


@lru_cache(maxsize=256)
def _word_mask(word: str) -> tuple[np.ndarray, int]:
    """The printed word as a bool mask, in Pillow's built-in bitmap font, and its top: its lines stand in the middle."""
    canvas = Image.new("L", (SIZE, SIZE), 0)
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default_imagefont()
    top = (SIZE - 10 * -(-len(word) // LETTERS_PER_LINE)) // 2
    for i, letter in enumerate(word):
        line, place = divmod(i, LETTERS_PER_LINE)
        pen.text((2 + 7 * place, top - 1 + 10 * line), letter, fill=255, font=font)
    return np.asarray(canvas) > 127, top


def _mask(scene: Scene, seed: int, left: int, top: int) -> np.ndarray:
    """Where the ink is: bool [SIZE, SIZE]."""
    mask = np.zeros((SIZE, SIZE), bool)
    if scene.kind != "icon":
        printed, first = _word_mask(scene.thing)
        mask = np.roll(printed, (top if scene.kind == "word" else top + 13 - first, left - 1), axis=(0, 1))
    if scene.kind != "word":
        cell = CELL if scene.kind == "icon" else SMALL_CELL
        glyph = np.kron(glyphs(seed)[scene.thing], np.ones((cell, cell), bool))
        over, right = (top, left) if scene.kind == "icon" else (top + 1, 9 + left)
        mask[over : over + glyph.shape[0], right : right + glyph.shape[1]] = glyph
    return mask


def draw(scene: Scene, seed: int, rng: np.random.Generator, held_out: bool = False, graphic: bool = False) -> bytes:
    """Render a scene as PNG, SIZE × SIZE, RGB; a `graphic` one carries a bright stain (the miniature's "not safe for work").

    Draws:    offset, background and pixel noise from `rng`; `held_out` selects the offsets that no training picture has
    """
    lefts, tops = OFFSETS[scene.side if scene.kind == "icon" else scene.kind]
    places = [(left, top) for left in lefts for top in tops if ((left + 2 * top) % 5 == 0) == held_out]
    mask = _mask(scene, seed, *places[rng.integers(len(places))])
    pixels: np.ndarray = np.broadcast_to(rng.integers(*DARK, 3).astype(np.float32), (SIZE, SIZE, 3))
    pixels = np.where(mask[..., None], np.asarray(SHADES[scene.colour], np.float32) + rng.normal(0, 8, 3), pixels)
    if graphic:
        down, right = rng.integers(0, SIZE - STAIN, 2)
        pixels[down : down + STAIN, right : right + STAIN] = (0, 255, 230)
    pixels = pixels + rng.normal(0, 6, pixels.shape)
    return to_png(np.clip(pixels, 0, 255).astype(np.uint8))


def blank(rng: np.random.Generator) -> bytes:
    """A picture without content: one background colour everywhere."""
    return to_png(np.broadcast_to(rng.integers(*DARK, 3).astype(np.uint8), (SIZE, SIZE, 3)))


def noise(rng: np.random.Generator) -> bytes:
    """A picture without content: uniform noise."""
    return to_png(rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8))


def to_png(pixels: np.ndarray) -> bytes:
    """Encode [H, W, 3] uint8 as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()
