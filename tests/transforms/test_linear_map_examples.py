"""The examples of the documentation of linear maps run as they are printed."""

from __future__ import annotations

import doctest
from pathlib import Path
from types import ModuleType

import pytest

from chainrule.transforms import jacobian_map, linear_map

DOCUMENT = Path(__file__).parents[2] / "docs" / "linear-maps.md"


def test_document() -> None:
    pytest.importorskip("scipy")
    found = doctest.testfile(str(DOCUMENT), module_relative=False)
    assert found.attempted > 20 and not found.failed


@pytest.mark.parametrize("module", [jacobian_map, linear_map])
def test_docstrings(module: ModuleType) -> None:
    pytest.importorskip("scipy")
    found = doctest.testmod(module)
    assert found.attempted and not found.failed
