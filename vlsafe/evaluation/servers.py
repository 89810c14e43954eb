"""Any OpenAI-compatible server, asked many things at once; engines and judges share it.

What a server does not answer is returned as such, with the reason, and never replaced. The client library waits
and tries again where a server is busy or limits rates, for as long as the server itself asks. Keys are named by the
environment variable that holds them, and neither they nor what is asked or answered reach a log or an error.


A checkpoint behind an OpenAI-compatible server that is started for it, and whether its answers are those of the local engine.

The server runs in whatever environment its command names (vLLM needs one of its own, env/vllm.txt) and is bound to this machine.
Which engine answers is a field of the examination, so all runs of a scale are answered by one.
"""

from __future__ import annotations

import base64
import contextlib
import logging
import os
import shlex
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from threading import Event
from typing import Any, Generic, NamedTuple, TypeVar
from urllib.parse import urlsplit

import numpy as np
import openai

from vlsafe.analysis import stats
from vlsafe.core.schema import Item, Picture, Response, Turn
from vlsafe.training import processes

LOGGERS = ("openai", "httpx", "httpcore", "httpx2", "httpcore2")
HOPELESS = {401: "refuses the key", 403: "forbids it", 404: "knows neither this model nor this path"}
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Server:
    """Where a model is served and how patiently it is asked.

    `key` names an environment variable. `patience` is after how many failures in a row, none answered in between, the
    server counts as gone.

    Units:    `timeout` seconds for one answer; `retries` repetitions of one request; `parallel` requests in flight
    """

    url: str
    model: str
    key: str = "OPENAI_API_KEY"
    timeout: float = 120.0
    retries: int = 4
    parallel: int = 8
    patience: int = 16

    @property
    def host(self) -> str:
        """The address without path, user or password: what may be printed."""
        found = urlsplit(self.url)
        return f"{found.hostname}:{found.port}" if found.port else str(found.hostname)


class Request(NamedTuple, Generic[Key]):
    """One thing to ask: chat messages, or a raw prompt that the server continues."""

    key: Key
    messages: Sequence[dict[str, Any]] = ()
    prompt: str | None = None


class Reply(NamedTuple):
    """What came back. `text` None: nothing did, and `problem` says why."""

    text: str | None
    truncated: bool = False
    problem: str = ""


def said(turns: Sequence[Turn], images: Sequence[Picture]) -> list[dict[str, Any]]:
    """Chat messages; pictures go before the text of the first user turn, as data."""
    pictures = [
        {"type": "image_url", "image_url": {"url": f"data:image/{_kind(data)};base64,{base64.b64encode(data).decode()}"}}
        for data in map(bytes, images)
    ]
    told: list[dict[str, Any]] = []
    for turn in turns:
        if turn.role == "user" and pictures:
            told.append({"role": "user", "content": [*pictures, {"type": "text", "text": turn.text}]})
            pictures = []
        else:
            told.append({"role": turn.role, "content": turn.text})
    return told


def _kind(data: bytes) -> str:
    return "png" if data.startswith(b"\x89PNG") else "webp" if data[8:12] == b"WEBP" else "jpeg"


def complete(server: Server, requests: Iterable[Request[Key]], max_tokens: int) -> Iterator[tuple[Key, Reply]]:
    """Greedy answers as they come, in no order; every request comes back exactly once unless the server is gone.

    Raises:   ValueError where asking again is useless (key, model or address are wrong)
              ConnectionAbortedError where the server fails `patience` times in a row; what was yielded before is not lost
    """
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)  # at DEBUG they write what is asked
    key = os.environ.get(server.key) or "none"
    over = Event()
    http = openai.DefaultHttpxClient(event_hooks={"request": [lambda _: _go_on(over)]})
    client = openai.OpenAI(
        base_url=server.url, api_key=key, timeout=server.timeout, max_retries=server.retries, http_client=http
    )  # fmt: skip
    waiting, answered, failed = iter(requests), 0, 0
    pool = ThreadPoolExecutor(server.parallel)
    try:
        flying = {pool.submit(_ask, client, server, request, max_tokens): request for request in islice(waiting, server.parallel)}
        while flying:
            done: set[Future[tuple[Reply, bool]]] = wait(flying, return_when=FIRST_COMPLETED).done
            for future in done:
                request = flying.pop(future)
                reply, alive = future.result()
                answered, failed = answered + (reply.text is not None), 0 if alive else failed + 1
                yield request.key, reply
            for request in islice(waiting, len(done)):
                flying[pool.submit(_ask, client, server, request, max_tokens)] = request
            if failed >= server.patience or (failed and not flying and not answered):
                raise ConnectionAbortedError(
                    f"{server.host} failed {failed} times in a row ({reply.problem}); {answered} answers came and are kept: "
                    "run the same command again to go on from there"
                )
    finally:
        over.set()
        pool.shutdown(wait=True, cancel_futures=True)
        client.close()


def _go_on(over: Event) -> None:
    """Ends the repetitions of requests that are still in flight when nobody waits for them any more."""
    if over.is_set():
        raise RuntimeError("the run is over")


def _ask(client: openai.OpenAI, server: Server, request: Request, max_tokens: int) -> tuple[Reply, bool]:
    """A reply, and whether the server was alive to this request. No error carries what the server said: it may quote us."""
    options: dict[str, Any] = dict(model=server.model, max_tokens=max_tokens, temperature=0)
    try:
        if request.prompt is not None:
            chosen = client.completions.create(prompt=request.prompt, **options).choices[0]
            text = chosen.text
        else:
            chosen = client.chat.completions.create(messages=list[Any](request.messages), **options).choices[0]
            text = chosen.message.content
    except openai.APITimeoutError:
        return Reply(None, problem="timed out"), False
    except openai.APIConnectionError:
        return Reply(None, problem="no connection"), False
    except openai.APIStatusError as error:
        if error.status_code in HOPELESS:
            told = f"status {error.status_code}; model {server.model}, key in ${server.key}"
            raise ValueError(f"{server.host} {HOPELESS[error.status_code]} ({told})") from None
        return Reply(None, problem=f"status {error.status_code}"), 400 <= error.status_code < 500 and error.status_code != 429
    except Exception as error:  # nonsense instead of an answer fails anywhere between the parser and us
        return Reply(None, problem=f"not an answer ({type(error).__name__})"), False
    if not isinstance(text, str):
        return Reply(None, problem=f"no text ({chosen.finish_reason})"), True
    return Reply(text, chosen.finish_reason == "length"), True


def respond(server: Server, items: Sequence[Item], name: str, max_new_tokens: int) -> Iterator[Response]:
    """Responses of a served model to items, as they come; a request that failed yields none and can be repeated.

    Raises:   ValueError for items that are ranked by likelihood: servers do not tell it
    """
    if ranked := next((item.id for item in items if item.scoring != "generated"), None):
        raise ValueError(f"the item {ranked} is ranked by likelihood, which a server does not tell; rank it with a local model")
    by_id = {item.id: item for item in items}
    for key, reply in complete(server, (Request(i.id, said(i.turns, i.images)) for i in items), max_new_tokens):
        if reply.text is not None:
            yield Response(key, by_id[key].benchmark, name, reply.text.strip(), reply.truncated)


PATIENCE = 600.0  # seconds until a server has loaded its model; assumed


@contextlib.contextmanager
def served(command: str, folder: Path) -> Iterator[Server]:
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
                yield Server(f"http://127.0.0.1:{port}/v1", str(folder), key="VLSAFE_LOCAL_KEY")
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


def respond_served(command: str, folder: Path, items: Sequence[Item], name: str, max_new_tokens: int) -> list[Response]:
    """Responses of a served checkpoint in the order of the items, all of which are answered in words.

    Raises:   ConnectionAbortedError where some were not answered, or the server is gone
    """
    with served(command, folder) as server:
        given = {response.item: response for response in respond(server, items, name, max_new_tokens)}
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
