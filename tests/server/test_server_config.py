"""Arguments of the server: their values, checks and warnings, and what is never shown of them."""

from __future__ import annotations

import pytest

from mooli.arguments import REDACTED
from mooli.errors import ConfigError
from mooli.server.config import ServerConfig


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"port": -1}, "the least is 0"),
        ({"port": True}, "of type int"),
        ({"host": ""}, "no address"),
        ({"host": " 127.0.0.1"}, "no address"),
        ({"request_timeout": 0}, "too small"),
        ({"keep_alive_timeout": float("inf")}, "finite"),
        ({"shutdown_timeout": -1.0}, "too small"),
        ({"max_queued_requests": 0}, "the least is 1"),
        ({"max_body_bytes": "1"}, "the least is 1024"),
        ({"log_requests_level": 4}, "the most is 3"),
        ({"log_requests_format": "xml"}, "choose one of text, json"),
        ({"log_level_http": "loud"}, "choose one of debug"),
        ({"sampling_defaults": "vllm"}, "choose one of model, openai"),
        ({"default_chat_template_kwargs": "[]"}, "JSON object"),
        ({"api_key": ""}, "api_key is empty"),
        ({"admin_api_key": "a b"}, "holds a space"),
        ({"api_key": "schlüssel"}, "outside ASCII"),
        ({"ssl_keyfile": "k"}, "ssl_certfile is missing"),
        ({"ssl_certfile": "c"}, "ssl_keyfile is missing"),
        ({"ssl_keyfile": "k", "ssl_certfile": "c"}, "ssl_keyfile='k' is no file"),
        ({"ssl_keyfile_password": "p"}, "ssl_keyfile_password needs ssl_keyfile"),
        ({"cors_allow_origins": "example.com"}, "is no origin"),
        ({"cors_allow_origins": "http://a/path"}, "is no origin"),
        ({"allowed_hosts": "http://a"}, "'http://a' is no name"),
        ({"allowed_hosts": "a, b:80"}, "'b:80' is no name"),
        ({"fastapi_root_path": "llm"}, "begin it with /"),
        ({"fastapi_root_path": "/llm/"}, "end it without"),
        ({"bucket_inter_token_latency": []}, "at least one number"),
        ({"bucket_inter_token_latency": [2, 1]}, "larger than the one before"),
        ({"bucket_inter_token_latency": [1, 1]}, "larger than the one before"),
        ({"bucket_inter_token_latency": ["1"]}, "a list of numbers, got '1' in it"),
        ({"bucket_inter_token_latency": [float("nan")]}, "finite"),
        ({"bucket_inter_token_latency": 1}, "a list of numbers"),
        ({"prot": 1}, "there is no server argument 'prot'; did you mean port?"),
    ],
    ids=str,
)
def test_a_bad_value_is_refused_with_what_is_possible(kwargs, message):
    with pytest.raises(ConfigError, match=message):
        ServerConfig.from_kwargs(**kwargs)


def test_a_certificate_and_its_key_are_taken_if_they_are_there(tmp_path):
    for name in ("key", "cert"):
        (tmp_path / name).touch()
    made = ServerConfig.from_kwargs(ssl_keyfile=tmp_path / "key", ssl_certfile=tmp_path / "cert")
    assert made.ssl_certfile == str(tmp_path / "cert")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_a_server_that_only_this_machine_can_reach_needs_no_key(host):
    assert ServerConfig(host=host).warnings() == []


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.com"])
def test_a_server_that_others_can_reach_is_warned_of_unless_it_has_a_key(host):
    (warning,) = ServerConfig(host=host).warnings()
    assert host in warning
    assert "--api-key" in warning
    assert ServerConfig(host=host, api_key="k").warnings() == []


def test_other_odd_arguments_are_warned_of_without_the_keys():
    found = ServerConfig(api_key="5ecret", admin_api_key="5ecret", enable_metrics=False).warnings()
    assert [warning.split()[0] for warning in found] == ["admin_api_key", "enable_metrics=False"]
    assert "5ecret" not in str(found)
    (found_too,) = ServerConfig(response_store_bytes=2**20).warnings()
    assert found_too.startswith("response_store_bytes has no effect without enable_response_store")
    assert ServerConfig(response_store_bytes=2**20, enable_response_store=True).warnings() == []


def test_keys_are_never_shown():
    made = ServerConfig(api_key="5ecret-1", admin_api_key="5ecret-2")
    assert "5ecret" not in repr(made) + str(made) + str(made.to_dict()) + str(made.warnings())
    assert made.to_dict()["api_key"] == REDACTED
    assert made.to_dict()["ssl_keyfile_password"] is None
    with pytest.raises(ConfigError) as raised:
        ServerConfig.from_kwargs(api_key=b"5ecret")
    assert "5ecret" not in str(raised.value)
