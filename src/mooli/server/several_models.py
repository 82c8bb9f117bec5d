"""Several models under one address: `mooli serve --models a,b,c`.

Owns which request goes to which model, what is answered without any (lists, health, metrics, the page), and how an
engine comes up for one. A model has an engine process of its own and every route of a server; this only chooses. When
models come and go is `mooli.server.model_set`'s business. Never answers a generation itself.

A request names its model in `model`, in the body or the query. One that names none gets the model that is loaded, and
where several or none are, the first of the list.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast
from urllib.parse import parse_qsl

from prometheus_client import CONTENT_TYPE_LATEST

from mooli.config import EngineConfig
from mooli.errors import BusyError, ConfigError, MooliError, OutOfMemoryError
from mooli.formats.gguf_names import part_paths
from mooli.link.client import EngineClient
from mooli.server import page_files
from mooli.server.app import API_ROUTES, LONG_BODIES, ROUTES, make_route, protected
from mooli.server.config import ServerConfig
from mooli.server.early_body import ClientLeftError, EarlyBodies, again, model_of
from mooli.server.errors import error_reply, problem_of
from mooli.server.http import Endpoint, RouteTable
from mooli.server.json_body import BodyRoom
from mooli.server.keys import KeyRing
from mooli.server.metrics import HttpMetrics
from mooli.server.model_set import ModelSet
from mooli.server.ollama_models import running_entry, tags_entry
from mooli.server.openai_models import anthropic_card, card, wants_anthropic
from mooli.server.routing import Access, App, Dialect, HttpError, Incoming, Receive, Reply, Route, Scope, Send
from mooli.server.service import Service
from mooli.server.traffic import TrafficLog


def named_models(models: str, engine_config: EngineConfig) -> dict[str, EngineConfig]:
    """What --models says, by the name of each: MODEL or NAME=MODEL with commas between, or a folder with GGUF files and
    folders of models. Raises ConfigError where it says nothing, or a name twice."""
    folder = Path(models).expanduser()
    if folder.is_dir():
        paths = {
            entry.stem if entry.is_file() else entry.name: str(entry)
            for entry in sorted(folder.iterdir())
            if (entry.is_file() and entry.suffix == ".gguf" and entry == part_paths(entry)[0])
            or (entry / "config.json").is_file()
        }
    else:
        given = [item.strip() for item in models.split(",") if item.strip()]
        pairs = [
            (name.strip(), path.strip()) if is_named else (item, item)
            for item in given
            for name, is_named, path in [item.partition("=")]
        ]
        paths = dict(pairs)
        if len(paths) < len(pairs) or not all(name and path for name, path in pairs):
            raise ConfigError(f"--models {models}: each model needs a name of its own, as in small=demo,other=qwen3:4b")
    if not paths:
        raise ConfigError(f"--models {models}: names with commas between, or a folder with models in it, are needed")
    # Served under the name it is asked for by. A short name may have a colon, which a name that is given may not.
    return {
        name: replace(engine_config, model_path=path, served_model_name=None if name == path else name)
        for name, path in paths.items()
    }


Start = Callable[[str], Awaitable[tuple[Service, EngineClient]]]


class LoadedModel:
    """One model that can be used. watch: sees that its engine lives, until it is cancelled."""

    def __init__(self, service: Service, engine: EngineClient, watch: Awaitable[None]) -> None:
        self.service = service
        self.room = BodyRoom(LONG_BODIES * service.config.max_body_bytes)
        self._engine = engine
        self._watching = asyncio.ensure_future(watch)

    @property
    def is_alive(self) -> bool:
        return self._engine.is_alive

    async def close(self) -> None:
        self._watching.cancel()
        await self._engine.close()


@dataclass(slots=True)
class _Host:
    """What routes work with that need no model: of `Service`, as much as they and the layers before them look at."""

    config: ServerConfig
    keys: KeyRing
    models: ModelSet[LoadedModel]
    started_at: float
    metrics: HttpMetrics = field(default_factory=HttpMetrics)
    is_draining: bool = False


class SeveralModels:
    """See `mooli.server.http_server.Served`. start: brings up the engine of a name, with its text side."""

    def __init__(
        self,
        config: ServerConfig,
        keys: KeyRing,
        names: Sequence[str],
        start: Start,
        watch: Callable[[Service, EngineClient], Awaitable[None]],
    ) -> None:
        """Called in the event loop."""

        async def load(name: str) -> LoadedModel:
            service, engine = await start(name)
            service.is_draining = self._host.is_draining
            return LoadedModel(service, engine, watch(service, engine))

        self.config = config
        self.models: ModelSet[LoadedModel] = ModelSet(
            tuple(names), load, idle_s=config.model_idle_timeout or None, most=config.max_loaded_models
        )
        self.died: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._host = _Host(config, keys, self.models, time.time())
        self.traffic = TrafficLog(self._host.metrics, config)
        bodies, service = EarlyBodies(config), cast(Service, self._host)
        own = {route.path for route in OWN_ROUTES}
        room = BodyRoom(LONG_BODIES * config.max_body_bytes)
        routes: list[tuple[Route, App]] = [(route, Endpoint(service, route, room)) for route in OWN_ROUTES]
        routes += [(route, _Endpoint(self._host, bodies, route)) for route in ROUTES if route.path not in own]
        self.app: App = protected(RouteTable(routes), service)

    @property
    def num_active(self) -> int:
        return sum(model.service.num_active for model in self.models.loaded.values())

    def begin(self) -> None:
        pass

    def drain(self) -> None:
        self._host.is_draining = True
        for model in self.models.loaded.values():
            model.service.is_draining = True

    async def stop(self) -> None:
        pass

    def abort_all(self, message: str) -> None:
        for model in self.models.loaded.values():
            client = model.service.client
            client.abort(client.open_rids, message)

    async def watch(self) -> None:
        await self.models.end_idle_ones()

    async def close(self) -> None:
        await self.models.close()


class _Endpoint:
    """The ASGI application of one route of every model: behind all layers, in front of the model's own."""

    def __init__(self, host: _Host, bodies: EarlyBodies, route: Route) -> None:
        self._models = host.models
        self._bodies = bodies
        self._route = route

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = self._route
        try:
            async with contextlib.AsyncExitStack() as leases:
                with self._bodies.share() as share:
                    body = b""
                    if route.body is not None:
                        body = await self._bodies.read(scope, receive, share)
                        receive = again(body, receive)
                    name = self._name_of(scope, body)
                    del body
                    lease = self._watched(name) if route.is_watching else self._lease(name)
                    model = await leases.enter_async_context(lease)
                # From here the body counts in the model's own room, and is gone as soon as it is read.
                await Endpoint(model.service, route, model.room)(scope, receive, send)
        except ClientLeftError:
            return
        except (HttpError, BusyError) as exc:
            for message in error_reply(route.dialect, problem_of(exc, route.dialect, route.names)):
                await send(message)

    @contextlib.asynccontextmanager
    async def _lease(self, name: str) -> AsyncIterator[LoadedModel]:
        """Raises HttpError (503) for a model that cannot be loaded, BusyError where there is no room for it now."""
        async with contextlib.AsyncExitStack() as stack:
            try:
                model = await stack.enter_async_context(self._models.lease(name))
            except BusyError:
                raise
            except (MooliError, OSError) as exc:
                what = "fits into no memory here" if isinstance(exc, OutOfMemoryError) else "cannot be loaded"
                raise HttpError(503, f"The model {name!r} {what}: {exc}", code="model_not_loaded") from exc
            yield model

    @contextlib.asynccontextmanager
    async def _watched(self, name: str) -> AsyncIterator[LoadedModel]:
        """A model as long as others keep it. Raises HttpError (503) for one that is not loaded."""
        model = self._models.loaded.get(name)
        if model is None:
            raise HttpError(503, f"The model {name!r} is not loaded: there is nothing to see", code="model_not_loaded")
        yield model

    def _name_of(self, scope: Scope, body: bytes) -> str:
        query = dict(parse_qsl(scope.get("query_string", b"").decode("latin-1")))
        wanted = (model_of(body) or query.get("model", "")).removesuffix(":latest")
        names = self._models.names
        if wanted and wanted not in names:
            message = f"The model {wanted[:200]!r} does not exist; this server has {_listed(names)}"
            raise HttpError(404, message, param="model", code="model_not_found")
        loaded = list(self._models.loaded)
        return wanted or (loaded[0] if len(loaded) == 1 else names[0])


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names))


# -- routes without a model --------------------------------------------------------------------------------------------


def _host(service: Service) -> _Host:
    return cast(_Host, service)


async def _list_models(service: Service, request: Incoming) -> Reply:
    host = _host(service)
    make = anthropic_card if wants_anthropic(request) else card
    cards = [make(*_known(host, name)) for name in host.models.names]
    if not wants_anthropic(request):
        return Reply({"object": "list", "data": cards})
    return Reply({"data": cards, "has_more": False, "first_id": cards[0]["id"], "last_id": cards[-1]["id"]})


async def _show_model(service: Service, request: Incoming) -> Reply:
    host, name = _host(service), request.path_params["model_id"]
    if name not in host.models.names:
        message = f"The model {name[:200]!r} does not exist; this server has {_listed(host.models.names)}"
        raise HttpError(404, message, param="model", code="model_not_found")
    return Reply((anthropic_card if wants_anthropic(request) else card)(*_known(host, name)))


def _known(host: _Host, name: str) -> tuple[str, int, Service | None]:
    """What a card is made of: the name, since when, and the service if the model is loaded."""
    loaded = host.models.loaded.get(name)
    return name, int(host.started_at), None if loaded is None else loaded.service


async def _tags(service: Service, request: Incoming) -> Reply:
    host = _host(service)
    entries: list[Mapping[str, Any]] = []
    for name in host.models.names:
        loaded = host.models.loaded.get(name)
        entries.append({"name": name, "model": name} if loaded is None else await tags_entry(loaded.service))
    return Reply({"models": entries})


async def _running(service: Service, request: Incoming) -> Reply:
    return Reply({"models": [running_entry(model.service) for model in _host(service).models.loaded.values()]})


async def _health(service: Service, request: Incoming) -> Reply:
    """Well as long as it takes requests: a model whose engine has died is loaded again."""
    host = _host(service)
    if host.is_draining:
        return Reply(b"The server is shutting down.", status=503, media_type="text/plain; charset=utf-8")
    return Reply(b"", media_type="text/plain; charset=utf-8")


async def _metrics(service: Service, request: Incoming) -> Reply:
    """Those of HTTP, and of all that are loaded: samples of one family together, each with the name of its model. What
    has no such name is counted together: Prometheus takes a sample once."""
    families: dict[bytes, tuple[list[bytes], dict[bytes, bytes]]] = {}
    host = _host(service)
    for metrics in (host.metrics, *(model.service.metrics for model in host.models.loaded.values())):
        head: list[bytes] = []
        samples: dict[bytes, bytes] = {}
        for line in metrics.render().splitlines():
            if line.startswith(b"# HELP "):
                head, samples = families.setdefault(line.split(b" ", 3)[2], ([], {}))
            if not line.startswith(b"#"):
                name, _, value = line.rpartition(b" ")
                samples[name] = value if name not in samples else repr(float(samples[name]) + float(value)).encode()
            elif line not in head:
                head.append(line)
    lines = [
        line
        for head, samples in families.values()
        for line in (*head, *(name + b" " + value for name, value in samples.items()))
    ]
    body = b"".join(line + b"\n" for line in lines)
    return Reply(body, media_type=CONTENT_TYPE_LATEST)


def _get(path: str, handler: Any, summary: str, *, dialect: Dialect, access: Access = Access.KEY) -> Route:
    return Route(path=path, methods=("GET",), handler=handler, access=access, dialect=dialect, summary=summary)


OWN_ROUTES: tuple[Route, ...] = (
    _get("/v1/models", _list_models, "The models that may be asked for", dialect=Dialect.OPENAI),
    _get("/v1/models/{model_id:path}", _show_model, "One model, by its name", dialect=Dialect.OPENAI),
    _get("/api/tags", _tags, "The models, in Ollama's words", dialect=Dialect.OLLAMA),
    _get("/api/ps", _running, "The models that are loaded", dialect=Dialect.OLLAMA),
    _get(
        "/metrics",
        _metrics,
        "Metrics of HTTP, and of the models that are loaded",
        dialect=Dialect.NATIVE,
        access=Access.OPEN,
    ),
    *(
        _get(path, _health, "200 while requests are taken", dialect=Dialect.NATIVE, access=Access.OPEN)
        for path in ("/health", "/health_generate", "/health/live", "/health/ready", "/ready", "/ping")
    ),
    *(route for route in API_ROUTES if route.path == "/"),
    *page_files.ROUTES,
    make_route(API_ROUTES),
)
