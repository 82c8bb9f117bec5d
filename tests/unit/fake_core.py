"""An engine process around the fake runner: `python fake_core.py FD`. What it does is told by Start's `model_path`.

Without a request it behaves; every request repeats the first token of its prompt.
"""

from __future__ import annotations

import os
import signal
import sys
import time

import mooli.errors
from mooli.config import EngineConfig
from mooli.engine import messages, process
from mooli.engine.build import BuiltEngine, Progress, VocabSize


def build(start: messages.Start, vocab_size: VocabSize, progress: Progress) -> BuiltEngine:
    from fake_engine import fake_build

    scenario, _, detail = start.model_path.partition(":")
    if scenario == "raise":
        raise getattr(mooli.errors, detail, ValueError)("planted")
    if scenario == "exit":
        os._exit(int(detail))
    if scenario == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    progress("Loading weights", 1, 1)

    def before_step(batch: object) -> None:
        time.sleep(float(detail) if scenario == "slow" else 0.0)

    built = fake_build(
        EngineConfig.from_kwargs(**start.config), next_token=lambda context: context[0], raises=before_step
    )
    if scenario == "break":
        built.core.step = _break
    return built


def _break() -> None:
    raise RuntimeError("planted")


if __name__ == "__main__":
    sys.exit(process.main(build))
