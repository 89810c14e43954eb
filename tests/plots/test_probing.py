"""What the titles of the probing figures say about the numbers drawn."""

import pandas as pd
import pytest

from vlsafe.plots import probing


@pytest.mark.parametrize("sign", [1, -1])
def test_half_of_the_gap_is_that_of_the_block_where_it_is_largest(sign):
    """Block 1 opens to half by step 20 and to the full by 40, whichever prompts move further; block 0 hardly opens."""
    gaps = {(0, 10): 0.04, (0, 20): 0.01, (0, 40): 0.05, (1, 10): 0.1, (1, 20): 0.4, (1, 40): 0.6}
    lines = pd.DataFrame(
        {"backbone": "b", "seed": 0, "stage": "instruct", "measure": "cosine_centred", "kind": "difference", "group": group,
         "layer": layer, "step": step, "value": -sign * gap, "low": -sign * gap - 0.01, "high": -sign * gap + 0.01}
        for group in probing.MODALITIES for (layer, step), gap in gaps.items()
    )  # fmt: skip
    figure = probing.similarity_over_steps(lines, "mini")
    side = "harmful" if sign > 0 else "benign"
    said = "Cells in which harmful and benign text prompts moved differently: 5 of 6"
    title = " ".join(figure.get_suptitle().split())
    assert title == f"{said}; {side} moved further, half of the largest gap by step 20"
    wide = probing.similarity_over_steps(lines.assign(low=-1.0, high=1.0), "mini")
    assert wide.get_suptitle() == "Cells in which harmful and benign text prompts moved differently: 0 of 6"


def test_studies_that_open_at_other_steps_are_not_said_to_open_at_one():
    """The second study's gap has the other sign: means of both would open where neither does."""
    gaps = [(0, 10, 0.4), (0, 20, 0.5), (1, 10, -0.1), (1, 20, -0.6)]
    lines = pd.DataFrame(
        {"backbone": "b", "seed": seed, "stage": "instruct", "measure": "cosine_centred", "kind": "difference", "group": group,
         "layer": 0, "step": step, "value": gap, "low": gap - 0.01, "high": gap + 0.01}
        for group in probing.MODALITIES for seed, step, gap in gaps
    )  # fmt: skip
    assert probing.similarity_over_steps(lines, "mini").get_suptitle().endswith("by step 10–20")
    text = pd.DataFrame({"layer": [3, 3], "value": [-0.03, -0.05], "high": [-0.01, 0.02]})
    assert probing._moved_further(text).endswith("in no block")
    assert probing._moved_further(text.iloc[:1]).endswith("most in block 3 (-0.030)")


def test_a_width_that_few_studies_have_is_not_drawn():
    """A located band of four blocks, of one study alone: it is no column, and the title is not its."""
    lines = pd.DataFrame(
        {"backbone": "b", "seed": seed, "measure": "text_asr", "kind": "band", "width": width, "start": 0, "value": value,
         "low": 0.1, "high": 0.5, "change": value - 0.6, "located": width == 4, "patch": f"band-{width}", "n": 40}
        for seed, width, value in ((0, 1, 0.5), (1, 1, 0.4), (0, 4, 0.0))
    )  # fmt: skip
    figure = probing.transplants(lines, "mini")
    assert figure.get_suptitle() == "The parent's blocks [0, 1) take text ASR from 60 to 45 %"
    assert [axis.get_title("left") for axis in figure.axes] == ["1 block"]
