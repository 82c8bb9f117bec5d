"""Fixtures that give each test every backend."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mooli.backends import create_backend
from mooli.backends.base import Backend
from variants import VARIANTS, Variant, require


@pytest.fixture(scope="session", params=["reference", "cpu", "torch", "ascend"])
def backend_name(request: pytest.FixtureRequest) -> str:
    require(request.param)
    return str(request.param)


@pytest.fixture(scope="session", params=VARIANTS, ids=str)
def variant(request: pytest.FixtureRequest) -> Variant:
    require(request.param.backend)
    return request.param


@pytest.fixture
def backend(variant: Variant) -> Iterator[Backend]:
    """A fresh backend of the variant."""
    made = create_backend(variant.backend, dtype=variant.dtype, quantization=variant.quantization)
    yield made
    made.close()


@pytest.fixture
def float32_backend(backend_name: str) -> Iterator[Backend]:
    made = create_backend(backend_name, dtype="float32")
    yield made
    made.close()
