"""Minutes long: what a reader does who opens the notebooks one after another on an empty disk."""

import nbformat
import pytest
import yaml
from conftest import NANO

from vlsafe import notebooks, store
from vlsafe.scales import as_plain, load_scale
from vlsafe.stages import Study, planned


@pytest.fixture
def nano_file(tmp_path):
    """NANO as a researcher would bring a scale of their own: a file that extends a preset."""
    path = tmp_path / "nano.yaml"
    path.write_text(yaml.safe_dump({"extends": "mini", **as_plain(NANO)}), encoding="utf-8")
    return path


def test_a_scale_can_be_written_down_and_read_back(nano_file):
    assert load_scale(nano_file) == NANO


@pytest.mark.soak
def test_the_notebooks_run_one_after_another_from_an_empty_cellar(nano_file, tmp_path):
    """Each makes what it needs and reads; after the last one every stage that a notebook names is there and valid."""
    given = {"scale": str(nano_file), "backbone": "mini-chat", "seed": 0, "root": str(tmp_path / "runs")}
    for name in notebooks.NOTEBOOKS:
        done = tmp_path / f"{name}.ipynb"
        notebooks.execute(notebooks.FOLDER / f"{name}.ipynb", done, given)
        cells = [c for c in nbformat.read(done, as_version=4).cells if c.cell_type == "code"]
        assert not [out for c in cells for out in c.outputs if out.output_type == "error"]
        assert all(c.execution_count for c in cells), name
    study = Study.open(nano_file, "mini-chat", 0, tmp_path / "runs")
    assert {name: store.status(study.run(name), deep=True) for name in planned()} == dict.fromkeys(planned(), "valid")
