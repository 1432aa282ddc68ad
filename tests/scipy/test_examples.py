"""The examples of the documentation and of the docstrings run as they are printed."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest

pytest.importorskip("scipy")

from chainrule.scipy import fitting, integrate, nlp, optimize  # noqa: E402

DOCUMENT = Path(__file__).parents[2] / "docs" / "scipy.md"


def test_document():
    found = doctest.testfile(str(DOCUMENT), module_relative=False, optionflags=doctest.IGNORE_EXCEPTION_DETAIL)
    assert found.attempted > 20 and not found.failed


@pytest.mark.parametrize("module", [fitting, integrate, nlp, optimize])
def test_docstrings(module):
    found = doctest.testmod(module)
    assert found.attempted and not found.failed
