"""The scales by name: MINI is built from nothing, SMALL and PAPER load models and corpora. `load_scale` also reads YAML files."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import yaml

from vlsafe.core.assets import Loaded, LoadedGuard, Origin
from vlsafe.core.scale import (
    Backbone,
    Exam,
    Fit,
    LanguageSpec,
    LoraSpec,
    Preference,
    Rollout,
    Scale,
    Tuning,
    VisionSpec,
    extended,
    known,
)  # fmt: skip

# What the paper loads. Revisions are commits where public files name one, else those of the first download.
PAPER_LOADED = Loaded(
    captions=Origin(  # LLaVA-1.5's stage 1
        "liuhaotian/LLaVA-Pretrain", "70f9d1e5e1a697fe35830875cfc7de1dd590d727",
        files=("blip_laion_cc_sbu_558k.json", "images.zip"), gigabytes=27.6, rows=558128,
    ),
    instructions=Origin(  # LLaVA-1.5's stage 2; its pictures are at their publishers, addresses from LLaVA's README
        "liuhaotian/LLaVA-Instruct-150K", "9d451dc7629cfe0469f6ae4432b765cd603d5fcb",
        files=("llava_v1_5_mix665k.json",), gigabytes=65.0, rows=665298,  # assumed: 1 of text, about 64 of pictures
        archives=(
            ("coco/train2017.zip", "http://images.cocodataset.org/zips/train2017.zip"),
            ("gqa/images.zip", "https://downloads.cs.stanford.edu/nlp/data/gqa/images.zip"),
            ("textvqa/train_val_images.zip", "https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip"),
            ("vg/images.zip", "https://cs.stanford.edu/people/rak248/VG_100K_2/images.zip"),
            ("vg/images2.zip", "https://cs.stanford.edu/people/rak248/VG_100K_2/images2.zip"),
        ),
        by_hand=("ocr_vqa", "OCR-VQA's pictures, by its authors' own script, all as .jpg, into ocr_vqa/images"),
    ),
    safety=Origin(  # section on safety tuning; Zong et al. 2024
        "ys-zong/VLGuard", files=("train.json", "test.json", "train.zip", "test.zip"), gigabytes=0.45, rows=2000,
        terms="agree on its page to share your contact details and to use it for research only",
    ),
    safe_rlhf=Origin(  # the current version; the paper can only have used that of mid-2024 (83.4K rows), which has no name
        "PKU-Alignment/PKU-SafeRLHF", "9421ffafec3fa40a1f1a7d567b4d525079477ecb", files=("data/*/*.jsonl",),
        gigabytes=0.3, rows=73907,  # gigabytes assumed
    ),
    spa_vl=Origin("sqrti/SPA-VL", files=("*.parquet", "*.json"), gigabytes=20.0, rows=93258),  # gigabytes assumed
    text_guard=LoadedGuard(
        Origin(
            "meta-llama/Llama-Guard-3-8B", "7327bd9f6efbbe6101dc6cc4736302b3cbb6e425", "model", ("*.json", "*.safetensors"),
            gigabytes=16.1, terms="accept the Llama 3.1 Community Licence on its page",
        ),
    ),
    image_guard=LoadedGuard(  # assumed: the paper names no detector
        Origin("Falconsai/nsfw_image_detection", "main", "model", ("*.json", "model.safetensors"), gigabytes=0.35),
        labels=("nsfw",), batch_size=128,
    ),
    tower=Origin(
        "openai/clip-vit-large-patch14-336", "ce19dc912ca5cd21c8a653c79e251e808ccabcd1", "model",
        gigabytes=1.8,  # assumed
        files=("*.json", "*.txt", "*.safetensors", "pytorch_model.bin"),
    ),
    parents={
        "llama2-chat": Origin(
            "meta-llama/Llama-2-7b-chat-hf", "f5db02db724555f92da89c216ac04704f23d4590", "model",
            ("*.json", "tokenizer.model", "*.safetensors"), gigabytes=13.5,
            terms="accept the Llama 2 Community Licence on its page",
        ),
        "tulu2": Origin(
            "allenai/tulu-2-7b", "main", "model", ("*.json", "tokenizer.model", "*.safetensors", "*.bin"), gigabytes=13.5,
            terms="accept AI2's ImpACT licence on its page, should it ask",
        ),
    },
    gpu_gigabytes=75.0,  # assumed: stage 2 of 7 billion weights on eight GPUs, LLaVA-1.5's own set-up
)  # fmt: skip


MINI = Scale(
    name="mini", vision=VisionSpec(), language=LanguageSpec(),
    tower=Fit(steps=2800, batch_size=102, learning_rate=3e-3, warmup_ratio=0.05, weight_decay=0.01),
    pretraining=Fit(steps=700, batch_size=32, learning_rate=1.5e-3, schedule="constant_with_warmup"),
    guard=Fit(steps=285, batch_size=16, learning_rate=2e-3),
    projector=Fit(steps=600, batch_size=32, learning_rate=8e-3),
    instruct=Fit(steps=300, batch_size=32, learning_rate=2e-4, projector_rate=6e-3),
    tuning=Tuning(  # assumed, not searched: two passes over 1,200 safety rows or 600 pairs, at stage 2's rate or half of it
        sft=Fit(steps=75, batch_size=32, learning_rate=2e-4),
        preference=Preference(Fit(steps=75, batch_size=16, learning_rate=1e-4, micro_batches=1)),
        rollout=Rollout(Fit(steps=40, batch_size=64, learning_rate=1e-4, micro_batches=1)),
    ),
    backbones={
        "mini-chat": Backbone(template="llama2", fit=Fit(steps=350, batch_size=32, learning_rate=1e-3)),
        "mini-tulu": Backbone(
            template="tulu", fit=Fit(steps=350, batch_size=32, learning_rate=1e-3),
            refusal_share=0.25, borderline_share=0.1, answered_categories=("theft",),
        ),
    },
)  # fmt: skip
_LOADED = Fit(steps=1, batch_size=1, learning_rate=1e-3, micro_batches=1)  # of models that a scale loads; no stage reads it
# Training all weights is sharded, a projector alone is not. `at_once` is for 80 GB a GPU (computed by the dry run).
_DDP: dict[str, Any] = dict(  # grouped: LLaVA-1.5's
    launch="env/accelerate/ddp.yaml", grouped=True, saved="bfloat16", micro_batches=1, max_length=2048,
)  # fmt: skip
_FSDP = _DDP | {"launch": "env/accelerate/fsdp2.yaml"}
PAPER = Scale(
    name="paper", source="load", loaded=PAPER_LOADED,
    vision=VisionSpec(  # CLIP ViT-L/14-336; LLaVA-1.5: the layer before the last, class token dropped
        image_size=336, patch_size=14, vision_width=1024, vision_layers=24, text_width=768, text_layers=12, heads=16,
        projection=768, feature_layers=(-2,), feature_strategy="default",
    ),
    language=LanguageSpec(  # LLaMA-2 7B; context: LLaVA-1.5's model_max_length
        layers=32, width=4096, heads=32, key_value_heads=32, mlp=11008, attention_bias=False, matching=0.0, copying=0.0,
        context=2048, tied_head=False, initial_std=0.02, vocabulary=32000,
    ),
    tower=_LOADED, pretraining=_LOADED, guard=_LOADED,
    # LLaVA-1.5 pretrain.sh, one epoch of 558,128 rows; all of them have a picture
    projector=Fit(steps=2180, batch_size=256, learning_rate=1e-3, at_once=16, **_DDP),
    # LLaVA-1.5 finetune.sh, one epoch of 665,298 rows
    instruct=Fit(steps=5197, batch_size=128, learning_rate=2e-5, at_once=4, **_FSDP),
    tuning=Tuning(
        # VLGuard: three epochs; assumed: stage 2's rate. SPA-VL's script: one epoch of 93,258 pairs
        sft=Fit(steps=47, batch_size=128, learning_rate=2e-5, at_once=4, **_FSDP),
        preference=Preference(Fit(steps=11657, batch_size=8, learning_rate=1e-6, warmup_ratio=0.001, at_once=1, **_FSDP)),
        rollout=Rollout(Fit(steps=500, batch_size=64, learning_rate=1e-6)),  # assumed; not in the paper
        pairs=0,  # the paper's rule: the last checkpoint
    ),
    backbones={name: Backbone(template, _LOADED) for name, template in (("llama2-chat", "llama2"), ("tulu2", "tulu"))},
    exam=Exam(panel=200, full=1_000_000, batch_size=16, max_new_tokens=512, dtype="bfloat16"),  # assumed; full: all there is
    lora=LoraSpec(rank=128, alpha=256),  # LLaVA-1.5 finetune_lora.sh
    checkpoints=(20, 50, 100, 250, 500, 1000, 2000, 4000),  # assumed: most is lost early in the miniature
    arm_checkpoints=(100, 500, 2000),  # assumed, likewise
    threads=8,  # assumed: cores for each process of a node
)  # fmt: skip
# One consumer GPU in hours: an openly licensed parent of 360 million weights, a small tower, subsets of the same corpora.
_ALONE: dict[str, Any] = dict(grouped=True, micro_batches=1, at_once=8, max_length=1024)  # unsharded, in the calling process
assert PAPER_LOADED.captions is not None and PAPER_LOADED.instructions is not None
SMALL = dataclasses.replace(
    PAPER, name="small",
    loaded=dataclasses.replace(
        PAPER_LOADED,
        captions=dataclasses.replace(PAPER_LOADED.captions, limit=64_000),  # assumed: 500 steps
        instructions=dataclasses.replace(PAPER_LOADED.instructions, limit=64_000),  # assumed: 1,000 steps
        tower=Origin("openai/clip-vit-base-patch32", "main", "model", gigabytes=0.6),
        parents={"smollm2": Origin("HuggingFaceTB/SmolLM2-360M-Instruct", "main", "model", gigabytes=0.7)},
        gpu_gigabytes=16.0,  # computed by the dry run, rounded up to a card that is sold
    ),
    vision=VisionSpec(  # CLIP ViT-B/32
        image_size=224, patch_size=32, vision_width=768, vision_layers=12, text_width=512, text_layers=12, heads=12,
        projection=512, feature_layers=(-2,), feature_strategy="default",
    ),
    language=LanguageSpec(  # SmolLM2-360M's config.json; context: assumed, enough for 50 picture tokens and a conversation
        layers=32, width=960, heads=15, key_value_heads=5, mlp=2560, attention_bias=False, matching=0.0, copying=0.0,
        context=1024, tied_head=True, initial_std=0.02, vocabulary=49152,
    ),
    projector=Fit(steps=500, batch_size=128, learning_rate=1e-3, **_ALONE),  # LLaVA-1.5's rate; steps and batch assumed
    instruct=Fit(steps=1000, batch_size=64, learning_rate=2e-5, **_ALONE),  # likewise
    tuning=Tuning(
        sft=Fit(steps=94, batch_size=64, learning_rate=2e-5, **_ALONE),  # three epochs of VLGuard
        preference=Preference(Fit(steps=1000, batch_size=8, learning_rate=1e-6, **_ALONE)),  # assumed
        rollout=Rollout(Fit(steps=200, batch_size=64, learning_rate=1e-6)),  # assumed
        pairs=0,
    ),
    backbones={"smollm2": Backbone(template="smollm2", fit=_LOADED)},
    exam=Exam(panel=100, full=500, batch_size=32, max_new_tokens=256, dtype="bfloat16"),  # assumed
    lora=LoraSpec(rank=64, alpha=128),  # assumed
    checkpoints=(20, 50, 100, 250, 500), arm_checkpoints=(100, 500),
)  # fmt: skip
SCALES: dict[str, Scale] = {"mini": MINI, "small": SMALL, "paper": PAPER}


def load_scale(name: str | Path) -> Scale:
    """A preset by name, or a YAML file `{extends: mini, name: …, field: value, …}` with nested fields likewise.

    Raises:   ValueError for an unknown name or key (with the nearest known one) or a value of the wrong type;
              FileNotFoundError for a path that does not exist
    """
    text = str(name)
    if not text.endswith((".yaml", ".yml")):
        return SCALES[known(text, SCALES, "scale")]
    if not Path(text).is_file():
        raise FileNotFoundError(f"there is no scale file {text!r}; a scale is such a file or one of {', '.join(sorted(SCALES))}")
    try:
        changes = yaml.safe_load(Path(text).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{text} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(changes, dict) or "extends" not in changes:
        raise ValueError(f"{text} must be a mapping with the key 'extends' (one of {', '.join(sorted(SCALES))})")
    base = SCALES[known(changes.pop("extends"), SCALES, "scale")]
    scale = extended(base, {"name": Path(text).stem, **changes})
    for name in scale.backbones:
        scale.decoder(name)  # raises for a mistake in it
    return scale
