"""What decides where a request goes: the head of its prompt, in the words of any of the server's APIs.

Owns the reading of a body as far as routing asks: which salt, and the text that the prompt begins with. It
reads text and not tokens: two prompts with equal heads have equal first tokens, whatever the template adds, and nobody
tokenises twice. Never refuses a body: what is wrong with it, its replica says.

`Heads.begin` is of what all conversations of one kind share: tools, system text, and of the first message as much as
fits. `Heads.whole` also has the first message to its end, and stays the same as the conversation grows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

TOKEN_CHARS = 4
"""Characters that a token is taken for where a prompt is ids."""

_OPENING = ("system", "instructions")
_PROMPT = ("messages", "input", "prompt", "text", "input_ids", "input_prefix")
_NOTHING = msgspec.Raw()

_Body = msgspec.defstruct(
    "_Body",
    [(name, msgspec.Raw, _NOTHING) for name in (*_OPENING, *_PROMPT, "cache_salt", "extra_key", "tools")],
)
"""The fields of a body that matter, each as it was written."""


@dataclass(frozen=True, slots=True)
class Heads:
    """begin, whole: digests, as the module says. session: what the client calls its conversation; it counts alone."""

    begin: bytes
    whole: bytes
    session: str = ""


def heads_of(raw: bytes, num_chars: int, *, tenant: str = "", session: str = "") -> Heads | None:
    """Of a request with this body; None where no prompt can be found. num_chars: the most of it that `begin` sees.

    tenant: whose prefixes the request may find in a cache; its salt is read from the body.
    """
    body = _read(raw)
    if body is None:
        return None
    prompt = next((value for name in _PROMPT if (value := _value(getattr(body, name))) not in (None, "", [])), None)
    if prompt is None:
        return None
    salt = _value(body.cache_salt) or _value(body.extra_key) or ""
    owner = repr((tenant, salt)).encode() + bytes(body.tools)
    opening = "\0".join(text for name in _OPENING for text in _texts(_value(getattr(body, name))))
    first = "\0".join(_first_texts(prompt))
    # A text is cut where it is long, so that what comes behind its head does not count.
    begin = hashlib.blake2b(owner, digest_size=16)
    begin.update(f"{opening}\0{first}"[:num_chars].encode(errors="surrogatepass"))
    whole = begin.copy()
    whole.update(f"{opening}\0{first}"[num_chars:].encode(errors="surrogatepass"))
    return Heads(begin.digest(), whole.digest(), session)


def _read(raw: bytes) -> Any:
    try:
        return msgspec.json.decode(raw, type=_Body)
    except (ValueError, RecursionError):
        return None


def _value(raw: msgspec.Raw) -> Any:
    try:
        return msgspec.json.decode(raw) if bytes(raw) else None
    except (ValueError, RecursionError):
        return None


def _first_texts(prompt: Any) -> Iterator[str]:
    """Of a prompt up to the end of its first message that is the user's; of several prompts, the first."""
    if not isinstance(prompt, list):
        yield from _texts(prompt)
    elif prompt and isinstance(prompt[0], int):
        yield from map(_padded, prompt)
    elif prompt and isinstance(prompt[0], dict):
        for item in prompt:
            if not isinstance(item, dict):
                return
            role = item.get("role", "user")
            yield str(role)
            yield from _texts(item.get("content"))
            if role not in ("system", "developer"):
                return
    elif prompt:
        yield from _first_texts(prompt[0])


def _padded(token: object) -> str:
    """A token id as so many characters as it stands for, about."""
    return f"{token!s:>{TOKEN_CHARS - 1}}"


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item.get("text") if isinstance(item, dict) else item)
