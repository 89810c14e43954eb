"""SFT, DPO and GRPO on TRL, with checkpoints at chosen steps and exact resumption."""

from vlsafe.core.lazy import lazily

__getattr__ = lazily(__name__)
