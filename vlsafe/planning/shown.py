"""The plan of `planning.costs` as text: tables, what does not fit, the README's summary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlsafe.planning import dryrun
from vlsafe.planning.costs import Cost, Plan, schedule
from vlsafe.planning.dryrun import GPUS
from vlsafe.study.study import Study


def lines(costs: Sequence[Cost], gpu: str, every: bool = False) -> list[dict[str, Any]]:
    """The plan as formatted rows, one per part or, with `every`, per stage, and their sum."""
    groups: dict[str, list[Cost]] = {}
    for cost in costs:
        groups.setdefault(cost.stage if every else cost.part, []).append(cost)
    return [_line(name, of, gpu) for name, of in [*groups.items(), ("all", list(costs))]]


def too_large(costs: Sequence[Cost], gpu: str) -> list[str]:
    """Sentences on the parts that so many such GPUs do not hold, and on those of safety tuning that no number of them does, since
    they are not sharded."""
    held, parts = GPUS[gpu]["memory"], dict[str, list[Cost]]()
    over = {many: sorted({cost.part for cost in costs if cost.memory[many] > held}) for many in (1, 8)}
    said = [f"{many} × {gpu} cannot hold {', '.join(names)}" for many, names in over.items() if names]
    for cost in costs:
        if cost.stage.startswith("safety/") and min(cost.memory.values()) > held:
            parts.setdefault(cost.part, []).append(cost)
    for part, of in parts.items():
        names = ", ".join(cost.stage.partition("/")[2] for cost in of)
        said.append(f"{part} is not sharded and needs one GPU of {max(cost.memory[1] for cost in of) / 1e9:,.0f} GB, more than "
                    f"one {gpu} has: `tuning: {{without: [{names}]}}` leaves it out")  # fmt: skip
    return said


def _line(name: str, of: Sequence[Cost], gpu: str) -> dict[str, Any]:
    hours, kept, tokens = (sum(getattr(cost, field) for cost in of) for field in ("hours", "kept", "tokens"))
    memory = {n: max(cost.memory[n] for cost in of) for n in (1, 8)}
    how = " and ".join(sorted({cost.how for cost in of if cost.hours}))
    return {
        "stage": name, "stages": len(of), "tokens, 10^6": f"{tokens / 1e6:,.0f}", f"hours of one {gpu}": f"{hours:,.2f}",
        "GPUs": max(cost.gpus for cost in of), "GB a GPU, 1": f"{memory[1] / 1e9:,.0f}", "GB a GPU, 8": f"{memory[8] / 1e9:,.0f}",
        "GB kept": f"{kept / 1e9:,.0f}", "GB while running": f"{max(cost.at_most for cost in of) / 1e9:,.0f}",
        "how": how or "no GPU",
    }  # fmt: skip


def beyond(study: Study, costs: Sequence[Cost], memory: float, many: int = 1) -> set[str]:
    """The stages, in the graph's order, that do not fit into the memory of so many GPUs or read one of these."""
    left: set[str] = set()
    for cost in costs:
        needed = set() if study.stage(cost.stage).gathers else set(study.inputs(cost.stage))
        if cost.memory[many] > memory or left & needed:
            left.add(cost.stage)
    return left


def summary(chosen: Sequence[tuple[int, str, Study]]) -> str:
    """What fits on how many GPUs and how long it takes there, as Markdown; `chosen` holds (GPUs, their name, study)."""
    rows = []
    for many, gpu, study in chosen:
        every = Plan(study, gpu).stages()
        most, of = GPUS[gpu]["memory"], 1 if many == 1 else 8
        without = ", ".join(sorted({cost.part for cost in every if cost.memory[of] > most}))
        left = beyond(study, every, most, of)
        fit = [cost for cost in every if cost.stage not in left]
        found, disk = schedule(study, fit, many), sum(cost.kept for cost in fit) + max(cost.at_most for cost in fit)
        rows.append({
            "GPUs": f"{many} × {gpu}", "scale": f"`{study.scale.name}`",
            "what": f"what fits (not: {without})" if without else "everything",
            "hours": f"{found.hours:,.0f}", "longest chain": f"{found.chain_hours:,.0f}", "GB on disk": f"{disk / 1e9:,.0f}",
            "how": "computed",
        })  # fmt: skip
    return dryrun.table(rows)
