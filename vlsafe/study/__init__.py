"""The stages: each reads runs from the store, calls one function below with plain values, and writes what comes back."""

from typing import TYPE_CHECKING

from vlsafe.core.lazy import lazily

if TYPE_CHECKING:
    from vlsafe.study import (
        adaptation, adopted, causal, degradation, durability, filtering, graph, judging, merging, pocket, probing, study, tuning,
        world,
    )  # fmt: skip

__getattr__ = lazily(__name__)
