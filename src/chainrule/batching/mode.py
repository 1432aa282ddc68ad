"""`VmapMode`: the dispatch mode of one vmap level."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from chainrule.batching import indexing as _indexing  # noqa: F401 - indices with mapped integers are taken there
from chainrule.batching.arguments import Stored, has_graph, has_tensor, refuse_hidden_backward
from chainrule.batching.entries import _ENTRIES, FUNCTIONAL, INPLACE_KIND, OUT, VIEW, OpEntry, entry_of
from chainrule.batching.fallback import loop_over_samples
from chainrule.batching.level import Level
from chainrule.batching.random import drop, run_random
from chainrule.batching.tensor import BatchTensor, wrap_batched
from chainrule.calls import shared_constant
from chainrule.dispatch import DATA_UNDER_VMAP, KNOWS_STATE, again
from chainrule.functions import ASKED, FACTS, QUERIES, REPLAYED, TURNED, Function, methods
from chainrule.rules.batching_base import Batched, any_batched
from chainrule.shortcuts import AUTOCAST_KEYS, Method, Property, configure, use_classes
from chainrule.subclasses import is_foreign

_make_wrapper = Tensor._make_wrapper_subclass
configure(make_wrapper=_make_wrapper, make_subclass=Tensor._make_subclass, choose=Tensor.select, wrap_batched=wrap_batched)
use_classes(BatchTensor, Batched)
if KNOWS_STATE:
    for _name, _function in methods().items():
        setattr(BatchTensor, _name, Method(_function, getattr(Tensor, _name)))
    for _name in REPLAYED:
        setattr(BatchTensor, _name, Method(None, getattr(Tensor, _name)))
    for _name in ("__setitem__", "copy_", "fill_", "zero_", "index_put_"):
        setattr(BatchTensor, _name, Method(None, getattr(Tensor, _name)))
    for _name in QUERIES:
        setattr(BatchTensor, _name, Method(True, getattr(Tensor, _name)))
    for _name in ASKED:
        setattr(BatchTensor, _name, Property(getattr(Tensor, _name), None))
    for _name in TURNED:
        setattr(BatchTensor, _name, Property(getattr(Tensor, _name), getattr(Tensor, _name).__get__))
_ForceDispatchKeyGuard = torch._C._ForceDispatchKeyGuard
_DROPOUT = torch.ops.aten.dropout.default

#: Composite ops whose results are no views.
_PRODUCTS = frozenset({torch.ops.aten.matmul.default, torch.ops.aten.linear.default})
_WITH_GRAPHS = (Tensor, torch.nn.Parameter)

class VmapMode(Level):
    """One active vmap: every op on a `BatchTensor` of this level runs once, on the stored tensors.

    Inside the handler the mode is off, so that the inner ops go to the next outer mode (another vmap, or a tape).

    Args:
        size: the batch size.
        randomness: ``"error"``, ``"different"`` or ``"same"``.
        calls: what knows calls that were made before (see :mod:`chainrule.execute.mapped_calls`), or None.

    Attributes:
        fallbacks: the names of the ops that ran by a loop over the samples.
        merged: whether it does the work of two levels.
        hides_data: whether it stands around code that does not know of it.

    """

    takes_functions = True
    merged = False
    hides_data = False
    maps = True
    reads_data = True
    supports_higher_order_operators = True

    randomness: str
    _calls: Any
    _include: Any
    _exclude: Any
    _nested: bool
    _records: bool
    _always_guard: bool

    def __init__(self, size: int, randomness: str = "error", calls: Any = None) -> None:
        # Modes run below autograd, and below the lazy conjugation of complex tensors. The inner ops must be seen by
        # autograd when an inner tensor requires a gradient, and complex kernels rely on the conjugation.
        # Autocast has acted on the outer op already, so it stays off.
        # With an outer mode, the inner ops pass by autograd too, which splits composite ops before that mode sees them.
        nested = torch._C._len_torch_dispatch_stack() > 0
        # Tangents of torch's own forward mode are carried on by autograd only.
        self._begin_level(size, randomness, calls, nested, nested or size == 0 or forward_ad._current_level >= 0)

    def unwrapped(self, tensor: Any) -> Any:
        """The stored tensor of one of this level."""
        return tensor.value if tensor.__class__ is BatchTensor and tensor.level is self else tensor

    def read_data(self, tensor: Tensor) -> Tensor:
        """The ``data`` of a tensor: there is none of a mapped one that a transform around differentiates."""
        holder, stored = self.holder(tensor)
        if holder is None:
            return tensor.data
        if stored is not tensor:
            raise RuntimeError(DATA_UNDER_VMAP)
        return holder.read_data(tensor)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        entry = _ENTRIES.get(id(func))
        if entry is None:
            entry = entry_of(func)
        if entry.pointwise and not kwargs and not self._always_guard:
            out = self._run_pointwise(entry, args)
            if out is not None:
                return out
        batched = False
        ours = False
        guarded = self._always_guard
        lazy = False
        inner: list[Any] = []
        for arg in args:
            if arg.__class__ is BatchTensor and arg.level is self:
                ours = True
                arg = arg.inner
                if arg.__class__ is Batched:
                    batched = True
                    value = arg.value
                    guarded = guarded or value.requires_grad
                    lazy = lazy or value.is_complex()
                else:
                    guarded = guarded or arg.requires_grad
                    lazy = lazy or arg.is_complex()
            elif isinstance(arg, Tensor):
                guarded = guarded or arg.requires_grad
                lazy = lazy or arg.is_complex()
            elif arg.__class__ is list or arg.__class__ is tuple:
                arg = self._unwrap(arg)
                batched = batched or any_batched(*arg)
                guarded = guarded or has_tensor(arg, has_graph)
                lazy = lazy or has_tensor(arg, Tensor.is_complex)
            inner.append(arg)
        named: dict[str, Any] = {}
        if kwargs:
            named = {key: self._unwrap(value) for key, value in kwargs.items()}
            batched = batched or any_batched(*named.values())
            guarded = guarded or has_tensor(named.values(), has_graph)
            lazy = lazy or has_tensor(named.values(), Tensor.is_complex)
        if entry.aliases:
            # An alias of a tensor from outside is returned as it is: autograd has seen this op above.
            guarded = ours if args and isinstance(args[0], Tensor) else True
            lazy = False
        if guarded or lazy:
            recorded = not guarded and batched and entry.strategy is not None and not entry.random
            if recorded and self._calls is not None and not torch._C._len_torch_dispatch_stack():
                out = self._calls.op(self, entry, args, inner, kwargs, named)
                if out is not NotImplemented:
                    return out
            if self._records and not torch.is_grad_enabled():
                refuse_hidden_backward(func, inner)
            with _ForceDispatchKeyGuard(self._include, self._exclude):
                return self._run(entry, func, args, kwargs, inner, named, batched)
        if batched and entry.strategy is not None and not entry.aliases and not entry.random:
            if self._calls is not None and not torch._C._len_torch_dispatch_stack():
                out = self._calls.op(self, entry, args, inner, kwargs, named)
                if out is not NotImplemented:
                    return out
            result = entry.strategy(func, inner, named, self.size)
            if result.__class__ is Batched:
                return wrap_batched(result, self)
            if result is not NotImplemented:
                return self._wrap(result)
            return self._fall_back(entry, func, args, kwargs, inner, named)
        return self._run(entry, func, args, kwargs, inner, named, batched)

    def _run_pointwise(self, entry: OpEntry, args: Sequence[Any]) -> BatchTensor | None:
        """`align` for the commonest calls, without its bookkeeping; None for any other."""
        first = args[0]
        if first.__class__ is not BatchTensor or first.level is not self:
            return None
        value = first.inner
        if value.__class__ is not Batched:
            return None
        value = value.value
        if value.requires_grad or value.is_complex():
            return None
        if len(args) == 1:
            out = entry.fast(value)
        elif len(args) == 2:
            second = args[1]
            kind = second.__class__
            if kind is float or kind is int:
                # Another mode would not know the constant.
                if entry.numbers and not torch._C._len_torch_dispatch_stack():
                    second = shared_constant(second, value.dtype)
                out = entry.fast(value, second)
            elif kind is BatchTensor and second.level is self and second.inner.__class__ is Batched:
                other = second.inner.value
                if other.dim() != value.dim() or other.dtype is not value.dtype or other.requires_grad:
                    return None
                out = entry.fast(value, other)
            else:
                return None
        else:
            return None
        if not out.is_contiguous():
            return wrap_batched(Batched(out), self)
        tensor: BatchTensor = _make_wrapper(BatchTensor, out.shape[1:], dtype=out.dtype, device=out.device)
        tensor.inner = Batched(out)
        tensor.level = self
        return tensor

    @property
    def running(self) -> bool:
        """Whether the mapped function has not returned yet."""
        return bool(self._entered)

    def take_function(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Replay a call that was made before, where no other mode has to know; otherwise as for every mode."""
        if self._calls is not None and self.below is None and not self._always_guard and func not in FACTS and self._takes(types):
            out = self._calls(self, func, args, kwargs)
            if out is not NotImplemented:
                return out
        return super().take_function(func, types, args, kwargs)

    def replays_calls(self, func: Any, args: tuple[Any, ...]) -> Any:
        """Replay a call that was made before, of a tape that stands on this level and was taken off; else NotImplemented."""
        if self._calls is None or self.below is not None or self._always_guard or self._depth != 1:
            return NotImplemented
        return self._calls(self, func, args, None)

    def run_function(self, function: Function, args: tuple[Any, ...]) -> Any:
        """Run a function that is one op on the stored tensors, where nothing has to be aligned first."""
        first = args[0] if args else None
        if first.__class__ is not BatchTensor or first.level is not self or not function.mapped:
            return NotImplemented
        inner = first.inner
        if inner.__class__ is not Batched or self._always_guard and (not self.size or self.below is None):
            return NotImplemented
        value = inner.value
        dtype = value.dtype
        # A graph of the wrapped tensors: autograd has to see the call on them.
        if dtype.is_complex or (self.graphs and first.requires_grad):
            return NotImplemented
        count = len(args)
        if count == 1:
            if function.fewest != 1:
                return NotImplemented
            stored: tuple[Any, ...] = (value,)
        elif count == 2 and function.numbers and (args[1].__class__ is float or args[1].__class__ is int):
            stored = (value, args[1] if self.below is not None else shared_constant(args[1], dtype))
        elif function.fewest <= count <= function.most:
            others = self._stored_beside(value, args[1:], function)
            if others is None:
                return NotImplemented
            stored = (value, *others)
        else:
            return NotImplemented
        if self.below is not None:
            out = self.below.run_function(function, stored)
            if out is NotImplemented:
                return out
        elif any([item.__class__ in _WITH_GRAPHS and item.requires_grad for item in stored]):
            if self._records and not torch.is_grad_enabled():
                return NotImplemented
            # A graph of the stored tensors, which a tape inside of this mode keeps autograd from.
            with _ForceDispatchKeyGuard(self._include, self._exclude):
                out = function.call(*stored)
        else:
            out = function.call(*stored)
        if out.__class__ is not Tensor or not out.is_contiguous():
            return wrap_batched(Batched(out), self)
        if out.is_cpu:
            tensor: BatchTensor = _make_wrapper(BatchTensor, out.shape[1:], dtype=out.dtype)
        else:
            tensor = _make_wrapper(BatchTensor, out.shape[1:], dtype=out.dtype, device=out.device)
        tensor.inner = Batched(out)
        tensor.level = self
        return tensor

    def run_op(self, op: Any, args: tuple[Any, ...], named: tuple[tuple[str, Any], ...] = ()) -> Any:
        """Run an op on the stored tensors by its strategy, where no other mode and no autograd has to see it."""
        if named:
            return NotImplemented
        entry = _ENTRIES.get(id(op)) or entry_of(op)
        strategy = entry.strategy
        if op is _DROPOUT and self.below is None and not (self._always_guard or self.graphs):
            out = drop(self, *args) if len(args) == 3 else NotImplemented
            if out is not NotImplemented:
                return out
        if strategy is None or entry.random or self._always_guard or self.graphs:
            return NotImplemented
        stored = Stored(self)
        inner: list[Any] = []
        for arg in args:
            if isinstance(arg, Tensor):
                arg = stored.take(arg)
            elif arg.__class__ is list and arg and isinstance(arg[0], Tensor):
                arg = [stored.take(item) if isinstance(item, Tensor) else item for item in arg]
            inner.append(arg)
        if stored.refused or (stored.lazy and (self.below is not None or entry.kind == INPLACE_KIND)):
            return NotImplemented
        batched, joined = stored.batched, stored.joined
        if joined and self._records and not torch.is_grad_enabled():
            return NotImplemented
        if not batched and not joined and self.below is None and (not entry.composite or op in _PRODUCTS):
            return self._run_constant(op, entry, args, inner, lazy=stored.lazy)
        if not batched:
            if not joined or entry.aliases or self.below is not None:
                return NotImplemented
            # Constants with a graph: autograd is to see the stored tensors alone, not those that stand for them as well.
            with _ForceDispatchKeyGuard(self._include, self._exclude):
                return self._wrap(op._op(*inner))
        if entry.kind == INPLACE_KIND:
            if joined or entry.composite:
                return NotImplemented
            if inner[0].__class__ is Batched:
                strategy(op, inner, {}, self.size)
                return args[0]
            if self.below is not None or args[0].__class__ is not BatchTensor or not op._schema.arguments[0].is_write:
                return NotImplemented
            with _ForceDispatchKeyGuard(self._include, self._exclude):  # autograd has to see the views of the target
                inner[0] = self.upgrade(args[0], op)
                strategy(op, inner, {}, self.size)
            return args[0]
        if self._calls is not None and self.below is None:
            out = self._calls.op(self, entry, args, inner)
            if out is not NotImplemented:
                return out
        if entry.aliases or joined or stored.lazy:
            # Autograd has to see views: a write through one is a write to the other.
            with _ForceDispatchKeyGuard(self._include, self._exclude):
                result = strategy(op, inner, {}, self.size)
        else:
            result = strategy(op, inner, {}, self.size)
        if result.__class__ is Batched:
            return wrap_batched(result, self)
        return result if result is NotImplemented else self._wrap(result)

    def _run_constant(self, op: Any, entry: OpEntry, args: tuple[Any, ...], inner: list[Any], *, lazy: bool) -> Any:
        """Run an op of tensors that are the same for all samples and have no graph, where no other mode has to see it."""
        if entry.kind == FUNCTIONAL:
            with _ForceDispatchKeyGuard(self._include, self._exclude) if lazy else nullcontext():
                return self._wrap(op._op(*inner))
        if entry.kind != VIEW or not args:
            return NotImplemented
        with _ForceDispatchKeyGuard(self._include, self._exclude):  # autograd has to see views
            result = op._op(*inner)
        if args[0].__class__ is BatchTensor:
            return self._wrap_view(result, op, args, inner, {})
        return result

    def _stored_beside(self, value: Tensor, items: tuple[Any, ...], function: Function) -> list[Any] | None:
        """The other arguments of a function as they stand beside the stored tensor of the first; None for its own way."""
        found: list[Any] = []
        for item in items:
            kind = item.__class__
            if kind is float or kind is int:
                if function.number_op is None:
                    return None
                found.append(item)
                continue
            if kind is BatchTensor:
                if item.requires_grad or item.level is not self:
                    return None
                item = item.inner
            elif not isinstance(item, Tensor) or (kind is not Tensor and is_foreign(kind)):
                return None
            batched = item.__class__ is Batched
            if batched:
                item = item.value
            if item.dtype is not value.dtype:
                return None
            if function.pointwise:
                # Element by element: one without the batch broadcasts against the last dimensions.
                fits = item.dim() == value.dim() if batched else item.dim() < value.dim()
            else:
                # A product along the last dimension has the batch before all others; a sparse matrix multiplies no stack.
                matrix = bool(found) or (item.dim() == 2 and item.layout is torch.strided)
                fits = not batched and value.dim() > 1 and matrix
            if not fits:
                return None
            found.append(item)
        return found

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Run this level inside of modes that were pushed after it was made: they then see its inner ops."""
        with self._moved(), again(self):
            yield

    @contextmanager
    def resumed(self, *, guarded: bool = False) -> Iterator[None]:
        """Go on in this level, which was left, wherever that is now.

        Args:
            guarded: whether another mode has to see all calls on the stored tensors.
        """
        before = self._always_guard
        self._always_guard = before or guarded
        try:
            with self._moved(), self:
                yield
        finally:
            self._always_guard = before

    @contextmanager
    def _moved(self) -> Iterator[None]:
        before = self._include, self._exclude
        self._include = torch._C._dispatch_tls_local_include_set()
        self._exclude = torch._C._dispatch_tls_local_exclude_set() | AUTOCAST_KEYS
        try:
            yield
        finally:
            self._include, self._exclude = before

    def outside(self) -> Any:
        """Run a block in the state of torch's dispatcher around the level, but for autocast."""
        return _ForceDispatchKeyGuard(self._include, self._exclude)

    def wrapped(self, result: Any) -> Any:
        """What a strategy returns as tensors of this level."""
        return self._wrap(result)

    def _run(
        self,
        entry: OpEntry,
        func: Any,
        args: Sequence[Any],
        kwargs: dict[str, Any] | None,
        inner: list[Any],
        named: dict[str, Any],
        batched: bool,
    ) -> Any:
        """Every call but the plain functional one, which the handler does itself."""
        if entry.random and not entry.composite:
            result = run_random(self, entry, func, args, inner, named, batched)
            if result is not NotImplemented:
                return result
        if entry.kind == INPLACE_KIND:
            return self._write(entry, func, args, kwargs, inner, named, batched)
        if entry.kind == OUT:
            return self._write_out(entry, func, args, kwargs or {}, inner, named, batched)
        if not batched:
            if entry.composite:
                return self._decompose(func, args, kwargs)
            result = func(*inner, **named)
            if entry.kind == VIEW:
                source = args[0] if args else None
                if source.__class__ is not BatchTensor or source.level is not self:
                    return result
                return self._wrap_view(result, func, args, inner, named)
            return self._wrap(result)
        if entry.strategy is not None:
            try:
                result = entry.strategy(func, inner, named, self.size)
            except RuntimeError:
                if self.size:
                    raise
                # Some kernels refuse a batch of nothing: the shapes are those of a sample.
                result = loop_over_samples(func, inner, named, 0)
            if result is not NotImplemented:
                return self._wrap(result)
        return self._fall_back(entry, func, args, kwargs, inner, named)


configure(vmap_mode=VmapMode)
