"""SentencePiece vocabularies as tokenizers of the library: of GGUF files, and of a folder's tokenizer.model.

Owns how pieces, scores and types become a model, and what is done to a text before it. Never opens a file. Ids are
those that SentencePiece gives. A text with special tokens, or with symbols that a file's author has defined, is taken
apart at them first, and each part is encoded by itself, as Transformers' classes for these files do.

Source: SentencePiece, arXiv 1808.06226.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mooli.errors import TokenizerError
from mooli.formats.sentencepiece import CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, SentencePieceModel
from mooli.frontend.tokenizer_bounds import check_added_count, check_longest

if TYPE_CHECKING:
    import tokenizers
    from tokenizers import models

_SPACE = "▁"
_NEVER = -1e9
"""The score of what no text becomes: beside it every other way to write a text is better."""


def merges_by_score(ids: Mapping[str, int], types: Sequence[int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """The merges of a BPE vocabulary that has scores instead.

    SentencePiece merges the pair whose result scores best. As a list of merges: every way to cut every token in two,
    best result first (Hugging Face's conversion of SentencePiece models does the same).
    """
    merging = {NORMAL, USER_DEFINED, UNUSED}
    known = {token: index for token, index in ids.items() if types[index] in merging}
    scored = []
    for token, index in known.items():
        cuts = [(token[:at], token[at:]) for at in range(1, len(token)) if token[:at] in known and token[at:] in known]
        cuts.sort(key=lambda cut: (known[cut[0]], known[cut[1]]))
        scored += [(-scores[index], -len(left), -len(right), left, right) for left, right in cuts]
    scored.sort(key=lambda merge: merge[:3])
    return [(left, right) for *_, left, right in scored]


def whole_text_steps(backend: tokenizers.Tokenizer, first: Sequence[Any], *, has_prefix: bool) -> None:
    """Set what is done before the model, `first` and then spaces as pieces have them, and its reverse.

    has_prefix: a space is put before a text.
    """
    from tokenizers import decoders, normalizers

    prefix = [normalizers.Prepend(_SPACE)] if has_prefix else []
    backend.normalizer = normalizers.Sequence([*first, *prefix, normalizers.Replace(" ", _SPACE)])
    steps: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if has_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(steps)


def add_typed_tokens(backend: tokenizers.Tokenizer, tokens: Sequence[str], types: Sequence[int], source: str) -> None:
    """Control tokens as special ones, user-defined ones as plain ones; both are found in the text before all else.

    Raises TokenizerError for one that cannot have its id.
    """
    from tokenizers import AddedToken

    special = {CONTROL, UNKNOWN}
    added = [
        (index, AddedToken(tokens[index], special=kind in special, normalized=False))
        for index, kind in enumerate(types)
        if kind in special or kind == USER_DEFINED
    ]
    check_added_count(len(added))
    for is_special, group in itertools.groupby((token for _, token in added), key=lambda token: token.special):
        (backend.add_special_tokens if is_special else backend.add_tokens)(list(group))
    for index, token in added:
        if backend.token_to_id(token.content) != index:
            raise TokenizerError(f"the control token {token.content[:80]!r} of {source} cannot get its id {index}")


def tokenizer_of_model(model: SentencePieceModel, source: str) -> tokenizers.Tokenizer:
    """The tokenizer of a model file; it adds no begin and end tokens. source: what to call it in errors.

    Raises TokenizerError for what is not implemented, by name, and for a vocabulary that cannot be.
    """
    from tokenizers import Regex, normalizers
    from tokenizers import Tokenizer as Backend

    if model.kind not in ("bpe", "unigram"):
        raise TokenizerError(f"{source} is a SentencePiece model of kind {model.kind!r}; read are bpe and unigram")
    if model.has_whitespace_suffix or not model.escapes_whitespaces:
        raise TokenizerError(f"{source} writes spaces behind words, or as they are, which is not implemented")
    if model.charsmap:
        # The library's own reading of such tables leaves some combining characters apart.
        raise TokenizerError(
            f"{source} replaces characters by a table ({model.normalization}), which is not implemented; convert it"
            " to a tokenizer.json with transformers' save_pretrained"
        )
    ids = dict(zip(model.pieces, range(len(model.pieces)), strict=True))
    if len(ids) != len(model.pieces) or "" in ids:
        raise TokenizerError(f"{source} has a piece twice, or an empty one")
    check_longest(max(map(len, model.pieces)))
    unknown = [index for index, kind in enumerate(model.types) if kind == UNKNOWN]
    if len(unknown) != 1:
        raise TokenizerError(f"{source} has {len(unknown)} pieces for what is unknown; there must be one")
    made = _bpe(model, ids, unknown[0]) if model.kind == "bpe" else _unigram(model, unknown[0])
    backend = Backend(made)
    first: list[Any] = []
    if model.removes_extra_whitespaces:
        first = [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    whole_text_steps(backend, first, has_prefix=model.adds_dummy_prefix)
    add_typed_tokens(backend, model.pieces, model.types, source)
    return backend


def _bpe(model: SentencePieceModel, ids: dict[str, int], unknown: int) -> models.BPE:
    from tokenizers import models

    return models.BPE(
        vocab=ids,
        merges=merges_by_score(ids, model.types, model.scores),
        unk_token=model.pieces[unknown],
        fuse_unk=True,
        byte_fallback=model.byte_fallback,
    )


def _unigram(model: SentencePieceModel, unknown: int) -> models.Unigram:
    from tokenizers import models

    scored = {NORMAL, USER_DEFINED}
    pieces = [
        (piece, score if kind in scored else _NEVER)
        for piece, score, kind in zip(model.pieces, model.scores, model.types, strict=True)
    ]
    return models.Unigram(pieces, unk_id=unknown, byte_fallback=model.byte_fallback)
