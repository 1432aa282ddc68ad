"""Routes of nests: one call in C from the arguments to the result, where all levels differentiate one tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from chainrule.transforms.arguments import LEAF, PLAIN_ARGUMENT, structure_key
from chainrule.transforms.levels import Chain, Level, is_apart, mark_of
from chainrule.transforms.routes import NEST, Route, route_of

#: What stands for the structures of one tensor as the argument and of one as the output in a key.
_PLAIN_KEYS = structure_key(PLAIN_ARGUMENT), structure_key(LEAF)


def nest_route(
    chain: Chain | None, dims: Any = None, *, count: int | None = None, given: Any = (), kind: int = NEST
) -> Route | None:
    """The route of a nest without mappings inside, whose levels all differentiate one argument; with ``dims`` in a vmap.

    Args:
        chain: the nest.
        dims: the dimensions that the arguments are mapped over.
        count: how many arguments there are, where levels may differentiate all of them; the route is for so many.
        given: what the key of a plan says of tangents that the outermost level reads.
        kind: the kind of route.
    """
    if chain is None or len(chain.levels) > 1 or chain.has_aux is not False:
        return None
    levels = chain.levels[0]
    number = 0 if levels[0].argnums is None else levels[0].argnums
    for level in levels:
        if level.argnums.__class__ is not int if level.argnums is not None else count != 1:
            return None
        if level.argnums is not None and level.argnums != number:
            return None
    places = tuple([(level.key, (number,), level.argnums is not None) for level in levels])

    def extra(slot: int, grad_enabled: bool) -> Any:
        return (places, *_PLAIN_KEYS, (slot,), given, grad_enabled, False)

    respects = len(levels) > 1 or levels[0].respect_no_grad
    return route_of(levels[0].func, levels[0].name, number, kind, extra, respect_no_grad=respects, dims=dims)


#: What a key says of one seed that is as the argument.
_ALIKE = "alike"


def given_key(seeds: Sequence[torch.Tensor], leaves: Sequence[Any]) -> Any:
    """What a key says of seeds."""
    if len(seeds) == len(leaves) == 1 and isinstance(leaves[0], torch.Tensor):
        if seeds[0].shape == leaves[0].shape and seeds[0].dtype == leaves[0].dtype:
            return _ALIKE
    return tuple([(seed.shape, seed.dtype) for seed in seeds])


#: Routes of two levels of any plain function of one tensor.
_SHARED: dict[Any, Route | None] = {}


def shared_route(func: Callable[..., Any], outer: str, kind: int = NEST) -> tuple[Route | None, Callable[..., Any] | None]:
    """The route of a transform of all arguments over one level of a plain function, which the route does not know.

    It is for one argument, with a seed like it where the kind is a nest's.

    Args:
        func: the function that is transformed.
        outer: the key of the transform.
        kind: the kind of route.

    Returns:
        The route and the innermost function; None for both where there is none.
    """
    level = mark_of(func)
    if level.__class__ is not Level or level.has_aux or level.argnums.__class__ is not int or level.argnums:
        return None, None
    inner = level.func
    if mark_of(inner) is not None or is_apart(inner):
        return None, None
    key = level.name, level.key, outer, kind
    if key not in _SHARED:
        given = _ALIKE if kind == NEST else ()
        chain = Chain([[level, Level(func, outer, None, False, level.finish, (outer,))]], [], False)
        route = nest_route(chain, count=1, given=given, kind=kind)
        if len(_SHARED) >= _MOST_SHARED:
            _SHARED.clear()
        _SHARED[key] = None if route is None else route._replace(function=None)
    return _SHARED[key], inner


#: So many of them are kept.
_MOST_SHARED = 256
