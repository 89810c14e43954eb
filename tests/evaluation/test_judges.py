import json
from pathlib import Path

import pytest

from vlsafe.core.schema import Example, Item, Response, Turn
from vlsafe.data import llama_guard
from vlsafe.data.guards import Assessment
from vlsafe.data.intake import audit, passing
from vlsafe.evaluation.benchmarks import official
from vlsafe.evaluation.judges import JUDGES, judge
from vlsafe.evaluation.judges.llm import LLM_JUDGES

ANSWERS = json.loads((Path(__file__).parents[1] / "judge_prompts_cases.json").read_text(encoding="utf-8"))
CASES = json.loads((Path(__file__).parents[1] / "judge_cases.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['judge']}:{c['response'][:24]!r}")
def test_cases(case):
    known = dict(reference=case.get("reference"), options=tuple(case.get("options", ())), question=case.get("question"))
    item = Item("i", "b", (), **known)
    assert JUDGES[case["judge"]](item, case["response"]).label == case["label"]


@pytest.mark.parametrize("case", ANSWERS, ids=lambda c: f"{c['judge']}:{c['answer'][:24]!r}")
def test_answers_of_judges_that_ask(case):
    assert LLM_JUDGES[case["judge"]].parse(case["answer"]).label == case["label"]


def test_every_judge_has_cases_and_every_label_a_meaning():
    assert {case["judge"].removesuffix("-literal") for case in CASES} == {name.removesuffix("-literal") for name in JUDGES}
    assert {case["judge"] for case in ANSWERS} >= set(LLM_JUDGES) - {f"{name}-criteria" for name in LLM_JUDGES}
    for case in [*CASES, *ANSWERS]:
        if case["label"] != "unjudged" and case["judge"] in official.MEANINGS:
            assert case["label"] in official.MEANINGS[case["judge"]], case


def test_strangers_are_refused():
    item = Item("i", "b", (), reference="yes")
    with pytest.raises(ValueError, match="unknown judge 'word'; did you mean 'world'"):
        judge("word", [item], [])
    with pytest.raises(ValueError, match="no item of this examination"):
        judge("exact", [item], [Response("j", "b", "m", "yes")])
    with pytest.raises(ValueError, match="has no reference"):
        judge("world", [Item("i", "b", ())], [Response("i", "b", "m", "yes")])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("safe", (False, ())),
        ("\n\nunsafe\nS1,S9", (True, ("S1", "S9"))),
        ("unsafe", (True, ())),
        ("unsafe S1", (None, ())),
        ("unsafe\nS1,", (None, ())),
        ("unsafe\nS1\nS2", (None, ())),
        ("safe S1", (None, ())),
        ("unsafe because", (None, ())),
        ("", (None, ())),
    ],
)
def test_guard_answers(text, expected):
    assert llama_guard.parse(text) == expected
    label = {None: "unjudged", True: "unsafe", False: "safe"}[expected[0]]
    assert LLM_JUDGES["llama-guard-3"].parse(text).label == label, "what screens data and what judges responses read alike"


def test_what_a_guard_could_not_read_is_dropped_and_named():
    rows = [Example(name, "s", (Turn("user", "q"),)) for name in "abc"]
    assessments = [Assessment(False, (), 0.1), Assessment(True, ("S1",), 0.9), Assessment(None, (), 0.5)]
    lines = audit(rows, assessments, [None] * 3)
    assert [(line["kept"], line["reasons"]) for line in lines] == [(True, ""), (False, "text"), (False, "text unread")]
    assert [row.id for row in passing(rows, lines)] == ["a"]
    with pytest.raises(ValueError, match="the audit has 'a' where the corpus has 'c'"):
        list(passing(rows[::-1], lines))
