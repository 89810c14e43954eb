"""VLGuard's test set: harmful pictures, harmless pictures with a harmful request, harmless ones with a harmless request.

Metric: ASR by the authors' keyword list on the first two subsets, refusal rate on the third. Official files only; the
miniature asks the same with its benign twins.

Source:   Zong et al. 2024
"""

from __future__ import annotations

import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlsafe.core.schema import Item, Turn
from vlsafe.evaluation.benchmarks import official

NAME = "vlguard"
FOLDER = "VLGuard"
OFFICIAL = {"all": ("vlguard-strings",)}
LARGEST = 2**26  # bytes of one picture in an archive; a larger one is taken for missing
SIZES = {"unsafes": 442, "safe_unsafes": 558, "safe_safes": 558}
QUALIFIERS = {"subset": official.GROUP}
DIVERGENCES = (
    "typographic apostrophes are made straight first; vlguard-strings-literal leaves them",
    "keywords such as 'illegal' also stand in answers that comply, so the list under-estimates ASR: judge by a second one",
    "safe_safes: the original's GPT-4V win rate against reference answers is not computed; the refusal rate stands in its place",
)


def load(folder: Path, subset: str = "all", pictures: bool = True) -> tuple[list[Item], list[str]]:
    """`test.json` in three groups; pictures lie in `test/`, beside it, or still in `test.zip`."""
    path = official.located(folder, FOLDER, "test.json")
    items, lost, sizes = list[Item](), list[str](), Counter[str]()
    packed = zipfile.ZipFile(path.with_suffix(".zip")) if pictures and path.with_suffix(".zip").exists() else None
    for row in official.read_json(path):
        official.needs(row, ("id", "image", "safe", "instr-resp"), "a row of test.json")
        exchanges = row["instr-resp"]
        keys = ["safe_instruction", "unsafe_instruction"] if row["safe"] else ["instruction"]
        if [key for exchange in exchanges for key in exchange if key != "response"] != keys:
            raise ValueError(f"row {row['id']} of test.json has other instructions than {', '.join(keys)}, in this order")
        images = _picture(path.parent, packed, row, lost) if pictures else ()
        groups = ("safe_safes", "safe_unsafes") if row["safe"] else ("unsafes",)
        sizes[groups[0]] += 1
        for group, key, exchange in zip(groups, keys, exchanges, strict=True):
            if images or not pictures:
                turns, category = (Turn("user", exchange[key]),), None if row["safe"] else row.get("harmful_subcategory")
                known = dict(category=category, cluster=row["id"], group=group, harmful=group != "safe_safes")
                items.append(Item(f"{group}/{row['id']}", NAME, turns, images, exchange["response"], **known))
    if packed:
        packed.close()
    notes = [note for group in sizes for note in official.counted(f"rows of {group}", sizes[group], SIZES[group])]
    return items, notes + official.lost_pictures(lost)


def _picture(where: Path, packed: zipfile.ZipFile | None, row: Mapping[str, Any], lost: list[str]) -> tuple[bytes, ...]:
    names = f"test/{row['image']}", row["image"]
    path, data = official.first(where, *names), None
    if path is None and packed is not None:
        members = (member for member in packed.infolist() if member.filename in names and member.file_size < LARGEST)
        data = next((packed.read(member) for member in members), None)
    return official.picture(path, row["id"], lost, data)


def scores(marks: official.Marks) -> official.Scores:
    """ASR on `unsafes` (also per harm) and `safe_unsafes`, refusal rate on `safe_safes`."""
    for judge, rows in marks.items():
        for group in SIZES:
            metric, event = ("refusal_rate", "refused") if group == "safe_safes" else ("ASR", "complied")
            events = official.judged(judge, event, [row for row in rows if row.item.group == group])
            yield from official.shares(metric, judge, events, {"harm": official.CATEGORY}, f"subset={group}")
