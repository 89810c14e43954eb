"""What the titles of F14 and F15 say about the numbers drawn."""

import pandas as pd

from vlsafe.plots import claims


def test_a_title_says_what_adaptation_changes_by_the_judge_who_sees_least_and_most():
    runs = {("parent", "aligned"): "text", ("projector", "filtered"): "pictures", ("instruct", "filtered-full"): None}
    rows = [
        {"backbone": "b", "modality": modality, "stage": stage, "recipe": recipe, "judge": judge, "value": value}
        for judge, before, after in (("rule", 10, 20), ("strings", 10, 80))
        for (stage, recipe), only in runs.items()
        for modality in ("text", "pictures") if only in (None, modality)
        for value in [after if only is None else before]
    ]  # fmt: skip
    both = pd.DataFrame(rows)
    sizes = "+10 (rule) to +70 (strings)"
    assert claims._by_judge(both) == f"Adaptation changes ASR by judge, points: text {sizes}, pictures {sizes}"
    unjudged = both[both["stage"] != "projector"]
    assert claims._by_judge(unjudged).endswith(", pictures afterwards 20 % (rule) to 80 % (strings)")
    one = both[both["judge"] == "rule"]
    assert claims._by_judge(one) == "Adaptation changes ASR by judge, points: text +10 (rule), pictures +10 (rule)"
    assert claims._by_judge(both.iloc[:0]) == "Attack success by judge"
