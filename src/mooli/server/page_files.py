"""GET / and /docs: the page of this server for a browser, and the files it is made of.

Owns which files those are, under which addresses, and what a browser may do with them: run and show nothing that does
not come from here. The files tell nothing of this server; the page asks the API for everything else, as any client
does. Never builds anything: they are sent as they lie in the package.

An address has the digest of all files in it, so that a browser keeps them until a newer version has others.

Sources: W3C Content Security Policy 3 and Trusted Types; Fetch standard; RFC 8246 (immutable).
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources

from mooli.server.routing import Access, Dialect, HttpError, Incoming, Reply, Route
from mooli.server.service import Service

_MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}

_POLICY = "; ".join(
    (
        "default-src 'none'", "script-src 'self'", "style-src 'self'", "img-src 'self'", "connect-src 'self'",
        "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'", "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)  # fmt: skip

_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}

_WORD = b"Mooli is running"


@dataclass(frozen=True, slots=True)
class PageFiles:
    """Content by name. version: a digest of all."""

    files: Mapping[str, bytes]
    version: str


@functools.cache
def page_files() -> PageFiles:
    """Read once: the files of a package that runs do not change."""
    folder = resources.files("mooli.server") / "page"
    found = {item.name: item.read_bytes() for item in folder.iterdir() if _media_type(item.name) is not None}
    digest = hashlib.sha256()
    for name in sorted(found):
        digest.update(name.encode() + b"\0" + hashlib.sha256(found[name]).digest())
    version = digest.hexdigest()[:16]
    mark = b"page/" + version.encode() + b"/"
    return PageFiles(
        {
            name: content.replace(b"page/@/", mark) if name.endswith(".html") else content
            for name, content in found.items()
        },
        version,
    )


def _media_type(name: str) -> str | None:
    _, dot, ending = name.rpartition(".")
    return _MEDIA_TYPES.get(dot + ending)


async def show_front(service: Service, request: Incoming) -> Reply:
    """The page for who takes HTML; a word that the server runs for all others, as clients of other servers expect."""
    if service.config.no_page or "text/html" not in request.headers.get("accept", ""):
        return Reply(_WORD, media_type="text/plain; charset=utf-8", headers={"Vary": "Accept"})
    return _document("index.html")


async def show_docs(service: Service, request: Incoming) -> Reply:
    _check_is_on(service)
    return _document("docs.html")


async def show_file(service: Service, request: Incoming) -> Reply:
    """Raises HttpError (404)."""
    _check_is_on(service)
    page = page_files()
    name = request.path_params["name"]
    content = page.files.get(name)
    if content is None or name.endswith(".html") or request.path_params["version"] != page.version:
        raise HttpError(404, f"The page has no {name[:100]!r} of this version: load it again", code="unknown_url")
    media_type = _media_type(name) or "application/octet-stream"
    headers = {**_HEADERS, "Cache-Control": "public, max-age=31536000, immutable"}
    return Reply(content, media_type=media_type, headers=headers)


def _document(name: str) -> Reply:
    headers = {**_HEADERS, "Cache-Control": "no-cache", "Vary": "Accept"}
    return Reply(page_files().files[name], media_type=_MEDIA_TYPES[".html"], headers=headers)


def _check_is_on(service: Service) -> None:
    if service.config.no_page:
        raise HttpError(404, "The page is turned off here (--no-page).", code="unknown_url")


ROUTES = (
    Route(
        path="/docs",
        methods=("GET",),
        handler=show_docs,
        access=Access.OPEN,
        dialect=Dialect.OPENAI,
        summary="All routes, for a browser",
        is_page=True,
    ),
    Route(
        path="/page/{version}/{name}",
        methods=("GET",),
        handler=show_file,
        access=Access.OPEN,
        dialect=Dialect.OPENAI,
        summary="A file of the page",
        is_page=True,
    ),
)
"""Beside `/`, which `mooli.server.native_info` has."""
