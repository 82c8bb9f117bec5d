"""Raw requests to the OpenAI routes: what is sent and what comes back, without a client package."""

from __future__ import annotations

import json
from typing import Any


def complete(server: Any, prompt: Any = "say>", **fields: Any) -> dict[str, Any]:
    """The answer of /v1/completions, which must succeed."""
    return _ok(server.http.post("/v1/completions", json={"prompt": prompt, **fields}))


def chat(server: Any, content: Any = "hi", **fields: Any) -> dict[str, Any]:
    """The answer of /v1/chat/completions to one user message, which must succeed."""
    return _ok(server.http.post("/v1/chat/completions", json={"messages": [user(content)], **fields}))


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def refusal(server: Any, path: str, body: Any) -> dict[str, Any]:
    """The error of a request that must be refused with 400."""
    reply = server.http.post(path, json=body)
    assert reply.status_code == 400, reply.text
    return reply.json()["error"]


def complete_events(server: Any, prompt: Any = "say>", **fields: Any) -> list[dict[str, Any]]:
    return events(server, "/v1/completions", {"prompt": prompt, **fields})


def chat_events(server: Any, content: Any = "hi", **fields: Any) -> list[dict[str, Any]]:
    return events(server, "/v1/chat/completions", {"messages": [user(content)], **fields})


def events(server: Any, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The chunks of a stream, which must begin well and end with [DONE]."""
    reply = server.http.post(path, json={**body, "stream": True})
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"].startswith("text/event-stream")
    pieces = reply.text.split("\n\n")
    assert pieces[-1] == ""
    assert pieces[-2] == "data: [DONE]"
    assert all(piece.startswith("data: ") for piece in pieces[:-1])
    return [json.loads(piece.removeprefix("data: ")) for piece in pieces[:-2]]


def stream_choices(chunks: list[dict[str, Any]], index: int = 0) -> list[dict[str, Any]]:
    """The entries of one choice, in order."""
    return [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]


def _ok(reply: Any) -> dict[str, Any]:
    assert reply.status_code == 200, reply.text
    return reply.json()
