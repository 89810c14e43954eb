"""How does vision-language adaptation change the safety of a model? A companion to arXiv 2410.07571.

What notebooks and users call stands here, imported when it is first used; the folders are described in CONTRIBUTING.md:
`analysis` and `plots` have one module per word of the notebooks (`analysis.merging`, `plots.merging`).
"""

from typing import TYPE_CHECKING

from vlsafe.core.lazy import lazily

__version__ = "0.2.0"
__all__ = [
    "Study", "drift", "examine", "judge", "last_states", "load_scale", "localise", "merge", "rates", "score", "similarity",
]  # fmt: skip

if TYPE_CHECKING:
    from vlsafe.analysis.measures import rates
    from vlsafe.core.presets import load_scale
    from vlsafe.evaluation.examine import examine
    from vlsafe.evaluation.judges import judge
    from vlsafe.evaluation.score import score
    from vlsafe.inspection.states import drift, last_states, localise, similarity
    from vlsafe.models.merge.files import merge
    from vlsafe.study.study import Study

__getattr__ = lazily(
    __name__,
    {
        "Study": "vlsafe.study.study",
        "drift": "vlsafe.inspection.states",
        "examine": "vlsafe.evaluation.examine",
        "judge": "vlsafe.evaluation.judges",
        "last_states": "vlsafe.inspection.states",
        "load_scale": "vlsafe.core.presets",
        "localise": "vlsafe.inspection.states",
        "merge": "vlsafe.models.merge.files",
        "rates": "vlsafe.analysis.measures",
        "score": "vlsafe.evaluation.score",
        "similarity": "vlsafe.inspection.states",
    },
)
