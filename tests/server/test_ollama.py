"""Ollama's API, by its own client and by what others ask in its name."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from fake_engine import CONTEXT, says

from mooli.frontend.chat_template import ChatTemplate
from mooli.frontend.infill import Infill
from mooli.frontend.wire_formats.reasoning import REASONING_FORMATS

ollama = pytest.importorskip("ollama")


@pytest.fixture
def client_of():
    """A client of a server, which is closed with the test."""
    made: list[Any] = []

    def make(server: Any) -> Any:
        made.append(ollama.Client(host=server.url))
        return made[-1]

    yield make
    for client in made:
        client.close()


# -- the model ---------------------------------------------------------------------------------------------------------
def test_the_client_lists_shows_and_sees_the_model_loaded(live, client_of):
    server = live(says("x"), engine={"served_model_name": "org/name"})
    client = client_of(server)
    (listed,) = client.list().models
    (loaded,) = client.ps().models
    shown = client.show("org/name")
    assert (listed.model, loaded.model, loaded.context_length) == ("org/name", "org/name", CONTEXT)
    assert listed.digest == loaded.digest and len(listed.digest) == 64
    assert (loaded.size, loaded.size_vram) == (0, 0)
    assert loaded.expires_at > datetime.now(timezone.utc) + timedelta(days=365)
    assert listed.modified_at == shown.modified_at <= datetime.now(timezone.utc)
    assert listed.details == loaded.details == shown.details
    assert shown.modelinfo["general.architecture"] == shown.details.family == "fake"
    assert shown.modelinfo["fake.context_length"] == CONTEXT
    assert shown.capabilities == ["completion"]
    assert "{% for m in messages %}" in shown.template


def test_sizes_and_types_are_told_as_ollama_tells_them(live):
    server = live(says("x"))
    server.service.client.facts = replace(
        server.service.facts, architecture="Qwen2ForCausalLM", num_parameters=494_032_768, weight_bytes=7,
        kv_cache_bytes=5, resolved_model_path="/models/org/qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
    )  # fmt: skip
    (listed,) = server.http.get("/api/tags").json()["models"]
    (loaded,) = server.http.get("/api/ps").json()["models"]
    assert listed["details"] == {
        "parent_model": "", "format": "gguf", "family": "qwen2", "families": ["qwen2"], "parameter_size": "494M",
        "quantization_level": "Q4_K_M",
    }  # fmt: skip
    assert (listed["size"], loaded["size"], loaded["size_vram"]) == (7, 12, 0)
    server.service.client.facts = replace(server.service.facts, quantization="int8", num_parameters=7_615_616_512)
    details = server.http.post("/api/show", json={"model": "x"}).json()["details"]
    assert (details["parameter_size"], details["quantization_level"]) == ("7.616B", "INT8")


def test_what_the_model_can_is_read_from_its_files(live):
    """Copilot shows a model only if it has tools."""
    server = live(says("x"))
    service = server.service
    service.tokenizer.chat_template = ChatTemplate("{% if tools %}{{ tools }}{% endif %}{{ messages }}")
    service.wire_format = REASONING_FORMATS["qwen3"]
    service.infill = Infill(1, 2, 3, False, None, None, frozenset(), frozenset())
    shown = server.http.post("/api/show", json={"model": "x"}).json()
    assert shown["capabilities"] == ["completion", "tools", "thinking", "insert"]
    assert server.http.get("/api/tags").json()["models"][0]["capabilities"] == shown["capabilities"]
    bare = live(says("x"), engine={"skip_tokenizer_init": True})
    shown = bare.http.post("/api/show", json={"model": "x"}).json()
    assert (shown["capabilities"], shown["template"]) == ([], "")


def test_what_clients_ask_first(live):
    """Of a server's address whether something answers; its version, which must be numbers: Copilot compares them."""
    server = live(says("x"))
    assert server.http.head("/").status_code == 200
    assert server.http.get("/").text.endswith(" is running")
    version = [int(number) for number in server.http.get("/api/version").json()["version"].split(".")]
    assert version >= [0, 6, 4]


def test_models_are_not_managed_and_nothing_is_embedded(live, client_of):
    client = client_of(live(says("x")))
    for ask in (
        lambda: client.pull("m"), lambda: list(client.pull("m", stream=True)), lambda: client.delete("m"),
        lambda: client.copy("m", "n"), lambda: client.create("m", from_="n"),
    ):  # fmt: skip
        with pytest.raises(ollama.ResponseError, match="the one model that it was started with") as raised:
            ask()
        assert raised.value.status_code == 501
    for ask in (lambda: client.embed("m", "text"), lambda: client.embeddings("m", "text")):
        with pytest.raises(ollama.ResponseError, match="no embeddings") as raised:
            ask()
        assert raised.value.status_code == 501
