"""Names of pages: written down here without the code, stable for ever, and apart wherever a page may be another."""

from __future__ import annotations

import hashlib
import random
import struct

import numpy as np

from mooli.cache.page_hash import DIGEST_BYTES, PageChain, chain, page_tokens, root_of
from mooli.cache.radix_tree import token_key
from mooli.types import FIRST_CONTENT_ID

ENGINE = bytes(range(32))


def key_of(ids: list[int]) -> bytes:
    return token_key(np.array(ids, np.int32))


def named(ids: list[int], page_size: int, namespace: str = "", engine: bytes = ENGINE) -> list[bytes]:
    """Word for word: sha256 of the name before and of the ids as little-endian words."""
    name = hashlib.sha256(engine + namespace.encode()).digest()
    names = []
    for start in range(0, len(ids) // page_size * page_size, page_size):
        name = hashlib.sha256(name + struct.pack(f"<{page_size}I", *ids[start : start + page_size])).digest()
        names.append(name)
    return names


def test_names_are_those_of_the_formula_however_a_sequence_grows() -> None:
    draw = random.Random(1)
    for page_size in (1, 3, 32):
        ids = [draw.randrange(200_000) for _ in range(5 * page_size + 2)] + [FIRST_CONTENT_ID + 5] * page_size
        made = PageChain(root_of(ENGINE, ""), page_size)
        for length in [*sorted(draw.sample(range(len(ids) + 1), 4)), len(ids)]:
            made.extend(key_of(ids[:length]), length // page_size)
            assert made.digests == named(ids[:length], page_size)
            assert [struct.unpack(f"<{page_size}I", page) for page in made.tokens] == [
                tuple(ids[start : start + page_size]) for start in range(0, page_size * len(made.tokens), page_size)
            ]
        made.extend(key_of(ids), 1)  # fewer than it has
        assert made.digests == named(ids, page_size) and all(len(name) == DIGEST_BYTES for name in made.digests)
        assert made.parent_of(0) == root_of(ENGINE, "") and made.parent_of(2) == made.digests[1]


def test_another_beginning_namespace_or_engine_is_another_page() -> None:
    ids = list(range(8))
    alike = [
        named(ids, 4)[1],
        named([9, *ids[1:]], 4)[1],
        named(ids, 4, "/salt")[1],
        named(ids, 4, engine=bytes(32))[1],
        named(ids, 2)[1],
        named(ids[4:], 4)[0],
    ]
    assert len(set(alike)) == len(alike)


def test_a_name_stays_what_it_was() -> None:
    """Pages on a disk outlive versions of this code."""
    made = chain(root_of(bytes(32), "/a"), page_tokens(key_of([1, 2, 300, 70_000])))
    assert made.hex() == "9c490a246164b8ed46915aa75646afa430285331b50fb54734df888b9d8c2446"
