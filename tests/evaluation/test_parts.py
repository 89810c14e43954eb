"""What is chosen by and what is reported: parts of official items, outcomes by rules, whose judge has the headline's say."""

import dataclasses

import pytest
from official_files import everything

from vlsafe.core.scale import Exam
from vlsafe.core.schema import Item, Response, Turn
from vlsafe.evaluation import examine, prompts, validation
from vlsafe.evaluation.benchmarks import REAL

JUDGES = {
    "wildjailbreak": ("wildguard", "wildguard-refusal", "xstest-strings"),
    "mmbench": ("letters",),
    "siuo": ("siuo-effective",),
}


def item(number, benchmark="wildjailbreak", harmful=True, cluster=None, **more):
    return Item(f"{benchmark}/{number}", benchmark, (Turn("user", "a"),), harmful=harmful, cluster=cluster or str(number), **more)


def items(n=40):
    return [item(i, "xstest", i % 2 == 0, f"c{i // 2 * 2 + i % 2}") for i in range(n)] + [
        item(i, "sorry_bench", True, f"q{i // 3}") for i in range(n)
    ]


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_the_parts_share_no_cluster_and_hold_everything(share):
    every = items()
    chosen, rest = examine.divided(every, share)
    assert {i.id for i in chosen} | {i.id for i in rest} == {i.id for i in every} and len(chosen) + len(rest) == len(every)
    clusters = [{(i.benchmark, i.cluster) for i in part} for part in (chosen, rest)]
    assert not clusters[0] & clusters[1]
    for benchmark, harmful in (("xstest", True), ("xstest", False), ("sorry_bench", True)):
        names = [{i.cluster for i in part if (i.benchmark, i.harmful) == (benchmark, harmful)} for part in (chosen, rest)]
        assert len(names[0]) == max(1, round(share * len(names[0] | names[1])))


def test_parts_do_not_depend_on_order_or_on_what_else_is_examined():
    every = items()
    chosen = {i.id for i in examine.divided(every, 0.2)[0]}
    assert {i.id for i in examine.divided(every[::-1], 0.2)[0]} == chosen
    assert {i.id for i in examine.divided([i for i in every if i.benchmark == "xstest"], 0.2)[0]} == {
        name for name in chosen if name.startswith("xstest")
    }


def test_without_a_validation_part_everything_is_reported_and_a_single_cluster_is_never_taken():
    every = items()
    assert examine.divided(every, 0.0) == ([], every)
    assert examine.divided([item(0)], 0.2) == ([], [item(0)])


def test_the_first_judge_that_can_tell_an_event_has_the_say():
    assert examine.headlines(JUDGES["wildjailbreak"]) == {
        "wildguard": "complied", "wildguard-refusal": "refused", "xstest-strings": ""
    }  # fmt: skip
    assert examine.headlines(("xstest-strings", "wildguard-refusal")) == {
        "xstest-strings": "complied refused", "wildguard-refusal": ""
    }  # fmt: skip
    assert examine.headlines(("letters",)) == {"letters": "right"}
    assert examine.headlines(("siuo-effective",)) == {"siuo-effective": "effective"}


def test_a_raw_table_of_a_loaded_scale_says_what_labels_mean_and_an_older_one_is_as_it_was():
    one, two = item(0), item(1, "mmbench", False, options=("red", "blue"), reference="A")
    answers = [Response(one.id, one.benchmark, "m", "I cannot say."), Response(two.id, two.benchmark, "m", "A")]
    rows = examine.raw_table([one, two], answers, {"model": "m"}, JUDGES)
    assert [(r["judge"], r["event"], r["outcome"], r["headline"]) for r in rows] == [
        ("xstest-strings", False, "refused", ""), ("letters", True, "right", "right")
    ]  # fmt: skip
    own = examine.raw_table([two], answers[1:], {"model": "m"})
    assert "outcome" not in own[0] and own[0]["event"] is True


def test_what_is_decided_on_the_way_is_by_the_first_rule_and_unjudged_stays_so():
    one, two = item(0), item(1, "mmbench", False, options=("red", "blue"), reference="A")
    texts = ["I cannot say.", "perhaps"]
    answers = [Response(i.id, i.benchmark, "m", text) for i, text in zip((one, two), texts, strict=True)]
    assert examine.outcomes([one, two], answers, JUDGES) == ["refused", "unjudged"]
    with pytest.raises(ValueError, match="names no rule for siuo"):
        examine.outcomes([item(2, "siuo")], answers[:1], JUDGES)


def test_an_examination_refuses_two_items_of_one_id(monkeypatch):
    same = [dataclasses.replace(item(0), id="1"), dataclasses.replace(item(0, "xstest"), id="1")]
    exam = Exam(serve="none")
    monkeypatch.setattr("vlsafe.evaluation.servers.serve_and_respond", lambda *_: [Response("1", "xstest", "m", "b")])
    with pytest.raises(ValueError, match="have one id"):
        examine.respond(None, same, "m", exam)


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    root = everything(tmp_path_factory.mktemp("data"))
    return [one for name in ("xstest", "wildjailbreak", "vlguard", "mm_safetybench") for one in REAL[name].load(root)[0]]


def test_probing_prompts_come_from_benchmarks_with_both_kinds(official):
    chosen = prompts.probing_prompts(None, "test", 6, official=official)
    assert {one.group for one in chosen} == {"text"}  # the fixture has too few pictures of VLGuard's
    assert {one.benchmark for one in chosen} <= {"xstest", "wildjailbreak"} and {one.harmful for one in chosen} == {True, False}
    for name in ("xstest", "wildjailbreak"):  # the source does not tell harm
        kinds = [one.harmful for one in chosen if one.benchmark == name]
        assert kinds.count(True) == kinds.count(False) > 0
    assert sum(one.harmful for one in chosen) == 6 and len(chosen) == 12
    with pytest.raises(ValueError, match="no modality has 5 harmful"):
        prompts.probing_prompts(None, "test", 6, official=official[:4])


@pytest.mark.parametrize("n, available, dealt", [(6, [9, 9], [3, 3]), (6, [1, 9], [1, 5]), (6, [2, 2], [2, 2]), (0, [3], [0])])
def test_prompts_are_dealt_out_evenly(n, available, dealt):
    assert prompts.shares(n, available) == dealt


def test_localisation_prompts_say_which_benchmark_is_missing(official):
    found = prompts.localisation_prompts(None, 3, official)
    assert {kind: {(one.benchmark, one.harmful) for one in of} for kind, of in found.items()} == {
        "normal": {("wildjailbreak", False)}, "harmful": {("wildjailbreak", True)}, "scary": {("xstest", False)}
    }  # fmt: skip
    alone = prompts.localisation_prompts(None, 3, [one for one in official if one.benchmark == "xstest"])
    assert {one.benchmark for of in alone.values() for one in of} == {"xstest"}
    with pytest.raises(ValueError, match=r"no scary prompt .* hold none of xstest"):
        prompts.localisation_prompts(None, 3, [one for one in official if one.benchmark == "wildjailbreak"])


def test_validation_requests_have_both_kinds_in_each_modality(official):
    chosen = validation.official_items(official, 2)
    assert {one.group for one in chosen} == {"text", "pictures"}
    for group in ("text", "pictures"):
        of = [one for one in chosen if one.group == group]
        assert {one.harmful for one in of} == {True, False} and len(of) <= 4
    assert {one.group for one in validation.official_items([one for one in official if not one.images], 2)} == {"text"}
    labels = ["refused" if one.harmful else "complied" for one in chosen]
    assert validation.behaviour(chosen, labels)["score"] == 1.0


def test_without_validation_items_a_merge_has_no_scores():
    assert set(validation.merge_scores([], {}, [], JUDGES).values()) == {None}
