"""Files that an operator writes, behind `--config` and `--api-keys-file`: YAML mappings.

Owns reading them safely. Never knows what they are for, and never shows what they hold: that may be keys.
"""

from __future__ import annotations

import re
from typing import Any

import yaml  # type: ignore[import-untyped]

from mooli.errors import ConfigError


class _GivenTwiceError(yaml.MarkedYAMLError):  # type: ignore[misc]
    """A key comes twice in one mapping."""


def read_mapping(flag: str, path: str, *, holds: str) -> dict[Any, Any]:
    """What the file says, in the order of the file; an empty file says nothing. flag, holds: for the messages.

    Raises ConfigError, in one line, for a file that cannot be read, is no mapping, or has a key twice.
    Source: YAML 1.1 as PyYAML's safe loader reads it, without tags that make objects.
    """
    try:
        with open(path, encoding="utf-8") as file:
            value = _load(file.read())
    except OSError as exc:
        raise ConfigError(f"{flag} {path}: {exc.strerror or exc}") from exc
    except yaml.MarkedYAMLError as exc:
        mark = exc.problem_mark
        where = "" if mark is None else f" in line {mark.line + 1}, column {mark.column + 1}"
        words = str(exc.problem or exc.context)
        if not isinstance(exc, _GivenTwiceError):
            words = re.sub(r"'[^']{2,}'", "'…'", words)  # of the file's own
        raise ConfigError(f"{flag} {path} is not valid YAML{where}: {words}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as exc:
        raise ConfigError(f"{flag} {path} is not valid YAML: {type(exc).__name__}") from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{flag} {path} must hold a mapping of {holds}, not a {type(value).__name__}")
    return value


def _load(text: str) -> Any:
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        _check_keys(node, set())
        return None if node is None else loader.construct_document(node)
    finally:
        loader.dispose()


def _check_keys(node: Any, seen_nodes: set[int]) -> None:
    """Raise for a key that comes twice in one mapping: the loader would take the last without a word."""
    if not isinstance(node, yaml.CollectionNode) or id(node) in seen_nodes:
        return
    seen_nodes.add(id(node))
    keys = set()
    for child in node.value:
        key, value = child if isinstance(node, yaml.MappingNode) else (None, child)
        if isinstance(key, yaml.ScalarNode):
            if key.value in keys:
                raise _GivenTwiceError(problem=f"{key.value!r} is given twice", problem_mark=key.start_mark)
            keys.add(key.value)
        _check_keys(value, seen_nodes)
