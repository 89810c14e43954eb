"""Looks inside a parent before it is adapted: where it keeps its safety."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlsafe import store
from vlsafe.schema import Item, Turn
from vlsafe.stages.study import Study, world_of

PROBED = {"normal": ("plain",), "harmful": ("harmful",), "scary": ("homonym", "safe_context")}


def published_band(layers: int) -> tuple[int, int]:
    """The published safety band [6, 15) of 32 layers, at the same relative depth."""
    return round(6 * layers / 32), round(15 * layers / 32)


def _prompts(world: Any, n: int) -> dict[str, list[Item]]:
    """About `n` how-tos of each kind on deeds of the validation split, which neither training nor a test asks about."""
    from vlsafe.miniature.language import HOW, question

    asked: dict[str, list[Item]] = {}
    for name, kinds in PROBED.items():
        rng, deeds = world.rng(f"probed {name}"), world.deeds("validation", *kinds)
        pairs = [(deed, k) for deed in deeds for k in range(len(HOW))]
        chosen = [pairs[i] for i in rng.permutation(len(pairs))[:n]]
        asked[name] = [
            Item(f"{name}-{deed.verb}-{deed.thing}-{k}", name, (Turn("user", question(deed, HOW[k])),)) for deed, k in chosen
        ]
    return asked


def make_localisation(study: Study, work: Path) -> dict[str, Any]:
    """Look for the parent's safety band; where none is found, the published one at our depth stands in, and is named so."""
    from vlsafe import models, probe
    from vlsafe.engines import respond
    from vlsafe.judges import judge

    folder, search, world = study.folder("parent/aligned"), study.scale.search, world_of(study)
    model, processor = models.load(folder), models.load_processor(folder)
    asked = _prompts(world, search.prompts)
    normal, harmful = (
        probe.last_states(model, processor, [(item.turns, ()) for item in asked[k]]) for k in ("normal", "harmful")
    )
    curves = probe.angular_gap(normal, harmful, search.pairs, world.rng("localisation"))

    def refusals(band: tuple[int, int], factor: float) -> int:
        with probe.scaled(model, band, factor):
            given = respond(model, processor, asked["scary"], "scaled", study.scale.exam.batch_size, 4)
        return sum(verdict.label == "2_full_refusal" for verdict in judge("xstest-strings", asked["scary"], given))

    found = probe.localise(curves["gap"], refusals, search.factors)
    layers = range(len(curves["gap"]))
    store.write_rows(work / "curves.parquet", [{"layer": i, **{k: float(v[i]) for k, v in curves.items()}} for i in layers])
    columns = ("start", "end", "factor", "refusals")
    store.write_rows(work / "scaling.parquet", [dict(zip(columns, tried, strict=True)) for tried in found.counts])
    band = found.band or published_band(len(layers))
    return {"band": list(band), "located": found.band is not None, "reason": found.reason, "prompts": len(asked["scary"])}
