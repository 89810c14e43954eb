"""Llama-Guard-3's prompt and answers, for the guard that screens data and the judge of responses. Imports no model library."""

from __future__ import annotations

import re
from pathlib import Path

PROMPT = (Path(__file__).parent / "templates" / "llama_guard_3.txt").read_text(encoding="utf-8")


def parse(text: str) -> tuple[bool | None, tuple[str, ...]]:
    """Whether an answer says `unsafe`, and its codes, which stand on the next line between commas (in the miniature, whose words
    know no lines, after a space). Anything else is None.

    Source:   Llama-Guard-3 model card
    """
    words = text.strip().replace(",", " ").split()
    if words == ["safe"]:
        return False, ()
    if words and words[0] == "unsafe" and all(re.fullmatch(r"S\d+", code) for code in words[1:]):
        return True, tuple(words[1:])
    return None, ()
