"""A tokenizer out of GGUF metadata.

Owns what the metadata keys mean and which pre-tokenizer stands behind each name. Never opens a file: the caller brings
the metadata. Anything unknown is an error that names it, because a nearly right tokenizer makes a quietly worse model.

Names and meaning of the keys: GGUF specification, section tokenizer; the pre-tokenizers are those of the original
tokenizer.json files that llama.cpp's converter fingerprints under these names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mooli.errors import TokenizerError
from mooli.formats.gguf import StringArray
from mooli.formats.sentencepiece import CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from mooli.frontend.chat_template import ChatTemplate
from mooli.frontend.own_templates import own_template
from mooli.frontend.sentencepiece_tokenizer import add_typed_tokens, merges_by_score, whole_text_steps
from mooli.frontend.tokenizer import END_OF_TURN_TOKENS, Tokenizer, tokenizer_errors, with_bos_and_eos
from mooli.frontend.tokenizer_bounds import check_longest, text_bounds

if TYPE_CHECKING:
    import tokenizers

_MAX_TOKENS = 1 << 22
_MAX_TEMPLATES = 64

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_QWEN35_SPLIT = _QWEN2_SPLIT.replace(r"?\p{L}+|", r"?[\p{L}\p{M}]+|").replace(
    r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]"
)
_TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_GPT4O_SPLIT = (
    _TEKKEN_SPLIT.replace(r"\p{M}]+|", rf"\p{{M}}]+{_CONTRACTION}|")
    .replace(r"\p{M}]*|", rf"\p{{M}}]*{_CONTRACTION}|")
    .replace(r"|\p{N}|", r"|\p{N}{1,3}|")
)
DEEPSEEK_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376\u0377"
    "\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556"
    "\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a"
    "\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4"
    "\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc"
    "\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f"
    "\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b"
    "\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a"
    "\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2"
    "\U000118a0-\U000118df\U0001e900-\U0001e943"
)
"""Letters with a case, as Unicode had them when this vocabulary was made; escaped, as several look alike."""

_DEEPSEEK_LLM_SPLITS = (
    "[\r\n]",
    rf"\s?[{DEEPSEEK_LETTERS}]+",
    "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
    r"\s+$",
    "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
)
_DEEPSEEK_V3_SPLITS = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)


@dataclass(frozen=True)
class _PreTokenizer:
    """How text is cut before the merges: by each of `splits` in turn, then by digits. (): GPT-2's own rule."""

    splits: tuple[str, ...] = ()
    single_digits: bool = False
    nfc: bool = False
    ignore_merges: bool = False
    adds_bos: bool = False


_CL100K = _PreTokenizer(splits=(_LLAMA3_SPLIT,))
_LLAMA3 = _PreTokenizer(splits=(_LLAMA3_SPLIT,), ignore_merges=True, adds_bos=True)
_QWEN2 = _PreTokenizer(splits=(_QWEN2_SPLIT,), nfc=True)
_GPT4O = _PreTokenizer(splits=(_GPT4O_SPLIT,))
_DEEPSEEK_V3 = _PreTokenizer(splits=_DEEPSEEK_V3_SPLITS)
_STARCODER = _PreTokenizer(single_digits=True)
_PRE_TOKENIZERS = {
    "gpt-2": _PreTokenizer(),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "lfm2": _LLAMA3,
    "dbrx": _CL100K,
    "glm4": _CL100K,
    "chatglm-bpe": _CL100K,
    "gpt-4o": _GPT4O,
    "qwen2": _QWEN2,
    "qwen35": _PreTokenizer(splits=(_QWEN35_SPLIT,), nfc=True),
    "smollm": _STARCODER,
    "starcoder": _STARCODER,
    "deepseek-llm": _PreTokenizer(splits=_DEEPSEEK_LLM_SPLITS, single_digits=True),
    "deepseek-v3": _DEEPSEEK_V3,
    "hunyuan-dense": _DEEPSEEK_V3,
    "hunyuan": _QWEN2,
    "minimax-m2": _GPT4O,
    "tekken": _PreTokenizer(splits=(_TEKKEN_SPLIT,), ignore_merges=True, adds_bos=True),
}

_INFILL_KEYS = {
    "pre": ("fim_pre_token_id", "prefix_token_id"),
    "suf": ("fim_suf_token_id", "suffix_token_id"),
    "mid": ("fim_mid_token_id", "middle_token_id"),
    "pad": ("fim_pad_token_id",),
    "rep": ("fim_rep_token_id",),
    "sep": ("fim_sep_token_id",),
}
"""The second are older names."""

_SENTENCEPIECE_ARCHITECTURES = ("llama", "gemma2", "gemma3", "phi3", "minicpm", "minicpm3", "pangu-embedded")

_END_ID_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")


def tokenizer_from_gguf(metadata: Mapping[str, Any], *, source: str = "the GGUF metadata") -> Tokenizer:
    """Build the tokenizer that GGUF metadata describes.

    metadata: key to value; arrays as lists or NumPy arrays. source: what to call it in errors.

    Raises TokenizerError when keys are missing, contradict each other, or name a model or pre-tokenizer that is not
    supported.
    """
    vocabulary = _Vocabulary(metadata, source)
    model = metadata.get("tokenizer.ggml.model")
    if model is not None and not isinstance(model, str):
        raise TokenizerError(f"tokenizer.ggml.model in {source} is a {type(model).__name__}, not a name")
    if model == "gpt2":
        backend, adds_bos = _byte_level_bpe(vocabulary)
    elif model == "llama":
        backend, adds_bos = _sentencepiece_bpe(vocabulary), True
    elif model is None:
        raise TokenizerError(f"{source} has no tokenizer.ggml.model, so it holds no tokenizer")
    else:
        raise TokenizerError(
            f"the tokenizer model {_short(model)} (tokenizer.ggml.model in {source}) is not supported; supported are "
            "'gpt2' and 'llama'"
        )
    with tokenizer_errors(f"adding the control tokens of {source}"):
        add_typed_tokens(backend, vocabulary.tokens, vocabulary.types, source)
    bos_id, eos_id = (vocabulary.named_id("bos_token_id"), vocabulary.named_id("eos_token_id"))
    adds_bos = vocabulary.flag("add_bos_token", default=adds_bos) and bos_id is not None
    adds_eos = vocabulary.flag("add_eos_token", default=False) and eos_id is not None
    with tokenizer_errors(f"setting the begin and end tokens of {source}"):
        with_bos_and_eos(
            backend,
            bos=vocabulary.text(bos_id) if adds_bos else None,
            eos=vocabulary.text(eos_id) if adds_eos else None,
        )
    with tokenizer_errors(f"reading the tokens of {source}"):
        bounds = text_bounds(backend, vocabulary.longest)
    return Tokenizer(
        backend,
        vocab_size=len(vocabulary.tokens),
        bos_id=bos_id,
        eos_ids={i for key in _END_ID_KEYS if (i := vocabulary.named_id(key)) is not None},
        special_tokens=vocabulary.special_tokens(),
        chat_template=_chat_template(vocabulary),
        bounds=bounds,
        infill_ids=vocabulary.infill_ids(),
    )


class _Vocabulary:
    """The tokens of the metadata, checked."""

    def __init__(self, metadata: Mapping[str, Any], source: str) -> None:
        self.metadata = metadata
        self.source = source
        tokens = self.array("tokens")
        if not tokens:
            raise TokenizerError(f"{source} has no tokenizer.ggml.tokens, so it holds no tokenizer")
        if len(tokens) > _MAX_TOKENS:
            raise TokenizerError(f"{source} has {len(tokens)} tokens; at most {_MAX_TOKENS} are read")
        if set(map(type, tokens)) != {str}:
            index = next(i for i, token in enumerate(tokens) if type(token) is not str)
            raise TokenizerError(f"tokenizer.ggml.tokens[{index}] in {source} is {_short(tokens[index])}, not a string")
        if "" in tokens:  # which cannot be a token of its own; such entries pad the vocabulary
            tokens = [token or f"[EMPTY_{index}]" for index, token in enumerate(tokens)]
        self.tokens: list[str] = tokens
        self.longest = max(map(len, tokens))
        check_longest(self.longest)
        self.ids = dict(zip(tokens, range(len(tokens)), strict=True))
        if len(self.ids) != len(self.tokens):
            twice = next(token for index, token in enumerate(self.tokens) if self.ids[token] != index)
            raise TokenizerError(f"tokenizer.ggml.tokens in {source} holds {_short(twice)} twice")
        self.types = self._types()

    def _types(self) -> list[int]:
        types = self.array("token_type")
        if types is None:
            types = [NORMAL] * len(self.tokens)
            for key in (*_END_ID_KEYS, "bos_token_id"):
                if (index := self.named_id(key)) is not None:
                    types[index] = CONTROL
        self._check_entries("token_type", types, int)
        # Some files mark the end of a turn as an ordinary added token. As such, a user could write it.
        for token in END_OF_TURN_TOKENS:
            if (at := self.ids.get(token)) is not None and types[at] == USER_DEFINED:
                types[at] = CONTROL
        return types

    def scores(self) -> list[float]:
        """One number a token: the larger, the earlier its parts are merged."""
        scores = self.array("scores")
        if scores is None:
            raise TokenizerError(f"{self.source} has no tokenizer.ggml.scores, which its tokenizer model needs")
        self._check_entries("scores", scores, (int, float))
        return scores

    def array(self, name: str) -> list[Any] | None:
        value = self.metadata.get(f"tokenizer.ggml.{name}")
        if value is None:
            return None
        is_own = hasattr(value, "tolist")
        if is_own:
            value = value.tolist()
        if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
            raise TokenizerError(f"tokenizer.ggml.{name} in {self.source} is a {type(value).__name__}, not an array")
        return value if is_own and isinstance(value, list) else list(value)

    def named_id(self, name: str) -> int | None:
        value = self.metadata.get(f"tokenizer.ggml.{name}")
        if value is None:
            return None
        try:
            index = int(value)
        except (TypeError, ValueError, OverflowError) as exc:
            raise TokenizerError(f"tokenizer.ggml.{name} in {self.source} is {_short(value)}, not a token id") from exc
        if not 0 <= index < len(self.tokens):
            raise TokenizerError(
                f"tokenizer.ggml.{name} in {self.source} is {index}; the vocabulary has {len(self.tokens)} tokens"
            )
        return index

    def special_tokens(self) -> dict[str, str]:
        """Texts of the tokens the file names, under the names chat templates use."""
        keys = {
            "bos_token": "bos_token_id",
            "eos_token": "eos_token_id",
            "unk_token": "unknown_token_id",
            "pad_token": "padding_token_id",
        }
        return {name: self.tokens[i] for name, key in keys.items() if (i := self.named_id(key)) is not None}

    def infill_ids(self) -> dict[str, int]:
        """Tokens that the file names for filling in a middle, under the short names of `Tokenizer`."""
        found = ((name, self.named_id(key)) for name, keys in _INFILL_KEYS.items() for key in reversed(keys))
        return {name: token_id for name, token_id in found if token_id is not None}

    def text(self, token_id: int | None) -> str | None:
        return None if token_id is None else self.tokens[token_id]

    def flag(self, name: str, *, default: bool) -> bool:
        value = self.metadata.get(f"tokenizer.ggml.{name}", default)
        if not isinstance(value, int):
            raise TokenizerError(
                f"tokenizer.ggml.{name} in {self.source} is a {type(value).__name__}, not true or false"
            )
        return bool(value)

    def _check_entries(self, name: str, entries: list[Any], kind: type | tuple[type, ...]) -> None:
        if len(entries) != len(self.tokens):
            raise TokenizerError(
                f"{self.source} has {len(self.tokens)} tokens but tokenizer.ggml.{name} has {len(entries)} entries"
            )
        kinds = {found for found in set(map(type, entries)) if not issubclass(found, kind) or found is bool}
        if kinds:
            index, entry = next((i, entry) for i, entry in enumerate(entries) if type(entry) in kinds)
            raise TokenizerError(f"tokenizer.ggml.{name}[{index}] in {self.source} is {_short(entry)}, not a number")


def _byte_level_bpe(vocabulary: _Vocabulary) -> tuple[tokenizers.Tokenizer, bool]:
    """Returns the tokenizer without added tokens, and whether it adds a begin token where the file does not say."""
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    name = vocabulary.metadata.get("tokenizer.ggml.pre")
    if name is None:
        raise TokenizerError(
            f"{vocabulary.source} has no tokenizer.ggml.pre, so how it cuts text is unknown; convert the model again "
            "with a current llama.cpp"
        )
    if not isinstance(name, str) or name not in _PRE_TOKENIZERS:
        raise TokenizerError(
            f"the pre-tokenizer {_short(name)} (tokenizer.ggml.pre in {vocabulary.source}) is not supported; supported "
            f"are {', '.join(_PRE_TOKENIZERS)}"
        )
    rule = _PRE_TOKENIZERS[name]
    size = _model_size(vocabulary.types)
    tokens = dict(vocabulary.ids)
    for token in vocabulary.tokens[size:]:
        del tokens[token]
    merges = _merges(vocabulary)
    try:
        backend = Backend(models.BPE(vocab=tokens, merges=merges, ignore_merges=rule.ignore_merges))
    except Exception as exc:
        _check_merges(vocabulary, merges)
        raise TokenizerError(f"building the vocabulary of {vocabulary.source} failed: {str(exc)[:500]}") from exc
    if rule.nfc:
        backend.normalizer = normalizers.NFC()
    steps: list[Any] = [pre_tokenizers.Split(Regex(split), behavior="isolated") for split in rule.splits]
    if rule.single_digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not rule.splits))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    return backend, rule.adds_bos


def _model_size(types: list[int]) -> int:
    """How many tokens, from id 0, belong to the merge model; the rest are added tokens and unused ids.

    Added tokens at the end stay outside the model, as in the original files: a model that takes whole words from its
    vocabulary (`ignore_merges`) would otherwise find them in a user's text. They must then follow without a gap.
    """
    used = len(types)
    while used and types[used - 1] == UNUSED:
        used -= 1
    size = used
    while size and types[size - 1] in (CONTROL, USER_DEFINED):
        size -= 1
    return size


def _merges(vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    """The file's lines, each cut at the first space that is not its first character, as a token may be a space. Whether
    the parts are tokens is not looked up: the library that takes them does that."""
    lines = vocabulary.metadata.get("tokenizer.ggml.merges")
    if isinstance(lines, StringArray):  # 150,000 of them: no text is made but what the library takes
        pairs = lines.pairs()
    else:
        lines = vocabulary.array("merges")
        if lines is None:
            raise TokenizerError(f"{vocabulary.source} has no tokenizer.ggml.merges, which its tokenizer model needs")
        pairs = []
        for line in lines:
            at = line.find(" ", 1) if isinstance(line, str) else -1
            if at < 0:
                break
            pairs.append((line[:at], line[at + 1 :]))
    if len(pairs) < len(lines):
        raise TokenizerError(
            f"tokenizer.ggml.merges[{len(pairs)}] in {vocabulary.source} is {_short(lines[len(pairs)])}, not two tokens"
        )
    return pairs


def _check_merges(vocabulary: _Vocabulary, merges: list[tuple[str, str]]) -> None:
    """Raise TokenizerError for the first merge of what is no token, or to what is none."""
    for index, (left, right) in enumerate(merges):
        for part in (left, right, left + right):
            if part not in vocabulary.ids:
                raise TokenizerError(
                    f"tokenizer.ggml.merges[{index}] in {vocabulary.source} is {_short(left + ' ' + right)}, but"
                    f" {_short(part)} is no token"
                )


def _sentencepiece_bpe(vocabulary: _Vocabulary) -> tokenizers.Tokenizer:
    """Llama 2's, Mistral's, Gemma's and Phi-3's tokenizer: SentencePiece BPE with byte fallback. Gemma's runs of spaces
    and of line ends are user-defined tokens."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models

    architecture = vocabulary.metadata.get("general.architecture", "llama")
    if not isinstance(architecture, str) or architecture not in _SENTENCEPIECE_ARCHITECTURES:
        raise TokenizerError(
            f"the SentencePiece tokenizer of architecture {_short(architecture)} in {vocabulary.source} is not"
            f" supported; only those of {', '.join(_SENTENCEPIECE_ARCHITECTURES)} are"
        )
    merges = merges_by_score(vocabulary.ids, vocabulary.types, vocabulary.scores())
    unknown = next((t for t, kind in zip(vocabulary.tokens, vocabulary.types, strict=True) if kind == UNKNOWN), None)
    with tokenizer_errors(f"building the vocabulary of {vocabulary.source}"):
        backend = Backend(
            models.BPE(vocab=vocabulary.ids, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
        )
    whole_text_steps(backend, (), has_prefix=vocabulary.flag("add_space_prefix", default=True))
    return backend


def _chat_template(vocabulary: _Vocabulary) -> ChatTemplate | None:
    sources: dict[str, Any] = {}
    names = vocabulary.metadata.get("tokenizer.chat_templates")
    if names is not None and (not isinstance(names, Sequence) or isinstance(names, str) or len(names) > _MAX_TEMPLATES):
        raise TokenizerError(
            f"tokenizer.chat_templates in {vocabulary.source} is not a list of at most {_MAX_TEMPLATES} names"
        )
    for name in names or ():
        if (named := vocabulary.metadata.get(f"tokenizer.chat_template.{name}")) is not None:
            sources[str(name)] = named
    if (default := vocabulary.metadata.get("tokenizer.chat_template")) is not None:
        sources["default"] = default
    if "default" not in sources and (own := own_template(vocabulary.metadata)) is not None:
        sources["default"] = own
    if "default" not in sources:
        return None
    return ChatTemplate(sources, special_tokens=vocabulary.special_tokens())


def _short(value: Any) -> str:
    """A value of a file in an error: it may be as long as the file."""
    return repr(str(value)[:80])
