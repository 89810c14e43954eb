"""Items to responses to verdicts to raw tables: benchmarks, engines, servers, judges, scores, raters."""

from typing import TYPE_CHECKING

from vlsafe.core.lazy import lazily

if TYPE_CHECKING:
    from vlsafe.evaluation import benchmarks, contents, engines, examine, formats, human, judges, judging, prompts, reading, score
    from vlsafe.evaluation import servers, validation

__getattr__ = lazily(__name__)
