"""Talking to the server that is measured: requests with the times of what comes back, and what is asked besides.

Owns the HTTP client's settings, the moment a time is taken, and how a failure is said. Everything but being there is
optional: a server that lacks a route only tells less. Never decides when to send, never reads what an answer means.

Every request has a connection of its own, as SGLang's client has it, so that a time to first token holds the connecting
and a server that closes idle connections spoils nothing.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from mooli.bench.apis import (
    DONE,
    AnswerError,
    Backend,
    EventStream,
    RequestOptions,
    answer_reader,
    error_message,
    request_body,
)
from mooli.bench.errors import BenchmarkError
from mooli.bench.records import BenchRequest, Message, RequestRecord

if TYPE_CHECKING:
    import aiohttp

ANSWER_LIMIT_S = 6 * 60 * 60
"""The longest time one answer may take; the limit of SGLang's client."""

CONNECT_LIMIT_S = 30

_READ_BUFFER_BYTES = 10 * 2**20
_ERROR_BODY_BYTES = 64 * 2**10
_ROUTING_KEY_HEADER = "X-SMG-Routing-Key"


class UnreachableError(Exception):
    """No connection can be made; the message says to where and why."""


def open_session(headers: Mapping[str, str]) -> aiohttp.ClientSession:
    """An HTTP session that sends `headers` with all it asks. To be called, and closed, in an event loop."""
    import aiohttp  # 0.3 s that only a run needs

    trace = aiohttp.TraceConfig()
    trace.on_request_headers_sent.append(_is_on_the_wire)
    return aiohttp.ClientSession(
        trace_configs=[trace],
        connector=aiohttp.TCPConnector(limit=0, force_close=True),
        timeout=aiohttp.ClientTimeout(total=ANSWER_LIMIT_S, sock_connect=CONNECT_LIMIT_S),
        read_bufsize=_READ_BUFFER_BYTES,
        headers=dict(headers),
    )


class Client:
    """Sends the requests of one run.

    clock: seconds that only grow. It is read when a request is sent and when bytes of its answer arrive, nowhere
        else.
    salt: of this run; with it no two requests of any run share a cached prefix. None leaves sharing to the server.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        base_url: str,
        backend: Backend,
        options: RequestOptions,
        *,
        model: str,
        clock: Callable[[], float],
        salt: str | None = None,
        count_tokens: Callable[[str], int] = len,
    ) -> None:
        self._session = session
        self._url = base_url + backend.api.value
        self._backend = backend
        self._options = options
        self._model = model
        self._clock = clock
        self._salt = salt
        self._count_tokens = count_tokens
        self._num_salts = 0

    async def converse(
        self, index: int, request: BenchRequest, records: list[RequestRecord], *, output_len: int | None = None
    ) -> None:
        """Send `request`, and the later turns of a conversation as the answers come; add one record to `records` each.

        A turn that fails ends its conversation. output_len: instead of the request's own.
        Raises UnreachableError after the record when there is no server; raises nothing for other failures.
        """
        wanted = request.output_len if output_len is None else output_len
        record = RequestRecord(index=index, prompt_len=request.prompt_len)
        records.append(record)
        await self._ask(request, request.prompt, wanted, record)
        if not request.later_turns:
            return
        messages: list[Message] = [{"role": "user", "content": request.prompt}]
        for turn, said in enumerate(request.later_turns, start=1):
            if not record.success:
                return
            messages += [{"role": "assistant", "content": record.generated_text}, {"role": "user", "content": said}]
            record = RequestRecord(index=index, turn=turn)
            records.append(record)
            await self._ask(request, list(messages), wanted, record)
            if record.server_prompt_tokens is not None:
                record.prompt_len = record.server_prompt_tokens
            else:
                record.prompt_len = self._count_tokens("\n".join(str(message["content"]) for message in messages))

    async def _ask(self, request: BenchRequest, prompt: Any, output_len: int, record: RequestRecord) -> None:
        import aiohttp

        body = request_body(
            self._backend,
            request,
            self._options,
            model=self._model,
            prompt=prompt,
            output_len=output_len,
            salt=self._next_salt(),
        )
        sent = json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        if request.routing_key is not None:
            headers[_ROUTING_KEY_HEADER] = request.routing_key
        record.output_len = output_len
        record.start_s = self._clock()
        sending = (record, time.perf_counter())
        try:
            async with self._session.post(self._url, data=sent, headers=headers, trace_request_ctx=sending) as response:
                if response.status != 200:
                    raise AnswerError(await _status_message(response))
                await self._read(response, record)
        except asyncio.CancelledError:
            record.interrupted = True
            raise
        except aiohttp.ClientConnectorError as exc:
            record.error = f"cannot connect to {exc.host}:{exc.port}: {exc.strerror or exc}"
            raise UnreachableError(record.error) from exc
        except aiohttp.ConnectionTimeoutError as exc:
            record.error = f"no connection to {self._url} within {CONNECT_LIMIT_S} s"
            raise UnreachableError(record.error) from exc
        except AnswerError as exc:
            record.error = str(exc)
        except asyncio.TimeoutError:
            record.error = f"no whole answer within {ANSWER_LIMIT_S} s"
        except aiohttp.ServerDisconnectedError:
            record.error = "the server closed the connection without an answer"
        except (aiohttp.ClientPayloadError, ConnectionError) as exc:
            record.error = f"the connection broke off in the middle of the answer: {exc}"
        except (aiohttp.ClientError, OSError) as exc:
            record.error = f"{type(exc).__name__}: {exc}"
        except ValueError as exc:  # JSON or UTF-8 that is none
            record.error = f"the server sent what is not JSON: {exc}"

    async def _read(self, response: aiohttp.ClientResponse, record: RequestRecord) -> None:
        answer = answer_reader(self._backend.api, record)
        if response.content_type == "application/json":
            body = await response.read()
            now = self._clock()
            answer.piece(json.loads(body), now)
            answer.done(now)
            answer.close()
            return
        stream = EventStream()
        async for arrived in response.content.iter_any():
            now = self._clock()
            for payload in stream.feed(arrived):
                _take(answer, payload, now)
        for payload in stream.close():
            _take(answer, payload, self._clock())
        answer.close()

    def _next_salt(self) -> str | None:
        if self._salt is None:
            return None
        self._num_salts += 1
        return f"{self._salt}-{self._num_salts}"


async def _is_on_the_wire(_: aiohttp.ClientSession, context: SimpleNamespace, __: object) -> None:
    if context.trace_request_ctx is not None:
        record, began_s = context.trace_request_ctx
        record.send_delay_s = time.perf_counter() - began_s


def _take(answer: Any, payload: bytes, now: float) -> None:
    if payload == DONE:
        answer.done(now)
    else:
        answer.piece(json.loads(payload), now)


async def _status_message(response: aiohttp.ClientResponse) -> str:
    body = await response.content.read(_ERROR_BODY_BYTES)
    text = body.decode("utf-8", "replace")
    try:
        said = error_message(json.loads(text))
    except ValueError:
        said = error_message(text)
    return f"HTTP {response.status}: {said or response.reason}"


# -- what is asked besides: is it there, what is it called, forget your cache, what are you ----------------------------

_ASK_LIMIT_S = 30
_RETRY_S = 0.5


class ServerContact:
    """base_url: without a slash at its end. say: takes lines for the user."""

    def __init__(self, session: aiohttp.ClientSession, base_url: str, say: Callable[[str], None]) -> None:
        self._session = session
        self._base_url = base_url
        self._say = say

    async def wait_until_ready(self, limit_s: float) -> str | None:
        """Wait for an answer of /v1/models, and return the name of the first model if there is one.

        limit_s: how long a server that refuses connections or says 503 is given; 0 asks once.
        Raises BenchmarkError when there is no server by then, or it refuses the key.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + limit_s
        has_said = False
        while True:
            status, data, why = await self._get("/v1/models")
            if status in (401, 403):
                raise BenchmarkError(
                    f"{self._base_url} refuses the key: HTTP {status} {why}; set OPENAI_API_KEY or give --header"
                )
            if status is not None and status != 503:
                return _first_model(data)
            if loop.time() >= end:
                waited = f" (waited {limit_s:g} s)" if limit_s else ""
                raise BenchmarkError(f"there is no server at {self._base_url}: {why}{waited}; check --host and --port")
            if not has_said:
                self._say(f"waiting up to {limit_s:g} s for {self._base_url}: {why}")
                has_said = True
            await asyncio.sleep(_RETRY_S)

    async def model_info(self) -> dict[str, Any]:
        """/model_info, or the older /get_model_info; empty where there is neither."""
        return await self._first_object("/model_info", "/get_model_info")

    async def server_info(self) -> dict[str, Any]:
        """/server_info, or the older /get_server_info; empty where there is neither."""
        return await self._first_object("/server_info", "/get_server_info")

    async def flush_cache(self, limit_s: float) -> None:
        """Make the server forget its cache; it may take `limit_s` to become idle.

        Raises BenchmarkError when it does not: numbers of a cache nobody knows would be worse than none.
        """
        import aiohttp

        path = f"/flush_cache?timeout={limit_s:g}"
        timeout = aiohttp.ClientTimeout(total=limit_s + _ASK_LIMIT_S)
        try:
            # A Mooli without a key wants to see that no web page asks.
            async with self._session.post(self._base_url + path, timeout=timeout, headers={"X-Mooli": "1"}) as response:
                text = await response.text(errors="replace")
                if response.status != 200:
                    raise BenchmarkError(f"the server did not flush its cache: HTTP {response.status} {text[:200]}")
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as exc:
            raise BenchmarkError(f"the server did not flush its cache: {exc or 'no answer in time'}") from exc

    async def _first_object(self, *paths: str) -> dict[str, Any]:
        for path in paths:
            status, data, _ = await self._get(path)
            if status == 200 and isinstance(data, dict):
                return data
        return {}

    async def _get(self, path: str) -> tuple[int | None, Any, str]:
        """(status or None, parsed body or None, why it is not well)."""
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=_ASK_LIMIT_S)
        try:
            async with self._session.get(self._base_url + path, timeout=timeout) as response:
                body = await response.read()
                status = response.status
        except aiohttp.ClientConnectorError as exc:
            return None, None, exc.strerror or str(exc)
        except asyncio.TimeoutError:
            return None, None, f"no answer within {_ASK_LIMIT_S} s"
        except (aiohttp.ClientError, OSError, ValueError) as exc:
            return None, None, f"{type(exc).__name__}: {exc}"
        try:
            data = json.loads(body)
        except ValueError:
            data = None
        return status, data, error_message(data) if data is not None else f"HTTP {status}"


def accept_length(server_info: dict[str, Any]) -> float | None:
    """Mean tokens a step that speculative decoding gave, as SGLang's server tells it; None without speculation."""
    decode = server_info.get("decode")
    if isinstance(decode, list) and decode and isinstance(decode[0], dict):
        server_info = decode[0]
    states = server_info.get("internal_states")
    if not isinstance(states, list) or not states or not isinstance(states[0], dict):
        return None
    value = states[0].get("avg_spec_accept_length")
    return float(value) if isinstance(value, (int, float)) and value > 0 else None


def _first_model(data: Any) -> str | None:
    models = data.get("data") if isinstance(data, dict) else None
    if isinstance(models, list) and models and isinstance(models[0], dict):
        name = models[0].get("id")
        return name if isinstance(name, str) else None
    return None
