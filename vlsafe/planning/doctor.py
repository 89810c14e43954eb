"""What a scale needs from outside, whether it is here and complete, and which stages cannot run without it.

`needs` finds every `Origin` in `Scale.loaded`: new fields need no edit here. Of a token it only says whether there is one.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name

from vlsafe.core import assets, store
from vlsafe.core.assets import Origin
from vlsafe.core.scale import Scale
from vlsafe.data.sources import CORPORA
from vlsafe.study.graph import STAGES
from vlsafe.study.study import Study
from vlsafe.study.tuning import RECIPES

CHECKSUMS = "checksums.json"
SMALL = 0.5  # below this share of its expected size a download counts as incomplete; assumed
GIGA = 10**9
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
    expected = ("config.json",) if origin.kind == "model" else tuple(p for p in origin.files if "*" not in p) or ("*",)
    lacking = [pattern for pattern in expected if not any(fnmatch(name, pattern) for name in files)]
    if need.folder is not None:
        unpacked = {name.partition("/")[0] for name in files if "/" in name and not name.endswith(".zip")}
        lacking += [file for file, _ in origin.archives if file not in files and file.partition("/")[0] not in unpacked]
    if origin.by_hand and not any(name.startswith(f"{origin.by_hand[0]}/") for name in files):
        lacking.append(f"by hand: {origin.by_hand[1]}")
    indices = sorted(name for name in files if fnmatch(name, "*.index.json"))
    if need.folder is None and indices:
        index = json.loads(files[indices[-1]].read_text(encoding="utf-8"))  # of several the last by name
        lacking += sorted(set(index["weight_map"].values()) - set(files))
    return lacking


def blocked(scale: Scale, name: str) -> list[str]:
    """The stages that cannot run without a thing, directly or through their inputs; of a parent, those of its own study."""
    backbone = name.partition(".")[2] if name.startswith("parents.") else next(iter(scale.backbones))
    study = Study(scale, backbone, 0, Path())
    stopped = {stage for stage in STAGES if name in _read_by(stage)}
    while more := {stage for stage in STAGES if stage not in stopped and stopped & set(study.stage(stage).inputs)}:
        stopped |= more
    return [stage for stage in STAGES if stage in stopped]


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
    name, _, parent = line.what.partition(".")
    if not (stopped := blocked(scale, name if name == "parents" else line.what)):
        return line
    whose, more = f" of {parent}" if name == "parents" else "", " …" if len(stopped) > 3 else ""
    stages = f"{len(stopped)} of {len(STAGES)} stages{whose} cannot run: {', '.join(stopped[:3])}{more}"
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
