"""A tiny scale that loads: official-shaped folders with invented harmless rows, random tiny models in hub layout, as a YAML file.

`python -m loaded FOLDER` (with `tests` on the path) writes it for a run outside pytest.
"""

import argparse
import contextlib
import hashlib
import json
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import official
import official_files
import yaml
from conftest import NANO
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from vlsafe.core import assets
from vlsafe.core.presets import PAPER
from vlsafe.core.scale import as_plain
from vlsafe.data.miniature.language import vocabulary
from vlsafe.data.sources import CORPORA
from vlsafe.models import chat, checkpoints

PARENTS = {"tiny-a": "llama2", "tiny-b": "tulu"}  # and its chat template
STRINGS = "xstest-strings"
JUDGES = {  # those of the headline first
    "sorry_bench": ["sorry-bench", STRINGS], "wildjailbreak": ["wildguard", "wildguard-refusal", STRINGS],
    "mm_safetybench": ["mm-safetybench-criteria", "llama-guard-3", STRINGS], "siuo": ["llama-guard-3", STRINGS],
    "figstep": ["llama-guard-3", STRINGS], "vlguard": ["llama-guard-3", "vlguard-strings"], "xstest": [STRINGS],
    "mmbench": ["letters"], "mme": ["mme-yes-no"], "seed_bench": ["seed-letter"],
}  # fmt: skip
WEIGHTS = {"llama-guard-3": "llama-guard", "wildguard": "wildguard", "sorry-bench": "sorry-judge"}


def models(home):
    """Parents, tower, guards and judges as folders in the hub's layout."""
    spec = NANO.vision
    tokenizer = chat.build_tokenizer(vocabulary(), NANO.language.context)
    for seed, name in enumerate(PARENTS):
        checkpoints.save(checkpoints.build_llm(NANO.language, tokenizer, seed), home / name, tokenizer)
    checkpoints.save(checkpoints.build_clip(spec, tokenizer, 0), home / "tower")
    side = {"height": spec.image_size, "width": spec.image_size}
    CLIPImageProcessorPil(size={"shortest_edge": spec.image_size}, crop_size=side).save_pretrained(home / "tower")
    official.tiny_llama_guard(home / "llama-guard")
    official.tiny_wildguard(home / "wildguard")
    official.tiny_sorry_judge(home / "sorry-judge")
    official.tiny_nsfw(home / "nsfw")


def _origin(path, kind="model"):
    return {"repo": str(path), "revision": "main", "kind": kind, "files": [], "gigabytes": 0.0, "terms": None}


def scale(home, endpoint):
    """The scale file's content: the paper's graph with NANO's numbers."""
    plain = as_plain(NANO)
    grouped = {"steps": 2, "grouped": True, "at_once": 2, "saved": "bfloat16", "launch": "", "micro_batches": 1}
    grouped |= {"max_length": None, "rows": None}
    fits = {name: plain[name] | grouped for name in ("projector", "instruct")}
    tuning = plain["tuning"] | {"sft": plain["tuning"]["sft"] | grouped, "pairs": 4}
    tuning["preference"]["fit"] |= {"launch": "", "saved": "bfloat16", "at_once": 1, "grouped": True}
    tuning["rollout"]["fit"] |= {"launch": ""}
    tuning["rollout"] |= {"reward": "overlap"}
    loaded = {name: {"rows": None, "gigabytes": 0.0} for name in CORPORA}
    loaded |= {
        "text_guard": {"origin": _origin(home / "llama-guard")}, "tower": _origin(home / "tower"), "missing_share": 0.2,
        "image_guard": {"origin": _origin(home / "nsfw"), "labels": ["nsfw"]}, "gpu_gigabytes": 0.0,
        "parents": dict.fromkeys(PAPER.loaded.parents) | {name: _origin(home / name) for name in PARENTS},
        "judges": dict.fromkeys(PAPER.loaded.judges) | {name: _origin(home / folder) for name, folder in WEIGHTS.items()},
    }  # fmt: skip
    backbones = dict.fromkeys(PAPER.backbones) | {
        name: {"extends": "llama2-chat", "template": template} for name, template in PARENTS.items()
    }
    exam = plain["exam"] | {
        "judges": JUDGES, "validation": 0.5, "dtype": "float32", "full": 1000,
        "endpoints": {"mm-safetybench-criteria": {"address": endpoint, "model": "scripted"}},
    }  # fmt: skip
    return {
        "extends": "paper", "loaded": loaded, "backbones": backbones, "exam": exam, "tuning": tuning, "threads": 1,
        "device": "cpu",
        "vision": plain["vision"] | {"pad": True}, **fits, **{name: plain[name] for name in PLAIN},
    }  # fmt: skip


PLAIN = ("language", "search", "probing", "merging", "checkpoints", "arm_checkpoints", "lora")


def larger(data, n=12):
    """More requests than the fixtures of single loaders have, so that a validation part and folds can be made of them."""
    kinds = [("adversarial_harmful", 1, "describe the gull"), ("adversarial_benign", 0, "describe the tern")]
    rows = [f'"You are a poet, {text} number {i}."\t{label}\t{kind}\n' for kind, label, text in kinds for i in range(n)]
    table = "adversarial\tlabel\tdata_type\n" + "".join(rows)
    official_files.write(data / "wildjailbreak" / "eval" / "eval.tsv", table)
    exchanges = [{"safe_instruction": "What colour is it?", "response": "Blue."}]
    exchanges.append({"unsafe_instruction": "A request.", "response": "No."})
    rows = [{"id": f"more_{i}", "image": f"more/{i}.png", "safe": True, "instr-resp": exchanges} for i in range(n)]
    path = data / "VLGuard" / "test.json"
    official_files.write(path, json.dumps(json.loads(path.read_text()) + rows))
    for i, row in enumerate(rows):
        official_files.write(data / "VLGuard" / "test" / row["image"], official_files.picture((20 * i, 40, 40)))


def written(home, endpoint="http://127.0.0.1:9/v1"):
    """Write everything below a folder; the path of the scale file, whose corpora and benchmarks lie in `data` beside it."""
    home = Path(home)
    official_files.everything(official.corpora(home / "data"))
    larger(home / "data")
    models(home / "hub")
    path = home / "tiny.yaml"
    path.write_text(yaml.safe_dump(scale(home / "hub", endpoint), sort_keys=False), encoding="utf-8")
    return path


class Scripted(BaseHTTPRequestHandler):
    """An OpenAI-compatible judge: its verdict depends on nothing but the text; the server keeps the requests."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        text = json.dumps(body["messages"])
        self.server.requests.append(text)
        time.sleep(self.server.seconds)
        content = ("safe", "unsafe")[hashlib.sha256(text.encode()).digest()[0] % 2]
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}
        reply = {"id": "x", "object": "chat.completion", "created": 0, "model": body["model"], "choices": [choice]}
        data = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def endpoint(seconds=0.0):
    """A scripted judge at a port of this machine that takes so many seconds; its address, and what it was asked."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Scripted)
    server.requests, server.daemon_threads, server.seconds = [], True, seconds
    server.handle_error = lambda *_: None  # clients may be killed
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", server.requests
    server.shutdown()
    server.server_close()


def opened(path):
    """Let this process find the files of a scale that `written` wrote."""
    os.environ["VLSAFE_DATA"] = str(Path(path).parent / "data")
    assets._archive.cache_clear()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--endpoint", default="http://127.0.0.1:9/v1")
    arguments = parser.parse_args()
    print(written(arguments.folder, arguments.endpoint))
