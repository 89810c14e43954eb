"""Fetching what a scale needs: resumable, checked, pinned; what is gated is named with what to accept."""

from __future__ import annotations

import json
import os
import shutil
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError

from vlsafe.core import assets, store
from vlsafe.core.scale import Scale
from vlsafe.planning.doctor import CHECKSUMS, GIGA, Need, disk, needs, noted, state

WEIGHTS = ("*.safetensors", "*.bin")
UNPACKED = {"captions": {"images.zip": "images"}}  # where an archive's members belong; elsewhere beside the archive
IN_PLACE = ("safety",)  # small, and its members' names do not say which split they are of
Say = Callable[[str], None]


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
                fetch(address, assets.outside_path(f"{need.folder}/{file}"), say)
                _note(CHECKSUMS, need.origin.repo, {file: store.file_digest(assets.outside_path(f"{need.folder}/{file}"))})
        except GatedRepoError:
            terms = need.origin.terms or "accept its terms"
            failed.append(f"{need.name} is gated: {terms} (hub: {need.origin.repo}), then log in with `hf auth login`")
        except (OSError, ValueError, HfHubHTTPError) as error:
            failed.append(f"{need.name}: {str(error).splitlines()[0]}")
        if need.origin.by_hand:
            say(f"{need.name}: by hand: {need.origin.by_hand[1]}")
    for need in wanted if unpack else ():
        _unpack(need, say)
    if failed:
        raise ValueError("not everything could be had\n  " + "\n  ".join(failed))


def _refuse_to_begin(missing: Sequence[Need]) -> None:
    corpora = [need.name for need in missing if need.folder is not None]
    if corpora and assets.outside() is None:
        raise ValueError(f"set VLSAFE_DATA to the folder that {', '.join(corpora)} shall go to")
    if missing and constants.HF_HUB_OFFLINE:
        raise ValueError("HF_HUB_OFFLINE is set: nothing can be downloaded; unset it for this command")
    room = disk(sum(need.origin.gigabytes for need in missing))
    if room.state != "present":
        raise ValueError(f"{room.detail}; make room, or let VLSAFE_DATA and HF_HOME lead elsewhere")


def _fetch_repository(need: Need) -> None:
    """One repository at its commit, every file compared with the size and checksum that the hub has for it."""
    origin = need.origin
    pinned = assets.pinned(origin.repo, origin.revision)
    hub = huggingface_hub.HfApi()
    described = hub.model_info if origin.kind == "model" else hub.dataset_info
    info = described(origin.repo, revision=pinned, files_metadata=True)
    if origin.revision == "main":
        _note(assets.PINS, origin.repo, info.sha)
    where = None if need.folder is None else assets.outside_path(need.folder)
    wanted = _wanted_files([one.rfilename for one in info.siblings or ()], origin.files)
    folder = Path(huggingface_hub.snapshot_download(
        origin.repo, repo_type=origin.kind, revision=info.sha, allow_patterns=wanted, local_dir=where
    ))  # fmt: skip
    digests = {}
    for one in info.siblings or ():
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
    """Raises:   ValueError for a file that is no zip file or has a member whose name leads out of it; the file is removed"""
    try:
        with zipfile.ZipFile(archive) as opened:
            bad = next((name for name in opened.namelist() if not assets.inside(name)), None)
    except zipfile.BadZipFile:
        archive.unlink()
        raise ValueError(f"{archive.name} is no zip file and was removed; run the command again") from None
    if bad is not None:
        archive.unlink()
        raise ValueError(f"{archive.name} has a member {bad!r} that leads out of it; it was removed, and is not to be trusted")


def _unpack(need: Need, say: Say) -> None:
    """Unpack a corpus's archives into the official layout and remove them; what is there is not unpacked again."""
    if need.folder is None or need.name in IN_PLACE or not (root := assets.outside_path(need.folder)).is_dir():
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


def _note(file: str, repo: str, value: Any) -> None:
    """Write down a pin, or checksums beside those that are there; without `VLSAFE_DATA` there is nowhere to."""
    root = assets.outside()
    if root is None:
        return
    root.mkdir(parents=True, exist_ok=True)
    told = noted(file)
    told[repo] = {**told.get(repo, {}), **value} if isinstance(value, dict) else value
    store.write_text(root / file, json.dumps(told, indent=1, sort_keys=True))
