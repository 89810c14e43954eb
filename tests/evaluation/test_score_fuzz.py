"""`vlsafe score` on damaged inputs: right counts, or one clear line; and no input is ever changed.

Cases are drawn from a seed (`VLSAFE_FUZZ` moves it), so that one that fails is run again by its number.
"""

import gzip
import json
import os
import random
import shutil
from pathlib import Path

import openpyxl
import pytest
from official_files import everything, lines, write

from vlsafe import cli
from vlsafe.core import store
from vlsafe.evaluation.benchmarks import REAL
from vlsafe.evaluation.judges import JUDGES
from vlsafe.evaluation.judges.llm import LLM_JUDGES

SEED, CASES = int(os.environ.get("VLSAFE_FUZZ", 0)), int(os.environ.get("VLSAFE_FUZZ_CASES", 30))
TEXTS = (".json", ".jsonl", ".csv", ".tsv", ".txt", ".py")
PIECES = (
    b"\0", b"\xff", b"\r", b"\n", b"\t", b'"', b",", b"{", b"]", b"\\ud800", b"\\u0000", "\u2028".encode(), "\u0085".encode(),
    b"\x0c", b"1e999", b"NaN", b"null", b"-0", b"9" * 5000, b"[" * 3000, "\u202e".encode(), b"\xc3",
)  # fmt: skip
IDS = (
    None,
    True,
    1,
    1.0,
    1e300,
    -1,
    "",
    " ",
    "0",
    "1 ",
    "\ud83d",
    "\u2028",
    "nan",
    [],
    {},
    ["1"],
    "x" * 10_000,
    "../../x",
    "8991806e48",
)


def cut(rng, data):
    return data[: rng.randrange(len(data) + 1)]


def pierced(rng, data):
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(data) + 1)
        data = data[:at] + rng.choice(PIECES) + data[at + rng.randrange(3) :]
    return data


def random_bytes(rng, data):
    return rng.randbytes(rng.randrange(200))


def encoded(rng, data):
    text = data.decode("utf-8", "replace")
    how = rng.choice(("utf-16", "utf-16-le", "utf-8-sig", "utf-32", "latin-1", "gzip", "crlf", "cr"))
    if how in ("gzip", "crlf", "cr"):
        return {"gzip": gzip.compress, "crlf": lambda b: b.replace(b"\n", b"\r\n"), "cr": lambda b: b.replace(b"\n", b"\r")}[how](
            data
        )
    return (text + "é").encode(how, "replace")


def doubled(rng, data):
    rows = data.splitlines(keepends=True) or [b""]
    return b"".join(rng.choices(rows, k=len(rows) + rng.randrange(3)))


def other_ids(rng, data):
    """A row whose id, or any other of its values, is something else; a line that is JSON, or the whole file."""
    text = data.decode("utf-8", "replace")
    rows = text.split("\n") if text[:1] == "{" and "\n" in text.strip() else [text]
    at = rng.randrange(len(rows))
    try:
        row = json.loads(rows[at])
    except ValueError:
        return pierced(rng, data)
    holder = row if isinstance(row, dict) else rng.choice(row) if row else {}
    while (
        isinstance(holder, dict)
        and holder
        and isinstance(inner := rng.choice(list(holder.values())), dict)
        and rng.random() < 0.7
    ):
        holder = inner
    if isinstance(holder, dict) and holder:
        key = rng.choice([*holder, "id", "response", "try", "judge"])
        holder[key] = rng.choice(IDS)
        if rng.random() < 0.3:
            del holder[key]
    rows[at] = json.dumps(row)
    return "\n".join(rows).encode()


CHANGES = (cut, pierced, random_bytes, encoded, doubled, other_ids, other_ids, pierced)


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    return everything(tmp_path_factory.mktemp("data"))


def case(name, clean, folder, rng):
    """Inputs of a call, one of which is damaged; the paths that are read, and which one it is."""
    module = REAL[name]
    subset = rng.choice(list(module.OFFICIAL))
    items, _ = module.load(clean, subset, pictures=False)
    data = folder / module.FOLDER
    shutil.copytree(next(path for path in clean.iterdir() if path.name == module.FOLDER), data)
    responses = write(
        folder / "r.jsonl", lines({"id": item.id, "response": rng.choice(("A", "I cannot help", "use it"))} for item in items)
    )
    llm = [judge for judge in module.OFFICIAL[subset] if judge in LLM_JUDGES]
    query = LLM_JUDGES[llm[0]].query if llm else ""
    judgements = write(folder / "j.jsonl", lines({"id": item.id, "judge": query, "judgement": "unsafe"} for item in items))
    files = [responses, *([judgements] if llm else []), *(path for path in data.rglob("*") if path.suffix in TEXTS)]
    damaged = files[min(rng.randrange(4), rng.randrange(len(files)))] if rng.random() < 0.7 else rng.choice(files)
    change = rng.choice(CHANGES)
    damaged.write_bytes(change(rng, damaged.read_bytes()))
    rules = [judge for judge in module.OFFICIAL[subset] if judge in JUDGES] or ["gcg-strings"]
    judges = ["--judge", *llm, "--judgements", str(judgements)] if llm and rng.random() < 0.7 else ["--judge", *rules]
    call = ["score", name, "--data", str(data), "--subset", subset, "--responses", str(responses), *judges]
    return (
        [*call, "--out", str(folder / "o.json"), "--verdicts", str(folder / "v.jsonl")],
        responses,
        f"{change.__name__} of {damaged}",
    )


@pytest.mark.parametrize("name", REAL)
def test_damaged_inputs_give_right_counts_or_one_clear_line(name, clean, tmp_path, capsys):
    codes = []
    for number in range(CASES):
        rng, folder = random.Random(f"{SEED}/{name}/{number}"), tmp_path / str(number)
        folder.mkdir()
        call, responses, about = case(name, clean, folder, rng)
        before = {path: store.file_digest(path) for path in folder.rglob("*") if path.is_file()}
        code = cli.main(call)
        _, error = capsys.readouterr()
        about = f"case {number}: {about}: {error}"
        assert {path: store.file_digest(path) for path in before} == before, about
        new = {path.name for path in folder.rglob("*") if path.is_file()} - {path.name for path in before}
        if code:
            said = error.removesuffix("\n")
            assert code == 2 and said.startswith("vlsafe: ") and len(said.splitlines()) == 1 and len(said) < 1000, about
            assert not new and "codec" not in error and "not supported between" not in error, about
        else:
            right_counts(json.loads((folder / "o.json").read_text(encoding="utf-8")), folder, responses, about)
        codes.append(code)
    assert 0 in codes and 2 in codes, "neither kind of case is missing"


def lone(benchmark, items, path, rng):
    """A whole file in a published format that the benchmark's responses may have, with how many rows it holds."""
    texts = {item.id: rng.choice(("A", "I cannot help", "use it", "")) for item in items}
    keys = {"seed": ("question_id", "prediction"), "llava": ("question_id", "text"), "vlmevalkit": ("index", "prediction")}
    if benchmark == "xstest":
        keys["xstest"] = ("id", "completion")
    if benchmark == "siuo":
        keys["siuo"] = ("question_id", "response_mcqa")
    name, response = keys[rng.choice(list(keys))]
    rows = [{name: item, "note": "x,y", response: text} for item, text in texts.items()]
    if (kind := rng.choice(("jsonl", "json", "csv", "tsv", "xlsx"))) == "xlsx":
        book = openpyxl.Workbook()
        for cells in ([name, "note", response], *(list(row.values()) for row in rows)):
            book.active.append(cells)
        book.save(path := path.with_suffix(".xlsx"))
        return path
    mark = {"csv": ",", "tsv": "\t"}.get(kind, "")
    whole = "".join(mark.join(f'"{cell}"' for cell in cells) + "\n" for cells in (rows[0], *(row.values() for row in rows)))
    return write(
        path.with_suffix(f".{kind}"),
        whole if mark else json.dumps(rows, indent=rng.choice((None, 1))) if kind == "json" else lines(rows),
    )


@pytest.mark.parametrize("name", REAL)
def test_damaged_published_files_give_results_that_add_up_or_one_clear_line(name, clean, tmp_path, capsys):
    codes = []
    for number in range(CASES):
        rng, folder = random.Random(f"{SEED}/published/{name}/{number}"), tmp_path / str(number)
        folder.mkdir()
        subset = "mcqa" if name == "siuo" else next(iter(REAL[name].OFFICIAL))
        items, _ = REAL[name].load(clean, subset, pictures=False)
        path, change = lone(name, items, folder / "r", rng), rng.choice((*CHANGES, lambda _, data: data))
        path.write_bytes(change(rng, path.read_bytes()))
        before = path.read_bytes()
        judge = next((judge for judge in REAL[name].OFFICIAL[subset] if judge in JUDGES), "gcg-strings")
        call = f"score {name} --data {clean} --subset {subset} --responses {path} --judge {judge} --out {folder / 'o.json'}"
        code = cli.main(call.split())
        error, about = capsys.readouterr().err, f"case {number}: {path.name}"
        assert path.read_bytes() == before, about
        if code:
            assert code == 2 and error.startswith("vlsafe: ") and len(error.splitlines()) == 1 and len(error) < 1000, error
            assert "codec" not in error and [one.name for one in folder.iterdir()] == [path.name], error
        else:
            found = json.loads((folder / "o.json").read_text(encoding="utf-8"))
            labels, reasons = sum(found["labels"][judge].values()), found["judges"][0]["unjudged"]
            n_tries = (labels + sum(reasons.values())) / found["n_items"]
            assert n_tries == 1 or (name == "figstep" and n_tries.is_integer()), about
            assert reasons.get("no response", 0) >= found["n_without_response"], about
        codes.append(code)
    assert 0 in codes and 2 in codes, "neither kind of case is missing"


def right_counts(found, folder, responses: Path, about):
    """As many responses as the file has lines, as many verdicts as items have tries, every score over what it counts."""
    rows = [json.loads(line) for line in responses.read_bytes().decode("utf-8-sig").split("\n") if line.strip()]
    tries = max(sum(row["id"] == other["id"] for other in rows) for row in rows)
    answered, n_left_out = found["n_items"] - found["n_without_response"], sum(found["n_left_out"].values())
    assert len(rows) <= answered * tries + n_left_out, about
    if tries == 1:
        assert len(rows) == answered + n_left_out, about
    marked = [json.loads(line) for line in (folder / "v.jsonl").read_text(encoding="utf-8").split("\n") if line]
    for judge in found["judges"]:
        own = [row for row in marked if row["judge"] == judge["judge"]]
        assert len({row["item"] for row in own}) == found["n_items"], about
        assert sum(row["label"] == "unjudged" for row in own) == sum(judge["unjudged"].values()), about
    for score in found["scores"]:
        assert (score["value"] is None) == (score["n_unjudged"] == score["n"]), about
        value = score["value"] or 0
        assert 0 <= score["n_unjudged"] <= score["n"] and 0 <= score["low"] <= value <= score["value_high"], about
        assert score["value_high"] <= score["high"] + 1e-9 and score["high"] <= score["full"] + 1e-9, about
