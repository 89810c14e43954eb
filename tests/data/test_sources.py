"""The paper's corpora from folders in the official layouts: every odd row ends as a row, or is named."""

import dataclasses
import json
import lzma
import zipfile

import official
import pytest

from vlsafe.core import assets
from vlsafe.core.presets import PAPER
from vlsafe.core.schema import Example, Pair, Stored, content_digest, from_row, to_row
from vlsafe.data import arms, files, intake, sources
from vlsafe.data.files import Refused

LOADED = PAPER.loaded


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setenv("VLSAFE_DATA", str(tmp_path))
    return tmp_path


def read(name):
    return list(sources.stream(name, getattr(LOADED, name)))


def refused(rows):
    return [row.reason for row in rows if isinstance(row, Refused)]


@pytest.mark.parametrize("packed", [True, False])
def test_llava_pretrain_is_read_from_its_archive_or_from_files(data, packed):
    official.llava_pretrain(data)
    if not packed:
        with zipfile.ZipFile(data / "LLaVA-Pretrain" / "images.zip") as archive:
            archive.extractall(data / "LLaVA-Pretrain" / "images")
        (data / "LLaVA-Pretrain" / "images.zip").unlink()
    rows = read("captions")
    assert len(rows) == 6 + len(official.DEFECTS) and not refused(rows)
    assert [turn.text for turn in rows[0].turns] == ["Write a terse caption.", "a red kettle on stove 0"]
    assert rows[1].turns[0].text == "Describe briefly."  # the placeholder may stand last
    assert all(intake._unsound_picture(row) is None for row in rows[:6])
    assert ("!" in rows[0].images[0].place) == packed


def test_every_odd_row_of_llava_instruct_has_its_fate(data):
    official.llava_instruct(data, plain=0)
    rows = read("instructions")
    assert len(rows) == len(official.ODD) + len(official.LOOKING) + 1 and len({row.id for row in rows}) == len(rows)
    for row, (raw, fate) in zip(rows, official.ODD, strict=False):
        assert row.id.split("#")[0] == str(raw.get("id", ""))
        if isinstance(row, Refused):
            assert row.reason == fate
        else:
            assert bool(row.images) == bool(raw.get("image"))
            found = intake._unsound_text(row, [_Reader()]) or intake._unsound_picture(row)
            assert found == (None if fate == "text" else fate), row.id
    first, again, vg, text = rows[:4]
    assert [turn.text for turn in first.turns] == ["What is on the tray?", "Broccoli.", "And beside it?", "Bread."]
    assert first.images == again.images and vg.images == (Stored("LLaVA-Instruct-150K/vg/images2.zip!VG_100K_2/1.jpg"),)
    assert (text.source, first.source) == ("instructions-text", "instructions")


class _Reader:
    class tokenizer:
        all_special_tokens = ("<image>", "</s>")


@pytest.mark.parametrize(("packed", "inner"), [(True, "train/"), (True, ""), (False, "")])
def test_vlguard_becomes_one_conversation_a_picture(data, packed, inner):
    official.vlguard(data, packed, inner)
    rows = read("safety")
    assert refused(rows) == ["not a VLGuard row (IndexError)"]
    safe, unsafe = rows[:2]
    assert sorted(turn.text for turn in safe.turns[::2]) == ["Say something rude about the mug.", "What colour is the mug?"]
    assert len(unsafe.turns) == 2 and unsafe.cluster == "risky behavior/political" and unsafe.category is None
    assert all(intake._unsound_picture(row) is None for row in rows[:2])
    assert rows[0] == read("safety")[0]  # its order of exchanges is drawn, and always the same


@pytest.mark.parametrize(("generation", "times", "harm"), [
    ("2023", 1, "unsafe"), ("mid-2024", 2, "unsafe"), ("current", 2, "Cybercrime, Privacy Violation"),
])  # fmt: skip
def test_all_generations_of_safe_rlhf(data, generation, times, harm):
    official.safe_rlhf(data, generation)
    rows = read("safe_rlhf")
    assert refused(rows) == [fate for _, fate in official.RLHF_ODD if fate] * times
    first, second = [row for row in rows if isinstance(row, Pair)][:2]
    assert (first.chosen, first.rejected, first.category) == ("In an airtight jar.", "No idea.", None)
    assert (second.chosen, second.rejected, second.category) == ("No idea.", "In an airtight jar.", harm)
    if generation == "2023":
        path = data / "PKU-SafeRLHF/round0/train.jsonl.xz"
        path.write_bytes(path.read_bytes()[:-40])
        with pytest.raises(ValueError, match=r"train.jsonl.xz breaks off or is damaged after line \d+; download it again"):
            read("safe_rlhf")
        path.write_bytes(lzma.compress(b'{"question": "x"}\n'))
        with pytest.raises(ValueError, match=r"train.jsonl.xz has no columns better_response_id, .* it is not PKU-SafeRLHF"):
            read("safe_rlhf")


@pytest.mark.parametrize("as_parquet", [True, False])
def test_spa_vl_in_both_layouts(data, as_parquet):
    official.spa_vl(data, as_parquet)
    rows = read("spa_vl")
    assert refused(rows) == [fate for _, fate in official.SPA if fate]
    assert (rows[0].chosen, rows[0].rejected) == ("It looks like autumn.", "Cannot say.")
    assert intake._unsound_picture(arms.answered(rows[0], rows[0].chosen)) is None
    if not as_parquet:
        path = data / "SPA-VL/train.json"
        path.write_text(json.dumps([row | {"image": 3} for row in json.loads(path.read_text())]))
        assert set(refused(read("spa_vl"))) == {"no picture"}
    else:
        path = next((data / "SPA-VL/data").glob("*"))
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(ValueError, match=r"train-00000-of-00001.parquet is not a whole Parquet file"):
            read("spa_vl")


def whole(row):
    """A row with its pictures in it; those of local files are places."""
    return row if isinstance(row, Refused) else dataclasses.replace(row, images=tuple(map(bytes, row.images)))


def test_pictures_in_parquet_stay_there_until_their_row_is_taken(data, tmp_path):
    """Rows of several files and row groups, one without a picture: each place gives its own row's picture."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (data / "SPA-VL/data").mkdir(parents=True)
    pictures = [f"picture {n}".encode() for n in range(7)]
    for part, rows in enumerate((range(4), range(4, 7))):
        table = [
            {"question": f"q{n}", "chosen": "a", "rejected": "b", "class1": None,
             "image": None if n == 2 else {"bytes": pictures[n], "path": None}} for n in rows
        ]  # fmt: skip
        pq.write_table(pa.Table.from_pylist(table), data / f"SPA-VL/data/train-{part}.parquet", row_group_size=2)
    rows = read("spa_vl")
    found = {row.turns[0].text: row.images[0] for row in rows if not isinstance(row, files.Refused)}
    assert {name: bytes(picture) for name, picture in found.items()} == {f"q{n}": pictures[n] for n in range(7) if n != 2}
    assert {picture.place for picture in found.values()} >= {"SPA-VL/data/train-0.parquet!3", "SPA-VL/data/train-1.parquet!0"}
    with pytest.raises(FileNotFoundError, match="4 rows and no row 4"):
        bytes(Stored("SPA-VL/data/train-0.parquet!4"))


def test_from_the_hub_through_datasets_the_rows_are_the_same(data, monkeypatch):
    """`load_dataset` is pointed at a local copy of the repository; everything else is the library's own streaming."""
    import datasets

    official.safe_rlhf(data)
    official.spa_vl(data)
    local = {name: read(name) for name in ("safe_rlhf", "spa_vl")}
    real, calls = datasets.load_dataset, []

    def at_home(repo, config=None, *, split, revision, streaming):
        calls.append((repo, config, split, revision, streaming))
        folder, builder = {"PKU": ("PKU-SafeRLHF/data/*/*.jsonl", "json"), "sqr": ("SPA-VL/data/*.parquet", "parquet")}[repo[:3]]
        return real(builder, data_files=str(data / folder), split=split, streaming=streaming)

    monkeypatch.setattr(datasets, "load_dataset", at_home)
    for name in ("safe_rlhf", "spa_vl"):
        origin = getattr(LOADED, name)
        assert list(map(whole, sources.CORPORA[name].rows(files.Place(origin)))) == list(map(whole, local[name]))
    assert calls == [
        ("PKU-Alignment/PKU-SafeRLHF", None, "train", LOADED.safe_rlhf.revision, True),
        ("sqrti/SPA-VL", "default", "train", "main", True),
    ]


def test_pictures_of_an_archive_elsewhere_are_read_in_pieces(data):
    """The reader of `hf://…/images.zip` is fsspec's; here it reads the same archive at another kind of address."""
    import fsspec

    official.llava_pretrain(data)
    fsspec.filesystem("memory").pipe("/images.zip", (data / "LLaVA-Pretrain/images.zip").read_bytes())
    far, near = Stored("memory://images.zip!00000/000000001.jpg"), Stored("LLaVA-Pretrain/images.zip!00000/000000001.jpg")
    assert bytes(far) == bytes(near) and not files.missing(far)
    assert files.missing(Stored("memory://images.zip!00000/none.jpg"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"id": "1"}, {"id": "2", "ima', r"mix665k.json is not a whole JSON list: it breaks off or is broken after row 1"),
        ('[{"id": "1"}, ' + "[" * 10**5, r"row 1 of .*mix665k.json holds lists in lists in lists, too deep to be read"),
        ('[{"id": ' + "9" * 5000 + "}]", r"mix665k.json is not a whole JSON list: .* broken after row 0 \(a number too long\)"),
        ('[{"id": "1"}, {"id" "2"}]', r"mix665k.json is not a whole JSON list: it breaks off or is broken after row 1"),
        ('{"id": "1"}', r"mix665k.json is no JSON list"),
        ("[1, 2]", r"row 0 of llava_v1_5_mix665k.json is no mapping but int"),
        ("", r"mix665k.json is no JSON list"),
        (b'[{"id": "\xff\xfe"}]', r"mix665k.json holds bytes that are no UTF-8"),
    ],
)
def test_a_broken_json_file_is_named_with_its_row(data, content, message):
    folder = data / "LLaVA-Instruct-150K"
    folder.mkdir()
    (folder / sources.INSTRUCTIONS).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        read("instructions")


def test_a_json_list_is_read_the_same_in_pieces_of_any_size(data, monkeypatch):
    rows = [{"id": i, "text": "x" * (i % 7) + '"],}{\\ \u00e9'} for i in range(300)]
    for indent in (None, 2):
        path = official.written(data / "list.json", b"\xef\xbb\xbf" + json.dumps(rows, indent=indent).encode())
        for piece in (1, 3, 64, 2**20):
            monkeypatch.setattr(files, "PIECE", piece)
            assert list(files.json_list(path)) == rows
    assert list(files.json_list(official.written(data / "empty.json", []))) == []


def test_a_wrong_or_missing_folder_says_what_to_do(data, monkeypatch):
    (data / "LLaVA-Pretrain").mkdir()
    with pytest.raises(FileNotFoundError, match=r"LLaVA-Pretrain below VLSAFE_DATA has no blip.*official layout.*vlsafe down"):
        read("captions")
    (data / "PKU-SafeRLHF").mkdir()
    with pytest.raises(FileNotFoundError, match=r"PKU-SafeRLHF below VLSAFE_DATA has none of data/\*/train.jsonl"):
        read("safe_rlhf")
    with pytest.raises(FileNotFoundError, match=r"train.json of ys-zong/VLGuard is neither here nor on the hub.*vlsafe download"):
        read("safety")


@pytest.mark.parametrize("name", ["../secret.png", "/etc/secret.png", "a/../../secret.png", "..\\secret.png", "C:/x.png"])
def test_a_picture_outside_the_folder_is_refused_by_name(data, name):
    row = {"id": "1", "image": name, "conversations": official.talk("<image>", "A mug.")}
    official.written(data / "LLaVA-Instruct-150K" / sources.INSTRUCTIONS, [row])
    with pytest.raises(ValueError, match="leads out of the folder of liuhaotian/LLaVA-Instruct-150K"):
        read("instructions")
    with pytest.raises(ValueError, match="leads out of its folder"):
        bytes(Stored(name))


def test_archives_that_are_no_archives_or_hold_a_bomb(data, monkeypatch):
    official.llava_pretrain(data)
    monkeypatch.setattr(assets, "LARGEST", 100)
    rows = read("captions")
    assert intake._unsound_picture(rows[0]) == "picture too large"
    with pytest.raises(assets.TooLarge, match=r"00000/000000000.jpg of LLaVA-Pretrain/images.zip unpacks to \d+ bytes"):
        bytes(rows[0].images[0])
    (data / "LLaVA-Pretrain/images.zip").write_bytes(b"PK\x03\x04 half an archive")
    assets._archive.cache_clear()
    with pytest.raises(ValueError, match=r"images.zip is not a whole zip file .*; download it again"):
        read("captions")


def test_a_stored_picture_is_the_picture(data):
    official.written(data / "a/b.png", official.picture())
    far = Example("1", "s", (), (Stored("a/b.png"),))
    near = Example("1", "s", (), (official.picture(),))
    assert content_digest(far) == content_digest(near)
    assert from_row(Example, to_row(far)) == far and to_row(far)["images"] == [{"bytes": None, "path": "a/b.png"}]


def test_a_limit_takes_a_fixed_subset_of_the_rows(data):
    official.llava_pretrain(data, 30)
    origin = dataclasses.replace(LOADED.captions, rows=30, limit=10)
    rows = list(sources.stream("captions", origin))
    assert len(rows) == 10 and rows == list(sources.stream("captions", origin))
    assert [row.id for row in rows] != [row.id for row in read("captions")[:10]]


def test_regions_captions_and_short_answers_are_looking_and_nothing_else_is(data):
    official.llava_instruct(data)
    tasks = {row.id.split("#")[0]: row.task for row in read("instructions") if isinstance(row, Example)}
    looking = {name for name, task in tasks.items() if task == "look"}
    assert looking == {f"look{i}" for i in range(len(official.LOOKING))} and set(tasks.values()) == {"look", None}


@pytest.mark.parametrize(
    ("texts", "looking"),
    [
        ((f"How many cups?\n{official.SHORT}", "Two", "How do I wash them?", "One by one. " * 10), False),
        ((f"How many cups?\n{official.SHORT}", "Two", "And now?", "Two"), True),
        (("How many cups are there, and why?", "Two.", f"And now?\n{official.SHORT}", "Two"), False),
        (("Describe the cups.", "Two cups."), False),
        (("Please provide a short description for this region.", "A cup."), False),  # which region?
        (
            (f"How many cups?\n{official.SHORT}", "Two", "Provide a one-sentence caption for the provided image.", "Cups, " * 21),
            True,
        ),
        ((), False),
    ],
)
def test_a_row_is_looking_where_all_its_requests_are(data, texts, looking):
    official.written(data / "LLaVA-Instruct-150K/gqa/images/1.jpg", official.picture())
    row = {"id": "1", "image": "gqa/images/1.jpg", "conversations": official.talk(*texts)}
    text_only = {"id": "2", "conversations": official.talk(*texts)}
    official.written(data / "LLaVA-Instruct-150K" / sources.INSTRUCTIONS, [row, text_only])
    assert [each.task for each in read("instructions")] == ["look" if looking else None, None]
