"""What a server does before it serves."""

from __future__ import annotations

import asyncio
import gc
import itertools
import socket
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from engine_link import NoProcess
from fake_engine import byte_tokenizer

from mooli.config import EngineConfig
from mooli.engine.child import EngineChild
from mooli.errors import ChatTemplateError, MooliError, TokenizerError
from mooli.frontend import text_side
from mooli.frontend.chat_template import ChatTemplate
from mooli.server import bring_up
from mooli.server.config import ServerConfig
from mooli.server.keys import KeyRing

BROKEN = "{% if %}"
FAKE_CORE = Path(__file__).resolve().parents[1] / "unit" / "fake_core.py"


def tokenizer_with(template: str) -> SimpleNamespace:
    return SimpleNamespace(chat_template=ChatTemplate(template), special_tokens={})


def test_a_model_with_a_broken_chat_template_is_refused_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_side, "load_tokenizer", lambda path: tokenizer_with(BROKEN))
    with pytest.raises(ChatTemplateError, match="does not compile"):
        bring_up._open_text(EngineConfig(model_path="model"), Path("model"))


def test_a_broken_chat_template_that_is_given_is_refused_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_side, "load_tokenizer", lambda path: tokenizer_with("fine"))
    with pytest.raises(ChatTemplateError, match="does not compile"):
        text_side.open_tokenizer(EngineConfig(model_path="model", chat_template=BROKEN), Path("model"))
    assert bring_up._open_text(EngineConfig(model_path="model"), Path("model")) is not None


@pytest.mark.parametrize(
    ("engine", "tokenizer"),
    [
        ("fake", "bad"),
        *itertools.product(
            ["raise:OutOfMemoryError", "exit:3", "no link"], ["good", "bad", "bad when the engine has ended"]
        ),
    ],
)
def test_a_start_that_fails_says_so_once(monkeypatch: pytest.MonkeyPatch, engine: str, tokenizer: str) -> None:
    child: Any = _NoLink() if engine == "no link" else EngineChild((sys.executable, str(FAKE_CORE)))

    def open_text(*_: object) -> object:
        if tokenizer == "good":
            return byte_tokenizer()
        if tokenizer != "bad" and engine != "no link":
            child.take()[0].wait(60)
        raise TokenizerError("planted")

    async def locate(path: str, **_: object) -> Path:
        return Path(path)

    monkeypatch.setattr(bring_up, "locate_async", locate)
    monkeypatch.setattr(bring_up, "sampling_defaults", lambda path: {})
    monkeypatch.setattr(bring_up, "_open_text", open_text)
    said: list[dict[str, Any]] = []

    async def start() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: said.append(context))
        engine_config = EngineConfig.from_kwargs(model_path=engine)
        config = ServerConfig(skip_server_warmup=True)
        with child:
            await bring_up.start_service(config, engine_config, (), 0.0, child, KeyRing(config))

    with pytest.raises((MooliError, OSError)):
        asyncio.run(start())
    gc.collect()
    assert said == []


class _NoLink:
    """A child whose link is gone before anybody has used it."""

    def take(self) -> tuple[NoProcess, socket.socket]:
        ours, theirs = socket.socketpair()
        ours.close()
        theirs.close()
        return NoProcess(), ours

    def __enter__(self) -> _NoLink:
        return self

    def __exit__(self, *_: object) -> None:
        pass
