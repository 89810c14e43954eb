"""One prompt, one picture, several models beside each other: what each says, and in which layer a refusal gathers.

For looking, not for measuring: a prompt is an anecdote, and no table is made from what is seen here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from vlsafe.analysis import tuning
from vlsafe.core.schema import Item, Picture, Turn
from vlsafe.plots.style import KINDS, STYLE, origin
from vlsafe.study.study import Study

WITHHELD = "(withheld)"


def prompts(study: Study) -> dict[str, str]:
    """What can be asked: one harmful, one borderline and one harmless request in words, and wordings that need a picture.

    Prompts of real benchmarks are named by their item and not shown.
    """
    asked: dict[str, str] = {}
    wanted = (("sorry_bench", 3), ("xstest", 3), ("capability", 12), ("mm_safetybench", 3))
    for benchmark, n in wanted:
        of = {item.turns[-1].text: item.id for item in study.items() if item.benchmark == benchmark}
        asked |= {text if _open(study) else name: text for text, name in list(of.items())[:n]}
    return asked


def pictures(study: Study) -> dict[str, Picture | None]:
    """What can be shown: no picture, and the pictures of a few attacks and of their benign twins, by group and item."""
    found: dict[str, Picture | None] = {"none": None}
    for harmful in (True, False):
        of = [item for item in study.items() if item.benchmark == "mm_safetybench" and item.harmful == harmful]
        found |= {f"{item.group} {item.cluster}".replace("|", " "): item.images[0] for item in of[: 6 if harmful else 3]}
    return found


def compare(study: Study, names: Sequence[str], text: str, picture: Picture | None = None) -> pd.DataFrame:
    """One line per model: what it answers, whether the published list calls that a refusal, and the refusal in every layer.

    A model that cannot see has no line for a prompt with a picture. Columns from the third on: probability that the answer
    begins like a refusal, read from each layer (`probe.refusal_by_layer`).
    """
    from vlsafe.evaluation import engines, judges
    from vlsafe.evaluation.judges import strings
    from vlsafe.inspection import states
    from vlsafe.models import checkpoints

    item = Item("asked", "xstest", (Turn("user", text),), (picture,) if picture else ())
    lines = {}
    for name in names:
        folder = study.checkpoints(name)[-1]
        if picture and not checkpoints.is_multimodal(folder):
            continue
        model, processor = _loaded(folder)
        said = engines.respond(model, processor, [item], name, 1, study.scale.exam.max_new_tokens)[0].text
        layers = states.refusal_by_layer(model, processor, [(item.turns, item.images)], strings.XSTEST)[0]
        refused = judges.xstest_strings(item, said).label == "2_full_refusal"
        told = {"answer": said if _open(study) else WITHHELD, "refused": refused}
        lines[name] = {**told, **{f"layer {i}": round(float(share), 3) for i, share in enumerate(layers)}}
    return pd.DataFrame.from_dict(lines, orient="index")


def draw(compared: pd.DataFrame, scale: str, asked: str) -> Figure:
    """The refusal in every layer, one line per model, named at its end."""
    layers = [name for name in compared.columns if name.startswith("layer ")]
    with plt.style.context(STYLE):
        figure, axis = plt.subplots(figsize=(4.6, 2.3), layout="constrained")
        height = -20.0
        for name, line in compared.sort_values(layers[-1]).iterrows():
            share = 100 * line[layers].astype(float)
            look = KINDS[tuning.kind(*str(name).split("/", 1))]
            axis.plot(range(len(layers)), share, linewidth=1.2, markersize=3, **look)
            height = max(share.iloc[-1], height + 7)
            axis.annotate(
                str(name), (len(layers) - 1, height), xytext=(5, 0), textcoords="offset points", va="center", fontsize=6,
                color=look["color"], annotation_clip=False,
            )  # fmt: skip
        axis.set(xlabel="layer", ylabel="refusal, percent", ylim=(-3, 103), xticks=range(len(layers)))
        refusing = ", ".join(str(name) for name in compared.index[compared["refused"]]) or "none of them"
        figure.suptitle(f"Who refuses: {refusing}", x=0.01, ha="left", fontsize=8, fontweight="bold")
        note = f"{origin(scale)}; one prompt: {asked}\neach layer read by the model's own norm and head (logit lens)"
        figure.supxlabel(note, x=0.01, ha="left", ma="left", fontsize=5.5, color="#555555")
        plt.close(figure)
    return figure


def choose(study: Study, names: Sequence[str]) -> Any:
    """The same with two lists to pick from; needs a living kernel."""
    import ipywidgets
    from IPython.display import display

    asked, shown = prompts(study), pictures(study)

    def show(prompt: str, picture: str) -> None:
        compared = compare(study, names, asked[prompt], shown[picture])
        if picture != "none":
            display(ipywidgets.Image(value=shown[picture], width=96))
        display(compared[["answer", "refused"]], draw(compared, study.scale.name, f"{prompt} / picture: {picture}"))

    lists: Mapping[str, Any] = {
        name: ipywidgets.Dropdown(options=list(options), description=name)
        for name, options in (("prompt", asked), ("picture", shown))
    }
    return ipywidgets.VBox([ipywidgets.HBox(list(lists.values())), ipywidgets.interactive_output(show, lists)])


def _open(study: Study) -> bool:
    """Whether texts may be shown: a world that was built is harmless by construction, a loaded benchmark is not."""
    return getattr(study.scale, "source", "build") == "build"


@lru_cache(maxsize=8)
def _loaded(folder: Any) -> tuple[Any, Any]:
    from vlsafe.models import checkpoints

    return checkpoints.load(folder), checkpoints.load_processor(folder)
