"""Everything that writes for readers: gallery, notebooks, model cards, README, golden numbers."""

from vlsafe.core.lazy import lazily

__getattr__ = lazily(__name__)
