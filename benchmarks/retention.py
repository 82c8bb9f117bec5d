"""What a pinned head is worth, and what it costs others: the cache alone, on a made trace, without a model.

    python benchmarks/retention.py [--requests 12000] [--seed 0]

A pool of 4,096 pages of 16 tokens (65,536 tokens), requests one after the other, half a second apart by a clock of the
trace's own:

- a head: one request in 60 begins with the same 6,000 tokens, tools and instructions of a job say, and asks to keep
  them for an hour. LRU forgets them in between;
- chats: 40 conversations at a time, of 12 turns; the next turn is more likely one of a chat that has just had one. A
  turn brings 120 tokens, the model reasons for 400, which the next prompt leaves out, and answers with 150;
- one-off prompts of 4,000 tokens, one request in four: a scan that nobody asks for again.

Printed is which share of the prompt tokens of each kind came from the cache, and the evictions. Lines differ by what
requests ask for, and by the share that may be retained. Two show what a bounded share is for: with `everybody pins` all
requests ask, for the same hour; with `the scan pins` those do, and with the largest weight, that nobody needs again.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mooli.cache.kv_cache import KVCache
from mooli.cache.match_end import MissReason
from mooli.cache.radix_tree import TOKEN_BYTES, token_key
from mooli.cache.turns import Turn
from mooli.types import Pin

NUM_PAGES, PAGE_SIZE = 4096, 16
HEAD_TOKENS, SCAN_TOKENS, SYSTEM_TOKENS = 6000, 4000, 400
USER_TOKENS, REASONING_TOKENS, ANSWER_TOKENS = 120, 400, 150
NUM_CHATS, NUM_TURNS = 40, 12
STEP_NS = 500_000_000
HOUR = Pin(3600.0)

Ids = NDArray[np.int32]


@dataclass(frozen=True)
class Setting:
    """share: that may be retained. pins_head, pins_all, pins_scan: who asks. supersedes: older turns are looked for."""

    name: str
    share: float = 0.0
    pins_head: bool = False
    pins_all: bool = False
    pins_scan: bool = False
    supersedes: bool = False


SETTINGS = (
    Setting("LRU"),
    Setting("LRU, superseded first", supersedes=True),
    Setting("head pinned, share 0.25", 0.25, pins_head=True),
    Setting("head pinned, share 0.25, superseded first", 0.25, pins_head=True, supersedes=True),
    Setting("head pinned, share 0.05", 0.05, pins_head=True, supersedes=True),
    Setting("everybody pins, share 0.25", 0.25, pins_all=True, supersedes=True),
    Setting("everybody pins, share 1", 1.0, pins_all=True, supersedes=True),
    Setting("the scan pins, share 0.25", 0.25, pins_scan=True, supersedes=True),
    Setting("the scan pins, share 1", 1.0, pins_scan=True, supersedes=True),
)


class Trace:
    """One run of a setting: the same requests for the same seed."""

    def __init__(self, setting: Setting, seed: int) -> None:
        self._setting = setting
        self._draw = random.Random(seed)
        self._rng = np.random.default_rng(seed)
        self._now = 0
        self.cache = KVCache(NUM_PAGES, PAGE_SIZE, retention_share=setting.share, clock=lambda: self._now)
        self.prompt_tokens: Counter[str] = Counter()
        self.cached_tokens: Counter[str] = Counter()
        self._head, self._system = self._words(HEAD_TOKENS), self._words(SYSTEM_TOKENS)
        self._chats: list[list[Ids]] = []

    def _words(self, count: int) -> Ids:
        return self._rng.integers(0, 30000, count, dtype=np.int32)

    def run(self, num_requests: int) -> None:
        for index in range(num_requests):
            self._now += STEP_NS
            if index % 60 == 0:
                self._request("head", np.concatenate([self._head, self._words(200)]), 100, self._setting.pins_head)
            elif index % 4 == 1:
                self._request("scan", self._words(SCAN_TOKENS), 50)
            else:
                self._turn()
        self.cache.check([])

    def _turn(self) -> None:
        while len(self._chats) < NUM_CHATS:
            self._chats.append([self._system])
        place = min(int(self._draw.expovariate(0.12)), NUM_CHATS - 1)
        said = self._chats.pop(-1 - place)
        said.append(self._words(USER_TOKENS))
        answer = self._request("chats", np.concatenate(said), REASONING_TOKENS + ANSWER_TOKENS)
        said.append(answer[REASONING_TOKENS:])
        if len(said) < 2 * NUM_TURNS:
            self._chats.append(said)

    def _request(self, kind: str, prompt: Ids, num_output: int, pins_head: bool = False) -> Ids:
        output = self._words(num_output)
        ids = np.concatenate([prompt, output])
        key, prompt_key = token_key(ids), token_key(prompt)
        begun = self.cache.admit("", key, max_matched=len(prompt) - 1, most_tokens=len(ids))
        assert begun is not None
        self.prompt_tokens[kind] += len(prompt)
        self.cached_tokens[kind] += begun.num_matched
        pins: tuple[Pin, ...] = (HOUR,) if self._setting.pins_all else ()
        if pins_head:
            pins = (Pin(3600.0, num_tokens=HEAD_TOKENS),)
        elif kind == "scan" and self._setting.pins_scan:
            pins = (Pin(3600.0, weight=100),)
        has_left = self._setting.supersedes and begun.end.reason is MissReason.DIVERGED
        turn = Turn(prompt_key, pins, diverged_at=begun.end.num_tokens if has_left else None)
        first = begun.held.num_shared * PAGE_SIZE * TOKEN_BYTES
        self.cache.release(begun.held, key[first:], turn)
        return output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=12000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print("| share of prompt tokens found | head | chats | all | pages evicted |")
    print("| --- | --- | --- | --- | --- |")
    for setting in SETTINGS:
        trace = Trace(setting, args.seed)
        trace.run(args.requests)
        found = {kind: trace.cached_tokens[kind] / trace.prompt_tokens[kind] for kind in trace.prompt_tokens}
        in_all = trace.cached_tokens.total() / trace.prompt_tokens.total()
        evicted = trace.cache.num_evicted_pages
        print(f"| {setting.name} | {found['head']:.3f} | {found['chats']:.3f} | {in_all:.3f} | {evicted:,} |")


if __name__ == "__main__":
    main()
