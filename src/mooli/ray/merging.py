"""Answers of all replicas as one: of routes by which a server speaks of itself, or is told something.

Owns for which routes all replicas are asked, and how their answers become one. Metrics of each replica stay its own,
with a label `replica`, so that sums and the odd one out can both be seen. Never asks anybody itself.

Source: the Prometheus text exposition format.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import parse_qsl, urlencode

import msgspec

from mooli.ray.forwarding import Forwarded, Whole

_SAMPLE = re.compile(rb"([a-zA-Z_:][\w:]*)(\{)?")


def worst(answers: Sequence[Whole], context: str) -> Whole:
    """For what is told to all: it has been done where all have done it."""
    return max(answers, key=lambda answer: answer.status)


def best(answers: Sequence[Whole], context: str) -> Whole:
    """For what one replica is enough for."""
    return min(answers, key=lambda answer: answer.status)


def metrics(answers: Sequence[Whole], context: str) -> Whole:
    """Families in the order of the first replica, each with the samples of all."""
    families: dict[bytes, tuple[list[bytes], list[bytes]]] = {}
    for answer in answers:
        label = b'replica="%s"' % answer.replica.encode()
        head: list[bytes] = []
        samples: list[bytes] = []
        for line in answer.body.splitlines():
            if line.startswith(b"# HELP "):
                head, samples = families.setdefault(line.split(b" ", 3)[2], ([], []))
            if line.startswith(b"#"):
                if line not in head:
                    head.append(line)
            elif line:
                samples.append(_labelled(line, label))
    body = b"".join(line + b"\n" for head, samples in families.values() for line in (*head, *samples))
    return _with_body(answers[0], body)


def _labelled(line: bytes, label: bytes) -> bytes:
    match = _SAMPLE.match(line)
    if match is None:
        return line
    name, rest = match[1], line[match.end() :]
    if match[2] is None:
        return b"%s{%s}%s" % (name, label, rest)
    return b"%s{%s%s%s" % (name, label, b"" if rest.startswith(b"}") else b",", rest)


def loads(answers: Sequence[Whole], context: str) -> Whole:
    """Each replica is a rank, in the order of their names. context: the rank that was asked for, "" for all."""
    answers = sorted((answer for answer in answers if answer.status == 200), key=lambda answer: answer.replica)
    if not answers[0].body.startswith(b"{"):
        return metrics(answers, context)
    shown = [msgspec.json.decode(answer.body) for answer in answers]
    ranks: list[dict[str, Any]] = []
    for answer, one in zip(answers, shown, strict=True):
        for load in one["loads"]:
            ranks.append({**load, "dp_rank": len(ranks), "replica": answer.replica})
    wanted = [rank for rank in ranks if context in ("", str(rank["dp_rank"]))]
    if not wanted:
        message = f"dp_rank={context[:40]!r}: there are the ranks 0 to {len(ranks) - 1}"
        return _with_body(replace(answers[0], status=400), msgspec.json.encode({"error": {"message": message}}))
    accelerators = sum(one["num_accelerators"] for one in shown)
    return _with_body(answers[0], msgspec.json.encode({**shown[0], "num_accelerators": accelerators, "loads": wanted}))


def older_loads(answers: Sequence[Whole], context: str) -> Whole:
    """Each replica is a rank, in the order of their names."""
    answers = sorted(answers, key=lambda answer: answer.replica)
    loads = [load for answer in answers for load in msgspec.json.decode(answer.body)]
    return _with_body(answers[0], msgspec.json.encode([{**load, "dp_rank": i} for i, load in enumerate(loads)]))


def info(answers: Sequence[Whole], context: str) -> Whole:
    """What the first says of itself, with the states of all."""
    answers = sorted(answers, key=lambda answer: answer.replica)
    shown = [msgspec.json.decode(answer.body) for answer in answers]
    states = [
        {**state, "replica": answer.replica}
        for answer, one in zip(answers, shown, strict=True)
        for state in one["internal_states"]
    ]
    return _with_body(answers[0], msgspec.json.encode({**shown[0], "internal_states": states}))


def lists(name: str) -> Callable[[Sequence[Whole], str], Whole]:
    """Cards of models, each once. name: of the list that holds them."""

    def merge(answers: Sequence[Whole], context: str) -> Whole:
        shown = [msgspec.json.decode(answer.body) for answer in answers]
        cards: dict[str, Any] = {}
        for one in shown:
            for card in one[name]:
                cards.setdefault(str(card.get("id") or card.get("name")), card)
        found = {**shown[0], name: list(cards.values())}
        if "first_id" in found:  # Anthropic's page
            found |= {"first_id": next(iter(cards), None), "last_id": next(reversed(cards), None)}
        return _with_body(answers[0], msgspec.json.encode(found))

    return merge


def _with_body(answer: Whole, body: bytes) -> Whole:
    headers = [(name, value) for name, value in answer.headers if name.lower() != b"content-length"]
    return replace(answer, headers=(*headers, (b"content-length", b"%d" % len(body))), body=body)


@dataclass(frozen=True, slots=True)
class Merger:
    """How the answers to one route become one."""

    path: str
    make: Callable[[Sequence[Whole], str], Whole]
    is_told: bool = False
    """Something is done, and not only shown: then who has not done it counts."""

    def prepare(self, request: Forwarded) -> tuple[Forwarded, str]:
        """The request as replicas get it, and what its answers are to be merged by."""
        if self.make is not loads:
            return request, ""
        query = parse_qsl(request.scope["query_string"].decode("latin-1"), keep_blank_values=True)
        rank = dict(query).get("dp_rank", "")
        rest = urlencode([(name, value) for name, value in query if name != "dp_rank"]).encode()
        return replace(request, scope={**request.scope, "query_string": rest}), rank

    def merge(self, answers: Sequence[Whole], context: str) -> Whole:
        """One answer. Where some replicas refuse, those of the others are merged; where all do, one of theirs is it."""
        good = [answer for answer in answers if answer.status == 200]
        if not good or self.is_told or self.make is best:
            return best(answers, context) if self.make is best else worst(answers, context)
        return self.make(good, context)


MERGERS = {
    merger.path: merger
    for merger in (
        Merger("/metrics", metrics),
        Merger("/v1/loads", loads),
        Merger("/get_load", older_loads),
        *(Merger(path, info) for path in ("/server_info", "/get_server_info")),
        Merger("/v1/models", lists("data")),
        Merger("/api/tags", lists("models")),
        Merger("/api/ps", lists("models")),
        *(Merger(path, worst, is_told=True) for path in ("/flush_cache", "/abort_request")),
        *(
            Merger(path, best)
            for path in ("/health", "/health_generate", "/health/live", "/health/ready", "/ready", "/ping")
        ),
    )
}
"""By path. Every other route is one replica's."""
