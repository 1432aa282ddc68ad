"""Section B: machine learning."""

from __future__ import annotations

import re

from benchmarks import section_b_calls, section_b_curvature, section_b_modules, section_b_networks, section_b_traces
from benchmarks.workload import Workload

_PARTS = (section_b_traces, section_b_curvature, section_b_networks, section_b_calls, section_b_modules)


def _order(workload: Workload) -> tuple[int, str]:
    number = re.sub(r"\D", "", workload.key)
    return int(number), workload.key


WORKLOADS: tuple[Workload, ...] = tuple(sorted((w for part in _PARTS for w in part.WORKLOADS), key=_order))

#: The same rows at sizes that every test run can afford.
SMALL: tuple[Workload, ...] = tuple(sorted((w for part in _PARTS for w in part.SMALL), key=_order))
