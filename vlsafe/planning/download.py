"""Download what a scale needs: resumable, checked, pinned; what is gated is named with what to accept."""

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
from vlsafe.planning.doctor import CHECKSUMS, GIGA, Need, disk, needs, recorded, state

WEIGHTS = ("*.safetensors", "*.bin")
UNPACKED = {"captions": {"images.zip": "images"}}  # where an archive's members belong; elsewhere beside the archive
IN_PLACE = ("safety",)  # small, and its members' names do not say which split they are of
Say = Callable[[str], None]


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
        except (OSError, ValueError, HfHubHTTPError) as error:
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
    names = [name for name in files if not origin.files or any(fnmatch(name, pattern) for pattern in origin.files)]
    if any(fnmatch(name, WEIGHTS[0]) for name in names):  # pickled weights only where there are no others
        names = [name for name in names if not fnmatch(name, WEIGHTS[1])]
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
    if need.folder is None or need.name in IN_PLACE or not (root := assets.outside_path(need.folder)).is_dir():
        return
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
