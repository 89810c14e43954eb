"""What the real files must be, asserted wherever they are below VLSAFE_DATA, and skipped by name where they are not.

Each check says what does not hold, so that the same checks can be tried on fixtures, of which they must say that they are not
the real files.
"""

from collections import Counter

import official
import pytest

from vlsafe.core import assets
from vlsafe.core.presets import PAPER
from vlsafe.data import sources
from vlsafe.data.files import Refused, json_list, path_of

FOLDERS = ("coco/train2017/", "gqa/images/", "ocr_vqa/images/", "textvqa/train_images/", "vg/VG_100K")


def differing(found, expected):
    return [f"{name}: {found[name]} where {value} is published" for name, value in expected.items() if found[name] != value]


def place(name):
    return sources.place_of(name, getattr(PAPER.loaded, name))


def check_captions():
    found = Counter(rows=0)
    for row in json_list(path_of(place("captions"), sources.CAPTIONS)):
        two = [turn["from"] for turn in row["conversations"]] == ["human", "gpt"]
        found.update(rows=1, two_turns=two, pictures="image" in row)
    return differing(found, dict.fromkeys(("rows", "two_turns", "pictures"), 558_128))


def check_instructions():
    found, folders = Counter(rows=0), Counter()
    for row in json_list(path_of(place("instructions"), sources.INSTRUCTIONS)):
        speakers = [turn["from"] for turn in row["conversations"]]
        found.update(rows=1, text_only="image" not in row, alternate=speakers == ["human", "gpt"] * (len(speakers) // 2))
        if "image" in row:
            folders[next((folder for folder in FOLDERS if str(row["image"]).startswith(folder)), "elsewhere")] += 1
    per_folder = dict(zip(FOLDERS, (364_100, 72_140, 80_000, 21_953, 86_417), strict=True))
    published = {"rows": 665_298, "text_only": 40_688, "alternate": 665_298}
    return differing(found, published) + differing(folders, {**per_folder, "elsewhere": 0})


def check_safety():
    found = Counter(rows=0)
    for split, counts in (("train", (2000, 977, 2977)), ("test", (1000, 558, 1558))):
        rows = list(sources.vlguard(place("safety"), split))
        whole = [row for row in rows if not isinstance(row, Refused)]
        found.update({f"{split} pictures": len(whole), f"{split} safe": sum(row.cluster is None for row in whole)})
        found.update({f"{split} pairs": sum(len(row.turns) // 2 for row in whole), "refused": len(rows) - len(whole)})
        yield from differing(found, dict(zip((f"{split} pictures", f"{split} safe", f"{split} pairs"), counts, strict=True)))
    yield from differing(found, {"refused": 0})
    yield from differing({"rows": sum(not isinstance(row, Refused) for row in sources.vlguard(place("safety")))}, {"rows": 2000})


def check_safe_rlhf():
    found = Counter(rows=0)
    for row in sources.safe_rlhf_published(place("safe_rlhf")):
        found.update(rows=1, lacking=bool(sources.SAFE_RLHF_COLUMNS - set(row)))
        found.update(numbers=not {row.get("better_response_id"), row.get("safer_response_id")} <= {0, 1})
    return differing(found, {"rows": 73_907, "lacking": 0, "numbers": 0})


def check_spa_vl():
    """The splits that were downloaded, the training one at least; the test has no answers."""
    published = {"train": 93_258, "validation": 7_000, "harm": 265, "help": 265}
    found = Counter()
    for split in published:
        try:
            for row, _ in sources.spa_vl_published(place("spa_vl"), split):
                found.update({split: 1, "answered": split in ("harm", "help") and bool(row.get("chosen"))})
        except FileNotFoundError:
            if split == "train":
                raise
    return differing(found, {split: n for split, n in published.items() if split in found or split == "train"} | {"answered": 0})


CHECKS = {"captions": check_captions, "instructions": check_instructions, "safety": check_safety, "safe_rlhf": check_safe_rlhf,
          "spa_vl": check_spa_vl}  # fmt: skip


@pytest.mark.parametrize("name", CHECKS)
def test_the_real_files_are_as_published(name):
    root, folder = assets.outside(), sources.CORPORA[name].folder
    if root is None or not (root / folder).is_dir():
        pytest.skip(f"{name}: {getattr(PAPER.loaded, name).repo} is not below VLSAFE_DATA")
    assert list(CHECKS[name]()) == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("captions", ["rows: 10 where 558128 is published", "two_turns: 10", "pictures: 10"]),
        ("instructions", ["rows: 24", "text_only: 7", "alternate: 21", "coco/train2017/: 6", "elsewhere: 3"]),
        ("safety", ["train pictures: 6", "test safe: 1", "refused: 2 where 0", "rows: 6"]),
        ("safe_rlhf", ["rows: 14", "numbers: 2 where 0"]),
        ("spa_vl", ["train: 6"]),
    ],
)
def test_the_checks_tell_fixtures_from_the_real_files(tmp_path, monkeypatch, name, expected):
    monkeypatch.setenv("VLSAFE_DATA", str(tmp_path))
    official.corpora(tmp_path)
    rows = [row for row, _ in official.ODD if isinstance(row.get("conversations"), list)]
    official.written(tmp_path / "LLaVA-Instruct-150K" / sources.INSTRUCTIONS, [*rows, *rows[:9]])
    assets._archive.cache_clear()
    lines = list(CHECKS[name]())
    for part in expected:
        assert any(line.startswith(part) for line in lines), (part, lines)
