"""A scale: a frozen value that holds the numbers of a reproduction. What is computed never depends on its name.

Here are the dataclasses, how one value extends another (`extended`), and how one becomes JSON (`as_plain`).
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from vlsafe.core.assets import Endpoint, Loaded
from vlsafe.core.fits import Dtype, Durability, Fit, LoraSpec, Preference, Rollout, Tuning, later, positive, share

PLACE = re.compile(r"\w([\w .+-]*[\w+-])?")  # names that are folders: nothing that leads out of one or that a shell reads


@dataclass(frozen=True)
class VisionSpec:
    """A CLIP, and which of its features the projector sees. `pad`: pictures are padded to a square in stage 2 and in
    examinations, as in LLaVA-1.5, where stage 1 crops them; else they are always cropped."""

    image_size: int = 32
    patch_size: int = 8
    vision_width: int = 64
    vision_layers: int = 4
    text_width: int = 64
    text_layers: int = 2
    heads: int = 4
    projection: int = 64
    feature_layers: tuple[int, ...] = (1, -1)  # object and position: a tiny tower's last layer alone is hard to align (LOG.md)
    feature_strategy: Literal["full", "default"] = "full"
    pad: bool = later(False)


@dataclass(frozen=True)
class LanguageSpec:
    """A decoder of one of the library's architectures (`model_type`); the miniature's is a Llama."""

    layers: int = 8
    width: int = 96
    heads: int = 8
    key_value_heads: int = 8
    mlp: int = 128
    attention_bias: bool = True  # Llama has none; with it, attending to the token before is learned sooner
    matching: float = 1.0  # correlation of a head's key with its query weights at the start; 0 is the library's
    copying: float = 0.5  # likewise of its output with its value weights; at 1, copying is early and matching late
    context: int = 256
    tied_head: bool = True
    initial_std: float = 0.06  # 0.02, the library's, is for wide models: at width 96 copying then takes twice the steps
    architecture: str = later("llama")
    vocabulary: int = later(0)  # of a decoder that is loaded: what the dry run counts with; a built one has its tokenizer's


@dataclass(frozen=True)
class Merging:
    """Merging: `ratios` of the linear merge, `votes` of the ensemble, `few` of all other rules; the share of a task vector that
    TIES keeps (`kept`) and that survives DARE (`survived`).

    Of the rules that the grid "full" alone has: `beyond` are ExPO's ratios, `rank` is the share of a task's singular vectors that
    TSV-M keeps, `weighing` how many rows each of Fisher's two diagonals is a mean over; the first and the last are assumed.

    Where a ratio is chosen, `margin` is by how much the upper bound of a merge's ASR may exceed its parent's, and `items` the
    number of validation items per benchmark of helpfulness; `random_bands` have as many blocks as the located band.
    """

    ratios: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    few: tuple[float, ...] = (0.3, 0.5, 0.7)
    votes: tuple[float, ...] = (0.3, 0.5, 0.7, 0.9)
    kept: float = 0.2  # Yadav et al. 2023: the top 20 %
    survived: float = 0.5  # assumed: Yu et al. 2024 drop up to 90 % of far larger models
    scaling: float = 1.0
    margin: float = 0.05
    items: int = 36
    random_bands: int = 3
    fixed: float = later(0.5)  # the ratio of every rule where there are no validation items to choose one by
    beyond: tuple[float, ...] = later((1.1, 1.25, 1.5))
    rank: float = later(0.5)  # Gargiulo et al. 2025: one part for each of two tasks
    weighing: int = later(256)
    requests: int = later(100)  # assumed: official requests per kind and modality that choose a ratio where tuning.pairs is 0

    def __post_init__(self) -> None:
        for name, of in ((name, getattr(self, name)) for name in ("ratios", "few", "votes")):
            if not of or not all(0 <= value <= 1 for value in of) or len({f"{value:.2f}" for value in of}) < len(of):
                raise ValueError(f"merging.{name}: numbers from 0 to 1 that differ in two digits, one or more; not {of}")
        for name in ("kept", "survived", "rank"):
            share(getattr(self, name), f"merging.{name}", above=True)


@dataclass(frozen=True)
class Search:
    """The search for the safety band of a parent: prompts per kind, pairs per cosine, scaling factors."""

    prompts: int = 100
    pairs: int = 500
    factors: tuple[float, ...] = (1.1, 1.3, 1.6)


@dataclass(frozen=True)
class Probing:
    """Hidden states and interventions.

    `prompts` of each kind and modality whose states are kept, `along` at every checkpoint and for other recipes; `items` per
    benchmark in the examination of an intervention; `widths` of transplanted bands, `random_sets` of blocks per width;
    `strengths` at which the refusal direction is added, beside `random_directions`; batches of each task whose gradients
    are compared, at how many points of a run; `frozen_sets` of random blocks in the SPPFT grid.
    """

    prompts: int = 175
    along: int = 60
    items: int = 72
    widths: tuple[int, ...] = (1, 2, 3)
    random_sets: int = 20
    strengths: tuple[float, ...] = (0.5, 1.0, 2.0)
    random_directions: int = 5
    gradient_batches: int = 6
    gradient_points: int = 4
    frozen_sets: int = 5


ALWAYS = {"grave": (1.0, 1.0), "serious": (1.0, 1.0), "minor": (1.0, 1.0)}


@dataclass(frozen=True)
class Backbone:
    """An aligned language model: its training, its chat template, what its alignment data leave out.

    `answered_categories`: harms that the alignment data answer instead of refusing, as loosely filtered instruction mixes do.
    `refusal_share`, `borderline_share`: shares of alignment rows that are refusals and that are harmless but sound dangerous.
    `refused`: shares of refusals among replies to harm, per grade, of its first and of its last category; `overrefused`: verbs
    whose harmless homonyms are mostly refused too. `language`: changes to the scale's decoder; the backbone is then pre-trained
    separately, else it is aligned from the base model that all others share.
    """

    template: str
    fit: Fit
    refusal_share: float = 0.35
    borderline_share: float = 0.15
    answered_categories: tuple[str, ...] = ()
    refused: Mapping[str, tuple[float, float]] = later(default_factory=lambda: dict(ALWAYS))
    overrefused: tuple[str, ...] = later(())
    language: Mapping[str, Any] = later(default_factory=dict)

    def __post_init__(self) -> None:
        for grade, ends in self.refused.items():
            known(grade, ALWAYS, "grade of refused")
            if not all(0 <= end <= 1 for end in ends):
                raise ValueError(f"refused.{grade}: shares from 0 to 1, not {list(ends)}")
        if min(self.refusal_share, self.borderline_share) < 0 or self.refusal_share + self.borderline_share > 1:
            raise ValueError("refusal_share and borderline_share are shares of one corpus, not "
                             f"{self.refusal_share} and {self.borderline_share}")  # fmt: skip


@dataclass(frozen=True)
class Traffic:
    """What the dry run assumes where no corpus has been read: text tokens a row, shares of rows with a picture, items.

    Defaults are for the paper's data, all assumed: captions are one sentence; 665,298 rows of mix665k hold 40,688 of ShareGPT
    without a picture and come to about 840 tokens each, at which LLaVA-1.5's published 10 hours are a quarter of the peak.
    """

    captions: int = 40
    instructions: int = 300
    pictured: float = 0.94
    safety: int = 200
    pairs: int = 350
    screened: int = 350  # tokens that the text guard reads per row, its own prompt included
    questions: int = 21_000  # answered with a letter or a word
    requests: int = 13_000  # answered in sentences: harmful ones, their twins and exaggerated-safety prompts
    answer: int = 200  # tokens of such an answer


@dataclass(frozen=True)
class Corpora:
    """Sizes of the miniature's corpora, in rows."""

    pictures: int = 12000
    guard_pictures: int = 3000
    captions: int = 6000
    instructions: int = 6000
    text_only_share: float = 0.06  # LLaVA-1.5's mix: 40,688 of 665,298 rows
    howtos: float = 0.02  # of rows with a picture, that ask how to do something with what it shows; assumed
    text_howtos: float = 0.03  # of all rows, without a picture; assumed: half of the text-only ones
    harmful_share: float = 0.02
    safety: int = 1200
    pairs: int = 600

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if value < 0 or (isinstance(value, float) and value > 1):
                raise ValueError(f"corpora.{name}: {'a share from 0 to 1' if isinstance(value, float) else 'rows'}, not {value}")


@dataclass(frozen=True)
class Exam:
    """Examinations: rows per benchmark in each of the two, generation, and at a scale that is loaded judges and validation.

    `judges`: per benchmark those that mark it, the first that can tell it for the headline, at least one of them a rule; what
    is not named here is not examined. `endpoints`: servers of judges that are not among the `loaded` ones, by judge.
    `validation`: the share of clusters by which checkpoints, bands, layers and ratios are chosen and which no rate counts.
    """

    panel: int = 36
    full: int = 240
    batch_size: int = 64
    max_new_tokens: int = 16
    captions: int = 200
    dtype: Dtype = later("float32")
    serve: str = later("")  # a command that serves `{folder}` on `{port}` and generates; empty: the local engine
    judges: Mapping[str, tuple[str, ...]] = later(default_factory=dict)
    endpoints: Mapping[str, Endpoint] = later(default_factory=dict)
    validation: float = later(0.2)

    def __post_init__(self) -> None:
        for name in ("panel", "full", "batch_size", "max_new_tokens", "captions"):
            positive(getattr(self, name), f"exam.{name}")
        share(self.validation, "exam.validation")


@dataclass(frozen=True)
class Scale:
    """Every number of one reproduction.

    `source`: "build" makes corpora and models, "load" takes the `loaded` ones from outside. `device`: "cpu" or "cuda"; empty: a
    GPU where there is one if models are loaded, the CPU if they are built, which is faster for models that small.
    """

    name: str
    vision: VisionSpec
    language: LanguageSpec
    tower: Fit
    pretraining: Fit
    guard: Fit
    projector: Fit
    instruct: Fit
    tuning: Tuning
    backbones: Mapping[str, Backbone]
    corpora: Corpora = field(default_factory=Corpora)
    exam: Exam = field(default_factory=Exam)
    lora: LoraSpec = field(default_factory=LoraSpec)
    search: Search = field(default_factory=Search)
    probing: Probing = field(default_factory=Probing)
    merging: Merging = field(default_factory=Merging)
    durability: Durability = later(default_factory=Durability)
    checkpoints: tuple[int, ...] = (3, 6, 12, 25, 50, 75, 100)
    arm_checkpoints: tuple[int, ...] = (6, 25, 75)  # of the data arms and other methods, for equal helpfulness
    rates: tuple[float, ...] = (0.4, 2.5)  # "slow" and "fast", as multiples of the rate of stage 2; none: without them
    threads: int = 1
    traffic: Traffic = field(default_factory=Traffic)
    source: Literal["build", "load"] = "build"
    loaded: Loaded | None = None
    device: Literal["", "cpu", "cuda"] = later("")

    def __post_init__(self) -> None:
        if not PLACE.fullmatch(self.name):
            raise ValueError(
                f"the name {self.name!r} is to be a folder's: letters, digits, spaces and . _ + - alone, a letter first"
            )
        for name in self.backbones:
            if not PLACE.fullmatch(name) or " " in name or name == "shared":
                raise ValueError(
                    f"the backbone's name {name!r} is to be a folder's: letters, digits and . _ + - alone, not 'shared'"
                )
        if self.source not in ("build", "load") or (self.source == "load") != (self.loaded is not None):
            raise ValueError(f"the source is 'build', or 'load' with what is loaded; {self.name!r} says {self.source!r}")
        positive(self.threads, "threads")
        for name in ("checkpoints", "arm_checkpoints"):
            positive(min(getattr(self, name), default=1), f"steps of scale.{name}")
        if len(self.rates) not in (0, 2):
            raise ValueError(f"scale.rates must have 2 entries, slow and fast, or none, not {list(self.rates)}")

    def decoder(self, name: str) -> LanguageSpec:
        """The decoder of a backbone.

        Raises:   ValueError for a field that a decoder does not have
        """
        return extended(self.language, self.backbone(name).language, f"scale.backbones.{name}.language")

    def backbone(self, name: str) -> Backbone:
        """The named backbone; an unknown name is refused with the nearest known one."""
        return self.backbones[known(name, self.backbones, "backbone")]


FEW = 10  # names in an error; of more than twice as many the nearest are shown


def known(name: str, names: Iterable[str], what: str) -> str:
    """Return `name` if it is one of `names`.

    Raises:   ValueError naming the value, the nearest known name, and all of them
    """
    choices = sorted(names)
    if name in choices:
        return name
    near = difflib.get_close_matches(str(name), choices, n=FEW, cutoff=0.0)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    listed = ", ".join(choices) if len(choices) <= 2 * FEW else f"{', '.join(near)} and {len(choices) - len(near)} more"
    raise ValueError(f"unknown {what} {name!r}{hint} (known: {listed})")


def extended(base: Any, changes: Any, where: str = "scale") -> Any:
    """A copy of a frozen value (of a class: a new value) with fields replaced, nested ones by nested mappings, types checked."""
    kind = base if isinstance(base, type) else type(base)
    hints, values = typing.get_type_hints(kind), {}
    for key, value in _mapping(changes, where).items():
        known(key, hints, f"key of {where}")
        values[key] = _converted(value, hints[key], getattr(base, key, None), f"{where}.{key}")
    try:
        return kind(**values) if base is kind else dataclasses.replace(base, **values)
    except (TypeError, ValueError) as error:  # TypeError: a new value lacks fields
        raise ValueError(f"{where}: {error}") from None


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} must be a mapping of its fields, not {value!r}")
    return value


def _converted(value: Any, hint: Any, current: Any, where: str) -> Any:
    """A value as the field's type wants it, with what is in lists and mappings; every mistake names its place."""
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kind, *parameters = typing.get_origin(allowed[0]) or allowed[0], *typing.get_args(allowed[0])
    if kind is Literal:
        return known(value, parameters, where)
    if dataclasses.is_dataclass(kind) and (isinstance(value, Mapping) or len(allowed) == 1):
        return extended(kind if current is None else current, value, where)
    if kind is Mapping:
        return _entries(_mapping(value, where), parameters[1], current or {}, where)
    if kind is tuple and isinstance(value, list | tuple):
        kinds = parameters[:1] * len(value) if parameters[-1] is ... else parameters
        if len(kinds) != len(value):
            raise ValueError(f"{where} must have {len(kinds)} entries, not {len(value)}: {value!r}")
        return tuple(_converted(e, of, None, f"{where}[{i}]") for i, (e, of) in enumerate(zip(value, kinds, strict=True)))
    text = isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value)  # YAML reads 1e-4 as text
    if float in allowed and (text or type(value) is int):
        value = float(value)
    if type(value) not in allowed:
        names = ("a list" if typing.get_origin(k) is tuple else getattr(k, "__name__", str(k)) for k in allowed)
        raise ValueError(f"{where} must be {' or '.join(names)}, not {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} must be a finite number, not {value!r}")
    return value


def _entries(value: Mapping[str, Any], of: Any, entries: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The entries of a mapping with changed and new ones; null removes one."""
    for name in value:
        if not isinstance(name, str):
            raise ValueError(f"{where} has the key {name!r}, which is no text; put it in quotes")
    if of is Any:
        return {**entries, **value}
    kept = {name: entry for name, entry in entries.items() if value.get(name, entry) is not None}
    changes = {name: entry for name, entry in value.items() if entry is not None}
    if isinstance(of, type) and dataclasses.is_dataclass(of):
        return {**kept, **{name: _entry(e, of, entries, name, f"{where}.{name}") for name, e in changes.items()}}
    return {**kept, **{name: _converted(e, of, None, f"{where}.{name}") for name, e in changes.items()}}


def _entry(changes: Any, kind: type, entries: Mapping[str, Any], name: str, where: str) -> Any:
    """An entry of `backbones` or `parents`: changes to a known one, or a new one; a new backbone says which it `extends`."""
    if kind is not Backbone or not entries:
        return extended(entries.get(name, kind), changes, where)
    changes = dict(_mapping(changes, where))
    base = changes.pop("extends", name)
    if base not in entries and base == name:
        raise ValueError(f"{where} is new; say which backbone it extends (one of {', '.join(sorted(entries))})")
    return extended(entries[known(base, entries, "backbone")], changes, where)


def as_plain(value: Any) -> Any:
    """A frozen value as JSON-ready dictionaries and lists, as digests and manifests hold it."""
    if dataclasses.is_dataclass(value):
        entries = [(of, as_plain(getattr(value, of.name))) for of in dataclasses.fields(value)]
        return {of.name: plain for of, plain in entries if "later" not in of.metadata or plain != as_plain(of.metadata["later"])}
    if isinstance(value, Mapping):
        return {str(key): as_plain(entry) for key, entry in value.items()}
    if isinstance(value, tuple | list):
        return [as_plain(entry) for entry in value]
    return value


def alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two plain scales may share a place in a run store: they differ at most in backbones that only one of them has."""
    mine, others = one["backbones"], other["backbones"]
    rest = [{key: value for key, value in plain.items() if key != "backbones"} for plain in (one, other)]
    return rest[0] == rest[1] and all(mine[name] == others[name] for name in mine.keys() & others.keys())
