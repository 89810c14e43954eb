"""`vlsafe download` and `vlsafe doctor` against a hub on loopback that breaks off, damages, gates and forgets."""

import dataclasses
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import official
import pytest
from hub import COMMIT, address, environment, filled, packed, served

from vlsafe import cli
from vlsafe.core import assets
from vlsafe.core.assets import Origin
from vlsafe.core.presets import PAPER, SCALES, load_scale
from vlsafe.planning import doctor, outside
from vlsafe.study.graph import planned
from vlsafe.study.study import Study

ROOT = Path(__file__).parents[2]


@pytest.fixture
def hub():
    with served() as server:
        yield server


@pytest.fixture
def wanted(hub, tmp_path):
    return filled(hub, tmp_path)


def vlsafe(hub, tmp_path, *arguments, first=""):
    program = f"{first}\nimport sys; from vlsafe.cli import main; sys.exit(main(sys.argv[1:]))"
    call = [sys.executable, "-c", program, *arguments]
    return subprocess.run(call, env=environment(hub, tmp_path), capture_output=True, text=True)


def test_download_then_doctor(hub, wanted, tmp_path):
    """One run over everything: gated things named, the others verified and pinned; then nothing is left to do."""
    hub.gated = {"ys-zong/VLGuard"}
    first = vlsafe(hub, tmp_path, "download", "--scale", str(wanted))
    assert first.returncode == 2, first.stderr
    assert "safety is gated: agree on its page to share your contact details" in first.stderr
    assert "parents.llama2-chat: " in first.stderr and "by hand: OCR-VQA's pictures" in first.stdout
    data = tmp_path / "data"
    assert (data / "LLaVA-Pretrain/images.zip").is_file() and not (data / "LLaVA-Pretrain/other.txt").exists()
    assert (data / "LLaVA-Instruct-150K/vg/images.zip").read_bytes() == hub.archives["vg.zip"]
    assert json.loads((data / assets.PINS).read_text())["liuhaotian/LLaVA-Pretrain"] == COMMIT
    sums = json.loads((data / outside.CHECKSUMS).read_text())
    assert sums["liuhaotian/LLaVA-Instruct-150K"]["vg/images.zip"] == hashlib.sha256(hub.archives["vg.zip"]).hexdigest()
    assert not any("pytorch_model.bin" in path for _, path, _, _ in hub.requests)  # safetensors are there

    assert "lacks by hand: OCR-VQA's" in vlsafe(hub, tmp_path, "doctor", "--scale", str(wanted)).stdout
    official.written(data / "LLaVA-Instruct-150K/ocr_vqa/images/1.jpg", official.picture())
    report = vlsafe(hub, tmp_path, "doctor", "--scale", str(wanted), "--deep")
    state = {name: next(line for line in report.stdout.splitlines() if f" {name} " in line).split("  ")[0] for name in (
        "captions", "instructions", "safety", "image_guard", "parents.llama2-chat", "disk")}  # fmt: skip
    assert state == {"captions": "present", "instructions": "present", "safety": "gated", "image_guard": "present",
                     "parents.llama2-chat": "gated", "disk": "present"}, report.stdout  # fmt: skip
    assert "yes        secret: the hub's token" in report.stdout and "no         secret: OPENAI_API_KEY" in report.stdout
    assert re.search(r"gated +safety .*without it \d+ of \d+ stages cannot run: world/corpora, safety/mtl-full", report.stdout)
    for run in (first, report):
        assert "secret-token" not in run.stdout + run.stderr
    assert any(authorised == "Bearer secret-token" for *_, authorised in hub.requests)

    (data / "LLaVA-Pretrain/images.zip").write_bytes(packed(["0/a.png", "0/b.png"]))
    changed = vlsafe(hub, tmp_path, "doctor", "--scale", str(wanted), "--deep")
    assert re.search(r"too small +captions +not as downloaded: images.zip", changed.stdout)

    hub.requests.clear()
    hub.gated = set()
    again = vlsafe(hub, tmp_path, "download", "--scale", str(wanted), "--only", "captions", "safety", "image_guard")
    assert again.returncode == 0, again.stderr
    assert {path.split("/resolve/")[0] for _, path, _, _ in hub.requests if "resolve" in path} == {"/datasets/ys-zong/VLGuard"}


def test_a_download_that_breaks_off_goes_on_and_a_damaged_one_is_removed(hub, wanted, tmp_path):
    hub.faults = ["damage"] * 2
    first = vlsafe(hub, tmp_path, "download", "--scale", str(wanted), "--only", "captions")
    assert first.returncode == 2 and "arrived damaged and was removed; run the command again" in first.stderr
    second = vlsafe(hub, tmp_path, "download", "--scale", str(wanted), "--only", "captions")
    assert second.returncode == 0, second.stderr
    hub.faults = ["break"] * 3  # whichever of the files it meets
    third = vlsafe(hub, tmp_path, "download", "--scale", str(wanted), "--only", "image_guard")
    assert third.returncode == 0, third.stderr
    assert hub.faults == []  # all were met; the hub's client tries again by itself


@pytest.mark.parametrize("moment", ["before the first checksum", "before the archive's"])
def test_a_download_that_is_killed_before_it_is_checked_is_not_taken_as_whole(hub, wanted, tmp_path, monkeypatch, moment):
    """Every file is there by then, so that nothing but the record can tell."""
    name, repo = (
        ("captions", "liuhaotian/LLaVA-Pretrain") if "first" in moment else ("instructions", "liuhaotian/LLaVA-Instruct-150K")
    )
    cut = "import vlsafe.core.store as s, os; s.file_digest = lambda path, of=s.file_digest: "
    cut += "os._exit(9)" if "first" in moment else "os._exit(9) if path.suffix == '.zip' else of(path)"
    killed = vlsafe(hub, tmp_path, "download", "--scale", str(wanted), "--only", name, first=cut)
    assert killed.returncode == 9, killed.stderr
    line = next(
        line for line in vlsafe(hub, tmp_path, "doctor", "--scale", str(wanted)).stdout.splitlines() if f" {name} " in line
    )
    assert "its download was cut off, and" in line and line.startswith("missing"), line
    assert vlsafe(hub, tmp_path, "download", "--scale", str(wanted), "--only", name).returncode == 0
    sums = json.loads((tmp_path / "data" / outside.CHECKSUMS).read_text())[repo]
    assert len(sums) == 2 and all(sums.values()), sums


def test_an_archive_that_somebody_has_put_there_stays_theirs(hub, wanted, tmp_path):
    content = packed(["VG_100K/mine.jpg"])
    mine = official.written(tmp_path / "data/LLaVA-Instruct-150K/vg/images.zip", content)
    done = vlsafe(hub, tmp_path, "download", "--scale", str(wanted), "--only", "instructions", "--unpack")
    assert done.returncode == 0 and mine.read_bytes() == content
    assert mine.with_name("VG_100K").joinpath("mine.jpg").exists()


def test_an_archive_is_gone_on_with_where_it_broke_off(hub, tmp_path):
    hub.archives["a.zip"], hub.faults = packed(["a/1.png"]), ["break"]
    target = tmp_path / "x" / "a.zip"
    with pytest.raises(OSError, match=r"a.zip broke off after [\d,]+ of [\d,]+ bytes; run the command again to go on"):
        outside.fetch(address(hub, "/archives/a.zip"), target)
    assert not target.exists()
    outside.fetch(address(hub, "/archives/a.zip"), target)
    assert target.read_bytes() == hub.archives["a.zip"]
    half = len(hub.archives["a.zip"]) // 2
    assert [wanted for _, _, wanted, _ in hub.requests] == [None, f"bytes={half}-"]
    outside.fetch(address(hub, "/archives/a.zip"), target)
    assert len(hub.requests) == 2
    with pytest.raises(OSError, match="answers 404"):
        outside.fetch(address(hub, "/elsewhere"), tmp_path / "y")


@pytest.mark.parametrize("member", ["../../evil.png", "/evil.png", "a/../../evil.png"])
def test_an_archive_that_leads_out_of_its_folder_is_refused_by_name(hub, tmp_path, member):
    hub.archives["a.zip"] = packed(["a/1.png", member])
    with pytest.raises(ValueError, match=r"a.zip.* has a member '.*evil.png' that leads out of it; it was removed"):
        outside.fetch(address(hub, "/archives/a.zip"), tmp_path / "a.zip")
    hub.archives["b.zip"] = b"<html>moved</html>"
    with pytest.raises(ValueError, match=r"b.zip.* is no zip file; it was removed"):
        outside.fetch(address(hub, "/archives/b.zip"), tmp_path / "b.zip")
    assert list(tmp_path.iterdir()) == []


def test_unpacking_gives_the_official_layout_and_the_same_rows(tmp_path, monkeypatch):
    from vlsafe.data import files as data_files
    from vlsafe.data import sources

    monkeypatch.setenv("VLSAFE_DATA", str(tmp_path))
    official.llava_pretrain(tmp_path)
    official.llava_instruct(tmp_path)
    assets._archive.cache_clear()
    seen = {name: [bytes(row.images[0]) for row in sources.stream(name, getattr(PAPER.loaded, name))
                   if not isinstance(row, data_files.Refused) and row.images and not data_files.missing(row.images[0])]
            for name in ("captions", "instructions")}  # fmt: skip
    for need in outside.needs(PAPER):
        root = tmp_path / str(need.folder)
        outside._record(outside.CHECKSUMS, need.origin.repo, {str(path.relative_to(root)): "" for path in root.rglob("*.zip")})
    by_hand = next(tmp_path.glob("LLaVA-Pretrain*")) / "mine.zip"
    by_hand.write_bytes(packed(["mine/a.png"]))
    for need in outside.needs(PAPER):
        outside._unpack(need, lambda text: None)
    assert list(tmp_path.rglob("*.zip")) == [by_hand], "what somebody put there stays"
    assert (tmp_path / "LLaVA-Pretrain/images/00000/000000000.jpg").is_file()
    for name, before in seen.items():
        rows = [row for row in sources.stream(name, getattr(PAPER.loaded, name)) if not isinstance(row, data_files.Refused)]
        assert [bytes(row.images[0]) for row in rows if row.images and not data_files.missing(row.images[0])] == before


def test_without_a_network_each_thing_is_named_in_one_line_and_nothing_is_half(hub, wanted, tmp_path):
    hub.shutdown()
    hub.server_close()
    done = vlsafe(hub, tmp_path, "download", "--scale", str(wanted))
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    at = lines.index("vlsafe: not everything could be downloaded")
    assert [line.split(":")[0].strip() for line in lines[at + 1 :]] == [need.name for need in outside.needs(load_scale(wanted))]
    assert all(len(line) > len(line.split(":")[0]) + 3 for line in lines[at + 1 :]), "each says why"


def test_a_download_does_not_begin_where_it_cannot_end(tmp_path, monkeypatch):
    monkeypatch.delenv("VLSAFE_DATA", raising=False)
    with pytest.raises(ValueError, match="set VLSAFE_DATA to the folder that captions, instructions"):
        outside.download(PAPER, print)
    monkeypatch.setenv("VLSAFE_DATA", str(tmp_path))
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set"):
        outside.download(PAPER, print)
    monkeypatch.setattr(outside.constants, "HF_HUB_OFFLINE", False)
    vast = dataclasses.replace(PAPER.loaded, captions=dataclasses.replace(PAPER.loaded.captions, gigabytes=1e9))
    with pytest.raises(ValueError, match=r"GB are free, .* GB are still to come; make room"):
        outside.download(dataclasses.replace(PAPER, loaded=vast), print)


def test_every_origin_of_a_scale_is_found_and_named(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("VLSAFE_DATA", str(tmp_path))
    names = [need.name for need in outside.needs(PAPER)]
    assert names == ["captions", "instructions", "safety", "safe_rlhf", "spa_vl", "text_guard", "image_guard", "tower",
                     "parents.llama2-chat", "parents.tulu2", "judges.sorry-bench", "judges.wildguard",
                     "judges.llama-guard-3"]  # fmt: skip
    assert outside.needs(SCALES["mini"]) == []
    assert cli.main(["download", "--only", "savety"]) == 2
    assert "unknown thing from outside 'savety'; did you mean 'safety'" in capsys.readouterr().err


def test_every_origin_has_its_line_in_the_list_of_licences():
    lines = (ROOT / "env" / "gated.md").read_text(encoding="utf-8").splitlines()
    for need in outside.needs(PAPER):
        line = next(line for line in lines if line.startswith(f"| `{need.name}` | {need.origin.repo} |"))
        assert line.split("|")[3].strip().startswith(("yes:", "perhaps:") if need.origin.terms else "no")


def test_what_cannot_be_made_without_a_thing_follows_the_graph():
    assert "parent/aligned" not in doctor.blocked(PAPER, "text_guard")
    assert "screen/filtered" in doctor.blocked(PAPER, "text_guard")
    names = planned(Study(PAPER, "tulu2", 0, Path()), "full")
    unread = {"tower/clip", "base/llm", "guard/text", "guard/image", "screen/filtered", "parent/aligned"}
    without_pairs = set(doctor.blocked(PAPER, "spa_vl"))  # a corpus that the scale wants stops the reading of all
    assert {"world/corpora", "safety/dpo-image-full", "safety/dpo-text-full", "examination/safety.sl-full"} <= without_pairs
    assert not without_pairs & unread and "examination/parent.aligned" not in without_pairs
    assert set(doctor.blocked(PAPER, "benchmarks.mme")) == set(names) - unread - {"world/corpora"}
    without_judges = set(doctor.blocked(PAPER, "judges.wildguard"))
    assert {"examination/parent.aligned", "merge/sl-full.full"} <= without_judges
    assert not {name for name in without_judges if name.startswith(("responses/", "safety/", "instruct/"))}


def test_weights_of_which_a_shard_is_missing_are_not_present(tmp_path):
    folder = tmp_path / "model"
    for name in ("config.json", "preprocessor_config.json"):
        official.written(folder / name, {})
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    official.written(folder / "model.safetensors.index.json", index)
    official.written(folder / "model-1.safetensors", b"x" * 100)
    need = outside.Need("tower", Origin(str(folder), kind="model"))
    assert outside.state(need) == outside.Line("tower", "missing", "lacks model-2.safetensors")
    official.written(folder / "model-2.safetensors", b"x" * 100)
    assert outside.state(need).state == "present"
    assert outside.state(outside.Need("tower", dataclasses.replace(need.origin, gigabytes=1.0))).state == "too small"


def test_the_index_of_pickled_weights_counts_only_where_there_are_no_others(tmp_path):
    folder = tmp_path / "model"
    for name in ("config.json", "preprocessor_config.json"):
        official.written(folder / name, {})
    need = outside.Need("tower", Origin(str(folder), kind="model"))
    assert outside.state(need) == outside.Line("tower", "missing", "lacks model.safetensors")
    official.written(folder / "pytorch_model.bin.index.json", {"weight_map": {"a": "pytorch_model-1.bin"}})
    need = outside.Need("tower", Origin(str(folder), kind="model"))
    assert outside.state(need) == outside.Line("tower", "missing", "lacks pytorch_model-1.bin")
    assert outside.state(need._replace(name="parents.x")).detail == "lacks tokenizer.[jm]*, pytorch_model-1.bin"
    official.written(folder / "model.safetensors.index.json", {"weight_map": {"a": "model-1.safetensors"}})
    assert outside.state(need) == outside.Line("tower", "missing", "lacks model-1.safetensors")
    official.written(folder / "model-1.safetensors", b"x" * 100)
    assert outside.state(need).state == "present"
    (folder / "model.safetensors.index.json").unlink()  # one file needs no index
    assert outside.state(need).state == "present"


def test_a_missing_parent_stops_the_stages_of_its_own_backbone(monkeypatch):
    opened = []
    monkeypatch.setattr(doctor, "Study", lambda *fields: opened.append(fields[1]) or Study(*fields))
    line = doctor._with_consequence(PAPER, outside.Line("parents.tulu2", "missing", "13 GB"))
    assert set(opened) == {"tulu2"} and "parent/aligned" in doctor.blocked(PAPER, "parents.tulu2")
    assert re.fullmatch(
        r"13 GB; without it \d+ of \d+ stages of tulu2 cannot run: screen/filtered, parent/aligned, .* …", line.detail
    )
    assert doctor._with_consequence(PAPER, outside.Line("tower", "missing")).detail.count(" of ") == 1
    assert opened[-1] == "llama2-chat"
