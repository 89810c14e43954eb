"""The doctor: whether all that a scale needs from outside is here, and which stages cannot run without what is not.

What is here is what its own reader accepts: corpora and benchmarks are read as stages read them, weights are looked for by
name. Of a secret it is only said whether there is one; no server is asked.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

import huggingface_hub

from vlsafe.core import assets
from vlsafe.core.scale import Scale
from vlsafe.data import pocket
from vlsafe.data.sources import CORPORA
from vlsafe.evaluation.benchmarks import REAL, official
from vlsafe.evaluation.judges import LLM_JUDGES, llm
from vlsafe.planning.outside import GIGA, Line, disks, needs, state
from vlsafe.study import judging, tuning
from vlsafe.study.graph import GRIDS, STAGES, planned
from vlsafe.study.study import Study

FINE = ("present", "yes", "no")
WITHOUT = "torch is not installed: `pip install '.[models]'` in the repository"
# What a stage reads from outside itself; examinations and what chooses by items read benchmarks, and so does whatever trains, so
# that no benchmark prompt is among its rows.
READ: dict[str, set[str]] = {
    "world/corpora": set(CORPORA), "tower/clip": {"tower"}, "base/llm": set(),
    "guard/text": set(), "guard/image": set(),  # they note which guards are meant; the screen asks them
    "screen/filtered": {"captions", "instructions", "text_guard", "image_guard", "tower", "parents"},
    "parent/aligned": {"tower", "parents"}, "projector/filtered": {"captions", "tower", "parents", "benchmarks"},
} | {tuning.judging(grid): {"text_guard", "benchmarks"} for grid in GRIDS}  # fmt: skip
UNUSABLE, ABSENT = (
    "pictures cannot be used",
    "there is no ",
)  # notes of benchmarks' loaders: lost pictures; a part that is not there


def doctor(scale: Scale, deep: bool = False) -> list[Line]:
    """Everything that a scale needs, in the order in which one would see to it; `deep` reads all rows and compares checksums."""
    root, things = assets.outside(), [(need, state(need, deep)) for need in needs(scale)]
    lines = [*(line for _, line in things), *benchmarks(scale), *judges(scale)]
    if scale.loaded and scale.loaded.packed:
        return [*map(_package, scale.loaded.packed.packages.values()), _bfloat16(scale), _gpu(scale.loaded.gpu_gigabytes)]
    return [
        *secrets(scale),
        Line("VLSAFE_DATA", "yes" if root and root.is_dir() else "no", "" if root else "names no folder"),
        *(line if line.state in FINE else _with_consequence(scale, line) for line in lines),
        *disks([need for need, line in things if line.state != "present"]),
        _gpu(scale.loaded.gpu_gigabytes if scale.loaded else 0.0),
    ]


def secrets(scale: Scale) -> list[Line]:
    """Whether there is a token of the hub, and a key of each server that judges."""
    keys = dict.fromkeys(["OPENAI_API_KEY", *(endpoint.key for endpoint in scale.exam.endpoints.values())])
    found = {"the hub's token": huggingface_hub.get_token(), **{key: os.environ.get(key) for key in keys}}
    return [Line(f"secret: {name}", "yes" if value else "no") for name, value in found.items()]


def benchmarks(scale: Scale) -> list[Line]:
    """The benchmarks that a scale examines, each read by its own loader with its pictures."""
    return [_benchmark(name, scale) for name in scale.exam.judges] if scale.loaded and not scale.loaded.packed else []


def _benchmark(name: str, scale: Scale) -> Line:
    what, module, root = f"benchmarks.{name}", REAL[name], assets.outside()
    if root is None or scale.loaded is None:
        return Line(what, "missing", f"{module.FOLDER} is looked for below VLSAFE_DATA, which names no folder")
    try:
        items, notes = official.load(module, root, next(iter(module.OFFICIAL)))
        expected, _ = official.load(module, root, next(iter(module.OFFICIAL)), pictures=False)
    except (OSError, ValueError) as error:
        return Line(what, "missing", str(error))
    lost = [note for note in notes if UNUSABLE in note]
    too_many = bool(lost) and len(expected) - len(items) > scale.loaded.missing_share * len(expected)
    absent = [note for note in notes if note.startswith(ABSENT)]
    if not items or absent or too_many:
        return Line(what, "missing", "; ".join([*absent, *lost]) or "its files hold no item")
    return Line(what, "present", "; ".join([f"{len(items):,} items", *notes]))


def judges(scale: Scale) -> list[Line]:
    """The judges of a scale that are served, or that read an official wording; weights are among its `needs`."""
    lines = []
    try:
        judging.refuse_unanswered(scale)
    except ValueError as error:
        lines.append(Line("judges", "missing", str(error)))
    for query, endpoint in scale.exam.endpoints.items():
        held = "is set" if os.environ.get(endpoint.key) else "is not set"
        where = urlsplit(endpoint.address).netloc.rpartition("@")[2]
        lines.append(Line(f"judges.{query}", "yes", f"a server at {where}, which is not asked; its key {endpoint.key} {held}"))
    return lines + _wordings(scale)


def _wordings(scale: Scale) -> list[Line]:
    """The judges whose wording is read from the user's copy of a benchmark's repository."""
    lines = []
    for benchmark, names in scale.exam.judges.items():
        for name in (name for name in names if name in LLM_JUDGES and LLM_JUDGES[name].wording):
            try:
                llm.wordings(name, official.places(assets.outside() or Path(), REAL[benchmark].FOLDER))
                lines.append(Line(f"wording of {name}", "present"))
            except (OSError, ValueError) as error:
                lines.append(Line(f"wording of {name}", "missing", str(error)))
    return lines


def blocked(scale: Scale, name: str) -> list[str]:
    """The stages that cannot run without a thing, directly or through their inputs; of a parent, those of its own study."""
    thing, _, which = name.partition(".")
    study = Study(scale, which if thing == "parents" else next(iter(scale.backbones)), 0, Path())
    names = planned(study, "full")
    stopped = {stage for stage in names if thing in _read_by(study, stage)}
    while more := {stage for stage in names if stage not in stopped and stopped & set(study.inputs(stage))}:
        stopped |= more
    return [stage for stage in names if stage in stopped]


def _read_by(study: Study, stage: str) -> set[str]:
    """The things from outside that a stage reads itself."""
    if stage in READ:
        return READ[stage]
    kind, _, recipe = stage.partition("/")
    own = {"instructions"} if kind == "instruct" else tuning.read_from_outside(recipe) if kind == "safety" else set()
    judged = {"judges"} if study.stage(stage) is not STAGES[stage] else set()  # what a loaded scale does otherwise is judging
    return own | judged | {"benchmarks"}


def _with_consequence(scale: Scale, line: Line) -> Line:
    if not (stopped := blocked(scale, line.what)):
        return line
    thing, _, which = line.what.partition(".")
    of, more = f" of {which}" if thing == "parents" else "", " …" if len(stopped) > 3 else ""
    every = len(planned(Study(scale, which if of else next(iter(scale.backbones)), 0, Path()), "full"))
    stages = f"{len(stopped)} of {every} stages{of} cannot run: {', '.join(stopped[:3])}{more}"
    return line._replace(detail=f"{line.detail}; without it {stages}")


def _package(package: assets.Package) -> Line:
    """A package whose files are read, each checked; on a machine without it, what installs it."""
    try:
        pocket.packages.record(assets.Packed({package.name: package}))
    except (OSError, ValueError) as error:
        return Line(f"package {package.name}", "missing", str(error))
    return Line(f"package {package.name}", "present", f"{package.version}; licence: {package.licence}")


def _bfloat16(scale: Scale) -> Line:
    """Whether this machine multiplies bfloat16, where a scale computes in it."""
    if find_spec("torch") is None:
        return Line("bfloat16", "no", WITHOUT)
    import torch

    of = torch.cpu.get_capabilities()
    wanted, able = scale.exam.dtype == "bfloat16" or scale.instruct.autocast, of.get("avx512_bf16") or of.get("amx_bf16")
    if torch.cuda.is_available() or able or not wanted:
        return Line("bfloat16", "yes" if able else "no", "" if wanted else "not wanted")
    return Line("bfloat16", "no", "this CPU emulates it, at a twentieth of the speed: use a scale in float32, such as pocket")


def _gpu(gigabytes: float) -> Line:
    if find_spec("torch") is None:
        return Line("GPU", "missing" if gigabytes else "no", WITHOUT)
    import torch

    if not torch.cuda.is_available():
        return Line("GPU", *(("missing", f"{gigabytes:g} GB would be needed") if gigabytes else ("no", "none is needed")))
    memory = torch.cuda.get_device_properties(0).total_memory / GIGA
    detail = f"{torch.cuda.device_count()} × {torch.cuda.get_device_name(0)}, {memory:.0f} GB each, {gigabytes:g} GB are needed"
    return Line("GPU", "too small" if memory < gigabytes else "present", detail)
