"""The stages that have stored responses judged by models, at scales that are loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlsafe.study.study import Study


def judged_params(study: Study) -> Any:
    """The judges that verdicts depend on."""
    return study.scale.exam.judges


def make_judged(study: Study, work: Path, source: str) -> dict[str, Any]:
    """Verdicts of the models that judge, beside those of rules."""
    raise NotImplementedError
