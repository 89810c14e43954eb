"""Guards classify content: a text guard assesses conversations, an image guard pictures; neither knows what it is used for.

The miniature trains one of each (`trained`); guards from the hub have the same interface (`hub`)."""

from vlsafe.data.guards.assessment import Assessment, best_threshold, calibrate, decided, parse_guard, relative, reward_by
from vlsafe.data.guards.hub import opened
from vlsafe.data.guards.trained import LanguageModelGuard, LinearImageGuard, guard_prompt, guard_texts

__all__ = [
    "Assessment", "LanguageModelGuard", "LinearImageGuard", "best_threshold", "calibrate", "decided", "guard_prompt",
    "guard_texts", "opened", "parse_guard", "relative", "reward_by",
]  # fmt: skip
