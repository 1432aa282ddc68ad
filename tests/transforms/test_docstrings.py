"""The examples in the docstrings of the transforms."""

from __future__ import annotations

import doctest
from types import ModuleType

import pytest

from chainrule.transforms import derivatives, jacobians, products, second_order, taylor, vmap


@pytest.mark.parametrize("module", [derivatives, jacobians, products, second_order, taylor, vmap])
def test_docstrings(module: ModuleType) -> None:
    found = doctest.testmod(module)
    assert found.attempted and not found.failed
