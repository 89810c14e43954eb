"""Before a scale is run: what it needs from outside, what of that is here, and what cannot be made without it.

`needs` finds every `Origin` anywhere in `Scale.loaded`, so that a field that somebody adds is listed, and fetched, without an
edit here. Of a token nothing is said but whether there is one.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
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
SMALL = 0.5  # a thing that weighs less than this share of what it should is taken for cut short; assumed
GIGA = 10**9
SECRETS = {"the hub's token": huggingface_hub.get_token, "OPENAI_API_KEY": lambda: os.environ.get("OPENAI_API_KEY")}


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
    if origin.by_hand and not any(name.startswith(f"{origin.by_hand[0]}/") for name in found):
        lacking.append(f"by hand: {origin.by_hand[1]}")
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
    return Line(need.name, "present", f"{weight:.2f} GB")


def _patterns(origin: Origin) -> Sequence[str]:
    """What must be there: of weights the config and either kind of file, of a corpus every pattern's."""
    return ("config.json",) if origin.kind == "model" else tuple(p for p in origin.files if "*" not in p) or ("*",)


def _files(need: Need) -> dict[str, Path]:
    """The files of a thing by name: a local folder, a folder below `VLSAFE_DATA`, or the hub's cache."""
    origin, root = need.origin, assets.outside()
    folder = Path(origin.repo) if need.folder is None else root and root / need.folder
    if folder is None or not folder.is_dir():
        folder = _snapshot(origin)
    inside = (path for path in folder.rglob("*") if path.is_file() and ".cache" not in path.relative_to(folder).parts)
    return {str(path.relative_to(folder)): path for path in inside}


def _snapshot(origin: Origin) -> Path:
    """A repository's place in the hub's cache, at its commit. The library itself only tells of complete ones."""
    cache = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=origin.repo, repo_type=origin.kind)
    revision = assets.pinned(origin.repo, origin.revision)
    named = cache / "refs" / revision
    return cache / "snapshots" / (named.read_text(encoding="utf-8").strip() if named.is_file() else revision)


def _lacking_shards(found: Mapping[str, Path]) -> list[str]:
    index = next(path for name, path in sorted(found.items(), reverse=True) if fnmatch(name, "*.index.json"))  # safetensors first
    wanted = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return sorted(wanted - set(found))


def _lacking_archives(need: Need, found: Mapping[str, Path]) -> list[str]:
    """Archives that are neither there nor unpacked beside their place."""
    unpacked = {name.rpartition("/")[0].partition("/")[0] for name in found if "/" in name and not name.endswith(".zip")}
    return [file for file, _ in need.origin.archives if file not in found and file.partition("/")[0] not in unpacked]


def _changed(need: Need, found: Mapping[str, Path]) -> list[str]:
    before = noted(CHECKSUMS).get(need.origin.repo, {})
    return [name for name, digest in before.items() if name not in found or store.file_digest(found[name]) != digest]


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
        "screen/filtered": {"captions", "instructions", "tower", "parents"},
        "guard/text": {"text_guard"}, "guard/image": {"image_guard"},
        "tower/clip": {"tower"}, "parent/aligned": {"parents"},
    }  # fmt: skip
    kind, _, recipe = stage.partition("/")
    if kind == "safety":
        return {"safe_rlhf" if corpus == "chosen" else corpus for corpus in RECIPES[recipe].corpora}
    return direct.get(stage, set())


def doctor(scale: Scale, deep: bool = False) -> list[Line]:
    """Everything that a scale needs, in the order in which one would see to it."""
    lines = [Line(f"secret: {name}", "yes" if ask() else "no") for name, ask in SECRETS.items()]
    root = assets.outside()
    lines.append(Line("VLSAFE_DATA", "yes" if root and root.is_dir() else "no", "" if root else "names no folder"))
    told = [state(need, deep) for need in needs(scale)]
    lines += [line if line.state == "present" else _with_consequence(scale, line) for line in told]
    weight = {need.name: need.origin.gigabytes for need in needs(scale)}
    lines.append(disk(sum(weight[line.what] for line in told if line.state != "present")))
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


def disk(gigabytes: float) -> Line:
    """Whether so much more would fit."""
    free = shutil.disk_usage(_existing(assets.outside() or Path.cwd())).free / GIGA
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


def noted(file: str) -> dict[str, Any]:
    """What downloads wrote down: pins, or checksums, by repository."""
    root = assets.outside()
    path = root / file if root else None
    return json.loads(path.read_text(encoding="utf-8")) if path and path.is_file() else {}
