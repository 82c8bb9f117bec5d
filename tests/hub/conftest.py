"""A hub on this machine, an empty home, and no way to the real ones."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from hub_server import FAST, HUBS, NAME, HubServer, Pull, model_files

from mooli.hub.pull import PullOptions, pull


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home without settings, tokens or caches of the machine's user."""
    for name in (
        *("HF_HOME", "HF_HUB_CACHE", "HF_TOKEN", "HF_HUB_OFFLINE", "HF_ENDPOINT", "XDG_CACHE_HOME"),
        *("MODELSCOPE_CACHE", "MODELSCOPE_API_TOKEN", "MODELSCOPE_DOMAIN", "MODELSCOPE_HOME", "SGLANG_USE_MODELSCOPE"),
        *("MOOLI_OFFLINE", "MOOLI_HUB", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"),
    ):
        monkeypatch.delenv(name, raising=False)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("HF_HOME", str(home / "hf"))
    # The library reads the place of a saved login when it is imported.
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(home / "hf" / "token"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return home


@pytest.fixture
def hub(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """Serves one model with two shards; both hubs' endpoints lead to it."""
    with HubServer({NAME: model_files()}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", server.url)
        yield server


@pytest.fixture(params=HUBS)
def source(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def fetch(hub: HubServer, said: list[str]) -> Pull:
    def fetch(name: str = NAME, **options: Any) -> Path:
        options.setdefault("policy", FAST)
        return pull(name, PullOptions(say=said.append, **options))

    return fetch
