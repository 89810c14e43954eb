"""Rows: the miniature world, the published corpora, guards, intake, screening and the data arms of stage 2."""

from typing import TYPE_CHECKING

from vlsafe.core.lazy import lazily

if TYPE_CHECKING:
    from vlsafe.data import arms, files, guards, intake, llama_guard, miniature, pocket, sources

__getattr__ = lazily(__name__)
