"""The engine, the server and the commands fetch a model by its name, and never a path."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hub_server import NAME, SHARD, WANTED, HubServer, model_files

from mooli import Engine
from mooli.errors import DownloadError, ModelNotFoundError
from mooli.hub import resolve
from mooli.hub.locate import locate, locate_async


def test_a_name_that_is_not_here_is_fetched(hub: HubServer, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", logger="mooli"):
        folder = locate(NAME)
    assert resolve(NAME) == folder
    assert f"fetching {NAME} from huggingface: 7 files, 282 kB, into {folder}" in caplog.text
    hub.seen.clear()
    assert locate(NAME) == folder
    assert hub.seen == []


@pytest.mark.parametrize(
    "path", ["./a/b", "{root}/a/b", "~/b", "../a", "a/b/c", "a/b.gguf", "a/b.safetensors", "nothing"]
)
def test_a_path_is_never_fetched(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")  # and not where there may be such a folder
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    path = path.format(root=tmp_path)
    with pytest.raises(ModelNotFoundError):
        locate(path)
    assert hub.seen == []


def test_a_folder_that_looks_like_a_name_is_a_folder(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / NAME).mkdir(parents=True)
    (tmp_path / NAME / "config.json").write_text("{}")
    assert locate(NAME) == Path(NAME)
    assert hub.seen == []


def test_a_tokenizer_alone_is_not_the_model(hub: HubServer) -> None:
    folder = locate(NAME)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    assert resolve(NAME) == folder
    hub.seen.clear()
    assert locate(NAME, needs_weights=False) == folder
    assert hub.seen == []
    assert (locate(NAME) / SHARD).read_bytes() == model_files()[SHARD]


@pytest.mark.parametrize("variable", ["MOOLI_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_the_error_says_why_nothing_was_fetched(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "1")
    with pytest.raises(ModelNotFoundError, match=f"because {variable} is set.*mooli pull {NAME}.*Looked in: "):
        locate(NAME)
    assert hub.seen == []


def test_without_a_network_one_error_names_the_command(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DownloadError, match=f"could not be fetched.*`mooli pull {NAME}`"):
        locate(NAME)


def test_a_cancelled_start_ends_the_download(hub: HubServer) -> None:
    hub.cuts[SHARD] = [1000]
    hub.hold = threading.Event()

    async def start() -> None:
        task = asyncio.ensure_future(locate_async(NAME))
        while SHARD not in hub.files_sent():
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(start())  # it waits for the thread, so it ends only if the thread does
    assert not hub.hold.is_set()


TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 1,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}


def test_an_engine_fetches_the_model_that_it_is_given_by_name(hub: HubServer) -> None:
    hub.models["tiny/llama"] = {"config.json": json.dumps(TINY).encode(), "model.safetensors": b"not read"}
    kwargs = {"load_format": "dummy", "skip_tokenizer_init": True, "max_total_tokens": 64, "backend": "reference"}
    with Engine(model_path="tiny/llama", **kwargs) as engine:
        answer = engine.generate(input_ids=[1, 2, 3], sampling_params={"max_new_tokens": 2, "ignore_eos": True})
    assert len(answer["output_ids"]) == 2
    assert sorted(hub.files_sent()) == ["config.json", "model.safetensors"]


def test_looking_for_a_model_imports_nothing_of_the_network(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    script = "import sys, mooli.cli, mooli.hub.locate as l; l.locate(sys.argv[1]); "
    script += "print([name for name in ('huggingface_hub', 'mooli.hub.hubs') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# -- the command -------------------------------------------------------------------------------------------------------
def command(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "mooli", *words],
        env={**os.environ, "NO_PROXY": "*"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_command_prints_the_folder_and_two_at_once_share_the_work(hub: HubServer) -> None:
    hub.cuts[SHARD] = [1000]
    hub.hold = threading.Event()
    both = [command("pull", NAME, "--source", "modelscope") for _ in range(2)]
    waiting = None
    while waiting is None and all(process.poll() is None for process in both):
        # The first line of the one that has the lock is about files, of the other one about waiting.
        lines = [process.stderr.readline() for process in both if process.stderr is not None]
        waiting = next((line for line in lines if "another pull" in line), None)
    hub.hold.set()
    outputs = [process.communicate(timeout=120)[0] for process in both]
    assert waiting is not None
    assert [process.returncode for process in both] == [0, 0]
    assert outputs == [f"{resolve(NAME)}\n"] * 2
    assert sorted(hub.files_sent()) == sorted([*WANTED, SHARD])  # the one that was cut twice


def test_a_killed_command_goes_on_where_it_was(hub: HubServer, tmp_path: Path) -> None:
    hub.cuts[SHARD] = [150_000]
    hub.hold = threading.Event()
    words = ("pull", NAME, "--source", "modelscope", "--dir", str(tmp_path / "m"))
    first = command(*words)
    staging = tmp_path / "m" / ".mooli-pull"
    while first.poll() is None and 150_000 not in {path.stat().st_size for path in staging.glob("*")}:
        threading.Event().wait(0.02)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    hub.hold.set()
    assert not (tmp_path / "m" / "config.json").exists()
    hub.seen.clear()
    second = command(*words)
    output, said = second.communicate(timeout=120)
    assert (second.returncode, output) == (0, f"{tmp_path / 'm'}\n"), said
    assert [seen.range for seen in hub.seen if seen.name == SHARD] == ["bytes=150000-"]


def test_a_model_that_is_nowhere_is_one_line_and_status_2(hub: HubServer) -> None:
    process = command("pull", "a/none", "--source", "huggingface")
    output, said = process.communicate(timeout=120)
    assert (process.returncode, output) == (2, "")
    assert said.startswith("mooli: error: there is no model a/none on huggingface")
    assert said.count("\n") == 1
