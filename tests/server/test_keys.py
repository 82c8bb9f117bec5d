"""The keys file: what it may say, what each of its keys opens, whom it counts, and how it is read again."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import stat
import threading

import pytest
from fake_engine import says
from gate import Gate, wait_until
from route_server import post

from mooli.config import EngineConfig
from mooli.errors import ConfigError
from mooli.server import launch
from mooli.server.config import ServerConfig
from mooli.server.keys import Key, KeyRing
from mooli.server.routing import Access, Reply

TWO_KEYS = """
ann: {key: key-of-ann}
bob: {key: key-of-bob}
"""


@pytest.fixture
def keys_file(tmp_path):
    """Writes the file; its path."""

    def write(text: str = TWO_KEYS) -> str:
        path = tmp_path / "keys.yaml"
        path.write_text(text)
        path.chmod(0o600)
        return str(path)

    return write


def ring_of(path: str) -> KeyRing:
    return KeyRing(ServerConfig(api_keys_file=path))


def found(ring: KeyRing, key: str) -> Key | None:
    return ring.find([(b"authorization", f"Bearer {key}".encode())])


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


# -- the file ----------------------------------------------------------------------------------------------------------
def test_a_file_says_whose_a_key_is_and_what_it_may(keys_file):
    ring = ring_of(
        keys_file(
            """
            ann:
              key: key-of-ann
            ci.nightly:
              key: key-of-ci
              tenant: builds
              max_concurrent_requests: 2
              max_sequences: 8
            root:
              key: key-of-root
              admin: true
            """
        )
    )
    assert found(ring, "key-of-ann") == Key(name="ann", tenant="ann")
    limits = {"max_concurrent_requests": 2, "max_sequences": 8}
    assert found(ring, "key-of-ci") == Key(name="ci.nightly", tenant="builds", **limits)
    assert found(ring, "key-of-root") == Key(name="root", tenant="root", is_admin=True)
    assert found(ring, "key-of-nobody") is None
    assert found(ring, "") is None


def test_json_is_read_too(keys_file):
    assert found(ring_of(keys_file(json.dumps({"ann": {"key": "k", "admin": True}}))), "k").is_admin


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no key"),
        ("- s3cret", "a mapping of names to keys, not a list"),
        ("ann: s3cret", "ann must be a mapping of key, admin, tenant, max_concurrent_requests, max_sequences"),
        ("ann: {s3cret}", "ann must be a mapping of"),
        ("ann: {key: s3cret, rate: 1}", "ann must be a mapping of"),
        ("ann: {admin: true}", "ann: Object missing required field key"),
        ("ann: {key: 5432}", "ann: YAML reads the key as a int: put it in quotes"),
        ("ann: {key: yes}", "ann: YAML reads the key as a bool: put it in quotes"),
        ("ann: {key: ''}", "ann: the key is empty"),
        ("ann: {key: s3 cret}", "ann: the key is empty, or holds a space"),
        ("ann: {key: s3cret, admin: 1}", "ann: Expected bool, got int"),
        ("ann: {key: s3cret, max_sequences: 0}", "ann: Expected int >= 1"),
        ("ann: {key: s3cret, tenant: 'a b'}", "ann: tenant 'a b' is no name"),
        ("127.0.0.1: {key: s3cret}", "'127.0.0.1' is no name"),
        ("admin_api_key: {key: s3cret}", "'admin_api_key' is no name"),
        ("1: {key: s3cret}", "'1' is no name"),
        ("ann: {key: s3cret}\nann: {key: b}", "'ann' is given twice"),
        ("ann: {key: s3cret}\nbob: {key: s3cret}", "ann and bob have the same key"),
        ("ann: {key: 's3cret}", "is not valid YAML"),
        ("ann: {key: *s3cret}", "is not valid YAML in line 1, column 12: found undefined alias '…'"),
        ("ann: {key: !s3cret x}", "is not valid YAML in line 1"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_without_its_keys(keys_file, text, message):
    with pytest.raises(ConfigError) as raised:
        ring_of(keys_file(text))
    assert message in str(raised.value)
    assert "s3" not in str(raised.value)


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, message in (
        (tmp_path / "none", "No such file"),
        (tmp_path, "is no file"),
        (tmp_path / "pipe", "is no file"),
    ):
        with pytest.raises(ConfigError, match=message):
            ring_of(str(path))


@pytest.mark.parametrize("given", ["api_key", "admin_api_key"])
def test_keys_are_given_in_one_way(keys_file, given, monkeypatch):
    with pytest.raises(ConfigError, match=f"api_keys_file and {given} .* put the key into the file"):
        ServerConfig(api_keys_file=keys_file(), **{given: "s3cret"})
    monkeypatch.setenv(f"MOOLI_{given.upper()}", "s3cret")
    with pytest.raises(ConfigError, match=f"MOOLI_{given.upper()}"):
        launch.with_environment(ServerConfig(api_keys_file=keys_file()))


@pytest.mark.parametrize(("mode", "is_warned"), [(0o600, False), (0o640, False), (0o644, True), (0o602, True)])
def test_a_file_that_everybody_can_read_is_warned_of(keys_file, caplog, mode, is_warned):
    path = keys_file()
    os.chmod(path, mode)
    if stat.S_IMODE(os.stat(path).st_mode) != mode:
        pytest.skip("this file system has no modes")
    ring_of(path)
    assert ("every user of this machine can read the keys" in caplog.text) == is_warned


def test_a_server_with_a_keys_file_is_no_open_server(keys_file):
    assert ServerConfig(host="0.0.0.0", api_keys_file=keys_file()).warnings() == []


# -- what a key opens --------------------------------------------------------------------------------------------------
async def answer(service, request) -> Reply:
    return Reply({"client": request.client.name, "tenant": request.client.caller.tenant})


ROUTES = [
    post("/open", answer, methods=("GET",), access=Access.OPEN),
    post("/key", answer, methods=("GET",)),
    post("/admin", answer, methods=("GET",), access=Access.ADMIN),
]


@pytest.mark.parametrize(
    ("text", "key", "opened"),
    [
        (TWO_KEYS, None, {"/open"}),
        (TWO_KEYS, "key-of-nobody", {"/open"}),
        (TWO_KEYS, "key-of-bob", {"/open", "/key"}),
        ("root: {key: key-of-root, admin: true}", None, {"/open"}),
        ("root: {key: key-of-root, admin: true}", "key-of-root", {"/open", "/key", "/admin"}),
    ],
)
def test_only_an_admin_may_change_the_server(serve, keys_file, text, key, opened):
    server = serve(*ROUTES, api_keys_file=keys_file(text))
    headers = {} if key is None else bearer(key)
    statuses = {route.path: server.http.get(route.path, headers=headers).status_code for route in ROUTES}
    assert statuses == {path: 200 if path in opened else 401 for path in statuses}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({**bearer("key-of-ann"), "x-api-key": "key-of-root"}, 200),
        ({**bearer("key-of-root"), "x-api-key": "key-of-ann"}, 200),
        ({**bearer("key-of-ann"), "x-api-key": "key-of-nobody"}, 401),
    ],
)
def test_of_several_keys_the_one_that_may_most_counts(serve, keys_file, headers, status):
    text = "ann: {key: key-of-ann}\nroot: {key: key-of-root, admin: true}"
    assert serve(*ROUTES, api_keys_file=keys_file(text)).http.get("/admin", headers=headers).status_code == status


@pytest.mark.parametrize(
    ("arguments", "key", "client", "tenant"),
    [
        ({}, None, "127.0.0.1", ""),
        ({"api_key": "user"}, "user", "127.0.0.1", ""),
        ({"api_key": "user", "admin_api_key": "admin"}, "admin", "127.0.0.1", "admin_api_key"),
    ],
)
def test_without_a_file_a_client_is_its_address(serve, arguments, key, client, tenant):
    server = serve(*ROUTES, **arguments)
    told = server.http.get("/key", headers={} if key is None else bearer(key)).json()
    assert told == {"client": client, "tenant": tenant}


def test_with_a_file_a_client_is_the_name_of_its_key(serve, keys_file):
    text = "ann: {key: key-of-ann, tenant: team}\nbob: {key: key-of-bob}"
    server = serve(*ROUTES, api_keys_file=keys_file(text))
    assert server.http.get("/key", headers=bearer("key-of-ann")).json() == {"client": "ann", "tenant": "team"}
    assert server.http.get("/key", headers=bearer("key-of-bob")).json() == {"client": "bob", "tenant": "bob"}
    assert server.http.get("/open").json() == {"client": "127.0.0.1", "tenant": ""}


# -- tenants -----------------------------------------------------------------------------------------------------------
PROMPT = "0123456789>"


def generated(server, key):
    body = {"text": PROMPT, "sampling_params": {"max_new_tokens": 1}}
    return server.http.post("/generate", json=body, headers=bearer(key)).json()["meta_info"]["cached_tokens"]


def completed(server, key):
    body = {"prompt": PROMPT, "max_tokens": 1}
    usage = server.http.post("/v1/completions", json=body, headers=bearer(key)).json()["usage"]
    return usage["prompt_tokens_details"]["cached_tokens"]


def chatted(server, key):
    body = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 1}
    usage = server.http.post("/v1/chat/completions", json=body, headers=bearer(key)).json()["usage"]
    return usage["prompt_tokens_details"]["cached_tokens"]


def messaged(server, key):
    body = {"model": "m", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 1}
    return server.http.post("/v1/messages", json=body, headers=bearer(key)).json()["usage"]["cache_read_input_tokens"]


@pytest.mark.parametrize("cached", [generated, completed, chatted, messaged])
def test_a_key_is_told_nothing_of_what_another_has_sent(live, keys_file, cached):
    server = live(api_keys_file=keys_file())
    assert cached(server, "key-of-ann") == 0
    assert cached(server, "key-of-ann") > 0
    assert cached(server, "key-of-bob") == 0
    assert cached(server, "key-of-bob") > 0


def test_a_salt_does_not_lead_to_another_tenant(live, keys_file):
    server = live(api_keys_file=keys_file())

    def cached(key, salt):
        body = {"text": PROMPT, "sampling_params": {"max_new_tokens": 1}, "cache_salt": salt}
        return server.http.post("/generate", json=body, headers=bearer(key)).json()["meta_info"]["cached_tokens"]

    assert [cached("key-of-ann", "s"), cached("key-of-ann", "s")] == [0, len(PROMPT) - 1]
    assert [cached("key-of-bob", salt) for salt in ("s", "ann", "1:s", None)] == [0] * 4


def test_keys_of_one_tenant_share_what_they_have_in_common(live, keys_file):
    text = "ann: {key: key-of-ann, tenant: team}\nbob: {key: key-of-bob, tenant: team}"
    server = live(api_keys_file=keys_file(text))
    assert [generated(server, "key-of-ann"), generated(server, "key-of-bob")] == [0, len(PROMPT) - 1]


def test_users_and_admins_of_the_flags_are_apart(live):
    server = live(api_key="user", admin_api_key="admin")
    assert [generated(server, key) for key in ("user", "admin", "user")] == [0, 0, len(PROMPT) - 1]


# -- limits ------------------------------------------------------------------------------------------------------------
def test_a_key_may_have_so_many_requests_in_progress(serve, keys_file):
    gate, begun = threading.Event(), threading.Semaphore(0)

    async def slow(service, request) -> Reply:
        begun.release()
        await asyncio.to_thread(gate.wait, 30)
        return Reply("done")

    text = "ann: {key: key-of-ann, max_concurrent_requests: 1}\nbob: {key: key-of-bob}"
    server = serve(post("/slow", slow), *ROUTES, api_keys_file=keys_file(text))
    answers = []
    first = threading.Thread(target=lambda: answers.append(server.http.post("/slow", headers=bearer("key-of-ann"))))
    first.start()
    assert begun.acquire(timeout=30)
    refused = server.http.get("/key", headers=bearer("key-of-ann"))
    assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
    assert "may have 1 requests in progress" in refused.json()["error"]["message"]
    assert server.http.get("/open", headers=bearer("key-of-ann")).status_code == 200
    assert server.http.get("/key", headers=bearer("key-of-bob")).status_code == 200
    gate.set()
    first.join()
    assert answers[0].status_code == 200
    wait_until(lambda: not server.num_tasks)
    assert server.http.get("/key", headers=bearer("key-of-ann")).status_code == 200


def test_a_key_may_have_so_many_sequences(live, keys_file):
    text = "ann: {key: key-of-ann, max_sequences: 2}\nbob: {key: key-of-bob}"
    with Gate() as gate:
        server = live(says("x" * 100), runner={"raises": gate}, api_keys_file=keys_file(text))
        gate.let()

        def ask(key, n):
            body = {"text": "a>", "sampling_params": {"max_new_tokens": 4, "n": n}}
            return server.http.post("/generate", json=body, headers=bearer(key))

        too_many = ask("key-of-ann", 3)
        assert too_many.status_code == 400 and "the request is for 3" in too_many.json()["error"]["message"]
        answers = []
        running = threading.Thread(target=lambda: answers.append(ask("key-of-ann", 1)))
        running.start()
        wait_until(lambda: server.service.client.num_open == 1)
        refused = ask("key-of-ann", 2)
        assert refused.status_code == 429 and "may have 2 sequences" in refused.json()["error"]["message"]
        gate.open()
        running.join()
        assert [answers[0].status_code, ask("key-of-ann", 2).status_code, ask("key-of-bob", 3).status_code] == [200] * 3
    wait_until(lambda: not server.service.num_active)
    assert server.service.num_sequences.total() == 0


# -- names -------------------------------------------------------------------------------------------------------------
def test_metrics_count_by_the_names_of_keys_and_never_show_one(live, keys_file):
    server = live(says("hey"), api_keys_file=keys_file())
    for key in ("key-of-ann", "key-of-ann", "key-of-bob"):
        server.http.post("/generate", json={"text": "ab>"}, headers=bearer(key))
    shown = server.http.get("/metrics").text
    for line in (
        'mooli:key_requests_total{key="ann"} 2.0',
        'mooli:key_prompt_tokens_total{key="ann"} 6.0',
        'mooli:key_generation_tokens_total{key="ann"} 8.0',
        'mooli:key_requests_total{key="bob"} 1.0',
    ):
        assert line in shown.splitlines()
    assert "key-of" not in shown
    assert "key-of" not in server.http.get("/server_info", headers=bearer("key-of-ann")).text


def test_without_a_file_metrics_count_nobody(live):
    server = live(says("hey"), api_key="secret")
    server.http.post("/generate", json={"text": "ab>"})
    assert "mooli:key_" not in server.http.get("/metrics").text


def test_the_log_of_requests_says_whose_they_are(live, keys_file, caplog):
    caplog.set_level(logging.INFO, "mooli.server.requests")
    server = live(says("hey"), log_requests=True, log_requests_level=0, api_keys_file=keys_file())
    server.http.post("/generate", json={"text": "ab>"}, headers=bearer("key-of-ann"))
    received = next(message for message in caplog.messages if message.startswith("request received"))
    assert 'client="ann"' in received
    assert "key-of" not in caplog.text


# -- reading it again --------------------------------------------------------------------------------------------------
def test_a_signal_has_the_file_read_again(keys_file, caplog):
    caplog.set_level(logging.INFO, "mooli.server.keys")
    ring = ring_of(keys_file())

    async def hang_up() -> None:
        with launch.reloading(ring):
            os.kill(os.getpid(), signal.SIGHUP)
            for _ in range(3000):
                if caplog.messages:
                    return
                await asyncio.sleep(0.01)

    keys_file("eve: {key: key-of-eve}")
    asyncio.run(hang_up())
    assert found(ring, "key-of-eve") == Key(name="eve", tenant="eve")
    assert found(ring, "key-of-ann") is None and ring.named("ann") is None
    assert "has been read again: 1 keys" in caplog.text


@pytest.mark.parametrize("text", ["", "ann: [", "ann: {key: s3cret}\nbob: {key: s3cret}"])
def test_a_broken_file_changes_nothing_and_is_one_line(keys_file, caplog, text):
    path = keys_file()
    ring = ring_of(path)
    keys_file(text)
    os.chmod(path, 0o644)
    ring.reload()
    assert found(ring, "key-of-ann") == Key(name="ann", tenant="ann")
    (line,) = caplog.messages
    assert line.startswith(f"the keys stay as they were: --api-keys-file {path}")
    assert "\n" not in line and "s3cret" not in line


def test_a_file_that_is_gone_changes_nothing(keys_file, caplog):
    path = keys_file()
    ring = ring_of(path)
    os.unlink(path)
    ring.reload()
    assert found(ring, "key-of-ann") is not None
    assert "No such file" in caplog.text


def test_new_keys_count_at_once(live, keys_file):
    server = live(api_keys_file=keys_file())
    keys_file("eve: {key: key-of-eve}")
    server.service.keys.reload()
    assert server.http.get("/v1/models", headers=bearer("key-of-eve")).status_code == 200
    assert server.http.get("/v1/models", headers=bearer("key-of-ann")).status_code == 401


def test_a_server_does_not_start_with_a_broken_file(keys_file):
    with pytest.raises(ConfigError, match="holds no key"):
        launch.run(ServerConfig(api_keys_file=keys_file("")), EngineConfig(model_path="none"), [], None)
