"""The hubs' own client libraries: the local hub speaks their protocols, and they find what Mooli fetched."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from hub_server import NAME, WANTED, HubServer, model_files

from mooli.hub.pull import PullOptions, pull


def test_huggingface_hub_finds_what_was_fetched(hub: HubServer, home: Path) -> None:
    from huggingface_hub import snapshot_download, try_to_load_from_cache

    cache = home / "hf" / "hub"
    folder = pull(NAME, PullOptions(source="huggingface", say=print))
    for name in WANTED:
        assert try_to_load_from_cache(NAME, name, cache_dir=cache) == str(folder / name)
    assert snapshot_download(NAME, cache_dir=cache, local_files_only=True) == str(folder)


def test_huggingface_hub_fetches_the_same_from_the_same_hub(hub: HubServer, tmp_path: Path) -> None:
    from huggingface_hub import hf_hub_download

    folder = pull(NAME, PullOptions(source="huggingface", say=print))
    for name in WANTED:
        theirs = Path(hf_hub_download(NAME, name, cache_dir=tmp_path, endpoint=hub.url))
        assert theirs.read_bytes() == model_files()[name]
        # the same blob under the same name, so that neither fetches what the other has
        assert theirs.resolve().name == (folder / name).resolve().name


def test_mooli_fetches_nothing_that_huggingface_hub_has(hub: HubServer, home: Path) -> None:
    from huggingface_hub import hf_hub_download

    for name in WANTED:
        hf_hub_download(NAME, name, cache_dir=home / "hf" / "hub", endpoint=hub.url)
    hub.seen.clear()
    pull(NAME, PullOptions(source="huggingface", say=print))
    assert hub.seen == []


def test_modelscope_hub_finds_what_was_fetched(hub: HubServer, home: Path) -> None:
    download = pytest.importorskip("modelscope_hub.compat.snapshot_download").snapshot_download

    folder = pull(NAME, PullOptions(source="modelscope", say=print))
    assert Path(download(NAME, cache_dir=str(home / ".cache" / "modelscope"), local_files_only=True)) == folder


@pytest.mark.filterwarnings("ignore")
def test_modelscope_hub_fetches_the_same_from_the_same_hub(
    hub: HubServer, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    download = pytest.importorskip("modelscope_hub.compat.snapshot_download").snapshot_download
    # It keeps the endpoint that it was first given.
    importlib.import_module("modelscope_hub.config").set_default_config(None)

    folder = Path(download(NAME, cache_dir=str(tmp_path), allow_patterns=sorted(WANTED)))
    assert {name: (folder / name).read_bytes() for name in WANTED} == {name: model_files()[name] for name in WANTED}
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path))
    hub.seen.clear()
    assert pull(NAME, PullOptions(source="modelscope", say=print)) == folder
    assert hub.seen == []
