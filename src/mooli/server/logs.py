"""The log lines of requests and steps, and the word by which a client, a proxy and the log mean the same request.

Owns what `--log-requests-level` shows of a request and how `--log-requests-format` writes it, which of a client's
`X-Request-Id` are taken, the lines of steps in SGLang's words: scripts read speed and load from them, and the last
lines of all, which administrators may read. The line of an HTTP exchange is `mooli.server.traffic`'s. Never sees keys
or headers beside that one, and never writes a text other than quoted: nobody can forge a log line with a prompt. Never
decides anything.
"""

from __future__ import annotations

import collections
import contextlib
import json
import logging
import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextvars import ContextVar
from dataclasses import fields
from typing import Any, TypeVar

import msgspec

from mooli.engine.facts import EngineFacts
from mooli.engine.messages import Outputs
from mooli.frontend.call import Listener
from mooli.frontend.generation import Generation
from mooli.frontend.tokenizer import Tokenizer
from mooli.logs import log_object
from mooli.scheduler.stats import StepStats
from mooli.server.config import ServerConfig
from mooli.types import SamplingParams

# -- the id of an HTTP request -----------------------------------------------------------------------------------------

HEADER = b"x-request-id"

_KEY = "request_id"
"""In the `state` of a scope."""

_TAKEN = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")
"""What may stand in a log line and a header as it is. Anything else is answered with a word of our own."""

REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")
"""Of the HTTP request that the running task answers; empty outside of one."""


def request_id_of(scope: MutableMapping[str, Any]) -> str:
    """Of the request of `scope`: the client's word if it sent one that is taken, otherwise a new one. The same for all
    who ask, the connection and the application."""
    state = scope.setdefault("state", {})
    if _KEY not in state:
        given = [value for name, value in scope["headers"] if name == HEADER]
        is_taken = len(given) == 1 and _TAKEN.fullmatch(given[0])
        state[_KEY] = given[0].decode("ascii") if is_taken else draw()
    request_id: str = state[_KEY]
    return request_id


def draw() -> str:
    return uuid.uuid4().hex


# -- requests ----------------------------------------------------------------------------------------------------------

request_logger = logging.getLogger("mooli.server.requests")
step_logger = logging.getLogger("mooli.server.steps")

TAIL_LINES = 1000

TAIL_CHARS = 4000
"""Of a line that is kept."""

SHOWN_CHARS = 2048
"""Of a prompt and of an answer at level 2."""

PARAMETERS, CUT_TEXTS, WHOLE_TEXTS = 1, 2, 3
"""The levels from which on there are sampling parameters, the heads of texts, and whole texts."""

_DEFAULTS = SamplingParams()

Shown = TypeVar("Shown", str, "list[int]")


class RequestLog(Listener):
    """See the module docstring. Without a tokenizer, prompts are shown as token ids."""

    def __init__(self, config: ServerConfig, tokenizer: Tokenizer | None = None) -> None:
        self._level = config.log_requests_level
        self._is_json = config.log_requests_format == "json"
        self._tokenizer = tokenizer
        self._request_ids: dict[str, str] = {}
        """Of the HTTP requests, by the `rid` of what is open of them: it ends outside of their tasks."""

    def started(self, generation: Generation) -> None:
        rid, request_id = generation.rid, REQUEST_ID.get()
        self._request_ids[rid] = request_id
        said: dict[str, Any] = {"rid": rid, "request_id": request_id, "prompt_tokens": generation.prompt_tokens}
        if generation.request.client:
            said["client"] = generation.request.client
        if self._level >= PARAMETERS:
            said["sampling_params"] = _not_default(generation.request.sampling)
        if self._level >= CUT_TEXTS:
            said["prompt"] = self._prompt(generation)
        self._write("received", said)

    def finished(self, generation: Generation, elapsed_s: float) -> None:
        """Without a reason its client left, or the engine has died."""
        reason = {"type": "abort"} if generation.finish is None else generation.finish.to_dict()
        said: dict[str, Any] = {
            "rid": generation.rid,
            "request_id": self._request_ids.pop(generation.rid, ""),
            "prompt_tokens": generation.prompt_tokens,
            "cached_tokens": generation.cached_tokens,
            "completion_tokens": len(generation.output_ids),
            "finish": reason["type"],
            **{name: reason[name] for name in ("matched", "message") if name in reason},
            "latency_s": round(elapsed_s, 6),
        }
        if self._level >= CUT_TEXTS:
            is_text = self._tokenizer is not None
            said["output"] = self._cut(generation.text) if is_text else self._cut(generation.output_ids)
        self._write("finished", said)

    def _prompt(self, generation: Generation) -> str | list[int]:
        ids = generation.request.prompt_ids
        if self._level < WHOLE_TEXTS:
            ids = ids[:SHOWN_CHARS]  # no text that is shown has more tokens than characters
        shown: list[int] = ids.tolist()
        if self._tokenizer is None:
            return shown
        return self._cut(self._tokenizer.decode(shown, skip_special_tokens=False))

    def _cut(self, text: Shown) -> Shown:
        return text if self._level >= WHOLE_TEXTS else text[:SHOWN_CHARS]

    def _write(self, event: str, said: dict[str, Any]) -> None:
        if self._is_json:
            log_object(request_logger, {"event": event, **said})
        else:
            words = " ".join(f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in said.items())
            request_logger.info("request %s: %s", event, words)


def _not_default(sampling: SamplingParams) -> dict[str, Any]:
    """What of it differs from a request that says nothing."""
    given = {item.name: getattr(sampling, item.name) for item in fields(sampling)}
    return {name: _plain(value) for name, value in given.items() if value != getattr(_DEFAULTS, name)}


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, frozenset) else value


# -- the last lines ----------------------------------------------------------------------------------------------------
class LogLine(msgspec.Struct, kw_only=True):
    """seq: its number, from 1 on. at: Unix seconds."""

    seq: int
    at: float
    level: str
    logger: str
    text: str


class LogTail(logging.Handler):
    """Keeps the last lines of this process's log, and none of the secrets it is given.

    Lines come from any thread. The engine's process writes its own lines to standard error, and none here.
    """

    def __init__(self, secrets: Iterable[str] = (), most: int = TAIL_LINES) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(message)s"))
        self._secrets = sorted(filter(None, secrets), key=len, reverse=True)
        self._lines: collections.deque[LogLine] = collections.deque(maxlen=most)
        self.num_lines = 0
        """That there were."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.format(record)
        except Exception:
            self.handleError(record)
            return
        for secret in self._secrets:
            text = text.replace(secret, "***")
        self.num_lines += 1
        if len(text) > TAIL_CHARS:
            text = text[:TAIL_CHARS] + "…"
        line = LogLine(seq=self.num_lines, at=record.created, level=record.levelname, logger=record.name, text=text)
        self._lines.append(line)

    def lines(self, after: int, limit: int) -> list[LogLine]:
        """The last `limit` of those behind the line `after`, oldest first."""
        self.acquire()
        try:
            found = [line for line in self._lines if line.seq > after]
        finally:
            self.release()
        return found[-limit:]

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Lines of the package are kept meanwhile."""
        package = logging.getLogger("mooli")
        package.addHandler(self)
        try:
            yield
        finally:
            package.removeHandler(self)


# -- steps -------------------------------------------------------------------------------------------------------------


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
            step_logger.info(
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
        step_logger.info(
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
