"""Results without weights: what tables and figures are made of, of all finished runs of a study, in one file to be committed.

From such files a clone makes every table and figure again (`vlsafe gallery`), without a model: they hold raw tables, an item
each, and what was noted of every run. Weights, training rows and pictures stay where the runs were made.
"""

from __future__ import annotations

import argparse
import io
import json
import lzma
import os
import re
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from vlsafe.core import store
from vlsafe.core.store import ELSEWHERE, MANIFEST, SHOWN, Run
from vlsafe.study.graph import planned
from vlsafe.study.study import Study

ROWS = ("world/corpora", "screen/filtered")  # what models are trained on and asked; of a screen its verdicts are kept
VERDICTS = "audit.parquet"
ANSWERS = "responses.parquet"  # of models that are built they mean nothing; of others they may help somebody do harm
PLACE = re.compile(r"[^/]+/[^/]+/seed\d+/[^/]+/[^/]+")  # of a run in a store
OF_MODELS = ("config.json", "generation_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json")


def add_commands(command: Callable[..., argparse.ArgumentParser], studies: argparse.ArgumentParser) -> None:
    """Describe `vlsafe archive` and `vlsafe unpack` to the parser; `command` makes the one of a function."""
    added = command(archive, "write the results of finished runs without weights, a file for every study", studies)
    added.add_argument("--out", type=Path, required=True, help="a folder")
    added = command(unpack, "put archived results into a run store, for `vlsafe gallery` and notebooks 03, 05, 06, 07")
    added.add_argument("files", nargs="+", type=Path)
    added.add_argument("--root", type=Path, required=True, help="the run store; valid runs in it stay as they are")


def archive(arguments: argparse.Namespace) -> None:
    """Write the archive of every study that is named."""
    for backbone in arguments.backbones:
        for seed in arguments.seeds or [None]:
            study = Study.open(arguments.scale, backbone, seed, arguments.root)
            file = arguments.out / f"{backbone}-seed{study.seed}.tar.xz"
            names = pack(study, file)
            print(f"{file}: {len(names)} runs, {file.stat().st_size / 1e6:.2f} MB")


def unpack(arguments: argparse.Namespace) -> None:
    """Put the runs of archives into a run store."""
    for file in arguments.files:
        put, kept = unpacked(file, arguments.root)
        print(f"{file}: {len(put)} runs{f', {len(kept)} that are there already stay' if kept else ''}")


def pack(study: Study, file: Path) -> list[str]:
    """Write the results of a study's finished runs into one compressed file; the same runs give the same bytes.

    Raises:   ValueError where no run is finished, or the file holds others that would be lost
    """
    names = [name for name in dict.fromkeys([*planned(study), *planned(study, "full")]) if store.readable(study.run(name))]
    if not names:
        raise ValueError(f"no run of {study.backbone} seed {study.seed} is finished; `make reproduce` makes them")
    folders = {str(study.run(name).folder.relative_to(study.root)) for name in names}
    if file.exists() and (lost := sorted(held(file) - folders)):
        shown = f"{', '.join(lost[:SHOWN])}{', …' * (len(lost) > SHOWN)}"
        raise ValueError(f"{file} holds {len(lost)} runs that are not here and would be lost ({shown}); move it away first")
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:xz") as tar:
        for name in names:
            run = study.run(name)
            for path, content in _kept(run, name, study):
                entry = tarfile.TarInfo(str(PurePosixPath(run.folder.relative_to(study.root), path)))
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    file.parent.mkdir(parents=True, exist_ok=True)
    store.write_bytes(file, packed.getvalue())
    return names


def _kept(run: Run, name: str, study: Study) -> Iterator[tuple[str, bytes]]:
    """What of a run is archived: its results, and a manifest that says what is elsewhere."""
    manifest = store.manifest_of(run)
    kept = [file for file in manifest["files"] if _is_result(file, name, study)]
    elsewhere = [file for file in manifest["files"] if file not in kept] + manifest.get(ELSEWHERE, [])
    manifest |= {"files": {file: manifest["files"][file] for file in kept}, ELSEWHERE: sorted(elsewhere)}
    yield MANIFEST, json.dumps(manifest, indent=1).encode()
    for file in kept:
        yield file, (run.folder / file).read_bytes()


def _is_result(file: str, name: str, study: Study) -> bool:
    if study.scale.loaded and file == ANSWERS:
        return False
    rows = name in ROWS and file.endswith(".parquet") and file != VERDICTS
    return file.endswith((".parquet", ".json")) and "/" not in file and file not in OF_MODELS and not rows


def held(file: Path) -> set[str]:
    """The folders of the runs in an archive.

    Raises:   ValueError where the file is no archive of this kind
    """
    try:
        with tarfile.open(file, "r:xz") as tar:
            found = {str(PurePosixPath(name).parent) for name in tar.getnames() if PurePosixPath(name).name == MANIFEST}
    except (lzma.LZMAError, tarfile.TarError, EOFError) as error:
        raise ValueError(f"{file} is no archive of results, or is cut short ({error}); `vlsafe archive` writes them") from None
    if not found or not all(map(PLACE.fullmatch, found)):  # a run's folder may be moved: it must be a run's, and no other
        raise ValueError(f"{file} is no archive of results: it holds no run, or something else; `vlsafe archive` writes them")
    return found


def unpacked(file: Path, root: Path) -> tuple[list[str], list[str]]:
    """The runs of an archive by folder: those that were put into a run store, and those that stay as they are there. One whose
    files are not those of its manifest makes room, and is kept beside it as `<recipe>.damaged`: it may hold weights.

    Raises:   ValueError where the file is no archive of this kind or one of its runs is not whole, before anything is put there;
              where another process is making one of them
    """
    runs, put, kept = sorted(held(file)), list[str](), list[str]()
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root) as work:
        try:
            with tarfile.open(file, "r:xz") as tar:
                tar.extractall(work, filter="data")
        except tarfile.TarError as error:
            raise ValueError(f"{file} is no archive of results ({error}); `vlsafe archive` writes them") from None
        if broken := [run for run in runs if not store.whole_run(Path(work) / run)]:
            raise ValueError(f"{file} is no archive of results: the files of {broken[0]} are not those of its manifest")
        for run in runs:
            with store.alone(root / run):
                if store.whole_run(root / run):
                    if _digest(root / run) != _digest(Path(work) / run):
                        print(f"{run}: another run is there and stays; `vlsafe fresh` removes it", file=sys.stderr)
                    kept.append(run)
                    continue
                if (root / run).exists():
                    aside = store.free(root / f"{run}.damaged")
                    os.rename(root / run, aside)
                    print(f"{run}: its files were not those of its manifest; kept as {aside.name}", file=sys.stderr)
                os.rename(Path(work) / run, root / run)
                put.append(run)
    return put, kept


def _digest(run: Path) -> str:
    return str(json.loads((run / MANIFEST).read_text(encoding="utf-8"))["digest"])
