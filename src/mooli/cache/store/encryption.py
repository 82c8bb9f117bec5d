"""Pages that only the holder of a key file can read.

Owns keys, and what they do to a page: AES-256 in Galois counter mode (NIST SP 800-38D), with a nonce that is drawn for
each page, and the page's digest as associated data. Each owner has a key of its own, by HKDF-SHA-256 (RFC 5869) of the
key file: pages of one do not open for another. An owner is the root of chains of pages, which a tenant and its salt
decide. Where the key file is gone, so are all pages. Never touches a file but that one.

Digests are not hidden: who has the files and guesses all tokens up to the end of a page, salt included, can tell.
"""

from __future__ import annotations

import os
import stat
from collections import OrderedDict
from pathlib import Path
from threading import Lock
from typing import Any

from mooli.errors import StoreError

NONCE_BYTES = 12
TAG_BYTES = 16

EXTRA_BYTES = NONCE_BYTES + TAG_BYTES
"""By which a page is longer."""

_KEY_BYTES = 32
_MOST_BYTES = 4096
_MOST_OWNERS = 1024
"""Whose keys are kept at hand."""

_FINGERPRINT = b"mooli kv pages: fingerprint"
_PAGES = b"mooli kv pages: of owner "


class PageKeys:
    """The keys of all owners. Any thread may call any method."""

    def __init__(self, master: bytes) -> None:
        """master: 32 bytes or more, drawn by chance. Raises StoreError where the library is missing."""
        try:
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        except ImportError as exc:
            raise StoreError(
                "pages cannot be encrypted, as the package cryptography is missing: pip install 'mooli[encryption]'"
            ) from exc
        if len(master) < _KEY_BYTES:
            raise StoreError(f"a key of {len(master)} bytes is too short: give {_KEY_BYTES} that are drawn by chance")
        self._master = master
        self._cipher = AESGCM
        self._ciphers: OrderedDict[bytes, Any] = OrderedDict()
        self._lock = Lock()
        self.fingerprint = self._derived(_FINGERPRINT)
        """32 bytes that tell keys apart, and say nothing of them."""

    @classmethod
    def read(cls, path: Path) -> PageKeys:
        """Of a key file. Raises StoreError where there is none, or others can read it."""
        make = f"make one with `head -c {_KEY_BYTES} /dev/urandom > {path}; chmod 600 {path}`"
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        except OSError as exc:
            raise StoreError(f"the key file {path} cannot be read: {exc.strerror or exc}; {make}") from exc
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode) or found.st_uid not in (0, os.geteuid()) or found.st_mode & 0o077:
                raise StoreError(f"the key file {path} is not for you alone, or is no file: run `chmod 600 {path}`")
            master = os.read(descriptor, _MOST_BYTES)
        except OSError as exc:
            raise StoreError(f"the key file {path} cannot be read: {exc.strerror or exc}") from exc
        finally:
            os.close(descriptor)
        return cls(master)

    def seal(self, owner: bytes, digest: bytes, plain: bytes) -> bytes:
        """`plain` with `EXTRA_BYTES` more."""
        nonce = os.urandom(NONCE_BYTES)
        sealed: bytes = self._of(owner).encrypt(nonce, plain, digest)
        return nonce + sealed

    def unseal(self, owner: bytes, digest: bytes, sealed: bytes | memoryview) -> bytes | None:
        """What was sealed; None where it was not, for this owner and digest and by this key."""
        from cryptography.exceptions import InvalidTag

        if len(sealed) < EXTRA_BYTES:
            return None
        try:
            plain: bytes = self._of(owner).decrypt(bytes(sealed[:NONCE_BYTES]), sealed[NONCE_BYTES:], digest)
        except InvalidTag:
            return None
        return plain

    def _of(self, owner: bytes) -> Any:
        with self._lock:
            cipher = self._ciphers.get(owner)
            if cipher is None:
                cipher = self._ciphers[owner] = self._cipher(self._derived(_PAGES + owner))
                if len(self._ciphers) > _MOST_OWNERS:
                    self._ciphers.popitem(last=False)
            self._ciphers.move_to_end(owner)
            return cipher

    def _derived(self, purpose: bytes) -> bytes:
        from cryptography.hazmat.primitives.hashes import SHA256
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF

        derived: bytes = HKDF(algorithm=SHA256(), length=_KEY_BYTES, salt=None, info=purpose).derive(self._master)
        return derived
