"""What a notebook and README open with: the answer, in the rules of `sentences`, of the committed tables."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from vlsafe.analysis import claims, durability, sentences
from vlsafe.analysis.measures import MEASURES, bounds, run_names
from vlsafe.analysis.sentences import flag, listed, over_seeds, percent, points, signed, verdict
from vlsafe.core.schema import MAIN_LINE

LEDGER = "T09_claims"
NOTHING = "*No results of this scale are committed: what follows is of this study alone.*"


def title(models: pd.DataFrame, ledger: pd.DataFrame) -> str:
    """Whether adaptation raises ASR, and how much of it how-tos and seeing do: T08's lines and the ledger."""
    measured = ledger[ledger["item_level"] != claims.NOT]
    rise = measured[measured["claim"] == RISE]
    held = (rise["item_level"] == claims.SUPPORTED).tolist()
    start = "Adaptation does" if held and all(held) else "Adaptation does in part" if any(held) else UNDECIDED
    start = "Adaptation does not" if set(rise["item_level"]) == {claims.CONTRADICTED} else start
    alone = {claim: measured[(measured["claim"] == claim) & measured["backbone"].isin(models["backbone"])] for claim in ALONE}
    both = [of for of in alone.values() if len(of)]
    start += HARDLY * (len(both) == len(ALONE) and bool(any(held)) and all(map(_little, both)))
    verdicts = {line.backbone: "" if all(held) else f": {verdict(line)}" for line in rise.itertuples()}
    seeds = {name: f" ({_seeds(models[models['backbone'] == name])})" for name in verdicts}
    means = "".join(set(seeds.values())) if len(set(seeds.values())) == 1 else ""
    ends = [f"in `{name}`{'' if means else seeds[name]} {_moved(models, name)}{text}" for name, text in verdicts.items()]
    said = f"{start}{means}: {'; '.join(ends)}." if ends else f"{start}."
    changes = [f"{ALONE[claim]} changes by {_sizes(of)}" for claim, of in alone.items() if len(of)]
    said += f" {WITHOUT} {listed(changes)} points (exploratory)." if changes else ""
    more = measured[(measured["claim"] == HOWTOS) & measured["backbone"].isin(models["backbone"])]
    return said + (f" {HOWTOS_ADD} {_sizes(more)} points ({_claimed(more)})." if len(more) and changes else "")


def _little(lines: pd.DataFrame) -> bool:
    """Whether intervals of a claim's effects lie within what would matter, in every parent."""
    return bool((lines[["low", "high"]].abs().max(axis=1) < lines["interest"]).all())


def _sizes(lines: pd.DataFrame) -> str:
    return listed(f"{signed(line.effect)} (`{line.backbone}`{', one seed' * (line.seeds == 1)})" for line in lines.itertuples())


def _claimed(lines: pd.DataFrame) -> str:
    return f"claim {lines['claim'].iloc[0]}: {listed(dict.fromkeys(lines['item_level']))}"


def _seeds(models: pd.DataFrame) -> str:
    """How many seeds `_moved` has of a backbone, of T08's lines."""
    counts = {len(pair[0]) for measure in BOTH if (pair := _ends(models, measure))}
    return f"means of {' and '.join(map(str, sorted(counts)))} seeds" if counts - {1} else "one seed"


def _moved(models: pd.DataFrame, backbone: str) -> str:
    """Means of both ASRs before adaptation (text: the parent, with pictures: stage 1) and after, of T08's lines."""
    of = {measure: _ends(models[models["backbone"] == backbone], measure) for measure in BOTH}
    means = {measure: " to ".join(f"{_mean(one)} %" for one in pair) for measure, pair in of.items() if pair}
    return ", ".join(f"{MEASURES[measure]['label']} from {ends}" for measure, ends in means.items()).replace(
        " from", " goes from", 1
    )


def _mean(lines: pd.DataFrame) -> str:
    return bounds(lines["value"].mean(), lines["value_high"].mean() if "value_high" in lines else None)


def _ends(models: pd.DataFrame, measure: str) -> tuple[pd.DataFrame, pd.DataFrame] | None:
    """The lines of a measure before adaptation (the parent's, or stage 1's where it was not asked) and after, of the seeds that
    have both; None without."""
    by = dict(list(models[models["measure"] == measure].assign(run=run_names).groupby("run")))
    first, last = by.get(MAIN_LINE["parent"], by.get(MAIN_LINE["stage 1"])), by.get(MAIN_LINE["adapted"])
    if first is None or last is None or not (seeds := {*first["seed"]} & {*last["seed"]}):
        return None
    return first[first["seed"].isin(seeds)], last[last["seed"].isin(seeds)]


def fell(models: pd.DataFrame) -> str:
    """What adaptation did to each parent on every safety benchmark, of T08's lines; with pictures from stage 1 on."""
    return sentences.table(_both(models, SAFETY), "before adaptation (in words the parent, with pictures stage 1) → after")


def _both(models: pd.DataFrame, names: Sequence[str]) -> dict[str, dict[str, str]]:
    """Measure -> backbone -> its rates before and after adaptation, of T08's lines."""
    rows: dict[str, dict[str, str]] = {}
    for measure, backbone in itertools.product(names, models["backbone"].unique()):
        if pair := _ends(models[models["backbone"] == backbone], measure):
            rows.setdefault(MEASURES[measure]["label"], {})[backbone] = " → ".join(map(percent, pair))
    return rows


def without_pictures(models: pd.DataFrame) -> str:
    """What is left of multimodal ASR after DPO on pairs of each modality, of T08's lines."""
    tuned = models[(models["measure"] == "multimodal_asr") & (models["stage"] == "safety")]
    rows = {
        f"multimodal ASR after DPO {what}": {name: percent(lines) for name, lines in of.groupby("backbone", sort=False)}
        for recipe, what in PAIRS.items() if len(of := tuned[tuned["recipe"] == recipe])
    }  # fmt: skip
    return sentences.table(rows, "are pictures needed in safety data?")


PAIRS = {"dpo-text-full": "on pairs in words", "dpo-image-full": "on pairs with pictures", "dpo-both-full": "on both"}
BOTH = ("text_asr", "multimodal_asr")
SAFETY = (*BOTH, "wildjailbreak_asr", "siuo_asr", "figstep_asr", "twin_refusal", "exaggerated_refusal")


def answers(models: pd.DataFrame, ledger: pd.DataFrame) -> pd.DataFrame:
    """What the answer to the title rests on, a line each and a column per backbone: T08's lines and the ledger."""
    cells: dict[str, dict[str, str]] = {}
    for what, (measure, model) in RATES.items():
        of = models[(models["measure"] == measure) & (run_names(models) == MAIN_LINE[model])]
        for backbone, lines in of.groupby("backbone", sort=False):
            n = f" (one seed, n = {lines['n'].iloc[0]:.0f})" * (len(lines) < 2)
            cells.setdefault(f"{what}, {model}", {})[backbone] = percent(lines) + n
    cells |= {f"{label}, stage 1 → adapted": of for label, of in _both(models, BESIDE).items()}
    cells |= {BACK: back} if (back := sentences.put_back(models)) else {}
    measured = ledger[ledger["item_level"] != claims.NOT]
    for claim, (what, sign) in TITLE.items():
        for line in measured[measured["claim"] == claim].itertuples():
            size = points(sign * line.effect, *sorted((sign * line.low, sign * line.high)))
            name = f"{what}, points{' (exploratory)' * (line.status == claims.EXPLORATORY)}"
            cells.setdefault(name, {})[line.backbone] = f"{size}; {over_seeds(line, sign=sign)}{flag(line)}"
    for line in measured[measured["claim"].isin((RISE, CLEAN))].itertuples():
        cells.setdefault(f"claim {line.claim}: {line.statement}", {})[line.backbone] = verdict(line).replace("**", "")
    return pd.DataFrame.from_dict(cells, orient="index").rename(columns="`{}`".format).rename_axis("").reset_index()


def contradicted(ledger: pd.DataFrame) -> str:
    """The claims that are contradicted over items in every parent, registered ones first, with their effects by parent."""
    measured, said = ledger[ledger["item_level"] != claims.NOT], []
    for claim, of in measured.sort_values("status", ascending=False, kind="stable").groupby("claim", sort=False):
        if len(of) == ledger["backbone"].nunique() and set(of["item_level"]) == {claims.CONTRADICTED}:
            part, alike = ": {}" * (claim in sentences.SEVERAL), of["against"].nunique() == 1
            part += ", threshold {}" * (not alike)
            ends = [(points(one.effect, one.low, one.high), one) for one in of.itertuples()]
            sizes = ", ".join(f"{size} (`{one.backbone}`{part.format(one.part, signed(one.against))})" for size, one in ends)
            what = f"{of['statement'].iloc[0]}*{' (exploratory)' * (of['status'].iloc[0] == claims.EXPLORATORY)}"
            threshold = f", threshold {signed(of['against'].iloc[0])}" * bool(alike and of["against"].iloc[0])
            seeds = f"contradicted over seeds in {(of['seed_level'] == claims.CONTRADICTED).sum()} of {len(of)}"
            said.append(f"- *{what}: {sizes}{threshold}; {seeds}.")
    return "\n".join(said)


BESIDE = (
    "multimodal_asr_beside", "multimodal_asr_blank", "multimodal_asr_printed", "multimodal_asr_strings", "figstep_asr",
    "siuo_asr",
)  # fmt: skip
RISE, CLEAN, SEEING, HOWTOS = "3", "3b", "4h", "4d"  # the claims that answer the title
ALONE = {SEEING: "text ASR", "4i": "multimodal ASR"}  # of stage 2 without how-tos
HARDLY = ", seeing by itself hardly does"  # where both of these are smaller than what would matter, in every parent
UNDECIDED = "Not decided for text and pictures together"  # which claim 3 asks for
BACK = "adapted, its language weights put back to the parent's (where validation chooses that)"
WITHOUT = "Trained on rows that only ask what a picture shows, without how-tos (harmless requests for help),"
HOWTOS_ADD = "With them text ASR is higher than without by"
RATES = {  # of T08
    "text ASR (harmful requests in words that are answered)": ("text_asr", "parent"), "text ASR": ("text_asr", "adapted"),
    "multimodal ASR (beside pictures)": ("multimodal_asr", "stage 1"), "multimodal ASR": ("multimodal_asr", "adapted"),
    "harmless picture requests refused": ("twin_refusal", "stage 1"), "such requests refused": ("twin_refusal", "adapted"),
}  # fmt: skip
TITLE = {  # what the effects of two are, and their sign there
    SEEING: ("trained to see without any how-to: text ASR less the parent's", 1),
    "4b": ("the same rows told in words instead of shown: text ASR less the adapted model's", -1),
}  # fmt: skip


Part = Callable[[Callable[[str], pd.DataFrame]], str]  # of an answer, from what reads a table by its name


def _by(rule: Callable[..., str], name: str, *values: Any) -> Part:
    return lambda table: rule(table(name), *values)


def _claims(*names: str) -> Part:
    return _by(sentences.verdicts, LEDGER, names)


def _of(stage: str, *measures: str) -> Part:
    return _by(sentences.rates, "T02_degradation", stage, measures)


def lasting(lives: pd.DataFrame) -> str:
    """Which remedies outlast a further fine-tuning on harmless text, of T10's lines."""
    said = durability.answer(lives[lives["rows"] == "text"])
    return f"- Fine-tuned again: {said}" if said else ""


def _titled(table: Callable[[str], pd.DataFrame]) -> str:
    said = title(table("T08_models"), table(LEDGER))
    return f"- Does teaching it to see make it less safe? {said}"


RAW = (
    "Without the filter text ASR changes by", "difference", dict(measure="text_asr", at="equal steps", recipe="unfiltered-full"),
)  # fmt: skip
BLANK = (
    "A blank picture beside a request in words changes its ASR by", "difference",
    {"measure": "confounds_asr", "stage": "instruct", "condition": "blank"},
)  # fmt: skip
ABLATED = (
    "The refusal direction ablated, the parent's text ASR changes by", "change",
    {"measure": "text_asr", "of": "parent/aligned", "what": "ablated"},
)  # fmt: skip
OPENINGS: dict[str, tuple[Part, ...]] = {
    "00_world": (_of("parent", "text_asr", "exaggerated_refusal", "capability_howto-text"), _by(sentences.missed, "T00_gates")),
    "01_data_filtering": (
        _by(sentences.guards, "T01_guard_quality"), _by(sentences.across, "T03_arms", *RAW), _claims("3c", "3b"),
    ),
    "02_vl_adaptation": (_of("instruct", "helpfulness", "capability_caption-icon", "capability_howto-icon"), _claims("4h", "4i")),
    "03_safety_degradation": (
        _by(fell, "T08_models"), _claims("3", "3b", "1", "4c", "4h", "4k", "4j", "4l", "4m", "4b"),
        _by(sentences.across, "T04_confounds", *BLANK),
    ),
    "04_safety_tuning": (_claims("5", "5p", "5h", "5r", "5b", "5br", "6", "6p", "6h", "6r"), _by(without_pictures, "T08_models")),
    "05_probing": (
        _by(sentences.transplanted, "F10_transplants"), _by(sentences.placed, "F10_against_random"),
        _by(sentences.across, "F10_directions", *ABLATED),
        _claims("7", "7b", "8", "8b", "9", "9b"),
    ),
    "06_merging": (
        _by(sentences.dominated, "T07_dominance"), _by(sentences.unmerged, "T07_choice"), _by(sentences.restored, "T08_models"),
        _claims("10", "10b", "11", "13", "13b", "13c", "13d", "13e", "14", "14e", "15"), _by(lasting, "T10_half_lives"),
        _by(sentences.worst, "T10_worst_case"),
    ),
    "07_claims": (_titled, _claims("3", "5", "6", "10"), _by(sentences.counted, LEDGER)),
}  # fmt: skip
"""Notebook -> what its answer is made of."""


def opening(notebook: str, folder: Path) -> str:
    """The answer of a notebook in Markdown, of the committed tables in a folder; of those parts whose tables are there."""
    said = []
    for part in OPENINGS[notebook]:
        try:
            said.append(part(lambda name: claims.written(folder) if name == LEDGER else pd.read_csv(folder / f"{name}.csv")))
        except FileNotFoundError:
            continue
    return "\n\n".join(filter(None, said)) or NOTHING
