"""Text to token ids and back.

Owns `Tokenizer`; folders are read in `folder_tokenizer`, GGUF metadata in `gguf_tokenizer`. Produces the ids that
Hugging Face `transformers` produces. Never downloads, never decides what a prompt is, and never changes after it
is made, so that one tokenizer serves all threads.

`tokenizers` is imported inside functions: it is native code of several megabytes, and an engine that is given token ids
does not need it. Its batch functions let go of the interpreter while they work, its single ones do not; so a text is a
batch of one. On one thread: a pool of threads for each core would take the cores that the engine computes on.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import re
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mooli.errors import ChatTemplateError, PromptError, TokenizerError
from mooli.frontend.chat_template import ChatTemplate
from mooli.frontend.tokenizer_bounds import TextBounds, byte_level_alphabet
from mooli.types import TokenBytes

if TYPE_CHECKING:
    import tokenizers

END_OF_TURN_TOKENS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<end_of_turn>",
    "<EOT>",
    "<｜end▁of▁sentence｜>",
)
"""Tokens with which chat models end a turn or a text. Files often declare one of them where the model uses two."""

MAX_TEMPLATE_BYTES = 1 << 20

_MAX_REASON_CHARS = 500
"""What a library quotes of a file may be as long as the file."""

_MAX_CHARS = 1 << 23
"""Longest text that is given to the library, counted as its steps may lengthen it; it takes some 170 bytes for each."""

_MANY_IDS = 256
"""So many ids and more are decoded without the interpreter; below, letting go of it costs more than it gives."""

_MARKERS = re.compile(r"think|tool|THINK|TOOL|ARGS|function_call|arg_key|arg_value|python_tag")
"""In the texts of special tokens that grammars write."""


class Tokenizer:
    """A vocabulary with its rules. Thread-safe: every method only reads.

    backend: takes part ownership; must not be changed afterwards. Padding and truncation are switched off.
    vocab_size: number of ids, those of unused entries included; None takes it from the backend.
    eos_ids: ids declared as ends; the well-known end-of-turn tokens are added when there is a chat template.
    special_tokens: texts of the named tokens ("bos_token", …), for a chat template given apart from the model.
    bounds: what the steps of `backend` can make of a text.
    infill_ids: tokens that a file names for filling in a middle: pre, suf, mid, pad, rep and sep, as GGUF has them.
    response_template: how the model writes its messages, as tokenizer_config.json says it; None where it does not.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        vocab_size: int | None = None,
        bos_id: int | None = None,
        eos_ids: Iterable[int] = (),
        special_tokens: Mapping[str, str] | None = None,
        chat_template: ChatTemplate | None = None,
        bounds: TextBounds | None = None,
        infill_ids: Mapping[str, int] | None = None,
        response_template: Any = None,
    ) -> None:
        backend.no_padding()
        backend.no_truncation()
        added = backend.get_added_tokens_decoder()
        self._backend = backend
        self._plain: tokenizers.Tokenizer | None = None
        self._marker: tuple[tokenizers.Tokenizer, dict[int, int]] | None = None
        self._plain_lock = threading.Lock()
        if vocab_size is None:
            vocab_size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.vocab_size = vocab_size
        self.bos_id = bos_id
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self._added = {token.content: i for i, token in added.items()}
        self.special_texts = frozenset(token.content for token in added.values() if token.special)
        self.special_tokens = dict(special_tokens or {})
        self.chat_template = chat_template
        self.infill_ids = dict(infill_ids or {})
        self.response_template = response_template
        self._bounds = bounds or TextBounds()
        self._max_chars = int(_MAX_CHARS / self._bounds.growth)
        ends = set(eos_ids)
        if chat_template is not None:
            ends |= {i for i, token in added.items() if token.special and token.content in END_OF_TURN_TOKENS}
        if "<|channel|>" in self._added:  # gpt-oss: it ends one message of several
            ends.discard(self._added.get("<|end|>", -1))
        self.eos_ids = frozenset(ends)
        kinds = _decoder_kinds(backend)
        self.is_byte_level = kinds == ["ByteLevel"]
        self._has_byte_fallback = "ByteFallback" in kinds
        self._keeps_spaces = "Strip" in kinds or "Metaspace" in kinds
        self._byte_of = byte_level_alphabet() if self.is_byte_level else {}
        self._bytes_cache: dict[int, bytes] = {}
        self._grammar_tokens: TokenBytes | None = None
        self._cuts: tuple[re.Pattern[str] | None] | None = None
        self._around: tuple[list[int], list[int]] | None = None

    def encode(self, text: str, *, add_special_tokens: bool = True, parse_special: bool = True) -> list[int]:
        """Return the ids of `text`.

        add_special_tokens: put the begin and end tokens where this model's own files ask for them. False for the
            output of a chat template, which writes them itself.
        parse_special: True reads the text of a special token, such as "<|im_end|>", as that token. False reads it as
            ordinary characters; use it for text of a user who must not be able to end a turn.

        Raises PromptError when `text` is not a str, is longer than any model's context, holds lone surrogates, which no
        tokenizer can encode, or when this tokenizer fails on it.
        """
        if not isinstance(text, str):
            raise PromptError(f"a prompt must be a str, got {type(text).__name__}")
        (ids,) = self._ids([text], add_special_tokens=add_special_tokens, parse_special=parse_special)
        return ids

    def encode_parts(self, texts: Sequence[str], *, parse_special: bool = True) -> list[list[int]]:
        """The ids of each, without begin and end tokens. Raises as `encode`."""
        return self._ids(texts, add_special_tokens=False, parse_special=parse_special)

    def safe_cuts(self) -> re.Pattern[str] | None:
        """Finds where a text may be cut (`mooli.frontend.text_cuts`); worked out when it is first asked for."""
        with self._plain_lock:
            if self._cuts is None:
                from mooli.frontend.text_cuts import safe_cuts

                self._cuts = (safe_cuts(self._backend),)
            return self._cuts[0]

    @property
    def ids_around(self) -> tuple[list[int], list[int]]:
        """The begin and end tokens that `encode` puts around a text."""
        if self._around is None:
            encoding = self._encodings(self._backend, ["a"], add_special_tokens=True)[0]
            marks = encoding.special_tokens_mask
            start = marks.index(0) if 0 in marks else len(marks)
            num_after = marks[::-1].index(0) if 0 in marks else 0
            self._around = encoding.ids[:start], encoding.ids[len(marks) - num_after :]
        return self._around

    def _ids(self, texts: Sequence[str], *, add_special_tokens: bool, parse_special: bool) -> list[list[int]]:
        backend = self._backend if parse_special else self._plain_backend()
        found: list[list[int]] = []
        for encoding in self._encodings(backend, texts, add_special_tokens=add_special_tokens):
            ids = encoding.ids
            if not parse_special and not self.special_ids.isdisjoint(ids):
                self._refuse_control_ids(encoding)
            found.append(ids)
        return found

    def apply_chat_template(
        self,
        conversation: Any,
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        tokenize: bool = True,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        **kwargs: Any,
    ) -> Any:
        """The prompt of a conversation, or the list of those of a list of conversations, by the model's template.

        The arguments are those of Hugging Face's tokenizers. tokenize: True gives ids, in which no text of a message
        is a special token; False gives text, which `encode` reads with add_special_tokens=False. kwargs: further names
        for the template, `enable_thinking` for example.

        Raises ChatTemplateError if there is no template or it refuses the messages, and what `encode` raises.
        """
        # Here, because that module builds on this one.
        from mooli.frontend.chat_encoding import encode_chat

        template = self.chat_template
        if template is None:
            raise ChatTemplateError("the model has no chat template: give one with chat_template")
        arguments = {
            **kwargs,
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
        }

        def prompt(messages: Any) -> list[int] | str:
            return encode_chat(self, messages, **arguments) if tokenize else template.render(messages, **arguments)

        is_batch = isinstance(conversation, (list, tuple)) and bool(conversation)
        if is_batch and isinstance(conversation[0], (list, tuple)):
            return [prompt(messages) for messages in conversation]
        return prompt(conversation)

    @property
    def bos_token(self) -> str | None:
        """Text of the token that begins a text; None if the model's files name none."""
        return self.special_tokens.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        """Text of the token that ends a text; None if the model's files name none."""
        return self.special_tokens.get("eos_token")

    @property
    def eos_token_id(self) -> int | None:
        """Its id. `eos_ids` has all that end an answer."""
        token_id: int | None = None if self.eos_token is None else self._backend.token_to_id(self.eos_token)
        return token_id

    def least_tokens(self, text: str) -> int:
        """A number of tokens that `encode` gives at least, without tokenising; 0 where this tokenizer allows no such
        bound. No token stands for more characters than the longest has, and none but `vanishing` is left out."""
        bounds = self._bounds
        most = bounds.ascii_chars_per_token if text.isascii() else bounds.chars_per_token
        if most is None:
            return 0
        num_chars = sum(map(len, text.split())) if bounds.skips_spaces else len(text)
        return max(0, num_chars - sum(map(text.count, bounds.vanishing))) // most

    def special_spans(self, text: str) -> list[tuple[int, int, int]]:
        """Where `encode` reads special tokens in `text`: (id, start, end) in characters, in order."""
        if not any(special in text for special in self.special_texts):
            return []
        marker, own_ids = self._marker_backend()
        (encoding,) = self._encodings(marker, [text], add_special_tokens=False, with_places=True)
        found = [(at, own_ids[token_id]) for at, token_id in enumerate(encoding.ids) if token_id in own_ids]
        return [(token_id, *place) for at, token_id in found if (place := encoding.token_to_chars(at)) is not None]

    def decode(
        self, ids: Sequence[int], *, skip_special_tokens: bool = True, spaces_between_special_tokens: bool = True
    ) -> str:
        """Return the text of `ids`; bytes that are no character become U+FFFD, ids without a token add nothing.

        Raises TokenizerError when this tokenizer fails on them.

        skip_special_tokens: leave special tokens out.
        spaces_between_special_tokens: accepted because the SGLang API has it; both values give the same text. The
            tokenizers that can be loaded here put no spaces between special tokens, as the fast ones of `transformers`.
        """
        known = [int(i) for i in ids if 0 <= i < self.vocab_size]
        try:
            if len(known) < _MANY_IDS:
                text: str = self._backend.decode(known, skip_special_tokens=skip_special_tokens)
            else:
                text = self._backend.decode_batch([known], skip_special_tokens=skip_special_tokens)[0]
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as exc:
            raise TokenizerError(
                f"the tokenizer of this model cannot write {len(known)} ids as text: {str(exc)[:_MAX_REASON_CHARS]}"
            ) from exc
        return text

    def token_text(self, token_id: int) -> str:
        """Return the text of one token for lists of log-probabilities: leading space kept, special tokens written out,
        U+FFFD for part of a character, "" for an id without a token."""
        piece = self._piece(token_id)
        if piece is None:
            return ""
        if self.is_byte_level:
            return self.token_bytes(token_id).decode("utf-8", "replace")
        # Decoded alone, a SentencePiece token would lose the space it begins with.
        if self._keeps_spaces and piece.startswith("▁") and token_id not in self.special_ids:
            return piece.replace("▁", " ")
        return self.decode([token_id], skip_special_tokens=False)

    def has_added_token(self, text: str) -> bool:
        """Whether `text` always is one token, special or not."""
        return text in self._added

    @property
    def added_texts(self) -> Iterable[str]:
        """All texts that always are one token."""
        return self._added

    def added_id(self, text: str) -> int | None:
        """The id of the token that `text` always is; None if it is none."""
        return self._added.get(text)

    def special_ids_of(self, texts: Iterable[str]) -> frozenset[int]:
        """The ids of those of `texts` that are special tokens."""
        return frozenset(self._added[text] for text in texts if text in self.special_texts)

    def has_token(self, token_id: int) -> bool:
        """True where an id stands for a token; ids of unused entries do not."""
        return self._piece(token_id) is not None

    def token_bytes(self, token_id: int) -> bytes:
        """Return the UTF-8 bytes, maybe of half a character, that a token of a byte-level vocabulary stands for; b""
        for an id without a token.

        Raises TokenizerError when the vocabulary is not byte-level (`is_byte_level`).
        """
        known = self._bytes_cache.get(token_id)
        if known is not None:
            return known
        if not self.is_byte_level:
            raise TokenizerError("token_bytes needs a byte-level vocabulary, and this one is not")
        piece = self._piece(token_id)
        if piece is None:
            return b""
        try:
            raw = bytes([self._byte_of[char] for char in piece])
        except KeyError:
            raw = piece.encode()
        self._bytes_cache[token_id] = raw
        return raw

    def grammar_tokens(self, vocab_size: int, eos_ids: tuple[int, ...], markers: Collection[str] = ()) -> TokenBytes:
        """The bytes of ids 0 … vocab_size - 1 as a grammar writes them. Made once.

        Markers of tools and reasoning are text, whatever the files call them: grammars write them. `markers` are, and
        tokens that are named so.
        """
        with self._plain_lock:
            if self._grammar_tokens is None:
                tokens = [self._grammar_bytes(token_id) for token_id in range(min(vocab_size, self.vocab_size))]
                texts = {
                    token_id: self._piece(token_id) or "" for token_id in self.special_ids if token_id < vocab_size
                }
                written = {i for i, text in texts.items() if text in markers or _MARKERS.search(text)}
                special = (texts.keys() - written) | set(eos_ids)
                added = self._backend.get_added_tokens_decoder()
                whole = [token_id for token_id in sorted(added) if token_id < len(tokens) and token_id not in special]
                self._grammar_tokens = TokenBytes(tokens, sorted(special), list(eos_ids), whole)
            return self._grammar_tokens

    def _grammar_bytes(self, token_id: int) -> bytes:
        if self.is_byte_level:
            return self.token_bytes(token_id)
        piece = self._piece(token_id) or ""
        if self.is_byte_fallback(token_id):
            return bytes([int(piece[3:5], 16)])
        is_text = self._keeps_spaces and token_id not in self.special_ids
        return (piece.replace("▁", " ") if is_text else piece).encode()

    def is_byte_fallback(self, token_id: int) -> bool:
        """True for a SentencePiece token such as <0xE4>, which stands for one byte of a character."""
        if not self._has_byte_fallback:
            return False
        piece = self._piece(token_id)
        return piece is not None and len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")

    def _piece(self, token_id: int) -> str | None:
        return self._backend.id_to_token(int(token_id)) if 0 <= token_id < self.vocab_size else None

    def _plain_backend(self) -> tokenizers.Tokenizer:
        with self._plain_lock:
            if self._plain is None:
                with tokenizer_errors("preparing the tokenizer to read special tokens as text"):
                    self._plain = _ignoring_special(self._backend)
            return self._plain

    def _marker_backend(self) -> tuple[tokenizers.Tokenizer, dict[int, int]]:
        """One that finds added tokens and tells nothing else apart, and the ids of special ones by those it gives."""
        with self._plain_lock:
            if self._marker is None:
                with tokenizer_errors("preparing the tokenizer to find special tokens"):
                    marker = _knowing_added_alone(self._backend)
                own_ids: dict[int, int] = {
                    token_id: self._added[token.content]
                    for token_id, token in marker.get_added_tokens_decoder().items()
                    if token.content in self.special_texts
                }
                self._marker = marker, own_ids
            return self._marker

    def _encodings(
        self,
        backend: tokenizers.Tokenizer,
        texts: Sequence[str],
        *,
        add_special_tokens: bool,
        with_places: bool = False,
    ) -> list[tokenizers.Encoding]:
        num_chars = sum(map(len, texts))
        if num_chars > self._max_chars:
            raise PromptError(
                f"the text has {num_chars} characters; the tokenizer of this model is given at most {self._max_chars}"
            )
        encode = backend.encode_batch if with_places else backend.encode_batch_fast
        try:
            encodings: list[tokenizers.Encoding] = encode(list(texts), add_special_tokens=add_special_tokens)
        except TypeError as exc:
            raise PromptError(f"the prompt is not valid Unicode, it holds lone surrogates: {texts[0][:80]!r}") from exc
        except (KeyboardInterrupt, SystemExit):
            raise
        # A panic of the library is a BaseException, and one prompt must not end the process.
        except BaseException as exc:
            raise PromptError(
                f"the tokenizer of this model cannot read the text: {str(exc)[:_MAX_REASON_CHARS]}"
            ) from exc
        return encodings

    def _refuse_control_ids(self, encoding: tokenizers.Encoding) -> None:
        """Raise if text became a special id; the begin and end tokens around it and unknown characters may be one."""
        unknown = (getattr(self._backend.model, "unk_token", None), self.special_tokens.get("unk_token"))
        for token_id, added in zip(encoding.ids, encoding.special_tokens_mask, strict=True):
            if token_id in self.special_ids and not added and (token := self._piece(token_id)) not in unknown:
                raise PromptError(
                    f"the prompt holds {token!r}, which this vocabulary cannot write as ordinary text; remove it from "
                    "the prompt",
                    advice="or encode with parse_special=True",
                )


def load_tokenizer(path: Path) -> Tokenizer:
    """Load the tokenizer of a Hugging Face folder or of a GGUF file.

    Raises TokenizerError when there is none, when a file does not parse, asks for what no model needs
    (`tokenizer_bounds`) or when its kind is not supported; ChatTemplateError for a chat template that is none.
    """
    path = Path(path)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # which the library asks for at every batch
    if path.is_dir():
        # Here, because that module builds on this one.
        from mooli.frontend.folder_tokenizer import tokenizer_from_folder

        return tokenizer_from_folder(path)
    if path.suffix.lower() == ".gguf" and path.is_file():
        from mooli.formats.gguf import read_gguf
        from mooli.formats.gguf_names import part_paths
        from mooli.frontend.gguf_tokenizer import tokenizer_from_gguf

        with no_garbage_collection():
            # Of a model in several parts, the first has it.
            return tokenizer_from_gguf(read_gguf(part_paths(path)[0]).metadata, source=str(path))
    if path.exists():
        raise TokenizerError(f"{path} is neither a folder with a tokenizer.json nor a .gguf file")
    raise TokenizerError(f"there is no tokenizer at {path}: no such file or folder")


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Hundreds of thousands of objects that all stay would be looked through again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def tokenizer_errors(doing: str) -> Iterator[None]:
    """Turn what the native library raises, panics included, into a TokenizerError that says what was being done."""
    try:
        yield
    except (TokenizerError, KeyboardInterrupt, SystemExit):
        raise
    # A panic of the library is a BaseException, and a malformed file must not end the process.
    except BaseException as exc:
        raise TokenizerError(f"{doing} failed: {str(exc)[:_MAX_REASON_CHARS]}") from exc


def with_bos_and_eos(backend: tokenizers.Tokenizer, *, bos: str | None, eos: str | None) -> None:
    """Make `encode` put the token `bos` first and `eos` last; None leaves it out."""
    from tokenizers import processors

    pattern = [f"{token}:0" if token != "$A" else "$A:0" for token in (bos, "$A", eos) if token is not None]
    names = [token for token in (bos, eos) if token is not None]
    ids = [(name, backend.token_to_id(name)) for name in dict.fromkeys(names)]
    backend.post_processor = processors.TemplateProcessing(single=pattern, pair=[*pattern, "$B:1"], special_tokens=ids)


def _ignoring_special(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The same tokenizer, blind to special tokens in the text. It shares the vocabulary, which takes most memory.

    A second object, because the switch for this belongs to the object and others may be encoding with it right now.
    """
    import tokenizers

    plain = tokenizers.Tokenizer(backend.model)
    if backend.normalizer is not None:
        plain.normalizer = backend.normalizer
    if backend.pre_tokenizer is not None:
        plain.pre_tokenizer = backend.pre_tokenizer
    if backend.post_processor is not None:
        plain.post_processor = backend.post_processor
    added = sorted(backend.get_added_tokens_decoder().items())
    for special, group in itertools.groupby((token for _, token in added), key=lambda token: token.special):
        (plain.add_special_tokens if special else plain.add_tokens)(list(group))
    if any(plain.token_to_id(token.content) != token_id for token_id, token in added):
        plain = tokenizers.Tokenizer.from_str(backend.to_str())
    plain.encode_special_tokens = True
    return plain


def _knowing_added_alone(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The same steps up to where added tokens are found. All between two of them is one unknown word."""
    import tokenizers
    from tokenizers import models

    marker = tokenizers.Tokenizer(models.WordLevel({"\0": 0}, unk_token="\0"))
    added = [token for _, token in sorted(backend.get_added_tokens_decoder().items())]
    if backend.normalizer is not None and any(token.normalized for token in added):
        marker.normalizer = backend.normalizer  # the others are looked for before it
    for special, group in itertools.groupby(added, key=lambda token: token.special):
        (marker.add_special_tokens if special else marker.add_tokens)(list(group))
    return marker


def _decoder_kinds(backend: tokenizers.Tokenizer) -> list[str]:
    """Names of the decoder's steps, in order."""
    if backend.decoder is None:
        return []
    state = json.loads(backend.decoder.__getstate__())
    steps = state["decoders"] if state["type"] == "Sequence" else [state]
    return [step["type"] for step in steps]
