"""`vmap`: map a function over a batch dimension of its arguments, without a loop."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, _broadcast_to_and_flatten, tree_flatten, tree_map, tree_map_, tree_unflatten

from chainrule.batching.mode import VmapMode
from chainrule.batching.tensor import BatchTensor, wrap_batched
from chainrule.dispatch import entry_point, unasked
from chainrule.execute.accounts import current_ledger
from chainrule.execute.mapped_calls import CALLS
from chainrule.rules.batching_base import Batched
from chainrule.subclasses import refuse_foreign
from chainrule.transforms import merged as levels_as_one
from chainrule.transforms.arguments import check_whole, refuse_inside_torch_func
from chainrule.transforms.assembling import Assembled
from chainrule.transforms.merged import Apart, Merged, merged_inputs
from chainrule.transforms.sparse_batches import join_chunks, moved_batch


def vmap(
    func: Callable[..., Any],
    in_dims: Any = 0,
    out_dims: Any = 0,
    randomness: str = "error",
    *,
    chunk_size: int | None = None,
) -> Callable[..., Any]:
    """Map `func` over one dimension of its arguments.

    ``vmap(func)(x)`` is ``torch.stack([func(sample) for sample in x])``, computed with batched ops. Inside `func` the
    batch dimension is not seen. Transforms nest in any order.

    Args:
        func: takes tensors (in any nesting of tuples, lists and dictionaries) and returns tensors likewise.
        in_dims: for each argument, the dimension to map over, or None to give the argument whole to each sample.
            An int for all arguments, or a tuple whose structure is a prefix of that of the arguments. Keyword
            arguments are given whole to each sample, as in torch.vmap.
        out_dims: where the batch dimension goes in each result; None for a result that is the same for all samples.
        randomness: ``"error"`` (random ops raise), ``"different"`` (each sample has its own draws) or ``"same"``.
        chunk_size: how many samples to run at once; None for all.

    Returns:
        A function with the arguments of `func`, each mapped tensor with one dimension more, and so the results.

    Raises:
        TypeError: `chunk_size` is no int.
        ValueError: `chunk_size` is not positive; when called: `in_dims` or `out_dims` do not fit, or the mapped
            dimensions differ in size.
        RuntimeError: `randomness` is not one of the three; when called: `func` needs a Python value of a mapped
            tensor, has a shape that depends on values, or writes a mapped value into a tensor from outside.

    Example:
        >>> import torch
        >>> from chainrule import vmap
        >>> vmap(torch.dot)(torch.ones(3, 5), torch.ones(3, 5))
        tensor([5., 5., 5.])

    """
    if randomness not in ("error", "different", "same"):
        raise RuntimeError(
            f"vmap: Only allowed values for randomness are 'error', 'different', or 'same'. Got {randomness}"
        )
    check_whole(chunk_size, "vmap", "chunk_size")
    if chunk_size is not None and chunk_size <= 0:
        raise ValueError(f"vmap: chunk_size should be None or greater than 0. (got {chunk_size})")

    if chunk_size is not None:
        return entry_point(_in_chunks(func, in_dims, out_dims, randomness, chunk_size), func)
    return Mapping(func, in_dims, out_dims, randomness, "vmap").wrapper()


class Mapping:
    """One vmap of a function.

    Args:
        func: the function.
        in_dims: as in :func:`vmap`.
        out_dims: as in :func:`vmap`.
        randomness: as in :func:`vmap`.
        name: the transform's name, for messages.

    Attributes:
        owner: the function that carries this mapping, where the mapped function is a transform's.
        made: the mapped function.
        inner: the mapping that this one is directly around, if both may be run as one.
        route: of a mapping of a derivative transform, how it is run as a whole, once that was asked for.
        whole: runs a mapping of a derivative transform as a whole, or returns NotImplemented. A layer above gives it.
    """

    whole: ClassVar[Callable[[Mapping, tuple[Any, ...], dict[str, Any]], Any]]

    __slots__ = ("func", "in_dims", "inner", "made", "name", "out_dims", "owner", "randomness", "route")

    def __init__(self, func: Callable[..., Any], in_dims: Any, out_dims: Any, randomness: str, name: str) -> None:
        self.func = func
        self.in_dims = in_dims
        self.out_dims = out_dims
        self.randomness = randomness
        self.name = name
        self.owner: Callable[[], Any] | None = None
        self.made: Callable[[], Any] | None = None
        self.inner: Mapping | None = None
        self.route: Any = None
        inner: Mapping | None = getattr(func, "_chainrule_mapping", None)
        # Whoever wraps a function copies its attributes.
        if inner is not None and inner.made is not None and inner.made() is func and self._merges() and inner._merges():
            self.inner = inner

    def _merges(self) -> bool:
        return self.out_dims.__class__ is int and self.out_dims == 0 and self.randomness == "error"

    def wrapper(self) -> Callable[..., Any]:
        """The mapped function."""

        def vmapped(*args: Any, **kwargs: Any) -> Any:
            func = self.func
            if self.owner is not None:
                found = Mapping.whole(self, args, kwargs)
                if found is not NotImplemented:
                    return found
            if self.inner is not None and not kwargs:
                found = self._as_one(args)
                if found is not NotImplemented:
                    return found
            return self.leave(*self.enter(functools.partial(func, **kwargs) if kwargs else func, args))

        made = entry_point(vmapped, self.func)
        self.made = weakref.ref(made)
        made._chainrule_mapping = self  # type: ignore[attr-defined]
        if hasattr(self.func, "_chainrule_level"):
            # A nest of transforms goes on through this mapping.
            self.owner = weakref.ref(made)
            made._chainrule_level = self  # type: ignore[attr-defined]
        return made

    def enter(self, call: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, VmapMode]:
        """Call a function on the mapped arguments; returns what it returns, and the level that this belongs to."""
        refuse_inside_torch_func(self.name)
        if self.out_dims.__class__ is not int:
            _check_out_dims(self.out_dims, self.func)
        if (found := _plain_inputs(self.in_dims, args)) is not None:
            return _inside(call, *found, None, self.randomness)
        flat_args, flat_dims, args_spec = _flatten_inputs(self.func, self.in_dims, args, self.name)
        size = _batch_size(self.func, flat_args, flat_dims, self.name)
        return _inside(call, *_batch_first(flat_args, flat_dims), size, args_spec, self.randomness)

    def enter_plain(self, call: Callable[[tuple[Any, ...]], Any], args: tuple[Any, ...]) -> tuple[Any, VmapMode] | None:
        """As :meth:`enter` for code of this package and plain arguments, where no mode is active.

        Elsewhere None, with nothing done.
        """
        refuse_inside_torch_func(self.name)
        found = _plain_inputs(self.in_dims, args)
        if found is None or not found[2]:
            return None
        values, mapped, size = found
        mode = VmapMode(size, self.randomness, CALLS)
        given = tuple([_wrapped(value, mode) if flag else value for value, flag in zip(values, mapped, strict=True)])
        with mode, unasked(mode):
            return call(given), mode

    def _as_one(self, args: tuple[Any, ...]) -> Any:
        """What this mapping and the one inside of it return, by one level; NotImplemented where there have to be two."""
        assert self.inner is not None
        merged = merged_inputs(self.in_dims, self.inner.in_dims, args)
        core = levels_as_one.core_of(self.inner.func)
        known = levels_as_one.lets_merge(core)
        if merged is None or known is False:
            return NotImplemented
        if known is None:
            before = levels_as_one.APART.met
            found = self.leave(*self.enter(self.func, args))
            levels_as_one.note(core, levels_as_one.APART.met == before and not levels_as_one.written(merged.versions))
            return found
        try:
            found = self.inner.run_merged(merged)
        except (Apart, Exception) as error:
            if not isinstance(error, Apart) and not merged.wrote_copies:
                raise
        else:
            if not merged.wrote_copies:
                return found
        # Not as in the calls before: what was done has touched nothing of the user's, and is done again.
        levels_as_one.note(core, False)
        if levels_as_one.written(merged.versions):
            raise RuntimeError(
                f"vmap({_name(self.inner.func)}, ...): the function writes into its arguments, which it did not do in earlier "
                "calls, so that two vmaps around it were run as one; some hold what was written. Another call runs both."
            )
        return NotImplemented

    def run_merged(self, merged: Merged) -> Any:
        """What this mapping and the one around it return."""
        refuse_inside_torch_func(self.name)
        size = merged.sizes[0] * merged.sizes[1]
        outputs, mode = _inside(self.func, merged.values, merged.mapped, size, None, self.randomness, merged=True)
        found = _unwrapped(self.func, outputs, 0, mode)
        if found.__class__ is Tensor:
            return _split(found, merged.sizes)
        return tree_map(lambda leaf: _split(leaf, merged.sizes), found)

    def leave(self, outputs: Any, mode: VmapMode) -> Any:
        """The results outside of the level."""
        return _unwrapped(self.func, outputs, self.out_dims, mode)


def _split(leaf: Tensor, sizes: tuple[int, int]) -> Tensor:
    """A result of two levels that were run as one; sparse ones are left to two."""
    if leaf.layout is not torch.strided:
        raise Apart
    return leaf.unflatten(0, sizes)


def _in_chunks(
    func: Callable[..., Any], in_dims: Any, out_dims: Any, randomness: str, chunk_size: int
) -> Callable[..., Any]:
    def vmapped(*args: Any, **kwargs: Any) -> Any:
        refuse_inside_torch_func("vmap")
        _check_out_dims(out_dims, func)
        flat_args, flat_dims, args_spec = _flatten_inputs(func, in_dims, args, "vmap")
        size = _batch_size(func, flat_args, flat_dims, "vmap")
        call = functools.partial(func, **kwargs) if kwargs else func
        if size > chunk_size:
            return _run_in_chunks(call, (flat_args, flat_dims, args_spec), out_dims, randomness, size, chunk_size)
        return _run(call, flat_args, flat_dims, args_spec, out_dims, randomness, size)

    return vmapped


def per_sample(transformed: Callable[..., Any], in_dims: Any, name: str, *, has_aux: bool = False) -> Callable[..., Any]:
    """``vmap(transformed, in_dims)``, the ``in_dims`` of a transform.

    Args:
        transformed: the function that the transform returns.
        in_dims: as :func:`vmap` takes them.
        name: the transform's name, for messages.
        has_aux: whether the result may hold something else than tensors: that is passed through.
    """
    if not has_aux:
        return Mapping(transformed, in_dims, 0, "error", name).wrapper()

    def with_others(*args: Any, **kwargs: Any) -> Any:
        leaves: list[Any] = []
        spec: TreeSpec | None = None

        def tensors(*inner: Any) -> list[Tensor]:
            nonlocal leaves, spec
            leaves, spec = tree_flatten(transformed(*inner, **kwargs))
            return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

        tensors.__name__ = _name(transformed)
        found = iter(Mapping(tensors, in_dims, 0, "error", name).wrapper()(*args))
        assert spec is not None
        return tree_unflatten([next(found) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)

    return entry_point(with_others, transformed)


def _name(func: Any) -> str:
    if hasattr(func, "__name__"):
        return str(func.__name__)
    if isinstance(func, functools.partial):
        return f"functools.partial({_name(func.func)}, ...)"
    return repr(func)


def _check_out_dims(out_dims: Any, func: Any) -> None:
    if isinstance(out_dims, int):
        return

    def check(leaf: Any) -> None:
        if leaf is not None and not isinstance(leaf, int):
            raise ValueError(
                f"vmap({_name(func)}, ..., out_dims={out_dims}): `out_dims` must be an int, None or a python "
                f"collection of ints representing where in the outputs the vmapped dimension should appear, "
                f"got {leaf!r}."
            )

    tree_map_(check, out_dims)


def _flatten_inputs(
    func: Any, in_dims: Any, args: tuple[Any, ...], name: str
) -> tuple[list[Any], list[int | None], TreeSpec | None]:
    """The arguments as a list, the dimension of each, and their structure (None for plain tensors)."""
    def call() -> str:
        return f"{name}({_name(func)}, in_dims={in_dims}, ...)(<inputs>)"

    if not isinstance(in_dims, (int, tuple)):
        raise ValueError(
            f"{call()}: expected `in_dims` to be int or a (potentially nested) tuple matching the structure of inputs, "
            f"got: {type(in_dims)}."
        )
    if not args:
        raise ValueError(
            f"{name}({_name(func)})(<inputs>): got no inputs. Maybe you forgot to add inputs, or you are trying to vmap "
            "over a function with no inputs. The latter is unsupported."
        )
    if isinstance(in_dims, int) and all(isinstance(arg, Tensor) for arg in args):
        return list(args), [_check_in_dim(call, arg, in_dims) for arg in args], None
    if isinstance(in_dims, tuple) and len(in_dims) == len(args):
        if all(isinstance(a, Tensor) and (d is None or d.__class__ is int) for a, d in zip(args, in_dims, strict=True)):
            checked = [None if d is None else _check_in_dim(call, a, d) for a, d in zip(args, in_dims, strict=True)]
            return list(args), checked, None
    flat_args, spec = tree_flatten(args)
    dims = _broadcast_to_and_flatten(in_dims, spec)
    if dims is None:
        raise ValueError(
            f"{call()}: in_dims is not compatible with the structure of `inputs`. in_dims has structure "
            f"{tree_flatten(in_dims)[1]} but inputs has structure {spec}."
        )
    return flat_args, [_check_in_dim(call, arg, dim) for arg, dim in zip(flat_args, dims, strict=True)], spec


def _check_in_dim(call: Callable[[], str], arg: Any, dim: Any) -> int | None:
    if dim is None:
        return None
    if not isinstance(dim, int):
        raise ValueError(
            f"{call()}: Got in_dim={dim} for an input but in_dim must be either an integer dimension or None."
        )
    if not isinstance(arg, Tensor):
        raise ValueError(
            f"{call()}: Got in_dim={dim} for an input but the input is of type {type(arg)}. We cannot vmap over "
            "non-Tensor arguments, please use None as the respective in_dim"
        )
    rank = arg.dim()
    if not -rank <= dim < rank:
        raise ValueError(
            f"{call()}: Got in_dim={dim} for some input, but that input is a Tensor of dimensionality {rank} so expected "
            f"in_dim to satisfy -{rank} <= in_dim < {rank}."
        )
    return dim % rank


class _Irregular(Exception):  # noqa: N818 - no error
    """Something has to be matched, or is wrong."""


def _plain_inputs(in_dims: Any, args: tuple[Any, ...]) -> tuple[list[Any], list[bool], int] | None:
    """Arguments with their mapped dimension first, which of them are mapped, and the batch size.

    Arguments are tensors, or dictionaries, lists and tuples of tensors with one number for all. None for others, or where
    something is wrong.
    """
    if in_dims.__class__ is int:
        dims: tuple[Any, ...] = (in_dims,) * len(args)
    elif in_dims.__class__ is tuple and len(in_dims) == len(args):
        dims = in_dims
    else:
        return None
    sizes: set[int] = set()
    try:
        values = [arg if dim is None else _moved(arg, dim, sizes) for arg, dim in zip(args, dims, strict=True)]
    except _Irregular:
        return None
    return (values, [dim is not None for dim in dims], sizes.pop()) if len(sizes) == 1 else None


def _moved(tree: Any, dim: Any, sizes: set[int]) -> Any:
    """The tensors of an argument with a dimension first, whose sizes are noted."""
    if isinstance(tree, Tensor):
        rank = tree.dim()
        if dim.__class__ is not int or not -rank <= dim < rank or tree.is_conj() or tree.is_neg():
            raise _Irregular
        if dim:
            tree = tree.movedim(dim, 0)
        sizes.add(tree.shape[0])
        return tree
    kind: Any = tree.__class__
    if kind is dict:
        return {key: _moved(item, dim, sizes) for key, item in tree.items()}
    if kind is list or kind is tuple:
        return kind([_moved(item, dim, sizes) for item in tree])
    raise _Irregular


def _wrapped(tree: Any, mode: VmapMode) -> Any:
    """An argument with the tensors of a level in the place of its own."""
    if isinstance(tree, Tensor):
        if tree.__class__ is not Tensor:
            refuse_foreign(tree, "vmap")
        return wrap_batched(Batched(tree), mode)
    if tree.__class__ is dict:
        return {key: _wrapped(item, mode) for key, item in tree.items()}
    return tree.__class__([_wrapped(item, mode) for item in tree])


def _batch_size(func: Any, flat_args: Sequence[Any], flat_dims: Sequence[int | None], name: str) -> int:
    sizes = [arg.size(dim) for arg, dim in zip(flat_args, flat_dims, strict=True) if dim is not None]
    if not sizes:
        raise ValueError(f"{name}({_name(func)}): Expected at least one Tensor to vmap over, but every in_dim is None")
    if any(size != sizes[0] for size in sizes):
        raise ValueError(
            f"{name}({_name(func)}): Expected all tensors to have the same size in the mapped dimension, got "
            f"sizes {sizes} for the mapped dimension"
        )
    return int(sizes[0])


def _batch_first(flat_args: Sequence[Any], flat_dims: Sequence[int | None]) -> tuple[list[Any], list[bool]]:
    """The arguments with their mapped dimension first, and which of them are mapped."""
    values = []
    for arg, dim in zip(flat_args, flat_dims, strict=True):
        if dim is not None and isinstance(arg, Tensor):
            if arg.is_conj() or arg.is_neg():
                arg = arg.resolve_conj().resolve_neg()
            if dim:
                arg = arg.movedim(dim, 0)
        values.append(arg)
    return values, [dim is not None for dim in flat_dims]


def _run(
    func: Any,
    flat_args: Sequence[Any],
    flat_dims: Sequence[int | None],
    args_spec: TreeSpec | None,
    out_dims: Any,
    randomness: str,
    size: int,
) -> Any:
    outputs, mode = _inside(func, *_batch_first(flat_args, flat_dims), size, args_spec, randomness)
    return _unwrapped(func, outputs, out_dims, mode)


def _inside(
    func: Any,
    values: list[Any],
    mapped: list[bool],
    size: int,
    args_spec: TreeSpec | None,
    randomness: str,
    *,
    merged: bool = False,
) -> tuple[Any, VmapMode]:
    """Run `func` on tensors whose mapped dimension is the first; that of two levels if `merged`."""
    mode = VmapMode(size, randomness, CALLS)
    mode.merged = merged
    args: Any = [_wrapped(value, mode) if flag else value for value, flag in zip(values, mapped, strict=True)]
    if args_spec is not None:
        args = tree_unflatten(args, args_spec)
    with mode:
        outputs = func(*args)
    if mode.fallbacks and (ledger := current_ledger()) is not None:
        ledger.loops.extend(mode.fallbacks)
    return outputs, mode


def _unwrapped(func: Any, outputs: Any, out_dims: Any, mode: VmapMode) -> Any:
    """Results of a level outside of it."""
    if isinstance(outputs, Tensor) and isinstance(out_dims, int):
        if outputs.__class__ is BatchTensor and out_dims == 0 and outputs.level is mode and outputs.batched:
            return outputs.value
        return _unwrap(func, outputs, out_dims, mode)
    flat_outputs, spec = _flatten_outputs(func, outputs, out_dims)
    return tree_unflatten([_unwrap(func, output, dim, mode) for output, dim in flat_outputs], spec)


def _flatten_outputs(func: Any, outputs: Any, out_dims: Any) -> tuple[list[tuple[Any, int | None]], TreeSpec]:
    flat, spec = tree_flatten(outputs)
    if isinstance(outputs, Tensor) and isinstance(out_dims, tuple) and len(out_dims) == 1:
        dims: list[Any] | None = list(out_dims)
    elif isinstance(outputs, Tensor) and not (out_dims is None or isinstance(out_dims, int)):
        dims = None
    else:
        dims = _broadcast_to_and_flatten(out_dims, spec)
    if dims is None:
        raise ValueError(
            f"vmap({_name(func)}, ..., out_dims={out_dims})(<inputs>): out_dims is not compatible with the structure "
            f"of `outputs`. out_dims has structure {tree_flatten(out_dims)[1]} but outputs has structure {spec}."
        )
    return list(zip(flat, dims, strict=True)), spec


def _unwrap(func: Any, output: Any, dim: int | None, mode: VmapMode) -> Any:
    ours = isinstance(output, BatchTensor) and output.level is mode
    if dim is None:
        if ours and output.batched:
            raise ValueError(
                f"vmap({_name(func)}, ...): `{_name(func)}` can not return a BatchedTensor when out_dim is None"
            )
        return output.inner if ours else output
    if not isinstance(output, Tensor):
        raise ValueError(
            f"vmap({_name(func)}, ...): `{_name(func)}` must only return Tensors, got type {type(output)}. "
            "Did you mean to set out_dims= to None for output?"
        )
    rank = output.dim() + 1
    if not -rank <= dim < rank:
        raise IndexError(
            f"vmap({_name(func)}, ..., out_dims={dim}): expected an out_dim in [{-rank}, {rank - 1}] for an output of "
            f"shape {list(output.shape)} and its batch dimension"
        )
    value: Tensor = output.value if ours else output  # type: ignore[attr-defined]
    if not (ours and output.batched):  # type: ignore[attr-defined]
        value = value.unsqueeze(0).expand(mode.size, *value.shape)
    if dim == 0:
        return value
    return value.movedim(0, dim) if value.layout is torch.strided else moved_batch(value, dim % rank)


def _run_in_chunks(
    func: Any, flat: tuple[Any, Any, Any], out_dims: Any, randomness: str, size: int, chunk_size: int
) -> Any:
    flat_args, flat_dims, args_spec = flat
    state = torch.get_rng_state() if randomness == "same" else None
    joined: list[Any] = []
    for start in range(0, size, chunk_size):
        length = min(chunk_size, size - start)
        args = [
            arg if dim is None else arg.narrow(dim, start, length)
            for arg, dim in zip(flat_args, flat_dims, strict=True)
        ]
        if state is not None:
            torch.set_rng_state(state)
        result = _run(func, args, flat_dims, args_spec, out_dims, randomness, length)
        pairs, spec = _flatten_outputs(func, result, out_dims)
        del result
        joined = joined or [_Joined(size, dim) for _, dim in pairs]
        for whole in joined:
            value, _ = pairs.pop(0)
            whole.add(start, value)
            del value
    return tree_unflatten([whole.result() for whole in joined], spec)


class _Joined:
    """A result of the chunks of a batch of `size` samples, whose dimension stands at `dim`; None for one that is no batch."""

    def __init__(self, size: int, dim: int | None) -> None:
        self.dim = dim
        self.dense = None if dim is None else Assembled(size, dim)
        self.chunks: list[Any] = []

    def add(self, start: int, value: Any) -> None:
        """The result of the chunk that begins at `start`."""
        if self.dense is None or value.layout is not torch.strided or self.chunks:
            self.chunks.append(value)
        else:
            self.dense.add(start, value)

    def result(self) -> Any:
        """The results of all chunks as one."""
        if self.dim is None:
            return self.chunks[0]
        return join_chunks(self.chunks, self.dim) if self.chunks else self.dense.result()  # type: ignore[union-attr]
