"""The frame of all figures: what stands where, what a line with seeds draws, and that no figure stays open."""

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from PIL import Image

from vlsafe.plots import style

ROWS = pd.DataFrame(
    {"backbone": "b", "group": ["x", "x", "y", "y"], "seed": [0, 1, 0, 1], "layer": 0, "value": [0.2, 0.4, 0.6, 0.8],
     "low": 0.1, "high": 0.9}
)  # fmt: skip


def test_panels_carry_title_caption_and_labels_and_are_closed():
    before, rows = plt.get_fignums(), style.by_backbone(ROWS, "percent")
    caption = style.caption(ROWS, "mini", "", "n = 4")
    with style.panels(rows, {"x": "first", "y": "second"}, 1.0, "Takeaway", caption, "layer") as (figure, axes):
        parts = {group: rows["value"].tolist() for group, _, rows in style.facets(axes, ROWS, "group")}
    assert parts == {"x": [0.2, 0.4], "y": [0.6, 0.8]} and plt.get_fignums() == before
    assert figure.get_suptitle() == "Takeaway"
    assert figure.get_supxlabel() == "miniature: a synthetic world, scale mini, seeds 0, 1; n = 4"
    assert axes["b", "x"].get_ylabel() == "b\npercent" and [a.get_title("left") for a in figure.axes] == ["first", "second"]


def test_a_caption_names_the_seeds_of_each_backbone_where_they_differ():
    both = pd.concat([ROWS, ROWS.assign(backbone="c")])
    assert style.caption(both, "small") == "scale small, seeds 0, 1"
    assert style.caption(both.iloc[:-3], "small") == "scale small, b seeds 0, 1, c seed 0"


@pytest.mark.parametrize(("seed_range", "band"), [(False, (0.1, 0.9)), (True, (0.2, 0.4))])
def test_a_line_is_the_mean_over_seeds_with_its_band(seed_range, band):
    with style.panels({"": ""}, {"": ""}, 1.0, "", "") as (_, axes):
        style.draw_line(axes["", ""], ROWS[ROWS["group"] == "x"], "layer", seed_range, color="black")
    mean = axes["", ""].lines[-1].get_ydata()
    heights = axes["", ""].collections[0].get_paths()[0].vertices[:, 1]
    assert mean == pytest.approx([0.3]) and (heights.min(), heights.max()) == pytest.approx(band)
    assert len(axes["", ""].lines) == 3  # each seed is a thin line


def test_only_rates_are_turned_into_percent():
    frame = pd.DataFrame({"text_asr": [0.5], "helpfulness_low": [0.25], "value": [np.nan], "n": [3], "place": [1.0]})
    assert style.percent(frame).drop(columns="value").iloc[0].to_dict() == {
        "text_asr": 50,
        "helpfulness_low": 25,
        "n": 3,
        "place": 1,
    }


def test_files_are_cut_to_what_is_drawn_and_the_pdf_holds_its_fonts(tmp_path):
    """What hangs over the right edge is in the file; letters are text, not drawings."""
    with style.panels({"": ""}, {"": ""}, 1.0, "Takeaway", "") as (figure, axes):
        axes["", ""].text(1.2, 0.5, "over the edge", transform=axes["", ""].transAxes).set_in_layout(True)
    figure.set_layout_engine("none")
    style.write(figure, ROWS, tmp_path, "F99")
    with Image.open(tmp_path / "F99.png") as picture:
        assert picture.width > 200 * 7
    assert b"/Type0" in (tmp_path / "F99.pdf").read_bytes()


def test_labels_keep_inside_the_panel_where_many_points_lie_together():
    with style.panels({"": ""}, {"": ""}, 1.0, "", "") as (_, axes):
        axes["", ""].set_ylim(0, 100)
        style.label_right(axes["", ""], [(str(i), 0.0, 99.0, "black") for i in range(40)], gap=5.0)
    heights = [text.get_position()[1] for text in axes["", ""].texts]
    assert len(heights) == 40 and max(heights) <= 100 and min(np.diff(heights)) == pytest.approx(2.5)


def test_a_title_says_what_is_known_of_a_change():
    known = style.change("ASR", 3.2, 40.0), style.change("ASR", 3.2, 40.0, " (graft)")
    assert known == ("ASR 3 → 40 %", "ASR 3 (graft) → 40 %")
    one = style.change("ASR", np.nan, 40.0), style.change("ASR", 3.2, np.nan), style.change("ASR", np.nan, np.nan)
    assert one == ("ASR 40 % after", "ASR 3 % before", "")


def test_a_caption_names_the_judges_of_attacks():
    lines = pd.DataFrame({"measure": ["text_asr", "multimodal_asr", "helpfulness"], "judge": ["a", "b + a", "letters"]})
    assert style.judges(lines) == "judges of attacks: a, b"
    assert style.judges(lines.assign(judge="world")) == "judge: the world's truth"
    assert style.judges(lines.iloc[2:]) == "judges: letters"
