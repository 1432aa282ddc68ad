"""Section C: scientific computing, and the sparse halves of B15 and B17."""

from __future__ import annotations

import re

from benchmarks import section_c_implicit, section_c_solvers, section_c_sparse
from benchmarks.workload import Workload

_PARTS = (section_c_sparse, section_c_implicit, section_c_solvers)


def _order(workload: Workload) -> tuple[bool, int, str]:
    number = re.sub(r"\D", "", workload.key)
    return workload.key[0] != "C", int(number), workload.key


WORKLOADS: tuple[Workload, ...] = tuple(sorted((w for part in _PARTS for w in part.WORKLOADS), key=_order))

#: The same rows at sizes that every test run can afford.
SMALL: tuple[Workload, ...] = tuple(sorted((w for part in _PARTS for w in part.SMALL), key=_order))
