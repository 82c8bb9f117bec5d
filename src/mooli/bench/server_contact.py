"""What the client asks a server besides generating: is it there, what is it called, forget your cache, what are you.

Owns those calls. Everything but being there is optional: a server that lacks a route only tells less.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mooli.bench.answers import error_message
from mooli.bench.errors import BenchmarkError

if TYPE_CHECKING:
    import aiohttp

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
