"""Fixtures of the unit tests: engines with everything real but the model."""

from __future__ import annotations

import time

import pytest
from fake_engine import FakeEngine


@pytest.fixture
def make_engine(monkeypatch):
    make = FakeEngine(monkeypatch)
    yield make
    for engine in make.engines:
        engine.shutdown()


@pytest.fixture
def check_balanced(make_engine):
    """After every test that uses it: nothing runs, and every page is free or in the tree."""
    yield
    engine = make_engine.engines[-1]
    deadline = time.monotonic() + 20
    while engine._loop.call(lambda: make_engine.core.has_work) and time.monotonic() < deadline:
        time.sleep(0.01)
    engine._loop.call(make_engine.core.check)
    stats = engine.get_server_info()["internal_states"][0]
    assert (stats["running"], stats["waiting"], stats["used_pages"]) == (0, 0, 0)
    assert engine._loop.num_open == 0
    assert engine.flush_cache().success
