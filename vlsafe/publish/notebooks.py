"""Run notebooks with checked parameters, and put their outputs back into the committed copies."""

from __future__ import annotations

import ast
import hashlib
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import nbformat
from IPython.display import Markdown

from vlsafe.analysis import openings
from vlsafe.analysis.measures import Lacking
from vlsafe.core import store
from vlsafe.core.scale import known
from vlsafe.core.schema import MEDIAN_SEED
from vlsafe.study.graph import planned, read_by
from vlsafe.study.study import Study, project_root

FOLDER = Path("notebooks")
NOTEBOOKS: dict[str, tuple[str, ...]] = {  # what each one reads: words of `graph.read_by`, and single stages
    "00_world": ("world", "examination/parent.aligned"),
    "01_data_filtering": ("filtering",),
    "02_vl_adaptation": ("projector/filtered", "adaptation", "degradation", "probe/localisation"),
    "03_safety_degradation": ("degradation",),
    "04_safety_tuning": ("tuned", "tuning"),
    "05_probing": ("probing", "safety/mtl-full", "examination/safety.mtl-full", "degradation"),
    "06_merging": ("merging", "tuning"),
    "07_claims": ("claims",),
}
LINKS = "*Notebooks:*"
DEAD = "application/vnd.jupyter.widget-view+json"  # a widget without its kernel
ACROSS = ("07_claims",)  # read every study of a run store, so they wait for all of a reproduction


def reads(study: Study, name: str, grid: str = "default") -> list[str]:
    """The stages that a notebook reads, of those that the study's scale has."""
    names = planned(study, grid)
    found = [stage for word in NOTEBOOKS[name] for stage in ([word] if "/" in word else read_by(study, word, grid))]
    return [stage for stage in dict.fromkeys(found) if stage in names]


def shown(make: Callable[[], Any]) -> Any:
    """What a cell shows: the table or figure that `make` makes, or a sentence that says why this scale does not have it."""
    try:
        return make()
    except Lacking as lacking:
        return Markdown(f"*Not shown: {lacking}.*")


def answer(study: Study, notebook: str) -> Any:
    """What a notebook opens with: its answer by the committed results of the study's scale, over all backbones and seeds."""
    folder = study.figures
    origin = (
        f"From `{folder.parent.name}/{folder.name}`: mean over seeds (least–most); points [95 % interval]. Verdicts stand after "
        "Holm's correction over the claims of a family, so an interval may lie beyond a claim's threshold and decide nothing."
        + (
            ""
            if notebook in ACROSS
            else f" Below it is `{study.backbone}`, seed {study.seed}, where a note does not name others."
        )
    )
    return Markdown(f"**The answer.** {origin}\n\n{openings.opening(notebook, folder)}")


def said(*texts: str) -> Any:
    """Computed sentences, as a cell shows them."""
    return Markdown("**Computed.**\n\n" + "\n".join(f"- {text.removeprefix('- ')}" for text in texts))


def committed(study: Study, name: str) -> Any:
    """A committed table of the study's scale, of all its backbones and seeds, folded; a sentence where it is not there."""
    path = study.figures / f"{name}.md"
    if not path.exists():
        return Markdown(f"*Not shown: no {name} of this scale is committed.*")
    title, _, text = path.read_text(encoding="utf-8").partition("\n")
    return _folded((title, text))


def logged(head: str) -> Any:
    """The tables of LOG.md whose first cell begins with `head`, each folded under its entry's title; a sentence where none is."""
    path, title, tables = project_root() / "LOG.md", "", dict[str, list[str]]()
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        title = line.removeprefix("## ") if line.startswith("## ") else title
        key = f"LOG.md, {title}"
        if line.startswith(f"| {head}") or (line.startswith("|") and tables.get(key, [""])[-1].startswith("|")):
            tables.setdefault(key, []).append(line)
        elif key in tables:
            tables[key].append("")
    if not tables:
        return Markdown(f"*Not shown: LOG.md is not here, or has no table of {head}s.*")
    return _folded(*((key, "\n".join(lines)) for key, lines in tables.items()))


def _folded(*parts: tuple[str, str]) -> Any:
    """Texts under titles that open when they are clicked."""
    return Markdown("\n\n".join(f"<details><summary>{title}</summary>\n\n{text.strip()}\n\n</details>" for title, text in parts))


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
    lines = ast.parse(cells[0].source).body
    if not all(isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name) for line in lines):
        raise ValueError(f"{path.name}: the parameters cell holds more than assignments of literals")
    return {line.targets[0].id: ast.literal_eval(line.value) for line in lines}


def links(name: str) -> str:
    """The line of a notebook's first cell that leads to all others, to the one before and to the one after."""
    names = list(NOTEBOOKS)
    here = names.index(name)
    steps = [f"**{each[:2]}**" if each == name else f"[{each[:2]}]({each}.ipynb)" for each in names]
    before = [f"← [{each.replace('_', ' ')}]({each}.ipynb)" for each in names[max(0, here - 1) : here]]
    after = [f"[{each.replace('_', ' ')}]({each}.ipynb) →" for each in names[here + 1 : here + 2]]
    return f"{LINKS} {' · '.join(['[README](../README.md)', *before, ' '.join(steps), *after])}"


def with_links(name: str, text: str) -> str:
    """The text of a notebook's first cell with its line of links below the title, in place of an older one."""
    title, *rest = [line for line in text.splitlines() if not line.startswith(LINKS)]
    return "\n".join([title, "", links(name), "", *itertools.dropwhile(lambda line: not line.strip(), rest)])


def execute(path: Path, out: Path, values: Mapping[str, Any]) -> None:
    """Run a notebook through papermill; it stands at `out` also when it fails.

    Its kernel is this interpreter: one that somebody has registered as `python3` (JUPYTER_PATH) may be any other.

    Raises:   ValueError for a parameter that the notebook does not have (papermill alone would only warn), or where `out` is a
              notebook that is read;
              PapermillExecutionError when a cell fails
    """
    import papermill
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager

    launch = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    own = KernelSpec(argv=launch, display_name="Python 3", language="python")
    manager = type("Own", (AsyncKernelManager,), {"kernel_spec": property(lambda self: own)})
    store.refuse_inputs({"--out": out}, {f"notebook {name}": path.with_name(f"{name}.ipynb") for name in NOTEBOOKS})
    for name in values:
        known(name, parameters(path), f"parameter of {path.name}")
    out.parent.mkdir(parents=True, exist_ok=True)
    # The usual places are below HOME, where not everybody may write, and a user's profile may change what cells do.
    with tempfile.TemporaryDirectory() as own_place, mock.patch.dict(
        os.environ, JUPYTER_RUNTIME_DIR=own_place, IPYTHONDIR=own_place
    ):  # fmt: skip
        papermill.execute_notebook(
            *(str(place).replace("{", "{{").replace("}", "}}") for place in (path, out)),  # it takes them for templates
            dict(values), progress_bar=False, kernel_name="python3", kernel_manager_class=manager,
        )  # fmt: skip


def adopt_all(root: Path, packages: Mapping[str, str]) -> Iterator[str]:
    """Copy the outputs of mini, median seed, in a run store into all committed notebooks; their names, as each is done."""
    stamp = {"scale": "mini", "seed": MEDIAN_SEED, "backbone": "mini-chat", "packages": packages}
    folder = root / "mini" / "mini-chat" / f"seed{MEDIAN_SEED}" / "notebooks"
    for name in NOTEBOOKS:
        adopt(folder / f"{name}.ipynb", FOLDER / f"{name}.ipynb", stamp)
        yield name


def adopt(executed: Path, committed: Path, stamp: Mapping[str, Any]) -> None:
    """Copy the outputs of an executed notebook into the committed one, without papermill's traces, and stamp it.

    What went to stderr (progress, notes on older runs) is left out, and so are widgets, which are dead without a kernel. The
    first cell gets its line of links to the other notebooks.
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
    source.cells[0].source = with_links(committed.stem, source.cells[0].source)
    source.metadata["vlsafe"] = {"code": code_digest(committed), **stamp}
    source.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    source.metadata.pop("papermill", None)
    store.write_text(committed, json.dumps(source, indent=1, ensure_ascii=False, sort_keys=True) + "\n")
