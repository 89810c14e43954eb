"""The config of `efficientnet.LiteTower`, apart from it: configs are read where no model is built.

Importing this module tells the library's automatic config about it, in this process alone.
"""

from __future__ import annotations

from transformers import AutoConfig, PreTrainedConfig

FEATURE_SCALE = 0.68  # root mean square of the grid of the 2,412 pictures of scale `pocket`, measured


class LiteConfig(PreTrainedConfig):
    """Sizes as LLaVA asks a tower for them: `patch_size` is that of a grid of squares over which the last features are pooled,
    `feature_scale` what they are divided by, so that their root mean square is one."""

    model_type = "vlsafe_efficientnet"

    hidden_size: int = 1280
    image_size: int = 224
    patch_size: int = 74
    feature_scale: float = FEATURE_SCALE


AutoConfig.register(LiteConfig.model_type, LiteConfig)
