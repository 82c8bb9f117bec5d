"""/v1/files: what is kept on disk, within which limits, and whose it is. OpenAI's client, sockets, a given clock."""

from __future__ import annotations

import io
import os
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from gate import wait_until
from route_server import message_of

from mooli.errors import ConfigError, StorageError
from mooli.server import file_store
from mooli.server.config import ServerConfig
from mooli.server.file_store import FileLimits, FileStore, Folder

LIMITS = FileLimits(max_file_bytes=1000, max_files=3, max_bytes=2000)

HOUR_S = 3600


class Now:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now_s = 1_000_000.0

    def __call__(self) -> float:
        return self.now_s


# -- the store ---------------------------------------------------------------------------------------------------------
@pytest.fixture
def opened(tmp_path) -> Iterator[Callable[..., FileStore]]:
    """Opens the store in the same folder; the one before is closed."""
    stores: list[FileStore] = []

    def make(limits: FileLimits = LIMITS, clock: Callable[[], float] | None = None) -> FileStore:
        if stores:
            stores[-1].close()
        stores.append(FileStore(Folder(tmp_path / "batches"), limits, clock or Now()))
        return stores[-1]

    yield make
    stores[-1].close()


def send(store: FileStore, data: bytes, owner: str = "me", **fields: Any) -> file_store.StoredFile:
    import asyncio

    with store.begin(owner) as upload:
        upload.take(len(data))
        upload.write(data)
        upload.sync()
        given = {"filename": "in.jsonl", "purpose": "batch", "expires_after_s": None, **fields}
        return asyncio.run(upload.keep(**given))


def test_a_file_is_there_again_after_a_restart(opened):
    sent = send(opened(), b"one\n", expires_after_s=HOUR_S)
    store = opened()
    assert store.of("me") == [sent] == [store.get("me", sent.id)]
    assert store.path_of(sent.id).read_bytes() == b"one\n"


def test_only_this_user_may_look_into_the_folder(opened):
    store = opened()
    send(store, b"secret")
    for path in [store.folder.path, *store.folder.path.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_an_owner_finds_nothing_of_others(opened):
    store = opened()
    mine, others = send(store, b"a"), send(store, b"b", owner="you")
    assert store.of("me") == [mine]
    assert store.get("me", others.id) is None
    assert not store.delete("me", others.id)
    assert store.get("you", others.id) == others


def test_what_a_killed_process_has_left_is_gone(opened):
    store = opened()
    kept = send(store, b"kept")
    lost = send(store, b"its bytes are gone")
    half = store.begin("me")
    half.write(b"half of it")
    orphan = store.path_of("file-" + "0" * 24)
    orphan.write_bytes(b"was not described yet")
    (orphan.parent / f"{kept.id}.writing").write_bytes(b"{")
    store.path_of(lost.id).unlink()
    (orphan.parent / "file-torn.json").write_bytes(b'{"id": "fi')
    half._file.close()
    store = opened()
    assert store.of("me") == [kept]
    assert not orphan.exists() and not any(store._incoming.iterdir())
    send(store, b"1"), send(store, b"2")  # nothing of it counts
    with pytest.raises(StorageError):
        store.begin("me")


def test_no_more_files_than_allowed_are_taken_of_one_owner(opened):
    store = opened()
    for _ in range(2):
        send(store, b"x")
    with store.begin("me"), pytest.raises(StorageError, match=r"3 files already.*delete some") as raised:
        store.begin("me")
    assert raised.value.status_code == 507
    last = send(store, b"x")  # that one has not become a file
    send(store, b"x", owner="you")
    assert store.delete("me", last.id)
    send(store, b"x")


def test_no_more_bytes_than_allowed_are_taken_of_one_owner(opened):
    store = opened()
    first = send(store, b"x" * 1000)
    send(store, b"x" * 600)
    with store.begin("me") as upload:
        upload.take(400)
        with pytest.raises(StorageError, match=r"2000 bytes.*delete some"):
            upload.take(1)
    with store.begin("you") as upload:
        upload.take(1000)
    store.delete("me", first.id)
    send(store, b"x" * 1000)


def test_one_file_has_a_longest_length(opened):
    store = opened()
    with store.begin("me") as upload:
        upload.write(b"x" * 1000)
        with pytest.raises(StorageError, match="larger than the 1000 bytes") as raised:
            upload.write(b"x")
    assert raised.value.status_code == 413
    assert store.of("me") == [] and not any(store._incoming.iterdir())


def test_a_file_expires_and_makes_room(opened):
    now = Now()
    store = opened(clock=now)
    sent = [send(store, b"x" * 500, expires_after_s=HOUR_S + number) for number in range(3)]
    now.now_s += HOUR_S - 1
    assert store.of("me") == sent
    now.now_s += 1
    assert store.of("me") == sent[1:]
    assert store.get("me", sent[0].id) is None and not store.delete("me", sent[0].id)
    assert store.path_of(sent[0].id).exists()
    newest = send(store, b"x" * 1000)
    assert not store.path_of(sent[0].id).exists()
    now.now_s += 10
    store = opened(clock=now)
    assert store.of("me") == [newest]
    store.sweep()
    assert not store.path_of(sent[1].id).exists()


def test_a_full_disk_is_told_without_its_path(opened, monkeypatch):
    store = opened()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "/secret/path")

    with store.begin("me") as upload:
        upload.write(b"x")
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match="disk of this server is full") as raised:
            upload.sync()
    assert "secret" not in str(raised.value) and raised.value.status_code == 507
    monkeypatch.undo()
    assert store.of("me") == [] and not any(store._incoming.iterdir())
    send(store, b"x" * 1000), send(store, b"x" * 1000)


def test_a_description_that_cannot_be_written_leaves_no_file(opened, monkeypatch):
    store = opened()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(file_store, "write_whole", full)
    with pytest.raises(StorageError):
        send(store, b"x")
    assert store.of("me") == [] and not any(store._path.iterdir())


def test_two_servers_do_not_share_a_folder(opened, tmp_path):
    opened()
    with pytest.raises(ConfigError, match="in use by another server"):
        Folder(tmp_path / "batches")
    opened()  # the first has closed it


@pytest.mark.parametrize("kind", ["file", "link", "link inside"])
def test_a_folder_that_is_none_is_refused(tmp_path, kind):
    path = tmp_path / "batches"
    (tmp_path / "elsewhere").mkdir()
    if kind == "file":
        path.write_bytes(b"")
    elif kind == "link":
        path.symlink_to(tmp_path / "missing")
    else:
        path.mkdir()
        (path / "files").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="batch"), Folder(path) as folder:
        FileStore(folder, LIMITS)


def test_limits_without_a_folder_are_warned_of():
    warnings = ServerConfig.from_kwargs(max_file_bytes="1m", max_files=3, max_files_bytes="2m").warnings()
    assert sum("no effect without batch_dir" in warning for warning in warnings) == 3


# -- OpenAI's client ---------------------------------------------------------------------------------------------------
@pytest.fixture
def server(live, tmp_path):
    return live(batch_dir=str(tmp_path / "batches"), max_file_bytes="100ki", max_files=4, max_files_bytes="1m")


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as made:
        yield made


def test_openai_sends_lists_reads_and_deletes_files(client):
    data = os.urandom(90_000)
    sent = client.files.create(file=("träume.jsonl", data), purpose="batch")
    assert (sent.filename, sent.bytes, sent.purpose, sent.status) == ("träume.jsonl", 90_000, "batch", "processed")
    assert sent.expires_at == pytest.approx(sent.created_at + 30 * 24 * HOUR_S, abs=1)
    assert client.files.retrieve(sent.id) == sent
    assert client.files.content(sent.id).content == data
    with client.files.with_streaming_response.content(sent.id) as answer:
        assert answer.headers["content-length"] == "90000"
        assert b"".join(answer.iter_bytes()) == data
    gone = client.files.delete(sent.id)
    assert (gone.id, gone.deleted) == (sent.id, True)
    for call in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError, match="No such File object"):
            call(sent.id)
    assert list(client.files.list()) == []


def test_openai_pages_through_files(client):
    sent = [client.files.create(file=(f"{number}", b"{}"), purpose="batch").id for number in range(4)]
    assert [item.id for item in client.files.list()] == sent[::-1]
    assert [item.id for item in client.files.list(order="asc", limit=3)] == sent, "it asks for the next page itself"
    page = client.files.list(order="asc", limit=3)
    assert [item.id for item in page.data] == sent[:3] and page.has_more
    assert not page.get_next_page().has_more
    assert list(client.files.list(purpose="batch_output")) == []
    for wrong in ({"after": "file-x"}, {"order": "up"}, {"limit": 0}, {"limit": 10_001}):
        with pytest.raises(openai.BadRequestError):
            client.files.list(**wrong)


def test_a_file_expires_when_it_was_told_to(client, server):
    now = server.service.batches.files.clock = Now()
    sent = client.files.create(
        file=b"{}", purpose="batch", expires_after={"anchor": "created_at", "seconds": 2 * HOUR_S}
    )
    assert sent.expires_at == sent.created_at + 2 * HOUR_S
    now.now_s += 2 * HOUR_S
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(sent.id)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"purpose": "fine-tune"}, "purpose='fine-tune' is not supported"),
        ({"purpose": "batch", "expires_after": {"anchor": "created_at", "seconds": 60}}, "3600 … 2592000"),
        ({"purpose": "batch", "expires_after": {"anchor": "created_at", "seconds": 10**9}}, "3600 … 2592000"),
        ({"purpose": "batch", "expires_after": {"anchor": "now", "seconds": 3600}}, "anchor='now'"),
    ],
)
def test_what_cannot_be_done_with_a_file_is_refused(client, fields, words):
    with pytest.raises(openai.BadRequestError, match=words):
        client.files.create(file=b"{}", **fields)
    assert list(client.files.list()) == []


def test_limits_are_told(client, server):
    with pytest.raises(openai.APIStatusError, match="larger than the 102400 bytes") as raised:
        client.files.create(file=b"x" * (100 * 1024 + 1), purpose="batch")
    assert raised.value.status_code == 413
    client.files.create(file=b"x" * (100 * 1024), purpose="batch")
    for _ in range(3):
        client.files.create(file=b"x", purpose="batch")
    with pytest.raises(openai.APIStatusError, match="4 files already") as raised:
        client.files.create(file=b"x", purpose="batch")
    assert raised.value.status_code == 507
    assert not any(server.service.batches.files._incoming.iterdir())


def test_a_body_longer_than_any_file_is_not_read(server):
    head = (
        "POST /v1/files HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer x\r\n"
        "Content-Type: multipart/form-data; boundary=b\r\nContent-Length: 99999999999\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", server.http_server.port), timeout=120) as connection:
        connection.sendall(head.encode())
        assert connection.recv(65536).startswith(b"HTTP/1.1 413 ")


# -- forms -------------------------------------------------------------------------------------------------------------
def form(*parts: tuple[str, bytes], end: bytes = b"--b--\r\n") -> bytes:
    """parts: what stands behind form-data in the head of a part, and its value."""
    heads = [
        b"--b\r\nContent-Disposition: form-data" + head.encode() + b"\r\n\r\n" + value + b"\r\n"
        for head, value in parts
    ]
    return b"".join(heads) + end


FILE = ('; name="file"; filename="a.jsonl"', b"{}")
PURPOSE = ('; name="purpose"', b"batch")


def post(server, body: bytes, content_type: str = "multipart/form-data; boundary=b", **headers: str) -> httpx.Response:
    given = {"Content-Type": content_type, "X-Mooli": "1", **headers}
    return server.http.post("/v1/files", content=body, headers=given)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "ends in the middle"),
        (b"--b--\r\n", "file is missing"),
        (b"no form at all", "is not a form"),
        (form(FILE, PURPOSE, end=b""), "ends in the middle"),
        (form(FILE, PURPOSE)[:60], "ends in the middle"),
        (form(PURPOSE), "file is missing"),
        (form(FILE), "purpose='' is not supported"),
        (form(FILE, FILE, PURPOSE), "'file' is there twice"),
        (form(FILE, PURPOSE, PURPOSE), "'purpose' is there twice"),
        (form(('; name="file"', b"{}"), PURPOSE), "file must be a file, with a filename"),
        (form(FILE, PURPOSE, *[(f'; name="{n}"', b"") for n in range(20)]), "more than 16 parts"),
        (form(FILE, ('; name="purpose"', b"batch" * 1000)), "longer than 4096 bytes"),
        (form(FILE, ('; name="purpose"; x="' + "y" * 9000, b"batch")), "is not a form"),
    ],
)
def test_a_form_that_is_wrong_is_refused_and_leaves_nothing(server, body, words):
    answer = post(server, body)
    assert answer.status_code == 400, answer.text
    assert words in message_of(answer)
    assert server.http.get("/v1/files").json()["data"] == []
    assert not any(server.service.batches.files._incoming.iterdir())


@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        ("application/json", 400),
        ("multipart/form-data", 400),
        ("multipart/form-data; boundary=", 400),
        ("multipart/mixed; boundary=b", 400),
        (f"multipart/form-data; boundary={'b' * 201}", 400),
        ('multipart/form-data; boundary="b"', 200),
    ],
)
def test_the_content_type_is_that_of_a_form(server, content_type, status):
    assert post(server, form(FILE, PURPOSE), content_type).status_code == status


def test_a_compressed_body_is_refused(server):
    assert post(server, form(FILE, PURPOSE), **{"Content-Encoding": "gzip"}).status_code == 415


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("../../etc/passwd", "passwd"),
        ("C:\\\\x\\\\in.jsonl", "in.jsonl"),
        ("", "file"),
        ("a\x01b", "ab"),
        ("x" * 400, "x" * 255),
    ],
)
def test_a_name_is_no_path(server, given, shown):
    answer = post(server, form((f'; name="file"; filename="{given}"', b"{}"), PURPOSE))
    assert answer.json()["filename"] == shown


def test_a_form_may_come_byte_by_byte(server):
    body = form(PURPOSE, ('; name="file"; filename="a"', b"1\r\n--\r\n--a\r\n"))

    def bytes_of() -> Iterator[bytes]:
        for index in range(len(body)):
            yield body[index : index + 1]

    answer = post(server, bytes_of())
    assert server.http.get(f"/v1/files/{answer.json()['id']}/content").content == b"1\r\n--\r\n--a\r\n"


def test_a_client_that_leaves_while_it_sends_leaves_nothing(server):
    body = form(PURPOSE, ('; name="file"; filename="a"', b"x" * 50_000))
    head = (
        "POST /v1/files HTTP/1.1\r\nHost: localhost\r\nX-Mooli: 1\r\n"
        f"Content-Type: multipart/form-data; boundary=b\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    incoming = server.service.batches.files._incoming
    with socket.create_connection(("127.0.0.1", server.http_server.port), timeout=120) as connection:
        connection.sendall(head.encode() + body[:30_000])
        wait_until(lambda: any(incoming.iterdir()))
    wait_until(lambda: not any(incoming.iterdir()))
    assert server.http.get("/v1/files").json()["data"] == []


def test_a_client_that_is_too_slow_is_refused(live, tmp_path):
    server = live(batch_dir=str(tmp_path / "slow"), read_timeout=0.2)
    with socket.create_connection(("127.0.0.1", server.http_server.port), timeout=120) as connection:
        connection.sendall(
            b"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nX-Mooli: 1\r\n"
            b"Content-Type: multipart/form-data; boundary=b\r\nContent-Length: 1000\r\n\r\n--b\r\n"
        )
        assert connection.recv(65536).startswith(b"HTTP/1.1 408 ")
    wait_until(lambda: not any(server.service.batches.files._incoming.iterdir()))


def test_a_page_of_another_site_sends_nothing(server):
    body = form(FILE, PURPOSE)
    plain = {"Content-Type": "multipart/form-data; boundary=b"}
    assert server.http.post("/v1/files", content=body, headers=plain).status_code == 403
    assert (
        server.http.post("/v1/files", content=body, headers={**plain, "Authorization": "Bearer x"}).status_code == 200
    )
    foreign = {**plain, "X-Mooli": "1", "Origin": "https://evil.example"}
    assert server.http.post("/v1/files", content=body, headers=foreign).status_code == 403


# -- whose they are, and where there are none --------------------------------------------------------------------------
def test_keys_of_one_tenant_share_files_and_others_see_none(live, tmp_path):
    keys = tmp_path / "keys.yaml"
    keys.write_text("ann: {key: a, tenant: team}\nbob: {key: b, tenant: team}\neve: {key: e}\n")
    keys.chmod(0o600)
    server = live(batch_dir=str(tmp_path / "batches"), api_keys_file=str(keys))
    ann, bob, eve = (openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0) for key in "abe")
    with ann, bob, eve:
        sent = ann.files.create(file=b"{}", purpose="batch")
        assert [item.id for item in bob.files.list()] == [sent.id]
        assert list(eve.files.list()) == []
        for call in (eve.files.retrieve, eve.files.content, eve.files.delete):
            with pytest.raises(openai.NotFoundError):
                call(sent.id)
        assert bob.files.delete(sent.id).deleted


def test_files_outlive_the_server(live, tmp_path):
    folder = str(tmp_path / "batches")
    first = live(batch_dir=folder)
    sent = post(first, form(FILE, PURPOSE)).json()
    first.stop()
    again = live(batch_dir=folder)
    assert again.http.get(f"/v1/files/{sent['id']}").json() == sent


def test_a_server_without_a_folder_says_so(live):
    server = live()
    for method, path in [
        ("POST", "/v1/files"),
        ("GET", "/v1/files"),
        ("GET", "/v1/files/x"),
        ("DELETE", "/v1/files/x"),
    ]:
        answer = server.http.request(method, path, headers={"X-Mooli": "1"}, content=io.BytesIO(b""))
        assert answer.status_code == 404, path
        assert "--batch-dir" in message_of(answer)


def test_a_download_that_breaks_off_is_no_whole_file(server):
    sent = post(server, form(('; name="file"; filename="a"', b"x" * 5000), PURPOSE)).json()
    path: Path = server.service.batches.files.path_of(sent["id"])
    os.truncate(path, 1000)
    with pytest.raises(httpx.RemoteProtocolError):
        server.http.get(f"/v1/files/{sent['id']}/content")
