"""What notebooks show where a scale does not have something: one sentence with the reason, and never an invented truth."""

import pandas as pd
import pytest
from conftest import NANO
from IPython.display import Markdown

from vlsafe.analysis import adaptation, filtering
from vlsafe.analysis.measures import Lacking
from vlsafe.plots import filtering as plots_filtering
from vlsafe.publish import notebooks, worlds
from vlsafe.study.study import Study


def test_a_sentence_stands_for_what_a_scale_lacks():
    assert notebooks.shown(lambda: 3) == 3

    def lacking():
        raise Lacking("nobody measured it")

    found = notebooks.shown(lacking)
    assert isinstance(found, Markdown) and found.data == "*Not shown: nobody measured it.*"
    with pytest.raises(KeyError):  # a fault is no reason
        notebooks.shown(lambda: {}["x"])


def test_a_scale_that_loads_has_no_world_to_show(tmp_path):
    loaded = Study.open("paper", "llama2-chat", 0, tmp_path)
    for show in (worlds.splits, worlds.pictures):
        with pytest.raises(Lacking, match="others"):
            show(loaded)
    built = worlds.splits(Study(NANO, "mini-chat", 0, tmp_path))
    assert built.to_numpy().sum() > 100 and built.gt(0).any(axis=None)


AUDIT = pd.DataFrame(
    {"seed": 0, "corpus": "instructions", "source": "s", "category": None, "kept": [True, False, True, False],
     "reasons": ["", "text", "", "overlong"], "skipped": [False, False, False, True], "has_picture": True,
     "text_score": [0.1, 0.9, 0.2, None], "image_score": [0.3, 0.1, 0.2, None]}
)  # fmt: skip


def test_nobody_knows_which_rows_of_other_peoples_corpora_are_harmful():
    """Neither precision nor recall, and no row is called benign: flags are counted, their truth is unknown."""
    assert filtering.filtering_audit(AUDIT)["category"].tolist() == ["unknown"]
    assert set(filtering.score_counts(AUDIT)["harmful"]) == {"unknown"} and list(filtering.reasons(AUDIT)) == ["unknown"]
    with pytest.raises(Lacking, match="nobody knows"):
        filtering.guard_quality(AUDIT)
    figure = plots_filtering.guard_scores(AUDIT, "x")
    assert figure.get_suptitle() == "The text guard flags 33 % of the rows that it scored, the image guard 0 %"
    assert figure.axes[0].get_legend().get_texts()[0].get_text() == "all rows (n = 3)"
    reasons = ["longer than the context (9 > 8)", "longer than the context (10 > 8)", "text,image unread", ""]
    found = filtering.reasons(AUDIT.assign(reasons=reasons)).index.tolist()
    assert found == ["", "longer than the context", "text,image unread"]
    dropped = AUDIT.assign(reasons=["text,image unread", "image unread", "text", "text"], kept=False)
    line = filtering.filtering_audit(dropped).iloc[0]
    assert (line["dropped_by_text"], line["unread"]) == (3, 1), "columns add up"
    known = AUDIT.assign(category=[None, "weapons", None, None])
    assert set(filtering.filtering_audit(known)["category"]) == {"benign", "weapons"}
    assert "finds 100 % of 1 harmful texts, no picture is graphic" in plots_filtering.guard_scores(known, "x").get_suptitle()
    assert filtering.guard_quality(known).set_index(["guard", "measure"]).loc[("text", "recall"), "value"] == 1


def test_what_was_not_compared_says_so():
    rows = pd.DataFrame(
        {
            "benchmark": "xstest",
            "judge": "x",
            "group": "homonym",
            "event": [True],
            "harmful": False,
            "model": "m",
            "item": "i",
            "cluster": "c",
        }
    )
    with pytest.raises(Lacking, match="see helpfulness"):
        adaptation.capabilities(rows)
    with pytest.raises(Lacking, match="panels"):
        adaptation.level_sheet(pd.DataFrame({"recipe": ["a"], "at": [adaptation.STEPS]}))
