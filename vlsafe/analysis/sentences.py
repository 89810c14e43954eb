"""What tables say, as sentences: direction, size, interval, items and seeds, by rules and never by hand.

Verdicts are the ledger's. Elsewhere a change is called one where its interval lies on one side of zero, over several seeds where
it does so in every one of them. Numbers are those of the tables: percent of rates, points of their differences.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from vlsafe.analysis import claims, durability, merging
from vlsafe.analysis.measures import CHANCE, MEASURES, bounds, cautious, points, signed


def shares(lines: pd.DataFrame, *names: str) -> str:
    """Rates with their intervals, each called by some columns."""
    found = []
    for line in lines.to_dict("records"):
        words = [str(line[name]) for name in names]
        called = " ".join(MEASURES[word]["label"] if word in MEASURES else word for word in words)
        found.append(f"{called} {_rated(line)}")
    return "; ".join(found) + "."


def _rated(line: Mapping[str, Any]) -> str:
    """A line's rate with its interval, in percent."""
    return f"{bounds(line['value'], line.get('value_high'))} % [{100 * line['low']:.0f}, {100 * line['high']:.0f}]"


def percent(lines: pd.DataFrame, column: str = "value") -> str:
    """The mean of a rate, a line per seed, and its range; of a single seed, or of one model that all seeds share, its interval
    over items, where the lines have one. Both bounds of a rate where unjudged answers set them apart."""
    rates = lines[column].dropna()
    most = lines.get(f"{column}_high", rates).reindex(rates.index).fillna(rates)
    low, high = (column.removesuffix("value") + end for end in ("low", "high"))
    shown = f"{bounds(rates.mean(), most.mean())} %" if len(rates) else "(not measured)"
    if column != "before" and low in lines:
        one = lines.loc[rates.index, [column, low, high]].drop_duplicates()
        if len(one) == 1 and (len(rates) == 1 or 0 < rates.iloc[0] < 1):
            shared = f" (one model, shared by {len(rates)} seeds)" * (len(rates) > 1)
            return f"{shown} [{100 * one[low].item():.0f}, {100 * one[high].item():.0f}]{shared}"
    return shown if len(rates) < 2 else f"{shown} ({100 * rates.min():.0f}–{100 * most.max():.0f} over {len(rates)} seeds)"


def listed(names: Iterable[str]) -> str:
    """Names as a sentence lists them."""
    *head, last = names
    return f"{', '.join(head)} and {last}" if head else last


def compared(lines: pd.DataFrame, measure: str, name: str = "recipe", prefix: str = "", label: str = "") -> str:
    """Which models lie below another one in a measure, which above it, and which cannot be told from it.

    `lines` hold paired differences from that model in the columns difference, difference_low and difference_high, with `prefix`
    before them, and the model's name in the column `name`. With a `label`, all lines count, whatever their measure.
    """
    columns = [f"{prefix}difference{end}" for end in ("", "_low", "_high")]
    of = (lines if label else lines[lines["measure"] == measure]).dropna(subset=columns)
    sides: dict[str, list[tuple[float, str]]] = {"lower": [], "higher": [], "not told apart": [], "seeds disagree": []}
    for model, rows in of.groupby(name, sort=False):
        values, lows, highs = (rows[column].to_numpy(float) for column in columns)
        below, above = highs < 0, lows > 0
        side = "lower" if below.all() else "higher" if above.all() else "not told apart"
        side = "seeds disagree" if below.any() and above.any() else side
        size = points(values[0], lows[0], highs[0])
        if len(rows) > 1:
            size = f"{signed(values.mean())}, {signed(values.min())} to {signed(values.max())} over {len(rows)} seeds"
        sides[side].append((values.mean(), f"{model} ({size})"))
    parts = [f"{side}: {', '.join(text for _, text in sorted(found))}" for side, found in sides.items() if found]
    label = label or MEASURES[measure]["label"]
    return f"{label[0].upper()}{label[1:]}, points: {'; '.join(parts)}." if parts else f"{label}: nothing to compare."


def best(lines: pd.DataFrame, measure: str, name: str = "recipe") -> str:
    """The best model of a measure, with its interval, and those whose intervals overlap with it; of one study."""
    spec, of = MEASURES[measure], lines[lines["measure"] == measure]
    of = of.assign(against=cautious).sort_values("against", ascending=spec["worse"] == "higher", kind="stable")
    first, others = of.iloc[0], of.iloc[1:]
    near = others[(others["low"] <= first["high"]) & (others["high"] >= first["low"])][name].tolist()
    rest = f"; not told from {listed(near)}" if near else ""
    how = "least" if spec["worse"] == "higher" else "most"
    return f"{how} {spec['label']}: {first[name]}, {_rated(first)}{rest}"


def winners(lines: pd.DataFrame, measures: Sequence[str], name: str = "recipe") -> str:
    """The best model by each of some measures; of one study."""
    lines = lines.dropna(subset=["value"])
    text = "; ".join(best(lines, measure, name) for measure in measures if (lines["measure"] == measure).any()) + "."
    return text[0].upper() + text[1:]


def changed(lines: pd.DataFrame) -> str:
    """What adaptation changed, of T02's lines of one study: rates and paired differences of what both models were asked."""
    said = []
    for line in lines.dropna(subset=["difference"]).to_dict("records"):
        low, high = line["low"], line["high"]
        how = "rises" if low > 0 else "falls" if high < 0 else "does not change beyond its interval"
        before, after = (bounds(line[f"{side}_value"], line.get(f"{side}_value_high")) for side in ("parent", "instruct"))
        change = points(line["difference"], low, high)
        judged = f" of the {line['n']} judged of both" if line.get("n_left_out") else ""
        said.append(f"{line['label']} {how}, from {before} to {after} %, by {change} points{judged}")
    text = "; ".join(said) + "."
    return text[0].upper() + text[1:]


def parted(lines: pd.DataFrame, what: str) -> str:
    """After which layers a difference, in `value`, `low` and `high`, lies on one side of zero, by group; its extreme with it."""
    said = []
    for group, of in lines.groupby("group", sort=False):
        clear = of[(of["low"] > 0) | (of["high"] < 0)]
        if clear.empty:
            said.append(f"{group}: {what} after no layer")
            continue
        most = clear.loc[clear["value"].abs().idxmax()]
        size = f"{most['value']:+.3f} [{most['low']:+.3f}, {most['high']:+.3f}]"
        layers = sorted(map(int, clear["layer"].unique()))
        named = f"layer{'s' * (len(layers) > 1)} {listed(map(str, layers))}"
        said.append(f"{group}: {what} after {named}, most after {int(most['layer'])} ({size})")
    return "; ".join(said) + "."


def table(rows: Mapping[str, Mapping[str, str]], first: str) -> str:
    """A Markdown table: a line for each row under the head `first`, a column for each backbone."""
    names = list(dict.fromkeys(name for cells in rows.values() for name in cells))
    lines = [[first, *(f"`{name}`" for name in names)], ["---"] * (1 + len(names))]
    lines += [[row, *(cells.get(name, "") for name in names)] for row, cells in rows.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) if rows else ""


def verdicts(ledger: pd.DataFrame, names: Sequence[str]) -> str:
    """A table: what each claim states, and of every backbone the verdict over items, the effect, and what seeds say of it; then
    which of them nobody measured."""
    said, missing = dict[str, dict[str, str]](), []
    for claim in (name for name in names if name in set(ledger["claim"])):
        of = ledger[ledger["claim"] == claim]
        statement, measured = of["statement"].iloc[0], of[of["item_level"] != claims.NOT]
        status = " (exploratory)" if of["status"].iloc[0] == claims.EXPLORATORY else ""
        said |= {statement + status: {line.backbone: verdict(line) for line in measured.itertuples()}} if len(measured) else {}
        missing += [] if len(measured) else [statement]
    left = f"- Not measured: *{'; '.join(missing)}*." if missing else ""
    return "\n\n".join(filter(None, [table(said, "claim"), left]))


def verdict(line: Any) -> str:
    text = f"**{line.item_level}**" + " but too small to matter" * (line.item_level == claims.SUPPORTED and line.matters == "no")
    threshold = f", threshold {signed(line.against)}" if line.against else ""
    part = f"{line.part}: " if line.claim in SEVERAL else ""
    text += f" ({part}{points(line.effect, line.low, line.high)}{threshold}, n = {int(line.n)}"
    text += f"{', ' if pd.isna(line.seed_low) else '; '}{over_seeds(line, f'{line.seed_level}, ')}"
    if line.item_level != claims.SUPPORTED and pd.notna(line.other_part):
        text += f"; {line.other_part}: {points(line.other_effect, line.other_low, line.other_high)}"
    return f"{text}{flag(line)})"


def over_seeds(line: Any, verdict: str = "", sign: int = 1) -> str:
    """The interval of an effect over seeds, after the verdict; of one seed how many items it has, where no verdict says so."""
    if pd.isna(line.seed_low):
        return "one seed" if verdict else f"one seed, n = {int(line.n)}"
    low, high = sorted((sign * line.seed_low, sign * line.seed_high))
    part = ""
    if line.seed_part != line.part:  # of several, another one decides over seeds
        part = f"{line.seed_part}{f', threshold {signed(line.seed_against)}' if line.seed_against else ''}: "
    return f"over {int(line.seeds)} seeds {verdict}{part}[{signed(low)}, {signed(high)}]"


def flag(line: Any) -> str:
    """Which of the models behind a line of the ledger cannot answer."""
    return f"; not capable: {line.flagged}" if line.flagged else ""


SEVERAL = {claim.name for claim in claims.CLAIMS if len(claims.leaves(claim.decided_by)) > 1}  # whose deciding part is named


def counted(ledger: pd.DataFrame) -> str:
    """How many claims of each status hold, over items and over seeds."""
    said = []
    for (backbone, status), of in ledger[ledger["item_level"] != claims.NOT].groupby(["backbone", "status"], sort=False):
        held = of["item_level"] == claims.SUPPORTED
        both = held & (of["seed_level"] == claims.SUPPORTED)
        against, seeds = (of["item_level"] == claims.CONTRADICTED).sum(), int(of["seeds"].max())
        said.append(
            f"- `{backbone}`, {seeds} seed{'s' * (seeds > 1)}: of {len(of)} {status} claims measured {held.sum()} "
            f"hold{'s' if held.sum() == 1 else ''} over items, {both.sum()} of these over seeds too; contradicted: {against}."
        )
    return "\n".join(said)


def rates(table: pd.DataFrame, stage: str, measures: Sequence[str]) -> str:
    """Some rates of the parent, or of the adapted model (`stage`: instruct), by backbone, and where guessing would be; of T02."""
    said, column = [], f"{stage}_value"
    for backbone, of in table.dropna(subset=[column]).groupby("backbone", sort=False):
        parts = []
        for name in (name for name in measures if name in set(of["measure"])):
            chance = f", chance {100 * CHANCE[name]:.0f} %" if name in CHANCE else ""
            parts.append(f"{MEASURES[name]['label']} {percent(of[of['measure'] == name], column)}{chance}")
        said.append(f"- `{backbone}`: {'; '.join(parts)}.")
    return "\n".join(said)


def guards(table: pd.DataFrame) -> str:
    """How much of the harm the guards find together, and how much of what they drop deserved it, of T01's lines."""
    of = table[table["guard"] == "either"]
    parts = [f"{name} {percent(of[of['measure'] == name])}" for name in ("recall", "precision")]
    return f"- Both guards together: {', '.join(parts)}."


def missed(table: pd.DataFrame) -> str:
    """Which bounds of T00 some seed misses."""
    lines = table[table["holds"] < table["seeds"]].itertuples()
    said = [f"`{line.backbone}` {line.measure} ({line.why}) in {line.seeds - line.holds} of {line.seeds} seeds" for line in lines]
    return f"- Bounds missed: {'; '.join(said)}." if said else "- No bound is missed."


def ranged(values: pd.Series) -> str:
    """The mean of changes, one per seed, and their range where there are several, in points."""
    shown = f"{signed(values.mean())} points"
    return f"{shown} ({signed(values.min())} to {signed(values.max())} over {len(values)} seeds)" if len(values) > 1 else shown


def across(table: pd.DataFrame, what: str, column: str, where: dict[str, str]) -> str:
    """What changes by how much, of the lines of a table whose columns are as `where` says, one per seed."""
    lines = table[(table[list(where)] == list(where.values())).all(axis=1)]
    lines = lines.dropna(subset=column)
    said = [f"{ranged(of[column])} (`{backbone}`)" for backbone, of in lines.groupby("backbone", sort=False)]
    return f"- {what} {listed(said)}." if said else ""


def transplanted(table: pd.DataFrame) -> str:
    """What the parent's located band and its best single block do to the adapted model's text ASR, of F10's lines."""
    text, said = table[(table["measure"] == "text_asr") & (table["kind"] == "band")], []
    for backbone, of in text.groupby("backbone", sort=False):
        one = of[of["width"] == 1].groupby("start")["change"]
        own = of[of["located"].astype(bool)]["change"]
        parts = [f"the located band by {ranged(own)}"] if len(own) else []
        best = one.mean().nsmallest(1).index
        parts += [f"block {block:.0f}, the best single one, by {ranged(one.get_group(block))}" for block in best]
        said.append(f"- The parent's blocks put back, text ASR changes in `{backbone}`: {', '.join(parts)}.")
    return "\n".join(said)


def placed(table: pd.DataFrame) -> str:
    """Whether the located band is a place of its own: against other sets of as many blocks, of F10's lines."""
    of = table[(table["which"] == "located") & (table["measure"] == "text_asr")]
    if of.empty:
        return ""
    less, more = (of["difference_low"] > 0).sum(), (of["difference_high"] < 0).sum()
    widths = "–".join(str(width) for width in sorted({of["width"].min(), of["width"].max()}))
    apart = listed(f"{signed(lines['difference'].mean())} (`{name}`)" for name, lines in of.groupby("backbone", sort=False))
    return (
        f"- The located band ({widths} blocks wide) against other sets of as many blocks, put back: clearly less text safety in "
        f"{less} of {len(of)} studies, clearly more in {more}; text ASR is higher by {apart} points."
    )


def dominated(table: pd.DataFrame) -> str:
    """Whether merging dominates, and whether any rule dominates the linear one, of the lines of `merging.verdicts`."""
    by = table.groupby("backbone", sort=False)
    return "\n".join(f"- `{backbone}`: {merging.answer(of)} {merging.beyond_linear(of)}" for backbone, of in by)


def unmerged(table: pd.DataFrame) -> str:
    """In how many studies validation chose an end of the line between two models, where nothing is merged, of T07's choices."""
    linear = table[table["chosen"] & (table["rule"] == "linear")]
    ends = [f"{of['ratio'].isin((0, 1)).sum()} of {len(of)} studies with `{name}`" for name, of in linear.groupby("partner")]
    return f"- Validation chose an end of the line, at which nothing is merged, in {listed(ends)}." if ends else ""


def worst(table: pd.DataFrame) -> str:
    """What the worst of some further fine-tunings does to each remedy's text ASR, of T10's lines."""
    said, text = [], durability.worst_sheet(table[table["measure"] == "text_asr"])
    for backbone, of in text.groupby("backbone", sort=False):
        rises = [f"of {line.model} from {line.before} to {line.worst}, {line.change}" for line in of.itertuples()]
        what = f"The worst fine-tuning of those that keep helpfulness takes text ASR of `{backbone}` (percent; seeds:"
        said.append(f"- {what} {of['seeds'].max()}) {'; '.join(rises)}.")
    return "\n".join(said)


def restored(table: pd.DataFrame) -> str:
    """What a model is whose language model is the parent's again, behind the projector of the adapted one, of T08's lines."""
    what = "put back to the parent's and the adapted projector kept, where validation chooses that"
    return "\n".join(f"- All language weights of `{backbone}` {what}: {text}." for backbone, text in put_back(table).items())


def put_back(table: pd.DataFrame) -> dict[str, str]:
    """Backbone -> rates of the model that has the parent's language weights and the adapted projector, of T08's lines."""
    said, names = {}, ("text_asr", "multimodal_asr", "twin_refusal", "helpfulness")
    for backbone, of in table[table["recipe"] == "linear/filtered-full+aligned/1.00"].groupby("backbone", sort=False):
        said[backbone] = ", ".join(f"{MEASURES[name]['label']} {percent(of[of['measure'] == name])}" for name in names)
    return said
