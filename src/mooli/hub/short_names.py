"""Short names of models, such as qwen2.5:0.5b: a table of this package, and the user's own.

Owns both tables. Never looks whether a model is there.
"""

from __future__ import annotations

import os
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

from mooli.errors import ConfigError, MooliError
from mooli.formats.files import parse_json

MAX_TABLE_BYTES = 1 << 20

_MOST_STEPS = 8
"""From a name to what it means in the end."""


def own_table() -> Path | None:
    """The user's table: an object of names to names, files or folders. None where the user has no home."""
    home = os.environ.get("XDG_CONFIG_HOME")
    try:
        return (Path(home) if home else Path.home() / ".config") / "mooli" / "models.json"
    except RuntimeError:
        return None


def short_names() -> dict[str, str]:
    """All short names with what each means: the user's own win. Raises ConfigError for a table that cannot be read."""
    path = own_table()
    try:
        data = path.read_bytes()[: MAX_TABLE_BYTES + 1] if path is not None else b"{}"
    except FileNotFoundError:
        return dict(_packaged())
    except OSError as exc:
        raise ConfigError(f"your table of models {path} cannot be read: {exc}") from exc
    if len(data) > MAX_TABLE_BYTES:
        raise ConfigError(f"your table of models {path} has more than {MAX_TABLE_BYTES} bytes")
    try:
        own = parse_json(data, str(path))
    except MooliError as exc:
        raise ConfigError(f"your table of models: {exc}") from exc
    wrong = next((name for name, meaning in own.items() if not isinstance(meaning, str) or not meaning), None)
    if wrong is not None:
        raise ConfigError(f"your table of models {path}: {wrong!r} must have a name, a file or a folder as a text")
    return _packaged() | own


def expand(name: str) -> str:
    """What a name means: that of a hub, a file or a folder. A name that is in no table means itself.

    Raises ConfigError for names that lead in a circle, or a table that cannot be read.
    """
    table = short_names()
    meaning = name
    for _ in range(_MOST_STEPS):
        if meaning not in table:
            return meaning
        meaning = table[meaning]
    raise ConfigError(f"the short name {name!r} leads from name to name: it should lead to a model; see {own_table()}")


@lru_cache(maxsize=1)
def _packaged() -> dict[str, str]:
    data = (files("mooli.hub") / "short_names.json").read_bytes()
    return {name: str(meaning) for name, meaning in parse_json(data, "short_names.json").items()}
