"""The file behind `--config`: a YAML mapping of argument names to values.

Owns reading it safely. Never knows which arguments there are, and never shows what it holds: that may be keys.
"""

from __future__ import annotations

from typing import Any

import yaml  # type: ignore[import-untyped]

from mooli.errors import ConfigError


def read_config_file(path: str) -> dict[str, Any]:
    """What the file says, in the order of the file; an empty file says nothing.

    Raises ConfigError, in one line, for a file that cannot be read, is no mapping with text keys, or has a key twice.
    Source: YAML 1.1 as PyYAML's safe loader reads it, without tags that make objects.
    """
    try:
        with open(path, encoding="utf-8") as file:
            value = _load(file.read())
    except OSError as exc:
        raise ConfigError(f"--config {path}: {exc.strerror or exc}") from exc
    except yaml.MarkedYAMLError as exc:
        mark = exc.problem_mark
        where = "" if mark is None else f" in line {mark.line + 1}, column {mark.column + 1}"
        raise ConfigError(f"--config {path} is not valid YAML{where}: {exc.problem or exc.context}") from exc
    except (yaml.YAMLError, ValueError, RecursionError) as exc:
        raise ConfigError(f"--config {path} is not valid YAML: {type(exc).__name__}") from exc
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"--config {path} must hold a mapping of arguments to values, not a {type(value).__name__}")
    for key in value:
        if not isinstance(key, str):
            raise ConfigError(f"--config {path}: there is no argument {key!r}")
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
                raise yaml.MarkedYAMLError(problem=f"{key.value!r} is given twice", problem_mark=key.start_mark)
            keys.add(key.value)
        _check_keys(value, seen_nodes)
