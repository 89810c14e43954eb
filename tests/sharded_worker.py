"""A launched training process that is sharded on processors too, which accelerate does on GPUs only. For tests alone."""

import sys

from accelerate import PartialState
from accelerate.utils import DistributedType

from vlsafe import launch, processes, train

plain = train._arguments


def on_processors(*given):
    arguments = plain(*given)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return arguments


train._arguments = on_processors
if "--head-alone" in sys.argv:
    processes.final_norm = lambda model: None
launch.main(sys.argv[1:2])
