"""What the documentation shows runs: examples in docstrings, prompts and blocks of code in README and docs."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent.parent
MODULES = sorted(
    ".".join(path.relative_to(HERE / "src").with_suffix("").parts)
    for path in (HERE / "src").rglob("*.py")
    if ">>>" in path.read_text(encoding="utf-8")
)
PAGES = [HERE / "README.md", *sorted((HERE / "docs").glob("*.md"))]
CODE = re.compile(r"```python\n(.*?)```", re.DOTALL)


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name: str) -> None:
    found = doctest.testmod(importlib.import_module(name))
    assert found.attempted and not found.failed


@pytest.mark.parametrize("page", [p for p in PAGES if ">>>" in p.read_text(encoding="utf-8")], ids=lambda page: page.name)
def test_prompts(page: Path) -> None:
    found = doctest.testfile(str(page), module_relative=False, optionflags=doctest.ELLIPSIS, encoding="utf-8")
    assert found.attempted and not found.failed


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page one after another, as a reader would try them."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in CODE.findall(page.read_text(encoding="utf-8")):
        if ">>>" not in block:
            exec(compile(block, page.name, "exec"), names)  # noqa: S102 - our own documentation


PICTURE = re.compile(r"!\[[^\]]*\]\(([^)]+)\)")


@pytest.mark.parametrize("page", [p for p in PAGES if PICTURE.search(p.read_text(encoding="utf-8"))], ids=lambda page: page.name)
def test_pictures_are_there_and_small(page: Path) -> None:
    for name in PICTURE.findall(page.read_text(encoding="utf-8")):
        if not name.startswith("http"):
            assert 1000 < (page.parent / name).stat().st_size < 60_000, name
