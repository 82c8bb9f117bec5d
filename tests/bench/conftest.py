"""What the tests of the benchmark client share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit"))  # for the fake engine

from plain_server import Answer, PlainServer
from scripted_server import tokenizer_folder

import mooli.bench.serving as serving
from mooli.frontend.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(autouse=True)
def no_rest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No second of rest before a run, and nothing of this machine's caches."""
    monkeypatch.setattr(serving, "SETTLE_S", 0.0)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "no-cache"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenizer_folder(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def tokenizer(tokenizer_path: Path) -> Tokenizer:
    return load_tokenizer(tokenizer_path)


@pytest.fixture
def serve() -> Iterator[Callable[[Answer], PlainServer]]:
    servers: list[PlainServer] = []

    def start(answer: Answer = lambda number, body: None) -> PlainServer:
        servers.append(PlainServer(answer))
        return servers[-1]

    yield start
    for server in servers:
        server.close()
