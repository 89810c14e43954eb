"""A launched training process that is sharded on processors too, which accelerate does on GPUs only. For tests alone."""

import contextlib
import ctypes
import gc
import hashlib
import json
import os
import resource
import signal
import sys
from pathlib import Path

import psutil
from accelerate import PartialState
from accelerate.utils import DistributedType

from vlsafe.training import launch, processes

plain, plain_sharder, plain_work = PartialState.__init__, processes.sharder, launch._work


def on_processors(state, *arguments, **options):
    plain(state, *arguments, **options)
    if state.distributed_type == DistributedType.MULTI_CPU:
        state.distributed_type = DistributedType.MULTI_GPU


def peak():
    """The largest resident size of this process so far, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def stored(model):
    """Bytes of all memory behind a model's weights and buffers, of which a part may be in use."""
    tensors = [getattr(held, "_local_tensor", held) for held in (*model.parameters(), *model.buffers())]
    return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())


def digests(buffers):
    return {
        name.removeprefix("base_model.model."): hashlib.sha256(held.cpu().numpy().tobytes()).hexdigest() for name, held in buffers
    }


def reporting(*arguments):
    """Note of every model that is sharded what this process holds of it, before and after, and its first log-probabilities."""
    shard, noted = plain_sharder(*arguments), []
    before, resident = peak(), psutil.Process().memory_info().rss

    def shard_and_note(model):
        empty = all(weight.is_meta for weight in model.parameters())
        model = shard(model)
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what is free is given back, so that the resident size is what is held
        whole = sum(4 * weight.numel() for weight in model.parameters())
        line = {"empty": empty, "whole": whole, "stored": stored(model), "grown": peak() - before,
                "held": psutil.Process().memory_info().rss - resident, "buffers": digests(model.named_buffers())}  # fmt: skip
        noted.append(line)
        handle = model.register_forward_hook(lambda _, inputs, out: first(out))

        def first(out):
            line["log_probs"] = out.log_probs.flatten().tolist() if hasattr(out, "log_probs") else []
            Path(os.environ["REPORT"], f"{os.environ['RANK']}.json").write_text(json.dumps(noted))
            handle.remove()

        return model

    return shard_and_note


def killed(job, data, progress):
    """The training, whose second process is killed at the end of a step."""

    def step_ended(step):
        if os.environ["RANK"] == "1" and step == int(os.environ["KILL_AT"]):
            os.kill(os.getpid(), signal.SIGKILL)
        progress(step)

    return plain_work(job, data, step_ended)


PartialState.__init__ = on_processors
if os.environ.get("KILL_AT"):
    launch._work = killed
if os.environ.get("REPORT"):
    processes.sharder = reporting
if os.environ.get("HEAD_ALONE"):
    processes.head_with_norm = lambda model: contextlib.nullcontext()
launch.main(sys.argv[1:])
