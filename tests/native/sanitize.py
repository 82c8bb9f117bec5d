"""The native tests under the sanitizers of the compiler: addresses and undefined behaviour, then threads.

`make sanitize`. Ends with 1 if one of them finds something or a check fails.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from native_program import build, this_machine

SANITIZERS = {
    "addresses and undefined behaviour": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "threads": ["-fsanitize=thread"],
}
ENVIRONMENT = {
    "ASAN_OPTIONS": "detect_leaks=1:strict_string_checks=1",
    "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    "TSAN_OPTIONS": "halt_on_error=1:second_deadlock_stack=1",
}


def main() -> int:
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        print("no C++ compiler was found. Debian, Ubuntu: apt install g++", file=sys.stderr)
        return 1
    failed = 0
    for name, options in SANITIZERS.items():
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            program = build(compiler, this_machine(), ["-O1", "-g", "-fno-omit-frame-pointer", *options], Path(folder))
            built = time.monotonic()
            done = subprocess.run(
                [str(program)],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env=os.environ | ENVIRONMENT,
                text=True,
            )
        failed += done.returncode != 0
        verdict = "nothing found" if done.returncode == 0 else f"exit status {done.returncode}"
        print(f"{name}: {verdict} ({built - began:.0f} s to build, {time.monotonic() - built:.0f} s to run)")
        print(done.stderr, end="", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
