"""Folders whose vocabulary is a SentencePiece model: ids of the package itself, what is refused, openPangu's template.

The package is not among the requirements: models and ids are kept as files. Running this module as a script, where
`sentencepiece` is installed, writes them anew.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_tokenizers import ROOT, TEXTS

from mooli.errors import TokenizerError
from mooli.formats.sentencepiece import CONTROL, UNKNOWN, USER_DEFINED, read_sentencepiece
from mooli.frontend.tokenizer import Tokenizer, load_tokenizer

GOLDEN = ROOT / "tests/golden/sentencepiece"

OWN_TEXTS = {
    **TEXTS,
    "spaces at both ends": "  hi  there ",
    "symbols of the author": "a<think>b</think> c\n\nd [unused9]e",
    "names of pieces": "x<s>y<0x41>z[unused10]",
}
USER_SYMBOLS = ["<think>", "</think>", "\n\n", "[unused9]"]
KINDS: dict[str, dict[str, Any]] = {
    "bpe": {"model_type": "bpe", "vocab_size": 600, "byte_fallback": True, "remove_extra_whitespaces": False},
    "bpe-symbols": {
        "model_type": "bpe",
        "vocab_size": 600,
        "byte_fallback": True,
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
        "user_defined_symbols": USER_SYMBOLS,
    },
    "bpe-no-bytes": {"model_type": "bpe", "vocab_size": 350, "character_coverage": 0.98},
    "unigram": {"model_type": "unigram", "vocab_size": 500, "byte_fallback": True, "remove_extra_whitespaces": False},
    "unigram-no-bytes": {"model_type": "unigram", "vocab_size": 250, "character_coverage": 0.98},
}


def write_golden() -> None:
    import io

    import sentencepiece

    corpus = [line for text in TEXTS.values() for line in text.splitlines() if line.strip()] * 3
    corpus += ["hello world the answer is 42 and 1234"] * 3
    ids: dict[str, dict[str, list[int]]] = {}
    for name, options in KINDS.items():
        written = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(corpus),
            model_writer=written,
            normalization_rule_name="identity",
            control_symbols=["[unused10]"],
            hard_vocab_limit=False,
            minloglevel=2,
            num_threads=1,
            **options,
        )
        (GOLDEN / f"{name}.model").write_bytes(written.getvalue())
        reference = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
        ids[name] = {text_name: reference.encode(text) for text_name, text in OWN_TEXTS.items()}
    lines = [
        f"{json.dumps(name)}: {{\n" + ",\n".join(f"{json.dumps(k)}: {v}" for k, v in g.items()) + "}"
        for name, g in ids.items()
    ]
    (GOLDEN / "ids.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


def folder_of(name: str, folder: Path, **config: Any) -> Path:
    (folder / "tokenizer.model").write_bytes((GOLDEN / f"{name}.model").read_bytes())
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def loaded(name: str, folder: Path, **config: Any) -> Tokenizer:
    return load_tokenizer(folder_of(name, folder, **config))


@pytest.mark.parametrize("name", KINDS)
def test_ids_are_those_of_the_package(name: str, tmp_path: Path) -> None:
    tokenizer = loaded(name, tmp_path)
    golden = json.loads((GOLDEN / "ids.json").read_text())[name]
    assert golden.keys() == OWN_TEXTS.keys()
    for text_name, ids in golden.items():
        text = OWN_TEXTS[text_name]
        assert tokenizer.encode(text, add_special_tokens=False, parse_special=False) == ids, text_name
        assert tokenizer.encode(text, parse_special=False) == [1, *ids], text_name
        if KINDS[name].get("byte_fallback"):
            assert tokenizer.decode(ids) == text, text_name
            assert tokenizer.least_tokens(text) <= len(ids) or not KINDS[name].get("add_dummy_prefix", True)


def test_named_pieces_are_known_and_begin_and_end_are_as_the_folder_says(tmp_path: Path) -> None:
    tokenizer = loaded("bpe", tmp_path, add_bos_token=False, add_eos_token=True)
    assert (tokenizer.bos_token, tokenizer.bos_id, tokenizer.eos_token) == ("<s>", 1, "</s>")
    assert 2 in tokenizer.eos_ids
    assert tokenizer.encode("hello")[-1] == 2 and 1 not in tokenizer.encode("hello")
    ends = tokenizer.encode("a[unused10]b", add_special_tokens=False)
    assert tokenizer.special_texts >= {"[unused10]", "<s>", "</s>", "<unk>"}
    assert [i for i in ends if i in tokenizer.special_ids] == [tokenizer.added_id("[unused10]")]


def test_declared_tokens_of_the_vocabulary_are_found_before_all_else(tmp_path: Path) -> None:
    plain = loaded("bpe-symbols", tmp_path)
    at = plain.added_id("[unused9]")
    assert at is not None and at not in plain.special_ids
    word = next(
        i for i in range(300, plain.vocab_size) if len(plain.token_text(i)) > 2 and plain.token_text(i).isalpha()
    )
    text = plain.token_text(word)
    declared = {str(at): {"content": "[unused9]", "special": True}, str(word): {"content": text, "special": False}}
    tokenizer = loaded("bpe-symbols", tmp_path, added_tokens_decoder=declared)
    assert at in tokenizer.special_ids
    assert tokenizer.encode(f"q{text}q", add_special_tokens=False)[1] == word


def test_a_folder_of_pangu_has_its_own_template(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "PanguEmbedded", "eos_token_id": 7}))
    tokenizer = loaded("bpe-symbols", tmp_path)
    template = tokenizer.chat_template
    assert template is not None and 7 in tokenizer.eos_ids
    user = {"role": "user", "content": "你好"}
    begun = "<s>[unused9]系统：[unused10][unused9]用户：你好"
    assert template.render([user], add_generation_prompt=True) == f"{begun}[unused10][unused9]助手："
    fast = template.render([user], add_generation_prompt=True, enable_thinking=False)
    assert fast == f"{begun} /no_think[unused10][unused9]助手："
    rest = [
        {"role": "assistant", "content": "在"},
        {"role": "tool", "content": "1"},
        {"role": "function", "content": "2"},
    ]
    assert template.render([{"role": "system", "content": "好"}, user, *rest], add_generation_prompt=False) == (
        "<s>[unused9]系统：好[unused10][unused9]用户：你好[unused10][unused9]助手：在[unused10]"
        "[unused9]工具：1[unused10][unused9]方法：2[unused10]"
    )
    ids = tokenizer.apply_chat_template([user], add_generation_prompt=True)
    assert ids[0] == 1 and ids.count(tokenizer.added_id("[unused10]")) == 2
    (tmp_path / "chat_template.jinja").write_text("own")
    assert load_tokenizer(tmp_path).apply_chat_template([user], tokenize=False) == "own"


def field(number: int, value: int | bytes) -> bytes:
    """Of a message: small numbers only."""
    return bytes([number << 3, value]) if isinstance(value, int) else bytes([number << 3 | 2, len(value)]) + value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (b"\x12\x02\x18\x03", "kind 'word'"),
        (b"\x12\x02\x18\x09", "unknown kind, 9"),
        (b"\x12\x03\xc0\x01\x01", "spaces behind words"),
        (b"\x1a\x02\x28\x00", "spaces behind words"),
        (b"\x1a\x0b" + field(1, b"nmt_") + field(2, b"abc"), r"by a table \(nmt_\)"),
        (b"\x0a\x05" + field(1, b"<s>"), "a piece twice"),
        (b"\x0a\x04" + field(3, UNKNOWN) + field(3, UNKNOWN), "an empty one"),
        (b"\x0a\x05" + field(1, b"\x01") + field(3, UNKNOWN), "2 pieces for what is unknown"),
        (b"\x0a\x05" + field(1, b"\x01") + field(3, 9), "a piece of type 9"),
        (b"\x0a\x02\x08\x01", "without a text"),
        (b"\x0b", "wire type 3"),
        (b"\x0a\x7f", "127 bytes, of which 0 are left"),
        (b"\x0a\x03" + field(1, b"\xff"), "codec"),
        (b"\xff" * 11, "longer than ten bytes"),
    ],
    ids=range(14),
)
def test_what_cannot_be_read_is_named(change: bytes, message: str, tmp_path: Path) -> None:
    folder = folder_of("bpe-no-bytes", tmp_path)
    file = folder / "tokenizer.model"
    file.write_bytes(file.read_bytes() + change)
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(folder)


def test_damaged_files_are_errors_and_nothing_else() -> None:
    whole = (GOLDEN / "bpe-no-bytes.model").read_bytes()
    draw = np.random.default_rng(1)
    num_errors = 0
    for index in range(300):
        data = bytearray(whole[: int(draw.integers(len(whole)))] if index % 3 == 0 else whole)
        for at in draw.integers(0, max(1, len(data)), 3) if data else ():
            data[at] = int(draw.integers(256))
        try:
            read_sentencepiece(bytes(data), "it")
        except TokenizerError:
            num_errors += 1
    assert 100 < num_errors < 300
    for data in (b"", b"hello", b"{}"):
        with pytest.raises(TokenizerError, match="no SentencePiece model"):
            read_sentencepiece(data, "it")


def test_pieces_are_those_of_the_file() -> None:
    model = read_sentencepiece((GOLDEN / "bpe-symbols.model").read_bytes(), "it")
    assert (model.kind, model.byte_fallback, model.unk_id, model.bos_id, model.eos_id) == ("bpe", True, 0, 1, 2)
    assert (model.adds_dummy_prefix, model.removes_extra_whitespaces, model.charsmap) == (False, False, b"")
    assert model.pieces[:3] == ["<unk>", "<s>", "</s>"] and model.types[:3] == [UNKNOWN, CONTROL, CONTROL]
    assert {p for p, t in zip(model.pieces, model.types, strict=True) if t == USER_DEFINED} == set(USER_SYMBOLS)
    assert model.scores[-1] < 0.0 <= model.scores[0]


if __name__ == "__main__":
    write_golden()
