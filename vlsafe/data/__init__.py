"""Rows: the miniature world, the published corpora, guards, intake, screening and the data arms of stage 2."""

from vlsafe.core.lazy import lazily

__getattr__ = lazily(__name__)
