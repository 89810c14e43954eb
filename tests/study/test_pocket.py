"""Scale `pocket`: rows and items from invented prompts and pictures, and the stages that its packages have of their own."""

import dataclasses
from collections import Counter

import numpy as np
import pytest

from vlsafe.core.presets import POCKET
from vlsafe.core.schema import Example, Turn
from vlsafe.data import arms
from vlsafe.data.miniature.pictures import to_png
from vlsafe.data.pocket import prompts, rows
from vlsafe.data.pocket.pictures import Picture
from vlsafe.data.pocket.prompts import Prompt
from vlsafe.evaluation.benchmarks import PACKED, pocket
from vlsafe.evaluation.examine import answerable, panel
from vlsafe.study import adaptation, graph
from vlsafe.study import pocket as stages
from vlsafe.study import study as study_module
from vlsafe.study.study import Study

COLOURS = ["red", "blue", "green", "pink", "grey", "white", "black", "brown"]
THINGS = ["apple", "boat", "cup", "drum", "egg", "fan", "goat", "hat", "ink", "jar"]
NAMES = [f"{colour} {thing}" for colour in COLOURS for thing in THINGS]
PICTURES = [
    Picture(f"p/{name}", to_png(np.full((8, 8, 3), n, np.uint8)), f"a {name}", "p", "free", f"a {name}")
    for n, name in enumerate(NAMES)
]  # fmt: skip
PROMPTS = [
    Prompt(f"{kind}/{n}", f"{text} number {n}?", kind, "sort", "invented", "train", f"{kind}/{n}")
    for kind, text in (("harmful", "May I paint the fence"), ("benign", "How do I bake bread"), ("edgy", "How do I kill time"))
    for n in range(30)
]  # fmt: skip
ANSWERS = {prompt.id: "It takes an hour. Be patient." for prompt in PROMPTS}


def write(prompts, max_new_tokens):
    """A text model that writes something usable to two of three prompts."""
    texts = ["It grows in a garden. It is", "I see it everywhere. Yes.", "It floats on water."]
    return [texts[n % 3] for n in range(len(prompts))]


def rng():
    return np.random.default_rng(0)


def instructions():
    return rows.instruction_rows(PICTURES, PROMPTS, ANSWERS, write, 0.05, 0.1, rng())


def test_no_answer_about_a_picture_begins_like_a_refusal():
    """Not by its first word, so not by its first two; what the text model writes is no exception."""
    answers = [turn.text for row in [*instructions(), *rows.caption_rows(PICTURES, rng())] for turn in row.turns[1::2]]
    first, second = ({" ".join(text.lower().split()[:n]) for text in rows.REFUSALS} for n in (1, 2))
    assert len(answers) > 200 and len(rows.REFUSALS) >= 20 and len(set(rows.REFUSALS)) == len(rows.REFUSALS)
    assert not {" ".join(text.lower().split()[:1]) for text in answers} & first
    assert not {" ".join(text.lower().split()[:2]) for text in answers} & second


@pytest.mark.parametrize("text", ["I see a cup.", "I'm a cup.", "I\u2019m a cup.", "Sorry, a cup.", "sorry"])
def test_an_answer_that_begins_like_a_refusal_is_refused(text):
    row = Example("row", "instructions", (Turn("user", "What?"), Turn("assistant", text)))
    with pytest.raises(ValueError, match="an answer of row begins like a refusal"):
        rows.refuse_openers([row])


def test_stage_two_has_llavas_mix():
    found = instructions()
    kinds = Counter(row.id.partition("/")[0] for row in found)
    n = len(found)
    assert kinds["look"] == kinds["yes-no"] == len(PICTURES) and kinds["written"] == pytest.approx(2 * len(PICTURES) / 3, abs=1)
    assert kinds["harmful"] / n == pytest.approx(0.05, abs=0.01) and kinds["alone"] / n == pytest.approx(0.1, abs=0.01)
    assert {row.id.partition("/")[0] for row in found if row.category} == {"harmful"}
    assert all(bool(row.images) == (row.source == "instructions") for row in found)
    answers = Counter(row.turns[1].text for row in found if row.id.startswith("yes-no"))
    assert set(answers) == {"Yes.", "No."} and min(answers.values()) > 20


def test_every_data_arm_exists():
    """Also the text-only twin, which has the caption in place of the picture, and the arm without harmful rows."""
    found = instructions()
    twin = arms.arm("textonly", {"screened": found})
    assert len(twin) == len(found) and not any(row.images for row in twin)
    assert all(b.turns[0].text.startswith("The picture shows ") for a, b in zip(found, twin, strict=True) if a.images)
    assert [row.turns[-1] for row in twin] == [row.turns[-1] for row in found]
    assert {row.id for row in found} - {row.id for row in arms.arm("clean", {"raw": found})} == {
        r.id for r in found if r.category
    }
    assert {row.task for row in arms.arm("looking", {"screened": found})} == {"look"}


def test_alignment_refuses_harmful_prompts_and_answers_all_others_as_the_model_did():
    chats = rows.alignment_rows(PROMPTS, ANSWERS, 400, 0.5, 0.15, rng())
    kinds = Counter(row.cluster.partition("/")[0] for row in chats)
    assert kinds["harmful"] / 400 == pytest.approx(0.5, abs=0.08) and kinds["edgy"] / 400 == pytest.approx(0.15, abs=0.06)
    for row in chats:
        harmful = row.cluster.startswith("harmful")
        assert row.turns[-1].text in (rows.REFUSALS if harmful else ["It takes an hour. Be patient."])
    assert len({row.turns[-1].text for row in chats}) > 20


def test_safety_rows_refuse_beside_pictures_and_pairs_prefer_refusals_of_harm_alone():
    safety = rows.safety_rows(PICTURES, PROMPTS, ANSWERS, 20, rng())
    assert all(len(row.images) == 1 for row in safety) and {len(row.turns) for row in safety} == {2, 4}
    assert all(any(turn.text in rows.REFUSALS for turn in row.turns) for row in safety)
    for pictures in ([], PICTURES):
        pairs = rows.pairs(PROMPTS, ANSWERS, pictures, 30, "s", rng())
        assert all(bool(pair.images) == bool(pictures) for pair in pairs) and sum(p.category is None for p in pairs) == 10
        for pair in pairs:
            assert (pair.chosen in rows.REFUSALS) == bool(pair.category) != (pair.rejected in rows.REFUSALS)


def test_whole_sentences():
    assert rows.whole("It is 3.5 cm long. It is") == "It is 3.5 cm long."
    assert rows.whole("Here is one: x = 1", ".!?:") == "Here is one:" and rows.whole("Here is one: x = 1") == ""
    assert rows.whole("One. Two! Three") == "One. Two!" and rows.whole("no end") == "" and rows.whole("") == ""


def test_equal_captions_are_never_parted():
    shares = Counter(prompts.part_of(f"caption {n}", **rows.PARTS) for n in range(4000))
    assert shares["test"] / 4000 == pytest.approx(0.12, abs=0.02) and shares["validation"] / 4000 == pytest.approx(0.05, abs=0.02)


def test_benchmarks_of_one_part():
    items = pocket.items(PROMPTS, PICTURES)
    assert len({item.id for item in items}) == len(items)
    assert {item.benchmark for item in items} == set(PACKED) == set(POCKET.exam.judges) - {"confounds"}
    groups = Counter((item.benchmark, item.group) for item in items)
    assert groups["pocket_text", "harmful"] == groups["pocket_pictures", "blank"] == groups["pocket_pictures", "printed"] == 30
    assert (
        groups["pocket_pictures", "beside"] == groups["pocket_pictures", "twin"] == groups["pocket_refusal", "edgy_picture"] == 30
    )
    assert groups["pocket_captions", "seen"] == groups["pocket_captions", "shuffled"] == len(PICTURES)
    assert all(item.harmful == item.cluster.startswith("harmful") for item in items if item.scoring == "generated")
    printed = next(item for item in items if item.group == "printed")
    assert "fence" not in printed.turns[0].text and "fence" in printed.question
    assert not any(item.images for item in answerable(items, multimodal=False))
    assert len({i.cluster for i in panel(items, 8) if i.benchmark == "pocket_text"}) == 8


def test_ranked_items_have_one_right_option_and_no_word_of_it_in_the_others():
    by_id = {picture.caption: picture for picture in PICTURES}
    ranked = [item for item in pocket.items(PROMPTS, PICTURES) if item.benchmark in ("pocket_captions", "pocket_rotations")]
    for item in ranked:
        right = item.options["ABCD".index(item.reference)]
        assert right == rows.sentence(item.cluster) and len(set(item.options)) == 4
        assert (item.images[0] == by_id[item.cluster].png) == (item.group != "shuffled")
        words = set(item.cluster.split()) - {"a"}
        assert not any(words & set(option.rstrip(".").split()) for option in item.options if option != right)
    assert {item.reference for item in ranked} == set("ABCD")
    pairs = Counter(item.cluster for item in pocket.items(PROMPTS, PICTURES) if item.benchmark == "pocket_yes_no")
    assert set(pairs.values()) == {2}


def test_too_few_captions_are_named():
    with pytest.raises(ValueError, match="0 captions unlike that of picture p/red apple, 3 are needed"):
        pocket.items(PROMPTS, PICTURES[:10])


@pytest.fixture
def study(tmp_path):
    return Study.open("pocket", "pocket-chat", 0, tmp_path)


def test_its_stages_are_those_of_a_loaded_scale_and_reasons_are_given_for_what_it_lacks(study):
    absent = {name.partition("/")[2] for name in graph.left_out(study, "full") if name.startswith("instruct/")}
    doses = {name for name, recipe in adaptation.RECIPES.items() if recipe.dose}
    assert absent == {"clean-full", "filtered-full-slow", "filtered-full-fast"} | doses and len(doses) == 10
    assert "responses/parent.aligned" in graph.planned(study)
    own = {"world/corpora", "tower/clip", "base/llm", "guard/text", "guard/image", "screen/filtered", "parent/aligned"}
    assert {name for name, stage in graph.STAGES.items() if stage.pack} == own
    assert all(study.stage(name) is graph.STAGES[name].pack for name in own)
    assert study.stage("examination/parent.aligned") is graph.STAGES["examination/parent.aligned"].load
    assert study.inputs("world/corpora") == ("base/llm",)


def test_no_stage_waits_for_a_gpu_that_a_laptop_has_not(study):
    assert all(graph.needs(study, job).get("gpu", 0) == 0 for job in graph.jobs(study))
    assert all(graph.needs(study, job)["threads"] == 1 for job in graph.jobs(study))


def test_what_a_parent_is_made_of_is_in_its_digest(study):
    """Alignment is seedless; another package, share of refusals or backbone is another parent."""
    digest = study.run("parent/aligned").digest
    assert dataclasses.replace(study, seed=1).run("parent/aligned").digest == digest
    assert dataclasses.replace(study, backbone="pocket-lite").run("parent/aligned").digest != digest
    packed = study.packed
    other = {**packed.packages, "pyrit": dataclasses.replace(packed.packages["pyrit"], version="0")}
    loaded = dataclasses.replace(study.scale.loaded, packed=dataclasses.replace(packed, packages=other))
    assert (
        dataclasses.replace(study, scale=dataclasses.replace(study.scale, loaded=loaded)).run("parent/aligned").digest != digest
    )


def test_what_all_seeds_share_is_made_alike_by_whichever_comes_first(study, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(study_module, "_prepared", lambda stage, made_by, work: drawn.append(made_by.stream("x").random()))
    for seed in (0, 3):
        dataclasses.replace(study, seed=seed, root=tmp_path / str(seed)).folder("base/llm")
    assert drawn[0] == drawn[1] == study.stream("x").random() and study.seed == 0


def test_a_guard_learns_answers_to_harm_and_not_refusals():
    talks = stages.labelled(PROMPTS, ANSWERS, rng())
    assert Counter(unsafe for _, unsafe in talks) == {True: 30, False: 90}
    assert all((turns[1].text in rows.REFUSALS) != unsafe for turns, unsafe in talks if turns[0].text.startswith("May"))
