"""A launched training process that is sharded on processors too, which accelerate does on GPUs only. For tests alone."""

import contextlib
import os
import sys

from accelerate import PartialState
from accelerate.utils import DistributedType

from vlsafe.training import launch, processes, trainers

plain = trainers._arguments


def on_processors(*given):
    arguments = plain(*given)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return arguments


trainers._arguments = on_processors
if os.environ.get("HEAD_ALONE"):
    processes.head_with_norm = lambda model: contextlib.nullcontext()
launch.main(sys.argv[1:])
