"""The cost of a training run on paper: operations, memory, time and disk, from shapes alone. No model library, no measurement.

Units: bytes, seconds, operations (a multiplication and an addition are two).
"""

from __future__ import annotations

from dataclasses import dataclass

from vlsafe.core.scale import VisionSpec

GPUS = {  # name -> dense bf16 operations a second, bytes of memory, bytes a second from it: the makers' data sheets
    "A100-80G": (312e12, 80e9, 2.0e12),
    "H100": (989e12, 80e9, 3.35e12),
    "H200": (989e12, 141e9, 4.8e12),
    "RTX-4090": (165e12, 24e9, 1.0e12),
}
UTILISATION = 0.25  # of the peak, in training: LLaVA-1.5's published 10 hours of stage 2 on eight A100 come to about that
PREFILL = 0.4  # of the peak, where prompts are only read; assumed
BANDWIDTH = 0.4  # of the memory's, where answers are decoded token by token; assumed
TRAINABLE, FROZEN = 16, 4  # bytes a weight: float32 master, gradient and AdamW's two moments; float32 alone
CAST = 2  # bytes a weight of the bfloat16 copy that computation needs
WORKING = 40  # bytes per token and unit of width inside the one block that is being recomputed; assumed


@dataclass(frozen=True)
class Shapes:
    """The number of weights in each part of a model, and what else the operations depend on."""

    blocks: int
    head: int
    embedding: int
    projector: int
    tower: int
    layers: int
    width: int
    image_tokens: int

    @property
    def language(self) -> int:
        return self.blocks + self.head + self.embedding

    @property
    def all(self) -> int:
        return self.language + self.projector + self.tower


def image_tokens(spec: VisionSpec) -> int:
    """How many tokens a picture takes in a prompt."""
    return (spec.image_size // spec.patch_size) ** 2 + (spec.feature_strategy == "full")


def operations(shapes: Shapes, text: float, pictures: float, passes: int) -> float:
    """Operations of one row: `passes` is 6 where all weights are trained (forward 2, backward 4), 4 where the backward pass only
    goes through them, 2 without a backward pass. The tower runs forward only; recomputation and padding do not count.

    Units:    text in tokens, pictures per row  ->  operations
    Source:   6·N·tokens plus attention's 12·layers·width·tokens² / 2 for causal masks (Chowdhery et al. 2022, appendix B)
    """
    tokens = text + pictures * shapes.image_tokens
    dense = passes * tokens * (shapes.blocks + shapes.head + pictures * shapes.image_tokens / max(tokens, 1) * shapes.projector)
    attention = passes * shapes.layers * shapes.width * tokens**2
    return dense + attention + 2 * pictures * (shapes.image_tokens + 1) * shapes.tower


def memory(shapes: Shapes, trainable: int, tokens_at_once: float, processes: int, sharded: bool) -> float:
    """Bytes on each GPU: trainable and frozen weights, the bfloat16 copies, activations under recomputation."""
    kept = TRAINABLE * trainable + FROZEN * (shapes.all - trainable)
    gathered = CAST * (2 * shapes.blocks / shapes.layers + shapes.embedding + shapes.head) if sharded else CAST * shapes.all
    activations = tokens_at_once * shapes.width * (2 * shapes.layers + WORKING)
    return kept / (processes if sharded else 1) + gathered + activations


def disk(shapes: Shapes, trainable: int, checkpoints: int, saved: int, resumable: int) -> tuple[float, float]:
    """Bytes that finished checkpoints take, and that a training run takes until it has finished."""
    full = FROZEN * shapes.all
    return checkpoints * saved * shapes.all, checkpoints * full + resumable * (full + 8 * trainable)


def training_seconds(total: float, gpu: str, processes: int, utilisation: float = UTILISATION) -> float:
    return total / (GPUS[gpu][0] * utilisation * processes)


def decoding_seconds(shapes: Shapes, answers: int, tokens: float, batch: int, gpu: str) -> float:
    """Seconds of one GPU to generate answers: every token of a batch reads all weights once."""
    return answers / batch * tokens * CAST * shapes.language / (GPUS[gpu][2] * BANDWIDTH)
