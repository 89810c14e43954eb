"""Tiny random models of the vision-language families, from their real config classes, with a matching text parent and inputs.

`built(name)` returns a model with small noise on every weight; `parent(name, seed)` a plain language model whose weights fit its
decoder, with `padding` fewer rows of embedding and head; `inputs(name)` a batch of two rows with a picture each, ready for the
model (PICTURE marks the places of picture features); `saved(model, folder, layout)` a folder as transformers writes it ("memory")
or as the hub has it ("hub").
"""

import re

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

WORDS, PICTURE, SIDE = 72, 70, 16  # rows of the embedding; the id of the picture's placeholder; pixels
TEXT = dict(
    vocab_size=WORDS, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=0, initializer_range=0.2, rms_norm_eps=1e-6,
)  # fmt: skip
TOWER = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE, patch_size=8)
CLIP = {"model_type": "clip_vision_model", **TOWER}
SIGLIP = {"model_type": "siglip_vision_model", **TOWER, "vision_use_head": False}
GEMMA = dict(head_dim=8, tie_word_embeddings=True)
LAYERED = dict(
    layer_types=["sliding_attention", "full_attention", "sliding_attention"], sliding_window=64, query_pre_attn_scalar=8
)
ROPE = dict(rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]})
CROSSED = [1, 3]  # mllama's blocks that attend to pictures

# Config class, arguments; type of the text parent and its own arguments.
CONFIGS = {
    "llava": (
        "LlavaConfig", dict(text_config={"model_type": "llama", **TEXT}, vision_config=CLIP, image_token_index=PICTURE,
                            image_seq_length=4),
        ("llama", {}),
    ),
    "llava_next": (
        "LlavaNextConfig", dict(text_config={"model_type": "mistral", **TEXT, "sliding_window": None}, vision_config=CLIP,
                                image_token_index=PICTURE, image_grid_pinpoints=[[SIDE, SIDE]], image_seq_length=4),
        ("mistral", {"sliding_window": None}),
    ),
    "llava_onevision": (
        "LlavaOnevisionConfig", dict(text_config={"model_type": "qwen2", **TEXT}, vision_config=SIGLIP, image_token_index=PICTURE,
                                     image_grid_pinpoints=[[SIDE, SIDE]], vision_feature_select_strategy="full"),
        ("qwen2", {}),
    ),
    "qwen2_vl": (
        "Qwen2VLConfig", dict(text_config={"model_type": "qwen2_vl_text", **TEXT, **ROPE},
                              vision_config=dict(depth=2, embed_dim=16, hidden_size=32, num_heads=2, mlp_ratio=2, patch_size=4,
                                                 spatial_merge_size=2, temporal_patch_size=2),
                              image_token_id=PICTURE, vision_start_token_id=69, video_token_id=71),
        ("qwen2", {}),
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VLConfig", dict(text_config={"model_type": "qwen2_5_vl_text", **TEXT, **ROPE},
                                 vision_config=dict(depth=2, hidden_size=16, intermediate_size=24, out_hidden_size=32,
                                                    num_heads=2, patch_size=4, spatial_merge_size=2, temporal_patch_size=2,
                                                    window_size=16, fullatt_block_indexes=[1]),
                                 image_token_id=PICTURE, vision_start_token_id=69, video_token_id=71, tie_word_embeddings=True),
        ("qwen2", {"tie_word_embeddings": True}),
    ),
    "idefics3": (
        "Idefics3Config", dict(text_config={"model_type": "llama", **TEXT}, vision_config=TOWER, image_token_id=PICTURE,
                               scale_factor=1),
        ("llama", {}),
    ),
    "smolvlm": (
        "SmolVLMConfig", dict(text_config={"model_type": "llama", **TEXT}, vision_config=TOWER, image_token_id=PICTURE,
                              scale_factor=1, tie_word_embeddings=True),
        ("llama", {"tie_word_embeddings": True}),
    ),
    "paligemma": (
        "PaliGemmaConfig", dict(text_config={"model_type": "gemma", **TEXT, **GEMMA}, vision_config=SIGLIP, projection_dim=32,
                                image_token_index=PICTURE),
        ("gemma", GEMMA),
    ),
    "gemma3": (
        "Gemma3Config", dict(text_config={"model_type": "gemma3_text", **TEXT, **GEMMA, **LAYERED}, vision_config=SIGLIP,
                             mm_tokens_per_image=4, image_token_index=PICTURE, boi_token_index=68, eoi_token_index=69),
        ("gemma3_text", {**GEMMA, **LAYERED}),
    ),
    "mllama": (
        "MllamaConfig", dict(text_config={**TEXT, "num_hidden_layers": 5, "cross_attention_layers": CROSSED,
                                          "rope_parameters": ROPE["rope_parameters"], "vocab_size": WORDS - 8},
                             vision_config=dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_global_layers=1,
                                                attention_heads=2, image_size=SIDE, patch_size=8, max_num_tiles=1,
                                                vision_output_dim=32, intermediate_layers_indices=[0],
                                                supported_aspect_ratios=[[1, 1]]),
                             image_token_index=WORDS - 8),
        ("llama", {"vocab_size": WORDS - 8}),
    ),
}  # fmt: skip
NAMES = tuple(CONFIGS)


def noisy(model, seed):
    """Norms, biases and gates start alike in all models, and some are zero: noise tells them apart."""
    torch.manual_seed(seed + 1000)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    return model.eval()


def built(name, seed=0, **more):
    kind, arguments, _ = CONFIGS[name]
    torch.manual_seed(seed)
    return noisy(AutoModelForImageTextToText.from_config(getattr(transformers, kind)(**{**arguments, **more})), seed)


def parent(name, seed=0, padding=0, **more):
    kind, own = CONFIGS[name][2]
    arguments = {**TEXT, **own, **more}
    arguments["vocab_size"] -= padding
    torch.manual_seed(seed)
    return noisy(AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **arguments)), seed)


def saved(model, folder, layout="memory", **options):
    """The hub has the old names, which transformers still writes but for a part that it dropped from the names of towers."""
    model.save_pretrained(folder, save_original_format=layout == "hub", **options)
    for file in folder.glob("*.safetensors") if layout == "hub" else ():
        tower = re.compile(r"^vision_tower\.(?!vision_model\.)")
        tensors = {tower.sub("vision_tower.vision_model.", name): value for name, value in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    return folder


def inputs(name, pictures=True):
    """Two rows of 16 tokens, with one picture each."""
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 60, (2, 16), generator=draw)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if not pictures:
        return batch
    ids[:, 1] = 69 if name.startswith("qwen") else ids[:, 1]
    n = {"mllama": 1, "llava_next": 10, "llava_onevision": 10}.get(name, 4)  # a tile has one more token a line
    ids[:, 2 : 2 + n] = PICTURE if name != "mllama" else WORDS - 8
    pixels = torch.randn(2, 3, SIDE, SIDE, generator=draw)
    return batch | PIXELS.get(name, lambda ids, pixels: {"pixel_values": pixels})(ids, pixels)


def _next(ids, pixels):
    """The whole picture and one tile."""
    return {"pixel_values": torch.stack([pixels, pixels], 1), "image_sizes": torch.tensor([[SIDE, SIDE]] * 2)}


def _qwen(ids, pixels):
    """Patches of 2 x 3 x 4 x 4 numbers, four of which become one token."""
    patches = pixels.reshape(2, 3, -1, 16).transpose(1, 2).repeat(1, 1, 1, 2).reshape(2 * 16, -1)
    return {
        "pixel_values": patches, "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
        "mm_token_type_ids": (ids == PICTURE).int(),
    }  # fmt: skip


def _mllama(ids, pixels):
    return {
        "pixel_values": pixels[:, None, None], "aspect_ratio_ids": torch.ones(2, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(2, 1, 1, dtype=torch.long),
        "cross_attention_mask": torch.ones(2, ids.shape[1], 1, 1, dtype=torch.long),
    }  # fmt: skip


PIXELS = {
    "llava_next": _next, "llava_onevision": _next, "qwen2_vl": _qwen, "qwen2_5_vl": _qwen, "mllama": _mllama,
    "idefics3": lambda ids, pixels: {"pixel_values": pixels[:, None]},
    "smolvlm": lambda ids, pixels: {"pixel_values": pixels[:, None]},
    "paligemma": lambda ids, pixels: {"pixel_values": pixels, "token_type_ids": torch.zeros_like(ids)},
    "gemma3": lambda ids, pixels: {"pixel_values": pixels, "token_type_ids": (ids == PICTURE).long()},
}  # fmt: skip
