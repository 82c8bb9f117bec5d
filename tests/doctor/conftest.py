"""A fake machine for every test that wants one."""

from __future__ import annotations

import pytest
from fake_machine import Machine


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)
