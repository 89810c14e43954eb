"""Llama-Guard-3's prompt and answers, for the guard that screens data and the judge of responses. Imports no model library."""

from __future__ import annotations

import re
from pathlib import Path

PROMPT = (Path(__file__).parent / "templates" / "llama_guard_3.txt").read_text(encoding="utf-8")


def parse(text: str) -> tuple[bool | None, tuple[str, ...]]:
    """Whether an answer says `unsafe`, and the codes, on the next line and between commas; anything else is None.

    Source:   Llama-Guard-3 model card
    """
    first, _, codes = (part.strip() for part in text.strip().partition("\n"))
    if first == "safe" and not codes:
        return False, ()
    if first == "unsafe" and re.fullmatch(r"(S\d+(,\s*S\d+)*)?", codes):
        return True, tuple(re.findall(r"S\d+", codes))
    return None, ()
