"""What notebook 00 shows of a world that was built, and why a scale that loads has none of it."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from vlsafe import plots
from vlsafe.analysis.measures import Lacking
from vlsafe.study.study import Study


def splits(study: Study) -> pd.DataFrame:
    """How many verb–object pairs of each kind are in each part of the world.

    Raises:   Lacking at a scale that loads
    """
    world = study.world()
    if world is None:
        raise Lacking(f"the scale {study.scale.name!r} loads models and benchmarks of others, which are about no small world")
    return pd.DataFrame(world.splits).map(len)


def pictures(study: Study, n: int = 16) -> Figure:
    """The first pictures of the world.

    Raises:   Lacking at a scale that loads
    """
    if study.world() is None:
        raise Lacking("pictures of the corpora and benchmarks of others are not shown in notebooks")
    return plots.world.pictures(study.rows("world/corpora", "pictures.parquet")[:n])


def zero_shot(study: Study) -> Any:
    """How often the tower names what new pictures show.

    Raises:   Lacking where it was loaded and not trained here
    """
    numbers = study.numbers("tower/clip")
    if "zero_shot" not in numbers:
        raise Lacking("the tower was trained by others, who say how well it recognises what it sees")
    return numbers["zero_shot"]
