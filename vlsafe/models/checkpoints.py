"""Build, load, graft and save models.

Every model is an ordinary Hugging Face checkpoint in safetensors; code that comes with a checkpoint is never run.
"""

from __future__ import annotations

import functools
import os
import pickle
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CLIPModel, LlavaConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.models.smolvlm import processing_smolvlm
from transformers.utils import is_liger_kernel_available, logging

from vlsafe.core.scale import LanguageSpec, VisionSpec
from vlsafe.models import architectures, devices, weights
from vlsafe.models.architectures import EMBEDDING, HEAD, is_multimodal, language_part, projector_part, vision_part
from vlsafe.models.efficientnet import LiteConfig
from vlsafe.models.weights import Place, read_tensor


def build_clip(spec: VisionSpec, tokenizer: PreTrainedTokenizerFast, seed: int) -> CLIPModel:
    """A CLIP with random weights.

    The vision position embedding starts at std 0.5 instead of 0.02: after the pre-norm a patch embedding is about ten
    times larger, and position would be invisible for most of a short training.
    """
    torch.manual_seed(seed)
    vision = _vision_config(spec, mlp=2 * spec.vision_width)
    text = dict(
        vocab_size=len(tokenizer), hidden_size=spec.text_width, intermediate_size=2 * spec.text_width,
        num_hidden_layers=spec.text_layers, num_attention_heads=spec.heads, max_position_embeddings=32,
        projection_dim=spec.projection, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = CLIPModel(transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=spec.projection))
    nn.init.normal_(vision_part(model).embeddings.position_embedding.weight, std=0.5)
    return model


def _vision_config(spec: VisionSpec, mlp: int) -> dict[str, Any]:
    return dict(
        hidden_size=spec.vision_width, intermediate_size=mlp, num_hidden_layers=spec.vision_layers,
        num_attention_heads=spec.heads, image_size=spec.image_size, patch_size=spec.patch_size,
        projection_dim=spec.projection,
    )  # fmt: skip


def _language_config(spec: LanguageSpec, vocabulary: int, **more: Any) -> PreTrainedConfig:
    return transformers.AutoConfig.for_model(
        spec.architecture,
        vocab_size=vocabulary, hidden_size=spec.width, intermediate_size=spec.mlp, num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads, num_key_value_heads=spec.key_value_heads, attention_bias=spec.attention_bias,
        max_position_embeddings=spec.context, tie_word_embeddings=spec.tied_head, **more,
    )  # fmt: skip


def _llava_config(tower: dict[str, Any], language: PreTrainedConfig, image_token: int, spec: VisionSpec) -> LlavaConfig:
    layers = list(spec.feature_layers)
    return LlavaConfig(
        vision_config=tower, text_config=language.to_dict(), image_token_index=image_token, projector_hidden_act="gelu",
        image_seq_length=(spec.image_size // spec.patch_size) ** 2 + (spec.feature_strategy == "full"),
        vision_feature_layer=layers[0] if len(layers) == 1 else layers, vision_feature_select_strategy=spec.feature_strategy,
        tie_word_embeddings=language.tie_word_embeddings,
    )  # fmt: skip


def build_llm(spec: LanguageSpec, tokenizer: PreTrainedTokenizerFast, seed: int) -> PreTrainedModel:
    """A decoder with random weights, sized to the tokenizer.

    Keys start correlated with queries and outputs with values, so that a head attends to tokens that resemble the current one
    and copies them. Matching and copying then appear in a few hundred steps (LOG.md). Query heads that share a key start from
    it, each with the same correlation. An untied output head starts as the embedding: from random weights, copying would have
    to be learned word by word.

    Source:   idea of Trockman and Kolter 2023, "Mimetic Initialization of Self-Attention Layers" (arXiv 2305.09828)
    """
    torch.manual_seed(seed)
    config = _language_config(spec, len(tokenizer), initializer_range=spec.initial_std, **_token_ids(tokenizer))
    model = transformers.AutoModelForCausalLM.from_config(config)
    for block in architectures.language_layers(model):
        attention = block.get_submodule(architectures.ATTENTION)
        if spec.heads == spec.key_value_heads:
            _correlate(attention.k_proj.weight, attention.q_proj.weight, spec.matching)
        else:
            _correlate(attention.q_proj.weight, _per_query(attention.k_proj.weight, spec), spec.matching)
        _correlate(attention.o_proj.weight, _per_query(attention.v_proj.weight, spec).T, spec.copying)
    if not spec.tied_head:
        model.get_output_embeddings().weight.data.copy_(model.get_input_embeddings().weight)
    return _with_generation_ids(model, tokenizer)


def _per_query(values: torch.Tensor, spec: LanguageSpec) -> torch.Tensor:
    """Each key or value head repeated for every query head that reads it:  [key_value_heads * D, W]  ->  [heads * D, W]"""
    return values.unflatten(0, (spec.key_value_heads, -1)).repeat_interleave(spec.heads // spec.key_value_heads, 0).flatten(0, 1)


@torch.no_grad()
def _correlate(weight: torch.Tensor, other: torch.Tensor, correlation: float) -> None:
    """Correlate normal weights with others of the same variance, which they keep."""
    weight.mul_((1 - correlation**2) ** 0.5).add_(correlation * other)


def _token_ids(tokenizer: Any) -> dict[str, int]:
    return {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}


def _with_generation_ids(model: Any, tokenizer: Any) -> Any:
    for name, value in _token_ids(tokenizer).items():
        setattr(model.generation_config, name, value)
    return model


def graft(language: PreTrainedModel, tower: PreTrainedModel, processor: Any, spec: VisionSpec, seed: int) -> PreTrainedModel:
    """Put a vision tower (a CLIP's, or one of ours) and a new projector in front of a language model, whose weights are copied
    unchanged.

    A text-only prompt gives the parent's logits bit for bit: this is the zero point of every curve in this project. Before
    a tower of ours, whose features have a known scale, pictures' tokens start as long as words' on average.

    Draws:    the projector, from `seed`, with PyTorch's own linear initialisation (the library's 0.02 is slow to align)
    """
    image_token, vision = processor.tokenizer.image_token_id, getattr(tower.config, "vision_config", tower.config)
    config = _llava_config(vision.to_dict(), language.config, image_token, spec)
    model = transformers.LlavaForConditionalGeneration(config).to(language.dtype)
    language_part(model).load_state_dict(language_part(language).state_dict())  # refuses keys that differ
    model.get_output_embeddings().load_state_dict(language.get_output_embeddings().state_dict())
    vision_part(model).load_state_dict(vision_part(tower).state_dict())
    torch.manual_seed(seed)
    for layer in projector_part(model).modules():
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()
    if isinstance(vision, LiteConfig):
        _as_long_as_words(model, seed)
    return _with_generation_ids(model, processor.tokenizer)


@torch.no_grad()
def _as_long_as_words(model: PreTrainedModel, seed: int) -> None:
    """Scale the projector's last layer so that outputs are as long as word embeddings on average, for features whose root mean
    square is one; at random weights their direction does not matter, so normal ones stand for them."""
    projector, words = projector_part(model), model.get_input_embeddings().weight.float()
    *_, last = (layer for layer in projector.modules() if isinstance(layer, nn.Linear))
    first = next(layer for layer in projector.modules() if isinstance(layer, nn.Linear))
    features = torch.randn(256, first.in_features, generator=torch.Generator().manual_seed(seed)).to(first.weight)
    factor = words.norm(dim=-1).mean() / projector(features).float().norm(dim=-1).mean()
    for weight in last.parameters():
        weight.mul_(factor)


@torch.inference_mode()
def norm_ratio(model: PreTrainedModel, pixels: torch.Tensor) -> float:
    """How long the tokens of pictures are that the projector writes, relative to word embeddings: a ratio of mean norms.

    Shapes:   pixels  [N, 3, H, W]  ->  scalar
    """
    features = model.get_image_features(pixel_values=pixels.to(model.device, model.dtype)).pooler_output
    tokens = torch.cat(list(features)).float().norm(dim=-1).mean()
    return (tokens / model.get_input_embeddings().weight.float().norm(dim=-1).mean()).item()


def random_graft(spec: LanguageSpec, vision: VisionSpec, loaded: bool, device: str = "meta") -> PreTrainedModel:
    """A grafted model of a scale's shapes with random weights, or with none on the device "meta". A CLIP from the hub
    (`loaded`) has MLPs of four times its width, the miniature's of twice."""
    vocabulary = spec.vocabulary or 256
    tower = _vision_config(vision, mlp=(4 if loaded else 2) * vision.vision_width) | {"model_type": "clip_vision_model"}
    config = _llava_config(tower, _language_config(spec, vocabulary), vocabulary - 1, vision)
    with torch.device(device):
        return transformers.LlavaForConditionalGeneration(config)


def shapes(model: PreTrainedModel) -> dict[str, int]:
    """How many weights each part has; a tied embedding counts as the head alone."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    language, projector, tower = (
        sum(weight.numel() for weight in part(model).parameters()) for part in (language_part, projector_part, vision_part)
    )
    return {
        "blocks": language - embedding.numel(), "head": head.numel(), "embedding": 0 if embedding is head else embedding.numel(),
        "projector": projector, "tower": tower,
    }  # fmt: skip


def language_places(where: Path) -> dict[str, Place]:
    """Where each language weight of a checkpoint (a folder, or one file) is; only headers are read. Where the head is tied to the
    embedding, the latter stands for both.

    Raises:   FileNotFoundError where there is no safetensors file; ValueError for an unknown vision-language type, names that
              its family does not have, or a head that is neither there nor tied
    """
    folder = where if where.is_dir() else where.parent
    whole = where.is_dir()
    held = [(e.shard, e.name) for e in weights.entries(where)] if whole else [(where, key) for key in weights.header(where)[1]]
    configured = (folder / "config.json").exists()
    family = architectures.family_of(folder) if configured else architectures.DECODER
    if unknown := [key for _, key in held if architectures.part_of(key, family) is None]:
        raise ValueError(architectures.unrecognised(unknown, str(where)))
    places = {name: place for place in held if (name := architectures.language_name(place[1], family))}
    return _one_for_both(places, folder) if configured else places


def _one_for_both(places: dict[str, Place], folder: Path) -> dict[str, Place]:
    """Without the head where the config ties it to the embedding, and where both are there and equal."""
    present = [name for name in (EMBEDDING, HEAD) if name in places]
    if not present:
        return places
    if not architectures.ties(folder):
        if len(present) == 1:
            raise ValueError(f"{folder} has {present[0]} alone of embedding and head, and its config does not tie them")
        return places
    if len(present) == 2 and not torch.equal(*(read_tensor(places[name]) for name in present)):
        return places  # the library does not tie them then
    return {name: place for name, place in places.items() if name != HEAD} | {EMBEDDING: places[present[0]]}


def as_tied(places: Mapping[str, Place], names: Collection[str]) -> dict[str, Place]:
    """The places of a model with one entry for embedding and head where another model, which has `names`, has one tensor for
    both, and with two where it has two.

    Raises:   ValueError where there are two that differ, and the other model has one
    """
    if EMBEDDING in places and HEAD in places and EMBEDDING in names and HEAD not in names:
        if not torch.equal(read_tensor(places[EMBEDDING]), read_tensor(places[HEAD])):
            raise ValueError(f"{places[HEAD][0]}: {HEAD} is not {EMBEDDING}, and the other model has one tensor for both")
        return {name: place for name, place in places.items() if name != HEAD}
    tied = EMBEDDING in places and HEAD not in places and {EMBEDDING, HEAD} <= set(names)
    return {**places, HEAD: places[EMBEDDING]} if tied else dict(places)


@torch.no_grad()
def put_language(model: PreTrainedModel, places: Mapping[str, Place]) -> PreTrainedModel:
    """Overwrite a model's language weights with a checkpoint's, one tensor in memory at a time. Where vocabularies are padded
    differently, rows that the checkpoint lacks stay the model's.

    Raises:   ValueError where the two do not have the same language weights, or weights of other shapes
    """
    own = architectures.language_weights(model)
    places = as_tied(places, own)
    if set(own) != set(places):
        raise ValueError(f"language weights do not fit, names differ: {sorted(set(own) ^ set(places))[:6]}")
    for name, weight in own.items():
        mine, theirs = shared_rows(name, weight, read_tensor(places[name]))
        mine.copy_(theirs)
    return model


def shared_rows(name: str, one: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A language weight of two models; of embedding and head the rows that both have, as vocabularies are padded differently.

    Raises:   ValueError where the shapes differ otherwise
    """
    if name in (EMBEDDING, HEAD):
        rows = min(len(one), len(other))
        one, other = one[:rows], other[:rows]
    if one.shape != other.shape:
        raise ValueError(f"language weights do not fit: {name} {list(one.shape)} and {list(other.shape)}")
    return one, other


def save(model: PreTrainedModel, folder: Path, processor: Any | None = None) -> None:
    """Write weights, config and (processor or tokenizer) as safetensors and JSON that `from_pretrained` reads back."""
    in_memory_layout(model).save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)


def in_memory_layout(model: PreTrainedModel) -> PreTrainedModel:
    """Make every save of this model use the key names that it has in memory.

    The library's default writes LLaVA in an older hub layout. The Trainer's own resume loads raw keys, matches none of
    them, warns, and continues from the initialisation; mergekit drops the language model. Both read this layout, one file.
    """
    if not isinstance(model.save_pretrained, functools.partial):
        model.save_pretrained = functools.partial(model.save_pretrained, save_original_format=False, max_shard_size="1000GB")
    return model


def load(folder: Path, dtype: torch.dtype = torch.float32, device: str | None = None) -> PreTrainedModel:
    """A checkpoint, grafted or text-only, in evaluation mode; on the `device` "meta" without values.

    Raises:   FileNotFoundError when the folder holds no config; OSError or ValueError when weights are missing
    """
    folder = Path(folder)
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"{folder} holds no model (no config.json)")
    kind = transformers.AutoModelForImageTextToText if is_multimodal(folder) else transformers.AutoModelForCausalLM
    with ExitStack() as stack:
        if len(list(folder.glob("*.safetensors"))) < 2 and logging.is_progress_bar_enabled():
            logging.disable_progress_bar()  # over a single file the library's bar says nothing, and stays behind in notebooks
            stack.callback(logging.enable_progress_bar)
        model, report = from_repository(kind, str(folder), dtype=dtype, output_loading_info=True, device_map=device)
    if missing := set(report["missing_keys"]) | set(report["mismatched_keys"]):
        raise ValueError(f"{folder} lacks {len(missing)} tensors, first {sorted(missing)[:3]}; it is not this model")
    return model.eval()


def ready(folder: Path, dtype: str = "float32") -> PreTrainedModel:
    """A checkpoint for inference, where models compute now."""
    model = load(folder, getattr(torch, dtype)).to(devices.device())
    return fused(model) if dtype == "bfloat16" else model


KERNELS = ("llava", "llama", "mistral", "qwen2")  # types that take Liger's; all others compute in the library's own way


def fused(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, its decoder with Liger's kernels (rotary positions, norms, SwiGLU) on a GPU where they are installed."""
    if devices.device() != "cuda" or model.config.model_type not in KERNELS:
        return model
    if is_liger_kernel_available():
        from transformers.integrations.liger import apply_liger_kernel  # which imports peft

        apply_liger_kernel(model, {"fused_linear_cross_entropy": False})  # TRL has its own
    else:
        logging.get_logger(__name__).warning("liger-kernel is not installed (`pip install liger-kernel`): models take longer")
    return model


def from_repository(kind: Any, repo: str, revision: str = "main", **options: Any) -> Any:
    """What `kind.from_pretrained` returns for a repository in the hub's cache or for a folder.

    Weights that are there as pickles alone are read as tensors and nothing else: no code of theirs is run.

    Raises:   ValueError for a pickle that holds anything beside tensors
    """
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"  # the library would ask a service to convert the repository in public
    try:
        return kind.from_pretrained(repo, revision=revision, weights_only=True, **options)
    except pickle.UnpicklingError:  # its own text recommends to load it all the same
        raise ValueError(f"a .bin file of {repo} is damaged or holds more than tensors, which could run code; it is not loaded. "
                         "Name a revision with safetensors") from None  # fmt: skip


def from_hub(repo: str, revision: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A language model from the hub's cache, with embeddings for every token of the tokenizer.

    New ones, the picture's placeholder among them, are the mean of the old ones: never the likeliest word, and nothing random.
    """
    model = from_repository(transformers.AutoModelForCausalLM, repo, revision, dtype="auto")
    known = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > known:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        for table in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
            table.data[known:] = table.data[:known].float().mean(0).to(table.dtype)
    return _with_generation_ids(model, tokenizer)


def refuse_other(config: Any, spec: LanguageSpec, repo: str) -> None:
    """Refuse a loaded decoder that is not the one of the scale: the dry run has counted with that one.

    Raises:   ValueError naming what differs
    """
    loaded = {
        "architecture": config.model_type, "layers": config.num_hidden_layers, "width": config.hidden_size,
        "heads": config.num_attention_heads, "key_value_heads": config.num_key_value_heads, "mlp": config.intermediate_size,
        "tied_head": config.tie_word_embeddings,
    }  # fmt: skip
    if other := {name: value for name, value in loaded.items() if value != getattr(spec, name)}:
        raise ValueError(f"{repo} is another decoder than the scale says: {other}; correct the backbone's `language`")


def load_processor(folder: Path) -> Any:
    """The processor of a vision-language model, the tokenizer of a text-only one. Pictures always go through Pillow.

    The tokenizer is the one that was saved: the library goes by the model's type and silently gives a Qwen2 with our words
    Qwen2's own way of splitting text, which knows none of them. Where none pads, EOS does: padding is never attended to.
    """
    config = weights.read_object(Path(folder) / "tokenizer_config.json")
    kind = PreTrainedTokenizerFast if config.get("tokenizer_class") == "TokenizersBackend" else transformers.AutoTokenizer
    tokenizer = kind.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return _assembled(folder, tokenizer) if is_multimodal(folder) else tokenizer


def _assembled(folder: Path, tokenizer: Any) -> Any:
    """A processor of its parts, without what some do with videos, for which the library's loader wants torchvision."""
    kind, names = _processor_class(folder), _processor_class(folder).get_attributes()
    parts = {"image_processor": transformers.AutoImageProcessor.from_pretrained(folder, backend="pil"), "tokenizer": tokenizer}
    settings, _ = kind.get_processor_dict(folder)
    if "video_processor" in names:  # no item has a video: nothing stands there, and the library's check of it is left out
        kind = type(kind.__name__, (kind,), {"check_argument_for_proper_class": lambda self, name, part: type(part)})
        processing_smolvlm.num2words = processing_smolvlm.num2words or str  # writes out how long a video is, and nothing else
    return kind.from_args_and_dict([parts.get(name) for name in names], settings)


def _processor_class(folder: Path) -> Any:
    """The class of a checkpoint's processor, as its files name it, or by the model's type."""
    files = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
    stated = [weights.read_object(Path(folder) / name).get("processor_class") for name in files if (Path(folder) / name).exists()]
    by_type = PROCESSOR_MAPPING_NAMES[weights.read_object(Path(folder) / "config.json")["model_type"]]
    return getattr(transformers, next(filter(None, stated), by_type))
