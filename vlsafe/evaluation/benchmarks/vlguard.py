"""VLGuard's test set: harmful pictures, harmless pictures with a harmful request, harmless ones with a harmless request.

Metric: ASR by the authors' keyword list on the first two subsets, refusal rate on the third. Official files only; the
miniature asks the same with its benign twins.

Source:   Zong et al. 2024
"""

from __future__ import annotations

import zipfile
from collections import Counter
from pathlib import Path

from vlsafe.core.schema import Item, Turn
from vlsafe.evaluation.benchmarks import official

NAME = "vlguard"
FOLDER, OFFICIAL, DIVERGENCES, TABLES = official.published(NAME)
LARGEST = 2**26  # bytes of one picture in an archive; a larger one is taken for missing
SIZES = TABLES["sizes"]
QUALIFIERS = {"subset": official.GROUP}


def load(folder: Path, subset: str = "all", pictures: bool = True) -> tuple[list[Item], list[str]]:
    """`test.json` in three groups; pictures lie in `test/`, beside it, or still in `test.zip`."""
    path = official.located(folder, FOLDER, "test.json")
    loader, sizes = official.Loader(pictures), Counter[str]()
    packed = zipfile.ZipFile(path.with_suffix(".zip")) if pictures and path.with_suffix(".zip").exists() else None
    for row in official.read_json(path):
        official.needs(row, ("id", "image", "safe", "instr-resp"), "a row of test.json")
        exchanges = row["instr-resp"]
        keys = ["safe_instruction", "unsafe_instruction"] if row["safe"] else ["instruction"]
        if [key for exchange in exchanges for key in exchange if key != "response"] != keys:
            raise ValueError(f"row {row['id']} of test.json has other instructions than {', '.join(keys)}, in this order")
        data = _picture(path.parent, packed, row["image"]) if pictures else None
        groups = ("safe_safes", "safe_unsafes") if row["safe"] else ("unsafes",)
        sizes[groups[0]] += 1
        for group, key, exchange in zip(groups, keys, exchanges, strict=True):
            turns, category = (Turn("user", exchange[key]),), None if row["safe"] else row.get("harmful_subcategory")
            known = dict(category=category, cluster=row["id"], group=group, harmful=group != "safe_safes", note=row["image"])
            loader.add(Item(f"{group}/{row['id']}", NAME, turns, (), exchange["response"], **known), data, row["id"])
    if packed:
        packed.close()
    loader.notes += [note for group in sizes for note in official.counted(f"rows of {group}", sizes[group], SIZES[group])]
    return loader.result()


def names(item: Item) -> tuple[str, ...]:
    """The row's id with its subset or (with `subset`) alone; or its picture, as the authors' results name it."""
    return item.id, item.id.removeprefix(f"{item.group}/"), str(item.note)


def _picture(where: Path, packed: zipfile.ZipFile | None, image: str) -> bytes | None:
    names = f"test/{image}", image
    if path := official.first(where, *names):
        return path.read_bytes() if path.is_file() else None
    if packed is None:
        return None
    return next((packed.read(m) for m in packed.infolist() if m.filename in names and m.file_size < LARGEST), None)


def scores(marks: official.Marks) -> official.Scores:
    """ASR on `unsafes` (also per harm) and `safe_unsafes`, refusal rate on `safe_safes`."""
    for judge, rows in marks.items():
        for group in SIZES:
            metric, event = ("refusal_rate", "refused") if group == "safe_safes" else ("ASR", "complied")
            events = official.judged(judge, event, [row for row in rows if row.item.group == group])
            yield from official.shares(metric, judge, events, {"harm": official.CATEGORY}, f"subset={group}")
