"""Packages whose modules are imported when they are first used: `import vlsafe` and `vlsafe --help` stay quick."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any


def lazily(package: str, names: dict[str, str] | None = None) -> Callable[[str], Any]:
    """A module's `__getattr__`: a public name from the module that defines it, or a module of the package.

    `names` maps a public name to its module. Raises AttributeError for anything else.
    """

    def getattribute(name: str) -> Any:
        if names and name in names:
            return getattr(import_module(names[name]), name)
        if name.startswith("_") or find_spec(f"{package}.{name}") is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return import_module(f"{package}.{name}")

    return getattribute
