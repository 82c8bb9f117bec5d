"""Another machine in a folder: its files, its npu-smi, its Python packages, its models."""

from __future__ import annotations

import json
import struct
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers

from mooli import _native
from mooli.doctor.surroundings import Surroundings
from mooli.models.checkpoint import DummyCheckpoint
from mooli.models.registry import read_hf_config
from mooli.tensor import TensorType

MEMINFO = "MemTotal: 16777216 kB\nMemAvailable: 8388608 kB\n"

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 64,
    "max_position_embeddings": 256,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 1,
    "torch_dtype": "bfloat16",
    "vocab_size": 300,
}


class Machine:
    """A file tree with PATH and PYTHONPATH that lead into it and nowhere else."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "machine"
        self.bin, self.packages = self.root / "bin", self.root / "packages"
        for path in (self.bin, self.packages):
            path.mkdir(parents=True)
        self.environ = {"PATH": str(self.bin), "PYTHONPATH": str(self.packages), "HOME": str(self.root / "home")}
        self.write("proc/meminfo", MEMINFO)
        (self.root / "dev").mkdir()

    def write(self, name: str, text: str) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    def program(self, name: str, text: str, *, ends: str = "") -> None:
        """A program that prints `text`; `ends` is shell that follows."""
        said = self.write(f"said/{name}", text)
        script = self.write(f"bin/{name}", f"#!/bin/sh\n/bin/cat '{said}'\n{ends}\n")
        script.chmod(0o755)

    def package(self, name: str, source: str, version: str | None = "1.0") -> None:
        """A Python package that hides an installed one of the same name."""
        self.write(f"packages/{name}/__init__.py", source)
        if version is not None:
            info = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
            self.write(f"packages/{name}-{version}.dist-info/METADATA", info)

    def devices(self, *names: str) -> None:
        for name in names or ("davinci0", "davinci_manager", "devmm_svm", "hisi_hdc"):
            self.write(f"dev/{name}", "")

    def cann(self, version: str = "8.2.RC1", *, kernels: str | None = "8.2.RC1", nnal: str | None = "8.2.RC1") -> Path:
        """A toolkit and its parts, as their installers leave them. The folder of the toolkit."""
        latest = "usr/local/Ascend/ascend-toolkit/latest"
        self.write(
            f"{latest}/aarch64-linux/ascend_toolkit_install.info",
            f"package_name=Ascend-cann-toolkit\nversion={version}\ninnerversion=V100R001C22SPC001B228\narch=aarch64\n",
        )
        self.write(f"{latest}/lib64/libnothing.so", "")
        self.write("usr/local/Ascend/ascend-toolkit/set_env.sh", "")
        if kernels is not None:
            self.write(f"{latest}/opp_kernel/version.info", f"Version={kernels}\n")
        if nnal is not None:
            self.write("usr/local/Ascend/nnal/atb/latest/version.info", f"Ascend-cann-atb : x\nVersion={nnal}\n")
        return self.root / latest

    def source_set_env(self) -> None:
        toolkit = self.root / "usr/local/Ascend/ascend-toolkit/latest"
        self.environ |= {
            "ASCEND_TOOLKIT_HOME": str(toolkit),
            "ASCEND_HOME_PATH": str(toolkit),
            "ATB_HOME_PATH": str(self.root / "usr/local/Ascend/nnal/atb/latest"),
            "LD_LIBRARY_PATH": str(toolkit / "lib64"),
        }

    def surroundings(self, **options: float) -> Surroundings:
        return Surroundings(root=self.root, environ=self.environ, **({"timeout_s": 20.0} | options))


def some_library() -> Path:
    """A shared library that this Python can open."""
    return Path(_native.__file__)


def torch_source(version: str = "2.6.0", cuda: str | None = None, npu: str = "") -> str:
    """A torch that knows its version, and as much of torch.npu as `npu` says."""
    return (
        f"__version__ = {version!r}\nclass version:\n    cuda = {cuda!r}\n    cann = '8.2.RC1'\n{npu}\n"
        "bfloat16, float16 = 'torch.bfloat16', 'torch.float16'\n"
    )


def model_folder(path: Path, **changes: object) -> Path:
    """A whole small model; `changes` are laid over its config.json."""
    path.mkdir(parents=True, exist_ok=True)
    raw = {**CONFIG, **changes}
    (path / "config.json").write_text(json.dumps(raw))
    checkpoint = DummyCheckpoint(read_hf_config(CONFIG))
    tensors = [checkpoint.tensor(name) for name in checkpoint.names()]
    write_shard(path / "model.safetensors", tensors)
    backend = Tokenizer(models.BPE({chr(c): c for c in range(256)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    return path


def shard(path: Path) -> Path:
    """The same model in two shards with an index."""
    checkpoint = DummyCheckpoint(read_hf_config(CONFIG))
    names = list(checkpoint.names())
    halves = {"model-00001-of-00002.safetensors": names[:8], "model-00002-of-00002.safetensors": names[8:]}
    size = 0
    for name, part in halves.items():
        tensors = [checkpoint.tensor(tensor) for tensor in part]
        size += sum(tensor.data.nbytes for tensor in tensors)
        write_shard(path / name, tensors)
    weight_map = {tensor: name for name, part in halves.items() for tensor in part}
    (path / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map})
    )
    (path / "model.safetensors").unlink()
    return path


def write_shard(path: Path, tensors: list, dtype: str | None = None) -> None:
    header, data = {}, b""
    for tensor in tensors:
        end = len(data) + tensor.data.nbytes
        kind = dtype or {TensorType.BF16: "BF16", TensorType.F32: "F32"}[tensor.type]
        header[tensor.name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [len(data), end]}
        data += tensor.data.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
