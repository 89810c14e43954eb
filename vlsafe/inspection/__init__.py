"""Inside a model: hidden states, their similarity, localisation of safety layers, drift, transplants, directions."""

from vlsafe.core.lazy import lazily

__getattr__ = lazily(__name__)
