"""Before a scale is run: what it needs from outside, what of that is here, and fetching the rest.

`needs` finds every `Origin` anywhere in a scale, so that a field that somebody adds is listed and fetched without an edit here.
Nothing here prints a token or says more of one than whether there is one.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError

from vlsafe import store
from vlsafe.scales import Origin, Scale
from vlsafe.sources import CORPORA
from vlsafe.stages import STAGES, Study
from vlsafe.stages.tuning import RECIPES

CHECKSUMS = "checksums.json"
WEIGHTS = ("*.safetensors", "*.bin")
SMALL = 0.5  # a thing that weighs less than this share of what it should is taken for cut short; assumed
GIGA = 10**9
UNPACKED = {"captions": {"images.zip": "images"}}  # where an archive's members belong; elsewhere beside the archive
SECRETS = {"the hub's token": huggingface_hub.get_token, "OPENAI_API_KEY": lambda: os.environ.get("OPENAI_API_KEY")}
Say = Callable[[str], None]


class Need(NamedTuple):
    """Something from outside. `name` is its place in the scale ("safety", "parents.tulu2")."""

    name: str
    origin: Origin

    @property
    def folder(self) -> str | None:
        """A corpus's folder below `VLSAFE_DATA`; weights lie in the hub's cache."""
        return None if self.origin.kind == "model" else getattr(CORPORA.get(self.name), "FOLDER", self.name.replace(".", "_"))


class Line(NamedTuple):
    """What the doctor says of one thing: present, missing, gated, too small; yes, no."""

    what: str
    state: str
    detail: str = ""


def needs(scale: Scale) -> list[Need]:
    """Everything that a scale takes from outside."""
    return [Need(name, origin) for name, origin in _origins(scale.loaded, "")]


def _origins(value: Any, where: str) -> Iterator[tuple[str, Origin]]:
    if isinstance(value, Origin):
        yield where.removesuffix(".origin"), value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _origins(getattr(value, field.name), f"{where}.{field.name}".lstrip("."))
    elif isinstance(value, Mapping):
        for name, entry in value.items():
            yield from _origins(entry, f"{where}.{name}")


def state(need: Need, deep: bool = False) -> Line:
    """Whether a thing is here, and whole as far as its weight (or, `deep`, its checksums) can tell."""
    origin = need.origin
    found = _files(need)
    lacking = [pattern for pattern in _patterns(origin) if not any(fnmatch(name, pattern) for name in found)]
    lacking += [] if need.folder is None else _lacking_archives(need, found)
    if need.folder is None and any(fnmatch(name, "*.index.json") for name in found):
        lacking += _lacking_shards(found)
    if lacking or not found:
        terms = f"; {origin.terms}" if origin.terms else ""
        told = f"lacks {', '.join(lacking[:4])}" if found else f"{origin.gigabytes:g} GB from {origin.repo}{terms}"
        return Line(need.name, "gated" if origin.terms and not found else "missing", told)
    weight = sum(path.stat().st_size for path in found.values()) / GIGA
    if weight < SMALL * origin.gigabytes:
        return Line(need.name, "too small", f"{weight:.2f} of {origin.gigabytes:g} GB")
    if deep and (changed := _changed(need, found)):
        return Line(need.name, "too small", f"not as downloaded: {', '.join(changed[:4])}")
    return Line(need.name, "present", f"{weight:.2f} GB, {origin.by_hand}" if origin.by_hand else f"{weight:.2f} GB")


def _patterns(origin: Origin) -> Sequence[str]:
    """What must be there: of weights the config and either kind of file, of a corpus every pattern's."""
    return ("config.json",) if origin.kind == "model" else tuple(p for p in origin.files if "*" not in p) or ("*",)


def _files(need: Need) -> dict[str, Path]:
    """The files of a thing by name: a local folder, a folder below `VLSAFE_DATA`, or the hub's cache."""
    origin, root = need.origin, store.outside()
    folder = Path(origin.repo) if need.folder is None else root and root / need.folder
    if folder is None or not folder.is_dir():
        try:
            folder = Path(huggingface_hub.snapshot_download(
                origin.repo, repo_type=origin.kind, revision=store.pinned(origin.repo, origin.revision), local_files_only=True
            ))  # fmt: skip
        except (LocalEntryNotFoundError, ValueError):
            return {}
    inside = (path for path in folder.rglob("*") if path.is_file() and ".cache" not in path.relative_to(folder).parts)
    return {str(path.relative_to(folder)): path for path in inside}


def _lacking_shards(found: Mapping[str, Path]) -> list[str]:
    index = next(path for name, path in sorted(found.items(), reverse=True) if fnmatch(name, "*.index.json"))  # safetensors first
    wanted = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return sorted(wanted - set(found))


def _lacking_archives(need: Need, found: Mapping[str, Path]) -> list[str]:
    """Archives that are neither there nor unpacked beside their place."""
    unpacked = {name.rpartition("/")[0].partition("/")[0] for name in found if "/" in name and not name.endswith(".zip")}
    return [file for file, _ in need.origin.archives if file not in found and file.partition("/")[0] not in unpacked]


def _changed(need: Need, found: Mapping[str, Path]) -> list[str]:
    noted = _noted(CHECKSUMS).get(need.origin.repo, {})
    return [name for name, digest in noted.items() if name not in found or store.file_digest(found[name]) != digest]


def blocked(scale: Scale, name: str) -> list[str]:
    """The stages that cannot be made without a thing, directly or because they need what cannot; of a parent, its own."""
    backbone = name.partition(".")[2] if name.startswith("parents.") else next(iter(scale.backbones))
    study = Study(scale, backbone, 0, Path())
    stopped = {stage for stage in STAGES if name in _read_by(stage)}
    while more := {stage for stage in STAGES if stage not in stopped and stopped & set(study.stage(stage).inputs)}:
        stopped |= more
    return [stage for stage in STAGES if stage in stopped]


def _read_by(stage: str) -> set[str]:
    """The things from outside that a stage reads itself."""
    direct = {
        "screen/filtered": {"captions", "instructions"}, "guard/text": {"text_guard"}, "guard/image": {"image_guard"},
        "tower/clip": {"tower"}, "parent/aligned": {"parents"},
    }  # fmt: skip
    kind, _, recipe = stage.partition("/")
    if kind == "safety":
        return {"safe_rlhf" if corpus == "chosen" else corpus for corpus in RECIPES[recipe].corpora}
    return direct.get(stage, set())


def doctor(scale: Scale, deep: bool = False) -> list[Line]:
    """Everything that a scale needs, in the order in which one would see to it."""
    lines = [Line(f"secret: {name}", "yes" if ask() else "no") for name, ask in SECRETS.items()]
    root = store.outside()
    lines.append(Line("VLSAFE_DATA", "yes" if root and root.is_dir() else "no", "" if root else "names no folder"))
    told = [state(need, deep) for need in needs(scale)]
    lines += [line if line.state == "present" else _with_consequence(scale, line) for line in told]
    weight = {need.name: need.origin.gigabytes for need in needs(scale)}
    lines.append(_disk(sum(weight[line.what] for line in told if line.state != "present")))
    lines.append(_gpu(scale.loaded.gpu_gigabytes if scale.loaded else 0.0))
    return lines


def _with_consequence(scale: Scale, line: Line) -> Line:
    name = "parents" if line.what.startswith("parents.") else line.what
    stopped = blocked(scale, name)
    if not stopped:
        return line
    whose = f" of {line.what.partition('.')[2]}" if name == "parents" else ""
    told = f"{', '.join(stopped[:3])}{' …' if len(stopped) > 3 else ''}"
    return line._replace(
        detail=f"{line.detail}; without it {len(stopped)} of {len(STAGES)} stages{whose} cannot run: {told}"
    )  # fmt: skip


def _disk(gigabytes: float) -> Line:
    free = shutil.disk_usage(_existing(store.outside() or Path.cwd())).free / GIGA
    told = f"{free:.0f} GB are free, {gigabytes:.0f} GB are still to come"
    return Line("disk", "too small" if free < gigabytes else "present", told)


def _existing(path: Path) -> Path:
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())


def _gpu(gigabytes: float) -> Line:
    import torch

    if not torch.cuda.is_available():
        return Line(
            "GPU", "missing" if gigabytes else "no", f"{gigabytes:g} GB would be needed" if gigabytes else "none is needed"
        )
    memory = torch.cuda.get_device_properties(0).total_memory / GIGA
    told = f"{torch.cuda.device_count()} × {torch.cuda.get_device_name(0)}, {memory:.0f} GB each, {gigabytes:g} GB are needed"
    return Line("GPU", "too small" if memory < gigabytes else "present", told)


def download(scale: Scale, say: Say, only: Sequence[str] = (), unpack: bool = False) -> None:
    """Fetch what is missing: weights into the hub's cache, corpora into `VLSAFE_DATA`; a second call goes on where one stopped.

    Raises:   ValueError where it cannot begin (no folder, offline, too little room), and at the end where something could not be
              had, naming each with the reason and, if it is gated, what to accept
    """
    wanted = [need for need in needs(scale) if not only or need.name in only]
    missing = [need for need in wanted if state(need).state != "present"]
    _refuse_to_begin(missing)
    failed = []
    for need in missing:
        say(f"{need.name}: {need.origin.repo}, {need.origin.gigabytes:g} GB")
        try:
            _fetch_repository(need)
            for file, address in need.origin.archives:
                fetch(address, store.outside_path(f"{need.folder}/{file}"), say)
                _note(CHECKSUMS, need.origin.repo, {file: store.file_digest(store.outside_path(f"{need.folder}/{file}"))})
        except GatedRepoError:
            terms = need.origin.terms or "accept its terms"
            failed.append(f"{need.name} is gated: {terms} (hub: {need.origin.repo}), then log in with `hf auth login`")
        except (OSError, ValueError, HfHubHTTPError) as error:
            failed.append(f"{need.name}: {str(error).splitlines()[0]}")
        if need.origin.by_hand:
            say(f"{need.name}: by hand: {need.origin.by_hand}")
    for need in wanted if unpack else ():
        _unpack(need, say)
    if failed:
        raise ValueError("not everything could be had\n  " + "\n  ".join(failed))


def _refuse_to_begin(missing: Sequence[Need]) -> None:
    corpora = [need.name for need in missing if need.folder is not None]
    if corpora and store.outside() is None:
        raise ValueError(f"set VLSAFE_DATA to the folder that {', '.join(corpora)} shall go to")
    if missing and constants.HF_HUB_OFFLINE:
        raise ValueError("HF_HUB_OFFLINE is set: nothing can be downloaded; unset it for this command")
    disk = _disk(sum(need.origin.gigabytes for need in missing))
    if disk.state != "present":
        raise ValueError(f"{disk.detail}; make room, or let VLSAFE_DATA and HF_HOME lead elsewhere")


def _fetch_repository(need: Need) -> None:
    """One repository at its commit, every file compared with the size and checksum that the hub has for it."""
    origin = need.origin
    pinned = store.pinned(origin.repo, origin.revision)
    info = huggingface_hub.HfApi().repo_info(origin.repo, repo_type=origin.kind, revision=pinned, files_metadata=True)
    if origin.revision == "main":
        _note(store.PINS, origin.repo, info.sha)
    where = {} if need.folder is None else {"local_dir": store.outside_path(need.folder)}
    wanted = _wanted_files([one.rfilename for one in info.siblings], origin.files)
    folder = Path(huggingface_hub.snapshot_download(
        origin.repo, repo_type=origin.kind, revision=info.sha, allow_patterns=wanted, **where
    ))  # fmt: skip
    digests = {}
    for one in info.siblings:
        if one.rfilename in wanted:
            path, expected = folder / one.rfilename, one.lfs.sha256 if one.lfs else None
            digests[one.rfilename] = store.file_digest(path)
            if path.stat().st_size != one.size or expected not in (None, digests[one.rfilename]):
                path.unlink()
                raise ValueError(f"{one.rfilename} of {origin.repo} arrived damaged and was removed; run the command again")
            if path.suffix == ".zip":
                refuse_outside(path)
    _note(CHECKSUMS, origin.repo, digests)


def _wanted_files(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """The files to take; pickled weights only where there are no others, and never both."""
    chosen = [name for name in names if not patterns or any(fnmatch(name, pattern) for pattern in patterns)]
    if any(fnmatch(name, WEIGHTS[0]) for name in chosen):
        chosen = [name for name in chosen if not fnmatch(name, WEIGHTS[1])]
    return chosen


def fetch(address: str, path: Path, say: Say = lambda text: None) -> None:
    """One file from an address, gone on with where an earlier attempt stopped; a zip file is looked into before it counts.

    Raises:   OSError where the connection fails or ends early (what came stays); ValueError for an archive that is none, or
              whose members lead out of it
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
        if error.code != 416:  # all of it came before
            raise OSError(f"{address} answers {error.code}") from None
        total = have
    if total and part.stat().st_size != total:
        raise OSError(f"{path.name} broke off after {part.stat().st_size:,} of {total:,} bytes; run the command again to go on")
    if path.suffix == ".zip":
        refuse_outside(part)
    os.replace(part, path)
    say(f"{path.name}: {total / GIGA:.2f} GB")


def refuse_outside(archive: Path) -> None:
    """Raises:   ValueError for a file that is no zip file, or one with a member whose name leads out of it; the file is removed"""
    try:
        with zipfile.ZipFile(archive) as opened:
            bad = next((name for name in opened.namelist() if not store.inside(name)), None)
    except zipfile.BadZipFile:
        archive.unlink()
        raise ValueError(f"{archive.name} is no zip file and was removed; run the command again") from None
    if bad is not None:
        archive.unlink()
        raise ValueError(f"{archive.name} has a member {bad!r} that leads out of it; it was removed, and is not to be trusted")


def _unpack(need: Need, say: Say) -> None:
    """Unpack a corpus's archives into the official layout and remove them; what is there is not unpacked again."""
    if need.folder is None or need.folder == "vlguard" or not (root := store.outside_path(need.folder)).is_dir():
        return
    for archive in sorted(root.rglob("*.zip")):
        refuse_outside(archive)
        target = root / UNPACKED.get(need.name, {}).get(archive.name, archive.parent.relative_to(root))
        say(f"{need.name}: unpacking {archive.name}")
        with zipfile.ZipFile(archive) as opened:
            for member in opened.infolist():
                if not (target / member.filename).exists() or (target / member.filename).stat().st_size != member.file_size:
                    opened.extract(member, target)
        archive.unlink()


def _noted(file: str) -> dict[str, Any]:
    root = store.outside()
    path = root / file if root else None
    return json.loads(path.read_text(encoding="utf-8")) if path and path.is_file() else {}


def _note(file: str, repo: str, value: Any) -> None:
    """Write down a pin, or checksums beside those that are there; without `VLSAFE_DATA` there is nowhere to."""
    root = store.outside()
    if root is None:
        return
    root.mkdir(parents=True, exist_ok=True)
    noted = _noted(file)
    noted[repo] = {**noted.get(repo, {}), **value} if isinstance(value, dict) else value
    store.write_text(root / file, json.dumps(noted, indent=1, sort_keys=True))
