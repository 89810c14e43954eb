"""Figures of what `analysis` counted, one file per word of the notebooks. Computes nothing."""

from typing import TYPE_CHECKING

from vlsafe.core.lazy import lazily

if TYPE_CHECKING:
    from vlsafe.plots import adaptation, claims, degradation, filtering, merging, probing, style, tuning, world

__getattr__ = lazily(__name__)
