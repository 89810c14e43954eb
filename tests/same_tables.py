"""Whether two run stores, or two folders of tables, hold the same numbers: every Parquet and CSV file, cell by cell.

    python tests/same_tables.py RUNS_BEFORE RUNS_AFTER [COLUMN …]

Prints how many tables were compared and what differs; exit code 1 where anything does. Columns may have been renamed: tables are
then compared by position, and the renaming is printed. Columns named after the folders hold words and are not compared.
"""

import sys
from pathlib import Path

import pandas as pd

READ = {".parquet": pd.read_parquet, ".csv": pd.read_csv}


def tables(folder):
    return {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.suffix in READ}


def difference(before, after, words):
    """What differs between two files, or an empty text."""
    a, b = (READ[path.suffix](path).drop(columns=words, errors="ignore") for path in (before, after))
    renamed = [f"{x} -> {y}" for x, y in zip(a.columns, b.columns, strict=False) if x != y]
    if a.shape != b.shape:
        return f"{a.shape} against {b.shape}"
    try:
        pd.testing.assert_frame_equal(a, b.set_axis(a.columns, axis=1), check_exact=True)
    except AssertionError as error:
        return " ".join(str(error).split())[:300]
    if renamed:
        print(f"{after.name}: columns renamed: {', '.join(renamed)}")
    return ""


def main(before, after, words):
    one, two = tables(before), tables(after)
    found = {name: difference(one[name], two[name], words) for name in one if name in two}
    wrong = {name: text for name, text in found.items() if text} | dict.fromkeys(set(one) ^ set(two), "is in one only")
    for name, text in sorted(wrong.items()):
        print(f"{name}: {text}")
    print(f"{len(found)} tables compared, {len(wrong)} differ")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:3]), sys.argv[3:]))
