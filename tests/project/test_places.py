"""Wherever the project lies and whoever runs it: spaces, umlauts and apostrophes in every path, LC_ALL=C, a HOME that nobody can
write to, a `python3` kernel of somebody else's."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml
from conftest import NANO

from vlsafe.core.scale import as_plain
from vlsafe.publish import notebooks

ROOT = Path(__file__).parents[2]


def foreign_kernel(folder):
    """A `python3` that dies at once, where JUPYTER_PATH finds it before any other."""
    spec = {"argv": ["false"], "display_name": "Python 3", "language": "python"}
    (folder / "kernels" / "python3").mkdir(parents=True)
    (folder / "kernels" / "python3" / "kernel.json").write_text(json.dumps(spec))
    return str(folder)


def unwritable(tmp_path):
    """A HOME in which not even root can make a folder."""
    if os.getuid() == 0:
        return "/sys"
    (tmp_path / "home").mkdir(mode=0o500)
    return str(tmp_path / "home")


def test_a_notebook_runs_in_this_interpreter_without_a_home(tmp_path, monkeypatch):
    monkeypatch.setenv("JUPYTER_PATH", foreign_kernel(tmp_path / "jupyter"))
    monkeypatch.setenv("HOME", unwritable(tmp_path))
    for name in ("JUPYTER_RUNTIME_DIR", "XDG_DATA_HOME", "IPYTHONDIR"):
        monkeypatch.delenv(name, raising=False)
    cells = [
        nbformat.v4.new_code_cell("a = 1", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell("import sys; sys.executable, a"),
    ]
    folder = tmp_path / "Anna's Häuser {1}"
    folder.mkdir()
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), folder / "n.ipynb")
    notebooks.execute(folder / "n.ipynb", folder / "out.ipynb", {"a": 2})
    done = nbformat.read(folder / "out.ipynb", as_version=4)
    assert done.cells[-1].outputs[0]["data"]["text/plain"] == f"({sys.executable!r}, 2)"
    assert "JUPYTER_RUNTIME_DIR" not in os.environ


@pytest.mark.parametrize("works", [True, False])
def test_an_environment_of_another_python_is_made_again(works, tmp_path):
    """What make would do, of a `.venv` that is complete by its own account."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("env/requirements.lock", "pyproject.toml", ".venv/bin/python", ".venv/.installed"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    script = f'#!/bin/sh\nexec {sys.executable} "$@"\n' if works else "#!/bin/sh\nexit 127\n"
    (tmp_path / ".venv/bin/python").write_text(script)
    (tmp_path / ".venv/bin/python").chmod(0o755)
    os.utime(tmp_path / ".venv/.installed")
    done = subprocess.run(["make", "-n", "setup"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert ("venv --clear" in done.stdout) == (not works), done.stdout


@pytest.mark.soak
def test_the_reproduction_runs_in_places_with_spaces_and_umlauts(tmp_path):
    """`make reproduce` at NANO: project, run store and scale file lie in such places; locale C; HOME cannot be written."""
    project = tmp_path / "Anna's Häuser" / "das Projekt"
    project.mkdir(parents=True)
    for name in ("Makefile", "Snakefile", "pyproject.toml", "README.md"):
        shutil.copy2(ROOT / name, project)
    for name in ("vlsafe", "notebooks", "env"):
        shutil.copytree(ROOT / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
    (project / ".venv").mkdir()
    (project / ".venv" / "bin").symlink_to(Path(sys.executable).parent)
    (project / ".venv" / ".installed").touch()
    scale, store = tmp_path / "mein Maß.yaml", tmp_path / "die Läufe"
    scale.write_text(yaml.safe_dump({"extends": "mini", **as_plain(NANO), "name": "mein Maß"}), encoding="utf-8")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "XDG_", "PYTHON", "VLSAFE"))}
    own = {
        "LC_ALL": "C",
        "HOME": unwritable(tmp_path),
        "PYTHONPATH": str(project),
        "JUPYTER_PATH": foreign_kernel(tmp_path / "j"),
    }
    call = ["make", "reproduce", f"SCALE={scale}", f"ROOT={store}", "CORES=2"]
    done = subprocess.run(call, cwd=project, env={**kept, **own}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (project / "figures" / "mein Maß-partial" / "report.html").exists()
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "home") == sorted(
        ["Anna's Häuser", "die Läufe", "j", "mein Maß.yaml"]
    ), "no stray file"
    assert {path.name for path in store.iterdir()} == {"mein Maß"}
