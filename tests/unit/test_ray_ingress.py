"""The ingress of a Ray Serve application, with replicas that are made up: what it sends where, how often, and ends."""

from __future__ import annotations

import asyncio
import importlib.util
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of what Ray imports
]

LIMIT_S = 60

Answer = Callable[[Any], AsyncIterator[Any]]


class Handle:
    """A deployment's, as far as the ingress uses it. answers: of one call after the other; the last of all others."""

    def __init__(self, *answers: Answer, whole: list[Any] | None = None) -> None:
        self.requests: list[Any] = []
        self.num_cancelled = 0
        self._answers = list(answers)
        self._whole = whole or []

    def options(self, **options: Any) -> Handle:
        assert options == {"method_name": "answer", "stream": True}
        return self

    def remote(self, request: Any) -> Response:
        self.requests.append(request)
        return Response(self, self._answers[min(len(self.requests), len(self._answers)) - 1](request))

    def broadcast(self, method: str, request: Any) -> Handle:
        assert method == "whole"
        self.requests.append(request)
        return self

    async def results_async(self, *, timeout_s: float, return_exceptions: bool) -> list[Any]:
        assert return_exceptions
        return self._whole


class Response:
    def __init__(self, handle: Handle, pieces: AsyncIterator[Any]) -> None:
        self._handle = handle
        self._pieces = pieces

    def __aiter__(self) -> AsyncIterator[Any]:
        return self._pieces

    def cancel(self) -> None:
        self._handle.num_cancelled += 1


def piece(body: bytes, *, status: int = 0, is_last: bool = False) -> Any:
    from mooli.ray.forwarding import Piece

    headers = ((b"content-type", b"text/event-stream"), (b"x-request-id", b"r")) if status else ()
    return Piece(status, headers, body, is_last)


def saying(*bodies: bytes, status: int = 200, end: Exception | None = None) -> Answer:
    """Says so, and then ends well or with an error."""

    async def answer(request: Any) -> AsyncIterator[Any]:
        for i, body in enumerate(bodies):
            yield piece(body, status=0 if i else status, is_last=end is None and i == len(bodies) - 1)
        if end is not None:
            raise end

    return answer


async def silent(request: Any) -> AsyncIterator[Any]:
    await asyncio.Event().wait()
    yield


def died() -> Exception:
    from ray.exceptions import ActorDiedError

    return ActorDiedError()


def gone(name: str) -> Exception:
    from mooli.ray.forwarding import EngineGoneError

    return EngineGoneError(name, "it was killed")


class Client:
    """One request. Its body may come in parts, or never to its end."""

    def __init__(self, *parts: bytes, ends: bool = True) -> None:
        self._parts = list(parts)
        self._ends = ends
        self.left = asyncio.Event()
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.body = b""
        self.is_complete = False
        self.begun = asyncio.Event()

    async def receive(self) -> dict[str, Any]:
        if self._parts:
            part = self._parts.pop(0)
            return {"type": "http.request", "body": part, "more_body": bool(self._parts) or not self._ends}
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict[str, Any]) -> None:
        assert not self.is_complete
        if message["type"] == "http.response.start":
            assert not self.status
            self.status, self.headers = message["status"], dict(message["headers"])
            return
        assert self.status
        self.body += message["body"]
        self.is_complete = not message["more_body"]
        self.begun.set()

    @property
    def error(self) -> dict[str, Any]:
        return json.loads(self.body)["error"]


def gateway(*handles: Handle, names: tuple[str, ...] = ("one", "two"), **config: Any) -> Any:
    from mooli.ray.ingress import Gateway
    from mooli.server.config import ServerConfig

    return Gateway(ServerConfig.from_kwargs(**config), 64, dict(zip(names, handles, strict=False)))


def scope(path: str, method: str = "POST", **headers: str) -> dict[str, Any]:
    pairs = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return {
        "type": "http",
        "method": method,
        "path": path,
        "root_path": "",
        "query_string": b"",
        "headers": pairs,
        "client": ("10.0.0.1", 5),
        "state": {"not": object()},
    }


def ask(
    app: Any, path: str, body: Any = None, *, method: str = "POST", client: Client | None = None, **headers: str
) -> Client:
    async def run() -> Client:
        asking = client or Client(b"" if body is None else json.dumps(body).encode())
        await asyncio.wait_for(app(scope(path, method, **headers), asking.receive, asking.send), LIMIT_S)
        return asking

    return asyncio.run(run())


# -- passing on --------------------------------------------------------------------------------------------------------
def test_an_answer_is_passed_on_as_it_comes():
    handle = Handle(saying(b"data: 1\n\n", b"data: 2\n\n"))
    client = ask(gateway(handle), "/generate", {"text": "Hello", "cache_salt": "s"}, x_session_id="conversation")
    assert (client.status, client.body, client.is_complete) == (200, b"data: 1\n\ndata: 2\n\n", True)
    assert b"x-request-id" not in client.headers
    (request,) = handle.requests
    assert json.loads(request.body) == {"text": "Hello", "cache_salt": "s"}
    assert request.heads.session == "conversation"
    assert request.scope["client"] == ("10.0.0.1", 5)
    assert "state" not in request.scope
    assert handle.num_cancelled == 0


def test_what_generates_nothing_has_no_heads():
    handle = Handle(saying(b"[]"))
    ask(gateway(handle), "/tokenize", {"prompt": "Hello"})
    ask(gateway(handle), "/model_info", method="GET")
    ask(gateway(handle), "/nowhere", method="GET")
    assert [request.heads for request in handle.requests] == [None] * 3


def test_a_model_is_found_by_its_name():
    one, two = Handle(saying(b"1")), Handle(saying(b"2"))
    app = gateway(one, two)
    assert ask(app, "/v1/completions", {"model": "two", "prompt": "x"}).body == b"2"
    assert ask(app, "/api/generate", {"model": "two:latest", "prompt": "x"}).body == b"2"
    assert ask(app, "/v1/models/two", method="GET").body == b"2"
    assert ask(app, "/v1/completions", {"prompt": "x"}).body == b"1"
    refused = ask(app, "/v1/completions", {"model": "three", "prompt": "x"})
    assert (refused.status, refused.error["code"]) == (404, "model_not_found")
    assert "'one', 'two'" in refused.error["message"]


def test_a_replica_may_be_asked_by_its_name():
    handle = Handle(saying(b"1"))
    assert ask(gateway(handle), "/v1/loads", method="GET", x_mooli_replica="r7").body == b"1"
    assert handle.requests[0].wanted == "r7"


def test_one_model_takes_every_name():
    assert ask(gateway(Handle(saying(b"1"))), "/v1/completions", {"model": "any", "prompt": "x"}).body == b"1"


def test_a_body_that_comes_in_parts_is_read_whole():
    handle = Handle(saying(b"1"))
    ask(gateway(handle), "/generate", client=Client(b'{"te', b'xt": "a"}'))
    assert handle.requests[0].body == b'{"text": "a"}'


@pytest.mark.parametrize(
    ("client", "config", "status"),
    [
        (lambda: Client(b"x" * 2000), {"max_body_bytes": 1024}, 413),
        (lambda: Client(b'{"text', ends=False), {"read_timeout": 0.01}, 408),
    ],
    ids=["long", "late"],
)
def test_a_body_that_is_too_long_or_too_late(client, config, status):
    handle = Handle(saying(b"1"))
    answer = ask(gateway(handle, **config), "/generate", client=client())
    assert answer.status == status
    assert handle.requests == []


def test_no_body_is_read_for_who_has_no_key():
    handle = Handle(saying(b"{}", status=401))
    app = gateway(handle, api_key="secret")
    assert ask(app, "/generate", client=Client(b"x", ends=False)).status == 401
    assert handle.requests[0].body == b""
    ask(app, "/generate", {"text": "a"}, authorization="Bearer secret")
    assert handle.requests[1].body == b'{"text": "a"}'


def test_the_memory_for_bodies_has_a_bound():
    from mooli.server.app import LONG_BODIES

    async def run() -> list[int]:
        app = gateway(Handle(silent), max_body_bytes=1024)
        clients = [Client(b"x" * 1024, ends=False) for _ in range(LONG_BODIES)]
        waiting = [asyncio.ensure_future(app(scope("/generate"), each.receive, each.send)) for each in clients]
        await asyncio.sleep(0)
        one_more = Client(b"x")
        await app(scope("/generate"), one_more.receive, one_more.send)
        for each in clients:
            each.left.set()
        await asyncio.gather(*waiting)
        return [one_more.status, *(each.status for each in clients)]

    assert asyncio.run(run()) == [503, *[0] * LONG_BODIES]


# -- once more ---------------------------------------------------------------------------------------------------------
def test_what_had_not_begun_is_sent_again():
    handle = Handle(saying(end=died()), saying(end=gone("r1")), saying(end=gone("r2")), saying(b"done"))
    client = ask(gateway(handle), "/generate", {"text": "Hello"})
    assert (client.status, client.body) == (200, b"done")
    assert [(each.avoid, each.failed) for each in handle.requests] == [
        ((), ()),
        ((), ()),
        (("r1",), ("r1",)),
        (("r1", "r2"), ("r2",)),
    ]


@pytest.mark.parametrize(
    ("path", "body", "end"),
    [
        ("/generate", {"text": "a"}, b"data: [DONE]\n\n"),
        ("/v1/chat/completions", {"messages": []}, b"data: [DONE]\n\n"),
        ("/v1/messages", {"messages": []}, b"}\n\n"),
        ("/api/chat", {"messages": []}, b"}\n"),
    ],
)
def test_what_had_begun_ends_with_the_cause_in_the_words_of_its_api(path, body, end):
    handle = Handle(saying(b"data: 1\n\n", end=died()))
    client = ask(gateway(handle), path, body)
    assert len(handle.requests) == 1
    assert client.status == 200
    assert client.is_complete
    assert b"The replica that was answering has ended" in client.body
    assert client.body.endswith(end)


def test_a_request_that_kills_every_replica_is_given_up():
    from mooli.ray.ingress import MOST_ATTEMPTS

    handle = Handle(saying(end=died()))
    client = ask(gateway(handle), "/generate", {"text": "Hello"})
    assert len(handle.requests) == MOST_ATTEMPTS
    assert client.status == 503
    assert "have ended while they had this request" in client.error["message"]


def test_a_fault_is_told_to_nobody_and_not_tried_again():
    handle = Handle(saying(end=ValueError("a secret")))
    client = ask(gateway(handle), "/generate", {"text": "Hello"})
    assert len(handle.requests) == 1
    assert client.status == 500
    assert b"secret" not in client.body


def test_a_deployment_that_is_not_there():
    from ray.serve.exceptions import RayServeException

    client = ask(gateway(Handle(saying(end=RayServeException("gone")))), "/generate", {"text": "Hello"})
    assert client.status == 503
    assert client.headers[b"retry-after"] == b"1"


# -- clients that leave ------------------------------------------------------------------------------------------------
def test_a_client_that_leaves_ends_the_call():
    async def run() -> tuple[Handle, Client]:
        async def one_and_no_more(request: Any) -> AsyncIterator[Any]:
            yield piece(b"data: 1\n\n", status=200)
            await asyncio.Event().wait()

        handle, client = Handle(one_and_no_more), Client(b'{"text": "a"}')
        asking = asyncio.ensure_future(gateway(handle)(scope("/generate"), client.receive, client.send))
        await client.begun.wait()
        client.left.set()
        await asyncio.wait_for(asking, LIMIT_S)
        return handle, client

    handle, client = asyncio.run(run())
    assert handle.num_cancelled == 1
    assert not client.is_complete


def test_a_request_that_no_replica_takes_in_time_is_told_so():
    handle = Handle(silent)
    client = ask(gateway(handle, request_timeout=0.01), "/generate", {"text": "a"})
    assert client.status == 504
    assert handle.num_cancelled == 1


# -- all replicas ------------------------------------------------------------------------------------------------------
def test_what_is_told_to_all_is_done_only_if_all_have_done_it():
    from mooli.ray.forwarding import Whole

    done = Whole("r1", 200, ((b"content-type", b"text/plain"),), b"Cache flushed.\n")
    assert ask(gateway(Handle(whole=[done, done])), "/flush_cache").body == b"Cache flushed.\n"
    client = ask(gateway(Handle(whole=[done, died()])), "/flush_cache")
    assert client.status == 503
    assert "1 replicas have not said" in client.error["message"]
    assert ask(gateway(Handle(whole=[died()])), "/metrics", method="GET").status == 503
    assert ask(gateway(Handle(whole=[died(), done])), "/health", method="GET").status == 200


def test_lifespans_begin_and_end():
    async def run() -> list[str]:
        kinds, said = ["lifespan.startup", "lifespan.shutdown"], []

        async def receive() -> dict[str, Any]:
            return {"type": kinds.pop(0)}

        async def send(message: dict[str, Any]) -> None:
            said.append(message["type"])

        await gateway(Handle())({"type": "lifespan"}, receive, send)
        return said

    assert asyncio.run(run()) == ["lifespan.startup.complete", "lifespan.shutdown.complete"]


# -- the application ---------------------------------------------------------------------------------------------------
def test_the_example_can_be_built():
    from pathlib import Path

    import yaml
    from ray.serve.schema import ServeDeploySchema

    import mooli.ray

    path = Path(__file__).resolve().parents[2] / "deploy" / "ray" / "serve.yaml"
    schema = ServeDeploySchema.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    (application,) = schema.applications
    assert application.import_path == "mooli.ray:app"
    built = mooli.ray.app(application.args)
    ingress = built._bound_deployment
    engines = {bound._bound_deployment.name: bound._bound_deployment for bound in ingress.init_args[2].values()}
    assert {each.name for each in application.deployments} <= engines.keys() == {"engine-small", "engine-large"}
    small, large = engines["engine-small"], engines["engine-large"]
    assert (small.num_replicas, small.ray_actor_options["num_cpus"]) == (2, 4)
    assert large.ray_actor_options["resources"] == {"NPU": 1}
    assert large._deployment_config.autoscaling_config.max_replicas == 4
    for each in (small, large):
        assert each.max_ongoing_requests > 1000
        assert each._deployment_config.graceful_shutdown_timeout_s > 120


def test_a_replica_without_a_number_of_threads_does_not_take_the_machine():
    import mooli.ray

    built = mooli.ray.app({"model_path": "demo", "cpus": "2"})
    (engine,) = built._bound_deployment.init_args[2].values()
    assert engine._bound_deployment.init_args[1].num_threads == 2
