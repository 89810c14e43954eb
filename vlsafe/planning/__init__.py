"""Before a run: what a scale needs and costs, what is missing, and the scheduler's lock."""

from vlsafe.core.lazy import lazily

__getattr__ = lazily(__name__)
