"""SFT, DPO and GRPO on TRL, with checkpoints at chosen steps and exact resumption."""

from typing import TYPE_CHECKING

from vlsafe.core.lazy import lazily

if TYPE_CHECKING:
    from vlsafe.training import checkpoints, datasets, launch, precision, processes, trainers

__getattr__ = lazily(__name__)
