"""PKU-SafeRLHF: text prompts with two answers, compared by helpfulness and, separately, by harmlessness.

The columns differ in three generations: 2023 has the seven that are required here, mid-2024 adds sources, the current one harm
categories and severities. The safer answer is the chosen one. Where even that answer is unsafe the pair would teach harm, and
is refused (README, departures); SafeRLHF keeps such pairs, as data of a cost model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from vlsafe.core.schema import Pair, Turn
from vlsafe.data.sources.files import Place, Refused, converted, json_lines, names, path_of, text_of

PATTERNS = {split: (f"data/*/{split}.jsonl", f"round0/{split}.jsonl*", f"{split}.jsonl*") for split in ("train", "test")}
REQUIRED = {
    "prompt", "response_0", "response_1", "is_response_0_safe", "is_response_1_safe", "better_response_id", "safer_response_id"
}  # fmt: skip


def raw(place: Place, split: str = "train") -> Iterator[Mapping[str, Any]]:
    """The published rows of every file of a split; ValueError for a file without the required columns."""
    if place.folder is None:
        from datasets import load_dataset

        yield from load_dataset(place.origin.repo, split=split, revision=place.revision, streaming=True)
        return
    files = names(place, PATTERNS[split])
    if not files:
        raise FileNotFoundError(f"{place.folder} below VLSAFE_DATA has none of {', '.join(PATTERNS[split])}")
    for file in files:
        for number, row in enumerate(json_lines(path_of(place, file))):
            if not number and (lacking := REQUIRED - set(row)):
                raise ValueError(f"{file} has no columns {', '.join(sorted(lacking))}; it is not PKU-SafeRLHF")
            yield row


def rows(place: Place) -> Iterator[Pair | Refused]:
    """Preference rows by harmlessness, in the files' order."""
    return converted(raw(place), _pair, "SafeRLHF", prefix="safe-rlhf")


def _pair(row: Mapping[str, Any], name: str) -> Pair | Refused:
    safer = row["safer_response_id"]
    if safer not in (0, 1) or row["better_response_id"] not in (0, 1):
        return Refused(name, "an answer's number is neither 0 nor 1")
    prompt, chosen, rejected = (text_of(row[key]) for key in ("prompt", f"response_{safer}", f"response_{1 - safer}"))
    if not (prompt.strip() and chosen.strip() and rejected.strip()):
        return Refused(name, "a text is missing")
    if not row[f"is_response_{safer}_safe"]:
        return Refused(name, "even the safer answer is unsafe")
    category = None
    if not row[f"is_response_{1 - safer}_safe"]:
        harms = row.get(f"response_{1 - safer}_harm_category") or {}  # only the current generation names them
        category = ", ".join(sorted(harm for harm, present in harms.items() if present)) or "unsafe"
    return Pair(name, "safe-rlhf", (Turn("user", prompt),), chosen, rejected, category=category)
