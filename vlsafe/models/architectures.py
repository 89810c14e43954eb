"""Where the parts of a model are, by model type. This is the only file that knows: a new family is one entry of `FAMILIES`.

A weight is named as in memory, in whichever layout a file stores it. A language weight also has a name within the decoder, which
is the same in a grafted and a plain model (`layers.3.mlp.up_proj.weight`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from transformers import CLIPModel, PreTrainedModel


class Family(NamedTuple):
    """Addresses of submodules in memory; empty where a family has no such part.

    `language`: the decoder without its head, with `layers` and `norm`. `vision`: the tower's transformer, with `embeddings` and
    `encoder.layers`. `renamed`: beginnings of names in files -> in memory, applied in this order.
    """

    language: str = ""
    vision: str = ""
    projector: str = ""
    renamed: tuple[tuple[str, str], ...] = ()


DECODER = Family(language="model")  # also of text-only types that are not listed
FAMILIES = {
    "llava": Family(
        language="model.language_model", vision="model.vision_tower", projector="model.multi_modal_projector",
        renamed=(
            ("language_model.lm_head.", "lm_head."),
            ("language_model.model.", "model.language_model."),
            ("language_model.", "model.language_model."),
            ("vision_tower.", "model.vision_tower."),
            ("multi_modal_projector.", "model.multi_modal_projector."),
            ("model.vision_tower.vision_model.", "model.vision_tower."),
        ),
    ),
    "clip": Family(vision="vision_model"),
    "llama": DECODER, "mistral": DECODER, "qwen2": DECODER,
}  # fmt: skip
# Within a decoder block, of all families: its attention and MLP, and their linear maps.
ATTENTION, MLP = "self_attn", "mlp"
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LANGUAGE = sorted({f"{family.language}." for family in FAMILIES.values() if family.language}, key=len, reverse=True)


def family_of(model: PreTrainedModel | Path) -> Family:
    """The family of a model in memory, or of a checkpoint's folder by its config.json.

    Raises:   ValueError for a vision-language model of a type that is not in `FAMILIES`
    """
    if isinstance(model, Path):
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        kind, multimodal = config.get("model_type", ""), "vision_config" in config
    else:
        kind, multimodal = model.config.model_type, hasattr(model.config, "vision_config")
    if multimodal and kind not in FAMILIES:
        raise ValueError(
            f"vision-language models of the type {kind!r} are not known; say where their parts are in FAMILIES of "
            f"vlsafe/models/architectures.py (known: {', '.join(sorted(FAMILIES))})"
        )
    return FAMILIES.get(kind, DECODER)


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
    """The MLP between picture features and word embeddings."""
    return _part(model, "projector")


def language_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder blocks, counted from 0."""
    return language_part(model).layers


def final_norm(model: PreTrainedModel) -> nn.Module:
    """The norm between the last block and the head."""
    return language_part(model).norm


def block_names(model: PreTrainedModel) -> list[str]:
    """Class names of the blocks of which a model is a stack: the decoder's, and the tower's where there is one."""
    blocks = {type(language_layers(model)[0]).__name__}
    if family_of(model).vision:
        blocks.add(type(vision_part(model).encoder.layers[0]).__name__)
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


def canonical(key: str) -> str:
    """The name in memory of a tensor of a checkpoint in any layout; a plain language model's names stay as they are."""
    for old, new in (pair for family in FAMILIES.values() for pair in family.renamed):
        if key.startswith(old):
            key = new + key.removeprefix(old)
    return key


def grafted(key: str) -> str:
    """The name in a LLaVA of a tensor of a plain language model."""
    start, new = (f"{family.language}." for family in (DECODER, FAMILIES["llava"]))
    return new + key.removeprefix(start) if key.startswith(start) else key


def within(key: str, part: str) -> bool:
    """Whether a weight belongs to a part ("vision", "projector"), by its name in any layout, also under adapters."""
    names = {getattr(family, part).rpartition(".")[2] for family in FAMILIES.values()} - {""}
    return not names.isdisjoint(key.split("."))


def language_name(key: str) -> str | None:
    """The name within the decoder of a tensor of a checkpoint in any layout; None for vision tower and projector."""
    if within(key, "vision") or within(key, "projector"):
        return None
    key = canonical(key)
    return key.removeprefix(next((start for start in LANGUAGE if key.startswith(start)), ""))


def language_weights(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """The weights of decoder and head by their names within the decoder."""
    family_of(model)  # refuses a type whose names would not be understood
    return {name: weight for key, weight in model.named_parameters() if (name := language_name(key)) is not None}


def address(name: str) -> tuple[int | None, str]:
    """Block and module of a language weight, as `language_weights` names it; no block: embeddings, final norm, head."""
    parts = name.split(".")
    return (int(parts[1]), parts[-2]) if parts[0] == "layers" else (None, parts[0])


def block_of(key: str) -> int | None:
    """The decoder block that a tensor belongs to; None for all others, the vision tower's included."""
    return address(language_name(key) or "")[0]
