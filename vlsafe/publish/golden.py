"""A dozen numbers of the miniature that a change of code must not move unseen.

They are recorded from a clean tree by `vlsafe golden` and compared by a test. Counts are exact and hold everywhere; what was
trained is compared, with a tolerance, on the kind of processor that it was recorded on: a training amplifies the last bit.
They say nothing about whether a number is right, only that it is the same.
"""

from __future__ import annotations

import json
import platform
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from vlsafe.analysis import measures
from vlsafe.core import store
from vlsafe.study.study import Study

FILE = Path("tests") / "golden.json"
MAIN = "examination/instruct.filtered-full"
PAIRS = "harmful training verb–object pairs"  # of the world's training split


class Golden(NamedTuple):
    """A stage, what of it is read, and by how much it may differ: absolute + relative.

    What is read is a path in the numbers that the stage recorded about itself, a measure of its full examination, or PAIRS.
    """

    stage: str
    what: str
    absolute: float = 0.0
    relative: float = 0.0

    def read(self, study: Study) -> float:
        """The number as it is now."""
        if self.what == PAIRS:
            return float(len(study.world().actions("train", "harmful")))
        if self.what in measures.MEASURES:
            raw = pd.read_parquet(study.run(self.stage).folder / "raw.parquet")
            return float(measures.rates(raw[raw["exam"] == "full"], [self.what])["value"].iloc[0])
        return float(reduce(getitem, self.what.split("/"), store.manifest_of(study.run(self.stage))["numbers"]))


GOLDEN: dict[str, Golden] = {
    "items of all benchmarks": Golden("world/corpora", "rows/items"),
    PAIRS: Golden("world/corpora", PAIRS),
    "icons named by the tower": Golden("tower/clip", "zero_shot/icon", absolute=0.04),
    "loss of the base model": Golden("base/llm", "loss", relative=0.1),
    "screened instructions kept": Golden("screen/filtered", "kept/instructions", relative=0.02),
    "loss of the parent": Golden("parent/aligned", "loss", relative=0.2),
    "weights that move in stage 2": Golden("instruct/filtered-full", "moving_weights"),
    "text ASR of the parent": Golden("examination/parent.aligned", "text_asr", absolute=0.03),
    "how-tos of the parent": Golden("examination/parent.aligned", "capability_howto-text", absolute=0.06),
    "text ASR of the adapted model": Golden(MAIN, "text_asr", absolute=0.15),
    "multimodal ASR of the adapted model": Golden(MAIN, "multimodal_asr", absolute=0.05),
    "icon captions of the adapted model": Golden(MAIN, "capability_caption-icon", absolute=0.15),
    "helpfulness of the adapted model": Golden(MAIN, "helpfulness", absolute=0.06),
}


def processor() -> str:
    """The kind of processor, as far as the bits of a training depend on it: its model, and the instruction set that is used."""
    from torch.backends import cpu

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{model}, {cpu.get_cpu_capability()}"


def missing(study: Study) -> list[str]:
    """The stages whose runs are not there or not valid; without them nothing can be compared."""
    return [stage for stage in dict.fromkeys(n.stage for n in GOLDEN.values()) if store.status(study.run(stage)) != "valid"]


def measure(study: Study) -> dict[str, float]:
    """The numbers as they are now."""
    return {name: round(number.read(study), 6) for name, number in GOLDEN.items()}


def record(study: Study, path: Path) -> None:
    """Write the numbers with the environment that made them.

    Raises:   ValueError for a working tree with changes, or where runs are missing
    """
    environment = store.environment()
    if environment["commit"] is None or environment["commit"].endswith("-dirty"):
        raise ValueError(f"golden numbers are recorded from a clean tree, this one is at {environment['commit']}; commit first")
    if absent := missing(study):
        others = f"nor are {len(absent) - 1} others; `make reproduce` makes them"
        raise ValueError(f"{absent[0]} is not valid in {study.root}, {others}")
    commits = {number.stage: store.manifest_of(study.run(number.stage))["commit"] for number in GOLDEN.values()}
    result = {
        "scale": study.scale.name, "backbone": study.backbone, "seed": study.seed,
        "environment": {**environment, "processor": processor()}, "runs_made_at": commits, "numbers": measure(study),
    }  # fmt: skip
    store.write_text(path, json.dumps(result, indent=1) + "\n")
