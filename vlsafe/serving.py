"""A checkpoint behind an OpenAI-compatible server that is started for it, and whether its answers are those of the local engine.

The server runs in whatever environment its command names (vLLM needs one of its own, env/vllm.txt) and is bound to this machine.
Which engine answers is a field of the examination, so all runs of a scale are answered by one.
"""

from __future__ import annotations

import contextlib
import shlex
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlsafe import processes, servers, stats
from vlsafe.schema import Item, Response

PATIENCE = 600.0  # seconds until a server has loaded its model; assumed


@contextlib.contextmanager
def served(command: str, folder: Path) -> Iterator[servers.Server]:
    """A server of the model in a folder, for as long as the block lasts. `{folder}` and `{port}` of the command are filled in.

    Raises:   ChildProcessError with the server's last words when it ends before it answers; TimeoutError after `PATIENCE`
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = [part.format(folder=folder, port=port) for part in shlex.split(command)]
    with tempfile.TemporaryFile("w+") as log:  # noqa: SIM117  (the log outlives the server)
        with subprocess.Popen(line, stdout=log, stderr=log, preexec_fn=processes.die_with_parent) as running:
            try:
                _wait(running, port, log)
                yield servers.Server(f"http://127.0.0.1:{port}/v1", str(folder), key="VLSAFE_LOCAL_KEY")
            finally:
                running.terminate()


def _wait(running: subprocess.Popen, port: int, log: Any) -> None:
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        if running.poll() is not None:
            log.seek(0)
            raise ChildProcessError(f"the server ended with code {running.returncode}: {log.read()[-500:]}")
        with contextlib.suppress(OSError):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
            except urllib.error.HTTPError as error:
                error.close()  # it listens, and knows no such page
            return
        time.sleep(0.5)
    raise TimeoutError(f"the server has not answered within {PATIENCE:.0f} seconds")


def respond(command: str, folder: Path, items: Sequence[Item], name: str, max_new_tokens: int) -> list[Response]:
    """Responses of a served checkpoint in the order of the items, all of which are answered in words.

    Raises:   ConnectionAbortedError where some were not answered, or the server is gone
    """
    with served(command, folder) as server:
        given = {response.item: response for response in servers.respond(server, items, name, max_new_tokens)}
    if lacking := [item.id for item in items if item.id not in given]:
        raise ConnectionAbortedError(
            f"{len(lacking)} of {len(items)} requests were not answered, first {lacking[0]}; run it again"
        )
    return [given[item.id] for item in items]


def agreement(
    rows: Mapping[str, Sequence[Mapping[str, Any]]], responses: Mapping[str, Sequence[Response]], draws: int = 2000
) -> list[dict[str, Any]]:
    """How far two engines agree: share of equal texts, and the difference of every judge's events with its interval.

    `rows` are raw rows and `responses` the answers, each by engine, of the same items in the same order.

    Raises:   ValueError where the engines answered different items
    """
    (one, a), (other, b) = responses.items()
    if [response.item for response in a] != [response.item for response in b]:
        raise ValueError(f"{one} and {other} answered different items")
    equal = [x.text == y.text for x, y in zip(a, b, strict=True)]
    told: list[dict[str, Any]] = [{"what": "equal texts", "n": len(a), "share": float(np.mean(equal))}]
    paired = list(zip(rows[one], rows[other], strict=True))
    for kind in dict.fromkeys((row["benchmark"], row["judge"]) for row, _ in paired):
        of = [(x, y) for x, y in paired if (x["benchmark"], x["judge"]) == kind and None not in (x["event"], y["event"])]
        if of:
            left, right = (np.array([row["event"] for row in side], float) for side in zip(*of, strict=True))
            change = stats.paired_difference(left, right, [str(x["cluster"]) for x, _ in of], np.random.default_rng(0), draws)
            share = float((left == right).mean())
            told.append({"what": " ".join(kind), "n": len(of), "share": share, "change": change})
    return told
