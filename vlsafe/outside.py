"""What a scale takes from outside, as values: where it lies, at which revision, what it weighs, what has to be accepted.

No file is opened and no address asked here; `scales` holds one of these, `sources` and `plan` act on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Origin:
    """Something that others made and the hub holds: a corpus or weights, at a revision.

    `revision` "main" means: as it was when it was first downloaded; `vlsafe download` notes the commit and keeps to it.
    `files` are patterns of what is taken (all where empty), `gigabytes` what that weighs, `rows` what the publisher counts,
    `limit` how many rows are used (a fixed random subset; None: all). `terms`: what has to be accepted before the hub gives it.
    `archives` are zip files from elsewhere that belong to the corpus; `by_hand` is what no command can fetch.
    """

    repo: str
    revision: str = "main"
    kind: str = "dataset"
    files: tuple[str, ...] = ()
    gigabytes: float = 0.0
    rows: int | None = None
    limit: int | None = None
    terms: str | None = None
    archives: tuple[tuple[str, str], ...] = ()  # (file below the corpus's folder, address)
    by_hand: tuple[str, str] | None = None  # (folder below the corpus's, what to do)

    def __post_init__(self) -> None:
        if self.kind not in ("dataset", "model"):
            raise ValueError(f"{self.repo} is of the kind {self.kind!r}; there are 'dataset' and 'model'")


@dataclass(frozen=True)
class LoadedGuard:
    """A guard from the hub. `labels` are the classes that count as unsafe (an image guard's). Without a `threshold` a text guard
    goes by its own word, an image guard by 0.5."""

    origin: Origin
    labels: tuple[str, ...] = ()
    threshold: float | None = None
    batch_size: int = 32


@dataclass(frozen=True)
class Loaded:
    """What a scale takes from outside, where its `source` is "load". A corpus may be None: it is then done without.

    `missing_share`: a corpus of which more pictures than that are not there is taken for the wrong folder. Units of
    `gpu_gigabytes`: 10^9 bytes that the largest training of the scale needs on each GPU.
    """

    captions: Origin | None
    instructions: Origin | None
    safety: Origin | None
    safe_rlhf: Origin | None
    spa_vl: Origin | None
    text_guard: LoadedGuard | None
    image_guard: LoadedGuard | None
    tower: Origin | None = None
    parents: Mapping[str, Origin] = field(default_factory=dict)
    missing_share: float = 0.05
    gpu_gigabytes: float = 0.0


# What the paper took from others. Revisions are commits where public files name one, else those of the first download.
PAPER_LOADED = Loaded(
    captions=Origin(  # LLaVA-1.5's stage 1
        "liuhaotian/LLaVA-Pretrain", "70f9d1e5e1a697fe35830875cfc7de1dd590d727",
        files=("blip_laion_cc_sbu_558k.json", "images.zip"), gigabytes=27.6, rows=558128,
    ),
    instructions=Origin(  # LLaVA-1.5's stage 2; its pictures lie with their makers, addresses from LLaVA's README
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
    safe_rlhf=Origin(  # the current generation; the paper can only have seen that of mid-2024 (83.4K rows), which has no name
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
