"""Short names, the list of what is here, and its removal, in the caches of both hubs."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import pytest
from hub_server import NAME, HubServer, Pull

from mooli import cli
from mooli.errors import ConfigError, ModelNotFoundError
from mooli.hub import resolve
from mooli.hub.locate import locate, parse_name
from mooli.hub.shelf import kept_model, kept_models, remove
from mooli.hub.short_names import _packaged, expand, own_table, short_names
from mooli.shelf.completion import SCRIPTS, candidates

GGUF_NAME = "acme/tiny-GGUF"


@pytest.fixture
def own(home: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes the user's table."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home / "config"))

    def write(table: object) -> None:
        path = own_table()
        assert path is not None
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(table if isinstance(table, str) else json.dumps(table))

    return write


@pytest.fixture
def gguf_repository(home: Path) -> Path:
    """A repository of huggingface_hub's cache with two GGUF files in one snapshot and one of them in an older one."""
    repository = home / "hf" / "hub" / ("models--" + GGUF_NAME.replace("/", "--"))
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("new")
    for digest, size in (("aa", 3000), ("bb", 5000)):
        (repository / "blobs" / digest).write_bytes(b"x" * size)
    for snapshot, files in (("new", {"a.gguf": "aa", "b.gguf": "bb"}), ("old", {"a.gguf": "aa"})):
        folder = repository / "snapshots" / snapshot
        folder.mkdir(parents=True)
        for name, digest in files.items():
            (folder / name).symlink_to(Path("../../blobs") / digest)
    return repository


# -- short names -------------------------------------------------------------------------------------------------------
def test_every_short_name_leads_to_one_file_of_a_hub(own: object) -> None:
    for name in _packaged():
        meaning = parse_name(expand(name))
        assert meaning is not None and meaning.file is not None, name
        assert parse_name(name) is None, f"{name} could be a name of a hub"


def test_the_users_own_names_win_and_may_lead_to_each_other_and_to_paths(own, tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF")
    own({"qwen3": "mine", "mine": str(file)})
    assert resolve("qwen3") == resolve("mine") == file
    assert short_names()["qwen3:4b"].startswith("Qwen/")
    assert expand("Qwen/Some-Model") == "Qwen/Some-Model"


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"a": "b", "b": "a"}, "from name to name"),
        ({"a": 3}, "'a' must have a name"),
        ("[]", "must hold a JSON object"),
        ("{", "not valid JSON"),
        ("{" + " " * (1 << 20) + "}", "more than 1048576 bytes"),
    ],
)
def test_a_table_that_is_wrong_is_said_with_its_place(own, table: object, message: str) -> None:
    own(table)
    with pytest.raises(ConfigError, match=message):
        expand("a")


def test_a_short_name_is_fetched_and_found_again(own, hub: HubServer) -> None:
    own({"tiny": NAME})
    folder = locate("tiny")
    assert resolve("tiny") == resolve(NAME) == folder
    hub.seen.clear()
    assert locate("tiny") == folder
    assert hub.seen == []


def test_a_name_that_is_nowhere_says_where_short_ones_are(home: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="mooli list --available"):
        resolve("nonsense:9b")


# -- the list and removal ----------------------------------------------------------------------------------------------
def test_what_was_fetched_is_listed_and_gone_when_removed(fetch: Pull, source: str) -> None:
    folder = fetch(source=source)
    (model,) = [model for model in kept_models() if model.hub]
    assert (model.name, model.path, model.hub) == (NAME, folder, source)
    assert model.size_bytes == sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    assert remove(kept_model(NAME)) >= model.size_bytes
    assert not model.home.exists()
    assert [model for model in kept_models() if model.hub] == []
    assert [entry.name for entry in model.home.parent.iterdir() if not entry.name.startswith(".mooli")] == []
    fetch(source=source)
    assert kept_model(NAME).path == folder


def test_an_unfinished_model_is_not_listed(fetch: Pull) -> None:
    folder = fetch()
    next(folder.glob("*.safetensors")).unlink()
    assert [model for model in kept_models() if model.hub] == []


def test_each_file_of_a_repository_is_a_model_and_goes_alone(gguf_repository: Path) -> None:
    names = [model.name for model in kept_models() if model.hub]
    assert names == [f"{GGUF_NAME}:a.gguf", f"{GGUF_NAME}:b.gguf"]
    with pytest.raises(ModelNotFoundError, match="name one of"):
        kept_model(GGUF_NAME)
    assert remove(kept_model(f"{GGUF_NAME}:a.gguf")) >= 3000
    assert [model.name for model in kept_models() if model.hub] == [f"{GGUF_NAME}:b.gguf"]
    assert sorted(path.name for path in gguf_repository.rglob("*") if path.is_symlink()) == ["b.gguf"]
    assert [blob.name for blob in (gguf_repository / "blobs").iterdir()] == ["bb"]
    assert kept_model(GGUF_NAME).name == f"{GGUF_NAME}:b.gguf"
    remove(kept_model(GGUF_NAME))
    assert not gguf_repository.exists()


def test_what_is_not_in_a_cache_is_not_removed(home: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.gguf"
    file.write_bytes(b"GGUF")
    with pytest.raises(ModelNotFoundError, match="remove it yourself"):
        kept_model(str(file))
    with pytest.raises(ModelNotFoundError, match="is not in the caches"):
        kept_model("other/thing")
    with pytest.raises(ModelNotFoundError, match="pip uninstall"):
        remove(kept_model("demo"))


# -- commands ----------------------------------------------------------------------------------------------------------
def test_list_show_and_rm_as_commands(own, gguf_repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own({"tiny-a": f"{GGUF_NAME}:a.gguf"})
    assert cli.main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["NAME", "SHORT", "NAME", "SIZE", "CHANGED"]
    assert any(line.split()[:3] == [f"{GGUF_NAME}:a.gguf", "tiny-a", "3"] for line in lines)
    assert cli.main(["list", "--json"]) == 0
    by_name = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert by_name[f"{GGUF_NAME}:b.gguf"]["size_bytes"] == 5000
    assert cli.main(["list", "--available", "--json"]) == 0
    states = {entry["name"]: entry["state"] for entry in json.loads(capsys.readouterr().out)}
    assert (states["tiny-a"], states["qwen3"]) == ("here", "")
    assert cli.main(["rm", "tiny-a"]) == 2
    assert "Say so with --yes" in capsys.readouterr().err
    assert cli.main(["rm", "tiny-a", "nothing", "--yes"]) == 2
    assert kept_model("tiny-a").size_bytes == 3000
    assert cli.main(["rm", "tiny-a", "--yes"]) == 0
    assert "acme/tiny-GGUF:a.gguf is removed: 3" in capsys.readouterr().err
    assert cli.main(["show", "tiny-a"]) == 2
    assert "`mooli list` shows what is here" in capsys.readouterr().err


def test_show_says_what_a_model_is_and_takes(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["show", "demo", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["parameters"] == 134_515_008
    assert facts["weights"]["Q4_1"] == "79 %"
    assert (facts["context_length"], facts["tools"], facts["reasoning"]) == (8192, "hermes", None)
    assert 90e6 < facts["loaded_bytes"] < 110e6
    assert cli.main(["show", "demo"]) == 0
    assert "134,515,008" in capsys.readouterr().out


# -- completion --------------------------------------------------------------------------------------------------------
def completed(*words: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    assert cli.main(["_candidates", " ".join(words)]) == 0
    return capsys.readouterr().out.splitlines()


def test_words_are_completed_by_what_they_are(own, capsys: pytest.CaptureFixture[str]) -> None:
    own({"tiny-a": "x/y"})
    assert completed("se", capsys=capsys) == ["selftest", "serve"]
    assert "_candidates" not in completed("", capsys=capsys)
    for command in ("run", "plan", "doctor"):
        assert completed(command, "tiny", capsys=capsys) == ["tiny-a"]
    assert completed("run", "qwen2.5:0", capsys=capsys) == ["qwen2.5:0.5b"]
    assert completed("serve", "--dtype", "bfl", capsys=capsys) == ["bfloat16"]
    assert completed("serve", "--model-path", "tiny", capsys=capsys) == ["tiny-a"]
    assert completed("serve", "--max-total", capsys=capsys) == ["--max-total-tokens"]
    assert completed("generate", "--file", "", capsys=capsys) == [""]
    assert completed("bench", "off", capsys=capsys) == ["offline"]
    assert completed("nonsense", "x", capsys=capsys) == [""]


def test_hidden_flags_are_not_offered() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seen")
    parser.add_argument("--secret", help=argparse.SUPPRESS)
    assert candidates(parser, ["--se"]) == ["--seen"]


@pytest.mark.slow
def test_bash_completes_a_name_with_a_colon(own, tmp_path: Path) -> None:
    import subprocess
    import sys

    (tmp_path / "mooli").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m mooli "$@"\n')
    (tmp_path / "mooli").chmod(0o755)
    script = SCRIPTS["bash"] + 'COMP_LINE="$1" COMP_POINT=${#1}; _mooli; printf "%s\\n" "${COMPREPLY[@]}"\n'
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}

    def complete(line: str) -> list[str]:
        command = ["bash", "-c", script, "bash", line]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=True)
        return done.stdout.split()

    assert complete("mooli run qwen3:0") == ["0.6b"]  # bash has the part before the colon already
    assert complete("mooli li") == ["list"]
