"""Everything that writes for readers: gallery, notebooks, model cards, README, golden numbers."""

from typing import TYPE_CHECKING

from vlsafe.core.lazy import lazily

if TYPE_CHECKING:
    from vlsafe.publish import (
        archive,
        gallery,
        golden,
        modelcards,
        notebooks,
        provenance,
        readme,
        report,
        results,
        sidebyside,
        worlds,
    )

__getattr__ = lazily(__name__)
