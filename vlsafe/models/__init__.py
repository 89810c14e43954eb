"""Checkpoints: where submodules live, how they are built, loaded, grafted, merged and spoken to."""

from vlsafe.core.lazy import lazily

__getattr__ = lazily(__name__)
