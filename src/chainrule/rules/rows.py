"""Torch's own kernels for one cotangent: what a gradient of a scalar needs of an op, in one call.

A rule names the structure of an op's local Jacobian, from which everything follows. For the product of a single dense row
with it torch has, for some ops, one kernel that makes a few passes where the structure's parts are a call each. These
kernels serve plans that nothing differentiates or batches further: there, structure is worth more. A few take the samples of a
mapping as their own batch, and serve mapped plans too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from chainrule.calls import mish_backward, silu_backward
from chainrule.maps.linear_map import Row
from chainrule.maps.staging import Program, Staged
from chainrule.norms import batch_norm_backward, layer_norm_backward
from chainrule.rules.base import Call
from chainrule.rules.elementwise_activations import SELU_ALPHA, SELU_SCALE

aten = torch.ops.aten

#: Makes the cotangents of some arguments, by name, from that of the first output.
Kernel = Callable[[Call], dict[str, Callable[[Program, Staged], Staged]]]

_DTYPES = (torch.float32, torch.float64)


def _softmax_like(op: Any) -> Kernel:
    def kernel(call: Call) -> dict[str, Callable[[Program, Staged], Staged]]:
        dim, dtype = call.argument("dim"), call.tensor(call.args[0]).dtype

        def pull(program: Program, row: Staged) -> Staged:
            found: Staged = program.call(op, row, call.stage_output(program), dim, dtype)
            return found

        return {"self": pull} if call.out_shape else {}

    return kernel


def _several(
    call: Call, names: Sequence[str], run: Callable[[Program, Staged, list[bool]], Sequence[Staged]]
) -> dict[str, Callable[[Program, Staged], Staged]]:
    """Cotangents that one kernel makes together: those that are needed, in one call that the plan shares."""
    mask = [call.is_active(call.argument(name)) for name in names]

    def pull(number: int) -> Callable[[Program, Staged], Staged]:
        return lambda program, row: run(program, row, mask)[number]

    return {name: pull(number) for number, name in enumerate(names) if mask[number]}


def _layer_norm(call: Call) -> dict[str, Callable[[Program, Staged], Staged]]:
    shape = [*call.argument("normalized_shape")]
    item, weight, bias = call.args[0], call.argument("weight"), call.argument("bias")

    def run(program: Program, row: Staged, mask: list[bool]) -> Sequence[Staged]:
        x, w, b = (call.stage(program, argument) for argument in (item, weight, bias))
        mean, rate = call.stage_output(program, 1), call.stage_output(program, 2)
        found: Sequence[Staged] = program.call(layer_norm_backward, row, x, shape, mean, rate, w, b, mask)
        return found

    return _several(call, ("input", "weight", "bias"), run)


def _batch_norm(call: Call) -> dict[str, Callable[[Program, Staged], Staged]]:
    if not call.argument("training") or not call.tensor(call.args[0]).is_cpu:
        return {}
    item, weight, eps = call.args[0], call.argument("weight"), call.argument("eps")

    def run(program: Program, row: Staged, mask: list[bool]) -> Sequence[Staged]:
        x, w = call.stage(program, item), call.stage(program, weight)
        mean, rate = call.stage_output(program, 1), call.stage_output(program, 2)
        found: Sequence[Staged] = program.call(batch_norm_backward, row, x, w, mean, rate, eps, mask)
        return found

    return _several(call, ("input", "weight", "bias"), run)


def _nll(call: Call) -> dict[str, Callable[[Program, Staged], Staged]]:
    item, target, weight, reduction, ignored = (call.argument(a.name) for a in call.op._schema.arguments)

    def pull(program: Program, row: Staged) -> Staged:
        x, t, w = (call.stage(program, argument) for argument in (item, target, weight))
        total = call.stage_output(program, 1)
        found: Staged = program.call(aten.nll_loss_backward.default, row, x, t, w, reduction, ignored, total)
        return found

    return {"self": pull}


def _grid_sampler(op: Any) -> Kernel:
    def kernel(call: Call) -> dict[str, Callable[[Program, Staged], Staged]]:
        item, grid, mode, padding, align = call.args[:5]

        def run(program: Program, row: Staged, mask: list[bool]) -> Sequence[Staged]:
            wanted = [*mask, False][:2]
            x, places = call.stage(program, item), call.stage(program, grid)
            found: Sequence[Staged] = program.call(op, row, x, places, mode, padding, align, wanted)
            return found

        return _several(call, ("input",) if mode == 1 else ("input", "grid"), run)

    return kernel


def _of_result(op: Any) -> Kernel:
    """An element-wise op whose derivative is a function of its result."""

    def kernel(call: Call) -> dict[str, Callable[[Program, Staged], Staged]]:
        def pull(program: Program, row: Staged) -> Staged:
            found: Staged = program.call(op, row, call.stage_output(program))
            return found

        return {"self": pull}

    return kernel


def _elu(numbers: Callable[[Call], tuple[float, float, float]]) -> Kernel:
    """One of the ops whose derivative is that of ``elu``, with these numbers."""

    def kernel(call: Call) -> dict[str, Callable[[Program, Staged], Staged]]:
        own = numbers(call)

        def pull(program: Program, row: Staged) -> Staged:
            found: Staged = program.call(aten.elu_backward.default, row, *own, False, call.stage(program, call.args[0]))
            return found

        return {"self": pull}

    return kernel


def _of_argument(op: Any, *names: str) -> Kernel:
    """An element-wise op whose derivative is a function of its argument, and of numbers called ``names``."""

    def kernel(call: Call) -> dict[str, Callable[[Program, Staged], Staged]]:
        numbers = {name: call.argument(name) for name in names}

        def pull(program: Program, row: Staged) -> Staged:
            found: Staged = program.call(op, row, call.stage(program, call.args[0]), **numbers)
            return found

        return {"self": pull}

    return kernel


#: Element by element: these compute the derivative in each call.
POINTWISE: dict[Any, Kernel] = {
    aten.tanh.default: _of_result(aten.tanh_backward.default),
    aten.sigmoid.default: _of_result(aten.sigmoid_backward.default),
    aten.gelu.default: _of_argument(aten.gelu_backward.default, "approximate"),
    aten.silu.default: _of_argument(silu_backward),
    aten.mish.default: _of_argument(mish_backward),
    aten.hardswish.default: _of_argument(aten.hardswish_backward.default),
    aten.softplus.default: _of_argument(aten.softplus_backward.default, "beta", "threshold"),
    aten.elu.default: _elu(lambda call: (call.argument("alpha"), call.argument("scale"), call.argument("input_scale"))),
    aten.celu.default: _elu(lambda call: (call.argument("alpha"), 1.0, 1.0 / call.argument("alpha"))),
    aten.selu.default: _elu(lambda call: (SELU_ALPHA, SELU_SCALE, 1.0)),
}

KERNELS: dict[Any, Kernel] = {
    aten._softmax.default: _softmax_like(aten._softmax_backward_data.default),
    aten._log_softmax.default: _softmax_like(aten._log_softmax_backward_data.default),
    aten.native_layer_norm.default: _layer_norm,
    aten.native_batch_norm.default: _batch_norm,
    aten.nll_loss_forward.default: _nll,
    aten.grid_sampler_2d.default: _grid_sampler(aten.grid_sampler_2d_backward.default),
    aten.grid_sampler_3d.default: _grid_sampler(aten.grid_sampler_3d_backward.default),
    **POINTWISE,
}

#: Those whose structure takes many calls, and whose batch dimension the samples of a mapping join.
MAPPED = frozenset({aten.grid_sampler_2d.default, aten.grid_sampler_3d.default})


def rows_of(call: Call) -> dict[int, Row]:
    """The kernels of a call, by the slot of the argument; none where an argument stands at two places."""
    kernel = KERNELS.get(call.op) if call.workspace.kernels or call.op in MAPPED else None
    if kernel is None or (call.workspace.repeated and call.op in POINTWISE):
        return {}
    used = [item for item in (*call.args, *call.kwargs.values()) if call.is_slot(item)]
    tensors = [call.tensor(item) for item in (*used, call.outputs[0]) if call.is_active(item) or not call.is_slot(item)]
    if len(set(used)) < len(used) or any(t.dtype not in _DTYPES or t.dtype != tensors[0].dtype or not t.numel() for t in tensors):
        return {}
    dtype = call.tensor(call.outputs[0]).dtype
    return {call.argument(name).index: Row(_in_dtype(pull, dtype), call.op.name()) for name, pull in kernel(call).items()}


def _in_dtype(pull: Callable[[Program, Staged], Staged], dtype: torch.dtype) -> Callable[[Program, Staged], Staged]:
    """The same for rows of any dtype: behind a conversion, they have that of what was converted to."""
    return lambda program, row: pull(program, row if row.dtype == dtype else row.to(dtype))


__all__ = ["KERNELS", "rows_of"]
