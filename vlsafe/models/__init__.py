"""Checkpoints: where submodules live, how they are built, loaded, grafted, merged and spoken to."""

from typing import TYPE_CHECKING

from vlsafe.core.lazy import lazily

if TYPE_CHECKING:
    from vlsafe.models import (
        architectures, chat, checkpoints, devices, efficientnet, gguf, lite_config, merge, templates, towers, trainable, weights,
    )  # fmt: skip

__getattr__ = lazily(__name__)
