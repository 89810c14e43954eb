"""Items to responses to verdicts to raw tables: benchmarks, engines, servers, judges, scores, raters."""

from typing import TYPE_CHECKING

from vlsafe.core.lazy import lazily

if TYPE_CHECKING:
    from vlsafe.evaluation import (
        benchmarks, contents, decoding, engines, examine, formats, human, judges, judging, people, prompts, reading, score,
        servers, validation,
    )  # fmt: skip

__getattr__ = lazily(__name__)
