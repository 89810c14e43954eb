"""Run notebooks with checked parameters, and put their outputs back into the committed copies."""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat

from vlsafe.core.scale import known
from vlsafe.study import merging
from vlsafe.study.graph import STAGES, compared, examinations, planned, probed, tables

FOLDER = Path("notebooks")
NOTEBOOKS: dict[str, tuple[str, ...]] = {  # what each one reads
    "00_world": ("world/corpora", "tower/clip", "parent/aligned", "examination/parent.aligned"),
    "01_data_filtering": ("screen/filtered",),
    "02_vl_adaptation": ("projector/filtered", *(name for name in STAGES if "instruct" in name), "probe/localisation"),
    "03_safety_degradation": tuple(examinations()),
    "04_safety_tuning": (*(name for name in planned() if name.startswith("safety/")), *compared()),
    "05_probing": (*probed(), "safety/mtl-full", "examination/safety.mtl-full", *examinations()),
    "06_merging": (*merging.names("default"), *compared()),
    "07_claims": tuple(tables()),
}
LINKS = "*Notebooks:*"
DEAD = "application/vnd.jupyter.widget-view+json"  # a widget without its kernel
ACROSS = ("07_claims",)  # read every study of a run store, so they wait for all of a reproduction


def code_digest(path: Path) -> str:
    """Digest of a notebook's code cells alone: neither its prose nor its outputs make it run again."""
    cells = nbformat.read(path, as_version=4).cells
    return hashlib.sha256("\0".join(c.source for c in cells if c.cell_type == "code").encode()).hexdigest()[:16]


def parameters(path: Path) -> dict[str, Any]:
    """The defaults of a notebook's parameters cell.

    Raises:   ValueError unless there is exactly one such cell, made of plain assignments of literals
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no notebook {str(path)!r} below this folder; run this where the Snakefile is")
    cells = [c for c in nbformat.read(path, as_version=4).cells if "parameters" in c.metadata.get("tags", ())]
    if len(cells) != 1:
        raise ValueError(f"{path.name} has {len(cells)} cells tagged 'parameters', it needs one")
    found = {}
    for line in ast.parse(cells[0].source).body:
        if not isinstance(line, ast.Assign) or not isinstance(line.targets[0], ast.Name):
            raise ValueError(f"{path.name}: the parameters cell holds more than assignments of literals")
        found[line.targets[0].id] = ast.literal_eval(line.value)
    return found


def links(name: str) -> str:
    """The line of a notebook's first cell that leads to all others, to the one before and to the one after."""
    names = list(NOTEBOOKS)
    here = names.index(name)
    titles = {each: each.replace("_", " ") for each in names}
    steps = [f"**{each[:2]}**" if each == name else f"[{each[:2]}]({each}.ipynb)" for each in names]
    before = [f"← [{titles[each]}]({each}.ipynb)" for each in names[max(0, here - 1) : here]]
    after = [f"[{titles[each]}]({each}.ipynb) →" for each in names[here + 1 : here + 2]]
    return f"{LINKS} {' · '.join(['[README](../README.md)', *before, ' '.join(steps), *after])}"


def linked(name: str, text: str) -> str:
    """The text of a notebook's first cell with its line of links below the title, in place of an older one."""
    title, *rest = [line for line in text.splitlines() if not line.startswith(LINKS)]
    while rest and not rest[0].strip():
        rest.pop(0)
    return "\n".join([title, "", links(name), "", *rest])


def execute(path: Path, out: Path, given: Mapping[str, Any]) -> None:
    """Run a notebook through papermill; it stands at `out` also when it fails.

    Raises:   ValueError for a parameter that the notebook does not have (papermill alone would only warn);
              PapermillExecutionError when a cell fails
    """
    import papermill

    for name in given:
        known(name, parameters(path), f"parameter of {path.name}")
    out.parent.mkdir(parents=True, exist_ok=True)
    papermill.execute_notebook(str(path), str(out), dict(given), progress_bar=False, kernel_name="python3")


def adopt(executed: Path, committed: Path, stamp: Mapping[str, Any]) -> None:
    """Copy the outputs of an executed notebook into the committed one, without papermill's traces, and stamp it.

    What went to stderr (progress, notes on older runs) was said to whoever ran it and is left out, and so are widgets, which
    are dead without a kernel. The first cell gets its line of links to the other notebooks.
    """
    if not executed.exists():
        raise FileNotFoundError(f"{executed.name} was not executed in this run store; `make reproduce` does")
    done, source = nbformat.read(executed, as_version=4), nbformat.read(committed, as_version=4)
    ran = [c for c in done.cells if c.cell_type == "code" and "injected-parameters" not in c.metadata.get("tags", ())]
    own = [c for c in source.cells if c.cell_type == "code"]
    if [c.source for c in ran] != [c.source for c in own]:
        raise ValueError(f"{executed.name} was executed from other code than {committed.name} has now; run it again")
    for number, (cell, result) in enumerate(zip(own, ran, strict=True), 1):
        kept = [out for out in result.outputs if out.get("name") != "stderr" and DEAD not in out.get("data", {})]
        cell.outputs, cell.execution_count = kept, number
        for output in cell.outputs:
            if "execution_count" in output:
                output["execution_count"] = number
    source.cells[0].source = linked(committed.stem, source.cells[0].source)
    source.metadata["vlsafe"] = {"code": code_digest(committed), **stamp}
    source.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    source.metadata.pop("papermill", None)
    committed.write_text(json.dumps(source, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
