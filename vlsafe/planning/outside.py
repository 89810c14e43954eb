"""What a scale needs from outside: whether it is here and complete, and how it is downloaded.

`needs` finds every `Origin` in `Scale.loaded`: new fields need no edit here. A corpus is here where its own reader accepts it.
Downloads resume, are checked and pinned; what is gated is named with what to accept.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import os
import shutil
import urllib.error
import urllib.request
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError
from huggingface_hub.file_download import repo_folder_name

from vlsafe.core import assets, store, texts
from vlsafe.core.assets import Origin
from vlsafe.core.scale import Scale
from vlsafe.core.schema import Stored
from vlsafe.data import files as data_files
from vlsafe.data.files import Refused
from vlsafe.data.sources import CORPORA, FOLDERS, place_of
from vlsafe.models import weights

CHECKSUMS = "checksums.json"
ROWS = 2000  # of a corpus that are read to see whether it is here; assumed; all of them where the doctor looks deep
SHOWN = 5  # missing files that are named
SMALL = 0.5  # below this share of its expected size a download counts as incomplete; assumed
GIGA = 10**9
UNPACKED = {"captions": {"images.zip": "images"}}  # where an archive's members belong; elsewhere beside the archive
BESIDE = {  # files that weights are of no use without, by the field of the scale; patterns
    **dict.fromkeys(("tower", "image_guard"), "preprocessor_config.json"),
    **dict.fromkeys(("parents", "text_guard", "judges"), "tokenizer.[jm]*"),  # tokenizer.json, tokenizer.model
}
Say = Callable[[str], None]


class Need(NamedTuple):
    """Something from outside. `name` is its place in the scale ("safety", "parents.tulu2"), `share` that of its pictures that may
    be missing."""

    name: str
    origin: Origin
    share: float = 0.0

    @property
    def folder(self) -> str | None:
        """A corpus's folder below `VLSAFE_DATA`; None for weights, which lie in the hub's cache."""
        return None if self.origin.kind == "model" else getattr(CORPORA.get(self.name), "folder", self.name.replace(".", "_"))


class Line(NamedTuple):
    """What the doctor says of one thing: present, missing, gated, too small; yes, no."""

    what: str
    state: str
    detail: str = ""


def needs(scale: Scale) -> list[Need]:
    """Everything that a scale takes from outside."""
    return [need._replace(share=scale.loaded.missing_share) for need in _needs(scale.loaded, "")] if scale.loaded else []


def _needs(value: Any, where: str) -> Iterator[Need]:
    if isinstance(value, Origin):
        yield Need(where.removesuffix(".origin"), value)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _needs(getattr(value, field.name), f"{where}.{field.name}".lstrip("."))
    elif isinstance(value, Mapping):
        for name, entry in value.items():
            yield from _needs(entry, f"{where}.{name}")


def state(need: Need, deep: bool = False) -> Line:
    """Whether a thing is here, and complete as far as its first rows and its size (`deep`: all rows and checksums) can show."""
    origin, files = need.origin, _files(need)
    if not files:
        terms, wanted = f"; {origin.terms}" if origin.terms else "", f" ({', '.join(origin.files)})" if origin.files else ""
        detail = f"{origin.gigabytes:g} GB from {origin.repo}{wanted}{terms}"
        return Line(need.name, "gated" if terms else "missing", detail)
    recorded_sums = recorded(CHECKSUMS).get(origin.repo, {})
    if begun := [name for name, digest in recorded_sums.items() if digest is None and name in files]:
        return Line(need.name, "missing", f"its download was cut off, and {begun[0]} is not checked; `vlsafe download` goes on")
    lacking, lost = _lacking(need, files), ""
    if need.name in CORPORA and place_of(need.name, need.origin).folder is not None:  # not read from the hub
        packed = [name for name in lacking if name in origin.files and name.endswith(".zip")]  # or unpacked: the reader knows
        lacking = [name for name in lacking if name not in packed]
        problem, lost, too_many = _read(need, deep)
        lacking += packed if too_many else []
        if (problem or too_many) and not lacking:
            return Line(need.name, "missing", problem or lost)
    if lacking:
        return Line(need.name, "missing", f"lacks {', '.join(lacking[:SHOWN])}" + (f"; {lost}" if lost else ""))
    size = sum(path.stat().st_size for path in files.values()) / GIGA
    if size < SMALL * origin.gigabytes:
        return Line(need.name, "too small", f"{size:.2f} of {origin.gigabytes:g} GB")
    sums = {name: digest for name, digest in recorded_sums.items() if name in files} if deep else {}
    if changed := [name for name, digest in sums.items() if store.file_digest(files[name]) != digest]:
        return Line(need.name, "too small", f"not as downloaded: {', '.join(changed[:SHOWN])}")
    return Line(need.name, "present", f"{size:.2f} GB" + (f"; {lost}" if lost else ""))


def _read(need: Need, deep: bool) -> tuple[str, str, bool]:
    """What a corpus's own reader finds: why it refuses it ("" if it does not), missing pictures, whether these are too many."""
    counts, lost = Counter[str](), dict[str, None]()
    try:
        for row in islice(CORPORA[need.name].rows(place_of(need.name, need.origin)), None if deep else ROWS):
            pictures = [] if isinstance(row, Refused) else [one for one in row.images if isinstance(one, Stored)]
            absent = [one.place for one in pictures if data_files.missing(one)]
            counts.update({"refused" if isinstance(row, Refused) else "rows": 1, "all": len(pictures), "lost": len(absent)})
            lost.update(dict.fromkeys(absent))
    except (OSError, ValueError) as error:
        return str(error), "", False
    if not counts["rows"]:
        return f"no row of {need.folder} can be read ({counts['refused']} refused); is this its file?", "", False
    named = f"{counts['lost']:,} of {counts['all']:,} pictures are missing, first: {', '.join(list(lost)[:SHOWN])}"
    return "", named if lost else "", counts["lost"] > need.share * counts["all"]


def _files(need: Need) -> dict[str, Path]:
    """The files of a thing by name: in a local folder, a folder below `VLSAFE_DATA`, or the hub's cache."""
    origin, root = need.origin, assets.outside()
    folder = Path(origin.repo) if need.folder is None else root and root / need.folder
    if folder is None or not folder.is_dir():  # the hub's cache; the library itself only finds complete repositories
        cache = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=origin.repo, repo_type=origin.kind)
        revision = assets.pinned(origin.repo, origin.revision)
        named = cache / "refs" / revision
        folder = cache / "snapshots" / (named.read_text(encoding="utf-8").strip() if named.is_file() else revision)
    inside = (path for path in folder.rglob("*") if path.is_file() and ".cache" not in path.relative_to(folder).parts)
    return {str(path.relative_to(folder)): path for path in inside}


def _lacking(need: Need, files: Mapping[str, Path]) -> list[str]:
    """What is not among the files of a thing that should be: by name, by what was downloaded, archives, shards of weights."""
    origin = need.origin
    expected = [BESIDE.get(need.name.partition(".")[0], "*"), "config.json"] if need.folder is None else []
    expected += [name for name in origin.files if "*" not in name and need.folder is not None]
    lacking = [pattern for pattern in expected if not fnmatch.filter(files, pattern)]
    downloaded = (name for name in recorded(CHECKSUMS).get(origin.repo, {}) if not name.endswith(".zip"))  # these may be unpacked
    lacking += [name for name in downloaded if name not in files and name not in lacking]
    return lacking + (_lacking_weights(files) if need.folder is None else _lacking_archives(origin, files))


def _lacking_archives(origin: Origin, files: Mapping[str, Path]) -> list[str]:
    """The archives of pictures, and what is fetched by hand, that are neither here nor unpacked where the reader looks."""
    packed = {folder: archive.partition(assets.MEMBER)[0] for folder, archive in FOLDERS.items()}
    wanted, hand, what = {file for file, _ in origin.archives}, *(origin.by_hand or ("", ""))
    lacking = sorted(file for file in wanted - set(packed.values()) if file not in files)
    for folder, archive in packed.items():
        by_hand = bool(hand) and folder.startswith(f"{hand}/")
        if (archive in wanted or by_hand) and archive not in files and not any(name.startswith(folder) for name in files):
            lacking.append(f"by hand: {what}" if by_hand else archive)
    return lacking


def _lacking_weights(files: Mapping[str, Path]) -> list[str]:
    """The shards that weights are in; pickled ones are not downloaded where there are others."""
    kind = "safetensors" if any(".safetensors" in name for name in files) else "bin"
    if indices := sorted(fnmatch.filter(files, f"*.{kind}.index.json")):
        return sorted(set(weights.mapping(files[indices[-1]]).values()) - set(files))  # the last one by name
    return [] if fnmatch.filter(files, f"*.{kind}") else ["model.safetensors"]


def distinct(needs: Sequence[Need]) -> list[Need]:
    """Needs without those of the same files: Llama-Guard-3 is guard and judge."""
    return list({(need.origin.repo, need.origin.revision, need.folder): need for need in reversed(needs)}.values())[::-1]


def disks(missing: Sequence[Need]) -> list[Line]:
    """Whether there is room for what is missing on the file systems of VLSAFE_DATA and HF_HOME, which may be one."""
    wanted = {"VLSAFE_DATA": assets.outside() or Path.cwd(), "HF_HOME": Path(constants.HF_HUB_CACHE)}
    folders = {name: next(one for one in (path, *path.parents) if one.is_dir()) for name, path in wanted.items()}
    by_disk: dict[int, list[str]] = {}
    for name, folder in folders.items():
        by_disk.setdefault(folder.stat().st_dev, []).append(name)
    lines = []
    for names in by_disk.values():
        on_disk = [need for need in distinct(missing) if ("VLSAFE_DATA" if need.folder else "HF_HOME") in names]
        gigabytes = sum(need.origin.gigabytes for need in on_disk)
        free = shutil.disk_usage(folders[names[0]]).free / GIGA
        what = "disk" if len(names) == len(wanted) else f"disk of {names[0]}"
        detail = f"{free:.0f} GB are free, {gigabytes:.0f} GB are still to come"
        lines.append(Line(what, "too small" if free < gigabytes else "present", detail))
    return lines


def recorded(file: str) -> dict[str, Any]:
    """What downloads have recorded by repository: pinned commits, or checksums, None of what is not wholly here."""
    path = (root := assets.outside()) and root / file
    return texts.read_json(path) if path and path.is_file() else {}


def download(scale: Scale, say: Say, only: Sequence[str] = (), unpack: bool = False) -> None:
    """Fetch what is missing: weights into the hub's cache, corpora into `VLSAFE_DATA`; a second call resumes where one stopped.

    Raises:   ValueError where it cannot begin, and at the end, naming what failed, why, and what a gated one wants accepted
    """
    chosen = [need for need in needs(scale) if not only or need.name in only]
    missing = [need for need in chosen if state(need).state != "present"]
    corpora = [need.name for need in missing if need.folder is not None]
    if corpora and assets.outside() is None:
        raise ValueError(f"set VLSAFE_DATA to the folder that {', '.join(corpora)} shall go to")
    if missing and constants.HF_HUB_OFFLINE:
        raise ValueError("HF_HUB_OFFLINE is set: nothing can be downloaded; unset it for this command")
    if short := [line.detail for line in disks(missing) if line.state != "present"]:
        raise ValueError(f"{short[0]}; make room, or let VLSAFE_DATA and HF_HOME lead elsewhere")
    failed = []
    for need in distinct(missing):
        say(f"{need.name}: {need.origin.repo}, {need.origin.gigabytes:g} GB")
        try:
            _fetch_repository(need)
            for file, address in need.origin.archives:
                path = assets.outside_path(f"{need.folder}/{file}")
                if not path.exists() or file in recorded(CHECKSUMS).get(need.origin.repo, {}):  # or somebody has put it there
                    _record(CHECKSUMS, need.origin.repo, {file: None})
                    fetch(address, path, say)
                    _record(CHECKSUMS, need.origin.repo, {file: store.file_digest(path)})
        except GatedRepoError:
            terms = need.origin.terms or "accept its terms"
            failed.append(f"{need.name} is gated: {terms} (hub: {need.origin.repo}), then log in with `hf auth login`")
        except Exception as error:  # without a network each library raises what it likes, of no common kind
            failed.append(f"{need.name}: {next(iter(str(error).splitlines()), '') or type(error).__name__}")
        if need.origin.by_hand:
            say(f"{need.name}: by hand: {need.origin.by_hand[1]}")
    for need in chosen if unpack else ():
        _unpack(need, say)
    if failed:
        raise ValueError("not everything could be downloaded\n  " + "\n  ".join(failed))


def _fetch_repository(need: Need) -> None:
    """One repository at its commit, every file compared with the size and checksum that the hub has for it."""
    origin = need.origin
    pinned = assets.pinned(origin.repo, origin.revision)
    info: Any = huggingface_hub.HfApi().repo_info(origin.repo, repo_type=origin.kind, revision=pinned, files_metadata=True)
    if origin.revision == "main":
        _record(assets.PINS, origin.repo, info.sha)
    where = None if need.folder is None else assets.outside_path(need.folder)
    files = {file.rfilename: file for file in info.siblings or ()}
    names = [name for name in files if not origin.files or any(fnmatch.fnmatch(name, pattern) for pattern in origin.files)]
    if fnmatch.filter(names, "*.safetensors"):  # pickled weights only where there are no others
        names = [name for name in names if not fnmatch.fnmatch(name, "*.bin")]
    _record(CHECKSUMS, origin.repo, dict.fromkeys(names))  # a kill from here on leaves what is known to be unchecked
    folder = Path(huggingface_hub.snapshot_download(
        origin.repo, repo_type=origin.kind, revision=info.sha, allow_patterns=names, local_dir=where
    ))  # fmt: skip
    digests = {}
    for name in names:
        path, file = folder / name, files[name]
        digests[name] = store.file_digest(path)
        if path.stat().st_size != file.size or (file.lfs and file.lfs.sha256 != digests[name]):
            path.unlink()
            raise ValueError(f"{name} of {origin.repo} arrived damaged and was removed; run the command again")
        if path.suffix == ".zip":
            refuse_outside(path)
    _record(CHECKSUMS, origin.repo, digests)


def fetch(address: str, path: Path, say: Say = lambda text: None) -> None:
    """Download one file, from where an earlier attempt stopped; a zip file is checked before it counts.

    Raises:   OSError where the connection ends early (what has arrived stays); ValueError as `refuse_outside`
    """
    if path.exists():
        return
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(address, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            resumed = answer.status == 206
            total = int(answer.headers.get("Content-Length") or 0) + (have if resumed else 0)
            with open(part, "ab" if resumed else "wb") as file:
                shutil.copyfileobj(answer, file, 2**20)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise OSError(f"{address} answers {error.code}") from None
        total = have  # all of it has arrived before
    if total and part.stat().st_size != total:
        raise OSError(f"{path.name} broke off after {part.stat().st_size:,} of {total:,} bytes; run the command again to go on")
    if path.suffix == ".zip":
        refuse_outside(part)
    os.replace(part, path)
    say(f"{path.name}: {total / GIGA:.2f} GB")


def refuse_outside(archive: Path, ours: bool = True) -> None:
    """Raises:   ValueError for a file that is no zip file or has a member whose name leads out of it; `ours` is then removed"""
    try:
        with zipfile.ZipFile(archive) as opened:
            bad = next((name for name in opened.namelist() if not assets.inside(name)), None)
        error = f"has a member {bad!r} that leads out of it" if bad is not None else ""
    except zipfile.BadZipFile:
        error = "is no zip file"
    if error and ours:
        archive.unlink()
        raise ValueError(f"{archive.name} {error}; it was removed and is not to be trusted; run the command again")
    if error:
        raise ValueError(f"{archive} {error}; it is not to be trusted")


def _unpack(need: Need, say: Say) -> None:
    """Unpack a corpus's archives into the official layout; members that are there are skipped. What was downloaded is removed
    afterwards; what somebody put there stays."""
    if need.folder is None or need.name == "safety" or not (root := assets.outside_path(need.folder)).is_dir():
        return  # safety is small, and its members' names do not say which split they are of
    downloaded = recorded(CHECKSUMS).get(need.origin.repo, {})
    for archive in sorted(root.rglob("*.zip")):
        ours = downloaded.get(str(archive.relative_to(root))) is not None
        refuse_outside(archive, ours)
        target = root / UNPACKED.get(need.name, {}).get(archive.name, archive.parent.relative_to(root))
        say(f"{need.name}: unpacking {archive.name}")
        with zipfile.ZipFile(archive) as opened:
            for member in opened.infolist():
                path = target / member.filename
                if not path.exists() or path.stat().st_size != member.file_size:
                    opened.extract(member, target)
        if ours:
            archive.unlink()


def _record(file: str, repo: str, value: Any) -> None:
    """Record a pinned commit, or checksums beside those that are there; nowhere without `VLSAFE_DATA`."""
    if root := assets.outside():
        root.mkdir(parents=True, exist_ok=True)
        records = recorded(file)
        records[repo] = {**records.get(repo, {}), **value} if isinstance(value, dict) else value
        store.write_text(root / file, json.dumps(records, indent=1, sort_keys=True))
