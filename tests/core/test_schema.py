import pytest

from vlsafe.core.schema import Item, Turn, from_row, to_row


def test_rows_are_read_back_and_other_columns_are_refused():
    item = Item("i", "b", (Turn("user", "q"),), question="how?")
    row = to_row(item)
    assert from_row(Item, row) == item
    with pytest.raises(ValueError, match=r"wrong columns: \['asked'\]"):
        from_row(Item, {**row, "asked": "what?"})
