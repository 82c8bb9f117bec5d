"""Both hubs as one local HTTP server: lists and serves models as Hugging Face and as ModelScope, and fails on demand.

Weights of the Hugging Face side come from a second address, as from its CDN, so a test sees which headers get there.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

from mooli.hub.transfer import TransferPolicy

COMMIT = "c0ffee" + "0" * 34
LFS = (".safetensors", ".gguf", ".bin")

NAME = "Qwen/Qwen2.5-7B-Instruct"
SHARD = "model-00001-of-00002.safetensors"
SMALL_SHARD = "model-00002-of-00002.safetensors"
WANTED = {
    *("config.json", SHARD, SMALL_SHARD),
    *("model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json", "merges.txt"),
}


FAST = TransferPolicy(timeout_s=5.0, retries=2, first_delay_s=0.0)
HUBS = ("huggingface", "modelscope")

Pull = Callable[..., Path]


def names(folder: Path) -> set[str]:
    """Of the files that a pull has brought."""
    return {path.name for path in folder.iterdir() if path.is_file() and path.name != ".mooli-pull.json"}


def model_files() -> dict[str, bytes]:
    first, second = bytes(range(256)) * 800, bytes(reversed(range(256))) * 300
    index = b'{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}'
    return {
        "config.json": b'{"model_type": "qwen2"}',
        SHARD: first,
        SMALL_SHARD: second,
        "model.safetensors.index.json": index,
        "tokenizer.json": b"{}" * 50,
        "tokenizer_config.json": b'{"a": 1}',
        "merges.txt": b"a b\n",
        "README.md": b"# read me",
        "pytorch_model.bin": b"a pickle",
        "pytorch_model.bin.index.json": b"{}",
        "modeling_qwen.py": b"import os",
        "original/model.safetensors": b"the same again",
        "figures/loss.json": b"{}",
    }


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass(frozen=True)
class Seen:
    """A request as it came. kind: list, file, cdn or other."""

    hub: str
    kind: str
    name: str
    headers: dict[str, str]

    @property
    def range(self) -> str | None:
        return self.headers.get("range")


@dataclass
class HubServer:
    """models[name][path] is the content that is listed. A failure is used up by the request that meets it."""

    models: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refuse: dict[str, tuple[int, str]] = field(default_factory=dict)  # hub or model -> status, X-Error-Code
    cuts: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))  # file -> bytes until each cut
    statuses: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    served: dict[str, bytes] = field(default_factory=dict)  # file -> what comes instead of it
    hold: threading.Event | None = None  # a cut connection stays open until this is set
    no_ranges: bool = False
    no_digests: bool = False
    token: str | None = None
    commit: str = COMMIT
    seen: list[Seen] = field(default_factory=list)

    def __enter__(self) -> HubServer:
        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), self._handler(is_cdn)) for is_cdn in (False, True)]
        self.url, self.cdn = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)
        self._threads = [threading.Thread(target=s.serve_forever, args=(0.02,)) for s in self._servers]
        for server, thread in zip(self._servers, self._threads, strict=True):
            server.daemon_threads = True
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self.hold is not None:
            self.hold.set()
        for server, thread in zip(self._servers, self._threads, strict=True):
            server.shutdown()
            thread.join()
            server.server_close()

    def files_sent(self) -> list[str]:
        return [seen.name for seen in self.seen if seen.kind == "file" and not seen.name.startswith("HEAD ")]

    def _handler(self, is_cdn: bool) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                Answer(hub, self, is_cdn).send()

            do_HEAD = do_GET  # noqa: N815 - http.server's name

            def log_message(self, *args: object) -> None:
                pass

        return Handler


class Answer:
    def __init__(self, hub: HubServer, handler: BaseHTTPRequestHandler, is_cdn: bool) -> None:
        self.hub, self.handler, self.is_cdn = hub, handler, is_cdn
        parts = urlsplit(handler.path)
        self.path = unquote(parts.path)
        self.query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        self.headers = {key.lower(): value for key, value in handler.headers.items()}

    def send(self) -> None:
        parts = self.path.strip("/").split("/")
        if self.is_cdn:
            model, path = "/".join(parts[:2]), "/".join(parts[2:])
            self._see("huggingface", "cdn", path)
            self._file(model, path, {"Content-Type": "binary/octet-stream"})
        elif parts[:3] == ["api", "v1", "models"] and len(parts) >= 6:
            self._modelscope("/".join(parts[3:5]), parts[5:])
        elif parts[:2] == ["api", "models"] and len(parts) >= 4:
            self._hugging_face_list("/".join(parts[2:4]), parts[4:])
        elif "resolve" in parts[2:3]:
            self._hugging_face_file("/".join(parts[:2]), "/".join(parts[4:]))
        else:
            self._see("other", "other", self.path)
            self._json(404, {})

    def _see(self, hub: str, kind: str, name: str) -> None:
        prefix = "HEAD " if self.handler.command == "HEAD" else ""
        self.hub.seen.append(Seen(hub, kind, prefix + name, self.headers))

    def _is_refused(self, hub: str, model: str) -> bool:
        if self.hub.token is not None and self.headers.get("authorization") != f"Bearer {self.hub.token}":
            self._json(401, {"error": "who are you"}, {"X-Error-Code": "RepoNotFound"})
            return True
        status, code = self.hub.refuse.get(hub) or self.hub.refuse.get(model) or (0, "")
        if not status and model not in self.hub.models:
            status, code = 404, "RepoNotFound"
        if status:
            self._json(status, {"Code": 10010205001, "Message": "no", "error": "no"}, {"X-Error-Code": code})
        return bool(status)

    # -- Hugging Face --

    def _hugging_face_list(self, model: str, rest: list[str]) -> None:
        self._see("huggingface", "list", model)
        if self._is_refused("huggingface", model):
            return
        revision = rest[1] if rest[:1] in (["revision"], ["tree"]) else "main"
        if revision not in ("main", "v1", self.hub.commit):
            self._json(404, {"error": "no"}, {"X-Error-Code": "RevisionNotFound"})
            return
        if rest[:1] == ["tree"]:
            self._json(200, [self._tree_entry(*item) for item in self.hub.models[model].items()])
            return
        siblings = []
        for path, content in self.hub.models[model].items():
            entry = {"rfilename": path, "size": len(content), "blobId": git_blob(content)}
            if path.endswith(LFS):
                entry["lfs"] = {"sha256": sha256(content), "size": len(content), "pointerSize": 134}
            siblings.append(entry)
        self._json(200, {"id": model, "modelId": model, "sha": self.hub.commit, "siblings": siblings})

    def _tree_entry(self, path: str, content: bytes) -> dict[str, object]:
        entry: dict[str, object] = {"type": "file", "path": path, "size": len(content), "oid": git_blob(content)}
        if path.endswith(LFS):
            entry["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 134}
        return entry

    def _hugging_face_file(self, model: str, path: str) -> None:
        self._see("huggingface", "file", path)
        if self._is_refused("huggingface", model) or self._failed(path):
            return
        content = self.hub.models[model].get(path)
        if content is None:
            self._json(404, {"error": "no"}, {"X-Error-Code": "EntryNotFound"})
            return
        headers = {"X-Repo-Commit": self.hub.commit}
        if not path.endswith(LFS):
            self._file(model, path, {**headers, "ETag": f'"{git_blob(content)}"'})
            return
        linked = {"X-Linked-Size": str(len(content)), "X-Linked-Etag": f'"{sha256(content)}"'}
        self._json(302, {}, {**headers, **linked, "Location": f"{self.hub.cdn}/{model}/{quote(path)}?signature=secret"})

    # -- ModelScope --

    def _modelscope(self, model: str, rest: list[str]) -> None:
        if rest == ["repo", "files"]:
            self._see("modelscope", "list", model)
            if self._is_refused("modelscope", model):
                return
            if self.query.get("Revision") not in ("master", "v1"):
                self._json(404, {"Code": 404, "Message": "no such revision"})
                return
            files = [{"Path": "figures", "Name": "figures", "Type": "tree", "Size": 0, "Sha256": ""}]
            for path, content in self.hub.models[model].items():
                digest = "" if self.hub.no_digests else sha256(content)
                entry = {"Path": path, "Name": path.rsplit("/", 1)[-1], "Type": "blob", "Revision": self.hub.commit}
                files.append({**entry, "Size": len(content), "Sha256": digest, "IsLFS": path.endswith(LFS)})
            self._json(200, {"Code": 200, "Success": True, "Data": {"Files": files}})
        elif rest == ["repo"]:
            path = self.query["FilePath"]
            self._see("modelscope", "file", path)
            if not self._is_refused("modelscope", model) and not self._failed(path):
                self._file(model, path, {"Content-Type": "application/octet-stream"})
        else:
            self._see("modelscope", "other", self.path)
            self._json(404, {"Code": 404, "Message": "not here", "Success": False})

    # -- answers --

    def _failed(self, path: str) -> bool:
        if self.handler.command == "HEAD" or not self.hub.statuses[path]:
            return False
        self._json(self.hub.statuses[path].pop(0), {})
        return True

    def _file(self, model: str, path: str, headers: dict[str, str]) -> None:
        content = self.hub.served.get(path, self.hub.models[model].get(path))
        if content is None:
            self._json(404, {"Code": 404, "Message": "no such file"})
            return
        status, begin = 200, 0
        given = self.headers.get("range")
        if given and not self.hub.no_ranges:
            first, _, last = given.removeprefix("bytes=").partition("-")
            status, begin, end = 206, int(first), int(last) + 1 if last else len(content)
            headers = {**headers, "Content-Range": f"bytes {begin}-{end - 1}/{len(content)}"}
            content = content[begin:end]
        self.handler.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content)), "Accept-Ranges": "bytes"}.items():
            self.handler.send_header(key, value)
        self.handler.end_headers()
        if self.handler.command == "HEAD":
            return
        if self.hub.cuts[path]:
            self.handler.wfile.write(content[: self.hub.cuts[path].pop(0)])
            self.handler.wfile.flush()
            if self.hub.hold is not None:
                self.hub.hold.wait(20)
            self.handler.close_connection = True
            return
        self.handler.wfile.write(content)

    def _json(self, status: int, value: object, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(value).encode()
        self.handler.send_response(status)
        for key, text in {**(headers or {}), "Content-Type": "application/json"}.items():
            self.handler.send_header(key, text)
        self.handler.send_header("Content-Length", str(len(body)))
        self.handler.end_headers()
        if self.handler.command != "HEAD":
            self.handler.wfile.write(body)
