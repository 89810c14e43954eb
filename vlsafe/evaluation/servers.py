"""OpenAI-compatible servers: a client that engines and judges share, and a local server started for a checkpoint.

A request that a server does not answer comes back with the reason and is never replaced. The client library waits and tries
again where a server is busy or limits rates, for as long as the server itself asks. Keys are named by the environment variable
that holds them, and neither keys nor prompts nor responses reach a log or an error.

A local server runs in whatever environment its command names (vLLM needs one of its own, env/vllm.txt), bound to this machine.
Which engine answers is a field of the examination, so one engine answers all runs of a scale.
"""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import os
import re
import shlex
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import numpy as np
import openai
import pandas as pd

from vlsafe.analysis import clustered
from vlsafe.core.schema import Item, Picture, Response, Turn

if TYPE_CHECKING:
    from vlsafe.evaluation.engines import Kept  # imports torch, which the client does not need

LOGGERS = ("openai", "httpx", "httpcore", "httpx2", "httpcore2")
HOPELESS = {401: "refuses the key", 403: "forbids it", 404: "knows neither this model nor this path"}
PATIENCE = 600.0  # seconds until a local server has loaded its model; assumed
Key = TypeVar("Key", bound=Hashable)
Prompt = str | Sequence[dict[str, Any]]  # raw text that the server continues, or chat messages


@dataclass(frozen=True)
class Server:
    """Where a model is served, and how patient the client is.

    `key` names an environment variable. After `patience` failures in a row, with no answer in between, the server counts as gone.

    Units:    `timeout` seconds for one answer; `retries` repetitions of one request; `parallel` requests in flight
    """

    url: str
    model: str
    key: str = "OPENAI_API_KEY"
    timeout: float = 120.0
    retries: int = 4
    parallel: int = 8
    patience: int = 16

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            good = parts.scheme in ("http", "https") and parts.hostname and (parts.port or True)
        except ValueError:  # a port that is no number
            good = False
        if not good:
            raise ValueError("a server's address is such as http://127.0.0.1:8000/v1; one that was given is not")

    @property
    def host(self) -> str:
        """The address without path, user or password: what may be printed."""
        url = urlsplit(self.url)
        return f"{url.hostname}:{url.port}" if url.port else str(url.hostname)


class Reply(NamedTuple):
    """What came back. `text` None: nothing did, and `problem` says why, `words` in the server's own words."""

    text: str | None
    truncated: bool = False
    problem: str = ""
    words: str = ""


class Rejected(ValueError):
    """A server refuses every request for one and the same reason, `problem`: the requests are wrong for it."""

    def __init__(self, host: str, reply: Reply) -> None:
        said = f": {reply.words}" if reply.words else ""
        super().__init__(f"{host} refuses every request ({reply.problem}){said}")
        self.problem = reply.problem


def picture_url(data: bytes) -> str:
    """A picture file as an address that holds it."""
    kind = "png" if data.startswith(b"\x89PNG") else "webp" if data[8:12] == b"WEBP" else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def chat_messages(turns: Sequence[Turn], images: Sequence[Picture]) -> list[dict[str, Any]]:
    """Messages of the chat API; pictures go before the text of the first user turn, as data."""
    pictures = [{"type": "image_url", "image_url": {"url": picture_url(bytes(image))}} for image in images]
    messages: list[dict[str, Any]] = [{"role": turn.role, "content": turn.text} for turn in turns]
    first = next((message for message in messages if message["role"] == "user"), None)
    if first and pictures:
        first["content"] = [*pictures, {"type": "text", "text": first["content"]}]
    return messages


def complete(server: Server, requests: Iterable[tuple[Key, Prompt]], max_tokens: int) -> Iterator[tuple[Key, Reply]]:
    """Greedy replies as they come, in no order; every request comes back exactly once unless the server is gone.

    Raises:   ValueError where another try is useless (key, model or address are wrong)
              ConnectionAbortedError where the server fails `patience` times in a row; what was yielded before is not lost
              Rejected where it refuses the first `patience` requests, or all there are, for one reason
    """
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)  # at DEBUG they write the prompts
    over = Event()

    def stop_retrying(_: Any) -> None:
        if over.is_set():  # nobody waits for the requests that are still in flight
            raise RuntimeError("the run is over")

    client = openai.OpenAI(
        base_url=server.url, api_key=os.environ.get(server.key) or "none", timeout=server.timeout, max_retries=server.retries,
        http_client=openai.DefaultHttpxClient(event_hooks={"request": [stop_retrying]}),
    )  # fmt: skip
    waiting, answered, failed, refused = iter(requests), 0, 0, Counter[str]()
    limit = ["max_tokens", max_tokens]
    in_flight: dict[Future[tuple[Reply, bool]], Key] = {}
    last = Reply(None)  # that the server has refused
    with client, ThreadPoolExecutor(server.parallel) as pool:

        def submit(n: int) -> None:
            for key, prompt in islice(waiting, n):
                in_flight[pool.submit(_send, client, server, prompt, limit)] = key

        try:
            submit(server.parallel)
            while in_flight:
                done = wait(in_flight, return_when=FIRST_COMPLETED).done
                for future in done:
                    key, (reply, alive) = in_flight.pop(future), future.result()
                    answered, failed = answered + (reply.text is not None), 0 if alive else failed + 1
                    refused[reply.problem] += bool(reply.words)
                    last = reply if reply.words else last
                    yield key, reply
                    if not answered and len(+refused) == 1 and refused[reply.problem] >= server.patience:
                        raise Rejected(server.host, reply)
                submit(len(done))
                if not (in_flight or answered or failed) and len(+refused) == 1:
                    raise Rejected(server.host, last)
                if failed >= server.patience or (failed and not in_flight and not answered):
                    raise ConnectionAbortedError(
                        f"{server.host} failed {failed} times in a row ({reply.problem}); {answered} answers came and are kept: "
                        "run the same command again to go on from there"
                    )
        finally:
            over.set()


def _send(client: openai.OpenAI, server: Server, prompt: Prompt, limit: list[Any]) -> tuple[Reply, bool]:
    """A reply, and whether the server was alive to this request. `limit`: what the bound on tokens is called, and the bound; a
    server that knows it by its newer name alone is asked by that from then on."""
    reply, alive = _sent(client, server, prompt, dict([limit]))
    if limit[0] == "max_tokens" and "max_tokens" in reply.words and not isinstance(prompt, str):
        newer = ["max_completion_tokens", limit[1]]
        reply, alive = _sent(client, server, prompt, dict([newer]))
        if reply.text is not None:
            limit[:] = newer
    return reply, alive


def _sent(client: openai.OpenAI, server: Server, prompt: Prompt, bound: dict[str, int]) -> tuple[Reply, bool]:
    options: dict[str, Any] = dict(model=server.model, temperature=0, **bound)
    try:
        if isinstance(prompt, str):
            choice = client.completions.create(prompt=prompt, **options).choices[0]
            text = choice.text
        else:
            choice = client.chat.completions.create(messages=list[Any](prompt), **options).choices[0]
            text = choice.message.content
    except openai.APITimeoutError:
        return Reply(None, problem="timed out"), False
    except openai.APIConnectionError:
        return Reply(None, problem="no connection"), False
    except openai.APIStatusError as error:
        if error.status_code in HOPELESS:
            reason = f"status {error.status_code}; model {server.model}, key in ${server.key}"
            raise ValueError(f"{server.host} {HOPELESS[error.status_code]} ({reason})") from None
        lives = 400 <= error.status_code < 500 and error.status_code != 429
        return Reply(None, problem=f"status {error.status_code}", words=_words(error, server, prompt) if lives else ""), lives
    except Exception as error:  # nonsense instead of an answer fails anywhere between the parser and us
        return Reply(None, problem=f"not an answer ({type(error).__name__})"), False
    if not isinstance(text, str):
        return Reply(None, problem=f"no text ({choice.finish_reason})"), True
    if re.search("[\ud800-\udfff]", text):
        return Reply(None, problem="half a character"), True
    return Reply(text, choice.finish_reason == "length"), True


def _words(error: openai.APIStatusError, server: Server, prompt: Prompt) -> str:
    """What a server says of a request that it refuses, unless it quotes three words of the request or the key."""
    said = error.body.get("message", error.body) if isinstance(error.body, dict) else error.body
    words, key = str(said or "no reason is given").split(), os.environ.get(server.key)
    request = " ".join((prompt if isinstance(prompt, str) else json.dumps(list(prompt), ensure_ascii=False)).split())
    runs = (" ".join(words[i : i + 3]) for i in range(max(1, len(words) - 2)))
    if any(run in request for run in runs) or (key and key in " ".join(words)):
        return "its words quote the request, so they are not shown"
    return " ".join(words)[:300]


def respond(server: Server, items: Sequence[Item], name: str, max_new_tokens: int) -> Iterator[Response]:
    """Responses of a served model to items, as they come; a request that failed yields none and can be repeated.

    Raises:   ValueError for items that are ranked by likelihood: servers do not return it
    """
    if ranked := next((item.id for item in items if item.scoring != "generated"), None):
        raise ValueError(f"the item {ranked} is ranked by likelihood, which a server does not return; rank it with a local model")
    requests = ((item, chat_messages(item.turns, item.images)) for item in items)
    for item, reply in complete(server, requests, max_new_tokens):
        if reply.text is not None:
            yield Response(item.id, item.benchmark, name, reply.text.strip(), reply.truncated)


# ---- a local server


@contextlib.contextmanager
def serve(command: str, folder: Path) -> Iterator[Server]:
    """A server of the model in a folder, for as long as the block lasts. `{folder}` and `{port}` of the command are filled in;
    an address in place of a command is one that runs already, asked for the model after `#`, or else for the first it names.

    Raises:   ChildProcessError with the end of the server's log when it exits before it answers; TimeoutError after `PATIENCE`;
              ConnectionAbortedError where nobody answers at the address
    """
    if command.startswith(("http://", "https://")):
        address, _, model = command.partition("#")
        yield Server(address, model or _first_model(address))
        return
    from vlsafe.training import processes  # imports torch, which the client does not need

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = [part.replace("{folder}", str(folder)).replace("{port}", str(port)) for part in shlex.split(command)]
    with tempfile.TemporaryFile("w+") as log:  # noqa: SIM117  (the log outlives the server)
        with subprocess.Popen(line, stdout=log, stderr=log, preexec_fn=processes.die_with_parent) as running:
            try:
                _wait(running, port, log)
                yield Server(f"http://127.0.0.1:{port}/v1", str(folder), key="VLSAFE_LOCAL_KEY")
            finally:
                running.terminate()


def _first_model(address: str) -> str:
    server = Server(address, "")
    try:
        with openai.OpenAI(base_url=address, api_key=os.environ.get(server.key) or "none", max_retries=1) as client:
            return client.models.list().data[0].id
    except (openai.OpenAIError, IndexError) as error:
        raise ConnectionAbortedError(f"{server.host} does not say which models it serves ({type(error).__name__})") from None


def _wait(running: subprocess.Popen, port: int, log: Any) -> None:
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        if running.poll() is not None:
            log.seek(0)
            raise ChildProcessError(f"the server ended with code {running.returncode}: {log.read()[-500:]}")
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
        except urllib.error.HTTPError as error:
            return error.close()  # it listens, and knows no such page
        except OSError:
            time.sleep(0.5)
    raise TimeoutError(f"the server has not answered within {PATIENCE:.0f} seconds")


def serve_and_respond(
    command: str, folder: Path, items: Sequence[Item], name: str, max_new_tokens: int, kept: Kept
) -> list[Response]:
    """Start a server of a checkpoint, and return its responses in the order of the items, none of which may be ranked. What is
    `kept` is not requested again.

    Raises:   ConnectionAbortedError where some were not answered, or the server is gone
    """
    waiting = [item for item in items if item.id not in kept.texts]
    with serve(command, folder) if waiting else contextlib.nullcontext() as server:
        for response in respond(server, waiting, name, max_new_tokens) if server else ():
            kept.add({response.item: (response.text, response.truncated, response.refusal)})
    if missing := [item.id for item in items if item.id not in kept.texts]:
        raise ConnectionAbortedError(f"{len(missing)} of {len(items)} requests failed, first {missing[0]}; run it again")
    return [Response(item.id, item.benchmark, name, *kept.texts[item.id]) for item in items]


def agreement(
    rows: Mapping[str, Sequence[Mapping[str, Any]]], responses: Mapping[str, Sequence[Response]], draws: int = 2000
) -> list[dict[str, Any]]:
    """How far two engines agree: share of equal texts, and the difference of every judge's events with its interval.

    `rows` are raw rows and `responses` the texts, each by engine, of the same items in the same order.

    Raises:   ValueError where the engines answered different items
    """
    (one, first), (other, second) = responses.items()
    if [response.item for response in first] != [response.item for response in second]:
        raise ValueError(f"{one} and {other} answered different items")
    equal = [x.text == y.text for x, y in zip(first, second, strict=True)]
    lines: list[dict[str, Any]] = [{"what": "equal texts", "n": len(first), "share": float(np.mean(equal))}]
    paired = pd.DataFrame(rows[one]).assign(other=[row["event"] for row in rows[other]]).dropna(subset=["event", "other"])
    for kind, pairs in paired.groupby(["benchmark", "judge"], sort=False):
        left, right = (pairs[side].to_numpy(float) for side in ("event", "other"))
        change = clustered.paired_difference(left, right, pairs["cluster"].astype(str).tolist(), np.random.default_rng(0), draws)
        lines.append({"what": " ".join(kind), "n": len(pairs), "share": float((left == right).mean()), "change": change})
    return lines
