"""More than 500 folders that are no good models: each opens whole or raises a MooliError, at a bounded cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from model_opener import MAX_CPU_S, MAX_MEMORY_MIB
from mutated_models import FAMILIES, Mutation
from open_models import faults


def test_there_are_enough_of_them_and_each_has_a_name() -> None:
    names = [mutation.name for family in FAMILIES for mutation in family()]
    assert len(set(names)) == len(names) > 500


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux' /proc and its limits")
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_each_opens_whole_or_is_refused(family: Callable[[], Iterator[Mutation]], tmp_path: Path) -> None:
    found = faults(list(family()), tmp_path)
    assert not found, "\n".join([f"each may take {MAX_MEMORY_MIB} MiB and {MAX_CPU_S} s", *found])
