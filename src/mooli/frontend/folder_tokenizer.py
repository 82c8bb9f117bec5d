"""A tokenizer out of a model's folder: tokenizer.json or tokenizer.model, and the configuration beside it.

Owns which files of a folder say what. Code of a folder is never run.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mooli.errors import CheckpointError, ModelNotFoundError, TokenizerError
from mooli.formats.files import parse_json, read_text_file
from mooli.formats.sentencepiece import read_sentencepiece
from mooli.frontend.chat_template import ChatTemplate
from mooli.frontend.own_templates import own_template
from mooli.frontend.sentencepiece_tokenizer import tokenizer_of_model
from mooli.frontend.tokenizer import (
    MAX_TEMPLATE_BYTES,
    Tokenizer,
    no_garbage_collection,
    tokenizer_errors,
    with_bos_and_eos,
)
from mooli.frontend.tokenizer_bounds import TextBounds, check_added_count, check_file, text_bounds

if TYPE_CHECKING:
    import tokenizers

_SENTENCEPIECE_FILE = "tokenizer.model"
_MAX_TOKENIZER_BYTES = 1 << 26
_MAX_CONFIG_BYTES = 1 << 24
_MAX_EOS_IDS = 1024
_MAX_REASON_CHARS = 500
"""What a library quotes of a file may be as long as the file."""

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def tokenizer_from_folder(folder: Path) -> Tokenizer:
    """Raises TokenizerError and ChatTemplateError as `load_tokenizer` does."""
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Backend

    config = _read_json(folder / "tokenizer_config.json")
    for key, value in _read_json(folder / "special_tokens_map.json").items():
        config.setdefault(key, value)
    file = folder / "tokenizer.json"
    if not os.path.lexists(file):
        if os.path.lexists(folder / _SENTENCEPIECE_FILE):
            return _load_sentencepiece(folder, config)
        others = [name for name in ("vocab.json", "tekken.json") if (folder / name).is_file()]
        hint = f"; {others[0]} alone is not supported, convert it with transformers' save_pretrained" if others else ""
        raise TokenizerError(
            f"there is no tokenizer.json in {folder}{hint}; put it there, give another place as tokenizer_path, or use"
            " skip_tokenizer_init=True with input_ids"
        )
    data = _read(file, _MAX_TOKENIZER_BYTES, folder)
    with tokenizer_errors(f"reading {file}"), no_garbage_collection():
        parsed = parse_json(data, file.name)
        check_file(parsed)
        backend = Backend.from_buffer(data)
        vocabulary = parsed["model"]["vocab"]
        size = 1 + max(vocabulary.values(), default=-1) if isinstance(vocabulary, dict) else len(vocabulary)
        longest = max(
            map(len, vocabulary if isinstance(vocabulary, dict) else (piece[0] for piece in vocabulary)), default=0
        )
    _add_configured_tokens(backend, config, AddedToken)
    with tokenizer_errors(f"reading {file}"):
        added = backend.get_added_tokens_decoder()
        size = max(size, 1 + max(added, default=-1))
        bounds = text_bounds(backend, max(longest, *(len(token.content) for token in added.values()), 0))
    # add_bos_token and add_eos_token of the configuration are not looked at: where there is a tokenizer.json, its
    # post-processor says what is added, and transformers leaves the two flags aside as well.
    return _folder_tokenizer(folder, config, backend, size, bounds)


def _load_sentencepiece(folder: Path, config: dict[str, Any]) -> Tokenizer:
    """Of a folder whose vocabulary is a SentencePiece model, as older and custom tokenizer classes have it."""
    from tokenizers import AddedToken

    file = folder / _SENTENCEPIECE_FILE
    model = read_sentencepiece(_read(file, _MAX_TOKENIZER_BYTES, folder), str(file))
    with tokenizer_errors(f"reading {file}"), no_garbage_collection():
        backend = tokenizer_of_model(model, str(file))
    for name, token_id in (("unk_token", model.unk_id), ("bos_token", model.bos_id), ("eos_token", model.eos_id)):
        if 0 <= token_id < len(model.pieces):
            config.setdefault(name, model.pieces[token_id])
    declared = config.get("added_tokens_decoder") or {}
    # Their classes look for every declared token in a text first, also for those of the vocabulary.
    texts = [token for token in declared.values() if isinstance(token, dict)] if isinstance(declared, dict) else []
    with tokenizer_errors(f"adding the tokens of {folder / 'tokenizer_config.json'}"):
        check_added_count(len(texts))
        for token in texts:
            if backend.token_to_id(text := token["content"]) is not None:
                backend.add_tokens([AddedToken(text, special=bool(token.get("special")), normalized=False)])
    _add_configured_tokens(backend, config, AddedToken)
    names = _named_tokens(config)
    with tokenizer_errors(f"reading {file}"):
        added = backend.get_added_tokens_decoder()
        with_bos_and_eos(
            backend,
            bos=names.get("bos_token") if config.get("add_bos_token", True) else None,
            eos=names.get("eos_token") if config.get("add_eos_token", False) else None,
        )
        longest = max(map(len, (*model.pieces, *(token.content for token in added.values()))))
        bounds = text_bounds(backend, longest)
    size = max(len(model.pieces), 1 + max(added, default=-1))
    return _folder_tokenizer(folder, config, backend, size, bounds)


def _named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    return {name: text for name in _NAMED_TOKENS if (text := _token_text(config.get(name))) is not None}


def _folder_tokenizer(
    folder: Path, config: Mapping[str, Any], backend: tokenizers.Tokenizer, size: int, bounds: TextBounds
) -> Tokenizer:
    names = _named_tokens(config)
    bos, eos = names.get("bos_token"), names.get("eos_token")
    ends = _declared_eos_ids(folder)
    if eos is not None and (eos_id := backend.token_to_id(eos)) is not None:
        ends.add(eos_id)
    source = _folder_chat_template(folder, config) or own_template(_read_json(folder / "config.json"))
    template = ChatTemplate(source, special_tokens=names) if source else None
    bos_id = backend.token_to_id(bos) if bos is not None else None
    return Tokenizer(
        backend,
        vocab_size=size,
        bos_id=bos_id,
        eos_ids=ends,
        special_tokens=names,
        chat_template=template,
        bounds=bounds,
        response_template=config.get("response_template"),
    )


def _add_configured_tokens(backend: tokenizers.Tokenizer, config: Mapping[str, Any], added_token: Any) -> None:
    """Add what tokenizer_config.json declares beyond tokenizer.json, and mark the named tokens as special.

    A named token that no file gives an id is left out: a new id would lie outside the model's embedding.
    """
    declared = config.get("added_tokens_decoder") or {}
    if not isinstance(declared, dict) or not all(isinstance(token, dict) for token in declared.values()):
        raise TokenizerError("added_tokens_decoder in tokenizer_config.json is not a table of tokens")
    with tokenizer_errors("adding the tokens of tokenizer_config.json"):
        check_added_count(len(declared))
        new = []
        for key, token in sorted(declared.items(), key=lambda item: int(item[0])):
            flags = {
                name: bool(token[name])
                for name in ("lstrip", "rstrip", "single_word", "normalized", "special")
                if name in token
            }
            if backend.token_to_id(token["content"]) is None:
                new.append((key, added_token(token["content"], **flags)))
        # In groups, as each call builds anew what finds all of them in a text.
        for is_special, group in itertools.groupby((token for _, token in new), key=lambda token: token.special):
            (backend.add_special_tokens if is_special else backend.add_tokens)(list(group))
        for key, token in new:
            if backend.token_to_id(token.content) != int(key):
                raise TokenizerError(
                    f"tokenizer_config.json gives {token.content[:80]!r} the id {key[:20]}, which does not follow the"
                    " ids of tokenizer.json; the two files do not belong together"
                )
        named = [config.get(name) for name in _NAMED_TOKENS]
        for key in ("additional_special_tokens", "extra_special_tokens"):
            extra = config.get(key) or []
            named += list(extra.values()) if isinstance(extra, dict) else list(extra)
        known = {token.content: token.special for token in backend.get_added_tokens_decoder().values()}
        texts = dict.fromkeys(text for text in map(_token_text, named) if text)
        backend.add_special_tokens(
            [
                added_token(text, special=True, normalized=False)
                for text in texts
                if not known.get(text, False) and backend.token_to_id(text) is not None
            ]
        )


def _declared_eos_ids(folder: Path) -> set[int]:
    """End ids of generation_config.json, or of config.json where there is no such file, as transformers reads them."""
    declared = _read_json(folder / "generation_config.json") or _read_json(folder / "config.json")
    value = declared.get("eos_token_id")
    values = value if isinstance(value, list) else [value]
    if len(values) > _MAX_EOS_IDS:  # they go to the engine with every request
        raise TokenizerError(
            f"the files of {folder} declare {len(values)} eos_token_id; at most {_MAX_EOS_IDS} are read"
        )
    return {v for v in values if isinstance(v, int) and not isinstance(v, bool) and v >= 0}


def _folder_chat_template(folder: Path, config: Mapping[str, Any]) -> str | dict[str, str] | None:
    files = {"default": folder / "chat_template.jinja"}
    files |= {file.stem: file for file in sorted(folder.glob("additional_chat_templates/*.jinja"))}
    texts = {
        name: _read_text(file, MAX_TEMPLATE_BYTES, folder) for name, file in files.items() if os.path.lexists(file)
    }
    if texts:
        return texts
    template = _read_json(folder / "chat_template.json").get("chat_template") or config.get("chat_template")
    if template is None or isinstance(template, (str, dict)):
        return template
    try:
        return {entry["name"]: entry["template"] for entry in template}
    except (TypeError, KeyError) as exc:
        raise TokenizerError(
            f"the chat_template of {folder} is neither a string nor a list of named templates"
        ) from exc


def _read_json(file: Path) -> dict[str, Any]:
    """The table in a JSON file; empty when there is no such file."""
    if not os.path.lexists(file):
        return {}
    try:
        value = json.loads(_read_text(file, _MAX_CONFIG_BYTES, file.parent))
    except (ValueError, RecursionError) as exc:
        if isinstance(exc, TokenizerError):
            raise
        raise TokenizerError(f"reading {file} failed: {str(exc)[:_MAX_REASON_CHARS]}") from exc
    if not isinstance(value, dict):
        raise TokenizerError(f"{file} holds a {type(value).__name__}, not a table")
    return value


def _read_text(file: Path, max_bytes: int, folder: Path) -> str:
    """The text of a file of a model's folder, lines ended by \\n alone."""
    try:
        text = _read(file, max_bytes, folder).decode("utf-8")
    except UnicodeDecodeError as exc:
        raise TokenizerError(f"reading {file} failed: {str(exc)[:_MAX_REASON_CHARS]}") from exc
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _read(file: Path, max_bytes: int, folder: Path) -> bytes:
    """The contents of a file of a model's folder."""
    try:
        return read_text_file(file, max_bytes, root=folder)
    except (CheckpointError, ModelNotFoundError) as exc:
        raise TokenizerError(f"reading {file} failed: {str(exc)[:_MAX_REASON_CHARS]}") from exc


def _token_text(token: Any) -> str | None:
    """A token as the configuration files write it: its text, or a table with it."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) and token else None
