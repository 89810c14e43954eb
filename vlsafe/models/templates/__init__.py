"""Chat templates by name. Needs no model library, so that a scale can be checked before one is imported."""

from __future__ import annotations

from pathlib import Path

import yaml

from vlsafe.core.scale import known

FOLDER = Path(__file__).parent
WITH_SYSTEM: dict[str, list[str]] = yaml.safe_load((FOLDER / "systems.yaml").read_text(encoding="utf-8"))
NAMES = sorted([*WITH_SYSTEM, *(path.stem for path in FOLDER.glob("*.jinja"))])


def template(name: str) -> str:
    """The Jinja text of a chat template; an unknown name raises ValueError with the known ones."""
    base, system = WITH_SYSTEM.get(known(name, NAMES, "chat template"), (name, None))
    text = (FOLDER / f"{base}.jinja").read_text(encoding="utf-8")
    return f'{{%- set default_system = "{system}" -%}}\n{text}' if system else text
