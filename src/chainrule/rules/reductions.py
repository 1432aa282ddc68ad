"""Reductions over dimensions."""

from __future__ import annotations

from typing import Any

import torch

from chainrule.rules.base import Rule
from chainrule.rules.families import linear_reduction, weighted_reduction

aten = torch.ops.aten

_SUM = linear_reduction(lambda call, count: 1.0)
_MEAN = linear_reduction(lambda call, count: 1.0 / count)


def _logsumexp(call: Any, program: Any, spread: Any) -> Any:
    return torch.exp(call.stage(program, call.args[0]) - spread(call.stage_output(program)))


RULES: dict[Any, Rule] = {
    aten.sum.default: _SUM,
    aten.sum.dim_IntList: _SUM,
    aten.mean.default: _MEAN,
    aten.mean.dim: _MEAN,
    aten.logsumexp.default: weighted_reduction(_logsumexp),
}
