"""Results without weights: the same frames from an archive as from the runs, and nothing that may not be committed."""

import io
import json
import shutil
import tarfile

import pandas as pd
import pytest

from vlsafe.cli import main
from vlsafe.core import store
from vlsafe.publish import archive, results
from vlsafe.study.study import Study


@pytest.fixture(scope="module")
def packed(study, tmp_path_factory):
    file = tmp_path_factory.mktemp("archive") / "nano.tar.xz"
    archive.pack(study, file)
    return file


@pytest.fixture
def elsewhere(study, packed, tmp_path):
    archive.unpacked(packed, tmp_path / "runs")
    return Study.open("nano", "mini-chat", 0, tmp_path / "runs")


def test_all_frames_are_the_same(study, elsewhere):
    frames, again = results.results([study]), results.results([elsewhere])
    assert list(frames) == list(again) and "texts" in frames and "layers" in frames
    for name, frame in frames.items():
        pd.testing.assert_frame_equal(frame, again[name])
    assert results.missing([elsewhere]) == results.missing([study])
    names = ["parent/aligned", "screen/filtered", "safety/sl-full", "merge/sl-full"]
    assert results.made_by([elsewhere], names) == results.made_by([study], names)
    assert elsewhere.numbers("parent/aligned") == study.numbers("parent/aligned")
    assert elsewhere.losses("instruct/filtered-full").equals(study.losses("instruct/filtered-full"))


def test_weights_rows_and_pictures_stay_where_they_were_made(study, packed, elsewhere):
    files = [path.name for path in elsewhere.root.rglob("*") if path.is_file()]
    assert not [name for name in files if name.endswith("safetensors") or "token" in name] and "instructions.parquet" not in files
    assert packed.stat().st_size < sum(path.stat().st_size for path in study.root.rglob("*") if path.is_file()) / 10
    states = {name: store.status(elsewhere.run(name)) for name in ("parent/aligned", "world/corpora", "merge/sl-full")}
    assert states == {"parent/aligned": "without weights", "world/corpora": "without weights", "merge/sl-full": "valid"}
    path = elsewhere.run("merge/sl-full").folder / "panel.parquet"
    path.write_bytes(path.read_bytes()[:-1])
    assert store.status(elsewhere.run("merge/sl-full")) == "tampered"


def test_what_needs_weights_makes_the_run_again(study, elsewhere, capsys):
    weights = elsewhere.folder("base/llm") / "model.safetensors"
    assert weights.read_bytes() == (study.folder("base/llm") / "model.safetensors").read_bytes()
    assert store.status(elsewhere.run("base/llm")) == "valid" and "is without weights; making it again" in capsys.readouterr().err


def test_the_same_runs_give_the_same_bytes(study, packed, elsewhere, tmp_path):
    archive.pack(study, tmp_path / "again.tar.xz")
    assert (tmp_path / "again.tar.xz").read_bytes() == packed.read_bytes()
    archive.pack(elsewhere, tmp_path / "copied.tar.xz")  # of an archive's runs as well
    assert (tmp_path / "copied.tar.xz").read_bytes() == packed.read_bytes()


def test_finished_runs_are_not_replaced(study, packed):
    before = study.run("parent/aligned").folder.stat().st_mtime_ns
    put, kept = archive.unpacked(packed, study.root)
    assert put == [] and set(kept) == archive.held(packed)
    assert study.run("parent/aligned").folder.stat().st_mtime_ns == before


def test_damaged_runs_are_replaced_and_running_ones_are_not_touched(packed, elsewhere):
    folder = elsewhere.run("merge/sl-full").folder
    (folder / "panel.parquet").write_bytes(b"x")
    put, kept = archive.unpacked(packed, elsewhere.root)
    assert put == [str(folder.relative_to(elsewhere.root))] and len(kept) == len(archive.held(packed)) - 1
    assert store.status(elsewhere.run("merge/sl-full"), deep=True) == "valid"
    assert (folder.with_name("sl-full.damaged") / "panel.parquet").read_bytes() == b"x"  # nobody knows what else is in there
    (folder / "panel.parquet").write_bytes(b"x")
    with store.alone(folder), pytest.raises(ValueError, match="merge/sl-full is being made by another process"):
        archive.unpacked(packed, elsewhere.root)


def test_a_run_of_another_digest_stays_and_is_named(packed, elsewhere, capsys):
    path = elsewhere.run("merge/sl-full").folder / store.MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | {"digest": "0123456789abcdef"}))
    put, kept = archive.unpacked(packed, elsewhere.root)
    assert not put and len(kept) == len(archive.held(packed))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("merge/sl-full: another run is there and stays; `vlsafe fresh` removes it")


def test_an_archive_with_other_runs_is_not_overwritten(elsewhere, packed, tmp_path):
    file = tmp_path / "x.tar.xz"
    file.write_bytes(packed.read_bytes())
    shutil.rmtree(elsewhere.run("merge/sl-full").folder)
    with pytest.raises(ValueError, match=r"1 runs that are not here and would be lost .*merge/sl-full"):
        archive.pack(elsewhere, file)
    assert file.read_bytes() == packed.read_bytes()


@pytest.mark.parametrize("place", [".", "mini", "mini/mini-chat/seed0"])
def test_an_archive_cannot_take_the_place_of_what_is_no_run(elsewhere, tmp_path, place):
    file, before = tmp_path / "x.tar.xz", sorted(elsewhere.root.rglob("*"))
    with tarfile.open(file, "w:xz") as tar:
        entry = tarfile.TarInfo(f"{place}/manifest.json")
        entry.size = 25
        tar.addfile(entry, io.BytesIO(b'{"digest":"a","files":{}}'))
    with pytest.raises(ValueError, match="is no archive of results"):
        archive.unpacked(file, elsewhere.root)
    assert sorted(elsewhere.root.rglob("*")) == before


@pytest.mark.parametrize("damage", ["cut", "other", "outside", "empty", "forged"])
def test_what_is_no_archive_leaves_nothing(packed, tmp_path, capsys, damage):
    file, root = tmp_path / "x.tar.xz", tmp_path / "runs"
    if damage in ("outside", "empty", "forged"):
        names = {"outside": "../outside/manifest.json", "empty": "mini/notes.txt", "forged": "mini/x/seed0/merge/y/manifest.json"}
        with tarfile.open(file, "w:xz") as tar:
            entry = tarfile.TarInfo(names[damage])
            entry.size = 2
            tar.addfile(entry, io.BytesIO(b"[]"))
    else:
        file.write_bytes(packed.read_bytes()[:-1000] if damage == "cut" else b"no archive")
    assert main(["unpack", str(file), "--root", str(root)]) == 2
    assert "is no archive of results" in capsys.readouterr().err
    assert not list(root.glob("*")) and not (tmp_path / "outside").exists()


def test_answers_of_models_of_others_are_never_archived(tmp_path):
    study = Study.open("pocket", "pocket-chat", 0, tmp_path)
    run = study.run("examination/parent.aligned")

    def make(work):
        for name in ("raw.parquet", "responses.parquet"):
            pd.DataFrame({"text": ["an answer"]}).to_parquet(work / name)

    store.ensure(run, make, print)
    assert archive.pack(study, tmp_path / "pocket.tar.xz") == ["examination/parent.aligned"]
    archive.unpacked(tmp_path / "pocket.tar.xz", tmp_path / "again")
    assert not list((tmp_path / "again").rglob("responses.parquet")) and list((tmp_path / "again").rglob("raw.parquet"))


def test_a_study_without_runs_says_what_makes_them(tmp_path, capsys):
    call = ["archive", "--scale", "nano", "--root", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    assert main(call) == 2 and "`make reproduce` makes them" in capsys.readouterr().err
