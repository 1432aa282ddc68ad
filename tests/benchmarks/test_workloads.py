"""Every expression of every workload computes the same thing."""

import pytest
import torch

from benchmarks.__main__ import SECTIONS
from benchmarks.measure import check_agreement
from benchmarks.workload import Workload

#: Rows whose peers take many seconds or gigabytes in float64.
LARGE = {"A4", "A6", "A9", "B4", "B5", "B6", "B8", "B15", "B16", "B16s", "B17", "B18", "B19a", "B19b", "B19c"}

WORKLOADS = [workload for section in SECTIONS for workload in section.WORKLOADS]


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch.func.linearize
@pytest.mark.parametrize(
    "workload",
    [pytest.param(w, id=w.key, marks=[pytest.mark.slow] if w.key in LARGE else []) for w in WORKLOADS],
)
def test_expressions_agree(workload: Workload) -> None:
    check_agreement(workload, "cpu")


@pytest.mark.parametrize("workload", [pytest.param(w, id=w.key) for w in WORKLOADS])
def test_inputs_are_reproducible(workload: Workload) -> None:
    first, second = (workload.tensors(torch.float64, "cpu") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_keys_are_unique() -> None:
    keys = [workload.key for workload in WORKLOADS]
    assert len(set(keys)) == len(keys)
