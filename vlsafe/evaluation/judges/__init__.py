"""Judges: an item and a response in, a label out. Whatever cannot be judged is "unjudged", never a default.

A judge is a function; its labels are its own words, and the benchmark says which of them is the event it counts.
JUDGES apply a rule to the response. LLM_JUDGES ask a model: their prompts and parsers are here, who answers them (weights,
an endpoint, a file of judgements) is not.
"""

from __future__ import annotations

from collections.abc import Iterable

from vlsafe.core.scale import known
from vlsafe.core.schema import Item, Response, Verdict
from vlsafe.evaluation.judges.llm import LLM_JUDGES, LLMJudge
from vlsafe.evaluation.judges.rules import JUDGES, UNJUDGED, Judge, Mark, world

__all__ = ["JUDGES", "LLM_JUDGES", "UNJUDGED", "Judge", "LLMJudge", "Mark", "judge", "world", "xstest_strings"]
xstest_strings = JUDGES["xstest-strings"]


def judge(name: str, items: Iterable[Item], responses: Iterable[Response]) -> list[Verdict]:
    """Verdicts of one judge on responses, in their order.

    Raises:   ValueError for an unknown judge, or a response to an item that is not there
    """
    mark, by_id = JUDGES[known(name, JUDGES, "judge")], {item.id: item for item in items}
    verdicts = []
    for response in responses:
        if response.item not in by_id:
            raise ValueError(f"there is a response to {response.item!r}, which is no item of this examination")
        label, detail = mark(by_id[response.item], response.text)
        verdicts.append(Verdict(response.item, response.benchmark, response.model, name, label, detail))
    return verdicts
