"""One prompt, one picture, several models beside each other: what each answers, and in which layer a refusal gathers.

For looking, not for measuring: a prompt is an anecdote, and no table is made from what is seen here.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from vlsafe import evaluation, inspection, models
from vlsafe.analysis import tuning
from vlsafe.core.schema import Item, Picture, Turn
from vlsafe.evaluation.judges.rules import LISTS
from vlsafe.plots import style
from vlsafe.study.study import Study

WITHHELD = "(withheld)"


def prompts(study: Study) -> dict[str, str]:
    """What can be asked: a few harmful, borderline and harmless requests in words, and wordings that need a picture.

    Prompts of real benchmarks are named by their item and not shown.
    """
    texts: dict[str, str] = {}
    for benchmark, n in (("sorry_bench", 8), ("xstest", 3), ("capability", 12), ("mm_safetybench", 3)):
        ids = {item.turns[-1].text: item.id for item in study.items() if item.benchmark == benchmark}
        texts |= {text if _open(study) else name: text for text, name in list(ids.items())[:n]}
    return texts


def pictures(study: Study) -> dict[str, Picture | None]:
    """What can be shown: no picture, and the pictures of a few attacks and of their benign twins, by group and item."""
    named: dict[str, Picture | None] = {"none": None}
    for harmful, n in ((True, 6), (False, 3)):
        items = [i for i in study.items() if i.benchmark == "mm_safetybench" and i.harmful == harmful and i.images]
        named |= {f"{item.group} {item.cluster}".replace("|", " "): item.images[0] for item in items[:n]}
    return named


def compare(study: Study, names: Sequence[str], text: str, picture: Picture | None = None) -> pd.DataFrame:
    """One line per model: what it answers, whether the published list calls that a refusal, and the refusal in every layer.

    A model that cannot see has no line for a prompt with a picture. Columns from the third on: probability that the answer
    begins like a refusal, read from each layer (`states.refusal_by_layer`).
    """
    item = Item("question", "xstest", (Turn("user", text),), (picture,) if picture else ())
    rows = {}
    for name in names:
        folder = study.checkpoints(name)[-1]
        if picture and not models.checkpoints.is_multimodal(folder):
            continue
        model, processor = _loaded(folder)
        response = evaluation.engines.respond(model, processor, [item], name, 1, study.scale.exam.max_new_tokens)[0].text
        refusals = LISTS["xstest-strings"].phrases
        layers = inspection.states.refusal_by_layer(model, processor, [(item.turns, item.images)], refusals)[0]
        refused = evaluation.judges.xstest_strings(item, response).label == "2_full_refusal"
        rows[name] = {"answer": response if _open(study) else WITHHELD, "refused": refused}
        rows[name] |= {f"layer {i}": round(float(share), 3) for i, share in enumerate(layers)}
    return pd.DataFrame.from_dict(rows, orient="index")


def draw(compared: pd.DataFrame, scale: str, prompt: str) -> Figure:
    """The refusal in every layer, one line per model, named at its end."""
    shares = 100 * compared.filter(like="layer ").astype(float)
    title = f"Who refuses: {', '.join(map(str, compared.index[compared['refused']])) or 'none of them'}"
    caption = f"{style.origin(scale)}; one prompt: {prompt}; each layer read by the model's own norm and head (logit lens)"
    with style.panels({"": "refusal, percent"}, {"": ""}, 1.6, title, caption, "layer") as (figure, axes):
        axis, labels = axes["", ""], []
        for name, share in shares.iterrows():
            look = style.KINDS[tuning.kind(*str(name).split("/", 1))]
            axis.plot(range(len(share)), share, linewidth=1.2, markersize=3, **look)
            labels.append((str(name), len(share) - 1, share.iloc[-1], look["color"]))
        axis.set(ylim=(-3, 103), xticks=range(shares.shape[1]))
        style.label_right(axis, labels, gap=7.0, size=6)
    return figure


def choose(study: Study, names: Sequence[str]) -> Any:
    """The same with two lists to pick from; needs a living kernel.

    There is no output widget in it: whoever runs a notebook through nbclient, as papermill does, may wait for ever for the reply
    of a cell that fills one (nbclient's issue 312).
    """
    import ipywidgets

    texts, images = prompts(study), pictures(study)
    options = {"prompt": list(texts), "picture": list(images)}
    lists = {name: ipywidgets.Dropdown(options=choices, description=name) for name, choices in options.items()}
    shown = ipywidgets.VBox()

    def show(_: Any = None) -> None:
        prompt, picture = (each.value for each in lists.values())
        compared = compare(study, names, texts[prompt], images[picture])
        draw(compared, study.scale.name, f"{prompt} / picture: {picture}").savefig(drawn := io.BytesIO(), format="png")
        table = ipywidgets.HTML(compared[["answer", "refused"]].to_html(border=0))
        beside = [ipywidgets.Image(value=bytes(each), width=96) for each in (images[picture],) if each]
        shown.children = [*beside, table, ipywidgets.Image(value=drawn.getvalue())]

    for each in lists.values():
        each.observe(show, "value")
    show()
    return ipywidgets.VBox([ipywidgets.HBox(list(lists.values())), shown])


def _open(study: Study) -> bool:
    """Whether texts may be shown: a world that was built is harmless by construction, a loaded benchmark is not."""
    return study.scale.source == "build"


@lru_cache(maxsize=8)
def _loaded(folder: Any) -> tuple[Any, Any]:
    return models.checkpoints.load(folder), models.checkpoints.load_processor(folder)
