"""More than 40 ways in which one client tries to take a server from all others.

Owns what is sent. What others then see, and what the server's processes take, is measured elsewhere. An attempt is one
round, sent as fast as it goes; `Site.scale` makes it smaller where only right answers and memory are looked at.

    python exhaustion.py URL ATTEMPT SECONDS      keep up one attempt, as a process of its own
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import gzip
import io
import json
import random
import resource
import socket
import struct
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import aiohttp

MIB = 2**20
ADDRESS = "127.0.0.2"
"""Of the attacker, so that a server can tell it from the others. On Linux all of 127.0.0.0/8 is this machine."""
JSON = {"Content-Type": "application/json"}


@dataclass
class Site:
    """The server under attack. scale: of what is sent, 1 being all of it. statuses: of its answers so far."""

    url: str
    session: aiohttp.ClientSession
    rng: random.Random
    scale: float = 1.0
    statuses: collections.Counter[int] = field(default_factory=collections.Counter)
    hold_s: float = 2.0
    """For which connections are held that do nothing."""

    def size(self, full: int, least: int = 1) -> int:
        return max(least, int(full * self.scale))

    @property
    def faults(self) -> list[int]:
        """Statuses that no client may cause: 503 is a refusal."""
        return [status for status in self.statuses if status >= 500 and status != 503]

    async def send(
        self,
        path: str,
        body: Any = None,
        headers: Mapping[str, str] = JSON,
        *,
        method: str = "POST",
        reads: bool = True,
    ) -> bytes:
        """One request and its whole answer. A server that cuts the connection has answered too."""
        data = None if body is None else io.BytesIO(body if isinstance(body, bytes) else json.dumps(body).encode())
        with contextlib.suppress(aiohttp.ClientError, ConnectionError):
            async with self.session.request(method, self.url + path, data=data, headers=headers) as answer:
                self.statuses[answer.status] += 1
                return await answer.read() if reads else b""
        return b""

    async def many(self, count: int, send: Callable[[int], Awaitable[Any]], at_once: int = 16) -> None:
        numbers = iter(range(count))

        async def some() -> None:
            for number in numbers:
                await send(number)

        await asyncio.gather(*(some() for _ in range(min(at_once, count))))

    def connect(self) -> socket.socket:
        parts = urlsplit(self.url)
        client = socket.create_connection((parts.hostname, parts.port), timeout=60, source_address=(ADDRESS, 0))
        client.setblocking(False)
        return client

    @contextlib.asynccontextmanager
    async def connections(self, count: int) -> Any:
        """Bare sockets that do not block; in the end they are reset."""
        clients: list[socket.socket] = []
        try:
            for _ in range(count):
                with contextlib.suppress(OSError):
                    clients.append(self.connect())
                await asyncio.sleep(0)
            yield clients
        finally:
            for client in clients:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                client.close()

    async def drip(self, clients: Sequence[socket.socket], data: bytes, pause_s: float = 0.02) -> None:
        """Every client sends the same, one byte after the other."""
        end = time.monotonic() + self.hold_s
        for i in range(len(data)):
            for client in clients:
                with contextlib.suppress(OSError):
                    client.send(data[i : i + 1])
            await asyncio.sleep(pause_s)
            if time.monotonic() > end:
                break


def sampling(max_new_tokens: int = 1, **more: Any) -> dict[str, Any]:
    return {"max_new_tokens": max_new_tokens, "temperature": 0, **more}


def generate(text: Any, max_new_tokens: int = 1, **more: Any) -> dict[str, Any]:
    return {"text": text, "sampling_params": sampling(max_new_tokens), **more}


def chat(content: Any = "Hi", **more: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": content}], "max_tokens": 1, **more}


def head(path: str, *lines: str, length: int = 0) -> bytes:
    given = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json", f"Content-Length: {length}"]
    return "\r\n".join([*given, *lines, "", ""]).encode()


# -- what requests hold ------------------------------------------------------------------------------------------------
async def long_salts(site: Site) -> None:
    for name in ("cache_salt", "extra_key"):
        await site.send("/generate", generate("a", **{name: f"{site.rng.random()}" + "x" * site.size(8 * MIB)}))


async def a_salt_for_many_prompts(site: Site) -> None:
    await site.send("/generate", generate(["a"] * site.size(4000, 100), cache_salt="x" * site.size(300_000)))


async def small_salts(site: Site) -> None:
    async def one(number: int) -> None:
        await site.send("/generate", generate("a", cache_salt=f"{site.rng.random()}" + "x" * 4000))

    await site.many(site.size(200), one)


async def stop_strings(site: Site) -> None:
    stops = [f"{i:04}" + "é" * 4092 for i in range(32)]
    body = {"text": [f"{i} says" for i in range(site.size(400, 20))], "sampling_params": sampling(8, stop=stops)}
    await site.send("/generate", body)


async def stop_strings_like_patterns(site: Site) -> None:
    stops = ["(a|a)*" * 600 + "b", "a" * 4095 + "b", "((a+)+)+$", "\\" * 4096, ".*" * 2048]
    await site.send("/generate", generate("aaaa" * 100, 64) | {"sampling_params": sampling(64, stop=stops)})
    await site.send("/v1/completions", {"model": "m", "prompt": "aaaa", "max_tokens": 64, "stop": stops})


async def many_prompts(site: Site) -> None:
    await site.send("/generate", generate([f"{site.rng.random()} and" for _ in range(site.size(4000))]))


async def many_samples(site: Site) -> None:
    for n in (128, 10**6, 2**31, 2**63):
        body = {"text": ["a", "b"] * site.size(50), "sampling_params": sampling(1, n=n)}
        await site.send("/generate", body)
    await site.send("/v1/completions", {"model": "m", "prompt": ["a"] * site.size(100), "n": 128, "max_tokens": 1})


async def biases(site: Site) -> None:
    bias = {str(i): 1.0 for i in range(site.size(100_000, 2000))}
    await site.send("/generate", {"text": "a", "sampling_params": sampling(4, logit_bias=bias)})
    small = {str(i): 1.0 for i in range(1024)}
    texts = [f"{i}" for i in range(site.size(200))]
    await site.send("/generate", {"text": texts, "sampling_params": sampling(4, logit_bias=small)})


async def unknown_fields(site: Site) -> None:
    junk = b'{"text":"a","sampling_params":{"max_new_tokens":64,"ignore_eos":true},"junk":[%s0]}' % (
        b"[],{}," * (site.size(24 * MIB) // 6)
    )
    await asyncio.gather(*(site.send("/generate", junk) for _ in range(2)))


async def unknown_names(site: Site) -> None:
    names = b",".join(b'"k%d":%d' % (i, i) for i in range(site.size(1_000_000)))
    await site.send(
        "/v1/chat/completions", b'{"model":"m","max_tokens":1,"messages":[{"role":"user","content":"a"}],%s}' % names
    )


async def deep_nesting(site: Site) -> None:
    for depth in (400, 2000, 100_000):
        deep = b"[" * depth + b"]" * depth
        await site.send("/generate", b'{"text":"a","junk":%s}' % deep)
        await site.send("/v1/chat/completions", b'{"model":"m","messages":[{"role":"user","content":%s}]}' % deep)
        told = b'"chat_template_kwargs":{"a":%s}' % deep
        await site.send(
            "/v1/chat/completions", b'{"messages":[{"role":"user","content":"a"}],%s,"max_tokens":1}' % told
        )


async def long_numbers(site: Site) -> None:
    digits = b"9" * site.size(8 * MIB)
    await site.send("/generate", b'{"text":"a","sampling_params":{"max_new_tokens":%s}}' % digits)
    await site.send("/generate", b'{"text":"a","junk":%s}' % digits)
    await site.send("/generate", b'{"text":"a","sampling_params":{"temperature":0.%s}}' % digits)


async def escapes(site: Site) -> None:
    await site.send("/generate", b'{"text":"%s"}' % (b"\\u0041" * site.size(4 * MIB, 2**18)))


async def invalid_text(site: Site) -> None:
    await site.send("/generate", b'{"text":"%s\xff"}' % (b"a" * site.size(16 * MIB)))
    await site.send("/generate", b'{"text":"%s\\ud800"}' % (b"a" * 1000))


async def bombs(site: Site) -> None:
    body = gzip.compress(b'{"text":"' + b"a" * site.size(64 * MIB) + b'"}', 1)
    for coding in ("gzip", "deflate", "br", "zstd", "gzip, gzip, gzip"):
        await site.send("/generate", body, {**JSON, "Content-Encoding": coding})


# -- text --------------------------------------------------------------------------------------------------------------
async def long_text(site: Site) -> None:
    for text in (
        "hello " * site.size(700_000, 50_000),
        "a" * site.size(4 * MIB, 2**18),
        "\u4f60" * site.size(MIB, 2**16),
    ):
        await site.send("/generate", generate(text))


async def long_completions(site: Site) -> None:
    text = "".join(site.rng.choice("abcdefgh ") for _ in range(10_000)) * site.size(200)
    await asyncio.gather(
        site.send("/v1/completions", {"model": "m", "prompt": text, "max_tokens": 1}),
        site.send("/v1/messages", {"model": "m", "max_tokens": 1, "messages": [{"role": "user", "content": text}]}),
    )


async def counting(site: Site) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "hello " * site.size(500_000, 50_000)}]}
    await site.send("/v1/messages/count_tokens", body)
    await site.send("/tokenize", {"prompt": "hello " * site.size(500_000)})


async def many_texts(site: Site) -> None:
    await site.send("/tokenize", {"prompt": ["a"] * site.size(100_000)})
    await site.send("/tokenize", {"prompt": ["hello world " * 50] * site.size(2000)})


async def many_id_lists(site: Site) -> None:
    await site.send("/detokenize", {"tokens": [[]] * site.size(300_000)})
    await site.send("/detokenize", {"tokens": [[1, 2]] * site.size(100_000)})
    await site.send("/detokenize", {"tokens": [1] * site.size(2_000_000)})


async def many_messages(site: Site) -> None:
    messages = [{"role": role, "content": "a"} for role in ("user", "assistant")] * site.size(15_000, 2000)
    await site.send("/v1/chat/completions", {"model": "m", "messages": messages, "max_tokens": 1})
    await site.send("/v1/messages", {"model": "m", "messages": messages, "max_tokens": 1})
    await site.send("/tokenize", {"messages": messages})


async def control_tokens(site: Site) -> None:
    await site.send("/v1/chat/completions", chat("<|im_end|>" * site.size(100_000, 5000)))
    await site.send("/v1/chat/completions", chat("<|im_end|><|im_start|>system\n" * site.size(200, 5)))


async def template_arguments(site: Site) -> None:
    for value in ("x" * site.size(8 * MIB), list(range(site.size(500_000))), {"a" * 1000: [{}] * site.size(100_000)}):
        await site.send(
            "/v1/chat/completions", chat(chat_template_kwargs={"tools": value, "documents": value, "x": value})
        )
    # In any scale more than fit into the context: fewer would be computed.
    count = site.size(20_000, 400)
    tools = [{"type": "function", "function": {"name": f"f{i}", "parameters": {}}} for i in range(count)]
    await site.send("/v1/chat/completions", chat(tools=tools))


# -- log-probabilities -------------------------------------------------------------------------------------------------
async def top_log_probabilities(site: Site) -> None:
    wanted = {"return_logprob": True, "top_logprobs_num": 128, "logprob_start_len": 0, "stream": True}
    body = generate("Once upon a time", site.size(400, 32), **wanted)
    body["sampling_params"]["ignore_eos"] = True
    await site.many(2, lambda number: site.send("/generate", body), at_once=2)


async def log_probabilities_of_prompts(site: Site) -> None:
    ids = [site.rng.randrange(1000, 20_000) for _ in range(site.size(2000))]
    await site.send(
        "/generate",
        {
            "input_ids": ids,
            "sampling_params": sampling(),
            "return_logprob": True,
            "top_logprobs_num": 128,
            "logprob_start_len": 0,
        },
    )
    text = "hello world " * site.size(900, 50)
    await site.send("/v1/completions", {"model": "m", "prompt": text, "echo": True, "logprobs": 5, "max_tokens": 1})


# -- work that costs the sender nothing --------------------------------------------------------------------------------
async def metrics(site: Site) -> None:
    await site.many(site.size(600), lambda number: site.send("/metrics", method="GET"))


async def health_of_the_engine(site: Site) -> None:
    await site.many(site.size(400), lambda number: site.send("/health_generate", method="GET"))


async def descriptions(site: Site) -> None:
    for path in ("/openapi.json", "/server_info", "/get_server_info", "/v1/loads", "/v1/models"):
        await site.many(site.size(100), lambda number, path=path: site.send(path, method="GET"))


async def unknown_paths(site: Site) -> None:
    await site.many(site.size(2000), lambda number: site.send(f"/{'x' * 100}{number}", method="GET"))


async def flushes(site: Site) -> None:
    for headers in ({}, {"Origin": "http://evil.example"}):
        await site.many(site.size(200), lambda number, h=headers: site.send("/flush_cache", None, h, method="GET"))
    await site.send("/flush_cache?timeout=1e9", None, {}, method="GET")


async def aborts(site: Site) -> None:
    for body in (
        {"rid": ""},
        {},
        {"rid": None},
        {"rid": "x" * site.size(8 * MIB)},
        {"rid": ["a"] * 1000},
        {"rid": "*"},
    ):
        await site.send("/abort_request", body)
    await site.many(site.size(500), lambda number: site.send("/abort_request", {"rid": f"{number}"}))


async def one_name(site: Site) -> None:
    await site.many(site.size(200), lambda number: site.send("/generate", generate("a", 8, rid="the same")))
    await site.send("/generate", generate(["a"] * site.size(2000), rid=["the same"] * site.size(2000)))


# -- the queue and the cache -------------------------------------------------------------------------------------------
async def a_full_queue(site: Site) -> None:
    texts = [f"{site.rng.random()} story" for _ in range(site.size(4096))]
    await site.send("/generate", generate(texts, site.size(64)))


async def priorities(site: Site) -> None:
    async def one(number: int) -> None:
        await site.send("/generate", generate(f"{site.rng.random()}" * 20, 64, priority=2**31 - 1))

    await site.many(site.size(64), one, at_once=64)


async def answers_without_end(site: Site) -> None:
    async def one(number: int) -> None:
        body = {"text": f"{number}", "sampling_params": {"max_new_tokens": site.size(2000, 64), "ignore_eos": True}}
        await site.send("/generate", body)

    for limit in (10**9, 2**31, 2**63):
        await site.send("/v1/completions", {"model": "m", "prompt": "a", "max_tokens": limit, "ignore_eos": True})
    await site.many(site.size(64), one, at_once=64)


async def long_prompts(site: Site) -> None:
    async def one(number: int) -> None:
        ids = [site.rng.randrange(1000, 20_000) for _ in range(site.size(7000, 500))]
        await site.send("/generate", {"input_ids": ids, "sampling_params": sampling()})

    await site.many(site.size(4, 2), one, at_once=4)


async def distinct_prompts(site: Site) -> None:
    async def one(number: int) -> None:
        ids = [site.rng.randrange(1000, 20_000) for _ in range(40)]
        await site.send("/generate", {"input_ids": ids, "sampling_params": sampling()})

    await site.many(site.size(400), one)


# -- connections -------------------------------------------------------------------------------------------------------
async def idle_connections(site: Site) -> None:
    async with site.connections(site.size(2000)):
        await asyncio.sleep(site.hold_s)


async def dripping_heads(site: Site) -> None:
    async with site.connections(site.size(300)) as clients:
        await site.drip(clients, head("/generate", *[f"X{i}: x" for i in range(50)]))


async def dripping_bodies(site: Site) -> None:
    async with site.connections(site.size(300)) as clients:
        for client in clients:
            with contextlib.suppress(OSError):
                client.send(head("/generate", length=1000))
        await site.drip(clients, b'{"text": "' + b"a" * 900)


async def dripping_reads(site: Site) -> None:
    body = json.dumps(generate("Once", site.size(200, 16), stream=True)).encode()
    async with site.connections(site.size(50)) as clients:
        for client in clients:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            with contextlib.suppress(OSError):
                client.send(head("/generate", length=len(body)) + body)
        end = time.monotonic() + site.hold_s
        while time.monotonic() < end:
            for client in clients:
                with contextlib.suppress(OSError):
                    client.recv(1)
            await asyncio.sleep(0.05)


async def streams_that_nobody_reads(site: Site) -> None:
    wanted = {"stream": True, "return_logprob": True, "top_logprobs_num": 20}
    body = json.dumps(generate("Once upon a time", site.size(400, 16), **wanted)).encode()
    async with site.connections(site.size(20)) as clients:
        for client in clients:
            with contextlib.suppress(OSError):
                client.send(head("/generate", length=len(body)) + body)
        await asyncio.sleep(site.hold_s)


async def requests_in_one_piece(site: Site) -> None:
    body = json.dumps(generate("a", 4)).encode()
    async with site.connections(site.size(100)) as clients:
        for client in clients:
            with contextlib.suppress(OSError):
                client.send((head("/generate", length=len(body)) + body) * 8)
        await asyncio.sleep(site.hold_s)


async def aborted_uploads(site: Site) -> None:
    part = b'{"text": "' + b"a" * site.size(8 * MIB)
    for _ in range(4):
        async with site.connections(4) as clients:
            for client in clients:
                with contextlib.suppress(OSError, TimeoutError):
                    client.settimeout(5)
                    await asyncio.to_thread(client.sendall, head("/generate", length=32 * MIB) + part)


async def clients_that_leave(site: Site) -> None:
    body = json.dumps(generate("Once upon a time", 200, stream=True)).encode()
    for _ in range(site.size(20)):
        async with site.connections(8) as clients:
            for client in clients:
                with contextlib.suppress(OSError):
                    client.send(head("/generate", length=len(body)) + body)


async def connections_that_come_and_go(site: Site) -> None:
    for _ in range(site.size(20)):
        async with site.connections(50):
            pass


async def many_headers(site: Site) -> None:
    async with site.connections(site.size(20)) as clients:
        for client in clients:
            client.settimeout(5)
            with contextlib.suppress(OSError):
                data = b"GET /health HTTP/1.1\r\nHost: a\r\n" + b"X: x\r\n" * site.size(100_000, 10_000)
                await asyncio.to_thread(client.sendall, data)


ATTEMPTS: dict[str, Callable[[Site], Awaitable[None]]] = {
    attempt.__name__: attempt
    for attempt in (
        long_salts,
        a_salt_for_many_prompts,
        small_salts,
        stop_strings,
        stop_strings_like_patterns,
        many_prompts,
        many_samples,
        biases,
        unknown_fields,
        unknown_names,
        deep_nesting,
        long_numbers,
        escapes,
        invalid_text,
        bombs,
        long_text,
        long_completions,
        counting,
        many_texts,
        many_id_lists,
        many_messages,
        control_tokens,
        template_arguments,
        top_log_probabilities,
        log_probabilities_of_prompts,
        metrics,
        health_of_the_engine,
        descriptions,
        unknown_paths,
        flushes,
        aborts,
        one_name,
        a_full_queue,
        priorities,
        answers_without_end,
        long_prompts,
        distinct_prompts,
        idle_connections,
        dripping_heads,
        dripping_bodies,
        dripping_reads,
        streams_that_nobody_reads,
        requests_in_one_piece,
        aborted_uploads,
        clients_that_leave,
        connections_that_come_and_go,
        many_headers,
    )
}


async def attack(
    url: str, name: str, *, scale: float = 1.0, hold_s: float = 2.0, until: Callable[[], bool] = lambda: True
) -> Site:
    """Rounds of one attempt, at least one, until `until()`."""
    timeout = aiohttp.ClientTimeout(total=None)
    connector = aiohttp.TCPConnector(limit=0, local_addr=(ADDRESS, 0))
    async with aiohttp.ClientSession(timeout=timeout, connector=connector, auto_decompress=False) as session:
        site = Site(url, session, random.Random(name), scale, hold_s=hold_s)
        while True:
            await ATTEMPTS[name](site)
            if until():
                return site


def main() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    url, name, seconds = sys.argv[1:]
    end = time.monotonic() + float(seconds)
    site = asyncio.run(attack(url, name, until=lambda: time.monotonic() > end))
    print(json.dumps({"statuses": dict(site.statuses), "faults": site.faults}))


if __name__ == "__main__":
    main()
