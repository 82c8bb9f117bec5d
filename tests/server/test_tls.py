"""HTTPS: what is wrong with key and certificate is found before a model is loaded, and what fits serves."""

from __future__ import annotations

import asyncio
import logging
import ssl
from pathlib import Path

import httpx
import pytest
from fake_engine import says
from route_server import Connection

from mooli.config import EngineConfig
from mooli.errors import ConfigError
from mooli.server import bring_up, launch
from mooli.server.config import ServerConfig
from mooli.server.keys import KeyRing
from mooli.server.listener import tls_context

# Made for these tests, and used nowhere else.
CERTIFICATE = """\
-----BEGIN CERTIFICATE-----
MIIBfzCCASWgAwIBAgIUEC6BWvNZfSKJgs57sse60aim3wgwCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTI2MTEzMDE0MzYwNVoYDzIxMjYxMTA2
MTQzNjA1WjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAARFushDia/xqBBZdKcxIycpwjmx32B/jMen6CTmj0A61vgdR6SMwUEP
Z5sSfto3N5LVw6M1LaBCklF77cxhxLqko1MwUTAdBgNVHQ4EFgQUt0cdUTDRL4+z
CZBzlU1isNNgLY0wHwYDVR0jBBgwFoAUt0cdUTDRL4+zCZBzlU1isNNgLY0wDwYD
VR0TAQH/BAUwAwEB/zAKBggqhkjOPQQDAgNIADBFAiEA9R8knGwPvnZwRp7ZD54s
BrEIy/fYsuHSV3ixadY1JgsCIHwSlzpUQOMs02yJpMAKKgKwVG81Xx3BSGLRQ5AK
M8ib
-----END CERTIFICATE-----
"""

ITS_KEY = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgg72Ts863mztKiHiu
dzKjUf/veoVX2SOqh6UygcwXYDShRANCAARFushDia/xqBBZdKcxIycpwjmx32B/
jMen6CTmj0A61vgdR6SMwUEPZ5sSfto3N5LVw6M1LaBCklF77cxhxLqk
-----END PRIVATE KEY-----
"""

OTHER_KEY = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgLw54qqQ58BsRREzn
xc+i0d2CfBPVDz24BZ6OWZmQPQehRANCAATamYClGSGACYsIRFsGymbJDKKmUPxt
fR79VVdLwf1UYpob25e9iknF4yTH7uQUvqv4dbKIlWWO1maNrZ4PVC8v
-----END PRIVATE KEY-----
"""

ITS_KEY_UNDER_PASSWORD = """\
-----BEGIN ENCRYPTED PRIVATE KEY-----
MIHsMFcGCSqGSIb3DQEFDTBKMCkGCSqGSIb3DQEFDDAcBAif9FoBhqnc3wICCAAw
DAYIKoZIhvcNAgkFADAdBglghkgBZQMEAQIEEPa0VmRBMm/72YBR2A3LoyoEgZAv
S29jpAgKOGABn75QuXnoJruUtejGfV7DHqT/QN5K0hHL5p3X4iZEUNqUuUMc8mC9
02+OOZsum++k3wmeepdBgYolW+WTowJXSQ8fe+ClfwUAeGmqqDp1DG0TctRtyetc
wByM1DR3ekNkjsDZM0zGwgMhbtZKSgT92k3Gq7fbgllbAy9JyLnaNIy+Od1V0DM=
-----END ENCRYPTED PRIVATE KEY-----
"""


@pytest.fixture
def files(tmp_path: Path) -> Path:
    contents = {
        "its.crt": CERTIFICATE,
        "its.key": ITS_KEY,
        "other.key": OTHER_KEY,
        "encrypted.key": ITS_KEY_UNDER_PASSWORD,
        "no.pem": "no key\n",
    }
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
    return tmp_path


def config(files: Path, key: str, certificate: str = "its.crt", **arguments: str) -> ServerConfig:
    return ServerConfig.from_kwargs(
        port=0, ssl_keyfile=str(files / key), ssl_certfile=str(files / certificate), **arguments
    )


def test_without_a_certificate_there_is_no_tls():
    assert tls_context(ServerConfig()) is None


def test_what_fits_is_taken(files):
    assert tls_context(config(files, "its.key")) is not None
    assert tls_context(config(files, "encrypted.key", ssl_keyfile_password="radish")) is not None
    context = tls_context(config(files, "its.key", ssl_ca_certs=str(files / "its.crt")))
    assert context is not None and context.verify_mode is ssl.CERT_REQUIRED


@pytest.mark.parametrize(
    ("key", "certificate", "arguments", "says"),
    [
        ("other.key", "its.crt", {}, "the key is not that of the certificate"),
        ("encrypted.key", "its.crt", {}, "the key is encrypted: give ssl_keyfile_password"),
        ("encrypted.key", "its.crt", {"ssl_keyfile_password": "beet"}, "is not the password of the key"),
        ("no.pem", "its.crt", {}, "both must be PEM files"),
        ("its.key", "no.pem", {}, "both must be PEM files"),
    ],
)
def test_what_does_not_fit_is_told_before_the_engine_hears_of_a_model(files, key, certificate, arguments, says):
    class Child:
        def take(self) -> None:
            raise AssertionError("the engine was told what to load")

    given = config(files, key, certificate, **arguments)
    with pytest.raises(ConfigError, match=says):
        tail = bring_up.make_log_tail(given)
        asyncio.run(launch._run(given, EngineConfig(model_path="none"), [], Child(), KeyRing(given), tail))


def test_authorities_that_are_none_are_told(files):
    with pytest.raises(ConfigError, match=r"ssl_ca_certs=.*must hold certificates"):
        tls_context(config(files, "its.key", ssl_ca_certs=str(files / "no.pem")))


def test_https_is_served_and_other_bytes_are_no_error(live, files, caplog):
    caplog.set_level(logging.INFO)
    server = live(says("Hello"), ssl_keyfile=str(files / "its.key"), ssl_certfile=str(files / "its.crt"))
    trust = ssl.create_default_context(cafile=str(files / "its.crt"))
    with httpx.Client(base_url=f"https://localhost:{server.http_server.port}", verify=trust, timeout=20) as http:
        for _ in range(2):
            assert http.get("/health").status_code == 200
        with Connection(server.http_server.port) as plain:
            plain.send(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n").read_to_end()
        assert http.post("/generate", json={"text": "a", "sampling_params": {"max_new_tokens": 2}}).status_code == 200
    assert server.stop() == 0
    assert "Traceback" not in caplog.text
