"""Before a run: what a scale needs and costs, what is missing, and the scheduler's lock."""

from typing import TYPE_CHECKING

from vlsafe.core.lazy import lazily

if TYPE_CHECKING:
    from vlsafe.planning import costs, doctor, dryrun, outside, scheduler, shown

__getattr__ = lazily(__name__)
