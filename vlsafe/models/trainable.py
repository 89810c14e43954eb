"""Which weights of a model may move during a stage."""

from __future__ import annotations

from collections.abc import Sequence

from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from vlsafe.core.scale import LoraSpec, known
from vlsafe.models.architectures import language_layers, language_part, projector_part

METHODS = ("projector", "full", "lora", "sppft")
LINEAR = r".*language_model\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
"""Every linear map of the language model's blocks. A plain list of names would also hit the vision tower."""


def choose(
    model: PreTrainedModel, method: str, lora: LoraSpec, band: tuple[int, int] | None = None, blocks: Sequence[int] = ()
) -> PreTrainedModel:
    """The model to train, with only the parts of a method moving; the vision tower never does.

    `projector` is LLaVA's stage 1. `full` is its stage 2: projector, language model and output head. `lora` puts adapters
    on every linear map of the blocks and moves the projector whole. `sppft` is `full` less the attention and the MLP of
    the blocks of `band`; their norms stay trainable, as published. Where `blocks` are given, any of them, they are frozen
    in its place.

    Raises:   ValueError for an unknown method, naming the nearest, or for `sppft` without a band inside the model
    Source:   LLaVA-1.5 (finetune.sh, finetune_lora.sh); Hu et al. 2022; Li et al. 2024, SPPFT
    """
    known(method, METHODS, "training method")
    model.requires_grad_(False)
    if method == "lora":
        targets = LoraConfig(
            r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=LINEAR,
            modules_to_save=["multi_modal_projector"], task_type="CAUSAL_LM",
        )  # fmt: skip
        return get_peft_model(model, targets)
    projector_part(model).requires_grad_(True)
    if method != "projector":
        language_part(model).requires_grad_(True)
        model.lm_head.requires_grad_(True)
    if method == "sppft":
        freeze(model, blocks or inside(model, band))
    return model


def inside(model: PreTrainedModel, band: tuple[int, int] | None) -> Sequence[int]:
    """The blocks of the band `[start, end)`, which must lie in the model."""
    layers = len(language_layers(model))
    if band is None or not 0 <= band[0] < band[1] <= layers:
        raise ValueError(f"a band to freeze lies inside [0, {layers}), not {band}")
    return range(*band)


def freeze(model: PreTrainedModel, blocks: Sequence[int]) -> None:
    """Stop the attention and the MLP of some blocks."""
    for block in blocks:
        layer = language_layers(model)[block]
        layer.self_attn.requires_grad_(False)
        layer.mlp.requires_grad_(False)


def moving(model: PreTrainedModel) -> int:
    """How many weights may move."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
