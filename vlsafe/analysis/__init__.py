"""Frames in, frames out: measures, intervals, comparisons, claims; one file per word of the notebooks. Needs no model library."""

from typing import TYPE_CHECKING

from vlsafe.core.lazy import lazily

if TYPE_CHECKING:
    from vlsafe.analysis import (
        adaptation, agreement, capability, causal, claims, comparisons, crossing, degradation, durability, filtering, measures,
        merging, openings, probing, sentences, stats, tuning,
    )  # fmt: skip

__getattr__ = lazily(__name__)
