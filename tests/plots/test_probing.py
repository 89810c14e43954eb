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
    assert figure.get_suptitle() == "In words, half of the largest gap between harmful and benign prompts is there by step 20"
