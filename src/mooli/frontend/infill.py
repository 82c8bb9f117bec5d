"""The middle of a text, for models that were taught to fill it in: which tokens mark the parts, and in what order.

Owns the layouts of prompts for infilling, the tokens that end a middle, and that no text of a user becomes one of these
tokens. Never decides whether a request wants a middle.

Sources: "Efficient Training of Language Models to Fill in the Middle" (Bavarian et al., 2022), whose orders are
prefix-suffix-middle and suffix-prefix-middle; the model cards of Qwen2.5-Coder, StarCoder, DeepSeek-Coder, Code Llama,
Codestral, GLM-4 and Seed-Coder; the GGUF specification, section tokenizer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from mooli.frontend.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class _Layout:
    """Texts of the tokens before what precedes, before what follows, and before the middle: None where none is."""

    prefix: str
    suffix: str
    middle: str | None
    suffix_first: bool = False


_LAYOUTS = (
    _Layout("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen2.5-Coder, CodeGemma
    _Layout("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder, Granite Code
    _Layout("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    _Layout("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek-Coder
    _Layout("▁<PRE>", "▁<SUF>", "▁<MID>"),  # Code Llama
    _Layout("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"),  # GLM-4
    _Layout("<[fim-prefix]>", "<[fim-suffix]>", "<[fim-middle]>", suffix_first=True),  # Seed-Coder
    _Layout("[PREFIX]", "[SUFFIX]", None, suffix_first=True),  # Codestral
)

_FILES = (
    ("<|repo_name|>", "<|file_sep|>"),  # Qwen2.5-Coder
    ("<repo_name>", "<file_sep>"),  # StarCoder2
)
"""What stands before the name of a repository, and before that of each file in it."""

_ENDS = (
    "<|fim_pad|>", "<fim_pad>", "<fim-pad>", "<|endoftext|>", "<|end_of_text|>", "<EOT>", "▁<EOT>",
    "<｜end▁of▁sentence｜>", *(text for pair in _FILES for text in pair),
)  # fmt: skip
"""With which models end a middle, besides the tokens that begin a part."""


@dataclass(frozen=True, slots=True)
class Infill:
    """Ids of the tokens that stand before the parts of a text. middle: None where the model begins at once.
    suffix_first: the order of the parts in the prompt. repo, file: before the name of a repository and of a file in it,
    if the model knows such. ends: ids that end a middle. markers: texts of all of these tokens."""

    prefix: int
    suffix: int
    middle: int | None
    suffix_first: bool
    repo: int | None
    file: int | None
    ends: frozenset[int]
    markers: frozenset[str]

    def encode(
        self, tokenizer: Tokenizer, before: str, after: str, files: tuple[tuple[str, str], ...] = ()
    ) -> list[int]:
        """The prompt for the text between `before` and `after`. files: others of the same repository, each a name and
        its contents, the nearest last; for a model that does not know such they stand before the text as they are.

        Raises PromptError for a text that cannot be encoded.
        """
        head = [token_id for token_id in tokenizer.encode("")[:1] if token_id == tokenizer.bos_id]
        first = [self.prefix, *self._ordinary(tokenizer, self._with_files(before, files))]
        second = [self.suffix, *self._ordinary(tokenizer, after, goes_on=True)]
        parts = [*second, *first] if self.suffix_first else [*first, *second]
        middle = [] if self.middle is None else [self.middle]
        return [*head, *self._file_ids(tokenizer, files), *parts, *middle]

    def stop_token_ids(self, given: Sequence[int] | None) -> list[int]:
        """Ids that end a middle, with those that a request gives."""
        return [*dict.fromkeys([*(given or ()), *sorted(self.ends)])]

    def _with_files(self, before: str, files: tuple[tuple[str, str], ...]) -> str:
        if self.file is not None:
            return before
        return "".join(f"{text}\n\n" for _, text in files) + before

    def _file_ids(self, tokenizer: Tokenizer, files: tuple[tuple[str, str], ...]) -> list[int]:
        if self.file is None or not files:
            return []
        ids = [] if self.repo is None else [self.repo, *self._ordinary(tokenizer, "repository\n")]
        for name, text in files:
            ids += [self.file, *self._ordinary(tokenizer, f"{name}\n{text}\n")]
        return [*ids, self.file, *self._ordinary(tokenizer, "middle\n")]

    def _ordinary(self, tokenizer: Tokenizer, text: str, *, goes_on: bool = False) -> list[int]:
        """The ids of what a user wrote. goes_on: a tokenizer that puts a space before each text puts none here."""
        # Special tokens the tokenizer leaves alone; markers that its files do not call special are cut in two.
        ids: list[int] = []
        start = 0
        for end in [*_inside(text, self.markers - tokenizer.special_texts), len(text)]:
            piece = text[start:end]
            ids += _bare(tokenizer, piece) if goes_on or start else _plain(tokenizer, piece)
            start = end
        return ids


def open_infill(tokenizer: Tokenizer | None) -> Infill | None:
    """How the model of this vocabulary fills in; None if it has no tokens for it."""
    if tokenizer is None:
        return None
    named = tokenizer.infill_ids
    known = next((layout for layout in _LAYOUTS if _has(tokenizer, layout)), None)
    ids: tuple[int | None, int | None, int | None] = (named.get("pre"), named.get("suf"), named.get("mid"))
    if known is not None:
        middle = None if known.middle is None else tokenizer.added_id(known.middle)
        ids = (tokenizer.added_id(known.prefix), tokenizer.added_id(known.suffix), middle)
    prefix, suffix, middle = ids
    if prefix is None or suffix is None or (known is None and middle is None):
        return None
    repo, file = next(
        (
            (tokenizer.added_id(repo), tokenizer.added_id(file))
            for repo, file in _FILES
            if tokenizer.has_added_token(file)
        ),
        (named.get("rep"), named.get("sep")),
    )
    ends = {tokenizer.added_id(text) for text in _ENDS} | {*ids, repo, file, *named.values()}
    return Infill(
        prefix=prefix,
        suffix=suffix,
        middle=middle,
        suffix_first=known is not None and known.suffix_first,
        repo=repo,
        file=file,
        ends=frozenset(token_id for token_id in ends if token_id is not None),
        markers=frozenset(tokenizer.token_text(token_id) for token_id in ends if token_id is not None),
    )


def _has(tokenizer: Tokenizer, layout: _Layout) -> bool:
    texts = (layout.prefix, layout.suffix, layout.middle)
    return all(text is None or tokenizer.has_added_token(text) for text in texts)


def _inside(text: str, markers: frozenset[str]) -> list[int]:
    """A place inside each marker that `text` holds."""
    if not markers:
        return []
    pattern = "|".join(re.escape(marker) for marker in sorted(markers, key=len, reverse=True))
    return [match.start() + 1 for match in re.finditer(pattern, text)]


def _plain(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False, parse_special=False) if text else []


def _bare(tokenizer: Tokenizer, text: str) -> list[int]:
    """Without the space that SentencePiece puts before a text: behind a line's end it puts none."""
    if tokenizer.is_byte_level:
        return _plain(tokenizer, text)
    end = _plain(tokenizer, "\n")
    ids = _plain(tokenizer, f"\n{text}")
    return ids[len(end) :] if ids[: len(end)] == end else _plain(tokenizer, text)
