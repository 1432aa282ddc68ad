"""The fallback for ops without a rule: the op's own torch autograd formula, applied to that single op.

The pullback differentiates one call of the op with ``torch.autograd.grad``. The pushforward transposes the pullback,
which is linear in the cotangent; where torch cannot differentiate the op's backward formula, the local Jacobian is built
row by row from pullbacks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch._ops import OpOverload
from torch.autograd import forward_ad

from chainrule.dispatch import LightMode, _functorch_level, undispatched
from chainrule.maps.staging import Program, Staged
from chainrule.rules.base import Call, Edge, Rule
from chainrule.rules.complex_contractions import CONTRACTIONS
from chainrule.rules.complex_functions import FUNCTIONS
from chainrule.rules.complex_moves import MOVES
from chainrule.rules.complex_parts import PARTS
from chainrule.rules.families import operator_edge
from chainrule.rules.linalg_complex import COMPLEX
from chainrule.rules.recurrent import layer_pullback
from chainrule.subclasses import known

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
        if torch.Tag.pointwise in getattr(self.op, "tags", ()) and any(t.is_complex() for t in tensors):
            # It converts them itself, but torch's formula (of where) forgets to convert the cotangent back.
            tensors = [t.to(t.dtype.to_complex()) if t.dtype.is_floating_point else t for t in tensors]
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


def _strip(tensor: Any) -> Any:
    """Leave torch's autograd graph while staying the same value for every tape."""
    if isinstance(tensor, tuple):
        return tuple(_strip(item) for item in tensor)
    if not tensor.requires_grad:
        return tensor
    with torch._C._AutoDispatchBelowADInplaceOrView():
        return aten.alias.default(tensor)


class _UnknownTensorError(Exception):
    """A tensor of autograd's graph that stands for nothing that a screen has seen."""


@known
class _Twin(torch.Tensor):
    """What autograd sees of a tensor that holds no data of its own (a batched one)."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Never reached inside a screen."""
        raise _UnknownTensorError


def _twin_of(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.__class__ is not torch.Tensor:
        place, kind = tensor.storage_offset(), tensor.dtype
        made: torch.Tensor = torch.Tensor._make_wrapper_subclass(
            _Twin, tensor.shape, tensor.stride(), place, None, kind, torch.strided, tensor.device
        )
        return made
    with torch._C._AutoDispatchBelowADInplaceOrView(), undispatched():
        return aten.alias.default(tensor) if tensor.layout == torch.strided else tensor.clone()


class _Screen(LightMode):
    """Stands between torch's autograd and the modes outside: each sees tensors of its own.

    Autograd works on twins, which carry its graph. The op itself runs on what they stand for, so that a tape outside
    records values without a graph, as if the formula had been written out.
    """

    def __init__(self) -> None:
        super().__init__()
        self._sources: dict[int, torch.Tensor] = {}
        self._twins: dict[int, torch.Tensor] = {}
        self._saved: dict[int, torch.Tensor] = {}
        self._outside = (torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set())

    def twin(self, item: Any) -> Any:
        """What autograd sees of a tensor, or of a list of them."""
        if isinstance(item, (list, tuple)):
            return type(item)(self.twin(element) for element in item)
        if not isinstance(item, torch.Tensor):
            return item
        twin = self._twins.get(id(item))
        if twin is None:
            twin = _twin_of(item)
            self._twins[id(item)] = twin
            self._sources[id(twin)] = item
        return twin

    def source(self, item: Any) -> Any:
        """What a twin, or a list of them, stands for."""
        if isinstance(item, (list, tuple)):
            return type(item)(self.source(element) for element in item)
        if not isinstance(item, torch.Tensor):
            return item
        if item.requires_grad and id(item) in self._saved:
            return self._saved[id(item)]
        source = self._sources.get(id(item))
        if source is None and item.requires_grad:
            raise _UnknownTensorError
        return item if source is None else source

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an op on what its arguments stand for."""
        sources, named = self.source(tuple(args)), {name: self.source(item) for name, item in (kwargs or {}).items()}
        with torch._C._ForceDispatchKeyGuard(*self._outside):
            out = self.twin(func(*sources, **named))
        if func is aten.detach.default:
            # So autograd saves an op's own result, and hands it back: detached, and then made a part of its graph again.
            self._saved[id(out)] = self._saved.get(id(args[0]), sources[0])
        return out

    @contextmanager
    def differentiating(self) -> Iterator[None]:
        """Let autograd see what runs inside, even where it is switched off around it."""
        exclude = self._outside[1] - _AUTOGRAD_KEYS
        with self, torch.enable_grad():
            with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), exclude):
                yield


def _autograd_keys() -> Any:
    before = torch._C._dispatch_tls_local_exclude_set()
    with torch._C._AutoDispatchBelowADInplaceOrView():
        return torch._C._dispatch_tls_local_exclude_set() - before


_AUTOGRAD_KEYS = _autograd_keys()


class _OwnGraph(threading.local):
    """Whether torch's engine is asked for a formula of its own, on a graph that was made for it.

    Attributes:
        asked: whether it is so; no tape is to answer then.
    """

    asked = False


OWN_GRAPH = _OwnGraph()


def own_gradients(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
    """``torch.autograd.grad`` on such a graph."""
    before, OWN_GRAPH.asked = OWN_GRAPH.asked, True
    try:
        return torch.autograd.grad(*args, **kwargs)
    finally:
        OWN_GRAPH.asked = before


def apart(action: Callable[..., Any], *arguments: Any) -> Any:
    """Run an action that differentiates by torch's autograd and returns a tensor or a tuple of them.

    The graph that it makes stays inside. The result, and what tapes record on the way to it, has a graph only where one
    of the arguments brought one along.
    """
    tensors = [item for item in arguments if isinstance(item, torch.Tensor)]
    joined = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if not joined and torch._C._len_torch_dispatch_stack():
        screen = _Screen()
        try:
            with screen.differentiating():
                result = action(*screen.twin(arguments))
            return screen.source(result)
        except _UnknownTensorError:
            pass
    with torch.enable_grad():
        result = action(*arguments)
    return result if joined else _strip(result)


def _is_differentiated(*tensors: torch.Tensor) -> bool:
    """Whether what is computed with tensors may be recorded or differentiated; else torch may take kernels that have none."""
    if torch._C._len_torch_dispatch_stack() or _functorch_level() is not None or forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any([tensor.requires_grad for tensor in tensors])


class OpaqueAction:
    """Pullback and pushforward of one output of an op.

    The pullback gives the cotangents of all tensors that are differentiated at once: they share one run of torch's formula.

    Args:
        template: the call.
        numbers: which of its tensors are differentiated.
        output: which of its outputs.
    """

    def __init__(self, template: _Template, numbers: Sequence[int], output: int) -> None:
        self.template = template
        self.numbers = tuple(numbers)
        self.output = output

    def pull(self, rows: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Cotangents ``(R, *out_shape)`` to cotangents ``(R, *in_shape)`` of each tensor that is differentiated."""
        again = _is_differentiated(rows, *tensors)
        pulled: tuple[torch.Tensor, ...] = apart(self._pull, again, rows, *tensors)
        return pulled

    def push(self, number: int, rows: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        """Tangents ``(R, *in_shape)`` of one tensor to tangents ``(R, *out_shape)``."""
        pushed: torch.Tensor = apart(self._push, number, rows, *tensors)
        return pushed

    def _run(self, tensors: Sequence[torch.Tensor], numbers: Sequence[int]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The op's output and the leaves it is differentiated by."""
        aliases = [aten.alias.default(t) if i in numbers else t for i, t in enumerate(tensors)]
        leaves = [aliases[number] for number in numbers]
        for leaf in leaves:
            if not leaf.requires_grad:
                leaf.requires_grad_()
        out = self.template.run(aliases)
        return (out if isinstance(out, torch.Tensor) else out[self.output]), leaves

    def _pull(self, again: bool, rows: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out, leaves = self._run(tensors, self.numbers)
        pulled = [_pull_one(out, leaves, row, again=again) for row in rows.unbind(0)]
        if not pulled:
            return tuple(rows.new_zeros((0, *leaf.shape)) for leaf in leaves)
        return tuple(torch.stack(found) for found in zip(*pulled, strict=True))

    def _push(self, number: int, rows: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        out, (leaf,) = self._run(tensors, (number,))
        try:
            return self._push_transposed(out, leaf, rows)
        except (RuntimeError, NotImplementedError):
            return self._push_dense(out, leaf, rows)

    def _push_transposed(self, out: torch.Tensor, leaf: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        if not out.requires_grad:
            return rows.new_zeros((rows.shape[0], *out.shape))
        probe = torch.zeros_like(out).requires_grad_()
        (pulled,) = _pull_one(out, [leaf], probe)
        if not pulled.requires_grad:
            raise NotImplementedError("the backward formula is not differentiable")
        pushed = []
        for row in rows.unbind(0):
            (result,) = own_gradients(
                pulled, probe, row.to(pulled.dtype), retain_graph=True, create_graph=True, allow_unused=True
            )
            pushed.append(torch.zeros_like(out) if result is None else result)
        return torch.stack(pushed) if pushed else rows.new_zeros((0, *out.shape))

    def _push_dense(self, out: torch.Tensor, leaf: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        count = out.numel()
        basis = torch.eye(count, dtype=out.dtype, device=out.device).reshape(count, *out.shape)
        local = torch.stack([_pull_one(out, [leaf], row)[0] for row in basis.unbind(0)])
        if local.is_complex():
            local = local.conj()
        flat = rows.reshape(rows.shape[0], -1).to(local.dtype) @ local.reshape(count, -1).t()
        return flat.reshape(rows.shape[0], *out.shape)


def _pull_one(
    out: torch.Tensor, leaves: Sequence[torch.Tensor], row: torch.Tensor, *, again: bool = True
) -> list[torch.Tensor]:
    """The cotangents of the leaves from one of the output; `again` if they are to be differentiated themselves."""
    if not out.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    row = row if row.dtype == out.dtype else row.to(out.dtype)
    pulled = own_gradients(out, leaves, row, retain_graph=True, create_graph=again, allow_unused=True)
    return [
        torch.zeros_like(leaf) if found is None else found.to_dense() if found.layout != torch.strided else found
        for found, leaf in zip(pulled, leaves, strict=True)
    ]


def _has_complex(call: Call) -> bool:
    """Whether a tensor that an op gets or gives is complex."""
    slots = [slot for slot in call.outputs if slot >= 0]
    for item in call.args:
        several = item if isinstance(item, tuple) and not call.is_slot(item) else (item,)
        slots.extend(one.index for one in several if call.is_slot(one))
    return any(call.tensor(slot).is_complex() for slot in slots)


def opaque_edges(call: Call) -> Iterable[Edge]:
    """The edges of a call known only by torch's own formula."""
    tables = (MOVES, PARTS, CONTRACTIONS, FUNCTIONS, COMPLEX)
    known_edges = next((table[call.op] for table in tables if call.op in table), None)
    if known_edges is not None and _has_complex(call) and (edges := known_edges(call)) is not None:
        yield from edges
        return
    template = _Template(call)
    numbers = [number for number, item in enumerate(template.tensors) if call.is_active(item)]
    for output, slot in enumerate(call.outputs):
        if slot < 0 or not _is_float(call.tensor(slot)):
            continue
        action = OpaqueAction(template, numbers, output)
        pullback = PULLBACKS[call.op](call, template.tensors, numbers, output) if call.op in PULLBACKS else None
        for place, number in enumerate(numbers):
            item = template.tensors[number]

            def push(
                c: Call, program: Program, rows: Staged, count: int, a: OpaqueAction = action, n: int = number
            ) -> Staged:
                pushed: Staged = program.call(a.push, n, rows, *[c.stage(program, t) for t in a.template.tensors])
                return pushed

            def pull(
                c: Call, program: Program, rows: Staged, count: int, a: OpaqueAction = action, n: int = place,
                own: Callable[..., Any] | None = pullback,
            ) -> Staged:  # fmt: skip
                if own is not None:
                    given = [c.stage(program, item) for item in c.args if c.is_slot(item)]
                    made = [c.stage_output(program, number) for number in range(len(c.outputs))]
                    found: Staged = program.call(own, rows, *given, *made)[n]
                    return found
                pulled: Staged = program.call(a.pull, rows, *[c.stage(program, t) for t in a.template.tensors])[n]
                return pulled

            size = call.tensor(item).numel() + call.tensor(slot).numel()
            yield operator_edge(call, item, push, pull, (), size, output)


#: Pullbacks of one output, of ops whose torch formula costs much more than what follows from their results.
PULLBACKS: dict[Any, Callable[[Call, Sequence[Any], Sequence[int], int], Callable[..., Any] | None]] = {
    aten.mkldnn_rnn_layer.default: layer_pullback,
}


def _is_float(tensor: torch.Tensor) -> bool:
    return tensor.dtype.is_floating_point or tensor.dtype.is_complex


def opaque_rule(op: OpOverload) -> Rule:
    """The fallback rule of ``op``."""
    return Rule("opaque", opaque_edges, reads=True, kind="opaque")


__all__ = ["OpaqueAction", "apart", "opaque_edges", "opaque_rule"]
