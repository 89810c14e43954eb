import json
from pathlib import Path

import pytest

from vlsafe.guards import Assessment, parse_guard
from vlsafe.judges import JUDGES, judge
from vlsafe.mix import audit, screened
from vlsafe.schema import Example, Item, Response, Turn

CASES = json.loads((Path(__file__).parent / "judge_cases.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['judge']}:{c['response'][:24]!r}")
def test_cases(case):
    item = Item("i", "b", (), reference=case.get("reference"), options=tuple(case.get("options", ())))
    assert JUDGES[case["judge"]](item, case["response"]).label == case["label"]


def test_strangers_are_refused():
    item = Item("i", "b", (), reference="yes")
    with pytest.raises(ValueError, match="unknown judge 'word'; did you mean 'world'"):
        judge("word", [item], [])
    with pytest.raises(ValueError, match="no item of this examination"):
        judge("exact", [item], [Response("j", "b", "m", "yes")])
    with pytest.raises(ValueError, match="has no reference"):
        judge("world", [Item("i", "b", ())], [Response("i", "b", "m", "yes")])


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("safe", (False, ())),
        ("\n\nunsafe\nS1,S9", (True, ("S1", "S9"))),
        ("unsafe", (True, ())),
        ("safe S1", (None, ())),
        ("unsafe because", (None, ())),
        ("", (None, ())),
    ],
)
def test_guard_answers(text, found):
    assert parse_guard(text) == found


def test_what_a_guard_could_not_read_is_dropped_and_named():
    rows = [Example(name, "s", (Turn("user", "q"),)) for name in "abc"]
    said = [Assessment(False, (), 0.1), Assessment(True, ("S1",), 0.9), Assessment(None, (), 0.5)]
    lines = audit(rows, said, [None] * 3)
    assert [(line["kept"], line["reasons"]) for line in lines] == [(True, ""), (False, "text"), (False, "text unread")]
    assert [row.id for row in screened(rows, lines)] == ["a"]
    with pytest.raises(ValueError, match="speaks of 'a' where the corpus has 'c'"):
        screened(rows[::-1], lines)
