"""Frames in, frames out: measures, intervals, comparisons, claims; one file per word of the notebooks. Needs no model library."""

from typing import TYPE_CHECKING

from vlsafe.core.lazy import lazily

if TYPE_CHECKING:
    from vlsafe.analysis import (
        adaptation, agreement, capability, causal, claims, clustered, comparisons, crossing, degradation, durability, filtering,
        measures, merging, openings, probing, resampling, sentences, stats, tuning,
    )  # fmt: skip

__getattr__ = lazily(__name__)
