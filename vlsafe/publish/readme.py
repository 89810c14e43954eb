"""The generated parts of README.md and docs: what stands between markers is made from the committed artefacts, never by hand.

A part begins with `<!-- generated: NAME -->` and ends with `<!-- end generated -->`. NAME is one of PARTS or a table of the
figures folder. Imports no model library.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd

from vlsafe.analysis import claims, openings
from vlsafe.core.scale import known
from vlsafe.publish import provenance

MARKED = re.compile(r"(<!-- generated: (.+?) -->\n).*?(<!-- end generated -->)", re.S)


def generated(text: str, folder: Path, called: str = "README.md") -> str:
    """A README with all its generated parts made again from the artefacts in `folder`.

    Raises:   ValueError for a name that is neither a part nor a table there, or for a marker that is never closed
    """
    if len(MARKED.findall(text)) != text.count("<!-- generated: "):
        raise ValueError(f"{called} opens `<!-- generated: NAME -->` and does not close it with `<!-- end generated -->`")
    names = {*PARTS, *(path.stem for path in folder.glob("*.md"))}

    def part(match: re.Match[str]) -> str:
        name = known(match[2], names, f"generated part of {called}")
        body = PARTS[name](folder) if name in PARTS else (folder / f"{name}.md").read_text(encoding="utf-8").rstrip()
        return f"{match[1]}{body}\n{match[3]}"

    return MARKED.sub(part, text)


def examine(folder: Path) -> str:
    """What `vlsafe examine` printed of a tiny model, as a test records it beside the figures."""
    return (folder.parent / "examine.md").read_text(encoding="utf-8").rstrip()


def _committed(folder: Path) -> Iterator[tuple[str, pd.DataFrame, pd.DataFrame]]:
    """Of the miniature and, where it has been run, of scale pocket: what it is, T08's lines and the ledger."""
    for name, what in SCALES.items():
        path = folder.parent / name / "T08_models.csv"
        if path.exists():
            yield what, pd.read_csv(path), claims.written(path.parent)


def answer(folder: Path) -> str:
    """The answer to the title in a sentence for each scale, of the committed results."""
    return "\n\n".join([*(f"**{what}:** {openings.title(*of)}" for what, *of in _committed(folder)), NOT_RUN])


def numbers(folder: Path) -> str:
    """What the answer rests on, as a table for each scale."""
    return "\n\n".join(f"**{what}:**\n\n{provenance.markdown(openings.answers(*of))}" for what, *of in _committed(folder))


def _contradicted(folder: Path) -> str:
    return openings.contradicted(claims.written(folder))


SCALES = {
    "mini": "In the miniature",
    "pocket": "With real parts (scale pocket: a 135M chat model, clip art, published prompts; seeds of the projector alone)",
}
NOT_RUN = "**At 7B:** nothing has been run; the table of costs says what it needs."
PARTS: dict[str, Callable[[Path], str]] = {
    "answer": answer,
    "numbers": numbers,
    "contradicted": _contradicted,
    "examine": examine,
}
