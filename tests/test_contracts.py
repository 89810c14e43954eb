"""The house's promises that a machine can keep: floors, scales, notebooks, the lock file."""

import ast
import re
from pathlib import Path

import nbformat
import pytest
import yaml

from vlsafe import notebooks
from vlsafe.notebooks import NOTEBOOKS

ROOT = Path(__file__).parents[1]
FLOORS = {
    "schema": 0, "layouts": 0, "outside": 0, "scales": 0, "store": 0, "stats": 0,
    "miniature": 1, "models": 1, "chat": 1,
    "sources": 2, "benchmarks": 2, "mix": 2, "trainable": 2, "engines": 2, "towers": 2, "servers": 2, "processes": 2,
    "conflict": 2, "costs": 2, "guards": 3, "serving": 3, "train": 3, "launch": 4, "probe": 3, "merge": 3,
    "judges": 4, "human": 4,
    "evaluate": 5, "causal": 5,
    "layers": 6, "interventions": 6, "maps": 6, "merges": 6, "mergeplots": 6,
    "measures": 6, "tables": 6, "arms": 6, "tradeoff": 6, "figures": 6, "fronts": 6, "gallery": 6, "claims": 6, "cards": 6,
    "modelcards": 6, "readme": 6, "readings": 6, "agreement": 6, "forest": 6,
    "stages": 7, "notebooks": 7, "dryrun": 7, "beside": 7, "golden": 7, "plan": 7, "score": 7, "cli": 8,
}  # fmt: skip
MODEL_LIBRARIES = {"torch", "transformers", "trl", "peft", "accelerate"}


def rooms():
    for path in sorted((ROOT / "vlsafe").rglob("*.py")):
        room = path.relative_to(ROOT / "vlsafe").parts[0].removesuffix(".py")
        if room != "__init__":
            yield room, path


def imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            if node.module == "vlsafe":
                yield from (f"vlsafe.{alias.name}" for alias in node.names)


def test_rooms_import_only_from_floors_below():
    for room, path in rooms():
        for name in imports(path):
            if name.startswith("vlsafe."):
                other = name.split(".")[1]
                assert other == room or FLOORS[other] < FLOORS[room] or FLOORS[room] == FLOORS[other] in (0, 1, 6, 7), (
                    f"{path.name} imports {name}"
                )


def test_the_gallery_and_the_ground_need_no_model_library():
    for room, path in rooms():
        if FLOORS[room] in (0, 6):
            assert not MODEL_LIBRARIES & {name.split(".")[0] for name in imports(path)}, path


def test_no_code_asks_a_scale_for_its_name_or_trusts_remote_code():
    for room, path in rooms():
        text = path.read_text(encoding="utf-8")
        assert "trust_remote_code" not in text, path
        if room not in ("scales", "cli", "figures"):
            assert not re.search(r"scale(\.name)? *(==|!=|in) *[\"'(\[]", text), path


def test_the_package_stays_thin():
    lines = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for room, path in rooms()}
    counted = [
        len(path.read_text(encoding="utf-8").splitlines()) for room, path in rooms() if room not in ("sources", "benchmarks")
    ]
    assert sum(counted) < 15500
    assert not {name: n for name, n in lines.items() if n > 520}


def test_the_lock_is_exact_and_the_conda_file_equals_it():
    lock = [line for line in (ROOT / "env/requirements.lock").read_text().splitlines() if line and not line.startswith("#")]
    for line in lock:
        assert re.fullmatch(r"[A-Za-z0-9_.-]+==[^+/@ ]+", line), line
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())
    pinned = next(entry["pip"] for entry in conda["dependencies"] if isinstance(entry, dict))
    assert pinned == ["-r env/requirements.lock"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_contract(name):
    path = ROOT / "notebooks" / f"{name}.ipynb"
    cells = nbformat.read(path, as_version=4).cells
    code = [c.source for c in cells if c.cell_type == "code"]
    lines = [len(source.splitlines()) for source in code]
    assert max(lines) <= 20 and sorted(lines)[len(lines) // 2] <= 8
    words = sum(len(c.source.split()) for c in cells if c.cell_type == "markdown")
    assert words >= 3 * sum(lines)
    whole = "\n".join(code)
    assert not re.search(r"^\s*(def|class) |^[!%]|[\"']/(home|root|usr|tmp)", whole, re.M)
    given = notebooks.parameters(path)
    assert {"scale", "backbone", "seed", "root"} <= set(given) and len(given) <= 6
    for parameter in given:
        uses = [source for source in code if re.search(rf"\b{parameter}\b", source)]
        assigned = [s for s in code if re.search(rf"^{parameter}\s*=", s, re.M)]
        assert len(uses) >= 2 and len(assigned) == 1, parameter


def test_papermill_sees_every_parameter():
    import papermill

    for name in NOTEBOOKS:
        path = ROOT / "notebooks" / f"{name}.ipynb"
        assert set(papermill.inspect_notebook(str(path))) == set(notebooks.parameters(path))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_committed_notebooks_are_executed_and_not_stale(name):
    path = ROOT / "notebooks" / f"{name}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    assert notebook.metadata["vlsafe"]["code"] == notebooks.code_digest(path), "run `make notebooks`"
    assert all(c.execution_count for c in notebook.cells if c.cell_type == "code")


def test_unknown_notebook_parameters_are_refused(tmp_path):
    path = ROOT / "notebooks" / "00_world.ipynb"
    with pytest.raises(ValueError, match=r"unknown parameter of 00_world.ipynb 'sede'; did you mean 'seed'"):
        notebooks.execute(path, tmp_path / "out.ipynb", {"sede": 1})
    assert not (tmp_path / "out.ipynb").exists()
