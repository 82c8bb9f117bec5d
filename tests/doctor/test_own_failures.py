"""The doctor knows what Mooli itself prints: every message here is made by the code that prints it."""

from __future__ import annotations

import argparse
import errno
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mooli.doctor.examination import probe_log
from mooli.doctor.failures import FAILURES, OWN_FAILURES, explain
from mooli.engine.child import exit_words
from mooli.engine.pool_size import GIB, PoolNeeds, num_pool_pages
from mooli.errors import EngineDeadError, MooliError
from mooli.hub.locate import locate
from mooli.models.registry import read_hf_config
from mooli.server.command import add_server_args
from mooli.server.config import ServerConfig
from mooli.server.listener import bound_socket
from mooli.sglang_arguments import unknown_argument

ALL = (*FAILURES, *OWN_FAILURES)


def killed() -> str:
    raise EngineDeadError(f"the engine process {exit_words(-signal.SIGKILL)}")


def crashed() -> str:
    raise EngineDeadError(f"the engine process {exit_words(-signal.SIGSEGV)}")


def no_room() -> str:
    needs = PoolNeeds(
        available_bytes=4 * GIB,
        weight_bytes=GIB,
        bytes_per_page=2**20,
        page_size=32,
        model_context=4096,
        max_running_requests=8,
        max_total_tokens=10**9,
    )
    return str(num_pool_pages(needs))


def port_in_use() -> str:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with bound_socket(ServerConfig(port=taken.getsockname()[1])):
            return ""


def open_to_all() -> str:
    (warning,) = ServerConfig(host="0.0.0.0").warnings()[:1]
    return warning


def unknown_flag(word: str) -> str:
    parser = argparse.ArgumentParser()
    add_server_args(parser)
    return unknown_argument([word], parser)


def unknown_family() -> str:
    return str(read_hf_config({"architectures": ["BloomForCausalLM"]}))


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("engine-killed", killed),
        ("engine-died", crashed),
        ("out-of-memory", no_room),
        ("address-not-free", port_in_use),
        ("no-api-key", open_to_all),
        ("model-not-found", lambda: str(locate("/no/such/folder"))),
        ("model-not-found", lambda: str(locate("no/such-model"))),
        ("model-unsupported", unknown_family),
        ("unknown-flag", lambda: unknown_flag("--prot")),
        ("unknown-flag", lambda: unknown_flag("--enable-lora")),
        ("too-many-open-files", lambda: os.strerror(errno.EMFILE)),
    ],
)
def test_a_message_of_mooli_is_known(tmp_path: Path, code: str, message: Callable[[], str]) -> None:
    try:
        text = message()
    except MooliError as exc:
        text = str(exc)
    log = tmp_path / "server.log"
    log.write_text(f"INFO: all is well\nmooli: error: {text}\n")
    found = {finding.code: finding for finding in probe_log(log).findings}
    assert code in found, text
    assert found[code].cure


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("CRITICAL mooli.server.launch: the engine has given no sign for 300 s: it is killed", "engine-hung"),
        ("ERROR mooli.engine.process: the engine has died", "engine-died"),
        ("no memory for a weight of 4096 x 4096 values as Q8", "out-of-memory"),
        ("backend 'cuda' does not load: No module named 'torch'. It needs torch", "backend-does-not-load"),
        ("a/b is not complete on this machine and MOOLI_OFFLINE forbids the network", "model-not-fetched"),
    ],
)
def test_a_line_of_a_servers_log_is_known(line: str, code: str) -> None:
    assert [finding.code for finding in explain(line, OWN_FAILURES)] == [code]


def test_a_warning_in_a_log_stands_in_nobodys_way(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    log.write_text(open_to_all())
    (finding,) = probe_log(log).findings
    assert (finding.code, finding.severity) == ("no-api-key", "warning")


def test_codes_are_unique_and_each_has_a_cure() -> None:
    names = [failure.code for failure in ALL]
    assert len(set(names)) == len(names)
    assert all(failure.cure and failure.cause for failure in OWN_FAILURES)


def test_the_log_of_a_good_day_has_no_findings() -> None:
    text = """
    INFO mooli.server.launch: demo on backend cpu (avx2, 2 threads): context 2048 tokens, KV cache 8192 tokens
    INFO mooli.server.launch: listening on http://127.0.0.1:30000
    INFO mooli.server.launch: The server is fired up and ready to roll!
    INFO mooli.server.steps: Decode batch, #running-req: 3, #token: 120
    INFO mooli.server.launch: finishing 2 requests before the end
    """
    assert explain(text, ALL) == []


@given(st.text())
def test_no_text_breaks_the_explanation(text: str) -> None:
    explain(text, OWN_FAILURES)
