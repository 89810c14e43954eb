"""What a scale needs from outside: whether it is here and complete, which stages cannot run without it, and how it is downloaded.

`needs` finds every `Origin` in `Scale.loaded`: new fields need no edit here. Of a token `doctor` only says whether there is one.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError
from huggingface_hub.file_download import repo_folder_name

from vlsafe.core import assets, store
from vlsafe.core.assets import Origin
from vlsafe.core.scale import Scale
from vlsafe.data.sources import CORPORA
from vlsafe.study.graph import planned
from vlsafe.study.study import Study
from vlsafe.study.tuning import RECIPES

CHECKSUMS = "checksums.json"
SMALL = 0.5  # below this share of its expected size a download counts as incomplete; assumed
GIGA = 10**9
UNPACKED = {"captions": {"images.zip": "images"}}  # where an archive's members belong; elsewhere beside the archive
Say = Callable[[str], None]
SECRETS = {"the hub's token": huggingface_hub.get_token, "OPENAI_API_KEY": lambda: os.environ.get("OPENAI_API_KEY")}


class Need(NamedTuple):
    """Something from outside. `name` is its place in the scale ("safety", "parents.tulu2")."""

    name: str
    origin: Origin

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
    return list(_needs(scale.loaded, ""))


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
    """Whether a thing is here, and complete as far as its size (or, `deep`, its checksums) can show."""
    origin, files = need.origin, _files(need)
    if lacking := _lacking(need, files):
        if files:
            return Line(need.name, "missing", f"lacks {', '.join(lacking[:4])}")
        terms = f"; {origin.terms}" if origin.terms else ""
        return Line(need.name, "gated" if terms else "missing", f"{origin.gigabytes:g} GB from {origin.repo}{terms}")
    size = sum(path.stat().st_size for path in files.values()) / GIGA
    if size < SMALL * origin.gigabytes:
        return Line(need.name, "too small", f"{size:.2f} of {origin.gigabytes:g} GB")
    sums = recorded(CHECKSUMS).get(origin.repo, {}) if deep else {}
    if changed := [name for name, digest in sums.items() if name not in files or store.file_digest(files[name]) != digest]:
        return Line(need.name, "too small", f"not as downloaded: {', '.join(changed[:4])}")
    return Line(need.name, "present", f"{size:.2f} GB")


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
    """What is not among the files: named ones (of weights the config), archives, what is fetched by hand, shards of weights."""
    origin = need.origin
    expected = ["config.json"] if origin.kind == "model" else [p for p in origin.files if "*" not in p] or ["*"]
    lacking = [pattern for pattern in expected if not fnmatch.filter(files, pattern)]
    if need.folder is not None:
        unpacked = {name.partition("/")[0] for name in files if "/" in name and not name.endswith(".zip")}
        lacking += [file for file, _ in origin.archives if file not in files and file.partition("/")[0] not in unpacked]
    if origin.by_hand and not any(name.startswith(f"{origin.by_hand[0]}/") for name in files):
        lacking.append(f"by hand: {origin.by_hand[1]}")
    if need.folder is None:
        safe = any(".safetensors" in name for name in files)  # pickled weights are not downloaded where there are others
        for index in sorted(fnmatch.filter(files, f"*.{'safetensors' if safe else 'bin'}.index.json"))[-1:]:  # the last by name
            lacking += sorted(set(json.loads(files[index].read_text(encoding="utf-8"))["weight_map"].values()) - set(files))
    return lacking


def blocked(scale: Scale, name: str) -> list[str]:
    """The stages that cannot run without a thing, directly or through their inputs; of a parent, those of its own study."""
    thing, _, parent = name.partition(".")
    study = Study(scale, parent or next(iter(scale.backbones)), 0, Path())
    names = planned(study, "full")
    stopped = {stage for stage in names if thing in _read_by(stage)}
    while more := {stage for stage in names if stage not in stopped and stopped & set(study.stage(stage).inputs)}:
        stopped |= more
    return [stage for stage in names if stage in stopped]


def _read_by(stage: str) -> set[str]:
    """The things from outside that a stage reads itself."""
    direct = {
        "screen/filtered": {"captions", "instructions", "tower", "parents"},
        "guard/text": {"text_guard"}, "guard/image": {"image_guard"}, "tower/clip": {"tower"}, "parent/aligned": {"parents"},
    }  # fmt: skip
    kind, _, recipe = stage.partition("/")
    if kind == "safety":
        return {"safe_rlhf" if corpus == "chosen" else corpus for corpus in RECIPES[recipe].corpora}
    return direct.get(stage, set())


def doctor(scale: Scale, deep: bool = False) -> list[Line]:
    """Everything that a scale needs, in the order in which one would see to it."""
    root = assets.outside()
    things = [(need, state(need, deep)) for need in needs(scale)]
    return [
        *(Line(f"secret: {name}", "yes" if read() else "no") for name, read in SECRETS.items()),
        Line("VLSAFE_DATA", "yes" if root and root.is_dir() else "no", "" if root else "names no folder"),
        *(line if line.state == "present" else _with_consequence(scale, line) for _, line in things),
        disk(sum(need.origin.gigabytes for need, line in things if line.state != "present")),
        _gpu(scale.loaded.gpu_gigabytes if scale.loaded else 0.0),
    ]


def _with_consequence(scale: Scale, line: Line) -> Line:
    if not (stopped := blocked(scale, line.what)):
        return line
    parent, more = line.what.partition(".")[2], " …" if len(stopped) > 3 else ""
    n = len(planned(Study(scale, parent or next(iter(scale.backbones)), 0, Path()), "full"))
    stages = f"{len(stopped)} of {n} stages{parent and f' of {parent}'} cannot run: {', '.join(stopped[:3])}{more}"
    return line._replace(detail=f"{line.detail}; without it {stages}")


def disk(gigabytes: float) -> Line:
    """Whether there is room for so much more."""
    path = (assets.outside() or Path.cwd()).absolute()
    free = shutil.disk_usage(next(folder for folder in (path, *path.parents) if folder.is_dir())).free / GIGA
    detail = f"{free:.0f} GB are free, {gigabytes:.0f} GB are still to come"
    return Line("disk", "too small" if free < gigabytes else "present", detail)


def _gpu(gigabytes: float) -> Line:
    import torch

    if not torch.cuda.is_available():
        return Line("GPU", *(("missing", f"{gigabytes:g} GB would be needed") if gigabytes else ("no", "none is needed")))
    memory = torch.cuda.get_device_properties(0).total_memory / GIGA
    detail = f"{torch.cuda.device_count()} × {torch.cuda.get_device_name(0)}, {memory:.0f} GB each, {gigabytes:g} GB are needed"
    return Line("GPU", "too small" if memory < gigabytes else "present", detail)


def recorded(file: str) -> dict[str, Any]:
    """What downloads have recorded by repository: pinned commits, or checksums."""
    path = (root := assets.outside()) and root / file
    return json.loads(path.read_text(encoding="utf-8")) if path and path.is_file() else {}


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
    room = disk(sum(need.origin.gigabytes for need in missing))
    if room.state != "present":
        raise ValueError(f"{room.detail}; make room, or let VLSAFE_DATA and HF_HOME lead elsewhere")
    failed = []
    for need in missing:
        say(f"{need.name}: {need.origin.repo}, {need.origin.gigabytes:g} GB")
        try:
            _fetch_repository(need)
            for file, address in need.origin.archives:
                path = assets.outside_path(f"{need.folder}/{file}")
                fetch(address, path, say)
                _record(CHECKSUMS, need.origin.repo, {file: store.file_digest(path)})
        except GatedRepoError:
            terms = need.origin.terms or "accept its terms"
            failed.append(f"{need.name} is gated: {terms} (hub: {need.origin.repo}), then log in with `hf auth login`")
        except (OSError, ValueError) as error:
            failed.append(f"{need.name}: {str(error).splitlines()[0]}")
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


def refuse_outside(archive: Path) -> None:
    """Raises:   ValueError for a file that is no zip file or has a member whose name leads out of it; the file is removed"""
    try:
        with zipfile.ZipFile(archive) as opened:
            bad = next((name for name in opened.namelist() if not assets.inside(name)), None)
        error = f"has a member {bad!r} that leads out of it; it was removed, and is not to be trusted" if bad is not None else ""
    except zipfile.BadZipFile:
        error = "is no zip file and was removed; run the command again"
    if error:
        archive.unlink()
        raise ValueError(f"{archive.name} {error}")


def _unpack(need: Need, say: Say) -> None:
    """Unpack a corpus's archives into the official layout and remove them; members that are there are skipped."""
    if need.folder is None or need.name == "safety" or not (root := assets.outside_path(need.folder)).is_dir():
        return  # safety is small, and its members' names do not say which split they are of
    for archive in sorted(root.rglob("*.zip")):
        refuse_outside(archive)
        target = root / UNPACKED.get(need.name, {}).get(archive.name, archive.parent.relative_to(root))
        say(f"{need.name}: unpacking {archive.name}")
        with zipfile.ZipFile(archive) as opened:
            for member in opened.infolist():
                path = target / member.filename
                if not path.exists() or path.stat().st_size != member.file_size:
                    opened.extract(member, target)
        archive.unlink()


def _record(file: str, repo: str, value: Any) -> None:
    """Record a pinned commit, or checksums beside those that are there; nowhere without `VLSAFE_DATA`."""
    if root := assets.outside():
        root.mkdir(parents=True, exist_ok=True)
        records = recorded(file)
        records[repo] = {**records.get(repo, {}), **value} if isinstance(value, dict) else value
        store.write_text(root / file, json.dumps(records, indent=1, sort_keys=True))
