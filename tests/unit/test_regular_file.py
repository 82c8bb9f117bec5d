"""What a model folder holds is opened only where it is a regular file of the model."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from made_tokenizers import trained_byte_level, write_folder

from model_files import small_gguf, small_safetensors
from mooli.errors import CheckpointError, ModelError, ModelNotFoundError, TokenizerError
from mooli.formats.files import open_weights, parse_json, read_given_file, read_json, read_text_file
from mooli.formats.gguf import GGUFFile, is_gguf
from mooli.formats.safetensors import SafetensorsFolder
from mooli.frontend.tokenizer import load_tokenizer
from mooli.hub.destination import RECORD, read_record
from mooli.models.loader import open_model
from mooli.models.modelslim import described_types, find_description

READERS: dict[str, Callable[[Path], object]] = {
    "text": lambda path: read_text_file(path, 100),
    "given": lambda path: read_given_file(path, 100),
    "json": read_json,
    "weights": lambda path: open_weights(path).close(),
    "gguf": GGUFFile,
}


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_text("KEY=abc")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    return path


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_a_pipe_a_device_and_a_folder_are_refused_and_not_waited_for(
    folder: Path, read: Callable[[Path], object]
) -> None:
    os.mkfifo(folder / "pipe")
    (folder / "device").symlink_to("/dev/zero")
    (folder / "folder").mkdir()
    (folder / "to_pipe").symlink_to("pipe")
    for name in ("pipe", "device", "folder", "to_pipe"):
        with pytest.raises(CheckpointError, match=r"not a regular file|leads out"):
            read(folder / name)
    with pytest.raises(ModelNotFoundError):
        read(folder / "nothing")
    (folder / "loop").symlink_to("loop")
    with pytest.raises(ModelError):
        read(folder / "loop")


def test_text_is_read_only_from_the_models_folder(folder: Path, secret: Path) -> None:
    (folder / "own").write_text("own")
    (folder / "inside").symlink_to("own")
    assert read_text_file(folder / "inside", 100) == b"own"
    for name, target in (("absolute", secret), ("relative", "../secret"), ("twice", "absolute")):
        (folder / name).symlink_to(target)
        with pytest.raises(CheckpointError, match="leads out of the model's folder"):
            read_text_file(folder / name, 100)
        assert read_given_file(folder / name, 100) == b"KEY=abc"
    (folder / "sub").symlink_to(secret.parent)
    with pytest.raises(CheckpointError, match="leads out"):
        read_text_file(folder / "sub" / "secret", 100, root=folder)


def test_the_folder_itself_may_be_a_link(folder: Path, tmp_path: Path) -> None:
    (folder / "own").write_text("own")
    (tmp_path / "link").symlink_to(folder)
    assert read_text_file(tmp_path / "link" / "own", 100) == b"own"


def test_a_snapshot_of_a_hub_reads_the_blobs_beside_it_and_nothing_else(tmp_path: Path, secret: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs = tmp_path / "models--a--b" / "blobs"
    (snapshot / "sub").mkdir(parents=True)
    blobs.mkdir()
    (blobs / "digest").write_text("blob")
    (snapshot / "file").symlink_to("../../blobs/digest")
    (snapshot / "sub" / "file").symlink_to("../../../blobs/digest")
    assert read_text_file(snapshot / "file", 100) == b"blob"
    assert read_text_file(snapshot / "sub" / "file", 100, root=snapshot) == b"blob"
    (snapshot / "out").symlink_to(secret)
    (blobs / "out").symlink_to(secret)
    (snapshot / "through").symlink_to("../../blobs/out")
    (snapshot / "refs").symlink_to("../../refs")
    for name in ("out", "through"):
        with pytest.raises(CheckpointError, match="leads out"):
            read_text_file(snapshot / name, 100)


def test_no_more_than_the_bound_is_read(folder: Path) -> None:
    (folder / "file").write_bytes(b"x" * 101)
    with pytest.raises(CheckpointError, match="more than 100 bytes"):
        read_text_file(folder / "file", 100)
    (folder / "file").write_bytes(b"x" * 100)
    assert len(read_text_file(folder / "file", 100)) == 100


def test_weights_may_be_on_another_disk(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere.gguf").write_bytes(small_gguf())
    (folder / "x.gguf").symlink_to(tmp_path / "elsewhere.gguf")
    GGUFFile(folder / "x.gguf").close()
    (tmp_path / "elsewhere.safetensors").write_bytes(small_safetensors())
    (folder / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    SafetensorsFolder(folder).close()


@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize("name", ["x.gguf", "x.safetensors", "quant_model_description.json"])
def test_what_is_found_by_its_ending_is_no_pipe_either(folder: Path, name: str, kind: str) -> None:
    (folder / "config.json").write_text("{}")
    os.mkfifo(folder / name) if kind == "pipe" else (folder / name).symlink_to("/dev/zero")
    assert not is_gguf(folder / name)
    with pytest.raises(ModelError):
        if name == "x.gguf":
            open_model(folder / name)
        elif name.endswith(".safetensors"):
            SafetensorsFolder(folder).close()
        else:
            description = find_description(folder)
            assert description is not None
            described_types(description)


def test_the_record_of_a_pull_is_no_pipe(folder: Path) -> None:
    os.mkfifo(folder / RECORD)
    assert read_record(folder) is None


TEXTS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/tool_use.jinja",
)


@pytest.mark.parametrize("kind", ["environment", "pipe", "device", "nowhere"])
@pytest.mark.parametrize("name", TEXTS)
def test_no_file_of_a_tokenizer_hands_out_another_or_hangs(folder: Path, name: str, kind: str) -> None:
    write_folder(folder, trained_byte_level("gpt-2"))
    (folder / "additional_chat_templates").mkdir()
    (folder / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(folder / name)
    else:
        target = {"environment": "/proc/self/environ", "device": "/dev/zero", "nowhere": "/nowhere"}[kind]
        (folder / name).symlink_to(target)
    with pytest.raises(TokenizerError, match=name.rsplit("/", 1)[-1]):
        load_tokenizer(folder)


def test_line_ends_of_a_template_are_those_of_this_machine(folder: Path) -> None:
    write_folder(folder, trained_byte_level("gpt-2"))
    (folder / "chat_template.jinja").write_bytes(b"a\r\nb\rc\n")
    template = load_tokenizer(folder).chat_template
    assert template is not None
    assert template.source == "a\nb\nc\n"


def test_a_key_that_is_there_twice_among_many_is_named_at_once() -> None:
    names = [f"k{i}" for i in range(100_000)]
    text = json.dumps(dict.fromkeys(names, 0))[:-1] + ', "k99999": 1}'
    with pytest.raises(CheckpointError, match="duplicate key 'k99999'"):
        parse_json(text.encode(), "x")
