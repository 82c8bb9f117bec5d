"""/v1/files: what clients send for batches, and what batches have written.

Owns the reading of an upload, piece by piece onto the disk, and the shapes of files. What is kept, for whom and how
much of it is `mooli.server.file_store`'s. Without a store (`--batch-dir`) all of it is answered by saying so. Never
reads what is in a file.

Sources: OpenAI API reference, files; RFC 7578 (multipart/form-data).
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, BinaryIO

from mooli.server.batch_desk import BatchDesk
from mooli.server.file_store import FileStore, StoredFile, Upload
from mooli.server.routing import Access, Client, Dialect, Download, HttpError, Incoming, Reply, Route
from mooli.server.service import Service

INPUT = "batch"
"""The purpose of what a client sends."""

DAY_S = 24 * 3600
LEAST_EXPIRY_S, MOST_EXPIRY_S = 3600, 30 * DAY_S
"""After which a file may be made to expire. What a client sends expires after the longest if it does not say."""

MOST_LISTED = 10_000

MAX_FIELDS = 16
MAX_FIELD_BYTES = 4096
MAX_NAME_CHARS = 255
FORM_BYTES = 2**17
"""Of an upload, beside its file."""

PIECE_BYTES = 2**20
"""So much is written, or read, at a time."""

NOT_HERE = "this server keeps no files: have it started with --batch-dir FOLDER"


def desk_of(service: Service) -> BatchDesk:
    """Raises HttpError (404) where nothing is kept."""
    if service.batches is None:
        raise HttpError(404, f"There are no files and batches here: {NOT_HERE}.", code="not_enabled")
    return service.batches


def store_of(service: Service) -> FileStore:
    """Raises HttpError (404) where nothing is kept."""
    return desk_of(service).files


def owner_of(client: Client) -> str:
    """Who finds a file again: the keys of one tenant, as with what is cached."""
    return client.caller.tenant


def file_object(stored: StoredFile) -> dict[str, Any]:
    """As the API shows it."""
    return {
        "id": stored.id,
        "object": "file",
        "bytes": stored.num_bytes,
        "created_at": int(stored.created_at),
        "expires_at": None if stored.expires_at is None else int(stored.expires_at),
        "filename": stored.filename,
        "purpose": stored.purpose,
        "status": "processed",
    }


# -- one comes ---------------------------------------------------------------------------------------------------------
async def create_file(service: Service, request: Incoming) -> Reply:
    """POST /v1/files. Raises HttpError, StorageError."""
    store, stream = store_of(service), request.stream
    if stream is None:
        raise HttpError(400, "The body is missing: send the file as multipart/form-data.")
    boundary = _boundary(request.headers)
    most = store.limits.max_file_bytes + FORM_BYTES
    declared = request.headers.get("content-length", "")
    if declared.isascii() and declared.isdigit() and int(declared) > most:
        raise HttpError(
            413, f"The file is larger than the {store.limits.max_file_bytes} bytes that are taken here.", param="file"
        )
    with store.begin(owner_of(request.client)) as upload:
        form = _Form(boundary, upload)
        waiting, num_bytes = bytearray(), 0
        async for piece in stream:
            num_bytes += len(piece)
            if num_bytes > most:
                raise HttpError(413, f"The body is larger than the {most} bytes that are taken here.")
            upload.take(len(piece))
            waiting += piece
            if len(waiting) >= PIECE_BYTES:
                await asyncio.to_thread(form.feed, waiting)
                waiting = bytearray()
        await asyncio.to_thread(form.feed, waiting)
        purpose, expires_after_s = form.end()
        await asyncio.to_thread(upload.sync)
        stored = await upload.keep(filename=form.filename, purpose=purpose, expires_after_s=expires_after_s)
    return Reply(file_object(stored))


def _boundary(headers: Mapping[str, str]) -> bytes:
    from python_multipart.multipart import parse_options_header  # not for servers that take no files

    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity":
        raise HttpError(415, f"A body with the content encoding {encoding!r} is not read here: send it as it is.")
    media_type, options = parse_options_header(headers.get("content-type"))
    boundary = options.get(b"boundary", b"")
    if media_type != b"multipart/form-data" or not 0 < len(boundary) <= 200:
        raise HttpError(400, "The content type must be multipart/form-data with a boundary, as forms with files have.")
    return boundary


class _Form:
    """The parts of an upload. `feed` may run on another thread. filename: of its file."""

    def __init__(self, boundary: bytes, upload: Upload) -> None:
        from python_multipart.multipart import MultipartParser

        self.filename = ""
        self._upload = upload
        self._fields: dict[str, bytes] = {}
        self._name: str | None = None
        """Of the part that comes; "file" for the file."""
        self._header, self._value = bytearray(), bytearray()
        self._disposition = b""
        self._has_ended = False
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": self._take_header,
                "on_header_value": self._take_value,
                "on_header_end": self._end_header,
                "on_headers_finished": self._end_headers,
                "on_part_data": self._take_data,
                "on_end": self._end,
            },
        )

    def feed(self, data: bytearray) -> None:
        """Raises HttpError, StorageError."""
        from python_multipart.exceptions import FormParserError

        try:
            self._parser.write(bytes(data))
        except FormParserError as exc:
            raise HttpError(400, f"The body is not a form as multipart/form-data has it: {exc}") from None

    def end(self) -> tuple[str, float]:
        """Purpose, and seconds until the file expires. Raises HttpError."""
        if not self._has_ended:
            raise HttpError(400, "The body ends in the middle of the form.")
        if "file" not in self._fields:
            raise HttpError(
                400, "file is missing: send the file as a part of that name, with a filename.", param="file"
            )
        purpose = self._text("purpose")
        if purpose != INPUT:
            raise HttpError(
                400, f"purpose={purpose[:80]!r} is not supported: files are taken for {INPUT!r} alone", param="purpose"
            )
        anchor = self._text("expires_after[anchor]")
        seconds = self._text("expires_after[seconds]")
        return purpose, expiry_s({"anchor": anchor, "seconds": seconds}) if anchor or seconds else MOST_EXPIRY_S

    def _text(self, name: str) -> str:
        return self._fields.get(name, b"").decode("utf-8", "replace")

    # -- what the parser finds --
    def _begin(self) -> None:
        self._name, self._disposition = None, b""
        self._header, self._value = bytearray(), bytearray()

    def _take_header(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _take_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _end_header(self) -> None:
        if bytes(self._header).lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._header, self._value = bytearray(), bytearray()

    def _end_headers(self) -> None:
        from python_multipart.multipart import parse_options_header

        _, options = parse_options_header(self._disposition)
        name = options.get(b"name", b"").decode("utf-8", "replace")
        if name == "file" and b"filename" not in options:
            raise HttpError(400, "file must be a file, with a filename.", param="file")
        if name in self._fields:
            raise HttpError(400, f"{name[:80]!r} is there twice.", param=name[:80])
        if len(self._fields) >= MAX_FIELDS:
            raise HttpError(400, f"The form has more than {MAX_FIELDS} parts.")
        self._name = name
        self._fields[name] = b""
        if name == "file":
            given = options[b"filename"].decode("utf-8", "replace")
            self.filename = re.sub(r"[\x00-\x1f\x7f]", "", re.split(r"[/\\]", given)[-1])[:MAX_NAME_CHARS] or "file"

    def _take_data(self, data: bytes, start: int, end: int) -> None:
        if self._name is None:
            return
        if self._name == "file":
            self._upload.write(memoryview(data)[start:end])
            return
        self._fields[self._name] += data[start:end]
        if len(self._fields[self._name]) > MAX_FIELD_BYTES:
            raise HttpError(400, f"{self._name[:80]!r} is longer than {MAX_FIELD_BYTES} bytes.", param=self._name[:80])

    def _end(self) -> None:
        self._has_ended = True


def expiry_s(given: Mapping[str, Any], param: str = "expires_after") -> float:
    """Seconds after which a file expires, of {"anchor": "created_at", "seconds": …}. Raises HttpError."""
    anchor, seconds = given.get("anchor"), str(given.get("seconds"))
    if anchor != "created_at":
        raise HttpError(400, f"{param}.anchor={str(anchor)[:80]!r} must be 'created_at'", param=param)
    if not re.fullmatch("[0-9]{1,8}", seconds) or not LEAST_EXPIRY_S <= int(seconds) <= MOST_EXPIRY_S:
        raise HttpError(
            400,
            f"{param}.seconds={seconds[:80]!r} must be a whole number of {LEAST_EXPIRY_S} … {MOST_EXPIRY_S}",
            param=param,
        )
    return int(seconds)


# -- and is there ------------------------------------------------------------------------------------------------------
def page_of(
    items: Sequence[Any], query: Mapping[str, str], most: int, default: int, id_of: Callable[[Any], str]
) -> tuple[list[Any], bool]:
    """A page of a list: ?after, ?limit; and whether there is more. Raises HttpError."""
    after, limit = query.get("after"), query.get("limit")
    if after:
        place = next((index for index, item in enumerate(items) if id_of(item) == after), None)
        if place is None:
            raise HttpError(400, f"after={after[:80]!r} is not there.", param="after")
        items = items[place + 1 :]
    if limit is not None and (not re.fullmatch("[0-9]{1,8}", limit) or not 1 <= int(limit) <= most):
        raise HttpError(400, f"limit={limit[:80]!r} must be a number of 1 … {most}.", param="limit")
    size = default if limit is None else int(limit)
    return list(items[:size]), len(items) > size


def list_reply(shown: Sequence[Mapping[str, Any]], has_more: bool) -> Reply:
    """A page as the API shows it."""
    ids = [item["id"] for item in shown] or [None]
    return Reply({"object": "list", "data": shown, "first_id": ids[0], "last_id": ids[-1], "has_more": has_more})


async def list_files(service: Service, request: Incoming) -> Reply:
    """GET /v1/files: ?purpose, ?order, ?after, ?limit. Raises HttpError."""
    files = store_of(service).of(owner_of(request.client))
    order, purpose = request.query.get("order", "desc"), request.query.get("purpose")
    if order not in ("asc", "desc"):
        raise HttpError(400, f"order={order[:80]!r} must be asc or desc.", param="order")
    if order == "desc":
        files.reverse()
    wanted = [stored for stored in files if purpose in (None, stored.purpose)]
    page, has_more = page_of(wanted, request.query, MOST_LISTED, MOST_LISTED, lambda stored: stored.id)
    return list_reply([file_object(stored) for stored in page], has_more)


def found_file(service: Service, client: Client, file_id: str, *, status: int = 404, param: str = "id") -> StoredFile:
    """Raises HttpError for one that is not there."""
    stored = store_of(service).get(owner_of(client), file_id)
    if stored is None:
        raise HttpError(status, f"No such File object: {file_id[:80]!r}", param=param)
    return stored


async def retrieve_file(service: Service, request: Incoming) -> Reply:
    """GET /v1/files/{id}. Raises HttpError (404)."""
    return Reply(file_object(found_file(service, request.client, request.path_params["file_id"])))


async def file_content(service: Service, request: Incoming) -> Download:
    """GET /v1/files/{id}/content. Raises HttpError (404)."""
    stored = found_file(service, request.client, request.path_params["file_id"])
    file = await asyncio.to_thread(store_of(service).path_of(stored.id).open, "rb")
    return Download(_Pieces(file, stored.num_bytes), stored.num_bytes)


class _Pieces:
    """The bytes of an open file, which is closed with it."""

    def __init__(self, file: BinaryIO, num_bytes: int) -> None:
        self._file = file
        self._left = num_bytes

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        if not self._left:
            raise StopAsyncIteration
        piece = await asyncio.to_thread(self._file.read, min(self._left, PIECE_BYTES))
        if not piece:
            raise OSError(f"{self._file.name} has become shorter")
        self._left -= len(piece)
        return piece

    async def aclose(self) -> None:
        self._file.close()


async def delete_file(service: Service, request: Incoming) -> Reply:
    """DELETE /v1/files/{id}. A batch that was made of it goes on. Raises HttpError (404)."""
    file_id = request.path_params["file_id"]
    if not store_of(service).delete(owner_of(request.client), file_id):
        raise HttpError(404, f"No such File object: {file_id[:80]!r}", param="id")
    return Reply({"id": file_id, "object": "file", "deleted": True})


def _route(path: str, method: str, handler: Any, summary: str, **fields: Any) -> Route:
    return Route(
        path=path, methods=(method,), handler=handler, access=Access.KEY, dialect=Dialect.OPENAI, summary=summary,
        **fields,
    )  # fmt: skip


ROUTES = (
    _route("/v1/files", "POST", create_file, "Send a file for batches", reads_stream="multipart/form-data"),
    _route("/v1/files", "GET", list_files, "Your files"),
    _route("/v1/files/{file_id}", "GET", retrieve_file, "What is known of a file"),
    _route("/v1/files/{file_id}", "DELETE", delete_file, "Delete a file"),
    _route("/v1/files/{file_id}/content", "GET", file_content, "The bytes of a file"),
)
