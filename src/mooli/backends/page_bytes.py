"""Pages of the KV pool and recurrent states as bytes: what is asked for, checked before a backend copies anything.

Owns the checks that all backends share. Never copies, and never knows a layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mooli.errors import EngineError

Bytes = NDArray[np.uint8]


def page_numbers(pages: Sequence[int] | NDArray[Any], num_pages: int, place: str = "the KV pool") -> NDArray[np.int32]:
    """`pages` as int32 (n,). Raises EngineError for what is no page of a `place` of `num_pages`, or is there twice."""
    given = np.asarray(pages)
    if given.ndim != 1 or (given.size and given.dtype.kind not in "iu"):
        raise EngineError(f"pages are a sequence of whole numbers, not {given.dtype} of shape {given.shape}")
    outside = given[(given < 0) | (given >= num_pages)]
    if outside.size:
        raise EngineError(f"page {outside[0]} is outside {place} of {num_pages} pages")
    if np.unique(given).size != given.size:
        raise EngineError("a page is there twice: read and write each once")
    return given.astype(np.int32)


def held_tokens(num_tokens: int | None, count: int, page_size: int) -> int:
    """How many tokens `count` pages hold; all that they can where nothing is said. Raises EngineError."""
    if num_tokens is None:
        return count * page_size
    if not 0 <= num_tokens <= count * page_size:
        raise EngineError(f"{num_tokens} tokens do not lie in {count} pages of {page_size}")
    return num_tokens


def check_slot(slot: int, num_states: int) -> None:
    """Raise EngineError for a slot that none of `num_states` recurrent states is in."""
    if not 0 <= slot < num_states:
        raise EngineError(f"slot {slot} is outside the {num_states} of recurrent states")


def state_of(buffer: Any, num_bytes: int) -> Bytes:
    """The memory of `buffer` as uint8 (num_bytes,), without a copy. Raises EngineError if it is no contiguous buffer of
    that many bytes."""
    whole = memoryview(buffer)
    if not whole.c_contiguous or whole.nbytes != num_bytes:
        raise EngineError(f"a recurrent state has {num_bytes} bytes in one piece, and the buffer has {whole.nbytes}")
    return np.frombuffer(whole, np.uint8)


def pages_of(buffer: Any, count: int, page_bytes: int, *, to_write: bool = False) -> Bytes:
    """The memory of `buffer` as uint8 (count, page_bytes), without a copy.

    Raises EngineError if it is no contiguous buffer of that many bytes, or cannot be written to where that is wanted.
    """
    try:
        whole = memoryview(buffer)
    except (TypeError, ValueError) as exc:
        raise EngineError(f"{type(buffer).__name__} is no buffer of bytes: {exc}") from exc
    if not whole.c_contiguous:
        raise EngineError("the bytes of pages lie in one piece, and those of this buffer do not")
    if whole.nbytes != count * page_bytes:
        raise EngineError(f"{count} pages have {count * page_bytes} bytes, and the buffer has {whole.nbytes}")
    if to_write and whole.readonly:
        raise EngineError("pages are read into a buffer that cannot be written to: give a bytearray or an array")
    if not count:
        return np.empty((0, page_bytes), np.uint8)
    return np.frombuffer(whole, np.uint8).reshape(count, page_bytes)


def read_into(out: Any | None, count: int, page_bytes: int) -> Bytes:
    """Where pages are read to: the caller's buffer, or a new one."""
    if out is None:
        return np.empty((count, page_bytes), np.uint8)
    return pages_of(out, count, page_bytes, to_write=True)
