"""A model is fetched whole and right, or not at all, through each hub's protocol."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hub_server import NAME, WANTED, HubServer, model_files

from mooli.errors import CheckpointError, ConfigError, DownloadError, ModelNotFoundError, UnsupportedModelError
from mooli.hub import resolve
from mooli.hub.pull import PullOptions, pull
from mooli.hub.transfer import Cancelled, TransferPolicy

FAST = TransferPolicy(timeout_s=5.0, retries=2, first_delay_s=0.0)
SHARD = "model-00001-of-00002.safetensors"
SMALL_SHARD = "model-00002-of-00002.safetensors"
HUBS = ("huggingface", "modelscope")

Pull = Callable[..., Path]


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


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_file() and path.name != ".mooli-pull.json"}


def partial_files(root: Path) -> list[Path]:
    return [path for path in root.rglob(".mooli-pull/*") if path.name != "lock"]


def _size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else -1


def test_a_model_is_fetched_and_then_found_by_its_name(fetch: Pull, source: str, home: Path) -> None:
    folder = fetch(source=source)
    assert names(folder) == WANTED
    assert all((folder / name).read_bytes() == model_files()[name] for name in WANTED)
    assert resolve(NAME) == folder
    assert not list(home.rglob(".mooli-pull"))


def test_a_second_pull_does_nothing_but_say_so(fetch: Pull, hub: HubServer, source: str, said: list[str]) -> None:
    folder = fetch(source=source)
    hub.seen.clear()
    said.clear()
    assert fetch(source=source) == folder
    assert hub.seen == []
    assert said == [f"{NAME} is complete in {folder}: nothing to fetch"]


def test_a_folder_of_ones_own_is_filled_and_known_again(
    fetch: Pull, hub: HubServer, source: str, tmp_path: Path
) -> None:
    assert fetch(source=source, folder=tmp_path / "m") == tmp_path / "m"
    assert names(tmp_path / "m") == WANTED
    hub.seen.clear()
    fetch(folder=tmp_path / "m")
    assert hub.seen == []


def test_a_file_that_was_changed_is_fetched_again_and_alone(fetch: Pull, hub: HubServer, tmp_path: Path) -> None:
    folder = fetch(folder=tmp_path)
    (folder / SHARD).write_bytes(b"x")
    hub.seen.clear()
    fetch(folder=tmp_path)
    assert hub.files_sent() == [SHARD]
    assert (folder / SHARD).read_bytes() == model_files()[SHARD]


def test_a_folder_that_another_program_filled_is_checked_and_not_fetched(
    fetch: Pull, hub: HubServer, source: str, tmp_path: Path
) -> None:
    for name in WANTED:
        (tmp_path / name).write_bytes(model_files()[name])
    fetch(source=source, folder=tmp_path)
    assert hub.files_sent() == []


def test_a_cut_connection_goes_on_where_it_was_cut(fetch: Pull, hub: HubServer, source: str) -> None:
    hub.cuts[SHARD] = [1000, 2000]
    folder = fetch(source=source)
    kind = "cdn" if source == "huggingface" else "file"
    ranges = [seen.range for seen in hub.seen if seen.kind == kind and seen.name == SHARD]
    assert ranges == [None, "bytes=1000-", "bytes=3000-"]
    assert (folder / SHARD).read_bytes() == model_files()[SHARD]


def test_a_later_pull_goes_on_where_an_earlier_one_ended(
    fetch: Pull, hub: HubServer, source: str, home: Path, said: list[str]
) -> None:
    hub.cuts[SHARD] = [1000, 0, 0]
    with pytest.raises(DownloadError, match=r"1000 of 204800 bytes are kept; the same command goes on"):
        fetch(source=source)
    with pytest.raises(ModelNotFoundError):
        resolve(NAME)
    assert not list(home.rglob("config.json"))
    hub.seen.clear()
    fetch(source=source)
    kind = "cdn" if source == "huggingface" else "file"
    assert [seen.range for seen in hub.seen if seen.kind == kind and seen.name == SHARD] == ["bytes=1000-"]
    assert any("from an earlier pull" in line for line in said)


def test_what_one_hub_began_the_other_ends(fetch: Pull, hub: HubServer, tmp_path: Path) -> None:
    hub.cuts[SHARD] = [1000, 0, 0]
    with pytest.raises(DownloadError):
        fetch(source="huggingface", folder=tmp_path)
    fetch(source="modelscope", folder=tmp_path)
    assert [s.range for s in hub.seen if s.hub == "modelscope" and s.name == SHARD] == ["bytes=1000-"]


def test_a_server_without_ranges_sends_all_again(fetch: Pull, hub: HubServer, source: str) -> None:
    hub.no_ranges = True
    hub.cuts[SHARD] = [1000]
    assert (fetch(source=source) / SHARD).read_bytes() == model_files()[SHARD]


@pytest.mark.parametrize("name", [SHARD, "tokenizer.json"])
def test_a_wrong_checksum_is_refused_and_removed(
    fetch: Pull, hub: HubServer, source: str, home: Path, name: str
) -> None:
    right = model_files()[name]
    hub.served[name] = right[:-1] + b"!"
    with pytest.raises(DownloadError, match=rf"{name} .* wrong checksum .* removed"):
        fetch(source=source)
    assert not any(path.read_bytes() == hub.served[name] for path in home.rglob("*") if path.is_file())
    assert not list(home.rglob("config.json"))
    hub.served.clear()
    assert (fetch(source=source) / name).read_bytes() == right


def test_an_earlier_part_that_is_wrong_is_fetched_once_more(fetch: Pull, hub: HubServer, home: Path) -> None:
    hub.cuts[SHARD] = [1000, 0, 0]
    with pytest.raises(DownloadError):
        fetch(source="modelscope")
    (part,) = (path for path in partial_files(home) if path.name.endswith(SHARD))
    part.write_bytes(b"y" * 1000)
    assert (fetch(source="modelscope") / SHARD).read_bytes() == model_files()[SHARD]


def test_a_file_without_a_checksum_is_named(fetch: Pull, hub: HubServer, said: list[str]) -> None:
    hub.no_digests = True
    fetch(source="modelscope")
    assert f"modelscope publishes no checksum of {SHARD}: only its size is checked" in said


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(fetch: Pull, hub: HubServer, source: str, status: int) -> None:
    hub.statuses[SHARD] = [status]
    fetch(source=source)
    assert hub.files_sent().count(SHARD) == 2


@pytest.mark.parametrize(
    ("status", "error", "says"),
    [
        (404, ModelNotFoundError, "is not on .* any more"),
        (401, DownloadError, "status 401.*log in"),
        (403, DownloadError, "status 403"),
        (410, DownloadError, "HTTP status 410"),
    ],
)
def test_a_file_that_is_refused_ends_the_pull(
    fetch: Pull, hub: HubServer, source: str, status: int, error: type[Exception], says: str
) -> None:
    hub.statuses["tokenizer.json"] = [status]
    with pytest.raises(error, match=says):
        fetch(source=source)
    assert hub.files_sent().count("tokenizer.json") == 1


@pytest.mark.parametrize(
    ("hub_name", "status", "code", "error", "says"),
    [
        ("huggingface", 404, "RepoNotFound", ModelNotFoundError, "there is no model|private"),
        ("huggingface", 401, "RepoNotFound", ModelNotFoundError, "private: then log in"),
        ("huggingface", 403, "GatedRepo", DownloadError, "is gated: accept its terms"),
        ("huggingface", 500, "", DownloadError, "HTTP status 500"),
        ("modelscope", 404, "", ModelNotFoundError, "there is no model"),
        ("modelscope", 401, "", DownloadError, "MODELSCOPE_API_TOKEN"),
        ("modelscope", 403, "", DownloadError, "MODELSCOPE_API_TOKEN"),
        ("modelscope", 500, "", DownloadError, "HTTP status 500"),
    ],
)
def test_a_model_that_is_refused_says_why(
    fetch: Pull, hub: HubServer, home: Path, hub_name: str, status: int, code: str, error: type[Exception], says: str
) -> None:
    hub.refuse[NAME] = (status, code)
    with pytest.raises(error, match=says):
        fetch(source=hub_name)
    assert not list(home.rglob(".mooli-pull"))


def test_a_revision_that_is_not_there_is_named(fetch: Pull, source: str) -> None:
    with pytest.raises(ModelNotFoundError, match="v9"):
        fetch(source=source, revision="v9")


def test_a_revision_has_its_own_place(fetch: Pull, source: str) -> None:
    old = fetch(source=source, revision="v1")
    assert resolve(NAME, revision="v1") == old
    assert names(old) == WANTED


def test_a_new_commit_with_the_same_weights_fetches_only_what_changed(fetch: Pull, hub: HubServer) -> None:
    fetch(source="huggingface")
    hub.commit = "beef" * 10
    hub.models[NAME]["tokenizer_config.json"] = b'{"a": 2}'
    hub.seen.clear()
    folder = fetch(source="huggingface", revision=hub.commit)
    assert hub.files_sent() == ["tokenizer_config.json"]
    assert names(folder) == WANTED


def test_a_model_half_fetched_by_another_program_is_completed(fetch: Pull, hub: HubServer) -> None:
    folder = fetch(source="huggingface")
    (folder / SHARD).unlink()
    with pytest.raises(ModelNotFoundError, match=f"unfinished: 1 files of weights are missing, {SHARD}"):
        resolve(NAME)
    hub.commit = "beef" * 10
    assert names(fetch(source="huggingface")) == WANTED


def test_a_token_goes_to_its_hub_and_not_to_a_cdn(
    fetch: Pull, hub: HubServer, source: str, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    hub.token = "hf_sesame"
    with pytest.raises((ModelNotFoundError, DownloadError)):
        fetch(source=source)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", hub.token)
    hub.seen.clear()
    fetch(source=source)
    assert all("authorization" in seen.headers for seen in hub.seen if seen.kind in ("list", "file"))
    to_cdn = [seen.headers for seen in hub.seen if seen.kind == "cdn"]
    assert bool(to_cdn) == (source == "huggingface")
    assert not any({"authorization", "cookie"} & set(headers) for headers in to_cdn)
    assert hub.token not in " ".join(said)


def test_a_full_disk_is_said_before_anything_is_fetched(
    fetch: Pull, hub: HubServer, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 70_000_000})())
    hub.models[NAME][SHARD] = bytes(4_000_000)
    with pytest.raises(DownloadError, match=r"0\.07 GB free and 0\.00 GB are still to come"):
        fetch(source=source)
    assert hub.files_sent() == []


def test_two_pulls_at_once_fetch_each_file_once(fetch: Pull, hub: HubServer, source: str, said: list[str]) -> None:
    hub.cuts[SHARD] = [1000]
    hub.hold = threading.Event()
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(fetch(source=source))) for _ in range(2)]
    for thread in threads:
        thread.start()
    while not any("is running: waiting" in line for line in said) and any(thread.is_alive() for thread in threads):
        threads[0].join(0.02)
    hub.hold.set()
    for thread in threads:
        thread.join()
    assert len(found) == 2
    assert found[0] == found[1]
    sent = hub.files_sent()
    assert sorted(sent) == sorted([*WANTED, SHARD])  # the cut one twice


def test_a_pull_that_is_stopped_keeps_what_came(fetch: Pull, hub: HubServer, home: Path, source: str) -> None:
    hub.cuts[SHARD] = [1000]
    hub.hold = threading.Event()
    stop = threading.Event()
    failures: list[BaseException] = []

    def run() -> None:
        try:
            fetch(source=source, stop=stop)
        except Cancelled as exc:
            failures.append(exc)

    thread = threading.Thread(target=run)
    thread.start()
    while thread.is_alive() and not any(_size_of(path) == 1000 for path in partial_files(home)):
        thread.join(0.02)
    stop.set()
    thread.join()
    assert len(failures) == 1
    hub.seen.clear()
    assert names(fetch(source=source)) == WANTED
    hub.hold.set()
    kind = "cdn" if source == "huggingface" else "file"
    assert [seen.range for seen in hub.seen if seen.kind == kind and seen.name == SHARD] == ["bytes=1000-"]


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
    monkeypatch.setattr("mooli.hub.web.json.loads", lambda text: json.JSONDecoder().decode(body.decode()))
    with pytest.raises(DownloadError, match="modelscope"):
        fetch(source="modelscope")
