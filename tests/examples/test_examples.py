"""Every example runs at its small size, its checks hold, and it draws its picture."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")

ROOT = Path(__file__).parents[2]
NOT_AN_EXAMPLE = {"build_notebook", "support", "tour"}  # the tour has its own make target
EXAMPLES = sorted(path for path in (ROOT / "examples").glob("*.py") if path.stem not in NOT_AN_EXAMPLE)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example(example, tmp_path, record_property):
    picture = tmp_path / "picture.svg"
    command = [sys.executable, "-W", "error::UserWarning:__main__", str(example), "--small", "--picture", str(picture)]
    environment = os.environ | {"MPLBACKEND": "agg", "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)
    record_property("checks", done.stdout)  # the summary prints them (tests/conftest.py)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[ok]" in done.stdout and "FAILED" not in done.stdout
    assert picture.stat().st_size > 1000
