"""Which weights of a model are trained in a stage."""

from __future__ import annotations

import re
from collections.abc import Sequence

from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from vlsafe.core.scale import LoraSpec, known
from vlsafe.models.architectures import ATTENTION, MLP, PROJECTIONS, family_of, language_layers, language_part, projector_part

METHODS = ("projector", "full", "lora", "sppft")


def choose(
    model: PreTrainedModel, method: str, lora: LoraSpec, band: tuple[int, int] | None = None, blocks: Sequence[int] = ()
) -> PreTrainedModel:
    """Make the parts of a model trainable that a method trains; the vision tower never is.

    `projector` is LLaVA's stage 1. `full` is its stage 2: projector, language model and output head. `lora` puts adapters
    on every linear map of the blocks and trains the whole projector. `sppft` is `full` without the attention and the MLP of
    the blocks of `band`, or of `blocks` instead where there are any; their norms stay trainable, as published.

    Raises:   ValueError for an unknown method, naming the nearest, or for `sppft` without a band inside the model
    Source:   LLaVA-1.5 (finetune.sh, finetune_lora.sh); Hu et al. 2022; Li et al. 2024, SPPFT
    """
    known(method, METHODS, "training method")
    model.requires_grad_(False)
    if method == "lora":
        family = family_of(model)
        linear = rf"{re.escape(family.language)}\..*\.({'|'.join(PROJECTIONS)})"  # plain names would also hit the vision tower
        return get_peft_model(model, LoraConfig(
            r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=linear,
            modules_to_save=[family.projector.rpartition(".")[2]], task_type="CAUSAL_LM",
        ))  # fmt: skip
    projector_part(model).requires_grad_(True)
    if method != "projector":
        language_part(model).requires_grad_(True)
        model.get_output_embeddings().requires_grad_(True)
    if method == "sppft":
        layers = language_layers(model)
        if not blocks:
            if band is None or not 0 <= band[0] < band[1] <= len(layers):
                raise ValueError(f"a band to freeze lies inside [0, {len(layers)}), not {band}")
            blocks = range(*band)
        for block in blocks:
            for part in (ATTENTION, MLP):
                layers[block].get_submodule(part).requires_grad_(False)
    return model
