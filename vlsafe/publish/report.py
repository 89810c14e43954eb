"""One HTML file of a gallery's folder: the answer and the claims on top, pictures first, tables folded; nothing from outside."""

from __future__ import annotations

import base64
import html
import io
import re
from pathlib import Path
from string import Template

import mistune
from PIL import Image

from vlsafe.core import store
from vlsafe.publish.provenance import ARTEFACTS, studies_in

FIRST = ("F00_answer", "T09_claims", "F14_claims", "T00_left_out")
OF_OTHERS = ("T02_degradation", "F07_drift")  # what stands first in a report about somebody else's model
COLOURS = 128  # of a picture in the report, which is a third as large so; the files beside it have all
MOST = 120  # lines of a table that is folded; the CSV beside the report has all
MARKDOWN = mistune.create_markdown(plugins=["table"])  # a name with angle brackets stays a name
MARK = b":root { color-scheme: light dark; --ink: "  # a report, which has our style, may be written over, and nothing else
TITLE = "What is claimed, what was measured, how sure we are"


def refuse_other(out: Path) -> None:
    """Raises:   ValueError where a file is that is no report of ours"""
    if out.exists() and MARK not in out.read_bytes():
        raise ValueError(f"{out} is there and is no report of vlsafe's; choose another place")


def report(folder: Path, out: Path, title: str = TITLE) -> Path:
    """Write the report of a folder: contents, a choice of the backbone, every figure and every table.

    Raises:   ValueError where it would replace another file; FileNotFoundError where neither the ledger is there nor the table
              that says why it is not, nor one of OF_OTHERS
    """
    refuse_other(out)
    if not any((folder / f"{name}.md").exists() for name in (*FIRST, *OF_OTHERS)):
        raise FileNotFoundError(f"{folder} holds no ledger (T09_claims.md); run `vlsafe gallery` first")
    names = sorted({path.stem for path in folder.iterdir() if path.suffix in (".md", ".png")}, key=lambda n: (n[1:3], n))
    names = [*(name for name in FIRST if name in names), *(name for name in names if name not in FIRST)]
    sections = [_section(folder, name) for name in names]
    contents = [f'<li><a href="#{name}">{html.escape(heading(folder, name))}</a></li>' for name in names]
    units = sorted(studies_in(folder))
    backbones = dict.fromkeys(backbone for backbone, _ in units)
    text = Template(Path(__file__).with_name("templates").joinpath("report.html").read_text(encoding="utf-8")).substitute(
        title=html.escape(title), contents="".join(contents), sections="\n".join(sections),
        origin=f"{len(units)} studies.",
        backbones="".join(f"<option>{html.escape(name)}</option>" for name in backbones),
    )  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    store.write_text(out, text)
    return out


def heading(folder: Path, name: str) -> str:
    """What an artefact is called for the eye: its number and title."""
    path, title = folder / f"{name}.md", ARTEFACTS["figures"].get(name, name)
    return path.read_text(encoding="utf-8").partition("\n")[0] if path.exists() else f"{name[:3]}. {title}"


def _section(folder: Path, name: str) -> str:
    parts = [f'<h2 id="{name}">{html.escape(heading(folder, name))}</h2>']
    if (picture := folder / f"{name}.png").exists():
        parts.append(f'<figure><img alt="{name}" src="data:image/png;base64,{_smaller(picture)}"></figure>')
    if (table := folder / f"{name}.md").exists():
        _, _, text = table.read_text(encoding="utf-8").partition("\n")
        lines = text.split("\n")
        head, _, *rows = [place for place, line in enumerate(lines) if line.startswith("|")]
        columns, by = [cell.strip() for cell in lines[head].split("|")], dict[str, list[int]]()
        for place in rows:  # the choice of a backbone finds lines of each
            by.setdefault(lines[place].split("|")[columns.index("backbone")] if "backbone" in columns else "", []).append(place)
        cut = set() if name in FIRST else {place for of in by.values() for place in of[MOST // len(by) :]}
        text = "\n".join(line for place, line in enumerate(lines) if place not in cut)
        said = f"table, {len(rows)} lines" + (f", {len(rows) - len(cut)} shown, all in {name}.csv" if cut else "")
        short = re.sub(r"\s*(</t[dhr]>\s*)+", "", str(MARKDOWN(text)))  # HTML needs no ends of cells: a seventh of the file
        shown = f'<div class="table">{short}</div>'
        parts.append(shown if name in FIRST else f"<details><summary>{said}</summary>{shown}</details>")
    return "\n".join(parts)


def _smaller(picture: Path) -> str:
    """A picture in fewer colours, as text."""
    buffer = io.BytesIO()
    with Image.open(picture) as image:
        image.convert("RGB").quantize(COLOURS).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()
