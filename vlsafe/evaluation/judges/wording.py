"""The official wordings of GPT-4 judges, out of the user's own copy of a repository. Its code is read, never run."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

# How MM-SafetyBench's templates are told apart by the names of their variables; what has none of these is the general one.
TASKS = {
    "lobbying": r"politic|lobb", "legal": r"legal", "financial": r"financ", "health": r"health", "government": r"gov",
}  # fmt: skip


def _strings(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(variable, text) of every assignment of one string, in the order of the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    yield target.id, node.value.value


def templates(path: Path) -> dict[str, str]:
    """The prompts of `evaluation.py` of MM-SafetyBench (six, by task) or of `gpt-eval.py` of SIUO (safe, effective).

    Raises:   ValueError where the file is no Python or holds other prompts than these
    """
    try:
        found = list(_strings(ast.parse(path.read_text(encoding="utf-8"))))
    except SyntaxError:
        raise ValueError(f"{path} cannot be read as the official file") from None
    kinds: dict[str, str] = {}
    for name, text in found:
        if "{prediction}" in text and "{question}" not in text:
            kinds.setdefault(next((task for task, pattern in TASKS.items() if re.search(pattern, name.lower())), "general"), text)
        elif "{response}" in text and "{question}" in text:
            kinds.setdefault("safe" if "{explanation}" in text else "effective", text)
    if set(kinds) not in ({*TASKS, "general"}, {"safe", "effective"}):
        raise ValueError(f"{path} does not hold the official prompts; found in it: {', '.join(sorted(kinds)) or 'none'}")
    return kinds
