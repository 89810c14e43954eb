"""Figures of what `analysis` counted, one file per word of the notebooks. Computes nothing."""

from vlsafe.core.lazy import lazily

__getattr__ = lazily(__name__)
