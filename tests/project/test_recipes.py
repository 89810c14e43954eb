"""CONTRIBUTING's recipes, executed: their files are written into a copy of the package and used there at NANO."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```\w+ (file|append)=(\S+)\n(.*?)^```$", re.S | re.M)
RECIPES = [(match[1], match[2], match[3]) for match in BLOCK.finditer((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))]
EXAMINED = """
import sys, conftest, pandas as pd
from vlsafe.analysis import measures
from vlsafe.study.study import Study
study = Study.open("nano", "mini-chat", 0, sys.argv[1])

items = study.rows("world/corpora", "items.parquet")
assert sum(item["benchmark"] == "colour_naming" for item in items) == study.scale.exam.full
from vlsafe.evaluation import engines, examine
from vlsafe.models import checkpoints
from vlsafe.core.schema import Item, from_row
asked = [from_row(Item, item) for item in items if item["benchmark"] == "colour_naming"]
folder = study.checkpoints("projector/filtered")[0]
given = engines.respond(checkpoints.load(folder), checkpoints.load_processor(folder), asked, "m", 8, 4)
facts = dict(scale="nano", backbone="mini-chat", seed=0, model="m", stage="projector", recipe="filtered", step=0, exam="full")
lines = measures.rates(pd.DataFrame(examine.raw_table(asked, given, facts)), ["colour_naming"])
assert lines["n"].tolist() == [len(asked)]
"""


def test_every_recipe_is_one_source_file_and_one_test():
    assert [path for _, path, _ in RECIPES] == [
        "vlsafe/evaluation/benchmarks/colour_naming.py",
        "tests/test_colour_naming.py",
        "vlsafe/models/merge/rules.py",
        "tests/test_larger.py",
        "my-backbone.yaml",
        "vlsafe/models/architectures.py",
        "tests/test_vipllava.py",
    ]


@pytest.fixture
def copy(tmp_path):
    """The package with the recipes of one subject in it, and a way to run Python there."""
    shutil.copytree(ROOT / "vlsafe", tmp_path / "vlsafe", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "tests").mkdir()
    shutil.copy(ROOT / "tests/conftest.py", tmp_path / "tests")

    def run(*paths, python=("-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider")):
        for how, path, text in RECIPES:
            if path in paths:
                with open(tmp_path / path, "a" if how == "append" else "x", encoding="utf-8") as file:
                    file.write(("\n\n" if how == "append" else "") + text)
        asked = [path for path in paths if path.startswith("tests/")] if "pytest" in python else []
        own = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{tmp_path / 'tests'}", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [sys.executable, *python, *asked], cwd=tmp_path, env=own, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    return run


def test_a_benchmark(copy, study, tmp_path):
    assert "1 passed" in copy("vlsafe/evaluation/benchmarks/colour_naming.py", "tests/test_colour_naming.py")
    copied = tmp_path / "store"
    shutil.copytree(study.root, copied)
    copy(python=("-c", EXAMINED, str(copied)))


def test_a_merge_rule(copy):
    assert "1 passed" in copy("vlsafe/models/merge/rules.py", "tests/test_larger.py")


def test_a_model_architecture(copy):
    assert "1 passed" in copy("vlsafe/models/architectures.py", "tests/test_vipllava.py")


def test_a_backbone(study, tmp_path):
    from vlsafe.core.presets import load_scale
    from vlsafe.models import architectures, checkpoints
    from vlsafe.study.study import Study

    told = yaml.safe_load(next(text for _, path, text in RECIPES if path == "my-backbone.yaml"))
    (tmp_path / "my-backbone.yaml").write_text(yaml.safe_dump(told))
    assert load_scale(tmp_path / "my-backbone.yaml").decoder("mini-small").layers == 2
    told |= {"extends": "nano", "name": "nano"}  # the same file over NANO, whose shared runs are there
    told["backbones"]["mini-small"]["language"]["layers"] = 1
    (tmp_path / "nano.yaml").write_text(yaml.safe_dump(told))
    copied = tmp_path / "store"
    shutil.copytree(study.root, copied)
    mine = Study.open(tmp_path / "nano.yaml", "mini-small", 0, copied)
    assert len(architectures.language_layers(checkpoints.load(mine.folder("parent/aligned")))) == 1
    assert mine.numbers("examination/parent.aligned")["models"] == 1
