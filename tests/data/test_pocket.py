"""The parts of scale `pocket`: files of installed packages, pictures with names, prompts. No text of theirs is in here."""

import dataclasses
import hashlib

import pytest

from vlsafe.core.assets import Package, Packed
from vlsafe.core.presets import FOLDER, load_scale
from vlsafe.data.pocket import packages

PACKED = load_scale(FOLDER / "pocket.yaml").loaded.packed


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A folder of packages with invented files, and the package that lists them."""
    for name, text in {"p/a.txt": "a", "p/deep/b.csv": "b", "p/deep/c.csv": "c"}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "p/deep/link.csv").symlink_to("b.csv")
    monkeypatch.setenv("VLSAFE_POCKET", str(tmp_path))
    digests = {text: hashlib.sha256(text.encode()).hexdigest() for text in "abc"}
    lines = f"{digests['b']}  p/deep/b.csv\n{digests['c']}  p/deep/c.csv\n"
    files = (("p/a.txt", digests["a"]), ("p/**/*.csv", hashlib.sha256(lines.encode()).hexdigest()))
    return tmp_path, Package("invented", "1.0", "MIT", files=files)


def test_files_are_found_by_name_and_by_pattern_without_links(shelf):
    folder, package = shelf
    assert packages.path(package, "p/a.txt") == folder / "p/a.txt"
    assert packages.path(package, "p/deep/c.csv") == folder / "p/deep/c.csv"
    assert packages.paths(package, "p/**/*.csv") == [folder / "p/deep/b.csv", folder / "p/deep/c.csv"]
    assert packages.record(Packed({"it": package}))["invented"]["sha256"] == dict(package.files)


@pytest.mark.parametrize("name", ["p/a.txt", "p/deep/b.csv"])
def test_a_changed_file_is_refused_and_a_missing_one_says_what_to_run(shelf, name):
    folder, package = shelf
    (folder / name).write_text("other")
    with pytest.raises(ValueError, match=r"not that of invented 1\.0"):
        packages.path(package, name)
    for file in (folder / "p").rglob("*.*"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match="make parts"):
        packages.path(dataclasses.replace(package, version="1.1"), name)


def test_a_file_that_the_scale_does_not_list_is_refused(shelf):
    folder, package = shelf
    (folder / "p/other.txt").write_text("other")
    with pytest.raises(KeyError, match="no file of invented"):
        packages.path(package, "p/other.txt")
    with pytest.raises(KeyError, match="no file of invented"):
        packages.path(package, "p/deep/link.csv")


def installed(*names):
    """The scale's packages where these are installed; else the test is skipped by name."""
    try:
        packages.record(PACKED, *names)
    except FileNotFoundError as error:
        pytest.skip(f"scale pocket's packages are not installed: {error}")
    return PACKED


def test_everything_that_the_scale_lists_is_the_listed_content():
    assert set(packages.record(installed())) == {package.name for package in PACKED.packages.values()}
