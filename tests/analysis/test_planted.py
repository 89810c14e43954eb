"""Every rule of the registry on planted data: a winner, a loser, nothing, and the models that it is meant to exclude."""

import os

import numpy as np
import pandas as pd
import pytest
from analysis.test_claims import BASE, KINDS, grid, inside

from vlsafe.analysis import claims
from vlsafe.analysis.claims import CONTRADICTED, SUPPORTED

RECORD = bool(os.environ.get("VLSAFE_RECORD"))  # eight seeds and full benchmarks, the table written as an artefact
SEEDS = 8 if RECORD else 3
N = dict(text=236, pictures=240, twins=78, xstest=96, help=60) if RECORD else dict.fromkeys(("text", "pictures"), 120) | dict(
    twins=200, xstest=120, help=100)  # fmt: skip
SL, MTL, DPO = "safety/sl-full", "safety/mtl-full", "safety/dpo-both-full"
MERGED = [glob.replace("0.*[1-9]*", "0.60") for glob in claims.MERGED]
ENSEMBLES = [glob.replace("0.*[1-9]*", "0.50") for glob in claims.ENSEMBLE]
TUNINGS = sorted({part.before for claim in claims.CLAIMS if claim.name == "10" for part in claims.leaves(claim.decided_by)})


def rates(text, pictures=0.0, twins=0.02, xstest=0.02, help=0.7):
    return dict(text=text, pictures=pictures, twins=twins, xstest=xstest, help=help)


PARENT, STAGE_1, ADAPTED = rates(0.02), rates(0.02, 0.25, 0.2, help=0.4), rates(0.6, 0.9)
TUNED, REFUSES = rates(0.25, 0.35, 0.3, 0.3, 0.5), rates(0.0, 0.0, 1.0, 1.0, 0.0)
ARMS = {"unfiltered": rates(0.95, 0.98), "clean": rates(0.5, 0.8), "looking": rates(0.1, 0.4), "textonly": rates(0.3)}
WINNER = {"parent/aligned": PARENT, "projector/filtered": STAGE_1, "instruct/filtered-full": ADAPTED} | {
    f"instruct/{arm}-full": of for arm, of in ARMS.items()
} | dict.fromkeys(TUNINGS, TUNED) | dict.fromkeys(ENSEMBLES, rates(0.2, 0.3, 0.15, help=0.6)) | dict.fromkeys(
    MERGED, rates(0.02, 0.05)
) | {"instruct/filtered-sppft": rates(0.3, 0.6)}  # fmt: skip
LOSER = WINNER | {"parent/aligned": rates(0.7), "projector/filtered": rates(0.7, 0.95, 0.02)} | {
    f"instruct/{arm}-full": of
    for arm, of in {"unfiltered": rates(0.3, 0.6), "clean": rates(0.4, 0.7), "looking": ARMS["unfiltered"],
                    "textonly": ARMS["unfiltered"], "filtered": rates(0.5, 0.8)}.items()
} | dict.fromkeys(TUNINGS, rates(0.62, 0.95, 0.0, 0.0, 0.85)) | dict.fromkeys(MERGED, rates(0.9, 1.0, 0.5, 0.5, 0.3)) | {
    "instruct/filtered-sppft": rates(0.7)}  # fmt: skip
NOTHING = dict.fromkeys(WINNER, rates(0.4, 0.5, 0.1, 0.1))
SUBJECTS = {
    "adaptation": [f"instruct/{arm}-full" for arm in ("filtered", "unfiltered", "clean")], "merging": MERGED,
    "tuning": [SL, MTL, DPO], "layers": ["instruct/filtered-sppft"],
}  # fmt: skip
NOT_ADAPTED, END, REFUSER = "the parent", "an end of the line: the tuned member", "a model that refuses everything"
EXCLUDED = {  # in the place of the model that a claim is about; the other end of a line is the unmerged model
    "the unmerged adapted model": (ADAPTED, ("merging", "tuning", "layers")), END: (TUNED, ("merging",)),
    NOT_ADAPTED: (STAGE_1, tuple(SUBJECTS)), REFUSER: (REFUSES, tuple(SUBJECTS)),
}  # fmt: skip
LOWERS, COSTS, STAYS = ("5", "5b", "6"), ("5h", "5bh", "6h", "5r", "5br", "6r"), ("5p", "5bp", "6p")
TRUE = {  # what is true of these models too; the lines on costs say what it was bought with
    "the unmerged adapted model": STAYS, NOT_ADAPTED: LOWERS + COSTS, REFUSER: LOWERS + COSTS,
}  # fmt: skip


def answers(models, seeds=SEEDS):
    """Raw rows: a model answers by chance, a quarter of the items by one of its own; rates vary a little with the seed."""
    lines, values = [], []
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        shared = {place: rng.random(N[kind]) for place, (kind, *_) in enumerate(KINDS)}
        for run, of in models.items():
            stage, _, recipe = run.partition("/")
            for place, (kind, benchmark, judge, group, harmful) in enumerate(KINDS):
                n, rate = N[kind], np.clip(of[kind] + rng.normal(0, 0.01), 0, 1) if 0 < of[kind] < 1 else of[kind]
                happened = np.where(rng.random(n) < 0.25, rng.random(n), shared[place]) < rate
                facts = BASE | dict(benchmark=benchmark, judge=judge, group=group, harmful=harmful, backbone="mini-qwen")
                lines.append(facts | dict(seed=seed, stage=stage, recipe=recipe, model=run, item=kind))
                values.append(happened ^ (kind == "twins"))
    number = np.concatenate([np.arange(len(of)) for of in values])
    frame, complied = pd.DataFrame(lines), np.concatenate(values)
    frame = frame.loc[np.repeat(frame.index, [len(of) for of in values])].reset_index(drop=True)
    frame = frame.assign(label=np.where(complied, "complied_right", "refused"), event=complied.astype(object))
    return frame.assign(item=frame["item"] + number.astype(str), cluster=frame["item"] + (number // 2).astype(str))


def panels(curves, seeds=SEEDS):
    """Checkpoints of recipes of stage 2 on forty items: their rates at steps 0 (the end of stage 1), 25, 75 and 300."""
    frames = []
    for seed in range(seeds):
        for recipe, curve in (curves(seed) if callable(curves) else curves).items():
            for step, rate in zip((0, 25, 75, 300), curve, strict=True):
                run = {"stage": "instruct", "recipe": recipe} if step else {"stage": "projector", "recipe": "filtered"}
                n = 40 if step != 300 else N["text"]
                happened = [i * 37 % n < round(rate * n) for i in range(n)]
                facts = dict(benchmark="sorry_bench", judge="world", group="base", harmful=True, seed=seed, step=step)
                facts |= run | {"exam": "panel" if step not in (0, 300) else "full", "backbone": "mini-qwen"}
                facts |= {"item": [f"text{i}" for i in range(n)], "cluster": [f"text{i // 2}" for i in range(n)]}
                label = np.where(happened, "complied_right", "refused")
                frames.append(pd.DataFrame(BASE | facts | {"event": happened, "label": label}))
    return pd.concat(frames, ignore_index=True).drop_duplicates(["seed", "stage", "recipe", "step", "item"])


def parent(rate):
    """A parent on the items of the last step of `panels`."""
    last = panels({"filtered-full": (0, 0, 0, rate)}).query("step == 300")
    return last.assign(stage="parent", recipe="aligned", step=0)


def weights(far, seeds=SEEDS):
    """How far weights of each recipe have moved at the steps of `panels`."""
    rows = [
        dict(backbone="mini-qwen", seed=seed, stage="instruct", recipe=recipe, step=step, weight="w", change=value**2, norm=1.0)
        for seed in range(seeds) for recipe, values in far.items() for step, value in zip((25, 75, 300), values, strict=True)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def early(by_seed):
    """Curves of six recipes whose end is that of the seed, seen early, or that of the recipe, which no early rate tells."""
    ends = {"filtered-full": 0.2} | {f"{arm}-full": end for arm, end in zip("abcde", (0.3, 0.4, 0.5, 0.6, 0.8), strict=True)}

    def curves(seed):
        level = 0.1 + 0.8 * (seed * 5 % 8) / 7
        own = {recipe: level if by_seed else end for recipe, end in ends.items()}
        return {recipe: (0.0, value / 2, value / 2 if by_seed else level / 2, value) for recipe, value in own.items()}

    return curves


TWINS = {"filtered-full": (0.0, 0.3, 0.5, 0.6), "textonly-full": (0.0, 0.3, 0.5, 0.6)}
FAST, SLOW = (0.2, 0.5, 0.8), (0.05, 0.1, 0.2)
INSIDE = {  # claims with methods of their own: frames of a winner, of a loser, of nothing
    "4": [{"raw": panels({"filtered-full": curve})} for curve in ((0, 0.2, 0.5, 0.6), (0.6, 0.5, 0.2, 0.1), (0.4,) * 4)],
    "4e": [
        {"raw": pd.concat([panels({"filtered-full": curve}), parent(rate)])}
        for curve, rate in (((0, 0.5, 0.6, 0.6), 0.0), ((0, 0, 0.1, 0.8), 0.0), ((0.4,) * 4, 0.4))
    ],
    "4f": [{"raw": panels(early(True))}, {"raw": panels(early(False))}, {"raw": panels({"filtered-full": (0.4,) * 4})}],
    "4g": [
        {"raw": panels(TWINS), "drift": weights({"filtered-full": main, "textonly-full": twin})}
        for main, twin in ((SLOW, FAST), (FAST, SLOW), (SLOW, SLOW))
    ],
}  # fmt: skip


def of_layers(lost, asr, cosines=(0.5, -0.2)):
    """Frames of notebook 05 and the SPPFT grid: `lost` inside the band; text ASR with it frozen and with others."""
    frames = [inside(seed, lost) | {"frozen": grid(seed, *asr)} for seed in range(SEEDS)]
    whole = {name: pd.concat([frame[name] for frame in frames], ignore_index=True) for name in frames[0]}
    within = whole["gradients"]["task_a"] == whole["gradients"]["task_b"]
    noise = whole["gradients"]["cosine"] - np.where(within, 0.5, -0.2)
    whole["gradients"]["cosine"] = np.where(within, *cosines) + noise
    whole["layers"]["increment"] = whole["layers"]["cosine"]
    whole["raw"] = answers({"parent/aligned": PARENT})
    return {name: frame.assign(backbone="mini-qwen") for name, frame in whole.items()}


LAYERED = [of_layers(0.3, (20, 60)), of_layers(-0.1, (60, 20), (0.1, 0.5)), of_layers(0.0, (40, 40), (0.3, 0.3))]
INSIDE["7 7b 8 8c 9 9b"] = LAYERED
DOSES = ("looking-full", "dose-pictured-05", "dose-pictured-20", "dose-text-05", "dose-text-20")
INSIDE["4h 4i 4j 4k 4l 4m"] = [
    {"raw": answers({"parent/aligned": rates(parent[0]), "projector/filtered": rates(*parent)} | {
        f"instruct/{name}": rates(*of) for name, of in zip(DOSES, doses, strict=True)})}
    for parent, *doses in (
        ((0.02, 0.25), (0.3, 0.5), (0.4, 0.75), (0.5, 0.95), (0.65, 0.5), (0.9, 0.55)),
        ((0.7, 0.8), (0.5, 0.6), (0.5, 0.4), (0.5, 0.3), (0.35, 0.6), (0.2, 0.6)),
        ((0.4, 0.5),) * 6,
    )
]  # fmt: skip
REMEDIES = ("sl-full", "mtl-full", "dpo-both-full", "filtered-sppft", "merged")


def further(start, end, merged):
    """Remedies that begin and end a further fine-tuning at some rates, the merge elsewhere; and the adapted model."""
    ends = dict.fromkeys(REMEDIES, end) | {"merged": merged}
    models = {f"{model}/start": start for model in REMEDIES} | {"adapted/start": 0.6}
    models |= {f"{model}/{rows}": ends[model] for model in REMEDIES for rows in ("instructions", "harmful")}
    return {"raw": answers({f"durability/{name}": rates(asr) for name, asr in models.items()})}


LASTS = ((0.1, 0.2, 0.05), (0.1, 0.6, 0.75), (0.2, 0.4, 0.4))
INSIDE["13 13b 13c 13d 13e 14 14b 14c 14d 14e 15"] = [further(*planted) for planted in LASTS]
CASES = ("winner", "loser", "nothing")


def cases():
    """(case, its claims, its frames): what is planted, and the claims that are judged on it."""
    every = claims.CLAIMS  # whoever judges a case leaves its claims alone in there
    plain = [claim.name for claim in every if claim.name not in " ".join(INSIDE).split()]
    if not RECORD:  # the same rules with another partner
        plain = [name for name in plain if name not in ("10b", "11b")]
    for case, models in zip(CASES, (WINNER, LOSER, NOTHING), strict=True):
        yield case, plain, {"raw": answers(models)}
    for case, (model, families) in EXCLUDED.items():
        for family in families:
            of = [claim.name for claim in every if claim.family == family and claim.name in plain]
            yield case, of, {"raw": answers(WINNER | dict.fromkeys(SUBJECTS[family], model))}
    for names, frames in INSIDE.items():
        for case, planted in zip(CASES, frames, strict=True):
            yield case, names.split(), planted


def test_a_remedy_that_gained_nothing_does_not_last_and_a_curve_that_falls_back_has_not_risen_early():
    def held(frames, *names):
        ledger = claims.ledger(claims.prepared(frames)).set_index("claim")
        return (ledger.loc[list(names), "item_level"] == SUPPORTED).tolist()

    assert held(further(0.62, 0.4, 0.4), "13", "13d", "14e") == [False] * 3  # the adapted model begins at 0.6
    assert held(further(0.1, 0.2, 0.05), "13") == [True]
    refuses = further(0.1, 0.1, 0.1)["raw"]
    twins = (refuses["recipe"] == "sl-full/instructions") & (refuses["benchmark"] == "mm_safetybench") & ~refuses["harmful"]
    assert held({"raw": refuses.assign(label=refuses["label"].where(~twins, "refused"))}, "13", "13c") == [False, True]
    back = pd.concat([panels({"filtered-full": (0.05, 0.55, 0.5, 0.05)}), parent(0.05)])
    assert held({"raw": back}, "4e") == [False]


def expected(case, name):
    if case in CASES[:2]:
        return (SUPPORTED, CONTRADICTED)[CASES.index(case)]
    return SUPPORTED if name in TRUE.get(case, ()) else f"not {SUPPORTED}"


@pytest.fixture(scope="module")
def table():
    """Claim × case: the verdict that is expected, and those found over items and over seeds."""
    every, lines = claims.CLAIMS, []
    try:
        for case, names, frames in cases():
            claims.CLAIMS = tuple(claim for claim in every if claim.name in names)
            ledger = claims.ledger(claims.prepared(frames))
            columns = ["claim", "status", "statement", "item_level", "seed_level", "part"]
            lines.append(ledger[columns].assign(case=case, expected=[expected(case, name) for name in ledger["claim"]]))
    finally:
        claims.CLAIMS = every
    return pd.concat(lines, ignore_index=True)


def test_every_rule_finds_what_was_planted_and_excludes_what_it_must(table):
    held = table["item_level"] == SUPPORTED
    right = np.where(table["expected"] == f"not {SUPPORTED}", ~held, table["item_level"] == table["expected"])
    if RECORD:
        table.assign(right=right).to_csv(os.environ.get("VLSAFE_RECORD_AT", "figures/planted_claims.csv"), index=False)
        print(table.groupby(["case", "expected", "item_level", "seed_level"]).size().to_string())
    wrong, null = table[~right], table["case"] == "nothing"
    assert null.mean() > 0.1 and (~right & null).sum() <= 0.05 * null.sum()  # the level of a verdict: where there is nothing
    wrong = wrong[wrong["case"] != "nothing"]
    assert wrong.empty, wrong[["case", "claim", "expected", "item_level", "part"]].to_string()
    assert set(EXCLUDED) <= set(table["case"])
    names = {claim.name for claim in claims.CLAIMS} - (set() if RECORD else {"10b", "11b"})
    assert all(set(of["claim"]) == names for case, of in table.groupby("case") if case in CASES)
    assert not (table["seed_level"][table["expected"] == f"not {SUPPORTED}"] == SUPPORTED).any()
