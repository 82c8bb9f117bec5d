"""What a server does before it serves."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from mooli.config import EngineConfig
from mooli.errors import ChatTemplateError
from mooli.frontend import text_side
from mooli.frontend.chat_template import ChatTemplate
from mooli.server import launch

BROKEN = "{% if %}"


def tokenizer_with(template: str) -> SimpleNamespace:
    return SimpleNamespace(chat_template=ChatTemplate(template), special_tokens={})


def test_a_model_with_a_broken_chat_template_is_refused_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_side, "load_tokenizer", lambda path: tokenizer_with(BROKEN))
    with pytest.raises(ChatTemplateError, match="does not compile"):
        launch._open_text(EngineConfig(model_path="model"), Path("model"))


def test_a_broken_chat_template_that_is_given_is_refused_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_side, "load_tokenizer", lambda path: tokenizer_with("fine"))
    with pytest.raises(ChatTemplateError, match="does not compile"):
        text_side.open_tokenizer(EngineConfig(model_path="model", chat_template=BROKEN), Path("model"))
    assert launch._open_text(EngineConfig(model_path="model"), Path("model")) is not None
