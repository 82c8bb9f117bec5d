"""More than 400 requests that no well-behaved client sends, to a server as users start it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain

import pytest
from http_client import faults
from malformed_http import FAMILIES, Attack, Expected
from server_process import ServerProcess, needs_demo, needs_proc

pytestmark = [needs_demo, needs_proc]

FLAGS = ("--num-threads", "1", "--read-timeout", "10", "--keep-alive-timeout", "10")

CAPITAL = "The capital of France is"


@pytest.fixture(scope="module")
def attacked() -> Iterator[tuple[ServerProcess, list[int]]]:
    """A server, and what it answered to a good request before the first attack."""
    with ServerProcess(*FLAGS) as server:
        yield server, server.generate(CAPITAL)["output_ids"]


def test_there_are_enough_of_them_and_each_has_a_name() -> None:
    attacks = list(chain.from_iterable(family() for family in FAMILIES))
    assert len({attack.name for attack in attacks}) == len(attacks) > 400
    assert sum(attack.expected in (Expected.REFUSED, Expected.FAULT) for attack in attacks) > 300


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_each_is_refused_or_answered_and_the_server_goes_on(
    attacked: tuple[ServerProcess, list[int]], family: Callable[[], Iterator[Attack]]
) -> None:
    server, expected = attacked
    found = faults(list(family()), server.port)
    assert not found, "\n".join(found)
    assert server.generate(CAPITAL)["output_ids"] == expected
    assert "Traceback" not in server.log
