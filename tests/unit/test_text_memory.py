"""Texts in pieces that are remembered: always the ids of the whole, apart by owner, bounded."""

from __future__ import annotations

import random
import re
import string
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from made_tokenizers import CONTROL, TEXTS, USER_DEFINED, gguf_metadata, sentencepiece_metadata, trained_byte_level
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from mooli.errors import PromptError
from mooli.formats.sentencepiece import read_sentencepiece
from mooli.frontend import text_memory
from mooli.frontend.chat_encoding import encode_conversation
from mooli.frontend.gguf_tokenizer import tokenizer_from_gguf
from mooli.frontend.inputs import Caller, GenerateCall, InputRules
from mooli.frontend.sentencepiece_tokenizer import tokenizer_of_model
from mooli.frontend.text_cuts import safe_cuts
from mooli.frontend.text_memory import TextMemory
from mooli.frontend.tokenizer import Tokenizer

MODELS = Path(__file__).parents[1] / "golden/sentencepiece"

WORDS = [
    *("the", "I'll", "HELLO", "iPhone's", "answer", "汉字", "你好", "é", "e\u0301", "ſ", "K", "a", "Z", "don'T"),
    *(" ", "  ", "\n", "\n\n", "\t", "\r\n", " \n ", "\u00a0", "\u3000", "\u200b", "\x00"),
    *(".", ",", "。", "，", "'", "'s", "_", "-", "42", "1234567", "٣", "\u0301", "🧿", "#!", "{}", "//\n", "▁", "▁▁"),
    *(*CONTROL, *USER_DEFINED, "<s>", "</s>", "<tool>", "<|", "im_end|>"),
]


def from_folder_model(name: str) -> Backend:
    return tokenizer_of_model(read_sentencepiece((MODELS / name).read_bytes(), name), name)


def bert() -> Backend:
    backend = Backend(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[UNK]", "[CLS]", "[SEP]"]
    backend.train_from_iterator(TEXTS.values(), trainers.WordPieceTrainer(vocab_size=400, special_tokens=special))
    around = [(name, backend.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    backend.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]", around)
    return backend


def unigram() -> Backend:
    backend = Backend(models.Unigram())
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False)
    backend.train_from_iterator(TEXTS.values(), trainer)
    backend.add_special_tokens([AddedToken(text, lstrip=True, rstrip=True, normalized=False) for text in CONTROL])
    return backend


KINDS: dict[str, Callable[[], Tokenizer]] = {
    **{
        name: lambda name=name: tokenizer_from_gguf(gguf_metadata(trained_byte_level(name), name))
        for name in ("gpt-2", "llama-bpe", "qwen2", "gpt-4o", "smollm", "tekken")
    },
    "sentencepiece": lambda: tokenizer_from_gguf(sentencepiece_metadata()),
    "bpe.model": lambda: Tokenizer(from_folder_model("bpe.model")),
    "unigram": lambda: Tokenizer(unigram()),
    "wordpiece": lambda: Tokenizer(bert()),
}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return KINDS[request.param]()


@pytest.fixture(scope="module")
def qwen() -> Tokenizer:
    return KINDS["qwen2"]()


@pytest.fixture
def short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every text is long, and every possible cut is one."""
    monkeypatch.setattr(text_memory, "LONG_CHARS", 1)
    monkeypatch.setattr(text_memory, "PIECE_CHARS", 1)


def ids_or_error(encode: Callable[[], list[int]]) -> list[int] | str:
    try:
        return encode()
    except PromptError as exc:
        return str(exc)


def test_random_edits_of_a_text_have_the_ids_of_the_whole(tokenizer: Tokenizer, short_pieces: None) -> None:
    rng = random.Random(11)
    memory = TextMemory(tokenizer)
    words: list[str] = []
    for _ in range(400):
        edit, at = rng.randrange(8), rng.randrange(len(words) + 1)
        if edit == 0:
            words[at : at + rng.randrange(20)] = []
        elif edit == 1:
            words[at:at] = rng.choices(WORDS, k=3)
        elif edit == 2:
            words = rng.choices(WORDS, k=rng.randrange(60))
        else:
            words += rng.choices(WORDS, k=rng.randrange(1, 6))
        text, adds, parses = "".join(words), rng.random() < 0.5, rng.random() < 0.7
        expected, found = (
            ids_or_error(lambda: encode(text, add_special_tokens=adds, parse_special=parses))  # noqa: B023
            for encode in (tokenizer.encode, memory.of("me"))
        )
        assert found == expected, repr(text)
        (whole,) = tokenizer._encodings(tokenizer._backend, [text], add_special_tokens=False, with_places=True)
        places = [(token_id, *whole.token_to_chars(i)) for i, token_id in enumerate(whole.ids)]
        special = [place for place in places if text[place[1] : place[2]].strip() in tokenizer.special_texts]
        assert tokenizer.special_spans(text) == special
    assert memory._num_bytes == sum(text_memory._num_bytes(*item) for item in memory._pieces.items()) > 0


def test_only_what_is_new_is_tokenised(qwen: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    encode_parts = qwen.encode_parts

    def counted(texts, **kwargs):
        asked.append(sum(map(len, texts)))
        return encode_parts(texts, **kwargs)

    monkeypatch.setattr(qwen, "encode_parts", counted)
    memory = TextMemory(qwen)
    rng = random.Random(2)
    text = "".join(rng.choices(WORDS, k=8000))
    for _ in range(4):
        text += "".join(rng.choices(WORDS, k=100))
        assert memory.of("me")(text) == qwen.encode(text)
    assert asked[0] > len(text) / 2 and max(asked[1:]) < 4 * text_memory.PIECE_CHARS
    # Another's texts are not known, though they are the same; nor are those whose control tokens are text.
    memory.encode("you", text)
    memory.encode("me", text, parse_special=False)
    assert min(asked[-2:]) > len(text)
    num_before = len(asked)
    assert memory.of(None)(text) == qwen.encode(text) and memory.encode("me", "short") == qwen.encode("short")
    assert len(asked) == num_before


def test_what_is_remembered_is_bounded(qwen: Tokenizer, short_pieces: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_memory, "MAX_BYTES", 5000)
    memory = TextMemory(qwen)
    texts = [f"{i} " + f"word{i}x " * 30 for i in range(8)]
    for text in texts:
        assert memory.encode("me", text) == qwen.encode(text)
        assert memory._num_bytes == sum(text_memory._num_bytes(*item) for item in memory._pieces.items()) <= 5000
    newest = {key[3] for key in memory._pieces}
    assert " word7x" in newest and "0 word0x" not in newest


def test_a_cut_that_changes_ids_is_seen_and_not_made(qwen: Tokenizer, short_pieces: None) -> None:
    memory = TextMemory(qwen)
    token = next(text for i in range(700) if re.fullmatch("a[a-z]", text := qwen.token_text(i)))
    memory._cuts = lambda: re.compile(token[1])
    text = f"{token} x{token[1]}."
    assert len(qwen.encode(token)) == 1 and memory.encode("me", text) == qwen.encode(text)
    assert not memory._pieces


def test_control_tokens_in_messages_are_text_in_pieces_too(qwen: Tokenizer, short_pieces: None) -> None:
    memory, rng = TextMemory(qwen), random.Random(4)
    for _ in range(20):
        messages = [{"role": "user", "content": "".join(rng.choices(WORDS, k=40)) + CONTROL[1]}]
        ids = encode_conversation(qwen, messages, None, {})
        for _ in range(2):
            assert encode_conversation(qwen, messages, None, {}, encode=memory.of("me")) == ids
    assert {key[1] for key in memory._pieces} == {True, False}


def test_prompts_are_remembered_for_their_tenant_and_salt(qwen: Tokenizer, short_pieces: None) -> None:
    memory = TextMemory(qwen)
    rules = InputRules(
        encoder=qwen,
        texts=memory,
        vocab_size=qwen.vocab_size,
        context_length=1000,
        eos_ids=frozenset(),
        namespace="engine",
        next_seed=lambda: 0,
        preferred={},
    )
    text = "the answer is 42 and " * 9
    background = Caller(is_background=True)
    for salt, caller in ((None, background), (None, Caller()), ("salt", Caller()), ("salt", Caller(tenant="t"))):
        (request,) = rules.prepare(GenerateCall(text, cache_salt=salt), caller).requests
        assert request.prompt_ids.tolist() == qwen.encode(text)
        owners = {key[0] for key in memory._pieces}
        assert caller.is_background or request.namespace in owners
    assert len(owners) == 3


def test_many_threads_at_once(qwen: Tokenizer, short_pieces: None) -> None:
    memory, rng = TextMemory(qwen), random.Random(3)
    texts = ["".join(rng.choices(WORDS[:30], k=200))[: rng.randrange(100, 400)] for _ in range(10)] * 4
    with ThreadPoolExecutor(4) as threads:
        assert [*threads.map(memory.of("me"), texts)] == [qwen.encode(text) for text in texts]


EVERYWHERE = {left + right for left in "dX汉" for right in " \n。，"}


def cuts_of(
    pre: pre_tokenizers.PreTokenizer | None,
    normalizer: normalizers.Normalizer | None = None,
    pieces: tuple[str, ...] = (*EVERYWHERE,),
    added: tuple[AddedToken, ...] = (),
    **bpe: Any,
) -> set[str]:
    """Two characters each, between which a text is cut; with tokens of all of these there are unless told otherwise."""
    vocab = {piece: index for index, piece in enumerate([*string.ascii_letters, " ", "▁", *pieces])}
    backend = Backend(models.BPE(vocab, [], **bpe))
    if pre is not None:
        backend.pre_tokenizer = pre
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.add_tokens(list(added))
    cuts = safe_cuts(backend)
    return set() if cuts is None else {pair for pair in EVERYWHERE if cuts.search(pair)}


def without(right: str) -> set[str]:
    return {pair for pair in EVERYWHERE if pair[1] not in right}


def split(pattern: str, behavior: str = "isolated") -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(pattern), behavior)


@pytest.mark.parametrize(
    "pattern",
    [
        r"\w+ ?|\s",  # letters and a space
        r"[\w ]+|\s",
        r"(?:\w+ ?)+|\s",
        r"\p{L}+|(?:a| )+",
        r"[^\n]+|\n",
        r"\p{Lu}+|\s+",  # no small letter is taken
        r"\p{L}{2,}|\s+",  # nor one alone
        r"\p{L}+(?=\s)|\p{L}+|\s+",  # what stands behind is looked at
        r"\p{L}+\b|\s+",
        r"(?<! )\p{L}+|\s+",
        r"\p{L}*+\p{L}|\s+",  # the first takes all
        r"\p{L}*",
        r"[a-z&&[^b]]+|\s",
        r"\p{Cherokee}|\p{L}+",
        r"(\p{L}+)\1|\s",
        r"\p{L}+(?!\S)|\s",
        r".+",
    ],
)
def test_expressions_that_allow_no_cut_or_are_not_understood(pattern: str) -> None:
    assert not cuts_of(split(pattern)) - without(" ")


def test_cuts_are_where_every_step_allows_them() -> None:
    words = split(r"\w+|[^\w\s]+|\s+")
    assert cuts_of(words) == EVERYWHERE
    assert cuts_of(split(r"\w+[。，]*|\s+|.")) == without("。，")
    assert cuts_of(pre_tokenizers.Sequence([split(r"\p{N}{1,3}"), words])) == EVERYWHERE
    assert cuts_of(pre_tokenizers.Sequence([split(r"[a-z] "), words])) == without(" ")
    for merged in ("merged_with_previous", "merged_with_next", "contiguous"):
        assert cuts_of(split(r"\w+|\s+", merged)) == set()
    assert cuts_of(words, normalizers.NFKC()) == without("。，")
    for pattern in ("a", "", Regex("a *")):
        assert cuts_of(words, normalizers.Replace(pattern, "1")) == set()
    assert cuts_of(words, normalizers.Replace("``", '"')) == EVERYWHERE
    assert cuts_of(words, dropout=0.5) == set()


def test_cuts_of_a_vocabulary_without_expressions() -> None:
    spaces = normalizers.Replace(" ", "▁")
    latin = {pair for pair in EVERYWHERE if pair[0] != "汉"}
    assert cuts_of(None, spaces, ()) == latin
    assert cuts_of(None, spaces, ("of▁", "a。")) == latin & without(" 。")
    assert (
        cuts_of(None, spaces, (), ignore_merges=True) == cuts_of(None, spaces, (), end_of_word_suffix="</w>") == set()
    )


@pytest.mark.parametrize(
    ("token", "lost"),
    [
        (AddedToken("end of", normalized=False), " \n"),
        (AddedToken("end", rstrip=True, normalized=False), " \n"),
        (AddedToken("a。b", normalized=False), "。"),
        (AddedToken(" x", single_word=True, normalized=False), " \n。，"),
        (AddedToken("<|x|>", rstrip=True, lstrip=True, normalized=False), ""),
    ],
)
def test_added_tokens_are_never_cut(token: AddedToken, lost: str) -> None:
    assert cuts_of(split(r"\w+|[^\w\s]+|\s+"), added=(token,)) == without(lost)
