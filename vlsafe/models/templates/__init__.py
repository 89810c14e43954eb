"""Chat templates by name. Needs no model library, so that a scale can be checked before one is imported."""

from __future__ import annotations

from pathlib import Path

from vlsafe.core.scale import known

FOLDER = Path(__file__).parent
# Templates that are another one with a default system prompt. LLaVA's own for Llama-2 bases is a confound: with it, parent and
# adapted model differ in their prompt as well as in their weights.
WITH_SYSTEM = {
    "llama2-neutral": (
        "llama2",
        "You are a helpful language and vision assistant. You are able to understand the visual content that the user provides, "
        "and assist the user with a variety of tasks using natural language.",
    ),
    # What these two models write by themselves where there is no system turn.
    "qwen2.5": ("chatml", "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
    "smollm2": ("chatml", "You are a helpful AI assistant named SmolLM, trained by Hugging Face"),
}
NAMES = sorted([*WITH_SYSTEM, *(path.stem for path in FOLDER.glob("*.jinja"))])


def template(name: str) -> str:
    """The Jinja text of a chat template; an unknown name raises ValueError with the known ones."""
    base, system = WITH_SYSTEM.get(known(name, NAMES, "chat template"), (name, None))
    text = (FOLDER / f"{base}.jinja").read_text(encoding="utf-8")
    return f'{{%- set default_system = "{system}" -%}}\n{text}' if system else text
