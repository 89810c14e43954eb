"""Tokenizers, processors and chat templates for the tiny models of `families`, and both in a folder as the hub has them.

`published(name, folder)` writes a vision-language model with its processor, `published_parent(name, folder)` the language model
that fits. Tokens are characters. Templates are as on the hub: a processor's takes blocks, a language model's takes text.
"""

import json

import transformers
from families import PICTURE, SIDE, WORDS, built, parent, saved
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789 .,?!'():-\n"
SPECIAL = {0: "<pad>", 1: "<s>", 2: "</s>", 3: "<unk>", 57: "<fake_token_around_image>", 58: "<end_of_utterance>",
           59: "<global-img>"}  # fmt: skip
LLAVA = {PICTURE: "<image>", PICTURE + 1: "<video>"}
QWEN = {68: "<|vision_end|>", 69: "<|vision_start|>", PICTURE: "<|image_pad|>", 71: "<|video_pad|>"}
EXTRA = {  # tokens of a family at their places
    "qwen2_vl": QWEN, "qwen2_5_vl": QWEN, "gemma3": {68: "<start_of_image>", 69: "<end_of_image>", PICTURE: "<image_soft_token>"},
    "mllama": {WORDS - 8: "<|image|>", 60: "<|python_tag|>"},
}  # fmt: skip
NAMED = {  # tokens that a processor asks its tokenizer for
    "qwen2_vl": dict(image_token="<|image_pad|>", video_token="<|video_pad|>", vision_bos_token="<|vision_start|>"),
    "gemma3": dict(image_token="<image_soft_token>", boi_token="<start_of_image>", eoi_token="<end_of_image>"),
    "mllama": dict(image_token="<|image|>"),
}  # fmt: skip
NAMED["qwen2_5_vl"] = NAMED["qwen2_vl"]
IN_TEMPLATE = {  # what stands for a picture
    "qwen2_vl": "<|vision_start|><|image_pad|><|vision_end|>", "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "gemma3": "<start_of_image>", "mllama": "<|image|>",
}  # fmt: skip
SQUARE, SHORT = {"height": SIDE, "width": SIDE}, {"shortest_edge": SIDE}
PIXELS = {  # class and settings of the picture processor
    "llava": ("CLIP", dict(size=SHORT, crop_size=SQUARE)),
    "llava_next": ("LlavaNext", dict(size=SHORT, crop_size=SQUARE, image_grid_pinpoints=[[SIDE, SIDE]])),
    "llava_onevision": ("LlavaOnevision", dict(size=SQUARE, image_grid_pinpoints=[[SIDE, SIDE]])),
    "qwen2_vl": ("Qwen2VL", dict(patch_size=4, temporal_patch_size=2, merge_size=2, min_pixels=64, max_pixels=256)),
    "idefics3": ("Idefics3", dict(size={"longest_edge": SIDE}, max_image_size={"longest_edge": SIDE}, do_image_splitting=False)),
    "smolvlm": ("SmolVLM", dict(size={"longest_edge": SIDE}, max_image_size={"longest_edge": SIDE}, do_image_splitting=False)),
    "paligemma": ("Siglip", dict(size=SQUARE, image_seq_length=4)),
    "gemma3": ("Gemma3", dict(size=SQUARE, image_seq_length=4)),
    "mllama": ("Mllama", dict(size=SQUARE, max_image_tiles=1)),
}  # fmt: skip
PIXELS["qwen2_5_vl"] = PIXELS["qwen2_vl"]
PATCHES = dict(patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1)
SETTINGS = {  # class and settings of the processor
    "llava": ("Llava", PATCHES), "llava_next": ("LlavaNext", PATCHES),
    "llava_onevision": ("LlavaOnevision", dict(num_image_tokens=4, vision_feature_select_strategy="full")),
    "qwen2_vl": ("Qwen2VL", {}), "qwen2_5_vl": ("Qwen2_5_VL", {}), "idefics3": ("Idefics3", dict(image_seq_len=4)),
    "smolvlm": ("SmolVLM", dict(image_seq_len=4)), "paligemma": ("PaliGemma", {}), "gemma3": ("Gemma3", dict(image_seq_length=4)),
    "mllama": ("Mllama", {}),
}  # fmt: skip
BLOCKS = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {% for c in m['content'] %}{% if c['type'] == 'image' %}PICTURE"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
WITHOUT_BOS = BLOCKS.removeprefix("{{ bos_token }}")  # PaliGemma's processor writes it after the picture
PLAIN = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def tokenizer(name):
    extra = EXTRA.get(name, LLAVA)
    places = SPECIAL | {4 + i: character for i, character in enumerate(CHARACTERS)} | extra
    core = Tokenizer(models.WordLevel({token: i for i, token in places.items()}, unk_token="<unk>"))
    core.normalizer, core.decoder = normalizers.Lowercase(), decoders.Fuse()
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    special = [token for i, token in (SPECIAL | extra).items() if i > 3]
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=special, padding_side="left",
        **({"extra_special_tokens": NAMED[name]} if name in NAMED else {}),
    )  # fmt: skip


def template(name):
    return (WITHOUT_BOS if name == "paligemma" else BLOCKS).replace("PICTURE", IN_TEMPLATE.get(name, "<image>"))


def published(name, folder, seed=0, with_template=True, **more):
    """A vision-language model in the hub's layout, its processor in the files that the hub's older repositories have."""
    saved(built(name, seed, **more), folder, "hub")
    tokenizer(name).save_pretrained(folder)
    kind, settings = PIXELS[name]
    getattr(transformers, f"{kind}ImageProcessorPil")(**settings).save_pretrained(folder)
    kind, settings = SETTINGS[name]
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": f"{kind}Processor", **settings}))
    if with_template:
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": template(name)}))
    return folder


def published_parent(name, folder, seed=1, **more):
    """A language model that fits, without a token for padding."""
    saved(parent(name, seed, **more), folder)
    words = tokenizer(name)
    words.pad_token, words.chat_template = None, PLAIN
    words.save_pretrained(folder)
    return folder
