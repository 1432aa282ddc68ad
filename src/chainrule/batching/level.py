"""What is common to all calls of one vmap level: wrapping, falling back to other ways, and writes."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from chainrule.batching.entries import OpEntry, entry_of
from chainrule.batching.fallback import loop_over_samples
from chainrule.batching.tensor import BatchTensor, become_view, make_batched, root_of, wrap_batched, wrap_constant
from chainrule.dispatch import LightMode, again, undispatched, without_handlers
from chainrule.rules.batching import METADATA_INPLACE
from chainrule.rules.batching_base import Batched, any_batched, logical_shape, pad_rank, refuse_lost_write, stands_for_view

_MATMUL = torch.ops.aten.matmul.default
_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd


class Level(LightMode):
    """The ways of a vmap level that ops take out of the common one.

    Attributes:
        size: the batch size.
        fallbacks: the names of the ops that ran by a loop over the samples.
    """

    size: int
    fallbacks: list[str]
    _always_guard: bool

    def outside(self) -> Any:
        """Run a block in the state of torch's dispatcher around the level, but for autocast."""
        raise NotImplementedError

    def _unwrap(self, arg: Any) -> Any:
        if arg.__class__ is BatchTensor:
            return arg.inner if arg.level is self else arg
        if arg.__class__ is list or arg.__class__ is tuple:
            return [self._unwrap(item) for item in arg]
        return arg

    def _fall_back(
        self,
        entry: OpEntry,
        func: Any,
        args: Sequence[Any],
        kwargs: dict[str, Any] | None,
        inner: list[Any],
        named: dict[str, Any],
    ) -> Any:
        """Torch's decomposition of the op into others, and at last a loop over the samples."""
        if entry.data_dependent is not None:
            raise RuntimeError(entry.data_dependent)
        if entry.composite:
            return self._decompose(func, args, kwargs)
        if entry.decomposition is not None:
            with again(self):
                result = entry.decomposition(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        self.fallbacks.append(str(func))
        return self._wrap(loop_over_samples(func, inner, named, self.size))

    def _decompose(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any] | None) -> Any:
        with again(self):
            if func is _MATMUL:  # torch's decomposition in Python is slow, and imports much in its first call
                return func._op_dk(_COMPOSITE, *args, **(kwargs or {}))
            return func.decompose(*args, **(kwargs or {}))

    def _wrap(self, result: Any) -> Any:
        if result.__class__ is Batched:
            return wrap_batched(result, self)
        if isinstance(result, Tensor):
            if result.layout is not torch.strided:
                return result
            return wrap_constant(result, self)
        if isinstance(result, (list, tuple)):
            items = [self._wrap(item) for item in result]
            return items if isinstance(result, list) else tuple(items)
        return result

    def _wrap_view(self, result: Any, func: Any, args: Sequence[Any], inner: list[Any], named: dict[str, Any]) -> Any:
        """Views of a tensor made inside the function: they remember how they were made."""
        parent: BatchTensor = args[0]
        root = root_of(parent)
        if root.views is None:
            root.views = []

        def wrap_one(value: Tensor, output: int | None) -> BatchTensor:
            view = wrap_constant(value, self)
            view.parent = parent
            view.recipe = (func, inner[1:], named, output)
            root.views.append(weakref.ref(view))  # type: ignore[union-attr]
            return view

        if isinstance(result, Tensor):
            return wrap_one(result, None)
        return type(result)(wrap_one(value, output) for output, value in enumerate(result))

    def _run_strategy(self, func: Any, inner: Sequence[Any], named: dict[str, Any]) -> Any:
        """A strategy on unwrapped arguments, without the fallbacks that need wrapped ones."""
        entry = entry_of(func)
        result = NotImplemented
        if not any_batched(*inner, *named.values()):
            return func(*inner, **named)
        if entry.strategy is not None:
            result = entry.strategy(func, inner, named, self.size)
        if result is NotImplemented:
            self.fallbacks.append(str(func))
            result = loop_over_samples(func, inner, named, self.size)
        return result

    def upgrade(self, target: Any, func: Any) -> Batched:
        """`target` as a batched tensor that can be written to, or the error that it cannot."""
        if target.__class__ is not BatchTensor or target.level is not self:
            raise RuntimeError(
                f"vmap: {func}(self, ...) is not possible: it would write a value that differs between samples into "
                f"a tensor of shape {list(target.shape)} that came from outside the vmapped function (or from an "
                "argument with in_dims=None) and has no batch dimension. Pass that tensor as an argument with an "
                "in_dim, make it inside the function, or use the out-of-place version of the op. (If these are the "
                "running statistics of a batch norm in training: use track_running_stats=False, or "
                "replace_all_batch_norm_modules_.)"
            )
        if target.inner.__class__ is not Batched:
            make_batched(target, self.size, self._run_strategy)
        batched: Batched = target.inner
        return batched

    def choose(self, target: Any, parts: Sequence[tuple[Any, tuple[int, ...]]], source: Tensor) -> Any:
        """The views that lead to a part of a tensor of this level, and what is written there.

        Args:
            target: the tensor.
            parts: the view ops, one on the result of the other, and their arguments after the tensor.
            source: what is written.

        Returns:
            The views but the last, the stored tensor of the last, and the source as wide as that; None for what torch has to
            see to, with nothing written.
        """
        if self.below is not None or self._always_guard or self.graphs or not self.size or target.requires_grad:
            return None
        inner: Any = source
        if source.__class__ is BatchTensor:
            if source.level is not self or source.requires_grad:
                return None
            inner = source.inner
        elif source.__class__ is not Tensor:
            return None
        mapped = inner.__class__ is Batched
        stored, value = inner.value if mapped else inner, target.value
        if value.requires_grad or stored.requires_grad or stored.dtype is not value.dtype or stored.device != value.device:
            return None
        if value.__class__ is not Tensor or stored.layout is not torch.strided or stands_for_view(value):
            return None
        with self.outside():
            without_handlers(True)
            if mapped and not target.batched:
                value = self.upgrade(target, "an assignment").value
            batch = int(target.batched)
            views: list[BatchTensor] = []
            for op, args in parts:
                if value is not target.value:
                    views.append(wrap_batched(Batched(value), self) if batch else wrap_constant(value, self))
                value = entry_of(op).fast(value, args[0] + batch, *args[1:])
            rank, wanted = value.dim() - batch, value.shape[batch:]
            if stored.dim() - mapped > rank:
                return None
            if stored.shape[int(mapped) :] == wanted:
                return views, value, source
            try:
                wide = pad_rank(inner, rank).expand(value.shape if mapped else wanted)
            except RuntimeError:  # torch says why
                return None
            return views, value, wrap_batched(Batched(wide), self) if mapped else self._wrap(wide)

    def copy_part(self, part: Tensor, source: Tensor) -> None:
        """Write to the last of those views."""
        with self.outside():
            without_handlers(True)
            part.copy_(source.value if source.__class__ is BatchTensor else source)  # type: ignore[attr-defined]

    def write_part(self, target: Any, parts: Sequence[tuple[Any, tuple[int, ...]]], source: Tensor) -> Any:
        """Both; None, with nothing written, for what torch has to see to."""
        found = self.choose(target, parts, source)
        if found is not None:
            self.copy_part(*found[1:])
        return found

    def _write(
        self,
        entry: OpEntry,
        func: Any,
        args: Sequence[Any],
        kwargs: dict[str, Any] | None,
        inner: list[Any],
        named: dict[str, Any],
        batched: bool,
    ) -> Any:
        """An op that writes to its first argument."""
        if func in METADATA_INPLACE:
            return self._write_metadata(func, args, inner, named)
        if not batched:
            if entry.composite:
                return self._decompose(func, args, kwargs)
            result = func(*inner, **named)
            return args[0] if isinstance(result, Tensor) else result
        if entry.composite:
            return self._decompose(func, args, kwargs)
        first_is_target = func._schema.arguments[0].is_write and isinstance(args[0], Tensor)
        if not first_is_target:
            if entry.strategy is not None:
                return self._wrap(entry.strategy(func, inner, named, self.size))
            if entry.decomposition is not None:
                with again(self):
                    return entry.decomposition(*args, **(kwargs or {}))
            self.fallbacks.append(str(func))
            return self._wrap(loop_over_samples(func, inner, named, self.size))
        inner[0] = self.upgrade(args[0], func)
        refuse_lost_write(func, inner[0].value)
        if entry.strategy is not None:
            entry.strategy(func, inner, named, self.size)
        elif entry.functional is not None:
            given, before = args, inner
            if any([getattr(getattr(item, "value", item), "requires_grad", False) for item in inner]):
                # What torch's autograd keeps of the argument is not written to.
                before = [Batched(inner[0].value.clone()), *inner[1:]]
                given = (self._wrap(before[0]), *args[1:])
            result = self._functional(entry.functional, given, kwargs, before, named)
            if logical_shape(result) != inner[0].shape:
                raise RuntimeError(
                    f"{func}: output with shape {list(inner[0].shape)} doesn't match the broadcast shape "
                    f"{list(logical_shape(result))}"
                )
            inner[0].value.copy_(result.value if result.__class__ is Batched else result)
        else:
            self.fallbacks.append(str(func))
            loop_over_samples(func, inner, named, self.size)
        return args[0]

    def _functional(
        self, func: Any, args: Sequence[Any], kwargs: dict[str, Any] | None, inner: list[Any], named: dict[str, Any]
    ) -> Any:
        """The result of the functional op, unwrapped."""
        entry = entry_of(func)
        if entry.strategy is not None:
            result = entry.strategy(func, inner, named, self.size)
            if result is not NotImplemented:
                return result
        wrapped = self._fall_back(entry, func, args, kwargs, inner, named)
        return self._unwrap(wrapped)

    def _write_metadata(self, func: Any, args: Sequence[Any], inner: list[Any], named: dict[str, Any]) -> Any:
        """``t_``, ``unsqueeze_`` and their like: the op changes the shape of the tensor object itself."""
        target = args[0]
        if target.__class__ is not BatchTensor or target.level is not self:
            func(*inner, **named)
            return target
        view = METADATA_INPLACE[func]
        target.shelf = None
        if target.inner.__class__ is Batched:
            target.inner = self._run_strategy(view, inner, named)
        else:
            become_view(target, view, inner, named, wrap_constant(target.inner, self))
        with undispatched():
            target.as_strided_(
                logical_shape(target.inner),
                target.value.stride()[1:] if target.batched else target.value.stride(),
                target.value.storage_offset(),
            )
        return target

    def _write_out(
        self,
        entry: OpEntry,
        func: Any,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        inner: list[Any],
        named: dict[str, Any],
        batched: bool,
    ) -> Any:
        """An op with ``out=``: the op without it, then a copy."""
        outputs = [kwargs[name] for name in entry.out_names]
        if not batched:
            func(*inner, **named)
        else:
            if entry.functional is None:
                raise RuntimeError(f"vmap: {func} with out= has no form without it; call it without out=")
            kept = {key: value for key, value in kwargs.items() if key not in entry.out_names}
            with again(self):
                results = entry.functional(*args, **kept)
                results = (results,) if isinstance(results, Tensor) else results
                for output, result in zip(outputs, results, strict=True):
                    self._copy_out(output, result, func)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def _copy_out(self, output: Tensor, result: Tensor, func: Any) -> None:
        if output.shape != result.shape:
            if output.numel() or output.__class__ is not BatchTensor:
                raise RuntimeError(
                    f"vmap: {func}: out= has shape {list(output.shape)} but the result has shape {list(result.shape)}"
                )
            value = result.value if isinstance(result, BatchTensor) else result
            output.inner = Batched(value) if isinstance(result, BatchTensor) and result.batched else value
            output.shelf = None
            with undispatched():
                output.resize_(result.shape)
            return
        output.copy_(result)
