"""Which modules of a model a quantisation is of, as config.json says it.

Owns the two ways of naming modules: `modules_to_not_convert` (parts of names) and the targets of compressed-tensors
(names, classes, or regular expressions after `re:`). Never looks at weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from mooli.errors import CheckpointError, UnsupportedModelError
from mooli.models.fields import short

_MAX_PATTERN, _MAX_REPEATS = 1000, 4


class ModuleNames:
    """Modules that are left as they were: each whose name has one of these in it, as Transformers reads them."""

    def __init__(self, names: Any) -> None:
        if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise CheckpointError(f"modules_to_not_convert must be a list of names, got {short(names)}")
        self._names = tuple(names or ())

    def __contains__(self, module: str) -> bool:
        return any(module == name or f".{name}." in f".{module}." for name in self._names)


class Targets:
    """Modules by name, by class or by regular expression. All that is quantised in a language model is `Linear`."""

    def __init__(self, targets: Any, what: str) -> None:
        if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
            raise CheckpointError(f"{what} must be a list of names, got {short(targets)}")
        self._names = {target for target in targets if not target.startswith("re:")}
        self._patterns = [_pattern(target[3:], what) for target in targets if target.startswith("re:")]

    def __contains__(self, module: str) -> bool:
        return module in self._names or any(pattern.match(module) for pattern in self._patterns)

    @property
    def has_all(self) -> bool:
        """Whether they are all linear layers, whatever their names."""
        return "Linear" in self._names


def _pattern(text: str, what: str) -> re.Pattern[str]:
    # A model is somebody else's: a pattern must not take for ever to match.
    if len(text) > _MAX_PATTERN or len(re.findall(r"[*+?{]", text)) > _MAX_REPEATS or re.search(r"\)[*+?{]|\\\d", text):
        raise UnsupportedModelError(
            f"{what} has the pattern {short(text)}: patterns of at most {_MAX_PATTERN} characters and {_MAX_REPEATS}"
            " repetitions are read, without repeated groups"
        )
    try:
        return re.compile(text)
    except re.error as exc:
        raise CheckpointError(f"{what} has the pattern {short(text)}, which is none: {exc}") from exc


def first_of(groups: Iterable[tuple[Targets, Any]], module: str) -> Any | None:
    """What belongs to the first targets that name the module; else to those of all linear layers; None without any."""
    whole = None
    for targets, value in groups:
        if module in targets:
            return value
        if targets.has_all and whole is None:
            whole = value
    return whole
