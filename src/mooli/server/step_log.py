"""The log lines of steps, in SGLang's words: scripts read speed and load from them.

Owns what is logged when, and the rate of generation that logs, metrics and /v1/loads show. Never decides anything.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping

from mooli.engine.facts import EngineFacts
from mooli.engine.messages import Outputs
from mooli.scheduler.stats import StepStats

logger = logging.getLogger(__name__)


class GenThroughput:
    """Generated tokens per second over the last `interval` steps that continued an output; 0.0 once nothing runs.

    The clock starts with the first step after an idle time, so that a pause never lowers the rate.
    """

    def __init__(self, interval: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.tokens_per_s = 0.0
        self._interval = interval
        self._clock = clock
        self._num_steps = 0
        self._last_step = 0
        self._since: tuple[float, int] | None = None
        """When the interval began (seconds), and how many tokens had been generated."""

    def step(self, report: Outputs) -> bool:
        """Take a report. Whether an interval ends with it."""
        is_new = report.step.step != self._last_step
        self._last_step = report.step.step
        now, generated = self._clock(), report.stats["generated_tokens"]
        if not report.stats["running"] and not report.stats["waiting"]:
            self._num_steps, self._since, self.tokens_per_s = 0, None, 0.0
            return False
        if self._since is None:
            self._since = (now, generated)
            return False
        if not is_new or not report.step.decode_rows:
            return False
        self._num_steps += 1
        if self._num_steps < self._interval:
            return False
        started, before = self._since
        self.tokens_per_s = (generated - before) / max(now - started, 1e-9)
        self._num_steps, self._since = 0, (now, generated)
        return True


class StepLog:
    """Logs a line for each step that computes prompts, and one for every `decode_log_interval` steps that continue
    outputs."""

    def __init__(
        self, facts: EngineFacts, decode_log_interval: int, *, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._facts = facts
        self._throughput = GenThroughput(decode_log_interval, clock)
        self._last_step = 0
        self._drafts_before = (0, 0, 0)

    @property
    def last_gen_throughput(self) -> float:
        """Tokens per second, of all requests together; 0.0 while nothing runs."""
        return self._throughput.tokens_per_s

    def step(self, report: Outputs) -> None:
        """Take what the engine reports after a step. A report that only hands out endings repeats the step before."""
        step = report.step
        is_new = step.step != self._last_step
        self._last_step = step.step
        ends_interval = self._throughput.step(report)
        if not is_new:
            return
        usage = step.used_pages / max(self._facts.num_pages, 1)
        if step.prefill_rows:
            logger.info(
                "Prefill batch, #new-seq: %d, #new-token: %d, #cached-token: %d, token usage: %.2f, "
                "#running-req: %d, #queue-req: %d",
                step.prefill_rows,
                step.prefill_tokens,
                step.cached_tokens,
                usage,
                step.decode_rows,
                step.waiting,
            )
        if ends_interval:
            self._log_decode(step, usage, self._draft_words(report.stats))

    def _log_decode(self, step: StepStats, usage: float, draft_words: str) -> None:
        logger.info(
            "Decode batch, #running-req: %d, #token: %d, token usage: %.2f, %sgen throughput (token/s): %.2f, "
            "#queue-req: %d",
            step.running,
            step.used_pages * self._facts.page_size,
            usage,
            draft_words,
            self._throughput.tokens_per_s,
            step.waiting,
        )

    def _draft_words(self, stats: Mapping[str, int]) -> str:
        """How guessed tokens fared since the last line: tokens a step of a request, and the share of right guesses."""
        now = (stats.get("verify_steps", 0), stats.get("proposed_drafts", 0), stats.get("correct_drafts", 0))
        steps, proposed, right = (new - old for new, old in zip(now, self._drafts_before, strict=True))
        self._drafts_before = now
        if not steps:
            return ""
        return f"accept len: {1 + right / steps:.2f}, accept rate: {right / max(proposed, 1):.2f}, "
