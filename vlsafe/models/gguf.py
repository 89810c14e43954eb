"""A quantised Llama in a GGUF file as an ordinary Hugging Face checkpoint in float32, with its tokenizer.

The library reads such files too, but takes a minute and does not save what it has read. Needs the extra `pocket`.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from vlsafe.core.writing import file_digest
from vlsafe.models import checkpoints

KNOWN = {"general.architecture": "llama", "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm"}
CONTROL = 3  # llama.cpp's token type of markers, which a prompt's text cannot write
GLOBAL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
BLOCK = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


def converted(file: Path, folder: Path) -> dict[str, Any]:
    """Write the model of a GGUF file as a checkpoint, and return what a manifest says of it.

    The weights are what the quantised ones stand for, no more: the original's bits below the quantisation are gone. The chat
    template is the file's own.

    Raises:   ImportError without the package gguf; ValueError for another architecture or tokenizer than SmolLM2's
    """
    import gguf  # only here: it belongs to an extra

    try:
        reader = gguf.GGUFReader(file)
    except (IndexError, ValueError) as error:
        raise ValueError(f"{file.name} is not a whole GGUF file: {error}") from None
    fields, tensors = _read(reader, file.name)
    config = _config(fields, tied="output.weight" not in tensors)
    weights = {
        _name(name): torch.from_numpy(np.array(gguf.dequantize(raw, kind), np.float32)) for name, (kind, raw) in tensors.items()
    }
    for name, weight in weights.items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weights[name] = _unpermuted(weight, len(weight) // config.head_dim)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    tokenizer = _tokenizer(fields)
    checkpoints.save(model, folder, tokenizer)
    return {
        "weights": model.num_parameters(), "sha256": file_digest(file), "licence": fields["general.license"],
        "tensors": dict(Counter(kind.name for kind, _ in tensors.values())),
    }  # fmt: skip


def _read(reader: Any, file: str) -> tuple[dict[str, Any], dict[str, tuple[Any, np.ndarray]]]:
    """Fields by name, and each tensor's quantisation and raw values."""
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if found := {key: fields.get(key) for key, known in KNOWN.items() if fields.get(key) != known}:
        raise ValueError(f"{file} says {found}; only {KNOWN} is converted")
    return fields, {tensor.name: (tensor.tensor_type, tensor.data) for tensor in reader.tensors}


def _name(name: str) -> str:
    """A tensor's name in the library:  "blk.3.attn_q.weight"  ->  "model.layers.3.self_attn.q_proj.weight"."""
    *block, part, leaf = name.split(".")
    return f"model.layers.{block[1]}.{BLOCK[part]}.{leaf}" if block else f"{GLOBAL[part]}.{leaf}"


def _unpermuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Query or key rows in the library's order: llama.cpp rotates neighbouring rows of a head, the library its two halves.

    Shapes:   [heads * D, W]  ->  [heads * D, W]
    """
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(weight.shape).contiguous()


def _config(fields: dict[str, Any], tied: bool) -> transformers.LlamaConfig:
    def value(name: str) -> Any:
        return fields[f"llama.{name}"]

    return transformers.LlamaConfig(
        vocab_size=value("vocab_size"), hidden_size=value("embedding_length"), intermediate_size=value("feed_forward_length"),
        num_hidden_layers=value("block_count"), num_attention_heads=value("attention.head_count"),
        num_key_value_heads=value("attention.head_count_kv"), max_position_embeddings=value("context_length"),
        rms_norm_eps=float(str(np.float32(value("attention.layer_norm_rms_epsilon")))),  # 1e-5, not its nearest float32
        rope_parameters={"rope_type": "default", "rope_theta": value("rope.freq_base")}, tie_word_embeddings=tied,
        bos_token_id=fields["tokenizer.ggml.bos_token_id"], eos_token_id=fields["tokenizer.ggml.eos_token_id"],
        pad_token_id=fields["tokenizer.ggml.padding_token_id"], dtype="float32",
    )  # fmt: skip


def _tokenizer(fields: dict[str, Any]) -> PreTrainedTokenizerFast:
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    backend = Tokenizer(BPE({token: number for number, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, fields["tokenizer.ggml.token_type"], strict=True) if kind == CONTROL]
    backend.add_special_tokens(control)
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    special = {f"{name}_token": tokens[fields[f"tokenizer.ggml.{theirs}_token_id"]] for name, theirs in names.items()}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=fields["llama.context_length"], clean_up_tokenization_spaces=False, **special
    )
    tokenizer.chat_template = fields["tokenizer.chat_template"]
    return tokenizer
