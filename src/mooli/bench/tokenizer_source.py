"""Finding the tokenizer that counts a run's tokens.

Owns the order of places. Never downloads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mooli.bench.errors import BenchmarkError
from mooli.errors import ModelError
from mooli.frontend.tokenizer import Tokenizer, load_tokenizer
from mooli.hub import resolve


def find_tokenizer(given: str | None, model_info: dict[str, Any], model: str | None) -> tuple[Tokenizer, str]:
    """The tokenizer and where it was found: what the user gave, else what the server says, else the model's name.

    The server's path is of its own machine, so one that does not exist here is passed over.
    Raises BenchmarkError saying what was looked at.
    """
    if given is not None:
        try:
            return _load(given), given
        except ModelError as exc:
            raise BenchmarkError(f"--tokenizer {given}: {exc}") from exc
    said = [model_info.get(key) for key in ("tokenizer_path", "model_path")]
    places = dict.fromkeys(place for place in (*said, model) if isinstance(place, str) and place)
    reasons = []
    for place in places:
        try:
            return _load(place), place
        except ModelError as exc:
            reasons.append(f"{place}: {exc}")
    tried = "; ".join(reasons) if reasons else "the server names none, and no --model was given"
    raise BenchmarkError(
        f"no tokenizer found ({tried}). Give --tokenizer: a folder, a .gguf file, a model's name, or demo"
    )


def _load(place: str) -> Tokenizer:
    # A folder with nothing but a tokenizer is no model, and serves here all the same.
    folder = Path(place).expanduser()
    if (folder / "tokenizer.json").is_file():
        return load_tokenizer(folder)
    return load_tokenizer(resolve(place))
