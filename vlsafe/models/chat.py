"""From messages to tokens: tokenizer, processor, prompts, and the last position.

The chat templates are ours for every model size, because the loss and the stop token depend on them: every assistant span,
its EOS included, is between generation markers, and the template writes BOS (TRL tokenises with `add_special_tokens=False`).
"""

from __future__ import annotations

import functools
import io
from collections.abc import Sequence
from itertools import chain
from typing import Any

import jinja2
import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoImageProcessor, AutoTokenizer, LlavaProcessor, PaliGemmaProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from vlsafe.core.assets import Origin, pinned
from vlsafe.core.scale import VisionSpec
from vlsafe.core.schema import Picture, Turn, messages
from vlsafe.models.templates import template

MARKERS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "<|system|>", "<|user|>", "<|assistant|>")
_WRITERS: dict[Any, Any] = {}  # template and special tokens -> a processor that has these


def build_tokenizer(words: Sequence[str], max_length: int) -> PreTrainedTokenizerFast:
    """A word-level tokenizer over a closed vocabulary; decoding restores normal spacing.

    The id of EOS must not be 2: CLIP's text model would then pool at the *largest id* of the sentence (a legacy branch).
    """
    special = ["<pad>", "<unk>", "<s>", "<image>", *MARKERS, "</s>"]
    vocabulary = {word: i for i, word in enumerate([*special, *words])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.normalizer = normalizers.Replace("\u2019", "'")
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+(?:'\w+)?|[^\w\s]"), "removed", invert=True)
    core.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        additional_special_tokens=list(MARKERS), extra_special_tokens={"image_token": "<image>"},
        padding_side="left", model_max_length=max_length,
    )  # fmt: skip


def build_processor(tokenizer: PreTrainedTokenizerFast, image_size: int, patch_size: int, strategy: str) -> LlavaProcessor:
    """Tokenizer and picture preparation in one; pixels are centred on the miniature's dark backgrounds.

    The pixel scale matters: mapped to [-1, 1] a dark picture is one large constant, and a small CLIP learns nothing else.
    """
    pixels = CLIPImageProcessorPil(
        size={"shortest_edge": image_size}, crop_size={"height": image_size, "width": image_size},
        image_mean=[60 / 255] * 3, image_std=[60 / 255] * 3,
    )  # fmt: skip
    return _llava_processor(pixels, tokenizer, patch_size, strategy)


def _llava_processor(pixels: Any, tokenizer: Any, patch_size: int, strategy: str) -> LlavaProcessor:
    return LlavaProcessor(
        image_processor=pixels, tokenizer=tokenizer, patch_size=patch_size, vision_feature_select_strategy=strategy,
        num_additional_image_tokens=1, chat_template=tokenizer.chat_template,
    )  # fmt: skip


def hub_processor(language: Origin, tower: Origin, name: str, spec: VisionSpec) -> LlavaProcessor:
    """The processor of a model that will be grafted from a hub's language model and tower, with our chat template.

    Where `spec.pad`, pictures are padded to a square with the mean colour; else the tower's own processor crops them. The
    picture's placeholder becomes a token of its own; without a pad token EOS pads, as no loss ever falls on padding.
    """
    where = dict(pretrained_model_name_or_path=language.repo, revision=pinned(language.repo, language.revision))
    tokenizer = AutoTokenizer.from_pretrained(**where)
    if getattr(tokenizer, "image_token", None) is None:  # the library takes a named token beside its own at loading alone
        tokenizer = AutoTokenizer.from_pretrained(**where, image_token="<image>")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.chat_template = template(name)
    pixels = AutoImageProcessor.from_pretrained(tower.repo, revision=pinned(tower.repo, tower.revision), backend="pil")
    if spec.pad:
        pixels = LlavaImageProcessorPil.from_dict(pixels.to_dict(), do_pad=True)
    return _llava_processor(pixels, tokenizer, spec.patch_size, spec.feature_strategy)


def cropping(processor: Any) -> Any:
    """The same processor, which from now on crops pictures to a square instead of padding them: LLaVA-1.5's stage 1.

    Source:   LLaVA-1.5, pretrain.sh, which leaves out finetune.sh's `--image_aspect_ratio pad`
    """
    processor.image_processor.do_pad = False
    return processor


def open_picture(data: Picture) -> Image.Image:
    """A picture in RGB."""
    return Image.open(io.BytesIO(bytes(data))).convert("RGB")


def rendered(processor: Any, turns: Sequence[Turn], n_images: int) -> str:
    """A conversation in the chat template, up to where the assistant answers, or to the end of its last answer.

    Texts are cached: one examination gives the same prompts to many models.
    """
    special = getattr(processor, "tokenizer", processor).special_tokens_map
    key = processor.chat_template, tuple((name, str(token)) for name, token in special.items())
    _WRITERS.setdefault(key, processor)
    return _rendered(key, tuple(turns), n_images)


def _writer(key: Any) -> Any:
    """A tokenizer: processors of some families also want to know about videos."""
    return getattr(_WRITERS[key], "tokenizer", _WRITERS[key])


@functools.lru_cache(maxsize=2**14)
def _rendered(key: Any, turns: tuple[Turn, ...], n_images: int) -> str:
    options = {"chat_template": key[0], "add_generation_prompt": turns[-1].role != "assistant", "tokenize": False}
    written = messages(turns, n_images)
    if not _takes_blocks(key):
        lines = "".join(f"{_WRITERS[key].image_token}\n" for _ in range(n_images))
        first = next((place for place, turn in enumerate(turns) if turn.role == "user"), 0)
        written = [{"role": t.role, "content": lines * (place == first) + t.text} for place, t in enumerate(turns)]
    text = _writer(key).apply_chat_template(written, **options)
    return text if options["add_generation_prompt"] else text.rstrip()  # Tulu's template writes a line break after EOS


@functools.lru_cache(maxsize=2**8)
def _takes_blocks(key: Any) -> bool:
    """Whether a template reads messages in blocks: processors' and ours do, those of many language models want text."""
    try:
        text = _writer(key).apply_chat_template(messages([Turn("user", "a line")]), chat_template=key[0], tokenize=False)
    except (TypeError, jinja2.TemplateError):
        return False
    return "a line" in text and "'text'" not in text  # a list that is written as it is


def image_tokens(processor: Any, images: Sequence[Picture]) -> list[int]:
    """How many tokens each of N pictures takes in a prompt, from its size alone, by the processor's own count."""
    if not images:
        return []
    sizes = [Image.open(io.BytesIO(bytes(data))).size[::-1] for data in images]
    return list(processor._get_num_multimodal_tokens(image_sizes=sizes)["num_image_tokens"])


def prompt_batch(processor: Any, prompts: Sequence[Sequence[Turn]], images: Sequence[Sequence[Picture]]) -> Any:
    """Left-padded model inputs that end where the assistant answers, or with its answer where the prompt has one.

    Shapes:   N prompts, N picture lists  ->  input_ids, attention_mask [N, T]; pixel_values [sum of pictures, 3, H, W]
    Raises:   ValueError for pictures that nothing prepares, and for an answer to PaliGemma, which reads it as part of the prompt
    """
    texts = [rendered(processor, turns, len(row)) for turns, row in zip(prompts, images, strict=True)]
    pictures = [[open_picture(data) for data in row] for row in images]
    tokenizer, any_picture = getattr(processor, "tokenizer", processor), any(pictures)
    options = dict(padding=True, padding_side="left", add_special_tokens=_lacks_bos(processor, texts), return_tensors="pt")
    if not hasattr(processor, "image_processor"):
        if any_picture:
            raise ValueError("these prompts have pictures, and this model has no picture processor")
        return processor(texts, **options)
    paligemma = isinstance(processor, PaliGemmaProcessor)
    if paligemma and any(turns[-1].role == "assistant" for turns in prompts):
        raise ValueError("PaliGemma reads an answer in its prompt in both directions, as it reads the prompt: as no answer")
    if paligemma and not any_picture:  # it refuses; this is what it writes after pictures
        inputs = tokenizer([f"{tokenizer.bos_token}{text}\n" for text in texts], **options | {"add_special_tokens": False})
        inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])  # else masks are causal where rows are padded
        return inputs
    flat = isinstance(processor, LlavaProcessor)  # the only one that takes prompts with and without pictures in one batch
    inputs = processor(text=texts, images=(list(chain(*pictures)) if flat else pictures) if any_picture else None, **options)
    inputs.pop("labels", None)  # PaliGemma's, for training
    return inputs


def answer_tokens(processor: Any, chat: Sequence[Turn], n_images: int, name: str) -> list[int]:
    """The tokens that the last answer of a conversation adds to what is before it; `name` is for the error.

    Raises:   ValueError where the prompt is not the beginning of the whole: the loss would fall on other tokens
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    texts = rendered(processor, chat[:-1], n_images), rendered(processor, chat, n_images)
    prompt, whole = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
    if whole[: len(prompt)] != prompt or len(whole) == len(prompt):
        raise ValueError(f"the answer {chat[-1].text!r} to {name} does not follow its prompt token by token")
    return list(whole[len(prompt) :])


def _lacks_bos(processor: Any, texts: Sequence[str]) -> bool:
    """Whether the tokenizer is to write BOS: where a processor's template does not, as the library decides it. A language
    model's own template always has the say."""
    bos = getattr(processor, "tokenizer", processor).bos_token
    return hasattr(processor, "image_processor") and not (bos and all(text.startswith(bos) for text in texts))


def last_positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """Index of the last real token of every row, whichever side is padded.

    Shapes:   attention_mask  [N, T]  ->  [N]
    Raises:   ValueError on a row without any token
    """
    if not attention_mask.any(dim=1).all():
        raise ValueError("a row has no tokens at all; its last position is undefined")
    positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return (attention_mask * positions).argmax(dim=1)
