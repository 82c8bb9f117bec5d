"""A model is fetched whole and right, or not at all, through each hub's protocol."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from hub_server import NAME, SHARD, WANTED, HubServer, Pull, model_files, names

from mooli.errors import DownloadError, ModelNotFoundError
from mooli.hub import resolve
from mooli.hub.transfer import Cancelled


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
