"""Frames in, frames out: measures, intervals, comparisons, claims; one file per word of the notebooks. Needs no model library."""

from vlsafe.core.lazy import lazily

__getattr__ = lazily(__name__)
