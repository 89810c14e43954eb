"""One study (a backbone and a seed at a scale, in a run store), what a stage is, and what stages read of each other."""

from __future__ import annotations

import ctypes
import functools
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from vlsafe import data, evaluation, models, study
from vlsafe.core import assets, store, texts
from vlsafe.core.presets import SCALES, USUAL_SEEDS, load_scale
from vlsafe.core.scale import Scale, as_plain, known
from vlsafe.core.schema import Example, Item, from_row
from vlsafe.models import templates

SHARED = "shared"  # in place of a backbone: runs that do not depend on one
KEPT = "answers-{}.jsonl"  # of one model, while a stage is at work: a killed one goes on with them


def project_root() -> Path:
    """The nearest folder upwards that holds the Snakefile; the working folder where there is none.

    So a notebook finds the same run store from JupyterLab, which starts in `notebooks`, and from papermill, which does not.
    """
    here = Path.cwd()
    return next((folder for folder in (here, *here.parents) if (folder / "Snakefile").exists()), here)


@dataclass(frozen=True)
class Study:
    """One backbone and one seed at one scale, in one run store."""

    scale: Scale
    backbone: str
    seed: int
    root: Path
    file: str = ""  # the scale's, where it is one: two files of one stem share no place in a run store
    _runs: dict[str, store.Run] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def open(cls, scale: str | Path, backbone: str, seed: int | None, root: str | Path) -> Study:
        """Check every argument before any work. Without a seed it is the median one of `mini`, 0 of other scales.

        Raises:   ValueError or FileNotFoundError naming the argument and the nearest known value
        """
        loaded = load_scale(scale)
        loaded.backbone(backbone)
        study.judging.refuse_unanswered(loaded)
        seed = USUAL_SEEDS.get(str(scale), 0) if seed is None else seed
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise ValueError(f"a seed is a non-negative integer, not {seed!r}")
        known(loaded.backbone(backbone).template, templates.NAMES, f"chat template of {backbone}")
        if str(root) and Path(root).exists() and not Path(root).is_dir():
            raise ValueError(f"the run store {str(root)!r} is a file; root is a folder, made where there is none")
        _refuse_unknown(loaded, backbone)
        place = Path(root).absolute() if str(root) else project_root() / "runs"
        file = "" if loaded.name in SCALES else str(Path(scale).resolve())
        if file:
            store.refuse_other_scale(place, loaded.name, file, as_plain(loaded))
        return cls(loaded, backbone, seed, place, file)

    def run(self, name: str) -> store.Run:
        """Where the result of a stage lies and what it must be."""
        if name not in self._runs:  # a run asks for its inputs', and many have the same ones
            self._runs[name] = self._run(name)
        return self._runs[name]

    def _run(self, name: str) -> store.Run:
        stage = self.stage(name)
        kind, _, recipe = name.partition("/")
        inputs = {needed: self.run(needed).digest for needed in self.inputs(name)}
        backbone, seed = SHARED if stage.shared else self.backbone, 0 if stage.seedless else self.seed
        params = as_plain(stage.params(self))
        return store.Run(self.root, self.scale.name, backbone, seed, kind, recipe, stage.version, params, inputs)

    def stage(self, name: str) -> Stage:
        """A stage as this scale has it: the one place that asks whether its world is built, loaded, or read from packages, and
        whether others have trained the model."""
        stage = study.graph.STAGES[known(name, study.graph.STAGES, "stage")]
        if self.adopted and stage.adopt:
            return stage.adopt
        if self.packed and stage.pack:
            return stage.pack
        return stage.load if self.scale.loaded and stage.load else stage

    @property
    def packed(self) -> assets.Packed | None:
        """The packages that a loaded scale's parts come from; None where they come from the hub or are built."""
        return self.scale.loaded.packed if self.scale.loaded else None

    @property
    def adopted(self) -> assets.Adopted | None:
        """The model of others that this study is about; None where it makes its own."""
        return self.scale.loaded.adopted if self.scale.loaded else None

    def inputs(self, name: str) -> tuple[str, ...]:
        """The stages that a stage reads; one that gathers reads those that the scale has."""
        stage = self.stage(name)
        without = self.left_out("full") if stage.gathers else {}
        return tuple(needed for needed in stage.inputs if needed not in without)

    def folder(self, name: str) -> Path:
        """The finished run of a stage; it and what it needs are made first where they are missing."""
        stage, run = self.stage(name), self.run(name)
        if store.status(run) != "valid":
            without = self.left_out("full")
            if stage.only not in ("", self.scale.source):
                without[name] = f"only scales that {stage.only} their models have it"
            if name in without:
                raise ValueError(f"{name} does not exist at the scale {self.scale.name!r}: {without[name]}")
            for needed in self.inputs(name):
                self.folder(needed)
            if self.file:
                store.claim(self.root, self.scale.name, self.file, as_plain(self.scale))
            takes = stage.estimate or f"{stage.cost} s at mini on one core"
            print(f"{name}: making it, {takes}", file=sys.stderr, flush=True)
        maker = replace(self, seed=run.seed)  # what all seeds share is drawn alike by whichever comes first
        return store.ensure(run, lambda work: _prepared(stage, maker, work), lambda text: print(text, file=sys.stderr))

    def result(self, name: str, file: str) -> Path:
        """One file of a finished run, of which the rest need not be here; it is made first where it is missing."""
        path = self.run(name).folder / file
        return path if store.status(self.run(name)) == "without weights" and path.exists() else self.folder(name) / file

    def numbers(self, name: str) -> dict[str, Any]:
        """What a finished stage wrote down about itself."""
        return texts.read_json(self.result(name, store.MANIFEST))["numbers"]

    def rows(self, name: str, file: str) -> list[dict[str, Any]]:
        """A Parquet table of a finished run."""
        return store.read_rows(self.result(name, file))

    def frame(self, names: str | Sequence[str], file: str = "raw.parquet", columns: Sequence[str] = ()) -> pd.DataFrame:
        """One Parquet table of one or several stages as one frame; what is missing is made first.

        `columns` are put before the file's own: any of backbone, seed, stage and recipe.
        """
        frames = []
        for name in [names] if isinstance(names, str) else names:
            frame = pd.read_parquet(self.result(name, file))
            for place, column in enumerate(columns):
                frame.insert(place, column, self.coordinates(name)[column])
            frames.append(frame)
        return pd.concat(frames, ignore_index=True)

    def coordinates(self, name: str) -> dict[str, Any]:
        """What tells a stage's result from others of its scale: backbone, seed, stage, recipe."""
        stage, _, recipe = name.partition("/")
        return {"backbone": self.backbone, "seed": self.seed, "stage": stage, "recipe": recipe}

    def stages(self, word: str, grid: str = "default") -> list[str]:
        """The stages that a notebook reads, by its word (`graph.read_by`)."""
        return study.graph.read_by(self, word, grid)

    def left_out(self, grid: str = "default") -> dict[str, str]:
        """The stages of a grid that this scale does without, and why."""
        return study.graph.left_out(self, grid)

    def summary(self, *names: str) -> pd.DataFrame:
        """What finished stages noted about themselves, one line each."""
        return pd.DataFrame.from_dict({name: self.numbers(name) for name in names}, orient="index")

    def losses(self, *names: str) -> pd.DataFrame:
        """Training losses of stages, a column each, by step. Units: nats per token."""
        read = {name: texts.read_json(self.result(name, "losses.json")) for name in names}
        return pd.DataFrame({name: pd.Series(values) for name, values in read.items()})

    def history(self, name: str) -> list[dict[str, float]]:
        """What the trainer of a tuned model logged, one record per step."""
        return texts.read_json(self.result(name, "history.json"))

    def digests(self, *names: str) -> pd.Series:
        """The digest of each stage's run: what a notebook has read."""
        return pd.Series({name: self.run(name).digest for name in names}, name="digest")

    @property
    def figures(self) -> Path:
        """The committed tables and figures of this scale."""
        return project_root() / "figures" / self.scale.name

    def world(self) -> Any:
        """The miniature's world of this study; None at a scale that is loaded: its words mean nothing to a model of others."""
        return None if self.scale.loaded else data.miniature.language.World(self.seed)

    def asset(self, name: str) -> Any:
        """What a loaded scale takes from outside under a name.

        Raises:   ValueError where the scale does without it
        """
        found = getattr(self.scale.loaded, name)
        if found is None:
            raise ValueError(f"the scale {self.scale.name!r} does without {name!r}; what needs it cannot be made")
        return found

    def stream(self, name: str) -> Any:
        """The random stream of a named purpose; in the miniature, the world's own."""
        return np.random.default_rng([self.seed, *name.encode()])

    def tokenizer(self, template: str | None = None) -> Any:
        tokenizer = models.chat.build_tokenizer(data.miniature.language.vocabulary(), self.scale.language.context)
        if template:
            tokenizer.chat_template = models.chat.template(template)
        return tokenizer

    def processor(self, template: str | None = None) -> Any:
        """Words and pictures as a grafted model takes them, with a backbone's chat template where one is named."""
        spec = self.scale.vision
        if self.scale.loaded:
            name = template or self.scale.backbone(self.backbone).template
            parts = [assets.Origin(str(self.folder(of))) for of in ("base/llm", "tower/clip")] if self.packed else None
            parent, tower = parts or (self.asset("parents")[self.backbone], self.asset("tower"))
            return models.chat.hub_processor(parent, tower, name, spec)
        return models.chat.build_processor(self.tokenizer(template), spec.image_size, spec.patch_size, spec.feature_strategy)

    def tower(self) -> tuple[Any, Any]:
        """The study's vision tower and a processor for its pictures."""
        from transformers import CLIPModel

        if self.packed:
            return models.efficientnet.load(self.folder("tower/clip")), self.processor()
        return CLIPModel.from_pretrained(self.folder("tower/clip")).eval(), self.processor()

    @property
    def choosing(self) -> list[Any]:
        """What decides the validation items that a stage chooses by, and how models compute there; a part of its parameters."""
        exam = self.scale.exam
        return [exam.validation, exam.judges, exam.dtype] if self.scale.loaded else [exam.dtype] * (exam.dtype != "float32")

    def examples(self, name: str, file: str) -> list[Example]:
        """Training rows of a finished run."""
        return [from_row(Example, row) for row in self.rows(name, file)]

    def items(self, part: str = "test") -> list[Item]:
        """The benchmark items of the study's world; at a loaded scale those of the official files of every benchmark that it
        examines, in the validation part (by which something may be chosen) and the test part (which is reported); of packages,
        whose prompts and pictures are parted before rows are made of them, those that the world's stage has written.

        Raises:   FileNotFoundError where a benchmark is not there
        """
        if self.packed:
            items = [from_row(Item, row) for row in self.rows("world/corpora", f"items-{part}.parquet")]
            return evaluation.examine.panel(items, self.scale.exam.full) if part == "test" else items
        if not self.scale.loaded:
            if part == "test":
                return [from_row(Item, row) for row in self.rows("world/corpora", "items.parquet")]
            return evaluation.examine.all_items(self.world(), part, self.scale.merging.items)
        if self.adopted and self.adopted.prompts:
            items = evaluation.prompts.from_file(Path(self.adopted.prompts))
            return evaluation.examine.divided(items, self.scale.exam.validation)[part == "test"]
        folder = assets.outside()
        if folder is None:
            raise FileNotFoundError("the benchmarks lie below VLSAFE_DATA, which is not set; `vlsafe doctor` says what is where")
        exam = self.scale.exam
        validation, test = evaluation.examine.divided(
            official(folder, tuple(exam.judges), self.adopted is not None), exam.validation
        )
        return validation if part == "validation" else evaluation.examine.panel(test, exam.full)

    def checkpoints(self, name: str) -> list[Path]:
        """The model folders of a finished training in the order of their steps; the last one is its result."""
        folder = self.folder(name)
        return sorted(folder.glob("step-*")) or [folder]


def _refuse_unknown(scale: Scale, backbone: str) -> None:
    """Raise ValueError for a name in a scale that only the module which owns it can know, before any work."""
    if scale.loaded:
        if not (scale.loaded.packed or scale.loaded.adopted):
            known(backbone, scale.loaded.parents, "parent (of loaded.parents)")
        for arm in scale.loaded.arms:
            without = {} if scale.loaded.packed else data.arms.WITHOUT  # of their own corpora everything is known
            known(arm, data.arms.ARMS.keys() - without, "data arm (of loaded.arms)")
    for category in scale.backbone(backbone).answered_categories:
        known(category, set(data.miniature.language.CATEGORY_OF.values()), f"category (of backbones.{backbone})")
    for verb in scale.backbone(backbone).overrefused:
        known(verb, data.miniature.language.VERBS, f"verb (of backbones.{backbone}.overrefused)")


@functools.lru_cache(maxsize=1)
def official(folder: Path, benchmarks: tuple[str, ...], generated: bool) -> list[Item]:
    """All items of some benchmarks below a folder, read once by a process that makes several stages; `generated`: none that are
    ranked, which not every model and no server does."""
    items: list[Item] = []
    for name in benchmarks:
        module = evaluation.benchmarks.REAL[name]
        more, lost = evaluation.benchmarks.official.load(module, folder, evaluation.benchmarks.official.subset(module, generated))
        print("\n".join([f"{name}: {len(more)} items", *lost]), file=sys.stderr)
        items += [replace(item, id=f"{name}/{item.id}") for item in more]  # two benchmarks may count from 1
    return items


@dataclass(frozen=True)
class Stage:
    """How a run is made. Raise `version` when its results change.

    `cost`: seconds measured at mini on one core; `estimate`: for readers, what it takes where that says nothing.
    `load` is the same stage where the scale's source is "load", `pack` where its parts come from packages, `adopt` where others
    have trained the model; `seedless`: every seed has the same. `unless`: why a scale does without the stage, None where it has
    it (`graph.left_out` adds what then lacks an input). `gathers`: it reads those of its inputs that the scale has. `only`: the
    source of the scales that have it.
    """

    make: Callable[[Study, Path], Mapping[str, Any] | None]
    inputs: tuple[str, ...]
    params: Callable[[Study], Any]
    cost: int
    version: int = 1
    shared: bool = False
    load: Stage | None = None
    pack: Stage | None = None
    adopt: Stage | None = None
    seedless: bool = False
    estimate: str = ""
    unless: Callable[[Study], str | None] = lambda study: None
    gathers: bool = False
    only: str = ""


def _prepared(stage: Stage, study: Study, work: Path) -> Mapping[str, Any] | None:
    """Make a run on the scale's device and number of threads: the bits of a training depend on them."""
    import torch

    keep_freed_memory()
    torch.set_num_threads(study.scale.threads)
    with models.devices.chosen_by(study.scale):
        numbers = stage.make(study, work)
    for file in work.rglob(KEPT.format("*")):
        file.unlink()
    return numbers


def keep_freed_memory() -> None:
    """Ask glibc not to give freed pieces back to the system: they are needed again at once, and page faults cost a third."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        for option, size in ((-3, 2**25), (-1, 2**28)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            libc.mallopt(option, size)


class Bar:
    """A progress bar with time left that is fed absolute counts."""

    def __init__(self, what: str, total: int) -> None:
        self.bar = tqdm(total=total, desc=what, file=sys.stderr, mininterval=20.0, leave=False)

    def __call__(self, done: int) -> None:
        self.bar.update(done - self.bar.n)
        if done >= self.bar.total:
            self.bar.close()


def step_of(folder: Path) -> int:
    """The step of a checkpoint's folder; 0 for a model that was not trained in steps."""
    return int(folder.name.removeprefix("step-")) if folder.name.startswith("step-") else 0


def drop(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
