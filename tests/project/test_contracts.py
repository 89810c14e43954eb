"""The house's promises that a machine can keep: floors, scales, notebooks, the lock file."""

import ast
import re
import sys
from pathlib import Path

import nbformat
import pytest
import yaml

from vlsafe.publish import notebooks
from vlsafe.publish.notebooks import NOTEBOOKS

ROOT = Path(__file__).parents[2]
LEVELS = [  # a folder imports from itself and from levels below; CONTRIBUTING draws them
    {"core"}, {"analysis", "models"}, {"data", "training", "inspection", "plots"}, {"evaluation"}, {"study"},
    {"publish", "planning"}, {"cli"}, {"__init__", "__main__"},
]  # fmt: skip
LEVEL = {folder: level for level, folders in enumerate(LEVELS) for folder in folders}
CORE_AND_ANALYSIS = {"core", "analysis"}  # all that pictures are drawn from
MODEL_LIBRARIES = {"torch", "transformers", "trl", "peft", "accelerate"}


def modules():
    for path in sorted((ROOT / "vlsafe").rglob("*.py")):
        yield path.relative_to(ROOT / "vlsafe").parts[0].removesuffix(".py"), path


def imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            if node.module == "vlsafe":
                yield from (f"vlsafe.{alias.name}" for alias in node.names)


def test_the_root_of_the_package_holds_three_files_and_eleven_folders():
    entries = {path.name.removesuffix(".py") for path in (ROOT / "vlsafe").iterdir()} - {"__pycache__", "py.typed"}
    assert entries == set(LEVEL) and len(LEVELS) <= 8


def test_folders_import_only_from_levels_below():
    for folder, path in modules():
        for name in imports(path):
            if name.startswith("vlsafe."):
                other = name.split(".")[1]
                assert other == folder or LEVEL.get(other, -1) < LEVEL[folder], f"{path.name} imports {name}"
                assert folder != "plots" or other in CORE_AND_ANALYSIS | {"plots"}, f"{path.name} imports {name}"
                assert folder not in ("evaluation", "study") or other != "plots", f"{path.name} imports {name}"


@pytest.mark.parametrize(
    "folder", [path for path in sorted((ROOT / "vlsafe").glob("*/__init__.py")) if "lazily" in path.read_text()]
)
def test_a_type_checker_knows_every_module_of_a_folder_that_loads_them_lazily(folder):
    tree = ast.parse(folder.read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    inside = {path.stem for path in folder.parent.glob("*.py")} | {
        path.parent.name for path in folder.parent.glob("*/__init__.py")
    }
    assert imported - {"TYPE_CHECKING", "lazily"} == inside - {"__init__"}


def test_an_examination_never_calls_a_level_above(study):
    """Traced on NANO: which file calls which, from the stage to the raw table. A progress bar is handed down."""
    from vlsafe.study import degradation

    package, edges = str(ROOT / "vlsafe"), set()

    def trace(frame, event, _):
        caller, callee = (f.f_code.co_filename for f in (frame.f_back, frame)) if frame.f_back else ("", "")
        if event == "call" and caller != callee and caller.startswith(package) and callee.startswith(package):
            edges.add(tuple(str(Path(name).relative_to(package)) for name in (caller, callee)))

    folder, items = study.checkpoints("projector/filtered")[-1], study.items()
    sys.setprofile(trace)
    try:
        degradation.examined(study, "projector/filtered", folder, items, "full")
    finally:
        sys.setprofile(None)
    level = lambda name: LEVEL[Path(name).parts[0].removesuffix(".py")]  # noqa: E731
    up = {(a, b) for a, b in edges if level(b) > level(a) and b != "study/study.py"}
    assert not up and ("study/degradation.py", "evaluation/examine.py") in edges
    assert ("evaluation/engines.py", "models/chat.py") in edges and (
        "evaluation/examine.py",
        "evaluation/judges/__init__.py",
    ) in edges


def test_statistics_and_figures_need_no_model_library():
    for folder, path in modules():
        if folder in ("core", "analysis", "plots"):
            assert not MODEL_LIBRARIES & {name.split(".")[0] for name in imports(path)}, path


def test_no_code_asks_a_scale_for_its_name_or_trusts_remote_code():
    for folder, path in modules():
        text = path.read_text(encoding="utf-8")
        assert "trust_remote_code" not in text, path
        if folder not in ("core", "cli", "plots"):
            assert not re.search(r"scale(\.name)? *(==|!=|in) *[\"'(\[]", text), path


def test_files_are_short_and_the_package_is_as_large_as_it_was_agreed():
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for _, path in modules()}
    assert not {path.name: n for path, n in lines.items() if n > 400}
    assert sum(lines.values()) <= 26_192  # LOG.md, 2026-11-30, says what came in; redesigns make it fewer


def test_the_lock_is_exact_and_the_conda_file_equals_it():
    lock = [line for line in (ROOT / "env/requirements.lock").read_text().splitlines() if line and not line.startswith("#")]
    for line in lock:
        assert re.fullmatch(r"[A-Za-z0-9_.-]+==[^+/@ ]+", line), line
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())
    pinned = next(entry["pip"] for entry in conda["dependencies"] if isinstance(entry, dict))
    assert pinned == ["-r env/requirements.lock", "-e ."]


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


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_imports_from_vlsafe_and_at_most_one_more_module(name):
    cells = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4).cells
    tree = ast.parse("\n".join(cell.source for cell in cells if cell.cell_type == "code"))
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert "vlsafe" in modules and len(modules) <= 2, modules


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
