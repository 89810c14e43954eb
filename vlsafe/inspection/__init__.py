"""Inside a model: hidden states, their similarity, localisation of safety layers, drift, transplants, directions."""

from typing import TYPE_CHECKING

from vlsafe.core.lazy import lazily

if TYPE_CHECKING:
    from vlsafe.inspection import causal, states

__getattr__ = lazily(__name__)
