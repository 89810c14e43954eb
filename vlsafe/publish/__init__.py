"""Everything that writes for readers: gallery, notebooks, model cards, README, golden numbers."""

from typing import TYPE_CHECKING

from vlsafe.core.lazy import lazily

if TYPE_CHECKING:
    from vlsafe.publish import (
        adopted, archive, gallery, golden, merged, modelcards, notebooks, provenance, readme, report, results, sidebyside, worlds,
    )  # fmt: skip

__getattr__ = lazily(__name__)
