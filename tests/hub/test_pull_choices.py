"""Which files of a repository are fetched, from which hub, and into which folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hub_server import NAME, SHARD, WANTED, HubServer, Pull, model_files, names

from mooli.errors import CheckpointError, ConfigError, DownloadError, ModelNotFoundError, UnsupportedModelError
from mooli.hub import resolve


# -- which files -------------------------------------------------------------------------------------------------------
def test_a_repository_of_one_gguf_gives_that_file(fetch: Pull, hub: HubServer, source: str) -> None:
    hub.models["a/b-GGUF"] = {"b.gguf": b"GGUF", "config.json": b"{}", "mmproj-b.gguf": b"GGUF2", "README.md": b""}
    path = fetch("a/b-GGUF", source=source)
    assert path.name == "b.gguf"
    assert path.read_bytes() == b"GGUF"
    assert hub.files_sent() == ["b.gguf"]
    assert resolve("a/b-GGUF") == path
    assert resolve("a/b-GGUF:b.gguf") == path


def test_one_of_several_gguf_files_is_asked_for_by_its_name(fetch: Pull, hub: HubServer, source: str) -> None:
    hub.models["a/b"] = {"b-Q4.gguf": b"GGUF4", "b-Q8.gguf": b"GGUF8", "big/b-F16.gguf": b"GGUF16"}
    with pytest.raises(CheckpointError, match=r"b-Q4\.gguf \(0\.00 GB\), b-Q8\.gguf.*Name one: a/b:b-Q4\.gguf"):
        fetch("a/b", source=source)
    assert fetch("a/b:b-Q8.gguf", source=source).read_bytes() == b"GGUF8"
    assert fetch("a/b:big/b-F16.gguf", source=source).read_bytes() == b"GGUF16"
    assert resolve("a/b:b-Q8.gguf").read_bytes() == b"GGUF8"
    assert hub.files_sent() == ["b-Q8.gguf", "big/b-F16.gguf"]
    with pytest.raises(ModelNotFoundError, match=r"has no file c\.gguf; its GGUF files: b-Q4\.gguf"):
        fetch("a/b:c.gguf", source=source)


def test_all_parts_of_a_gguf_model_are_fetched_whichever_is_named(fetch: Pull, hub: HubServer, source: str) -> None:
    parts = {f"q4/b-{part:05d}-of-00003.gguf": b"GGUF" + bytes([part]) for part in (1, 2, 3)}
    hub.models["a/b"] = {"b-Q8.gguf": b"GGUF8", **parts}
    with pytest.raises(CheckpointError, match=r"GGUF files: b-Q8\.gguf \(0\.00 GB\), q4/b-00001-of-00003\.gguf \(0"):
        fetch("a/b", source=source)
    second = "a/b:q4/b-00002-of-00003.gguf"
    first = fetch(second, source=source)
    assert first.name == "b-00001-of-00003.gguf"
    assert sorted(hub.files_sent()) == sorted(parts)
    assert resolve(second) == first
    assert fetch(second, source=source) == first
    assert sorted(hub.files_sent()) == sorted(parts)
    first.with_name("b-00003-of-00003.gguf").unlink()
    with pytest.raises(ModelNotFoundError, match=r"unfinished: 1 files of weights are missing, b-00003-of-00003\.gguf"):
        resolve(second)
    assert fetch(second, source=source) == first
    assert resolve(second) == first


def test_a_repository_of_one_model_in_parts_gives_all_of_them(fetch: Pull, hub: HubServer, source: str) -> None:
    hub.models["a/b"] = {f"b-{part:05d}-of-00002.gguf": b"GGUF" + bytes([part]) for part in (1, 2)}
    first = fetch("a/b", source=source)
    assert resolve("a/b") == first and first.name == "b-00001-of-00002.gguf"
    assert first.with_name("b-00002-of-00002.gguf").read_bytes() == b"GGUF\x02"


def test_a_repository_that_lacks_a_part_is_refused(fetch: Pull, hub: HubServer, source: str) -> None:
    hub.models["a/b"] = {"b-00001-of-00002.gguf": b"GGUF1"}
    with pytest.raises(ModelNotFoundError, match=r"lacks 1 of the 2 parts of .*b-00002-of-00002\.gguf is one"):
        fetch("a/b:b-00001-of-00002.gguf", source=source)
    assert hub.files_sent() == []


def test_a_repository_of_pickles_is_refused(fetch: Pull, hub: HubServer, source: str) -> None:
    hub.models["a/b"] = {"config.json": b"{}", "pytorch_model.bin": b"pickle"}
    with pytest.raises(UnsupportedModelError, match=r"only pytorch_model\.bin .* never opens"):
        fetch("a/b", source=source)
    assert hub.files_sent() == []


def test_weights_that_are_there_twice_are_fetched_once(fetch: Pull, hub: HubServer) -> None:
    hub.models["a/b"] = dict.fromkeys(("config.json", "model.safetensors", "consolidated.safetensors"), b"{}")
    assert names(fetch("a/b", source="modelscope")) == {"config.json", "model.safetensors"}


@pytest.mark.parametrize(
    "path", ["../config.json", "..\\model.safetensors", "a/../../x.safetensors", "/etc/x.json", "x\n.json", ".x.json"]
)
def test_a_hub_that_names_a_file_outside_the_folder_is_refused(
    fetch: Pull, hub: HubServer, source: str, home: Path, path: str
) -> None:
    hub.models[NAME][path] = b"{}"
    with pytest.raises(CheckpointError, match="refused"):
        fetch(source=source)
    assert not list(home.rglob("*.safetensors"))


@pytest.mark.parametrize(
    "name", ["", "demo", "../x", "a/..", "a/b/c", "/a/b", "./a", "a/b:../c.gguf", "a/b:c.bin", "a/b:", "a/b\n", "ä/b"]
)
def test_what_is_no_name_is_not_asked_for(fetch: Pull, hub: HubServer, name: str) -> None:
    with pytest.raises(ConfigError, match="is not a name on a hub"):
        fetch(name)
    assert hub.seen == []


@pytest.mark.parametrize("revision", ["../x", "", "-x", "a b"])
def test_what_is_no_revision_is_not_asked_for(fetch: Pull, hub: HubServer, revision: str) -> None:
    with pytest.raises(ConfigError, match="is not a branch, tag or commit"):
        fetch(revision=revision)
    assert hub.seen == []


# -- a folder of one's own ---------------------------------------------------------------------------------------------
def test_a_folder_of_another_model_is_refused(fetch: Pull, hub: HubServer, tmp_path: Path) -> None:
    fetch(folder=tmp_path)
    hub.models["a/b"] = {"config.json": b"{}", "model.safetensors": b"other"}
    with pytest.raises(CheckpointError, match=f"holds {NAME}: give another folder"):
        fetch("a/b", folder=tmp_path)


def test_weights_of_another_origin_that_would_be_read_instead_are_refused(fetch: Pull, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"something")
    with pytest.raises(CheckpointError, match=r"model\.safetensors that is not of"):
        fetch(folder=tmp_path)


def test_a_new_revision_takes_the_place_of_the_old_one(fetch: Pull, hub: HubServer, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    fetch(folder=tmp_path)
    hub.models[NAME] = {"config.json": model_files()["config.json"], "model.safetensors": b"merged"}
    fetch(folder=tmp_path, revision="v1")
    assert names(tmp_path) == {"config.json", "model.safetensors", "notes.txt"}


def test_a_failed_update_leaves_the_old_model_whole(fetch: Pull, hub: HubServer, tmp_path: Path) -> None:
    fetch(folder=tmp_path)
    hub.models[NAME][SHARD] = b"new" * 1000
    hub.models[NAME]["config.json"] = b'{"new": 1}'
    hub.cuts[SHARD] = [0, 0, 0]
    with pytest.raises(DownloadError):
        fetch(folder=tmp_path, revision="v1")
    assert all((tmp_path / name).read_bytes() == model_files()[name] for name in WANTED)
    assert resolve(tmp_path) == tmp_path


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"model": 1, "files": {}}', '{"model": "a/b", "files": {"x": 1}}'])
def test_a_record_that_is_none_is_passed_over(fetch: Pull, tmp_path: Path, text: str) -> None:
    (tmp_path / ".mooli-pull.json").write_text(text)
    fetch(folder=tmp_path)
    assert json.loads((tmp_path / ".mooli-pull.json").read_text())["model"] == NAME


def test_a_record_cannot_name_files_outside_the_folder(fetch: Pull, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    victim = tmp_path / "victim"
    victim.write_text("keep me")
    entry = {"size": 1, "mtime_ns": 1, "digest": None}
    record = {"model": NAME, "files": {"../victim": entry, str(victim): entry, "..": entry}}
    (folder / ".mooli-pull.json").write_text(json.dumps(record))
    fetch(folder=folder)
    assert victim.read_text() == "keep me"


def test_a_folder_that_cannot_be_written_is_named(fetch: Pull, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DownloadError, match=r"cannot write into .*--dir"):
        fetch(folder=tmp_path / "file")


# -- which hub ---------------------------------------------------------------------------------------------------------
def hubs_asked(hub: HubServer) -> list[str]:
    return [seen.hub for seen in hub.seen if seen.kind == "list"]


def test_auto_asks_hugging_face_first(fetch: Pull, hub: HubServer) -> None:
    fetch()
    assert hubs_asked(hub) == ["huggingface"]


@pytest.mark.parametrize(("variable", "value"), [("MOOLI_HUB", "modelscope"), ("SGLANG_USE_MODELSCOPE", "true")])
def test_the_environment_turns_the_order_round(
    fetch: Pull, hub: HubServer, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    fetch()
    assert hubs_asked(hub) == ["modelscope"]


def test_a_preference_that_is_no_hub_is_refused(fetch: Pull, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOOLI_HUB", "elsewhere")
    with pytest.raises(ConfigError, match="MOOLI_HUB='elsewhere' must be one of huggingface, modelscope"):
        fetch()


@pytest.mark.parametrize("refusal", [(404, "RepoNotFound"), (403, "GatedRepo"), (503, "")])
def test_auto_goes_on_to_the_next_hub_and_says_so(
    fetch: Pull, hub: HubServer, said: list[str], refusal: tuple[int, str]
) -> None:
    hub.refuse["huggingface"] = refusal
    fetch()
    assert hubs_asked(hub) == ["huggingface", "modelscope"]
    assert "trying the next hub" in said[0]
    assert "from modelscope" in said[1]


def test_auto_goes_on_to_the_next_hub_when_nobody_answers(fetch: Pull, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "modelscope" in str(fetch())


def test_auto_ends_where_it_began(fetch: Pull, hub: HubServer) -> None:
    hub.cuts[SHARD] = [1000, 0, 0]
    with pytest.raises(DownloadError):
        fetch(source="modelscope")
    hub.seen.clear()
    fetch()
    assert hubs_asked(hub) == ["modelscope"]


def test_a_model_that_no_hub_has_is_not_found(fetch: Pull, hub: HubServer) -> None:
    with pytest.raises(ModelNotFoundError, match=r"no model a/none on huggingface.*no model a/none on modelscope"):
        fetch("a/none")


def test_no_network_is_an_error_that_names_both_hubs(fetch: Pull, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "127.0.0.1:9")
    with pytest.raises(
        DownloadError, match=r"huggingface \(http://127\.0\.0\.1:9\) .*modelscope \(https://127\.0\.0\.1:9\)"
    ):
        fetch()


@pytest.mark.parametrize("variable", ["MOOLI_OFFLINE", "HF_HUB_OFFLINE"])
def test_nothing_is_asked_offline(fetch: Pull, hub: HubServer, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "1")
    with pytest.raises(DownloadError, match=f"{variable} forbids the network"):
        fetch()
    assert hub.seen == []


@pytest.mark.parametrize("body", [b"<html>", b"[]", b'{"Data": {"Files": 3}}', b'{"Data": {"Files": [{"Path": 1}]}}'])
def test_an_answer_that_is_no_list_of_files_is_an_error(
    fetch: Pull, monkeypatch: pytest.MonkeyPatch, body: bytes
) -> None:
    monkeypatch.setattr("mooli.hub.hubs.json.loads", lambda text: json.JSONDecoder().decode(body.decode()))
    with pytest.raises(DownloadError, match="modelscope"):
        fetch(source="modelscope")
