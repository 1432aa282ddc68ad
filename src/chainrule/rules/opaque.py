"""The fallback for ops without a rule: the op's own torch autograd formula, applied to that single op.

The pullback differentiates one call of the op with ``torch.autograd.grad``. The pushforward transposes the pullback,
which is linear in the cotangent; where torch cannot differentiate the op's backward formula, the local Jacobian is built
row by row from pullbacks.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch._ops import OpOverload

from chainrule.maps.staging import Program, Staged
from chainrule.rules.base import Call, Edge, Rule
from chainrule.rules.families import operator_edge

aten = torch.ops.aten


def _copy(input: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    return torch.broadcast_to(source.to(input.dtype), input.shape)


def _slice_scatter(
    input: torch.Tensor, source: torch.Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> torch.Tensor:
    places = torch.arange(input.shape[dim], device=input.device)[start:end:step]
    return torch.index_copy(input, dim, places, source)


def _select_scatter(input: torch.Tensor, source: torch.Tensor, dim: int, index: int) -> torch.Tensor:
    place = torch.full((1,), index % input.shape[dim], dtype=torch.long, device=input.device)
    return torch.index_copy(input, dim, place, source.unsqueeze(dim))


def _complex_to_real(input: torch.Tensor, dims: list[int], normalization: int, size: int) -> torch.Tensor:
    """The inverse transform of the full Hermitian spectrum, of which the op gets one half."""
    last, others = dims[-1], list(dims[:-1])
    if others:
        input = aten._fft_c2c.default(input, others, normalization, False)
    half = input.narrow(last, 0, size // 2 + 1)
    mirrored = torch.conj_physical(half.narrow(last, 1, (size - 1) // 2)).flip([last])
    full = aten._fft_c2c.default(torch.cat([half, mirrored], last), [last], normalization, False)
    return torch.real(full)


#: Ops whose own autograd formula is missing for complex values or cannot be batched, by ops whose formula is not.
SUBSTITUTES: dict[Any, Any] = {
    aten.copy.default: _copy,
    aten.slice_scatter.default: _slice_scatter,
    aten.select_scatter.default: _select_scatter,
    aten._fft_c2r.default: _complex_to_real,
}


def _scalar_overload(call: Call) -> OpOverload | None:
    """The overload for a number, where one was given in place of a tensor: its formula conjugates no hidden tensor."""
    if call.op._overloadname == "Tensor" and len(call.args) == 2 and isinstance(call.args[1], (int, float, complex)):
        return getattr(call.op.overloadpacket, "Scalar", None)
    return None


class _Template:
    """A call with holes where its tensors go."""

    def __init__(self, call: Call) -> None:
        self.op = _scalar_overload(call) or SUBSTITUTES.get(call.op, call.op)
        self.tensors: list[Any] = []
        self.args = tuple(self._dig(call, item) for item in call.args)
        self.kwargs = {name: self._dig(call, item) for name, item in call.kwargs.items()}

    def _dig(self, call: Call, item: Any) -> Any:
        if call.is_slot(item):
            if item not in self.tensors:
                self.tensors.append(item)
            return _Hole(self.tensors.index(item))
        if isinstance(item, tuple):
            return [self._dig(call, element) for element in item]
        return item

    def run(self, tensors: list[torch.Tensor]) -> Any:
        """Call the op with the holes filled."""
        return self.op(*_fill(self.args, tensors), **{n: _fill(i, tensors) for n, i in self.kwargs.items()})


class _Hole:
    def __init__(self, number: int) -> None:
        self.number = number


def _fill(tree: Any, tensors: list[torch.Tensor]) -> Any:
    if isinstance(tree, _Hole):
        return tensors[tree.number]
    if isinstance(tree, (list, tuple)):
        return [_fill(item, tensors) for item in tree]
    return tree


def _strip(tensor: torch.Tensor) -> torch.Tensor:
    """Leave torch's autograd graph while staying the same value for every tape."""
    with torch._C._AutoDispatchBelowAutograd():
        return aten.alias.default(tensor)


def strip_graph(result: torch.Tensor, *sources: Any) -> torch.Tensor:
    """Drop torch's graph from a result unless one of the tensors it came from has one."""
    joined = any(isinstance(t, torch.Tensor) and t.requires_grad for t in sources) and torch.is_grad_enabled()
    return result if joined or not result.requires_grad else _strip(result)


class OpaqueAction:
    """Pullback and pushforward of one op with respect to one of its tensors.

    Args:
        template: the call.
        number: which of its tensors is differentiated.
        output: which of its outputs.
    """

    def __init__(self, template: _Template, number: int, output: int) -> None:
        self.template = template
        self.number = number
        self.output = output

    def _run(self, tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor, bool]:
        """The op's output and the leaf it is differentiated by; whether torch's graph belongs to the caller."""
        joined = any(t.requires_grad for t in tensors) and torch.is_grad_enabled()
        with torch.enable_grad():
            aliases = [t if i != self.number else aten.alias.default(t) for i, t in enumerate(tensors)]
            leaf = aliases[self.number]
            if not leaf.requires_grad:
                leaf.requires_grad_()
            out = self.template.run(aliases)
        return (out if isinstance(out, torch.Tensor) else out[self.output]), leaf, joined

    def pull(self, rows: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        """Cotangents ``(R, *out_shape)`` to cotangents ``(R, *in_shape)``."""
        out, leaf, joined = self._run(tensors)
        with torch.enable_grad():
            pulled = [self._pull_one(out, leaf, row) for row in rows.unbind(0)]
            stacked = torch.stack(pulled) if pulled else rows.new_zeros((0, *leaf.shape))
        return stacked if joined or not stacked.requires_grad else _strip(stacked)

    def _pull_one(self, out: torch.Tensor, leaf: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        if not out.requires_grad:
            return torch.zeros_like(leaf)
        row = row if row.dtype == out.dtype else row.to(out.dtype)
        (pulled,) = torch.autograd.grad(out, leaf, row, retain_graph=True, create_graph=True, allow_unused=True)
        if pulled is None:
            return torch.zeros_like(leaf)
        return pulled.to_dense() if pulled.layout != torch.strided else pulled

    def push(self, rows: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        """Tangents ``(R, *in_shape)`` to tangents ``(R, *out_shape)``."""
        out, leaf, joined = self._run(tensors)
        with torch.enable_grad():
            try:
                pushed = self._push_transposed(out, leaf, rows)
            except (RuntimeError, NotImplementedError):
                pushed = self._push_dense(out, leaf, rows)
        return pushed if joined or not pushed.requires_grad else _strip(pushed)

    def _push_transposed(self, out: torch.Tensor, leaf: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        if not out.requires_grad:
            return rows.new_zeros((rows.shape[0], *out.shape))
        probe = torch.zeros_like(out).requires_grad_()
        pulled = self._pull_one(out, leaf, probe)
        if not pulled.requires_grad:
            raise NotImplementedError("the backward formula is not differentiable")
        pushed = []
        for row in rows.unbind(0):
            (result,) = torch.autograd.grad(
                pulled, probe, row.to(pulled.dtype), retain_graph=True, create_graph=True, allow_unused=True
            )
            pushed.append(torch.zeros_like(out) if result is None else result)
        return torch.stack(pushed) if pushed else rows.new_zeros((0, *out.shape))

    def _push_dense(self, out: torch.Tensor, leaf: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        count = out.numel()
        basis = torch.eye(count, dtype=out.dtype, device=out.device).reshape(count, *out.shape)
        local = torch.stack([self._pull_one(out, leaf, row) for row in basis.unbind(0)])
        if local.is_complex():
            local = local.conj()
        flat = rows.reshape(rows.shape[0], -1).to(local.dtype) @ local.reshape(count, -1).t()
        return flat.reshape(rows.shape[0], *out.shape)


def opaque_edges(call: Call) -> Iterable[Edge]:
    """The edges of a call known only by torch's own formula."""
    template = _Template(call)
    for number, item in enumerate(template.tensors):
        if not call.is_active(item):
            continue
        for output, slot in enumerate(call.outputs):
            if slot < 0 or not _is_float(call.tensor(slot)):
                continue
            action = OpaqueAction(template, number, output)

            def push(c: Call, program: Program, rows: Staged, count: int, a: OpaqueAction = action) -> Staged:
                return program.call(a.push, rows, *[c.stage(program, t) for t in a.template.tensors])

            def pull(c: Call, program: Program, rows: Staged, count: int, a: OpaqueAction = action) -> Staged:
                return program.call(a.pull, rows, *[c.stage(program, t) for t in a.template.tensors])

            size = call.tensor(item).numel() + call.tensor(slot).numel()
            yield operator_edge(call, item, push, pull, (), size, output)


def _is_float(tensor: torch.Tensor) -> bool:
    return tensor.dtype.is_floating_point or tensor.dtype.is_complex


def opaque_rule(op: OpOverload) -> Rule:
    """The fallback rule of ``op``."""
    return Rule("opaque", opaque_edges, reads=True, kind="opaque")


__all__ = ["OpaqueAction", "opaque_edges", "opaque_rule"]
