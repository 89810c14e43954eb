"""One file per benchmark: its items (the miniature's and the real ones), its judges, its metric.

A benchmark names its judges by strings and never judges itself. `EVENT` says what its rate counts, `WORSE` whether
more of it is worse, `EVENTS` which words of which judge are the event.
"""

from __future__ import annotations

from types import ModuleType

from vlsafe.benchmarks import capability, mm_safetybench, mmbench, sorry_bench, xstest

BENCHMARKS: dict[str, ModuleType] = {
    "sorry_bench": sorry_bench,
    "mm_safetybench": mm_safetybench,
    "xstest": xstest,
    "mmbench": mmbench,
    "capability": capability,
}
