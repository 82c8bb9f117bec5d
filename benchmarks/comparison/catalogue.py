"""Which engines are compared, with which weights, and how each is started; and which of them this machine has.

Owns command lines and the reasons why an engine is left out. Never starts anything.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from comparison.dialects import LlamaCpp, Native, Vllm
from comparison.engines import RunningEngine, free_port, start_server, start_worker
from comparison.weights import Weights

WORKERS = Path(__file__).resolve().parent / "workers"

CONTEXT = 2048
"""The longest sequence any engine must take, in tokens."""

KV_TOKENS = 40_960
"""Mooli's KV pool: more than the largest workload holds if nothing is shared."""

KV_GB = 1
"""The pool of engines that want it in gigabytes."""

LLAMA_SLOTS = 16
LLAMA_SLOT_CONTEXT = 1280
"""Tokens of a slot: the longest sequence of the workloads has 1,088."""

VLLM_MEMORY_SHARE = "0.2"
"""Its start checks that this much of all memory is free; the pool is KV_GB all the same."""

OPENVINO, LLAMA_CPP, VLLM, TRANSFORMERS, MOOLI = "OpenVINO GenAI", "llama.cpp", "vLLM", "transformers", "Mooli"
HTTP, IN_PROCESS = "HTTP", "in process"

_HAS_TRANSFORMERS = (
    "import importlib.util as u, sys;"
    "sys.exit(not all(map(u.find_spec, ('torch', 'transformers', 'gguf', 'accelerate'))))"
)

FILE_BITS = 5
"""Of the files compared: mixes of 4 to 8 bits (Q4_K_M), and Q4_1, which has 5 bits a weight."""


@dataclass(frozen=True)
class Variant:
    """One engine with one format of weights behind one interface.

    bits: of a weight in the linear layers, to tell which formats are equal or finer.
    start: starts it; may raise EngineError.
    """

    engine: str
    weights: str
    bits: int
    through: str
    version: str
    start: Callable[[Path], RunningEngine]

    @property
    def key(self) -> str:
        return variant_key(self.engine, self.weights, self.through)


def variant_key(engine: str, weights: str, through: str) -> str:
    return f"{engine} {weights}, {through}"


@dataclass(frozen=True)
class Peers:
    """The folder that benchmarks/install_peers.py fills: an environment or build to a peer, and why one is missing."""

    folder: Path

    def missing(self) -> dict[str, str]:
        """Reason by peer, for those that cannot be compared."""
        reasons = {}
        written = self.folder / "reasons.json"
        said: Mapping[str, str] = json.loads(written.read_text()) if written.exists() else {}
        for name, program in self._programs().items():
            if not program.exists():
                reasons[name] = said.get(name, "not installed (make peers)")
        if not self.transformers_python():
            reasons[TRANSFORMERS] = said.get(TRANSFORMERS, "torch and transformers are not in this environment")
        return reasons

    def _programs(self) -> dict[str, Path]:
        return {
            OPENVINO: self.python(OPENVINO).parents[1] / ".installed",
            LLAMA_CPP: self.llama("llama-server"),
            VLLM: self.python(VLLM).parents[1] / ".installed",
        }

    def python(self, peer: str) -> Path:
        """The interpreter of a peer's own environment."""
        return self.folder / {OPENVINO: "openvino", VLLM: "vllm", LLAMA_CPP: "llamacpp"}[peer] / "bin" / "python"

    def llama(self, program: str) -> Path:
        return self.folder / "llamacpp" / "build" / "bin" / program

    def transformers_python(self) -> Path | None:
        """An interpreter with torch and transformers: this one, or vLLM's."""
        for python in (Path(sys.executable), self.python(VLLM)):
            probe = [str(python), "-c", _HAS_TRANSFORMERS]
            if python.exists() and subprocess.run(probe, capture_output=True, check=False).returncode == 0:
                return python
        return None

    def version(self, peer: str) -> str:
        """As the installer noted it."""
        file = self.python(peer).parents[1] / ".installed"
        return file.read_text().strip() if file.exists() else ""


def mooli_variants(weights: Weights, num_threads: int) -> list[Variant]:
    from mooli.version import __version__

    def variant(label: str, bits: int, quantization: str | None, through: str) -> Variant:
        def start(log: Path) -> RunningEngine:
            path = str(weights.file)
            if through == IN_PROCESS:
                command = [sys.executable, str(WORKERS / "mooli_worker.py"), path, str(num_threads), str(KV_TOKENS)]
                return start_worker([*command, *([quantization] if quantization else [])], log, {})
            port = free_port()
            command = [sys.executable, "-m", "mooli.launch_server", "--model-path", path, "--port", str(port)]
            command += ["--num-threads", str(num_threads), "--max-total-tokens", str(KV_TOKENS)]
            command += ["--kv-cache-dir", "none"]
            command += ["--speculative-algorithm", "none"]  # as the peers: how fast a token is computed, not guessed
            command += ["--quantization", quantization] if quantization else []
            return start_server(command, port, Native(), log, {}, {})

        return Variant(MOOLI, label, bits, through, __version__, start)

    formats = ((weights.file_label, FILE_BITS, None), ("int8", 8, "int8"), ("int4", 4, "int4"))
    return [
        variant(label, bits, quantization, through)
        for label, bits, quantization in formats
        for through in (IN_PROCESS, HTTP)
    ]


def peer_variants(peers: Peers, weights: Weights, num_threads: int) -> list[Variant]:
    """Those that are installed; `Peers.missing` says why others are not here."""
    missing = peers.missing()
    variants = []
    if OPENVINO not in missing and LLAMA_CPP not in missing:
        variants += [_openvino(peers, weights, kind, bits, num_threads) for kind, bits in (("Q4_0", 4), ("Q8_0", 8))]
    if LLAMA_CPP not in missing:
        kinds = ((weights.file_label, FILE_BITS), ("Q4_0", 4), ("Q8_0", 8))
        variants += [_llama_cpp(peers, weights, kind, bits, num_threads) for kind, bits in kinds]
    if TRANSFORMERS not in missing:
        if VLLM not in missing:
            variants.append(_vllm(peers, weights, num_threads))
        variants.append(_transformers(peers, weights, num_threads))
    return variants


def _openvino(peers: Peers, weights: Weights, kind: str, bits: int, num_threads: int) -> Variant:
    def start(log: Path) -> RunningEngine:
        command = [str(peers.python(OPENVINO)), str(WORKERS / "openvino_worker.py")]
        command += [str(weights.quantised(kind)), str(num_threads), str(KV_GB)]
        return start_worker(command, log, {})

    return Variant(OPENVINO, kind, bits, IN_PROCESS, peers.version(OPENVINO), start)


def _llama_cpp(peers: Peers, weights: Weights, kind: str, bits: int, num_threads: int) -> Variant:
    def start(log: Path) -> RunningEngine:
        port = free_port()
        file = weights.file if kind == weights.file_label else weights.quantised(kind)
        command = [str(peers.llama("llama-server")), "-m", str(file), "--port", str(port), "--host", "127.0.0.1"]
        command += [
            "-t",
            str(num_threads),
            "-np",
            str(LLAMA_SLOTS),
            "-c",
            str(LLAMA_SLOTS * LLAMA_SLOT_CONTEXT),
            "--no-webui",
        ]
        return start_server(command, port, LlamaCpp(), log, {}, {})

    return Variant(LLAMA_CPP, kind, bits, HTTP, peers.version(LLAMA_CPP), start)


def _vllm(peers: Peers, weights: Weights, num_threads: int) -> Variant:
    def start(log: Path) -> RunningEngine:
        port, name = free_port(), "compared"
        command = [str(peers.python(VLLM)), "-m", "vllm.entrypoints.openai.api_server", "--model"]
        command += [str(weights.dequantised()), "--served-model-name", name, "--dtype", "bfloat16"]
        command += ["--max-model-len", str(CONTEXT), "--host", "127.0.0.1", "--port", str(port)]
        command += ["--gpu-memory-utilization", VLLM_MEMORY_SHARE]
        env = {
            # By default one core is kept for its scheduler, which leaves half of a machine of two.
            "VLLM_CPU_NUM_OF_RESERVED_CPU": os.environ.get("VLLM_CPU_NUM_OF_RESERVED_CPU", "0"),
            "VLLM_CPU_KVCACHE_SPACE": str(KV_GB),
            "OMP_NUM_THREADS": str(num_threads),
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "PATH": f"{peers.python(VLLM).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        }
        return start_server(command, port, Vllm(name), log, env, {})

    return Variant(VLLM, "bfloat16", 16, HTTP, peers.version(VLLM), start)


def _transformers(peers: Peers, weights: Weights, num_threads: int) -> Variant:
    python = peers.transformers_python()
    ask = [str(python), "-c", "from importlib.metadata import version; print(version('transformers'))"]
    version = subprocess.run(ask, capture_output=True, text=True, check=False).stdout.strip()

    def start(log: Path) -> RunningEngine:
        command = [str(python), str(WORKERS / "transformers_worker.py"), str(weights.dequantised()), str(num_threads)]
        return start_worker(command, log, {"HF_HUB_OFFLINE": "1"})

    return Variant(TRANSFORMERS, "bfloat16", 16, IN_PROCESS, version, start)
