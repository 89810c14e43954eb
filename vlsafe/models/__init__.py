"""Checkpoints: where submodules live, how they are built, loaded, grafted, merged and spoken to."""

from typing import TYPE_CHECKING

from vlsafe.core.lazy import lazily

if TYPE_CHECKING:
    from vlsafe.models import architectures, chat, checkpoints, devices, efficientnet, gguf, merge, templates, towers, trainable

__getattr__ = lazily(__name__)
