"""Official files and metrics: odd cases in their exact shapes, hand-worked scores, and the real files where they are."""

import json
import os
import shutil
import zipfile
from pathlib import Path

import pytest
from official_files import everything, lines, picture, write
from PIL import Image

from vlsafe.evaluation import judges, reading, score
from vlsafe.evaluation.benchmarks import REAL, mm_safetybench, mme, official, sorry_bench
from vlsafe.evaluation.judges.llm import LLM_JUDGES, wordings
from vlsafe.models.chat import open_picture

CASES = json.loads((Path(__file__).parents[1] / "score_cases.json").read_text(encoding="utf-8"))
SUBSETS = [(name, subset) for name, module in REAL.items() for subset in module.OFFICIAL]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return everything(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["what"][:48])
def test_scores_equal_those_worked_by_hand(case, root, tmp_path):
    module, subset = REAL[case["benchmark"]], case.get("subset")
    rows = case["responses"]
    if "rest" in case:
        items, _ = module.load(root, subset or next(iter(module.OFFICIAL)), pictures=False)
        answered = {reading.finder(module, items)(row, "") for row in rows}
        others = [i for i in items if i.id not in answered and case.get("rest_of") in (None, official.own(module, "part")(i))]
        rows = rows + [{"id": item.id, "response": case["rest"]} for item in others]
    responses = write(tmp_path / "responses.jsonl", lines(rows))
    judgements = write(tmp_path / "judgements.jsonl", lines(case["judgements"])) if "judgements" in case else None
    result = score.score(case["benchmark"], root, responses, tmp_path / "out.json", case["judges"], subset, judgements)
    scores = {(s["metric"], s["over"], s["judge"].split(" ")[0]): s for s in result["scores"]}
    assert len(scores) == len(result["scores"])
    for metric, over, value, high, n, unjudged, *judge in case["scores"]:
        row = scores[metric, over, judge[0] if judge else next(j for m, o, j in scores if (m, o) == (metric, over))]
        assert (row["value"] is None) == (n == unjudged), (metric, over)
        own = row["value"] or 0
        assert (own, row["value_high"]) == pytest.approx((value, high)), (metric, over)
        assert (row["n"], row["n_unjudged"]) == (n, unjudged), (metric, over)
        assert row["low"] - 1e-9 <= own <= row["value_high"] <= row["high"] + 1e-9
    assert result["parts_without_responses"] == case.get("left", [])
    assert json.loads((tmp_path / "out.json").read_text()) == score._plain(result)


@pytest.mark.parametrize(("name", "subset"), SUBSETS)
def test_items_are_found_by_every_name_and_look_alike_with_and_without_pictures(name, subset, root):
    module = REAL[name]
    items, _ = module.load(root, subset, pictures=False)
    find = reading.finder(module, items)
    assert len({item.id for item in items}) == len(items) > 1
    for item in items:
        keys = {key: str(value_of(item)) for key, value_of in official.own(module, "QUALIFIERS").items()}
        for known in official.own(module, "names")(item):
            assert find({"id": known, **keys}, "") == item.id
    shown = {item.id: item for item in module.load(root, subset, pictures=True)[0]}
    for item in items:
        if item.id in shown:
            assert shown[item.id].turns == item.turns
            assert all(open_picture(data).size for data in shown[item.id].images)
    for judge in module.OFFICIAL[subset]:
        assert judge in judges.JUDGES or judge in LLM_JUDGES


def test_odd_rows(root):
    items, notes = sorry_bench.load(root)
    assert "translate-fr/2 has no text and is left out" in notes
    by_id = {item.id: item for item in items}
    assert by_id["translate-fr/1"].question == by_id["base/1"].turns[0].text and by_id["base/3"].category == "3"
    texts = [item.turns[0].text for item in REAL["wildjailbreak"].load(root)[0]]
    assert texts[0].endswith('"gulls".') and texts[1] == "NA" and "\n" in texts[2] and texts[3] == "null"
    tiny, notes = mm_safetybench.load(root, "tiny")
    assert len(tiny) == 13 * 4 - 1 and any("01-Illegal_Activitiy/SD/7 (missing)" in note for note in notes)
    prompts = {item.group: item.turns[0].text for item in tiny if item.category == "02-HateSpeech"}
    assert prompts["SD"].startswith("The image shows a photo")
    assert prompts["SD_TYPO"] == prompts["TYPO"] != prompts["Text_only"]
    figs, notes = REAL["figstep"].load(root)
    assert any("2_6 (UnidentifiedImageError)" in note for note in notes) and figs[0].question == "How to fold a plane, neatly?"
    seed, notes = REAL["seed_bench"].load(root)
    assert "1 video questions have no frame and are left out" in notes and {item.scoring for item in seed} == {"likelihood"}
    rows = {item.id: item for item in REAL["mmbench"].load(root)[0]}
    assert rows["2000000"].images == rows["0"].images and rows["2000000"].options == ("green", "white", "red", "blue")
    assert rows["1000241"].options == ("no", "yes") and rows["241"].turns[0].text.startswith("What colour")
    llava = mme.load(root, "llava")[0][0].turns[0].text
    assert llava == "Is there a kettle, red here?\nAnswer the question using a single word or phrase."


def test_typo_pictures_are_drawn_as_the_original_does():
    one, three = (open_picture(mm_safetybench.typo(phrase)) for phrase in ("bread", "sourdough bread with a long name indeed"))
    assert one.size == (1024, 180) and three.size[0] == 1024 and three.size[1] > 180 and three.size[1] % 90 == 0
    assert one.getpixel((1020, 170)) == (255, 255, 255) and min(one.convert("L").getdata()) == 0


def test_official_wordings_are_read_and_never_run(root, tmp_path):
    places = (root, root / "MM-SafetyBench")
    found = wordings("mm-safetybench", places)
    assert set(found) == {"general", "lobbying", "legal", "financial", "health", "government"} and "money" in found["financial"]
    items = {item.category: item for item in mm_safetybench.load(root, pictures=False)[0]}
    prompt = LLM_JUDGES["mm-safetybench"].prompt(items["11-Financial_Advice"], "braces {prediction} {stay}", found)
    assert "money" in prompt and "braces {prediction} {stay}" in prompt
    assert "general" in LLM_JUDGES["mm-safetybench"].prompt(items["09-Privacy_Violence"], "x", found)
    item = REAL["siuo"].load(root, pictures=False)[0][0]
    prompt = LLM_JUDGES["siuo-safe"].prompt(item, "R", wordings("siuo-safe", (root, root / "SIUO")))
    assert prompt == "Q Suggest a caption. W The ledge is slippery. R Please stay away from the edge. A R judge"
    with pytest.raises(FileNotFoundError, match=r"not ours to pass on.*mm-safetybench-criteria"):
        wordings("mm-safetybench", (tmp_path,))
    write(tmp_path / "evaluation.py", "a = 'only {prediction} one'")
    with pytest.raises(ValueError, match="does not hold the official prompts; found in it: general"):
        wordings("mm-safetybench", (tmp_path,))


def test_wrong_folders_and_broken_files_are_named(root, tmp_path):
    for name, module in REAL.items():
        with pytest.raises(FileNotFoundError, match=f"holds no {module.FOLDER}: there is no "):
            module.load(tmp_path, next(iter(REAL[name].OFFICIAL)))
    whole = (root / "SIUO/data/siuo_gen.json").read_text()
    write(tmp_path / "data/siuo_gen.json", whole[:-40])
    with pytest.raises(ValueError, match=r"siuo_gen.json is no complete JSON \(line 1\); it may be cut short"):
        REAL["siuo"].load(tmp_path)
    write(tmp_path / "data/siuo_gen.json", json.dumps([{"question_id": 1}]))
    with pytest.raises(ValueError, match="has no image, question, category; are these the official files"):
        REAL["siuo"].load(tmp_path)
    write(tmp_path / "xstest_prompts.csv", "id,prompt,type,label,focus,note\n1,How, then?,homonyms,safe,kill,\n")
    with pytest.raises(ValueError, match=r"line 2 of .*xstest_prompts.csv has not as many fields as the header; is a separator"):
        REAL["xstest"].load(tmp_path)
    write(tmp_path / "xstest_prompts.csv", "id,prompt,kind,label\n")
    with pytest.raises(ValueError, match="has no column type; it has id, prompt, kind, label"):
        REAL["xstest"].load(tmp_path)
    write(tmp_path / "eval.tsv", "adversarial\tlabel\tdata_type\nx\t1\tvanilla\n")
    with pytest.raises(ValueError, match=r"row 0 of eval.tsv has the data_type 'vanilla'"):
        REAL["wildjailbreak"].load(tmp_path)
    write(tmp_path / "question.jsonl", '{"question_id": 1, "category": "1", "turns"')
    with pytest.raises(ValueError, match=r"line 1 of .*question.jsonl is no JSON object"):
        sorry_bench.load(tmp_path)
    write(tmp_path / "existence.txt", "a.jpg\tQ\tYes\na.jpg\tQ2\tYes\n")
    with pytest.raises(ValueError, match=r"1 pictures of existence, first a.jpg, do not have one yes and one no"):
        mme.load(tmp_path)
    head, row = "index\tquestion\tA\tB\tC\tD\tanswer\timage\n", "1\tQ\tone\t{}\tthree\t\tC\tx\n"
    for empty in ("", "nan"):
        write(tmp_path / "gap.tsv", head + row.format(empty))
        with pytest.raises(ValueError, match=r"question 1 of .* has the options A, C: one before the last is empty"):
            REAL["mmbench"].load(tmp_path / "gap.tsv", pictures=False)
    rows = (root / "MMBench/MMBench_DEV_EN.tsv").read_text().splitlines(keepends=True)
    write(tmp_path / "cut.tsv", "".join(rows[:-1]))
    fewer = "1 questions have fewer rotations than options, first question-241: those that are there count"
    assert REAL["mmbench"].load(tmp_path / "cut.tsv", pictures=False)[1][-1] == fewer
    write(tmp_path / "single.tsv", rows[0] + rows[1])
    assert "accuracy is not circular" in REAL["mmbench"].load(tmp_path / "single.tsv", pictures=False)[1][-1]


def test_broken_archives_and_ids_that_stand_twice_are_named(root, tmp_path):
    shutil.copytree(root / REAL["vlguard"].FOLDER, tmp_path / "v")
    (tmp_path / "v" / "test.zip").write_bytes(b"PK no archive")
    with pytest.raises(ValueError, match=r"an archive of vlguard in .* is not whole"):
        official.load(REAL["vlguard"], tmp_path / "v", "all")
    write(tmp_path / "xstest_prompts.csv", "id,prompt,type,label\n3,a,homonyms,safe\n3,b,homonyms,safe\n")
    with pytest.raises(ValueError, match=r"xstest in .* has '3' twice"):
        official.load(REAL["xstest"], tmp_path, "all")


def test_files_are_found_below_their_owners_names_and_in_archives(root, tmp_path):
    shutil.copytree(root / "sorry-bench", tmp_path / "sorry-bench" / "sorry-bench-202406")
    assert len(sorry_bench.load(tmp_path)[0]) == 8
    shutil.copytree(root / "sorry-bench", tmp_path / "sorry-bench" / "sorry-bench-202503")
    with pytest.raises(ValueError, match=r"holds sorry-bench more than once: name one of .*202406, .*202503"):
        sorry_bench.load(tmp_path)
    guard = tmp_path / "ys-zong" / "VLGuard"
    guard.mkdir(parents=True)
    shutil.copy(root / "VLGuard" / "test.json", guard)
    with zipfile.ZipFile(guard / "test.zip", "w") as archive:
        archive.write(root / "VLGuard" / "test" / "HOD" / "hod_3.png", "test/HOD/hod_3.png")
        archive.write(root / "VLGuard" / "test" / "HOD" / "hod_3.png", "../../escaped.png")
    items, notes = REAL["vlguard"].load(tmp_path)
    assert {item.cluster for item in items} == {"hod_3"} and any("Ads_2 (missing), Ads_1 (missing)" in note for note in notes)
    assert sorted(path.name for path in guard.iterdir()) == ["test.json", "test.zip"]


def test_a_picture_that_would_fill_the_memory_is_refused_before_it_is_decoded(monkeypatch):
    data = picture(size=(64, 64))
    assert official.damage(data) is None
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    assert official.damage(data) == "too many pixels"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert official.damage(data) == "DecompressionBombError"
    assert official.damage(data[:60]) is not None


def test_events_are_settled_as_soon_as_they_can_be():
    assert official.settled([True, None], all) is None and official.settled([False, None], all) is False
    assert official.settled([True, None], any) is True and official.settled([], all) is True
    majority = REAL["siuo"].majority
    assert [majority(e) for e in ([True, True, None], [True, None], [False, False, True], [True, False, None])] == [
        True, None, False, None,
    ]  # fmt: skip


def test_a_mean_of_strata_that_all_agree_still_has_an_interval():
    rows = {name: [(f"{name}{i}", 1.0, 1.0) for i in range(10)] for name in "abc"}
    found = official.weighted("m", "o", "j", rows, 1 / 3)
    assert found.value == pytest.approx(1) and 0.8 < found.low < 0.95 and found.high == pytest.approx(1)


@pytest.mark.skipif("VLSAFE_DATA" not in os.environ, reason="VLSAFE_DATA names no folder of official files")
@pytest.mark.parametrize(("name", "subset"), SUBSETS)
def test_the_real_files_are_complete(name, subset):
    module, root = REAL[name], Path(os.environ["VLSAFE_DATA"])
    if not (root / module.FOLDER).is_dir():
        pytest.skip(f"{module.FOLDER} is not there")
    items, notes = module.load(root, subset, pictures=False)
    assert items and not [note for note in notes if "the official files have" in note or "official ones" in note], notes
