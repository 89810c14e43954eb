"""Two models into one: rules on tensors, models in memory, checkpoints on disk. It knows no benchmark and no study."""
