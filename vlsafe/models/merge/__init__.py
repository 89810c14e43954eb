"""Merge rules on tensors, in memory and on disk."""

from vlsafe.core.lazy import lazily

__getattr__ = lazily(__name__)
