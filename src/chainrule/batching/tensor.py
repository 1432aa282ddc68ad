"""`BatchTensor`: what the user's function sees in place of a tensor that carries the batch."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from chainrule.rules.batching_base import Batched
from chainrule.shortcuts import FLOATING
from chainrule.subclasses import known

_make_wrapper = Tensor._make_wrapper_subclass
_make_subclass = Tensor._make_subclass


@known
class BatchTensor(Tensor):
    """A tensor of one vmap level: logical shape outside, a stored tensor inside.

    Attributes:
        inner: a `Batched` (batch at physical dimension 0), or a plain tensor that is the same for all samples.
        level: the `VmapMode` of the level.
        shelf: where the compiled handlers keep it once nobody holds it, to be the next one alike; None if it may be no other.
        parent, recipe: for a view of a tensor made inside the function, what it is a view of and how to
            make it again; used when an in-place write makes the base batched.
        views: on a base, weak references to all its views, in the order of their making.

    """

    # What every such tensor has stands in its own places, which take less time than a dictionary.
    __slots__ = ("inner", "level", "shelf")

    #: To the rules, which know no more of the class.
    is_mapped = True

    inner: Any
    level: Any
    shelf: Any
    parent: BatchTensor | None = None
    recipe: tuple[Any, Sequence[Any], dict[str, Any], int | None] | None = None
    views: list[weakref.ref[BatchTensor]] | None = None

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def value(self) -> Tensor:
        """The stored tensor."""
        inner = self.inner
        return inner.value if inner.__class__ is Batched else inner

    @property
    def batched(self) -> bool:
        """Whether the stored tensor carries the batch dimension (at 0)."""
        return self.inner.__class__ is Batched

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Reached only when the level of a tensor is not active: constants are fine, batched values are not."""
        return func(*_escape(args, func), **_escape(kwargs or {}, func))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        kind = "batched" if self.batched else "unbatched"
        value = self.value
        content = repr(value) if isinstance(value, BatchTensor) else _plain_repr(value)
        return f"BatchTensor({kind}, shape={tuple(self.shape)}, dtype={self.dtype}, value=\n{content}\n)"

    def __format__(self, spec: str) -> str:
        return repr(self) if self.batched else format(self.inner, spec)

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        """The tensor without its graph."""
        found: Tensor = Tensor.data.__get__(self)  # type: ignore[attr-defined]
        return found

    @data.setter
    def data(self, value: Tensor) -> None:
        raise RuntimeError(
            "vmap: .data of a tensor of the mapped function cannot be replaced: it would not be the tensor of the batch. "
            "Use copy_ in its place."
        )

    def tolist(self) -> Any:
        """The values as nested lists; only for a tensor that is the same for all samples."""
        return self._constant("tolist").tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """The values as a numpy array; only for a tensor that is the same for all samples."""
        return self._constant("numpy").numpy(force=force)

    def __array__(self, dtype: Any = None) -> Any:
        return self._constant("numpy").__array__(dtype)  # type: ignore[no-untyped-call]

    def __dlpack__(self, **options: Any) -> Any:
        return self._constant("__dlpack__").__dlpack__(**options)  # type: ignore[no-untyped-call]

    def data_ptr(self) -> int:
        """The address of the stored data.

        Raises:
            RuntimeError: in code that was written for one row, and would take the address for that of its row.
        """
        if self.level.hides_data:
            raise RuntimeError("chainrule: several rows at once have no address of their own")
        return self.value.data_ptr()

    def apply_(self, callable: Any) -> Tensor:  # noqa: A002 - torch's name
        """Refused: what stores the values of all samples has other memory."""
        raise _without_memory("apply_")

    def map_(self, tensor: Any, callable: Any) -> Tensor:  # noqa: A002 - torch's name
        """Refused, as :meth:`apply_`."""
        raise _without_memory("map_")

    def map2_(self, x: Any, y: Any, callable: Any) -> Tensor:  # noqa: A002 - torch's name
        """Refused, as :meth:`apply_`."""
        raise _without_memory("map2_")

    def share_memory_(self) -> Any:
        """Refused: a sample has no memory of its own."""
        raise _without_memory("share_memory_")

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        found = memo[id(self)] = self.clone()
        return found

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise RuntimeError("vmap: a tensor of a vmapped function cannot be pickled; return it from the function")

    def _constant(self, method: str) -> Tensor:
        if self.batched:
            raise RuntimeError(
                f"vmap: .{method}() was called on a tensor that has a different value for each sample. Return the "
                "tensor from the function instead, and convert it outside of vmap."
            )
        inner: Tensor = self.inner
        return inner


def _without_memory(method: str) -> RuntimeError:
    return RuntimeError(
        f"vmap: .{method}() was called on a tensor of a vmapped function, whose samples have no memory of their own. Compute "
        "with torch's functions, or return the tensor from the function and call it outside of vmap."
    )


def _plain_repr(value: Tensor) -> str:
    return repr(value.detach())


def _escape(tree: Any, func: Any) -> Any:
    if isinstance(tree, BatchTensor):
        if tree.batched and tree.level.running:
            raise RuntimeError(
                f"vmap: {func} was called on a mapped tensor where no mode is seen: torch makes tensors of a subclass so "
                "(as_subclass, or a result that a subclass takes for its own). Give the function plain tensors: "
                "x.as_subclass(torch.Tensor)."
            )
        if tree.batched:
            raise RuntimeError(
                f"vmap: {func} was called on a tensor that escaped from its vmap: it was kept (in a closure, a global "
                "or an attribute) after the vmapped function had returned. Return it from the function instead."
            )
        return tree.inner
    if isinstance(tree, (list, tuple)):
        return [_escape(item, func) for item in tree]
    if isinstance(tree, dict):
        return {key: _escape(item, func) for key, item in tree.items()}
    return tree


def wrap_batched(batched: Batched, mode: Any) -> BatchTensor:
    """A tensor of the level `mode` for a batched result. Its strides are those of one sample."""
    value = batched.value
    strided = value.layout is torch.strided
    if strided and value.__class__ is Tensor and value.is_cpu and value.is_contiguous() and not value.storage_offset():
        dtype, sample = value.dtype, value.shape[1:]
        whole: BatchTensor = _make_wrapper(BatchTensor, sample, dtype=dtype)
        if dtype in FLOATING and not value.requires_grad:
            batched.dtype, batched.sample = dtype, sample
        whole.inner = batched
        whole.level = mode
        return whole
    tensor: BatchTensor = _make_wrapper(
        BatchTensor,
        value.shape[1:],
        value.stride()[1:] if strided else None,
        value.storage_offset() if strided else None,
        None,
        value.dtype,
        torch.strided,
        value.device,
    )
    tensor.inner = batched
    tensor.level = mode
    return tensor


def wrap_constant(value: Tensor, mode: Any) -> BatchTensor:
    """A tensor of the level `mode` for a result that is the same for all samples.

    It shares the storage of a plain tensor, so that code in C++ that reads values (``tensor_split``, ``tolist``) works.
    """
    if value.__class__ is Tensor:
        shared: BatchTensor = _make_subclass(BatchTensor, value)
        shared.inner = value
        shared.level = mode
        return shared
    tensor: BatchTensor = _make_wrapper(
        BatchTensor,
        value.shape,
        value.stride(),
        value.storage_offset(),
        None,
        value.dtype,
        torch.strided,
        value.device,
    )
    tensor.inner = value
    tensor.level = mode
    return tensor


def root_of(tensor: BatchTensor) -> BatchTensor:
    """The tensor that `tensor` is a view of, however deep."""
    while tensor.parent is not None:
        tensor = tensor.parent
    return tensor


def make_batched(tensor: BatchTensor, size: int, run: Callable[..., Any]) -> None:
    """Give an unbatched tensor made inside the function its own copy for each sample, its views included.

    Args:
        tensor: the tensor, or a view of it.
        size: the batch size.
        run: ``run(func, args, kwargs)`` applies a view op to arguments that may be `Batched`.

    """
    root = root_of(tensor)
    value: Tensor = root.inner
    shape, strides = value.shape, value.stride()
    # The per-sample strides stay what the function has seen, so that views by stride remain right.
    if 0 in strides or value.is_contiguous():
        copy = value.new_empty((size, *shape))
    else:
        extent = 1 + sum([(length - 1) * stride for length, stride in zip(shape, strides, strict=True)])
        copy = value.new_empty_strided((size, *shape), (max(extent, 1), *strides))
    copy.copy_(value)
    root.inner = Batched(copy)
    for reference in root.views or ():
        view = reference()
        if view is None or view.parent is None or view.recipe is None:
            continue
        func, args, kwargs, output = view.recipe
        result = run(func, [view.parent.inner, *args], kwargs)
        view.inner = result if output is None else result[output]


def become_view(
    target: BatchTensor, view: Any, inner: Sequence[Any], named: dict[str, Any], before: BatchTensor
) -> None:
    """Make an unbatched tensor object a view of what it was; `before` takes its place among the views.

    Args:
        target: the object, written by ``t_`` or its like.
        view: the view op that the write stands for, with arguments `inner` and `named`.
        before: a new tensor object with the old value.

    """
    before.parent, before.recipe, before.views = target.parent, target.recipe, target.views
    root = root_of(before)
    references = root.views if root.views is not None else []
    for position, reference in enumerate(references):
        other = reference()
        if other is target:
            references[position] = weakref.ref(before)
        elif other is not None and other.parent is target:
            other.parent = before
    target.inner = view(*inner, **named)
    target.parent, target.recipe, target.views = before, (view, inner[1:], named, None), None
    references.append(weakref.ref(target))
    root.views = references
