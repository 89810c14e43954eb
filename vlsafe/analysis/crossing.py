"""What other tables say about a ledger: models of a comparison that cannot answer, merges that T07 calls dominated, another
scale's ledger."""

from __future__ import annotations

from fnmatch import fnmatchcase

import pandas as pd

from vlsafe.analysis.claims import CLAIMS, CONTRADICTED, DIFFERS, NOT, SUPPORTED, leaves
from vlsafe.analysis.measures import signed


def flagged(ledger: pd.DataFrame, capable: pd.DataFrame | None) -> pd.DataFrame:
    """A ledger with `flagged`: which of the models that a claim compares cannot answer, in which seeds and why.

    `capable` has the lines of `capability.guard`; None where no model was examined in full.
    """
    if capable is None:
        return ledger.assign(flagged="")
    missed = capable[capable["capable"].str.startswith("no")]
    missed = missed.assign(run=missed["stage"] + "/" + missed["recipe"], why=missed["capable"].str.removeprefix("no: "))
    parts = {claim.name: leaves(claim.decided_by) for claim in CLAIMS}

    def text(name: str, backbone: str) -> str:
        globs = {run for part in parts[name] for run in (part.before, part.after)}
        compared = missed["run"].map(lambda run: any(fnmatchcase(run, glob) for glob in globs)).astype(bool)
        found = missed[compared & (missed["backbone"] == backbone)].groupby(["run", "why"], sort=False)["seed"]
        return "; ".join(f"{run}, seed {', '.join(map(str, seeds))}: {why}" for (run, why), seeds in found)

    return ledger.assign(flagged=[text(*of) for of in zip(ledger["claim"], ledger["backbone"], strict=True)])


def crossed(ledger: pd.DataFrame, dominance: pd.DataFrame | None) -> pd.DataFrame:
    """A ledger in which no claim on a merge is supported that the table of merges denies in some seed: it differs by seed.

    `dominance` has the lines of `merging.verdicts`; None where no merge was compared.
    """
    if dominance is None:
        return ledger
    lost = dominance[(dominance["rule"] == "inside") & dominance["verdict"].isin(["is dominated", "trades"])]
    lost = lost[lost["reference"] != "adapted"]
    denied = set(zip(lost["backbone"], "+" + lost["partner"] + "/", lost["reference"] == "ensemble", strict=True))
    parts = {claim.name: leaves(claim.decided_by) for claim in CLAIMS}
    falls = [
        any(of == backbone and partner in part.after and ensemble == ("/ensemble/" in part.before)
            for part in parts[name] for of, partner, ensemble in denied)
        for name, backbone in zip(ledger["claim"], ledger["backbone"], strict=True)
    ]  # fmt: skip
    levels = ("item_level", "seed_level")
    return ledger.assign(
        **{of: ledger[of].mask(pd.Series(falls, ledger.index) & (ledger[of] == SUPPORTED), DIFFERS) for of in levels}
    )


def beside(ledger: pd.DataFrame, other: pd.DataFrame) -> pd.DataFrame:
    """Two ledgers side by side, one line per claim: the item-level verdict of every backbone, the effect in points, and whether
    all backbones that measured the claim agree ("alike"), some contradict what others support ("opposite"), or some do not
    decide ("not all decide"); the ledger's own backbones come first."""
    ledger = ledger[~ledger["backbone"].isin(other["backbone"])]  # a claim about one backbone has its line in every ledger
    both = pd.concat([ledger, other], ignore_index=True)
    effect = both["effect"].map(lambda value: "" if pd.isna(value) else f" ({signed(value)})")
    statements = both.drop_duplicates("claim").set_index("claim")["statement"]  # that of the claims as they are now
    wide = both.assign(cell=both["item_level"] + effect).pivot(index="claim", columns="backbone", values="cell")
    wide = wide.reindex(statements.index)[list(dict.fromkeys(both["backbone"]))]
    measured = both[both["item_level"] != NOT]
    verdicts = measured.groupby("claim")["item_level"].agg(_together)
    own = set(ledger["backbone"])
    sides = measured.groupby("claim")["backbone"].agg(lambda of: {name in own for name in of} == {True, False})
    alike = [verdicts[claim] if sides.get(claim, False) else NOT for claim in wide.index]
    wide.insert(0, "statement", statements)
    return wide.assign(**{"both scales": alike}).reset_index()


def _together(verdicts: pd.Series) -> str:
    """Whether verdicts on one claim agree."""
    if verdicts.nunique() == 1:
        return "alike"
    return "opposite" if {SUPPORTED, CONTRADICTED} <= set(verdicts) else "not all decide"
