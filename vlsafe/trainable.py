"""Which weights of a model may move during a stage."""

from __future__ import annotations

from transformers import PreTrainedModel

from vlsafe.models import language_part, projector_part, vision_part
from vlsafe.scales import known

PARTS = {
    "projector": ("projector",),  # stage 1: LLaVA's tune_mm_mlp_adapter
    "full": ("projector", "language"),  # stage 2: everything but the vision tower, which stays frozen always
}


def choose(model: PreTrainedModel, method: str) -> int:
    """Let only the parts of a method require gradients; the output head belongs to the language part.

    Units:    -> number of weights that may move
    Raises:   ValueError for an unknown method, naming the nearest
    """
    parts = PARTS[known(method, PARTS, "training method")]
    model.requires_grad_(False)
    projector_part(model).requires_grad_("projector" in parts)
    vision_part(model).requires_grad_(False)
    if "language" in parts:
        language_part(model).requires_grad_(True)
        model.lm_head.requires_grad_(True)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
