"""Items to responses to verdicts to raw tables: benchmarks, engines, servers, judges, scores, raters."""

from vlsafe.core.lazy import lazily

__getattr__ = lazily(__name__)
