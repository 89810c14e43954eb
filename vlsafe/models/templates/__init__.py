"""Chat templates by name. They are ours, for tiny models and 7B alike, because the loss and the stop token depend on them.

Needs no model library, so that a scale can be checked before one is imported.
"""

from __future__ import annotations

from pathlib import Path

from vlsafe.core.scale import known

FOLDER = Path(__file__).parent
# Templates that differ from another one by a system line that is there where none is given: LLaVA's own for Llama-2 bases. It
# is a confound: with it, parent and adapted model differ in their prompt as well as in their weights.
WITH_SYSTEM = {
    "llama2-neutral": (
        "llama2",
        "You are a helpful language and vision assistant. You are able to understand the visual content that the user provides, "
        "and assist the user with a variety of tasks using natural language.",
    ),
    # What these two write by themselves where no system line is given.
    "qwen2.5": ("chatml", "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
    "smollm2": ("chatml", "You are a helpful AI assistant named SmolLM, trained by Hugging Face"),
}
NAMES = sorted([*WITH_SYSTEM, *(path.stem for path in FOLDER.glob("*.jinja"))])


def template(name: str) -> str:
    """The Jinja text of a chat template; errors name the ones there are."""
    base, system = WITH_SYSTEM.get(known(name, NAMES, "chat template"), (name, None))
    text = (FOLDER / f"{base}.jinja").read_text(encoding="utf-8")
    return f'{{%- set default_system = "{system}" -%}}\n{text}' if system else text
