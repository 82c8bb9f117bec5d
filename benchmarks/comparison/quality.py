"""How far each format of weights is from the model it came from: KL divergence to the dequantised float32 model.

Owns the positions compared and the arithmetic. The logits come from a worker of each engine; llama.cpp computes its own
divergence, from a file of the reference's probabilities in the form of its `llama-perplexity`.

All are measured over the second half of the first 1,000 tokens of benchmarks/text.txt, each position with all before it
as context: `llama-perplexity` leaves out the first half, and says nothing about fewer than 100 positions.
"""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from comparison.catalogue import LLAMA_CPP, MOOLI, OPENVINO, TRANSFORMERS, WORKERS, Peers
from comparison.child import EngineError
from comparison.weights import Weights
from mooli.frontend.tokenizer import load_tokenizer

NUM_TOKENS = 1000
TEXT = Path(__file__).resolve().parents[1] / "text.txt"
_LIMIT_S = 900
_CLIP = 16.0
"""llama-perplexity keeps no log-probability further than this below the largest."""


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def divergence(reference: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """Of two arrays of log-probabilities (positions, vocabulary): mean_kl and worst_kl in nats, same_top as a share."""
    kl = (np.exp(reference) * (reference - other)).sum(axis=-1)
    same = (reference.argmax(-1) == other.argmax(-1)).mean()
    return {"mean_kl": float(kl.mean()), "worst_kl": float(kl.max()), "same_top": float(same)}


def write_base(path: Path, ids: Sequence[int], log_probs: np.ndarray) -> None:
    """The file that `llama-perplexity --kl-divergence-base` reads: one chunk of `ids`, and for its positions from the
    middle to the last but one the log-probabilities (positions, vocabulary) in 16 bits with a scale to a row."""
    vocab = log_probs.shape[1]
    with path.open("wb") as file:
        file.write(b"_logits_" + struct.pack("<Iii", len(ids), vocab, 1) + np.asarray(ids, "<i4").tobytes())
        for row in log_probs[: len(ids) - 1 - len(ids) // 2]:
            low = max(float(row.min()), float(row.max()) - _CLIP)
            scale = (float(row.max()) - low) / 65535
            steps = np.rint((np.maximum(row, low) - low) / scale).astype("<u2")
            file.write(struct.pack("<ff", scale, low) + steps.tobytes() + b"\0\0" * (vocab % 2))


class Quality:
    """Divergences of one model's formats; files go to `folder`."""

    def __init__(self, weights: Weights, peers: Peers, folder: Path, say: Callable[[str], None] = print) -> None:
        self._weights, self._peers, self._folder, self._say = weights, peers, folder, say
        folder.mkdir(parents=True, exist_ok=True)
        text = TEXT.read_text(encoding="utf-8")
        self._ids = load_tokenizer(weights.file).encode(text)[:NUM_TOKENS]
        self._ids_file = folder / "ids.json"
        self._ids_file.write_text(json.dumps(self._ids))
        self._reference: np.ndarray | None = None

    def measure(self, formats: Sequence[tuple[str, str]]) -> dict[str, dict[str, Any]]:
        """By "engine weights" for each of `formats` (engine, weights)."""
        measured: dict[str, dict[str, Any]] = {}
        for engine, weights in formats:
            try:
                found: dict[str, Any] = self._one(engine, weights)
            except EngineError as exc:
                found = {"error": str(exc)}
            measured[f"{engine} {weights}"] = found
            self._say(f"{self._weights.name}: KL of {engine} {weights}: {found.get('mean_kl', found.get('error'))}")
        return measured

    def _one(self, engine: str, weights: str) -> dict[str, Any]:
        if engine == LLAMA_CPP:
            return self._llama_cpp(weights)
        file = str(self._weights.file)
        if engine == MOOLI:
            command = [sys.executable, str(WORKERS / "mooli_logits.py"), file]
            command.append(weights if weights in ("int8", "int4") else "file")
        elif engine == OPENVINO:
            quantised = str(self._weights.quantised(weights))
            command = [str(self._peers.python(OPENVINO)), str(WORKERS / "openvino_logits.py"), quantised]
            command.append(str(self._folder))
        elif engine == TRANSFORMERS:
            folder = str(self._weights.dequantised())
            command = [str(self._peers.transformers_python()), str(WORKERS / "transformers_logits.py"), folder]
        else:
            raise EngineError("not measured: its server gives log-probabilities of a few tokens only")
        return divergence(self._base(), log_softmax(self._logits(command)))

    def _base(self) -> np.ndarray:
        """Log-probabilities of the reference: the file's weights in float32, computed in NumPy."""
        if self._reference is None:
            command = [sys.executable, str(WORKERS / "mooli_logits.py"), str(self._weights.file), "reference"]
            self._reference = log_softmax(self._logits(command))
        return self._reference

    def _logits(self, command: Sequence[str]) -> np.ndarray:
        """Of the positions from the middle to the last but one, from a worker that writes all of them."""
        out = self._folder / "logits.npy"
        self._call([*command, str(self._ids_file), str(out)])
        logits = np.load(out, allow_pickle=False)
        out.unlink()
        if logits.shape[0] != len(self._ids):
            raise EngineError(f"gave logits of {logits.shape[0]} positions, not {len(self._ids)}")
        return np.asarray(logits[len(self._ids) // 2 : -1], np.float32)

    def _llama_cpp(self, weights: str) -> dict[str, Any]:
        is_file = weights == self._weights.file_label
        model = self._weights.file if is_file else self._weights.quantised(weights)
        base = self._folder / "base.bin"
        write_base(base, self._ids, self._base())
        command = [str(self._peers.llama("llama-perplexity")), "-m", str(model), "--kl-divergence"]
        said = self._call([*command, "--kl-divergence-base", str(base), "-c", str(len(self._ids))])
        base.unlink()
        return read_perplexity(said)

    def _call(self, command: Sequence[str], env: Mapping[str, str] | None = None) -> str:
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=_LIMIT_S, check=False, env=env
            )
        except (OSError, subprocess.TimeoutExpired) as exc:
            raise EngineError(f"not measured: {exc}") from exc
        if done.returncode:
            last = " / ".join(done.stderr.strip().splitlines()[-3:])
            raise EngineError(f"not measured: status {done.returncode}: {last}")
        return done.stdout + done.stderr


def read_perplexity(said: str) -> dict[str, Any]:
    """The divergence in what `llama-perplexity --kl-divergence` prints. Raises EngineError when there is none."""
    number = r"\s*(-?[\d.]+)"
    mean = re.search(rf"Mean\s+KLD:{number}", said)
    worst = re.search(rf"Maximum KLD:{number}", said)
    same = re.search(rf"Same top p:{number}", said)
    if not mean or not worst or not same:
        raise EngineError("not measured: llama-perplexity printed no divergence")
    return {"mean_kl": float(mean[1]), "worst_kl": float(worst[1]), "same_top": float(same[1]) / 100}
