"""A hub on loopback, as much of it as its client asks for, and a scale that takes three small things from it."""

import contextlib
import hashlib
import http.server
import io
import json
import os
import re
import threading
import time
import zipfile
from pathlib import Path
from urllib.parse import unquote, urlparse

import official

PIECE = 2**14  # bytes, after each of which a hub with a `pause` waits
COMMIT = "0123456789abcdef0123456789abcdef01234567"
ROOT = Path(__file__).parents[2]


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as its client asks for. `server.faults` are taken one per download."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def answer(self, code, body=b"", **headers):
        self.send_response(code)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        pieces = range(0, len(body), PIECE) if self.command == "GET" else ()
        with contextlib.suppress(ConnectionError):  # clients may be killed meanwhile
            for start in pieces:
                self.wfile.write(body[start : start + PIECE])
                time.sleep(self.server.pause)

    def do_GET(self):
        path = unquote(urlparse(self.path).path)
        self.server.requests.append((self.command, path, self.headers.get("Range"), self.headers.get("Authorization")))
        if found := re.fullmatch(r"/api/(datasets|models)/([^/]+/[^/]+)(?:/revision/(\w+))?(/tree/.*)?", path):
            repo = found[2]
            if repo not in self.server.repos:
                return self.answer(404, X_Error_Code="RepoNotFound")
            files = self.server.repos[repo]
            siblings = [
                {"rfilename": name, "size": len(data), "blobId": "b", **self.lfs(name, data)} for name, data in files.items()
            ]
            if found[4]:
                tree = [{"type": "file", "path": name, "size": len(data), "oid": "b", **self.oid(name, data)}
                        for name, data in files.items()]  # fmt: skip
                return self.answer(200, json.dumps(tree).encode())
            return self.answer(200, json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode())
        if found := re.fullmatch(r"/(?:datasets/)?([^/]+/[^/]+)/resolve/(\w+)/(.+)", path):
            if found[1] in self.server.gated:
                return self.answer(403, X_Error_Code="GatedRepo", X_Error_Message="Access is restricted")
            return self.file(self.server.repos[found[1]][found[3]])
        if path.startswith("/archives/"):
            return self.file(self.server.archives[path.removeprefix("/archives/")])
        return self.answer(404, X_Error_Code="EntryNotFound")

    @staticmethod
    def lfs(name, data):
        digest = hashlib.sha256(data).hexdigest()
        return {"lfs": {"sha256": digest, "size": len(data), "pointerSize": 130}} if not name.endswith(".json") else {}

    def oid(self, name, data):
        entry = self.lfs(name, data)
        return {"lfs": {"oid": entry["lfs"]["sha256"], **entry["lfs"]}} if entry else {}

    def file(self, data):
        digest, start = hashlib.sha256(data).hexdigest(), 0
        code, headers = 200, {"ETag": f'"{digest}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if (ranged := self.headers.get("Range")) and self.command == "GET":
            start = int(re.match(r"bytes=(\d+)-", ranged)[1])
            if start >= len(data):
                return self.answer(416)
            code, headers["Content-Range"] = 206, f"bytes {start}-{len(data) - 1}/{len(data)}"
        body = data[start:]
        fault = self.server.faults.pop(0) if self.command == "GET" and self.server.faults else None
        if fault == "damage":
            body = bytes(len(body))
        if fault != "break":
            return self.answer(code, body, **headers)
        self.send_response(code)
        for name, value in {**headers, "Content-Length": len(body)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2])
        self.wfile.flush()
        self.close_connection = True


@contextlib.contextmanager
def served():
    """A hub without anything."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.repos, server.archives, server.gated, server.faults, server.requests = {}, {}, set(), [], []
    server.pause = 0.0  # seconds
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def packed(names):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, official.picture() * 400)
    return buffer.getvalue()


def address(server, path=""):
    return f"http://127.0.0.1:{server.server_address[1]}{path}"


def filled(server, folder):
    """A YAML scale that takes three small things from the loopback hub and does without the rest."""
    rows = [{"id": "1", "image": "0/a.png", "conversations": official.talk("Say.\n<image>", "a mug")}]
    server.repos["liuhaotian/LLaVA-Pretrain"] = {
        "blip_laion_cc_sbu_558k.json": json.dumps(rows).encode(), "images.zip": packed(["0/a.png"]), "other.txt": b"not wanted",
    }  # fmt: skip
    server.repos["ys-zong/VLGuard"] = {
        "train.json": b"[]",
        "test.json": b"[]",
        "train.zip": packed(["x"]),
        "test.zip": packed(["x"]),
    }
    guard = official.tiny_nsfw(folder / "nsfw", size=32)
    weights = {path.name: path.read_bytes() for path in guard.iterdir()}
    server.repos["Falconsai/nsfw_image_detection"] = weights | {"pytorch_model.bin": b"p"}
    server.archives["vg.zip"] = packed(["VG_100K/1.jpg"])
    said = [{"id": "1", "conversations": official.talk("Name a fruit.", "Plum.")}]
    server.repos["liuhaotian/LLaVA-Instruct-150K"] = {"llava_v1_5_mix665k.json": json.dumps(said).encode()}
    path = folder / "three.yaml"
    path.write_text(
        "extends: paper\nloaded:\n"
        "  captions: {revision: main, gigabytes: 0.00001}\n"
        f"  instructions: {{gigabytes: 0.00001, archives: [[vg/images.zip, '{address(server, '/archives/vg.zip')}']]}}\n"
        "  safety: {gigabytes: 0.00001}\n"
        "  image_guard: {origin: {gigabytes: 0.00001}}\n"
        "  safe_rlhf: null\n  spa_vl: null\n  text_guard: null\n  tower: null\n  gpu_gigabytes: 0\n"
        "  parents: {llama2-chat: {gigabytes: 0.00001}, tulu2: {gigabytes: 0.00001}}\n"
        "  judges: {sorry-bench: {gigabytes: 0}, wildguard: {gigabytes: 0}, llama-guard-3: {gigabytes: 0}}\n"
    )
    return path


def environment(server, home, token="secret-token"):
    """What a process needs to have this hub for the hub, with everything below one folder."""
    return {
        **os.environ, "HF_ENDPOINT": address(server), "HF_HOME": str(home / "home"), "HF_HUB_OFFLINE": "0", "HF_TOKEN": token,
        "VLSAFE_DATA": str(home / "data"), "PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_XET": "1", "OPENAI_API_KEY": "",
    }  # fmt: skip
