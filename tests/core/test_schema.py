import pytest

from vlsafe.core.schema import Item, Turn, from_row, to_row


def test_items_of_older_run_stores_are_read():
    item = Item("i", "b", (Turn("user", "q"),), question="how?")
    row = to_row(item)
    older = {"asked" if name == "question" else name: value for name, value in row.items()}
    assert from_row(Item, older) == from_row(Item, row) == item
    with pytest.raises(ValueError, match=r"wrong columns: \['asked'\]"):
        from_row(Item, {**row, "asked": "what?"})
