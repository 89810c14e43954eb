"""Rows of real parts that packages hold: pictures with names, published prompts, and what is made of them."""

from typing import TYPE_CHECKING

from vlsafe.core.lazy import lazily

if TYPE_CHECKING:
    from vlsafe.data.pocket import packages, pictures, prompts

__getattr__ = lazily(__name__)
