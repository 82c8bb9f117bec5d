"""When the self-test runs, and the file in which its result is kept.

Owns MOOLI_SELFTEST, the file and the log lines. Never tests anything itself.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from mooli.backends.ascend.bring_up import Npu
from mooli.backends.ascend.paths import Switches
from mooli.backends.ascend.versions import Versions
from mooli.errors import ConfigError

if TYPE_CHECKING:
    from mooli.backends.ascend.selftest import Outcome

logger = logging.getLogger(__name__)

SELFTEST_SWITCH = "MOOLI_SELFTEST"
"""Environment variable: 0 skips the self-test, 1 repeats it. Without it, it runs once for each set of versions."""


def settle(npu: Npu) -> Switches:
    """What must not be used on this device: from the file, or found out now and written there.

    Raises ConfigError for a switch with another value than 0 or 1.
    """
    switch = os.environ.get(SELFTEST_SWITCH, "")
    if switch not in ("", "0", "1"):
        raise ConfigError(f"{SELFTEST_SWITCH}={switch} is neither 0 nor 1")
    if switch == "0":
        logger.warning("%s: the self-test is skipped (%s=0), every operation is used", npu.versions, SELFTEST_SWITCH)
        return Switches()
    switches = None if switch == "1" else read_record(npu.versions)
    return test_and_record(npu)[0] if switches is None else _told(switches)


def test_and_record(npu: Npu) -> tuple[Switches, list[Outcome]]:
    """Run the self-test and keep what it found."""
    from mooli.backends.ascend.selftest import run_selftest, switches_of

    logger.info("%s: first start with these versions, testing every operation", npu.versions)
    outcomes = run_selftest(npu)
    write_record(npu.versions, outcomes)
    return _told(switches_of(outcomes)), outcomes


def record_path(versions: Versions) -> Path:
    """In the user's cache folder, one file for each set of versions."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "mooli" / f"ascend-selftest-{hashlib.sha256(versions.key.encode()).hexdigest()[:16]}.json"


def read_record(versions: Versions) -> Switches | None:
    """What was switched off with these versions; None if that is not known."""
    try:
        record = json.loads(record_path(versions).read_text(encoding="utf-8"))
        off = record["off"]
        if record["versions"] != versions.key or not isinstance(off, dict):
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Switches({str(name): str(why) for name, why in off.items()})


def write_record(versions: Versions, outcomes: Sequence[Outcome]) -> None:
    path = record_path(versions)
    off = {outcome.name: outcome.failure for outcome in outcomes if outcome.failure}
    record = {"versions": versions.key, "off": off, "outcomes": [asdict(outcome) for outcome in outcomes]}
    part = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(record, indent=1), encoding="utf-8")
        part.replace(path)
    except OSError as exc:
        logger.warning("the result of the self-test cannot be kept, it will run again: %s", exc)


def _told(switches: Switches) -> Switches:
    for name, why in switches.off.items():
        logger.warning("the self-test switched %s off (%s)", name, why)
    return switches
