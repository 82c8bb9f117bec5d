"""A server that answers at once, over a real socket and from a thread of its own, for commands as users run them."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[int, dict[str, Any]], "tuple[int, Any] | None"]


class PlainServer:
    """Answers /generate at once, with three pieces. answer: (number of the request, body) -> an error, or None.

    bodies: of the generations asked for; keys: the Authorization of each; num_flushes: how often the cache was emptied.
    """

    def __init__(self, answer: Answer) -> None:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None: ...

            def do_GET(self) -> None:
                known = {"/v1/models": {"data": [{"id": "plain"}]}, "/get_server_info": {"version": "0.0.1"}}
                self._json(200 if self.path in known else 404, known.get(self.path, {}))

            def do_POST(self) -> None:
                sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if self.path.startswith("/flush_cache"):
                    outer.num_flushes += 1
                    self._json(200, {})
                    return
                body = json.loads(sent)
                with outer.lock:
                    number, outer.count = outer.count, outer.count + 1
                    outer.bodies.append(body)
                outer.keys.append(self.headers.get("Authorization"))
                error = answer(number, body)
                if error is not None:
                    self._json(*error)
                    return
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.end_headers()
                for i in range(1, 4):
                    meta = {"completion_tokens": i, "prompt_tokens": 9, "cached_tokens": 0, "finish_reason": None}
                    piece = {"text": "abc"[:i], "meta_info": meta}
                    self.wfile.write(b"data: " + json.dumps(piece).encode() + b"\n\n")
                self.wfile.write(b"data: [DONE]\n\n")

            def _json(self, status: int, body: Any) -> None:
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        self.count = self.num_flushes = 0
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.port = self._http.server_address[1]
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()
