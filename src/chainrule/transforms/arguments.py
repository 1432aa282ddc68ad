"""Argument conventions shared by the transforms: pytrees, argnums, checks and their messages."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._pytree import TreeSpec

from chainrule.shortcuts import configure
from chainrule.subclasses import refuse_foreign

Argnums = int | Sequence[int]

#: Transforms that torch.func evaluates in forward mode, where an integer input is a ValueError (in reverse mode it is a
#: RuntimeError).
_FORWARD = frozenset({"hessian", "hvp", "jacfwd", "jvp", "linearize"})

_POSITIONS = tuple(((number,), True) for number in range(8))
#: The structure of a tensor.
LEAF = pytree.tree_flatten(0)[1]
_TUPLES = tuple(pytree.tree_flatten((0,) * count)[1] for count in range(9))

_KEYS = {id(spec): number for number, spec in enumerate((LEAF, *_TUPLES))}

#: The structure of one argument that is a tensor.
PLAIN_ARGUMENT = _TUPLES[1]


def tree_flatten(tree: Any) -> tuple[list[Any], TreeSpec]:
    """``torch.utils._pytree.tree_flatten``, without the walk for a tensor and for a short tuple of tensors."""
    if isinstance(tree, torch.Tensor):
        return [tree], LEAF
    if tree.__class__ is tuple and len(tree) < 9:
        for item in tree:
            if not isinstance(item, torch.Tensor):
                break
        else:
            return list(tree), _TUPLES[len(tree)]
    return pytree.tree_flatten(tree)


def leaves_of(tree: Any, spec: TreeSpec) -> list[Any] | None:
    """The leaves of a tree of a known structure; None if it has another one, or is walked no faster than by ``tree_flatten``."""
    if spec is LEAF:
        return [tree] if isinstance(tree, torch.Tensor) else None
    leaves: list[Any] = []
    return leaves if _collected(tree, spec, leaves) else None


def _collected(tree: Any, spec: TreeSpec, leaves: list[Any]) -> bool:
    kind = spec.type
    if kind is None:
        leaves.append(tree)
        return isinstance(tree, torch.Tensor)
    if tree.__class__ is not kind or len(tree) != len(spec._children):
        return False
    items: Any = tree
    if kind is dict:
        if [*tree] != spec.context:
            return False
        items = tree.values()
    elif kind is not tuple and kind is not list:
        return False
    for item, child in zip(items, spec._children, strict=True):
        if child.type is None and isinstance(item, torch.Tensor):
            leaves.append(item)
        elif not _collected(item, child, leaves):
            return False
    return True


def structure_key(spec: TreeSpec) -> Any:
    """What stands for a structure in the key of a plan; cheap to hash for the commonest ones."""
    return _KEYS.get(id(spec), spec)


def is_tuple(spec: TreeSpec) -> bool:
    """Whether a structure is a short tuple of leaves."""
    return any([spec is known for known in _TUPLES])


def tree_unflatten(leaves: list[Any], spec: TreeSpec) -> Any:
    """``torch.utils._pytree.tree_unflatten``, with the same short cuts."""
    if spec is LEAF:
        return leaves[0]
    if len(leaves) < 9 and spec is _TUPLES[len(leaves)]:
        return tuple(leaves)
    if len(leaves) != spec.num_leaves:
        return pytree.tree_unflatten(leaves, spec)  # which says what is wrong
    return _built(iter(leaves), spec)


configure(unflatten=tree_unflatten)


def _built(leaves: Iterator[Any], spec: TreeSpec) -> Any:
    """The tree of a structure, from as many of the leaves as it has."""
    kind = spec.type
    if kind is None:
        return next(leaves)
    if kind is dict:
        return {key: _built(leaves, child) for key, child in zip(spec.context, spec._children, strict=True)}
    if kind is tuple:
        return tuple([_built(leaves, child) for child in spec._children])
    if kind is list:
        return [_built(leaves, child) for child in spec._children]
    return pytree.tree_unflatten([next(leaves) for _ in range(spec.num_leaves)], spec)


def function_name(function: Callable[..., Any]) -> str:
    """A readable name of a user's function (never its repr: that of a partial prints its tensors)."""
    while isinstance(function, partial):
        function = function.func
    return getattr(function, "__name__", None) or type(function).__name__


def refuse_inside_torch_func(transform: str) -> None:
    """Refuse to run inside a torch.func transform: its tensors hide from a tape, and derivatives would be lost silently.

    Raises:
        RuntimeError: if a torch.func transform is active in this thread.
    """
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            f"{transform}: a chainrule transform was called inside a torch.func transform, whose tensors it cannot see "
            "through. Use the chainrule transform of the same name outside as well."
        )


def resolve_argnums(argnums: Argnums, count: int, transform: str) -> tuple[tuple[int, ...], bool]:
    """Normalise ``argnums``.

    Returns:
        The positions, non-negative, and whether a single integer was given (results are then not wrapped in a tuple).

    Raises:
        RuntimeError: if they are of the wrong type, empty, repeated or out of range.
    """
    if argnums.__class__ is int and 0 <= argnums < count:  # type: ignore[operator]
        return _POSITIONS[argnums] if argnums < 8 else ((argnums,), True)  # type: ignore[index, operator, return-value]
    if isinstance(argnums, bool) or not isinstance(argnums, (int, tuple, list)):
        raise RuntimeError(f"{transform}: argnums must be an int or a tuple or list of ints, got: {type(argnums)}")
    single = isinstance(argnums, int)
    positions = (argnums,) if isinstance(argnums, int) else tuple(argnums)
    if not positions:
        raise RuntimeError(f"{transform}: argnums must be non-empty")
    resolved = []
    for number in positions:
        if isinstance(number, bool) or not isinstance(number, int):
            raise RuntimeError(f"{transform}: argnums must hold ints only, got: {type(number)} in {argnums!r}")
        if not -count <= number < count:
            raise RuntimeError(f"{transform}: got argnum={number}, but only {count} positional inputs")
        resolved.append(number % count)
    if len(set(resolved)) != len(resolved):
        raise RuntimeError(f"{transform}: argnums elements must be unique, got {argnums!r}")
    return tuple(resolved), single


def flatten_inputs(tree: Any, transform: str) -> tuple[list[torch.Tensor], TreeSpec]:
    """Flatten differentiated inputs and check that all leaves are floating-point or complex tensors.

    Raises:
        ValueError: if a leaf is not a tensor, or, in a forward transform, has an integer dtype.
        RuntimeError: if a leaf has an integer dtype, in a reverse transform.
    """
    leaves, spec = tree_flatten(tree)
    for leaf in leaves:
        if not isinstance(leaf, torch.Tensor) or not ((dtype := leaf.dtype).is_floating_point or dtype.is_complex):
            break
        if leaf.__class__ is not torch.Tensor:
            refuse_foreign(leaf, transform)
    else:
        return leaves, spec
    for number, leaf in enumerate(leaves):
        if not isinstance(leaf, torch.Tensor):
            raise ValueError(
                f"{transform}: expected every differentiated input to be a Tensor, got {type(leaf)} at flattened position "
                f"{number}"
            )
        if not (leaf.dtype.is_floating_point or leaf.dtype.is_complex):
            raise (ValueError if transform in _FORWARD else RuntimeError)(
                f"{transform}: only Tensors of floating point and complex dtype can be differentiated, got {leaf.dtype} at "
                f"flattened position {number}"
            )
    return leaves, spec


def flatten_outputs(output: Any, transform: str, function: Callable[..., Any]) -> tuple[list[torch.Tensor], TreeSpec]:
    """Flatten the outputs of a function and check that all leaves are tensors.

    Raises:
        RuntimeError: if there is no output, or a leaf is not a tensor.
    """
    if isinstance(output, torch.Tensor):
        return [output], LEAF
    leaves, spec = tree_flatten(output)
    if leaves and all(isinstance(leaf, torch.Tensor) for leaf in leaves):
        return leaves, spec
    name = function_name(function)
    if not leaves or (len(leaves) == 1 and leaves[0] is None):
        raise RuntimeError(f"{transform}({name}): expected {name} to have a non-empty output, got {output!r}")
    for leaf in leaves:
        if not isinstance(leaf, torch.Tensor):
            raise RuntimeError(f"{transform}({name}): expected {name} to return only tensors, got unsupported type {type(leaf)}")
    return leaves, spec


def check_whole(value: Any, transform: str, name: str) -> None:
    """Check that an optional number of rows, columns or samples is a whole one.

    Raises:
        TypeError: if it is neither an int nor None; True and False are none.
    """
    if value is None:
        return
    try:
        if isinstance(value, bool):
            raise TypeError
        operator.index(value)
    except TypeError:
        raise TypeError(f"{transform}: {name} should be an int greater than 0, or None, got {value!r}") from None


def split_aux(output: Any, transform: str, function: Callable[..., Any]) -> tuple[Any, Any]:
    """Take ``(output, aux)`` apart.

    Raises:
        RuntimeError: if the function did not return a pair.
    """
    if not (isinstance(output, tuple) and len(output) == 2):
        name = function_name(function)
        raise RuntimeError(
            f"{transform}({name}): output of {name} should be a tuple (output, aux) if has_aux is True, got {type(output)}"
        )
    return output
