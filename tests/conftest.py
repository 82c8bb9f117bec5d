"""What holds for all tests: libraries use one thread, no model is fetched, `steps` and `variants` can be imported, no
test finds the log level of another, tests of the ascend backend run on a simulated NPU, and neither chance nor the
surroundings decide a test.

With `--quick` only what needs no torch and little time is run: no file that imports a heavy library, no test that is
marked as slow, none of the backends on torch.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# Before NumPy is imported: its library reads these once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# A name that is not on this machine is an error: no test may reach the real hubs.
os.environ.setdefault("MOOLI_OFFLINE", "1")

# Servers leave nothing in the folder of whoever runs the tests, and no test finds what another has computed.
os.environ["MOOLI_KV_CACHE_DIR"] = "none"

# No proxy stands between a test and its own servers, and no terminal decides how help and errors are broken.
for _name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
    os.environ.pop(_name, None)
for _name in ("COLUMNS", "LINES", "FORCE_COLOR", "NO_COLOR", "PYTHON_COLORS"):
    os.environ.pop(_name, None)

# A job in the background has Ctrl-C ignored, and so would all processes that it starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples in every run, however fast the machine is. `--hypothesis-profile default` draws others.
settings.register_profile("same", derandomize=True, deadline=None, database=None)
settings.load_profile("same")

_TESTS = Path(__file__).resolve().parent
sys.path.insert(0, str(_TESTS))

# The simulated NPU is of this tree, here and in the processes that a test starts.
_SIMULATOR = str(_TESTS.parent / "simulate")
sys.path.insert(1, _SIMULATOR)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [_SIMULATOR, os.environ.get("PYTHONPATH")]))


_HEAVY = re.compile(r"^(import|from) (torch|transformers|gguf|made_tokenizers)\b", re.MULTILINE)
"""Libraries that take seconds to import, and the modules here that import them."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="only what needs no torch and little time")
    parser.addoption(
        "--mixes", type=int, help="random mixes of each model in test_bit_equal.py, instead of its numbers"
    )
    parser.addoption("--mixes-seed", type=int, help="the seed that they are drawn with")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    is_left_out = config.getoption("--quick") and collection_path.suffix == ".py"
    return True if is_left_out and _HEAVY.search(collection_path.read_text(encoding="utf-8")) else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--quick"):
        return
    slow = [item for item in items if _is_slow(item)]
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if not _is_slow(item)]


def _is_slow(item: pytest.Item) -> bool:
    call = getattr(item, "callspec", None)
    needs_torch = call is not None and not {"torch", "ascend"}.isdisjoint(map(str, call.params.values()))
    return needs_torch or item.get_closest_marker("slow") is not None


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.getoption("--quick") and "torch" in sys.modules:
        print("\na quick test has imported torch: mark it as slow", file=sys.stderr)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(autouse=True)
def _log_level_of_its_own() -> Iterator[None]:
    """An engine sets the level of the process it is in."""
    package = logging.getLogger("mooli")
    level = package.level
    package.setLevel(logging.NOTSET)
    yield
    package.setLevel(level)


@pytest.fixture(autouse=True)
def _simulated_npu(request: pytest.FixtureRequest) -> Iterator[None]:
    """For tests of every backend: an NPU while it is the turn of the ascend backend, and none otherwise."""
    from variants import simulated_npu

    call = getattr(request.node, "callspec", None)
    values = call.params if call is not None else {}
    if "ascend" not in (values.get("backend_name"), getattr(values.get("variant"), "backend", None)):
        yield
        return
    with simulated_npu():
        yield
