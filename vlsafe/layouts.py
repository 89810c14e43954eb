"""Names of LLaVA's tensors in files and in memory, without a model library: what can be told of a key by reading it."""

from __future__ import annotations

import re

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
