"""Models that others have trained, at the stages where this project's own stand: a vision-language model at the end of stage 2,
the language model that it came from at the parent. What examines, judges and probes them is what does so with ours.

A scale is written for each (`opened`), by which every other command finds its runs. Models stay where they are: a run holds
links to their files, and is identified by what is in these.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import yaml

from vlsafe import evaluation, models
from vlsafe.core import assets, store
from vlsafe.core.assets import Origin
from vlsafe.core.presets import PAPER, SCALES, load_scale
from vlsafe.core.scale import PLACE, as_plain, extended, known
from vlsafe.core.schema import MAIN_LINE, Turn, content_digest
from vlsafe.evaluation.benchmarks import OWN, REAL
from vlsafe.evaluation.judges import JUDGES, LLM_JUDGES
from vlsafe.study.judging import QUERIES
from vlsafe.study.probing import DIRECTION, LOCALISATION
from vlsafe.study.study import Stage, Study, official

PARENT, MODEL = MAIN_LINE["parent"], MAIN_LINE["adapted"]
EXAMINED = ("examination/parent.aligned", "examination/instruct.filtered-full")
PROBES = {  # and what they read
    LOCALISATION: (PARENT, MODEL), DIRECTION: (PARENT, MODEL), "probe/layers": (PARENT, DIRECTION, MODEL),
    "probe/drift": (PARENT, MODEL),
}  # fmt: skip
RESPONSES = tuple(name.replace("examination/", "responses/") for name in EXAMINED)
STAGES = {PARENT, MODEL, *EXAMINED, *RESPONSES, *PROBES}
FILES = (".safetensors", ".json", ".txt", ".model", ".jinja")  # of a model folder; pickles where there is nothing else
OTHERS = ("manifest.json", "trainer_state.json")
TEMPLATES = "chat_template."  # how files begin that hold nothing else
STRINGS = "xstest-strings"


class Request(NamedTuple):
    """What somebody wants to know of a model. Models are folders or repositories of the hub, with `@revision` where it matters.

    `judges`: those that ask a model, as NAME (the paper's weights, from the hub's cache), NAME=FOLDER or NAME=ADDRESS; rules
    always judge. `benchmarks`: none for those `among` all that are at hand. `prompts`: a file of them, in place of benchmarks.
    """

    model: str
    parent: str = ""
    template: Path | None = None
    parent_template: Path | None = None
    benchmarks: Sequence[str] = ()
    judges: Sequence[str] = ()
    prompts: Path | None = None
    among: Sequence[str] = tuple(REAL)
    validation: float = 0.0
    exam: Any = {}


def unless(study: Study, name: str) -> str | None:
    """Why a study of somebody else's model lacks a stage; None where it has it, and in every other study."""
    if study.adopted is None:
        return None
    if name not in STAGES:
        return "others have trained the model"
    return "no parent of the model is named" if name == PARENT and study.adopted.parent is None else None


TEMPLATE = {"model": ("template", "--chat-template"), "parent": ("parent_template", "--parent-chat-template")}


def params(study: Study, part: str) -> list[Any]:
    """What a model is: the content of its files, and the template in place of its own."""
    return [contents(_folder(study, part)), getattr(study.adopted, TEMPLATE[part][0])]


def _folder(study: Study, part: str) -> Path:
    return assets.model_folder(getattr(study.adopted, part), "the model" if part == "model" else "its parent")


def files(folder: Path) -> list[Path]:
    """The files of a model's folder that loading it reads."""
    kinds = (*FILES, *(() if any(folder.glob("*.safetensors")) else (".bin",)))
    return sorted(path for path in folder.iterdir() if path.suffix in kinds and path.name not in OTHERS)


def contents(folder: Path) -> dict[str, str]:
    """The SHA-256 of each of a model's files."""
    return {path.name: _digest(path, path.stat().st_size, path.stat().st_mtime_ns) for path in files(folder)}


@functools.lru_cache(maxsize=2**10)
def _digest(path: Path, size: int, time: int) -> str:
    blob = path.resolve().name
    return blob if re.fullmatch("[0-9a-f]{64}", blob) else store.file_digest(path)  # so blobs are called in the hub's cache


def adopt(study: Study, work: Path, part: str) -> dict[str, Any]:
    """Link a model's files, with another chat template where one was passed, and see that it can be asked.

    Raises:   ValueError where it is no vision-language model of a known family (`models.architectures`), where a parent's
              decoder is of another type, or without a chat template
    """
    folder, (field, option) = _folder(study, part), TEMPLATE[part]
    template = getattr(study.adopted, field)
    for path in filter(Path.is_symlink, work.iterdir()):
        path.unlink()  # of a killed attempt
    for path in files(folder):
        if not (template and path.name.startswith(TEMPLATES)):
            (work / path.name).symlink_to(path.resolve())
    if template:
        store.write_text(work / "chat_template.jinja", template)
    if not (work / "config.json").exists():
        raise FileNotFoundError(f"{folder} holds no model (no config.json)")
    architectures, name = models.architectures, folder.name
    architectures.family_of(work)  # raises for one that is not known
    kind = architectures.decoder_type(work)
    if part == "model" and not architectures.is_multimodal(work):
        raise ValueError(f"{name} has no vision tower: it is a language model, which can be a --parent")
    if part == "parent" and (of := architectures.decoder_type(_folder(study, "model"))) != kind:
        raise ValueError(f"{name} is a decoder of the type {kind!r}, and that of the model is {of!r}: it is not its parent")
    try:
        processor = models.checkpoints.load_processor(work)
    except ImportError as error:
        raise ValueError(f"the processor of {name} needs a library that is not installed: {error}") from error
    if processor.chat_template is None:
        raise ValueError(
            f"{name} has no chat template, and how it was trained to be asked cannot be guessed: write it down in Jinja and pass "
            f"it, {option} FILE (vlsafe/models/templates has some)"
        )
    try:
        models.chat.rendered(processor, [Turn("user", "a line")], 0)
    except (TypeError, jinja2.TemplateError) as error:
        raise ValueError(f"the chat template of {name} cannot be written out: {error}; pass another, {option} FILE") from error
    return {"decoder": kind, "bytes": sum(path.stat().st_size for path in files(work))}


def stages(ours: Mapping[str, Stage]) -> dict[str, Stage]:
    """The stages at which models of others stand, and those that compare them, as ours do."""

    def adopting(part: str) -> Stage:
        make, of = functools.partial(adopt, part=part), functools.partial(params, part=part)
        return Stage(make, (), of, 0, estimate="seconds", seedless=True)

    def asking(stage: Stage, inputs: tuple[str, ...]) -> Stage:
        of = lambda study: [stage.params(study), study.adopted.items]  # noqa: E731
        return replace(stage, inputs=inputs, params=of, gathers=False, estimate="not measured")

    inputs = {name: ours[name].inputs for name in RESPONSES} | PROBES
    return {PARENT: adopting("parent"), MODEL: adopting("model"), **{name: asking(ours[name], inputs[name]) for name in inputs}}


# ---- the scale of such a study


def at_hand(data: Path | None, names: Sequence[str], among: Sequence[str]) -> dict[str, str]:
    """The benchmarks whose official files are there, of `names` or `among` others, and why the rest are not.

    Raises:   FileNotFoundError where one of `names`, or every one, is missing
    """
    found = {}
    for name in names or among:
        module = REAL[known(name, REAL, "benchmark")]
        try:
            if data is None:
                raise FileNotFoundError("the environment variable VLSAFE_DATA names no folder of official files")
            files = evaluation.benchmarks.official
            files.load(module, data, files.subset(module, generated=True), pictures=False)
            found[name] = ""
        except FileNotFoundError as error:
            if name in names:
                raise
            found[name] = str(error)
    if all(found.values()):
        raise FileNotFoundError(f"no benchmark is at hand: {next(iter(found.values()))}; `vlsafe doctor` says what lies where")
    return found


def judges_of(benchmark: str, answered: Sequence[str]) -> list[str]:
    """The judges of a benchmark: those that ask a model which answers, its own first, then rules."""
    own = [name for name in LLM_JUDGES if name.startswith(benchmark.replace("_", "-"))]
    names = dict.fromkeys([*own, *chain(*REAL[benchmark].OFFICIAL.values()), *PAPER.exam.judges[benchmark]])
    asking = [name for name in names if name in LLM_JUDGES and LLM_JUDGES[name].query in answered]
    return asking + [name for name in PAPER.exam.judges[benchmark] if name in JUDGES]


def _origin(name: str) -> dict[str, Any]:
    repo, _, revision = (str(Path(name).resolve()), "", "") if Path(name).is_dir() else name.partition("@")
    return {"repo": repo, "revision": revision or "main", "kind": "model"}


def _judges(requests: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Weights and endpoints of judges, by what they are asked."""
    weights, endpoints, papers = dict[str, Any](), dict[str, Any](), PAPER.loaded.judges if PAPER.loaded else {}
    for request in requests:
        name, _, where = request.partition("=")
        query = LLM_JUDGES[name].query if name in LLM_JUDGES else known(name, QUERIES, "judge that asks a model")
        if where.startswith(("http://", "https://")):
            endpoints[query] = {"address": where}
        elif where or query in papers:
            weights[query] = _origin(where) if where else {}  # changes of nothing: as the paper's scale has it
        else:
            raise ValueError(f"say who answers the judge {name!r}: {name}=FOLDER or {name}=ADDRESS")
    return weights, endpoints


def _items_of(request: Request, benchmarks: Sequence[str]) -> str:
    """The digest of all that may be asked: of a file of prompts, or of the official files of benchmarks with their pictures."""
    folder = assets.outside() or Path()
    items = evaluation.prompts.from_file(request.prompts) if request.prompts else official(folder, tuple(benchmarks), True)
    lines = (f"{item.id} {content_digest(item)} {item.harmful}" for item in items)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def scale_of(request: Request, name: str, benchmarks: Sequence[str], items: str = "") -> dict[str, Any]:
    """The content of the scale file of a request: the paper's measures, none of its models. `items`: a digest of them."""
    weights, endpoints = _judges(request.judges)
    texts = {"template": request.template, "parent_template": request.parent_template}
    adopted = {
        "model": _origin(request.model), **({"parent": _origin(request.parent)} if request.parent else {}),
        **{key: path.read_text(encoding="utf-8") for key, path in texts.items() if path},
        **({"prompts": str(request.prompts.resolve())} if request.prompts else {}), "items": items,
    }  # fmt: skip
    nothing = ("captions", "instructions", "safety", "safe_rlhf", "spa_vl", "text_guard", "image_guard", "tower")
    of_paper = as_plain(PAPER.loaded)
    loaded = {
        **dict.fromkeys(nothing), "parents": dict.fromkeys(of_paper["parents"]), "adopted": adopted, "gpu_gigabytes": 0.0,
        "judges": {**dict.fromkeys(of_paper["judges"]), **weights},
    }  # fmt: skip
    answered = [*weights, *endpoints]
    judges = {OWN: [STRINGS]} if request.prompts else {of: judges_of(of, answered) for of in benchmarks}
    used = {LLM_JUDGES[judge].query for of in judges.values() for judge in of if judge in LLM_JUDGES}
    if idle := sorted(set(answered) - used):
        raise ValueError(f"the judge {idle[0]!r} has nothing to judge: it is for other benchmarks than {', '.join(judges)}")
    gpu = models.devices.gpus() > 0
    exam = {
        "judges": {**dict.fromkeys(PAPER.exam.judges), **judges}, "endpoints": endpoints, "validation": request.validation,
        "dtype": "bfloat16" if gpu else "float32", **request.exam,
    }  # fmt: skip
    backbones = {**dict.fromkeys(PAPER.backbones), name: {"extends": next(iter(PAPER.backbones))}}
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"extends": "paper", "name": name, "loaded": loaded, "backbones": backbones, "exam": exam, "threads": threads}


def opened(request: Request, root: Path, name: str = "", suffix: str = "") -> tuple[Study, dict[str, str]]:
    """A study of somebody else's model, whose scale is written into its place in the run store; and which benchmarks it lacks.

    Raises:   as `at_hand`; FileNotFoundError where a model is not here; ValueError where the place holds another model's runs
    """
    origin = Origin(**_origin(request.model))
    assets.model_folder(origin, "the model")
    name = (name or re.sub(r"[^\w.+-]+", "-", Path(origin.repo).name)) + suffix
    if not PLACE.fullmatch(name) or name in SCALES:
        raise ValueError(
            f"{name!r} cannot name the results: choose another --name, of letters, digits and . _ + - and no preset's"
        )
    file = root / name / "scale.yaml"
    before = load_scale(file).loaded if file.exists() else None
    if file.exists() and (before is None or before.adopted is None or before.adopted.model.repo != origin.repo):
        other = before.adopted.model.repo if before and before.adopted else "something else"
        raise ValueError(f"{file.parent} holds the results of {other}; choose another --name for those of {origin.repo}")
    found = {} if request.prompts else at_hand(assets.outside(), request.benchmarks, request.among)
    benchmarks = [of for of in PAPER.exam.judges if found.get(of) == ""]  # in the scale's order, in which they are read once
    content = scale_of(request, name, benchmarks, _items_of(request, benchmarks))
    extended(PAPER, {key: value for key, value in content.items() if key != "extends"})  # raises before anything is written
    file.parent.mkdir(parents=True, exist_ok=True)
    text = "# Written by `vlsafe`, and again by the next command about this model.\n"
    store.write_text(file, text + yaml.safe_dump(json.loads(json.dumps(content)), sort_keys=False, allow_unicode=True))
    return Study.open(file, name, 0, root), {of: why for of, why in found.items() if why}
