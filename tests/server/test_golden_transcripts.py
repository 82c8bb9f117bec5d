"""What the routes say, word for word: requests and replies as recorded in tests/golden/http. Each fits its schema.

Each file is a server and exchanges with it, in order. After an intended change, record the replies anew and read the
difference:

    MOOLI_RECORD_TRANSCRIPTS=1 python -m pytest tests/server/test_golden_transcripts.py

A new exchange is written as a request without a reply. Values that differ each time are masked.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_engine import says
from gate import Gate
from openapi_check import check_answer

FOLDER = Path(__file__).resolve().parents[1] / "golden" / "http"

VOLATILE = (
    "created", "e2e_latency", "response_sent_to_client_ts", "timestamp", "startup_time", "version",
    "mooli", "last_gen_throughput", "gen_throughput", "created_at", "modified_at", "expires_at", "total_duration",
    "load_duration", "prompt_eval_duration", "eval_duration",
)  # fmt: skip

HEADERS = ("content-type", "cache-control", "x-accel-buffering", "retry-after", "allow", "www-authenticate")
"""Those that mean something to a client of these routes."""


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.json")), ids=lambda file: file.stem)
def test_the_server_says_what_is_on_record(live, file):
    transcript = json.loads(file.read_text())
    server_arguments = dict(transcript["server"])
    with Gate() as gate:
        next_token = says(server_arguments.pop("says"), after=server_arguments.pop("after"))
        server = live(next_token, runner={"raises": gate}, **server_arguments)
        replies = [exchange(server, gate, item["request"]) for item in transcript["exchanges"]]
    if os.environ.get("MOOLI_RECORD_TRANSCRIPTS"):
        for item, reply in zip(transcript["exchanges"], replies, strict=True):
            item["reply"] = reply
        file.write_text(json.dumps(transcript, indent=1, ensure_ascii=False) + "\n")
    for item, reply in zip(transcript["exchanges"], replies, strict=True):
        assert reply == item["reply"], f"{item['request']['method']} {item['request']['path']}"


def exchange(server: Any, gate: Gate, request: dict[str, Any]) -> dict[str, Any]:
    """Send a request; its reply as it is recorded."""
    sent = {"headers": request.get("headers")}
    if "text" in request:
        sent["content"] = request["text"]
    elif "json" in request:
        sent["json"] = request["json"]
    is_stream = isinstance(request.get("json"), dict) and request["json"].get("stream") is True
    if is_stream:
        gate.close()
        gate.let()
    else:
        gate.open()
    with server.http.stream(request["method"], request["path"], **sent) as reply:
        kept = {name: reply.headers[name] for name in HEADERS if name in reply.headers}
        fits = functools.partial(check, request, reply)
        record: dict[str, Any] = {"status": reply.status_code, "headers": kept}
        if kept.get("content-type", "").startswith("text/event-stream"):
            record["events"] = list(events(reply, gate, fits))
        elif kept.get("content-type") == "application/x-ndjson":
            record["events"] = list(lines(reply, gate, fits))
        else:
            text = reply.read().decode()
            if kept.get("content-type") == "application/json":
                value = json.loads(text)
                fits(value)
                record["json"] = masked(value)
            else:
                fits(text)
                record["text"] = text
    return record


def check(request: dict[str, Any], reply: Any, value: Any) -> None:
    """A 200 is as the OpenAPI document says."""
    if reply.status_code == 200 and request["method"] != "HEAD":
        path = request["path"].partition("?")[0]
        check_answer(request["method"], path, reply.headers["content-type"], value)


def events(reply: Any, gate: Gate, fits: Callable[[Any], None]) -> Any:
    """The events of a stream, each read before the engine may take the next step: so each shows one token."""
    lines: list[str] = []
    for line in reply.iter_lines():
        if line:
            lines.append(line)
            continue
        names = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
        (data,) = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
        assert len(names) + 1 == len(lines)
        lines = []
        value = data if data == "[DONE]" else json.loads(data)
        fits(value)
        yield {"event": names[0], "data": masked(value)} if names else masked(value)
        if shows_token(value):
            gate.let()
    assert not lines


def lines(reply: Any, gate: Gate, fits: Callable[[Any], None]) -> Any:
    """The same of a stream whose every line is an object."""
    for line in reply.iter_lines():
        value = json.loads(line)
        fits(value)
        yield masked(value)
        if not value["done"]:
            gate.let()


def shows_token(value: Any) -> bool:
    """Whether an event shows a token of the (first) sequence."""
    if not isinstance(value, dict):
        return False
    if "choices" in value:
        (choice,) = value["choices"] or [{"index": 1}]
        shown = choice.get("text") or choice.get("delta", {}).get("content")
        return choice["index"] == 0 and bool(shown)
    return "delta" in value or ("meta_info" in value and value.get("index", 0) == 0)


def masked(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: f"<{name}>" if name in VOLATILE and item else masked(item) for name, item in value.items()}
    if isinstance(value, list):
        return [masked(item) for item in value]
    if isinstance(value, float):
        return round(value, 6)  # the last digits are the processor's
    return re.sub(r"[0-9a-f]{24,}", "<drawn>", value) if isinstance(value, str) else value


def test_there_is_a_transcript_of_every_route():
    """Those that answer nothing but their own document, or numbers of the moment, are tested by themselves."""
    from mooli.server.app import ROUTES

    recorded = {
        item["request"]["path"].partition("?")[0]
        for file in FOLDER.glob("*.json")
        for item in json.loads(file.read_text())["exchanges"]
    }
    paths = {route.path for route in ROUTES if "{" not in route.path}
    seen = {"/v1/status", "/v1/logs", "/v1/cache/tree", "/v1/cache/find", "/v1/cache/events"}
    files = {"/v1/files", "/v1/batches"}
    assert paths - recorded == {"/docs", "/metrics", "/openapi.json", *seen, *files}
