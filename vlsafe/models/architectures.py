"""Names of LLaVA's tensors in files and in memory, without a model library: what can be told of a key by reading it."""

from __future__ import annotations

import re

import torch
from torch import nn
from transformers import (
    CLIPModel,
    PreTrainedModel,
)

RENAMED = (  # what a key begins with in an older layout -> how the library calls it in memory
    ("language_model.lm_head.", "lm_head."),
    ("language_model.model.", "model.language_model."),
    ("vision_tower.", "model.vision_tower."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
    ("model.vision_tower.vision_model.", "model.vision_tower."),
)
BLOCK = re.compile(r"^model\.(?:language_model\.)?layers\.(\d+)\.")


def canonical(key: str) -> str:
    """The name in memory of a tensor of a checkpoint in either layout; a plain language model's keys stay as they are."""
    for old, new in RENAMED:
        if key.startswith(old):
            key = new + key.removeprefix(old)
    return key


def grafted(key: str) -> str:
    """The name in a LLaVA of a tensor of a plain language model."""
    return key.replace("model.", "model.language_model.", 1) if key.startswith("model.") else key


def of_language(key: str) -> bool:
    """Whether a tensor of a LLaVA, by its name in memory, belongs to the language model and its head."""
    return key.startswith(("model.language_model.", "lm_head."))


def block_of(key: str) -> int | None:
    """The decoder block that a tensor, by its name in memory, belongs to; None for all others, the vision tower's included."""
    found = BLOCK.match(key)
    return int(found.group(1)) if found else None


def vision_part(model: PreTrainedModel) -> nn.Module:
    """The vision tower's transformer."""
    tower = model.model.vision_tower
    return getattr(tower, "vision_model", tower)


def patch_embeddings(tower: CLIPModel, shown: torch.Tensor) -> torch.Tensor:
    """What a CLIP makes of each patch by itself.

    Shapes:   [P, 3, H, W]  ->  [P, patches, W]
    """
    return tower.vision_model.embeddings.patch_embedding(shown).flatten(2).transpose(1, 2)


def projector_part(model: PreTrainedModel) -> nn.Module:
    """The MLP between picture features and word embeddings."""
    return model.model.multi_modal_projector


def language_part(model: PreTrainedModel) -> nn.Module:
    """The decoder without its head, of a grafted model or of a plain language model."""
    return getattr(model.model, "language_model", model.model)


def language_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder blocks, counted from 0."""
    return language_part(model).layers


def block_names(model: PreTrainedModel) -> list[str]:
    """Class names of the blocks of which a model is a stack: decoder's, and the tower's where there is one."""
    blocks = {type(language_layers(model)[0]).__name__}
    if hasattr(model.model, "vision_tower"):
        blocks.add(type(vision_part(model).encoder.layers[0]).__name__)
    return sorted(blocks)


def final_norm(model: PreTrainedModel) -> nn.Module:
    """The norm between the last block and the head, also under adapters."""
    return language_part(getattr(model, "get_base_model", lambda: model)()).norm


def read_out(model: PreTrainedModel, states: torch.Tensor) -> torch.Tensor:
    """What the model would say next if a state were its last one: final norm and head.

    Shapes:   [..., D]  ->  logits [..., vocabulary]
    """
    return model.get_output_embeddings()(final_norm(model)(states))


def language_weights(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """The weights of decoder and head, named alike in a grafted and a plain model: `layers.3.mlp.up_proj.weight`."""
    return {name: weight for key, weight in model.named_parameters() if (name := language_name(key))}


def language_name(key: str) -> str | None:
    """What a checkpoint's tensor is called within the decoder, in whichever layout it lies; None for eyes and projector."""
    if any(organ in key for organ in ("vision_tower", "vision_model", "multi_modal_projector", "image_newline")):
        return None
    prefixes = ("model.language_model.", "language_model.model.", "language_model.", "model.")
    return key.removeprefix(next((prefix for prefix in prefixes if key.startswith(prefix)), ""))


def address(name: str) -> tuple[int | None, str]:
    """Block and module of a language weight, as `language_weights` names it; no block: embeddings, final norm, head."""
    parts = name.split(".")
    return (int(parts[1]), parts[-2]) if parts[0] == "layers" else (None, parts[0])
