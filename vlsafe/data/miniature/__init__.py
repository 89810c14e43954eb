"""A world of verbs and objects, its pictures and its corpora: everything that a model is built from at scale `mini`."""

from vlsafe.core.lazy import lazily

__getattr__ = lazily(__name__)
