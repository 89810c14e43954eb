"""Rows of real parts that packages hold: pictures with names, published prompts, and what is made of them."""

from typing import TYPE_CHECKING

from vlsafe.core.lazy import lazily

if TYPE_CHECKING:
    from vlsafe.data.pocket import guard, packages, pictures, prompts, rows

__getattr__ = lazily(__name__)
