"""Which keys there are, whose they are, and what each may do.

Owns the meaning of `--api-keys-file` and the look-up of what a request brings. Names are for logs and metrics. Keys are
kept as digests under a secret of this process, so that the time of a look-up tells nothing about them, and are never
shown. Never knows routes.
"""

from __future__ import annotations

import hmac
import logging
import os
import re
import secrets
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec

from mooli.errors import ConfigError
from mooli.server.config import SENDABLE, ServerConfig

logger = logging.getLogger(__name__)

FLAG = "--api-keys-file"

ADMIN_TENANT = "admin_api_key"
"""Of the key given by --admin-api-key. No name in a file has an underscore, so none is this one."""

MAX_FILE_BYTES = 2**20

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9.-]{0,63}")
"""Never an address, with which names stand side by side."""

_AtLeastOne = Annotated[int, msgspec.Meta(ge=1)]


class _Entry(msgspec.Struct, kw_only=True):
    """What the file says of one name."""

    key: str
    admin: bool = False
    tenant: str | None = None
    max_concurrent_requests: _AtLeastOne | None = None
    max_sequences: _AtLeastOne | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """What the holder of a key is and may do. name: "" for a key that was given by a flag.

    tenant: whose cached prefixes it shares. max_concurrent_requests: HTTP requests of it in progress; max_sequences:
    those that run and wait for it in the engine; None: no limit of its own.
    """

    name: str = ""
    tenant: str = ""
    is_admin: bool = False
    max_concurrent_requests: int | None = None
    max_sequences: int | None = None


class KeyRing:
    """All keys of one server.

    asks_users, asks_admins: whether what users do, or what changes the server, needs a key. Raises ConfigError for a
    file that cannot be used.
    """

    def __init__(self, config: ServerConfig) -> None:
        self._secret = secrets.token_bytes(32)
        self.path = config.api_keys_file
        self._by_digest: dict[bytes, Key] = {}
        self._by_name: dict[str, Key] = {}
        self.tenants: frozenset[str] = frozenset()
        """Of the keys in the file."""
        user, admin = config.api_key, config.admin_api_key
        self.asks_users = (self.path or user) is not None
        self.asks_admins = self.asks_users or admin is not None
        if self.path is not None:
            self._take(_read(self.path))
        if user is not None:
            self._by_digest[self._digest(user.encode())] = Key(is_admin=admin is None)
        if admin is not None:
            self._by_digest[self._digest(admin.encode())] = Key(tenant=ADMIN_TENANT, is_admin=True)

    def find(self, headers: Iterable[tuple[bytes, bytes]]) -> Key | None:
        """The key that a request brings; of several the one that may most."""
        found: Key | None = None
        for given in given_keys(headers):
            key = self._by_digest.get(self._digest(given))
            if key is not None and (found is None or key.is_admin):
                found = key
        return found

    def named(self, name: str) -> Key | None:
        """The key of that name in the file."""
        return self._by_name.get(name)

    def reload(self) -> None:
        """Read the file again. One that cannot be used changes nothing; the log says what is wrong with it."""
        if self.path is None:
            return
        try:
            self._take(_read(self.path))
        except ConfigError as exc:
            logger.error("the keys stay as they were: %s", exc)
        else:
            logger.info("%s has been read again: %d keys", self.path, len(self._by_name))

    def _take(self, entries: Mapping[str, _Entry]) -> None:
        self._by_name = {name: _key(name, entry) for name, entry in entries.items()}
        self.tenants = frozenset(key.tenant for key in self._by_name.values())
        self._by_digest = {self._digest(entry.key.encode()): self._by_name[name] for name, entry in entries.items()}

    def _digest(self, given: bytes) -> bytes:
        return hmac.digest(self._secret, given, "sha256")


def given_keys(headers: Iterable[tuple[bytes, bytes]]) -> Iterator[bytes]:
    """What a request offers as its key. Source: RFC 6750 (bearer tokens)."""
    for name, value in headers:
        if name == b"authorization":
            scheme, _, given = value.partition(b" ")
            if scheme.lower() == b"bearer":
                yield given.strip()
        elif name == b"x-api-key":
            yield value.strip()


def _key(name: str, entry: _Entry) -> Key:
    return Key(
        name=name,
        tenant=name if entry.tenant is None else entry.tenant,
        is_admin=entry.admin,
        max_concurrent_requests=entry.max_concurrent_requests,
        max_sequences=entry.max_sequences,
    )


def _read(path: str) -> dict[str, _Entry]:
    """The file's entries by name. Raises ConfigError, in words that hold no key."""
    # Here: YAML takes 20 ms of every start, and few servers have such a file.
    from mooli.server.config_file import read_mapping

    try:
        found = os.stat(path)
    except OSError as exc:
        raise ConfigError(f"{FLAG} {path}: {exc.strerror or exc}") from exc
    if not stat.S_ISREG(found.st_mode) or found.st_size > MAX_FILE_BYTES:
        raise ConfigError(f"{FLAG} {path} is no file of at most {MAX_FILE_BYTES} bytes")
    entries: dict[str, _Entry] = {}
    holders: dict[str, str] = {}
    for name, value in read_mapping(FLAG, path, holds="names to keys").items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ConfigError(
                f"{FLAG} {path}: {str(name)[:80]!r} is no name: use a letter, then letters, digits, dots and dashes"
            )
        entry = entries[name] = _entry(f"{FLAG} {path}: {name}", value)
        if holders.setdefault(entry.key, name) != name:
            raise ConfigError(f"{FLAG} {path}: {holders[entry.key]} and {name} have the same key")
    if not entries:
        raise ConfigError(f"{FLAG} {path} holds no key: give at least one, as NAME: {{key: KEY}}")
    if found.st_mode & (stat.S_IROTH | stat.S_IWOTH):
        logger.warning("every user of this machine can read the keys in %s: chmod o-rwx it", path)
    return entries


def _entry(where: str, value: Any) -> _Entry:
    if not isinstance(value, dict) or not value.keys() <= set(_Entry.__struct_fields__):
        raise ConfigError(f"{where} must be a mapping of {', '.join(_Entry.__struct_fields__)} to values")
    if "key" in value and not isinstance(value["key"], str):
        raise ConfigError(f"{where}: YAML reads the key as a {type(value['key']).__name__}: put it in quotes")
    try:
        entry = msgspec.convert(value, _Entry, strict=True)
    except msgspec.ValidationError as exc:
        raise ConfigError(f"{where}: {str(exc).replace('`', '')}") from None
    if not SENDABLE.fullmatch(entry.key):
        raise ConfigError(
            f"{where}: the key is empty, or holds a space or a character outside ASCII: no client could send it"
        )
    if entry.tenant is not None and not _NAME.fullmatch(entry.tenant):
        raise ConfigError(f"{where}: tenant {entry.tenant[:80]!r} is no name; leave it out for a tenant of its own")
    return entry
