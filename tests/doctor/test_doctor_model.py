"""What `mooli doctor --model-path` finds in a folder: everything that keeps a model from being served."""

from __future__ import annotations

import json

import pytest
from fake_machine import CONFIG, model_folder, shard, write_shard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modelslim_folder import quantised, write
from mooli.doctor import model_folder as checks
from mooli.doctor.model_folder import probe_model
from mooli.models.checkpoint import DummyCheckpoint
from mooli.models.registry import read_hf_config
from mooli.plan import weight_bytes

GIB = 2**30
SECOND = "model-00002-of-00002.safetensors"


@pytest.fixture
def folder(tmp_path):
    return model_folder(tmp_path / "m")


def found(folder, backend="cpu", free_bytes=None):
    return {finding.code: finding for finding in probe_model(str(folder), backend, free_bytes).findings}


def rewrite(path, **changes):
    raw = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in {**raw, **changes}.items() if value is not None}))


def test_a_whole_model_has_no_findings(folder):
    section = probe_model(str(folder), "cpu", 8 * GIB)
    assert section.findings == []
    assert (section.facts["architecture"], section.facts["dtype"]) == ("Qwen2ForCausalLM", "bfloat16")
    assert found(shard(folder)) == {}


def test_a_missing_shard_is_named(folder):
    (shard(folder) / SECOND).unlink()
    finding = found(folder)["shards-missing"]
    assert finding.found == f"1 of 2 shards: {SECOND}"
    assert SECOND in finding.cure[0]


def test_a_disk_without_room_for_the_rest_is_named(folder, monkeypatch):
    (shard(folder) / SECOND).unlink()
    rewrite(folder / "model.safetensors.index.json", metadata={"total_size": 2**60})
    assert "disk-full" in found(folder)


def test_a_truncated_shard_is_named(folder):
    path = shard(folder) / SECOND
    path.write_bytes(path.read_bytes()[:-1])
    finding = found(folder)["weights-damaged"]
    assert "truncated" in finding.found
    assert finding.cure[0] == f"rm {path}"


@pytest.mark.parametrize("text", [b"", b"\0" * 7, b"<html>not found</html>"])
def test_a_file_that_is_no_weights_is_named(folder, text):
    (folder / "model.safetensors").write_bytes(text)
    assert "weights-damaged" in found(folder)


def test_an_index_that_is_no_index_is_named(folder):
    for text in ("{", "{}", '{"weight_map": []}'):
        (folder / "model.safetensors.index.json").write_text(text)
        (folder / "model.safetensors").unlink(missing_ok=True)
        assert "index-broken" in found(folder)


def test_a_git_lfs_pointer_is_told_from_a_damaged_file(folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    result = found(folder)
    assert "git lfs pull" in result["git-lfs-pointer"].cure[0]
    assert "weights-damaged" not in result


def test_what_a_cut_off_download_leaves_is_named(folder):
    (folder / "model.safetensors.incomplete").write_bytes(b"")
    assert set(found(folder)) == {"download-incomplete"}


def test_pickles_are_not_read_and_can_be_converted(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    finding = found(folder)["pickle-weights"]
    assert "save_pretrained" in finding.cure[0]


def test_a_folder_without_weights_or_config_or_anything(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    assert "weights-missing" in found(folder)
    (folder / "config.json").unlink()
    assert "config-missing" in found(folder)
    (tmp_path / "empty").mkdir()
    assert {"config-missing", "weights-missing", "tokenizer-broken"} <= set(found(tmp_path / "empty"))


def test_a_missing_tokenizer_is_named(folder):
    (folder / "tokenizer.json").unlink()
    assert "there is no tokenizer.json" in found(folder)["tokenizer-broken"].found


def test_a_tokenizer_without_chat_template_is_only_a_warning(folder):
    (folder / "tokenizer_config.json").unlink()
    assert found(folder)["no-chat-template"].severity == "warning"


def test_a_chat_template_that_does_not_compile_is_named(folder):
    (folder / "chat_template.jinja").write_text("{% if %}")
    assert "does not compile" in found(folder)["chat-template-broken"].found


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": ["BloomForCausalLM"]},
        {"torch_dtype": "float8_e4m3fn"},
        {"quantization_config": {"quant_method": "bitsandbytes"}},
    ],
)
def test_a_model_that_is_not_implemented_is_refused_once(folder, changes):
    rewrite(folder / "config.json", **changes)
    assert list(found(folder)) == ["model-unsupported"]


def test_a_broken_config_is_named(folder):
    (folder / "config.json").write_text("{")
    assert "config-broken" in found(folder)


def test_weights_of_another_tool_are_named(folder):
    checkpoint = DummyCheckpoint(read_hf_config({**CONFIG, "torch_dtype": "bfloat16"}))
    tensors = [checkpoint.tensor(name) for name in checkpoint.names()]
    write_shard(folder / "model.safetensors", tensors, dtype="I16")
    assert "tensors of type I16" in found(folder)["weights-of-other-type"].found


def test_files_that_do_not_belong_together_are_named(folder):
    rewrite(folder / "config.json", hidden_size=48)
    assert "model-broken" in found(folder)


def test_a_float16_model_on_an_npu_may_give_garbled_text(folder):
    rewrite(folder / "config.json", torch_dtype="float16")
    assert "--dtype bfloat16" in found(folder, "ascend")["float16-overflows"].cure[0]
    assert "float16-overflows" not in found(folder, "cpu")


@pytest.mark.parametrize("backend", ["cpu", "ascend", "cuda"])
def test_a_model_larger_than_the_free_memory_is_out_of_memory(folder, backend):
    finding = found(folder, backend, free_bytes=GIB // 2)["out-of-memory"]
    assert "0.50 GiB are free" in finding.found
    assert any(line.startswith("mooli plan /") for line in finding.cure)
    assert finding.backends == (backend,)


def test_quantisation_is_proposed_where_it_is_enough():
    config = read_hf_config({**CONFIG, "hidden_size": 1024, "intermediate_size": 2**17, "num_hidden_layers": 4})
    (finding,) = checks.memory_findings(config, 4 * GIB, 3 * GIB, "cpu", "m")
    assert finding.cure[0].startswith("start with --quantization int8: ")


@pytest.mark.parametrize("name", ["", "\0", "~nobody-here/x", "a" * 5000, "/nowhere/x", "Qwen/NotHere", "../../x"])
def test_a_name_that_means_nothing_is_not_found(name, tmp_path, monkeypatch):
    below = tmp_path / "one" / "two" / "three"  # where this is run, an x may lie two folders up
    below.mkdir(parents=True)
    monkeypatch.chdir(below)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "no-cache"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "no-cache"))
    assert list(found(name)) == ["model-not-found"]


def test_a_gguf_file_is_examined_too(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF\x03\0\0\0")
    assert "weights-damaged" in found(tmp_path / "x.gguf")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(["config.json", "model.safetensors", "tokenizer.json", "model.safetensors.index.json"]),
    cut=st.integers(0, 400),
    junk=st.binary(max_size=40),
)
def test_no_damage_to_a_folder_breaks_the_examination(tmp_path, name, cut, junk):
    folder = model_folder(tmp_path / "m")
    path = folder / name
    text = path.read_bytes() if path.exists() else b"{}"
    path.write_bytes(text[:cut] + junk + text[cut + len(junk) :])
    probe_model(str(folder), "cpu", GIB)


def test_a_folder_of_msmodelslim_has_nothing_wrong_with_its_types(tmp_path):
    folder = write(model_folder(tmp_path / "m"), *quantised())
    (folder / "model.safetensors").unlink()
    section = probe_model(str(folder), "ascend", 8 * GIB)
    assert [finding.code for finding in section.findings] == []


def test_a_folder_of_msmodelslim_without_a_scale_is_broken(tmp_path):
    tensors, description = quantised()
    del tensors["model.layers.0.self_attn.q_proj.weight_scale"]
    folder = write(model_folder(tmp_path / "m"), tensors, description)
    (folder / "model.safetensors").unlink()
    assert "q_proj.weight_scale is missing" in found(folder)["model-broken"].found


def test_int4_is_no_cure_on_an_npu(folder):
    config = read_hf_config(CONFIG)
    free = GIB + weight_bytes(config, "bfloat16", quantization="int4")
    on_cpu, on_npu = (found(folder, backend, free)["out-of-memory"].cure for backend in ("cpu", "ascend"))
    assert any("--quantization int4" in cure for cure in on_cpu)
    assert not any("--quantization int4" in cure for cure in on_npu)
