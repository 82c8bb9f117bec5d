"""Programs over HTTP: on a server that runs somewhere, or on one that is started for them.

Owns requests to /generate, /tokenize and /detokenize as Mooli and SGLang serve them. Never knows programs.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import ssl
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from mooli.errors import ConfigError, EngineError, RequestError

PATIENCE_S = 600.0
"""Without a byte from the server."""

_MAX_ERROR_CHARS = 1000

_READY = "The server is fired up and ready to roll!"


class RuntimeEndpoint:
    """A server at a URL. Messages become text by its chat template.

    api_key: sent as a bearer token. verify: a file with certificates to trust, or False to trust any.
    chat_template_name: accepted, and of no use: the server's own is taken. patience_s: without a byte from the server.

    Raises ConfigError for a URL that is none.
    """

    keeps_ids = False

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        verify: str | bool | None = None,
        chat_template_name: str | None = None,
        *,
        patience_s: float = PATIENCE_S,
    ) -> None:
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"base_url={base_url!r} is no address of a server, such as http://127.0.0.1:30000")
        self.base_url = base_url.rstrip("/")
        self._patience_s = patience_s
        self._parts = parts
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._context: ssl.SSLContext | None = None
        if parts.scheme == "https":
            self._context = ssl.create_default_context(cafile=verify if isinstance(verify, str) else None)
            if verify is False:
                self._context.check_hostname = False
                self._context.verify_mode = ssl.CERT_NONE

    def encode(self, text: str, *, begins: bool, has_special: bool) -> list[int]:
        ids: list[int] = self._json("/tokenize", {"prompt": text, "add_special_tokens": begins})["tokens"]
        return ids

    def encode_chat(self, messages: Sequence[Mapping[str, str]], *, is_open: bool, goes_on: bool = True) -> list[int]:
        body = {
            "messages": list(messages),
            "add_generation_prompt": goes_on and not is_open,
            "continue_final_message": is_open,
        }
        ids: list[int] = self._json("/tokenize", body)["tokens"]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._json("/detokenize", {"tokens": list(ids), "skip_special_tokens": False})["text"]
        return text

    def start(
        self, input_ids: list[int] | list[list[int]], sampling_params: Mapping[str, Any], **arguments: Any
    ) -> HttpChunks:
        body = {"input_ids": input_ids, "sampling_params": dict(sampling_params), "stream": True, **arguments}
        return HttpChunks(*self._send("POST", "/generate", body), of_generate=True)

    def get(self, path: str) -> dict[str, Any]:
        """The JSON that a route answers."""
        return self._json(path, None)

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The JSON that a route answers to `body`."""
        return self._json(path, body)

    def stream(self, path: str, body: Mapping[str, Any]) -> HttpChunks:
        """The events with which a route answers `body`."""
        return HttpChunks(*self._send("POST", path, body), of_generate=False)

    def flush_cache(self) -> None:
        with contextlib.closing(self._send("POST", "/flush_cache", {})[0]):
            return

    def get_server_info(self) -> dict[str, Any]:
        return self._json("/server_info", None)

    def _json(self, path: str, body: Mapping[str, Any] | None) -> dict[str, Any]:
        connection, response = self._send("GET" if body is None else "POST", path, body)
        with contextlib.closing(connection):
            answer: dict[str, Any] = json.loads(response.read())
        return answer

    def _send(
        self, method: str, path: str, body: Mapping[str, Any] | None
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        """Raises RequestError for what the server refuses, EngineError for what it cannot do or if it is not there."""
        parts = self._parts
        host = parts.hostname or ""
        connection = (
            http.client.HTTPConnection(host, parts.port, timeout=self._patience_s)
            if self._context is None
            else http.client.HTTPSConnection(host, parts.port, timeout=self._patience_s, context=self._context)
        )
        try:
            data = None if body is None else json.dumps(body).encode()
            connection.request(method, parts.path.rstrip("/") + path, data, self._headers)
            response = connection.getresponse()
            if response.status >= 400:
                said = _words(response.read(1 << 16))
                kind = RequestError if response.status < 500 else EngineError
                raise kind(f"{self.base_url}{path} answers {response.status}: {said}")
        except (OSError, http.client.HTTPException) as exc:
            connection.close()
            raise EngineError(f"{self.base_url}{path} cannot be reached: {exc or type(exc).__name__}") from exc
        except BaseException:
            connection.close()
            raise
        return connection, response


class HttpChunks:
    """Events of a stream. Closing it ends the connection, and so the requests.

    of_generate: of /generate, whose every event has meta_info: one without it is the error that ends the answer.
    """

    def __init__(
        self, connection: http.client.HTTPConnection, response: http.client.HTTPResponse, *, of_generate: bool
    ) -> None:
        self._read_event = _event if of_generate else json.loads
        self._connection = connection
        self._response = response
        self._socket = connection.sock
        self._is_closed = False

    def __iter__(self) -> Iterator[dict[str, Any]]:
        try:
            for line in self._response:
                if line.startswith(b"data:"):
                    data = line[5:].strip()
                    if data == b"[DONE]":
                        return
                    yield self._read_event(data)
            if not self._is_closed:
                raise EngineError("the server ended its answer in the middle")
        except (OSError, ValueError, AttributeError, http.client.HTTPException) as exc:
            if not self._is_closed:  # what a socket raises that another thread closes is of many kinds
                raise EngineError(f"the answer broke off: {exc or type(exc).__name__}") from exc
        finally:
            self._connection.close()
            self._response.close()

    def close(self) -> None:
        self._is_closed = True
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)  # which wakes the thread that reads


class Runtime:
    """A server of its own, in processes of its own, on this machine.

    Keywords are flags of the server (`model_path`, `port`, …); without a port, a free one is taken.
    launch_timeout: seconds until it must be ready. As a context manager it is shut down at the end; one that is
    collected, or whose process ends, is too.

    Raises ConfigError for a keyword that is no flag, EngineError with what the server said if it does not start.
    """

    def __init__(self, *, launch_timeout: float = 300.0, **server_args: Any) -> None:
        flags = _flags({"port": 0, **server_args})
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mooli.launch_server", *flags],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._finalizer = weakref.finalize(self, _end, self._process)
        self._lines: list[str] = []
        ready = threading.Event()
        threading.Thread(target=_read, args=(self._process, self._lines, ready), daemon=True).start()
        deadline = time.monotonic() + launch_timeout
        try:
            while not ready.wait(0.1):
                if time.monotonic() > deadline:
                    raise EngineError(f"the server is not ready after {launch_timeout:g} s:\n{self._last_lines()}")
            if self._process.poll() is not None or not self._url():
                raise EngineError(f"the server has not started:\n{self._last_lines()}")
        except BaseException:
            self.shutdown()
            raise
        self.url = self._url()
        api_key = server_args.get("api_key")
        self.endpoint = RuntimeEndpoint(self.url, api_key if isinstance(api_key, str) else None)

    def generate(self, prompt: str | list[str], sampling_params: Mapping[str, Any] | None = None, **fields: Any) -> str:
        """The answer of /generate as JSON, as SGLang's `Runtime` returns it. fields: more of the body."""
        body = {"text": prompt, "sampling_params": dict(sampling_params or {}), **fields}
        return json.dumps(self.endpoint._json("/generate", body))

    def shutdown(self) -> None:
        """End the server. May be called again."""
        self._finalizer()

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def _url(self) -> str:
        return next((line.rpartition(" ")[2] for line in self._lines if "listening on" in line), "")

    def _last_lines(self) -> str:
        return "\n".join(self._lines[-20:])


def _read(process: subprocess.Popen[str], lines: list[str], ready: threading.Event) -> None:
    """Keep the server's first lines, and read all, so that it never waits for a reader."""
    assert process.stderr is not None
    with process.stderr as stream:
        for line in stream:
            if not ready.is_set():
                lines.append(line.rstrip("\n"))
            if _READY in line:
                ready.set()
    process.wait()
    ready.set()


def _end(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _flags(arguments: Mapping[str, Any]) -> list[str]:
    """Flags of a command line."""
    flags = []
    for name, value in arguments.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            flags.append(flag)
        elif isinstance(value, (list, tuple)):
            flags += [flag, *map(str, value)]
        elif value is not None and value is not False:
            flags += [flag, json.dumps(value) if isinstance(value, Mapping) else str(value)]
    return flags


def _event(data: bytes) -> dict[str, Any]:
    event: dict[str, Any] = json.loads(data)
    if "meta_info" not in event:
        raise EngineError(f"the server ended its answer: {_words(data)}")
    return event


def _words(data: bytes) -> str:
    """The message of an error, or what there is."""
    text = data.decode("utf-8", "replace")
    try:
        error = json.loads(text)
        error = error.get("error", error)
        return str(error.get("message", error))[:_MAX_ERROR_CHARS]
    except (ValueError, AttributeError):
        return text[:_MAX_ERROR_CHARS]
