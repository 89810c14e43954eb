"""`vlsafe doctor` reads what is here as loaders do: nothing is missing where they accept it; one file that is gone is named."""

import dataclasses
import shutil
import zipfile
from pathlib import Path

import loaded
import pytest

from vlsafe import cli
from vlsafe.core import assets
from vlsafe.core.assets import Origin
from vlsafe.core.presets import load_scale
from vlsafe.planning import doctor, outside


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A tiny scale of which everything is here: its file, and the folder of its corpora and benchmarks."""
    path = loaded.written(tmp_path_factory.mktemp("whole"))
    yield path, path.parent / "data"
    assets._archive.cache_clear()


def examined(scale, capsys):
    """The exit status of `vlsafe doctor`, and its lines by what they are about."""
    assets._archive.cache_clear()
    status = cli.main(["doctor", "--scale", str(scale)])
    lines = {line[11:].split()[0]: line for line in capsys.readouterr().out.splitlines()}
    return status, lines


def test_where_the_loaders_accept_everything_the_doctor_finds_nothing_missing(whole, capsys, monkeypatch):
    path, data = whole
    monkeypatch.setenv("VLSAFE_DATA", str(data))
    monkeypatch.setenv("OPENAI_API_KEY", "a-key-of-nobody")
    status, lines = examined(path, capsys)
    assert not status and {line.split()[0] for line in lines.values()} <= {"present", "yes", "no"}, lines
    scale = load_scale(path)
    wanted = {need.name for need in outside.needs(scale)} | {f"benchmarks.{name}" for name in scale.exam.judges}
    assert wanted <= set(lines) and "judges.mm-safetybench-criteria" in lines
    assert "1 of 10 pictures are missing, first: LLaVA-Pretrain/images/00000/gone.jpg" in lines["captions"]
    served = lines["judges.mm-safetybench-criteria"]  # nothing listens there
    assert "at 127.0.0.1:9, which is not asked; its key OPENAI_API_KEY is set" in served
    assert "a-key-of-nobody" not in "".join(lines.values())


REMOVED = {  # a file: who misses it, and what is said, where that is not the file's name
    "LLaVA-Pretrain/blip_laion_cc_sbu_558k.json": "captions", "LLaVA-Pretrain/images.zip": "captions",
    "LLaVA-Instruct-150K/llava_v1_5_mix665k.json": "instructions", "LLaVA-Instruct-150K/gqa/images/1.jpg": "instructions",
    "LLaVA-Instruct-150K/coco/train2017/000000000009.jpg": "instructions", "LLaVA-Instruct-150K/vg/images2.zip": "instructions",
    "LLaVA-Instruct-150K/vg/VG_100K/2.jpg": ("instructions", "vg/images.zip"),
    "LLaVA-Instruct-150K/ocr_vqa/images/0002.jpg": ("instructions", "OCR-VQA"),
    "LLaVA-Instruct-150K/textvqa/train_images/jam.jpg": "instructions",
    "VLGuard/train.json": "safety", "VLGuard/train.zip": "safety", "VLGuard/test.json": "benchmarks.vlguard",
    "SPA-VL/data/train-00000-of-00001.parquet": ("spa_vl", "*.parquet"),
    "sorry-bench/question.jsonl": "benchmarks.sorry_bench", "wildjailbreak/eval/eval.tsv": "benchmarks.wildjailbreak",
    "MM-SafetyBench/data/processed_questions/03-Malware_Generation.json": "benchmarks.mm_safetybench",
    "MM-SafetyBench/data/imgs/02-HateSpeech/SD/0.jpg": ("benchmarks.mm_safetybench", "02-HateSpeech/SD/0"),
    "SIUO/data/siuo_gen.json": "benchmarks.siuo", "FigStep/data/question/safebench.csv": "benchmarks.figstep",
    "FigStep/data/images/SafeBench/query_ForbidQI_1_2_6.png": ("benchmarks.figstep", "1_2 (missing)"),
    "xstest/xstest_prompts.csv": "benchmarks.xstest", "MMBench/MMBench_DEV_EN.tsv": ("benchmarks.mmbench", "*.tsv"),
    "MME/artwork.txt": "benchmarks.mme", "MME/artwork/000000.jpg": "benchmarks.mme",
    "SEED-Bench/SEED-Bench.json": "benchmarks.seed_bench",
}  # fmt: skip


@pytest.mark.parametrize("file", REMOVED)
def test_one_file_that_is_gone_is_named(whole, capsys, monkeypatch, file):
    path, data = whole
    monkeypatch.setenv("VLSAFE_DATA", str(data))
    what, said = REMOVED[file] if isinstance(REMOVED[file], tuple) else (REMOVED[file], Path(file).name)
    hidden = path.parent / "hidden"
    (data / file).rename(hidden)
    try:
        status, lines = examined(path, capsys)
    finally:
        hidden.rename(data / file)
    assert said in lines[what], lines[what]
    assert lines[what].split()[0] == ("present" if file in FEW else "missing") and status == (0 if file in FEW else 2)


FEW = {  # a loader leaves out as few rows
    "LLaVA-Instruct-150K/textvqa/train_images/jam.jpg", "MM-SafetyBench/data/imgs/02-HateSpeech/SD/0.jpg",
    "MME/artwork/000000.jpg",
}  # fmt: skip


def test_pictures_may_be_unpacked_where_the_reader_looks_and_nowhere_else(whole, capsys, monkeypatch, tmp_path):
    path, data = whole
    monkeypatch.setenv("VLSAFE_DATA", str(shutil.copytree(data, tmp_path / "data")))
    data = tmp_path / "data"
    for archive, folder in (
        ("LLaVA-Pretrain/images.zip", "images"), ("VLGuard/train.zip", "."), ("VLGuard/test.zip", "."),
        ("LLaVA-Instruct-150K/vg/images2.zip", "."),
    ):  # fmt: skip
        with zipfile.ZipFile(data / archive) as opened:
            opened.extractall((data / archive).parent / folder)
        (data / archive).unlink()
    assert examined(path, capsys)[0] == 0
    (data / "LLaVA-Pretrain/images").rename(data / "LLaVA-Pretrain/pictures")
    (data / "LLaVA-Instruct-150K/vg/VG_100K_2").rename(data / "LLaVA-Instruct-150K/vg/VG_2")
    status, lines = examined(path, capsys)
    assert status == 2 and "lacks images.zip; 10 of 10 pictures are missing" in lines["captions"]
    assert "lacks vg/images2.zip" in lines["instructions"]


def test_what_was_downloaded_and_is_gone_is_named_unless_it_is_an_archive(whole, capsys, monkeypatch, tmp_path):
    path, data = whole
    sums = {"PKU-Alignment/PKU-SafeRLHF": {"data/Alpaca-7B/train.jsonl": "x", "data/Alpaca3-8B/train.jsonl": "x", "old.zip": "x"}}
    monkeypatch.setenv("VLSAFE_DATA", str(data))
    monkeypatch.setattr(outside, "recorded", lambda file: sums if file == outside.CHECKSUMS else {})
    assert examined(path, capsys)[1]["safe_rlhf"].split("lacks ")[1].startswith("data/Alpaca3-8B/train.jsonl;")


def test_a_judge_that_nobody_answers_and_a_wording_that_is_not_here_are_named(whole, monkeypatch, tmp_path):
    path, data = whole
    monkeypatch.setenv("VLSAFE_DATA", str(data))
    scale = load_scale(path)
    judges = {**scale.exam.judges, "mm_safetybench": ("mm-safetybench", "xstest-strings")}
    alone = dataclasses.replace(scale, exam=dataclasses.replace(scale.exam, judges=judges, endpoints={}))
    first, second = doctor.judges(alone)
    assert first.state == "missing" and "nobody answers the judge 'mm-safetybench' of mm_safetybench" in first.detail
    assert second == outside.Line("wording of mm-safetybench", "present")
    monkeypatch.setenv("VLSAFE_DATA", str(tmp_path))
    assert "put the repository's evaluation.py into" in doctor.judges(alone)[1].detail


def test_room_is_counted_per_file_system(monkeypatch, tmp_path):
    monkeypatch.setenv("VLSAFE_DATA", str(tmp_path))
    monkeypatch.setattr(outside.constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    needs = [
        outside.Need("captions", Origin("a", gigabytes=1e6)),
        outside.Need("tower", Origin("b", kind="model", gigabytes=1e-6)),
    ]
    (line,) = outside.disks(needs)
    assert (line.what, line.state) == ("disk", "too small") and "1000000 GB are still to come" in line.detail
    guard = outside.Need("text_guard", Origin("c", kind="model", gigabytes=1e6))
    assert outside.disks([guard, guard._replace(name="judges.guard")]) == [line], "guard and judge are one download"
    if not Path("/dev/shm").is_dir() or Path("/dev/shm").stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("this machine has one file system")
    monkeypatch.setattr(outside.constants, "HF_HUB_CACHE", "/dev/shm/nobody/hub")
    assert [(line.what, line.state) for line in outside.disks(needs)] == [
        ("disk of VLSAFE_DATA", "too small"), ("disk of HF_HOME", "present"),
    ]  # fmt: skip


def test_of_a_scale_of_packages_each_is_looked_for_and_what_installs_them_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("VLSAFE_POCKET", str(tmp_path))
    assert cli.main(["doctor", "--scale", "pocket"]) == 2
    output = capsys.readouterr().out
    for name in load_scale("pocket").loaded.packed.packages:
        (line,) = [line for line in output.splitlines() if f"package {name} " in line]
        assert line.startswith("missing") and "make parts" in line


@pytest.mark.parametrize(("able", "state"), [(True, "yes"), (False, "no")])
def test_a_machine_that_emulates_bfloat16_gets_another_scale_named(monkeypatch, able, state):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx512_bf16": able, "amx_bf16": False})
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    line = doctor._bfloat16(load_scale("env/scales/pocket-bfloat16.yaml"))
    assert line.state == state and ("such as pocket" in line.detail) is not able
    assert doctor._bfloat16(load_scale("pocket")).detail == "not wanted"
