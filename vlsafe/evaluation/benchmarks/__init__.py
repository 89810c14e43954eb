"""One file per benchmark: its items (the miniature's and the real ones), its judges, its metric.

A benchmark names its judges by strings and never judges itself. `EVENTS` says which labels of which judge are the event
that its rows count; `analysis.measures` says what a measure makes of them. `howtos` is no benchmark: it writes the items that
six of them share; `confounds` is none either: it asks what they ask in altered prompts (CONTROLS). REAL are those with official
files (`official` says what such a file has).
"""

from __future__ import annotations

import pkgutil
from importlib import import_module
from types import ModuleType
from typing import Any

from vlsafe.analysis.measures import MEASURES

_FILES = {file.name: import_module(f"{__name__}.{file.name}") for file in pkgutil.iter_modules(__path__)}
_BOTH = ("sorry_bench", "wildjailbreak", "mm_safetybench", "siuo", "figstep", "xstest", "mmbench", "mme", "seed_bench")
BENCHMARKS: dict[str, ModuleType] = {name: _FILES[name] for name in (*_BOTH, "capability")}
REAL: dict[str, ModuleType] = {name: _FILES[name] for name in (*_BOTH, "vlguard")}
CONTROLS: dict[str, ModuleType] = {"confounds": _FILES["confounds"]}
PACKED: dict[str, Any] = _FILES["pocket"].PACKED
"""Those of a scale whose parts come from packages, several in one file; they have no official files and no official metric."""
OWN = "prompts"
"""What items are of that a user has brought in a file, for probing: no benchmark."""
ADDED: dict[str, ModuleType] = {
    module.NAME: module for name, module in _FILES.items() if name not in BENCHMARKS and hasattr(module, "miniature_items")
}
"""Files that somebody added to this folder, by their NAME: benchmarks without an edit here, with MEASURES of their own."""
BENCHMARKS |= ADDED
for _added in ADDED.values():
    MEASURES.update(_added.MEASURES)  # handed down: `analysis` imports no benchmark
