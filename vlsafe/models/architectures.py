"""Where the parts of a model are, by model type. This is the only file that knows: a new family is one entry of `FAMILIES`.

A weight is named as in memory, in whichever layout a file stores it. A language weight also has a name within the decoder, which
is the same in a vision-language model and its text parent (`layers.3.mlp.up_proj.weight`).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from vlsafe.models.weights import read_object

if TYPE_CHECKING:  # a second and more of imports, which most merges do not need
    from transformers import CLIPModel, PreTrainedConfig, PreTrainedModel


class Family(NamedTuple):
    """Addresses of submodules in memory; empty where a family has no such part.

    `language`: the decoder without its head, with `layers` and `norm`. `vision`: the tower's transformer, whose blocks are at
    `blocks` in it. `projector`: what maps its features to word embeddings; `beside`: further weights that pictures alone use.
    `parent`: the type of plain language models whose weights fit, where it is not that of the text config. `renamed`:
    beginnings of names in files -> in memory, applied in this order. `crossed`: the blocks in `layers` that attend to pictures;
    they belong to the projector, are skipped for text, and are not counted as blocks of the language model.
    """

    language: str = ""
    vision: str = ""
    projector: str = ""
    beside: tuple[str, ...] = ()
    blocks: str = "encoder.layers"
    parent: str = ""
    renamed: tuple[tuple[str, str], ...] = ()
    crossed: tuple[int, ...] = ()  # of one model, from its config


# Of text-only types that are not listed as well. Files of a model without its head lack the first part of the names.
DECODER = Family(language="model", renamed=tuple((f"{name}.", f"model.{name}.") for name in ("layers", "embed_tokens", "norm")))
LLAVA = Family(
    language="model.language_model", vision="model.vision_tower", projector="model.multi_modal_projector",
    renamed=(
        ("language_model.lm_head.", "lm_head."),
        ("language_model.model.", "model.language_model."),
        ("language_model.", "model.language_model."),
        ("vision_tower.", "model.vision_tower."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
        ("model.vision_tower.vision_model.", "model.vision_tower."),
    ),
)  # fmt: skip
LLAVA_NEXT = LLAVA._replace(beside=("model.image_newline",), renamed=(*LLAVA.renamed, ("image_newline", "model.image_newline")))
QWEN_VL = Family(
    language="model.language_model", vision="model.visual", projector="model.visual.merger", blocks="blocks", parent="qwen2",
    renamed=(
        ("visual.", "model.visual."),
        *((f"model.{name}.", f"model.language_model.{name}.") for name in ("layers", "embed_tokens", "norm")),
    ),
)  # fmt: skip
IDEFICS3 = Family(language="model.text_model", vision="model.vision_model", projector="model.connector")
FAMILIES = {
    "llava": LLAVA,
    "llava_next": LLAVA_NEXT, "llava_onevision": LLAVA_NEXT,
    "qwen2_vl": QWEN_VL, "qwen2_5_vl": QWEN_VL,
    "idefics3": IDEFICS3, "smolvlm": IDEFICS3,
    "paligemma": LLAVA, "gemma3": LLAVA,
    "mllama": LLAVA._replace(
        vision="model.vision_model", blocks="transformer.layers", parent="llama",
        renamed=(*LLAVA.renamed, ("vision_model.", "model.vision_model.")),
    ),
    "clip": Family(vision="vision_model"),
    "vlsafe_efficientnet": Family(),  # a tower and nothing else: its vision part is itself
    "llama": DECODER, "mistral": DECODER, "qwen2": DECODER, "gemma": DECODER, "gemma2": DECODER, "gemma3_text": DECODER,
}  # fmt: skip
# Within a decoder block, of all families: its attention and MLP, and their linear maps.
ATTENTION, MLP = "self_attn", "mlp"
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
WITHIN = ("layers.", "embed_tokens.", "norm.", "lm_head.")  # how names within the decoder begin
EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"  # names within the decoder; one tensor where they are tied
DERIVED = re.compile(r"(^|\.)(rotary\w*\.\w*inv_freq|position_ids)$")  # buffers that a model computes and old files hold


def config_of(folder: Path) -> PreTrainedConfig:
    """The config of a checkpoint's folder with its type's defaults; an unknown type has those of all models.

    Raises:   FileNotFoundError where there is none; ValueError, naming the file, where it is no config
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

    from vlsafe.models import lite_config  # noqa: F401 (it tells the library about our own type)

    raw = read_object(folder / "config.json")
    if _kind(folder) in CONFIG_MAPPING:
        try:
            return AutoConfig.from_pretrained(folder)
        except StrictDataclassError as error:
            reason = " ".join(str(error.__cause__ or error).split())
            raise ValueError(f"{folder / 'config.json'} is no config of the type {raw['model_type']!r}: {reason}") from error
    return PreTrainedConfig(tie_word_embeddings=bool(raw.get("tie_word_embeddings")))


def ties(folder: Path) -> bool:
    """Whether the config of a checkpoint says that embedding and head are one tensor, as the library reads it."""
    raw = read_object(folder / "config.json")
    if FAMILIES.get(_kind(folder)) is DECODER and isinstance(raw.get("tie_word_embeddings"), bool):
        return raw["tie_word_embeddings"]
    return bool(getattr(config_of(folder), "tie_word_embeddings", False))


def family_of(model: PreTrainedModel | Path) -> Family:
    """The family of a model in memory, or of a checkpoint's folder by its config.json.

    Raises:   ValueError for a vision-language model of a type that is not in `FAMILIES`
    """
    if isinstance(model, Path):
        kind, multimodal = _kind(model), "vision_config" in read_object(model / "config.json")
    else:
        kind, multimodal = model.config.model_type, hasattr(model.config, "vision_config")
    if multimodal and kind not in FAMILIES:
        raise ValueError(
            f"vision-language models of the type {kind!r} are not known; say where their parts are in FAMILIES of "
            f"vlsafe/models/architectures.py (known: {', '.join(sorted(FAMILIES))})"
        )
    family = FAMILIES.get(kind, DECODER)
    if not (family.vision and family.language):
        return family
    text = (config_of(model) if isinstance(model, Path) else model.config).get_text_config()
    return family._replace(crossed=tuple(getattr(text, "cross_attention_layers", None) or ()))


def naming(folder: Path) -> Family:
    """How files of a checkpoint name its weights; a type that is not in `FAMILIES` has the names of a plain decoder."""
    return FAMILIES.get(_kind(folder), DECODER)


def _kind(folder: Path) -> str:
    """The type of a checkpoint's model; "" where its config names none."""
    kind = read_object(folder / "config.json").get("model_type", "")
    if not isinstance(kind, str):
        raise ValueError(f"{folder / 'config.json'} has the model_type {kind!r}, which should be a name")
    return kind


def decoder_type(folder: Path) -> str:
    """The type of plain language models whose weights fit the decoder of a checkpoint, which may be one itself."""
    family, kind = family_of(folder), _kind(folder)
    return (family.parent or config_of(folder).get_text_config().model_type) if family.vision else kind


def is_multimodal(folder: Path) -> bool:
    """Whether a checkpoint has a vision tower."""
    return '"vision_config"' in (Path(folder) / "config.json").read_text(encoding="utf-8")


def _part(model: PreTrainedModel, where: str) -> nn.Module:
    """A part of a model, also under adapters."""
    where = getattr(family_of(model), where)
    return getattr(model, "get_base_model", lambda: model)().get_submodule(where)


def language_part(model: PreTrainedModel) -> nn.Module:
    """The decoder without its head, of a grafted model or of a plain language model."""
    return _part(model, "language")


def vision_part(model: PreTrainedModel) -> nn.Module:
    """The vision tower's transformer."""
    return _part(model, "vision")


def projector_part(model: PreTrainedModel) -> nn.Module:
    """What maps picture features to word embeddings."""
    return _part(model, "projector")


def language_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder blocks, counted from 0, without those that attend to pictures."""
    blocks, crossed = language_part(model).layers, family_of(model).crossed
    return nn.ModuleList(block for i, block in enumerate(blocks) if i not in crossed) if crossed else blocks


def final_norm(model: PreTrainedModel) -> nn.Module:
    """The norm between the last block and the head."""
    return language_part(model).norm


def block_names(model: PreTrainedModel) -> list[str]:
    """Class names of the blocks of which a model is a stack: the decoder's, and the tower's where there is one."""
    blocks = {type(language_layers(model)[0]).__name__}
    if (family := family_of(model)).vision:
        blocks.add(type(vision_part(model).get_submodule(family.blocks)[0]).__name__)
    return sorted(blocks)


def patch_embeddings(tower: CLIPModel, pixels: torch.Tensor) -> torch.Tensor:
    """A CLIP's embedding of each patch, before a position is added.

    Shapes:   [P, 3, H, W]  ->  [P, patches, W]
    """
    return vision_part(tower).embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)


def read_out(model: PreTrainedModel, states: torch.Tensor) -> torch.Tensor:
    """Next-token logits if a state were the last one (logit lens): final norm and head.

    Shapes:   [..., D]  ->  logits [..., vocabulary]
    """
    return model.get_output_embeddings()(final_norm(model)(states))


def canonical(key: str, family: Family) -> str:
    """The name in memory of a tensor of a checkpoint in any layout of its family."""
    for old, new in family.renamed:
        if key.startswith(old):
            key = new + key.removeprefix(old)
    return key


def grafted(key: str) -> str:
    """The name in a LLaVA of a tensor of a plain language model."""
    start, new = (f"{family.language}." for family in (DECODER, LLAVA))
    return new + key.removeprefix(start) if key.startswith(start) else key


def within(key: str, part: str) -> bool:
    """Whether a weight belongs to a part ("vision", "projector"), by its name in any layout, also under adapters."""
    names = {getattr(family, part).rpartition(".")[2] for family in FAMILIES.values()} - {""}
    return not names.isdisjoint(key.split(".")) and not (part == "vision" and within(key, "projector"))


def language_name(key: str, family: Family) -> str | None:
    """The name within the decoder of a tensor of a checkpoint in any layout of its family; None for all that is not the
    language model's own: tower, projector, blocks that attend to pictures, derived buffers, names that are not known."""
    key = canonical(key, family)
    start = "" if key.startswith("lm_head.") else f"{family.language}."
    name = key.removeprefix(start)
    if not key.startswith(start) or not name.startswith(WITHIN) or DERIVED.search(key):
        return None
    block = address(name)[0]
    if block is None or not family.crossed:
        return name
    below = sum(crossed < block for crossed in family.crossed)
    return None if block in family.crossed else name.replace(f"layers.{block}.", f"layers.{block - below}.", 1)


def part_of(key: str, family: Family) -> str | None:
    """The part that a tensor belongs to, by its name in any layout of its family: "language", "projector", "vision", or
    "derived" for buffers that a model computes; None for a name that its family does not have."""
    if DERIVED.search(key):
        return "derived"
    if language_name(key, family) is not None:
        return "language"
    key = canonical(key, family)
    crossed = tuple(f"{family.language}.layers.{block}" for block in family.crossed)
    for part, places in {"projector": (family.projector, *family.beside, *crossed), "vision": (family.vision,)}.items():
        if any(place and f"{key}.".startswith(f"{place}.") for place in places):
            return part
    return None


def language_weights(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """The weights of decoder and head by their names within the decoder.

    Raises:   ValueError for an unknown vision-language type, or a weight that its family does not have, by its name
    """
    family = family_of(model)
    if unknown := [key for key, _ in model.named_parameters() if part_of(key, family) is None]:
        raise ValueError(unrecognised(unknown, type(model).__name__))
    return {name: weight for key, weight in model.named_parameters() if (name := language_name(key, family)) is not None}


def unrecognised(keys: list[str], where: str) -> str:
    """What to say of names that a family does not have."""
    own = any("mm_projector" in key for key in keys)
    remedy = (
        "these are the names of LLaVA's own code: take the repository in transformers' layout, whose name ends in -hf"
        if own
        else "FAMILIES of vlsafe/models/architectures.py says where the parts of a type are"
    )
    listed = f"{', '.join(sorted(keys)[:6])}{', …' if len(keys) > 6 else ''}"
    return f"{where} has weights of which it is not known to what part they belong ({len(keys)}): {listed}; {remedy}"


def address(name: str) -> tuple[int | None, str]:
    """Block and module of a language weight, as `language_weights` names it; no block: embeddings, final norm, head."""
    parts = name.split(".")
    return (int(parts[1]), parts[-2]) if parts[0] == "layers" else (None, parts[0])


def block_of(key: str) -> int | None:
    """The decoder block that a tensor belongs to, by its name in any layout; None for all others, the vision tower's included."""
    names = (language_name(key, family) for family in set(FAMILIES.values()))
    return next((block for name in names if name and (block := address(name)[0]) is not None), None)
