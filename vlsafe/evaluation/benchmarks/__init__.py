"""One file per benchmark: its items (the miniature's and the real ones), its judges, its metric.

A benchmark names its judges by strings and never judges itself. `EVENTS` says which words of which judge are the event
that its rows count; what a measure makes of them is the affair of `measures`. `howtos` is no benchmark: it writes the
items that six of them share; `confounds` is none either: it asks what they ask in altered prompts (CONTROLS). REAL are
those with official files (`official` says what such a file has).
"""

from __future__ import annotations

import pkgutil
from importlib import import_module
from types import ModuleType

from vlsafe.analysis.measures import MEASURES
from vlsafe.evaluation.benchmarks import (
    capability,
    confounds,
    figstep,
    mm_safetybench,
    mmbench,
    mme,
    seed_bench,
    siuo,
    sorry_bench,
    vlguard,
    wildjailbreak,
    xstest,
)  # fmt: skip

BENCHMARKS: dict[str, ModuleType] = {
    "sorry_bench": sorry_bench,
    "wildjailbreak": wildjailbreak,
    "mm_safetybench": mm_safetybench,
    "siuo": siuo,
    "figstep": figstep,
    "xstest": xstest,
    "mmbench": mmbench,
    "mme": mme,
    "seed_bench": seed_bench,
    "capability": capability,
}
CONTROLS: dict[str, ModuleType] = {"confounds": confounds}
_KNOWN = [*BENCHMARKS, *CONTROLS]
_BESIDE = [import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__) if found.name not in _KNOWN]
ADDED: dict[str, ModuleType] = {module.NAME: module for module in _BESIDE if hasattr(module, "miniature_items")}
"""Files that somebody laid beside ours, by their NAME: they are benchmarks without an edit here, with MEASURES of their own."""
BENCHMARKS |= ADDED
for _added in ADDED.values():
    MEASURES.update(_added.MEASURES)  # handed down: `analysis` imports no benchmark
REAL: dict[str, ModuleType] = {n: m for n, m in BENCHMARKS.items() if n != "capability" and n not in ADDED} | {"vlguard": vlguard}
