"""A server whose answers and times are written down beforehand, and what the tests of the client share.

`ScriptedServer` lives in the event loop of the client and keeps the client's clock: it writes a piece, sets the clock
to the piece's time, and goes on only when the client has looked at the clock. Nothing sleeps, so a busy machine changes
no number.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from mooli.bench.arguments import BenchOptions, parse_arguments
from mooli.bench.serving import Measurement, measure
from mooli.frontend.tokenizer import Tokenizer, load_tokenizer

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "


def tokenizer_folder(folder: Path, *, chat_template: str | None = TEMPLATE) -> Path:
    """A tokenizer whose ids are bytes in `folder`; 256 ends a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<eos>", special=True, normalized=False)])
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<eos>", **({"chat_template": chat_template} if chat_template else {})}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def byte_tokenizer(folder: Path, **options: Any) -> Tokenizer:
    return load_tokenizer(tokenizer_folder(folder, **options))


@dataclass
class Script:
    """One answer. pieces: (seconds after the one before, text, tokens); end_s: from the last piece to the end mark.

    status and body: of an answer that is an error. breaks_off: the connection is cut after the pieces.
    error_event: sent after the pieces instead of the end.
    """

    pieces: list[tuple[float, str, int]] = field(default_factory=list)
    end_s: float = 0.0
    prompt_tokens: int = 10
    cached_tokens: int | None = None
    counts_tokens: bool = True
    status: int = 200
    body: Any = None
    breaks_off: bool = False
    error_event: Any = None

    @property
    def num_tokens(self) -> int:
        return sum(tokens for _, _, tokens in self.pieces)


class VirtualClock:
    def __init__(self) -> None:
        self.now_s = 1000.0
        self.num_looks = 0

    def __call__(self) -> float:
        self.num_looks += 1
        return self.now_s


class ScriptedServer:
    """scripts: one to a request, in the order requests come. concurrency: how many are open at once at most.

    `sent` lists (path, body, headers) of all generations asked for; `asked` all other paths.
    """

    def __init__(self, scripts: list[Script], *, concurrency: int | None = None) -> None:
        self.clock = VirtualClock()
        self.sent: list[tuple[str, dict[str, Any], dict[str, str]]] = []
        self.asked: list[str] = []
        self.server_info: dict[str, Any] = {"version": "1.2.3", "dtype": "bfloat16"}
        self.models = [{"id": "scripted"}]
        self.flush_status = 200
        self._scripts = scripts
        self._concurrency = concurrency or len(scripts)
        self._streams: dict[int, Iterator[tuple[float, Callable[[], None] | None]]] = {}
        self._due: dict[int, float] = {}
        self._num_over = 0
        self._changed = asyncio.Event()

    async def __aenter__(self) -> ScriptedServer:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        self._conductor = asyncio.create_task(self._conduct())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._conductor.cancel()
        self._server.close()
        await asyncio.wait({self._conductor})

    async def _conduct(self) -> None:
        """Play the pieces of all open answers in the order of their times."""
        actions: dict[int, Callable[[], None] | None] = {}
        while True:
            remaining = len(self._scripts) - self._num_over
            while not remaining or len(self._streams) < min(self._concurrency, remaining):
                self._changed.clear()
                await self._changed.wait()
                remaining = len(self._scripts) - self._num_over
            for number, stream in self._streams.items():
                if number not in actions:
                    delay_s, actions[number] = next(stream)
                    self._due[number] += delay_s
            number = min(actions, key=lambda number: (self._due[number], number))
            action = actions.pop(number)
            self.clock.now_s = max(self.clock.now_s, self._due[number])
            if action is None:
                del self._streams[number]
                self._num_over += 1
                continue
            looks = self.clock.num_looks
            action()
            while self.clock.num_looks == looks:
                await asyncio.sleep(0)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            first, *lines = head.split("\r\n")
            headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines if line)}
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            path = first.split()[1]
            if path.startswith(("/generate", "/v1/completions", "/v1/chat")):
                self.sent.append((path, json.loads(body), headers))
                await self._answer(len(self.sent) - 1, path, json.loads(body), writer)
            else:
                self.asked.append(path)
                _reply(writer, *self._other(path))
            await writer.drain()
        finally:
            writer.close()

    def _other(self, path: str) -> tuple[int, Any]:
        if path == "/v1/models":
            return 200, {"data": self.models}
        if path in ("/server_info", "/get_server_info"):
            return 200, self.server_info
        if path.startswith("/flush_cache"):
            return self.flush_status, "busy" if self.flush_status != 200 else "flushed"
        return 404, {"error": {"message": "no such route"}}

    async def _answer(self, number: int, path: str, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        script = self._scripts[number]
        over = asyncio.Event()
        play = _stream if body["stream"] else _whole
        self._streams[number] = self._with_end(play(script, path, body, writer), writer, over)
        self._due[number] = self.clock.now_s
        self._changed.set()
        await over.wait()

    @staticmethod
    def _with_end(
        actions: Iterator[tuple[float, Callable[[], None]]], writer: asyncio.StreamWriter, over: asyncio.Event
    ) -> Iterator[tuple[float, Callable[[], None] | None]]:
        yield from actions
        over.set()
        yield 0.0, None


def _reply(writer: asyncio.StreamWriter, status: int, body: Any) -> None:
    data = json.dumps(body).encode()
    writer.write(
        f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data
    )


def _whole(
    script: Script, path: str, body: dict[str, Any], writer: asyncio.StreamWriter
) -> Iterator[tuple[float, Callable[[], None]]]:
    text = "".join(text for _, text, _ in script.pieces)
    delay_s = sum(delay_s for delay_s, _, _ in script.pieces) + script.end_s
    yield (
        delay_s,
        lambda: _reply(writer, 200, _piece(script, path, text, text, script.num_tokens, "length", whole=True)),
    )


def _stream(
    script: Script, path: str, body: dict[str, Any], writer: asyncio.StreamWriter
) -> Iterator[tuple[float, Callable[[], None]]]:
    if script.status != 200:
        _reply(writer, script.status, script.body)
        return
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")

    def write(*events: Any) -> None:
        data = b"".join(
            b"data: " + (e.encode() if isinstance(e, str) else json.dumps(e).encode()) + b"\n\n" for e in events
        )
        writer.write(b"%x\r\n%s\r\n" % (len(data), data))

    text, count = "", 0
    for i, (delay_s, new, tokens) in enumerate(script.pieces):
        text, count = text + new, count + tokens
        last = "length" if i == len(script.pieces) - 1 and not (script.breaks_off or script.error_event) else None
        piece = _piece(script, path, new, text, count, last)
        yield delay_s, lambda piece=piece: write(piece)
    if script.breaks_off:
        writer.close()
        return
    closing: list[Any] = [script.error_event] if script.error_event else []
    if not closing and path != "/generate" and script.counts_tokens:
        closing = [{"choices": [], "usage": _usage(script)}]

    def end() -> None:
        write(*closing, "[DONE]")
        writer.write(b"0\r\n\r\n")

    yield script.end_s, end


def _piece(
    script: Script, path: str, new: str, text: str, count: int, finish: str | None, *, whole: bool = False
) -> Any:
    if path == "/generate":
        meta: dict[str, Any] = {"finish_reason": {"type": finish} if finish else None}
        if script.counts_tokens:
            meta |= {"prompt_tokens": script.prompt_tokens, "completion_tokens": count}
        if script.cached_tokens is not None:
            meta |= {"cached_tokens": script.cached_tokens}
            meta |= {"cached_tokens_details": {"device": script.cached_tokens, "host": 0}}
        return {"text": text, "meta_info": meta}
    key = "message" if whole else "delta"
    choice: dict[str, Any] = {"text": new} if path == "/v1/completions" else {key: {"content": new}}
    usage = {"usage": _usage(script)} if whole and script.counts_tokens else {}
    return {"choices": [{"index": 0, "finish_reason": finish, **choice}], **usage}


def _usage(script: Script) -> dict[str, Any]:
    usage: dict[str, Any] = {"prompt_tokens": script.prompt_tokens, "completion_tokens": script.num_tokens}
    if script.cached_tokens is not None:
        usage["prompt_tokens_details"] = {"cached_tokens": script.cached_tokens}
    return usage


def options(url: str, tokenizer: Path, *flags: str, environment: dict[str, str] | None = None) -> BenchOptions:
    """The options of those flags for a server at `url`, with a short random dataset and no warm-up by default."""
    defaults = ["--base-url", url, "--tokenizer", str(tokenizer), "--warmup-requests", "0", "--disable-tqdm"]
    if not any(flag.startswith("--dataset-name") for flag in flags):
        defaults += ["--dataset-name", "random", "--random-range-ratio", "1"]
        defaults += ["--random-input-len", "16", "--random-output-len", "5"]
    return parse_arguments([*defaults, *flags], environment or {})


def run(
    scripts: list[Script], tokenizer: Path, *flags: str, concurrency: int | None = None, prepare: Any = None
) -> tuple[Measurement, ScriptedServer, list[str]]:
    """Measure a scripted server; also what it was sent, and what the client said."""
    said: list[str] = []

    async def scenario() -> tuple[Measurement, ScriptedServer]:
        async with ScriptedServer(scripts, concurrency=concurrency) as server:
            if prepare is not None:
                prepare(server)
            given = options(server.url, tokenizer, "--num-prompts", str(len(scripts)), *flags)
            stopping = contextlib.nullcontext(asyncio.Event())
            measured = await measure(given, stopping=stopping, say=said.append, progress_out=None, clock=server.clock)
            return measured, server

    measured, server = asyncio.run(scenario())
    return measured, server, said


def script_order(measured: Measurement, server: ScriptedServer) -> list[int]:
    """For each request of the dataset, the number of the script it got: connections may overtake each other."""
    prompts = [_prompt_of(body) for _, body, _ in server.sent]
    assert len(set(prompts)) == len(prompts)
    return [prompts.index(str(request.prompt)) for request in measured.dataset.requests]


def _prompt_of(body: dict[str, Any]) -> str:
    return str(body["messages"][-1]["content"] if "messages" in body else body.get("text", body.get("prompt")))
