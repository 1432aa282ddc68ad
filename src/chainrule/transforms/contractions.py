"""What the transforms that contract derivatives have in common: their value beside them, and the same for each sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils._pytree import _broadcast_to_and_flatten

from chainrule.dispatch import entry_point
from chainrule.transforms.arguments import Argnums, function_name, resolve_argnums, tree_flatten, tree_unflatten
from chainrule.transforms.graphs import with_graph
from chainrule.transforms.levels import Finish, Level
from chainrule.transforms.trace import Traced
from chainrule.transforms.vmap import per_sample

Run = Callable[[Level, tuple[Any, ...], dict[str, Any]], tuple[Any, Any]]


def contraction(
    func: Callable[..., Any],
    name: str,
    argnums: Argnums,
    finish: Finish,
    run: Run,
    *,
    has_aux: bool,
    return_value: bool,
    in_dims: Any,
    apart: Callable[[Traced], bool] | None = None,
) -> Callable[..., Any]:
    """The function that a transform returns.

    Args:
        func: the user's function.
        name: the transform's name.
        argnums: the positional arguments to differentiate with respect to.
        finish: computes the result from a run.
        run: runs a level.
        has_aux: whether the function returns ``(output, aux)``.
        return_value: whether the function's output is wanted beside the result.
        in_dims: what is mapped over, as ``vmap`` has it; None for no mapping.
        apart: see :class:`~chainrule.transforms.levels.Level`.
    """

    def with_value(traced: Traced, single: bool) -> Any:
        return finish(traced, single), traced.output()

    ending = with_value if return_value else finish
    level = Level(func, name, argnums, has_aux, ending, (name, return_value), apart=apart)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        result, aux = run(level, args, kwargs)
        if return_value:
            result = with_graph(result[0], args, argnums), result[1]
        else:
            result = with_graph(result, args, argnums)
        if not has_aux:
            return result
        return (result[0], (result[1], aux)) if return_value else (result, aux)

    wrapper = entry_point(wrapper, func)
    if not (has_aux and return_value):  # the aux stands elsewhere then
        level.mark(wrapper)
    return wrapper if in_dims is None else per_sample(wrapper, in_dims, name, has_aux=has_aux)


def chosen_primals(primals: Any, argnums: Argnums | None, call: str) -> tuple[tuple[int, ...], bool]:
    """Which positional arguments are differentiated, and whether it is one that stands for itself.

    Args:
        primals: the positional arguments.
        argnums: the user's choice; None for all of them.
        call: the call as messages show it.

    Raises:
        RuntimeError: if the primals are no tuple, or the choice does not fit.
    """
    if not isinstance(primals, tuple):
        raise RuntimeError(
            f"{call}: expected primals to be a tuple, got {type(primals)}. E.g. it should be valid to call f(*primals)."
        )
    if argnums is None:
        return tuple(range(len(primals))), False
    return resolve_argnums(argnums, len(primals), call.partition("(")[0])


def dims_of_primals(func: Callable[..., Any], primals: tuple[Any, ...], in_dims: Any, name: str) -> tuple[Any, ...]:
    """The mapped dimension of each leaf, in the structure of the primals.

    Raises:
        ValueError: if ``in_dims`` does not fit them.
    """
    spec = tree_flatten(primals)[1]
    dims = _broadcast_to_and_flatten(in_dims, spec) if isinstance(in_dims, (int, tuple)) else None
    if dims is None:
        raise ValueError(
            f"{name}({function_name(func)}, in_dims={in_dims}, ...): in_dims is not compatible with the structure of the "
            f"primals, {spec}: expected an int, or a (potentially nested) tuple of ints and None that matches it."
        )
    return tuple(tree_unflatten(dims, spec))


__all__ = ["chosen_primals", "contraction", "dims_of_primals"]
