"""F05 and F06: what safety tuning buys, and what it costs. Draws the tables of `analysis.tuning`."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from vlsafe.analysis import tuning
from vlsafe.analysis.measures import UNIT
from vlsafe.plots import style

LEEWAY = 5  # points of helpfulness that a title takes for about equal
INTERVALS = "bars: 95 % intervals, clustered by what was asked"


def tradeoff(points: pd.DataFrame, scale: str) -> Figure:
    """F05: what every tuned model does in the measures of `analysis.tuning.AXES`, those of its `plane`."""
    return judged(points, _safest(points), scale)


def judged(points: pd.DataFrame, title: str, scale: str) -> Figure:
    """Models one below the other, a panel for each measure that they are judged by; filled where no other one beats them."""
    seeds = "means over seeds, small ticks: single seeds" if style.several_seeds(points) else ""
    least = f"n ≥ {int(points['n'].min())} a mark"
    caption = style.caption(points, scale, seeds, INTERVALS, style.FILLED, style.judges(points), least)
    columns = {name: text for name, text in style.JUDGED.items() if name in set(points["what"])}
    return style.dots(points, columns, title, caption, tuning.front(points))


def _safest(points: pd.DataFrame) -> str:
    """The takeaway in the numbers drawn: the adapted model and, of those tuned ones that stay about as helpful, the safest."""
    axes = list(tuning.AXES)
    wide = 100 * points.pivot_table(index=[*UNIT, "stage", "kind", "name"], columns="what", values="value").reindex(columns=axes)
    of, adapted = wide.query("stage == 'safety'"), wide.query("kind == 'adapted'").groupby(UNIT).mean()
    before = of[[]].join(adapted)  # of the same seeds
    tuned, adapted = (one.groupby("name").mean() for one in (of, before))
    helpful = tuned[~(tuned["helpfulness"] < adapted["helpfulness"] - LEEWAY)]
    if tuned["text_asr"].isna().all():
        return "What safety tuning buys and costs"
    names = {"text_asr": "text ASR", "multimodal_asr": "with pictures", "twin_refusal": "harmless picture requests refused"}
    said = "Safest at about equal helpfulness"
    if helpful["text_asr"].isna().all():
        helpful, names, said = tuned, {**names, "helpfulness": "helpfulness"}, "None is about as helpful; safest"
    best = helpful["text_asr"].idxmin()
    parts = [style.change(name, adapted.loc[best, what], helpful.loc[best, what]) for what, name in names.items()]
    return f"{said}, {best}: {', '.join(filter(None, parts))}"


def refusals(rates: pd.DataFrame, scale: str) -> Figure:
    """F06: refusal of harmless requests, a line per model and a panel per kind of request, those in text first."""
    models = list(zip(rates["stage"], rates["recipe"], strict=True))
    names = [tuning.named(recipe) if stage == "safety" else tuning.kind(stage, recipe) for stage, recipe in models]
    points = rates.assign(kind=[tuning.kind(*model) for model in models], name=names)
    points = tuning.with_seeds(points).sort_values("kind", key=lambda kinds: ~kinds.isin(["parent", "adapted"]), kind="stable")
    columns = {what: "\n".join(what.rsplit(" ", 1)) for _, _, what, _ in tuning.REFUSALS if what in set(rates["what"])}
    in_text = rates.loc[rates["modality"] == "text", "what"].nunique()
    caption = style.caption(
        rates, scale, INTERVALS, "refused, percent (← better)", f"the first {in_text} in text, the others with pictures",
        f"n ≥ {int(rates['n'].min())} a mark", style.judges(rates),
    )  # fmt: skip
    return style.dots(points, columns, _most_refused(rates), caption)


def _most_refused(rates: pd.DataFrame) -> str:
    """The takeaway in the numbers drawn: the tuned model that refuses most, averaged over kinds, and the adapted one."""
    mean = rates.groupby(["stage", "recipe"])["value"].mean() * 100
    tuned = mean[mean.index.get_level_values("stage") == "safety"]
    adapted = mean[[tuning.kind(*key) == "adapted" for key in mean.index]]
    parts = [f"{adapted.mean():.0f} % adapted"] if len(adapted) else []
    if len(tuned):
        ends = "–".join(dict.fromkeys(f"{end:.0f}" for end in (tuned.min(), tuned.max())))
        parts.append(f"{ends} % tuned (most: {tuning.named(tuned.idxmax()[1])})")
    return f"Harmless requests refused, mean over kinds{': ' * bool(parts)}{', '.join(parts)}"
