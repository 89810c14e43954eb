"""The stages: each reads runs from the store, calls one function below with plain values, and writes what comes back."""

from vlsafe.core.lazy import lazily

__getattr__ = lazily(__name__)
