"""`accelerate launch` from a process that has imported everything: what it starts is forked, which saves most of twenty seconds.

The launcher, its agent and the trainings are those of a real launch; what is left out is starting Python. Output is not captured.
"""

import functools
import multiprocessing
import os
import runpy
import signal
import sys

import torch
from accelerate.commands import launch as accelerate
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

from vlsafe.training import launch

IMPORTED = ("accelerate.commands.launch", "torch.distributed.run", "vlsafe.training.launch", "vlsafe.training.trainers",
            "transformers.models.llava.modeling_llava", "transformers.models.llama.modeling_llama",
            "transformers.models.clip.modeling_clip")  # fmt: skip
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(list(IMPORTED))


class Started:
    """What `subprocess.Popen` says of a process, of one that was forked."""

    def __init__(self, target, line, env, context):
        self._process = context.Process(target=target, args=(list(line), dict(env)))
        self._process.start()
        self.pid = self._process.pid

    def poll(self):
        return self._process.exitcode

    @property
    def returncode(self):
        return self._process.exitcode

    def wait(self, timeout=None):
        self._process.join(timeout)
        return self._process.exitcode

    def send_signal(self, number):
        os.kill(self.pid, number)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.wait()


def popen(line, env, preexec_fn=None):
    """For `launch.subprocess`: accelerate's launcher."""
    return Started(_launcher, line, env, FORKS)


def _launcher(line, env):
    _become(env)
    forked = functools.partial(Started, _worker, context=multiprocessing.get_context("fork"))
    SubprocessHandler._popen = lambda self, args, env: forked(args, env)
    arguments = line[line.index("accelerate.commands.launch") + 1 :]
    accelerate.launch_command(accelerate.launch_command_parser().parse_args(arguments))


def _worker(line, env):
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the agent's own handler came along
    _become(env)
    torch.set_num_threads(int(env["OMP_NUM_THREADS"]))
    script, job = line[-2:]
    if line[-3:-1] == list(launch.WORKER):
        return launch.main([job])
    sys.argv = [script, job]
    runpy.run_path(script, run_name="__main__")


def _become(env):
    os.environ.clear()
    os.environ.update(env)
