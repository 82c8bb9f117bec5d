"""The same weights in the formats that peers read, made from one GGUF file and kept beside the peers.

Owns the conversions and their names. Never loads a model into an engine.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from comparison.child import EngineError

_DEQUANTISE = Path(__file__).resolve().parent / "workers" / "dequantise.py"
_CONVERSION_LIMIT_S = 1800


@dataclass(frozen=True)
class Weights:
    """A model's file and what is made of it.

    name: of the model, for people. file_label: of the file's own format.
    folder: where conversions are kept. quantise: llama.cpp's llama-quantize; python: one with torch, transformers.
    """

    name: str
    file: Path
    file_label: str
    folder: Path
    quantise: Path
    python: Path | None

    def quantised(self, kind: str) -> Path:
        """A GGUF file with all linear layers as `kind` ("Q4_0", "Q8_0"), as llama-quantize makes it (the output layer
        stays finer). Raises EngineError."""
        target = self.folder / f"{self.file.stem}-{kind.lower()}.gguf"
        if not target.exists():
            part = target.with_suffix(".part")
            self._make([str(self.quantise), "--allow-requantize", str(self.file), str(part), kind])
            part.rename(target)
        return target

    def dequantised(self) -> Path:
        """A Hugging Face folder in bfloat16. Raises EngineError."""
        target = self.folder / f"{self.file.stem}-bfloat16"
        if not target.exists():
            if self.python is None:
                raise EngineError("needs torch, transformers, gguf and accelerate to dequantise the file")
            part = target.with_suffix(".part")
            shutil.rmtree(part, ignore_errors=True)
            self._make([str(self.python), str(_DEQUANTISE), str(self.file.resolve()), str(part)])
            part.rename(target)
        return target

    def _make(self, command: Sequence[str]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=_CONVERSION_LIMIT_S, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as exc:
            raise EngineError(f"its weights could not be converted: {exc}") from exc
        if done.returncode:
            last = " / ".join(done.stderr.strip().splitlines()[-3:])
            raise EngineError(f"its weights could not be converted: {last}")
