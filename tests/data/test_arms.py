"""What the data arms keep, on the corpora of a miniature world."""

import dataclasses

import pytest

from vlsafe.core.scale import Corpora
from vlsafe.core.schema import Example, Turn
from vlsafe.data import arms
from vlsafe.data.miniature import corpora
from vlsafe.data.miniature.language import World


@pytest.fixture(scope="module")
def pools():
    """Raw instruction rows with much harm in them, and a screen that drops every seventh row."""
    world = World(0)
    pool = corpora.paint(world, 200, 0.2, world.rng("pool"))
    raw = corpora.instruction_rows(world, pool, 200, Corpora(text_only_share=0.2, howtos=0.4), 0.2, world.rng("rows"))
    return {"raw": raw, "screened": [row for i, row in enumerate(raw) if i % 7]}


def test_filtered_is_what_the_screen_passed_and_unfiltered_is_raw(pools):
    assert arms.arm("filtered", pools) == pools["screened"]
    assert arms.arm("unfiltered", pools) == pools["raw"]


def test_clean_keeps_exactly_the_rows_without_harm(pools):
    rows = arms.arm("clean", pools)
    assert rows == [row for row in pools["raw"] if row.category is None] and 0 < len(rows) < len(pools["raw"])


def test_looking_keeps_no_how_to(pools):
    rows = arms.arm("looking", pools)
    assert {row.task for row in rows} == {"look"}
    assert not [turn for row in rows for turn in row.turns if turn.role == "assistant" and "use the" in turn.text]


def test_textonly_describes_the_picture_and_changes_nothing_else(pools):
    rows = arms.arm("textonly", pools)
    assert [row.id for row in rows] == [row.id for row in pools["screened"]] and not any(row.images for row in rows)
    described = 0
    for twin, row in zip(rows, pools["screened"], strict=True):
        answers = [[turn for turn in of.turns if turn.role == "assistant"] for of in (twin, row)]
        assert answers[0] == answers[1] and (twin.category, twin.cluster) == (row.category, row.cluster)
        if row.images:
            assert twin.turns[0].text == f"{row.description}\n{row.turns[0].text}" and twin.turns[1:] == row.turns[1:]
            described += 1
        else:
            assert twin == row
    assert 0 < described < len(rows)


def test_a_twin_of_an_unknown_picture_or_of_no_row_is_refused(pools):
    row = next(row for row in pools["raw"] if row.images)
    with pytest.raises(ValueError, match="no description"):
        arms.text_twin(dataclasses.replace(row, description=None))
    system = Example("i", "s", (Turn("system", "be brief."), Turn("user", "what?")), (b"png",), description="a red kite.")
    assert [turn.text for turn in arms.text_twin(system).turns] == ["be brief.", "a red kite.\nwhat?"]
    with pytest.raises(ValueError, match="keeps none of 0 rows"):
        arms.arm("clean", {"raw": [], "screened": []})
