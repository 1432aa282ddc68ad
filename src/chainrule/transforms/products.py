"""Contractions of Jacobians that do not form them: traces, tangent kernels, Gauss-Newton products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from chainrule.transforms.arguments import Argnums, function_name, tree_flatten, tree_unflatten
from chainrule.transforms.by_entries import trace_by_entries, trace_prefers_entries
from chainrule.transforms.contractions import chosen_primals, contraction, dims_of_primals
from chainrule.transforms.derivatives import check_tangents, hvp, pull_back, push_forward
from chainrule.transforms.graphs import with_graph
from chainrule.transforms.hessian_map import hessian_map
from chainrule.transforms.jacobian_map import jacobian_map
from chainrule.transforms.linear_map import ComposedMap
from chainrule.transforms.nest import run_level
from chainrule.transforms.second_order import check_real
from chainrule.transforms.trace import Traced, trace
from chainrule.transforms.vmap import per_sample


def divergence(
    func: Callable[..., Any],
    argnums: Argnums = 0,
    *,
    has_aux: bool = False,
    return_value: bool = False,
    in_dims: Any = None,
) -> Callable[..., Any]:
    """Return a function that computes the divergence of ``func``: the trace of its Jacobian.

    The Jacobian need not be formed: the trace is one contraction of the network of local Jacobians, in the order that
    costs least.

    Args:
        func: a function of real floating-point tensors that returns tensors of the structure and the shapes of what it
            is differentiated with respect to, or ``(output, aux)`` with ``has_aux``.
        argnums: the positional arguments to differentiate with respect to; an int, or a tuple or list of ints, where
            ``func`` returns a tuple with an entry for each.
        has_aux: whether ``func`` returns a pair whose second entry is passed through.
        return_value: whether the output of ``func`` is returned as well: a flow needs both.
        in_dims: the divergence per sample, as ``vmap(divergence(func), in_dims)`` computes it: for each argument the
            dimension to map over, an int or a tuple of ints and None. By default nothing is mapped.

    Returns:
        A function returning the divergence, of shape ``()``; ``(divergence, aux)`` with ``has_aux``, ``(divergence, value)``
        with ``return_value``, ``(divergence, (value, aux))`` with both. With ``in_dims`` the samples stand in the first
        dimension of every tensor.

    Raises:
        RuntimeError: if arguments or outputs cannot be differentiated, are complex, or differ in structure or shape.
        ValueError: if ``in_dims`` does not fit the arguments.

    Example:
        >>> import torch, chainrule
        >>> chainrule.divergence(lambda x: x ** 3)(torch.tensor([1.0, 2.0]))
        tensor(15.)
        >>> field = chainrule.divergence(lambda t, x: t * x, argnums=1, return_value=True, in_dims=(None, 0))
        >>> field(torch.tensor(2.0), torch.ones(3, 2))[0]
        tensor([4., 4., 4.])
    """

    def finish(traced: Traced, single: bool) -> Any:
        check_real(traced, func, "divergence")
        _check_field(traced, func, single)
        pairs = [(o, i) for o, i in zip(traced.out_slots, traced.in_slots, strict=True) if o is not None]
        found = None
        if pairs:
            outputs, inputs = [o for o, _ in pairs], [i for _, i in pairs]
            if trace_prefers_entries(traced):
                found = trace_by_entries(traced)
            else:
                found = traced.run("trace", outputs=outputs, inputs=inputs)["trace"]
        like = traced.out_leaves[0]
        return like.new_zeros(()) if found is None else found.to(like.dtype)

    return contraction(
        func, "divergence", argnums, finish, run_level, has_aux=has_aux, return_value=return_value, in_dims=in_dims,
        apart=trace_prefers_entries,
    )  # fmt: skip


def _check_field(traced: Traced, func: Callable[..., Any], single: bool) -> None:
    label = function_name(func)
    given = tree_unflatten(traced.in_leaves, traced.in_spec)
    spec = tree_flatten(given[0] if single else given)[1]
    if spec is not traced.out_spec and spec != traced.out_spec:
        raise RuntimeError(
            f"divergence({label}): expected {label} to return the structure of its argument, {spec}, got {traced.out_spec}"
        )
    for number, (leaf, out) in enumerate(zip(traced.in_leaves, traced.out_leaves, strict=True)):
        if leaf.shape != out.shape:
            raise RuntimeError(
                f"divergence({label}): expected an output of the shape of its argument, {tuple(leaf.shape)}, got "
                f"{tuple(out.shape)} at flattened position {number}. A divergence per sample is vmap(divergence({label}))."
            )


def ntk(
    func: Callable[..., Any],
    argnums: Argnums = 0,
    *,
    has_aux: bool = False,
    return_value: bool = False,
    in_dims: Any = None,
) -> Callable[..., Any]:
    """Return a function that computes the empirical neural tangent kernel ``J Jᵀ`` of ``func``.

    ``J`` is the Jacobian with respect to all leaves of the chosen arguments, usually a network's parameters. It is not
    formed: each parameter's share is a contraction of the factors of its Jacobian (for a linear layer, the Gram matrix
    of its inputs times that of the signals behind it).

    Args:
        func: a function of real floating-point tensors that returns a tensor, or ``(output, aux)`` with ``has_aux``.
        argnums: the positional arguments to differentiate with respect to; an int, or a tuple or list of ints.
        has_aux: whether ``func`` returns a pair whose second entry is passed through.
        return_value: whether the output of ``func`` is returned as well.
        in_dims: one kernel per sample, as ``vmap(ntk(func), in_dims)`` computes it; see :func:`divergence`. (The kernel
            *between* samples is that of a function that takes all of them.)

    Returns:
        A function returning the kernel, of shape ``(*output.shape, *output.shape)`` and the output's dtype; with value and
        aux as in :func:`divergence`.

    Raises:
        RuntimeError: if arguments or outputs cannot be differentiated, are complex, or ``func`` returns more than one
            tensor.
        ValueError: if ``in_dims`` does not fit the arguments.

    Example:
        >>> import torch, chainrule
        >>> kernel = chainrule.ntk(lambda weight, x: x @ weight)
        >>> kernel(torch.ones(2), torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
        tensor([[1., 1.],
                [1., 2.]])

    Source: Jacot, Gabriel, Hongler, *Neural tangent kernel*, NeurIPS 2018; the contraction of factors: Novak,
    Sohl-Dickstein, Schoenholz, *Fast finite width neural tangent kernel*, ICML 2022.
    """

    def finish(traced: Traced, single: bool) -> Any:
        check_real(traced, func, "ntk")
        label = function_name(func)
        if len(traced.out_leaves) != 1 or not traced.out_spec.is_leaf():
            raise RuntimeError(f"ntk({label}): expected {label} to return one Tensor, got {traced.output()!r}")
        (slot,), (leaf,) = traced.out_slots, traced.out_leaves
        found = None if slot is None else traced.run("gram", outputs=[slot])[slot, slot]
        return leaf.new_zeros((*leaf.shape, *leaf.shape)) if found is None else found.to(leaf.dtype)

    return contraction(func, "ntk", argnums, finish, run_level, has_aux=has_aux, return_value=return_value, in_dims=in_dims)


def ggn(
    func: Callable[..., Any],
    loss: Callable[..., Any],
    primals: Any,
    tangents: Any = None,
    *,
    argnums: Argnums | None = None,
    has_aux: bool = False,
    in_dims: Any = None,
    layout: str | None = None,
    **kwargs: Any,
) -> Any:
    """The product of the generalized Gauss-Newton matrix of ``loss(func(...))`` with a vector: ``Jᵀ H J v``.

    ``J`` is the Jacobian of ``func``, and ``H`` the Hessian of ``loss`` at its output. ``func`` runs once.

    Args:
        func: the model: a function of ``primals`` that returns tensors (any pytree).
        loss: a function of the model's output that returns a scalar tensor.
        primals: a tuple of positional arguments of ``func``; pytrees of floating-point tensors where they are differentiated.
        tangents: a tuple of the structure and shapes of the differentiated primals; that of the primal itself where
            ``argnums`` is an int.
        argnums: which of the primals are differentiated; an int, or a tuple or list of ints; all by default.
        has_aux: whether ``func`` returns ``(output, aux)``.
        in_dims: one product per sample, as under ``vmap``: for each primal (and its tangent) the dimension to map over, an int
            or a tuple of ints and None. By default nothing is mapped.
        layout: ``"operator"`` for the matrix itself as a symmetric :class:`~chainrule.LinearMap` that forms nothing, in place
            of a product; it takes no ``tangents``.
        kwargs: passed to ``func``.

    Returns:
        ``G v`` in the structure of ``tangents`` (a single tree when there is one primal), or the map ``G``; ``(G v, aux)`` or
        ``(G, aux)`` with ``has_aux``.

    Raises:
        RuntimeError: if the loss is not a scalar, or primals and tangents do not match.
        ValueError: if the layout is unknown, is given together with ``tangents`` or ``in_dims``, or ``in_dims`` does not fit.

    Example:
        >>> import torch, chainrule
        >>> x = torch.tensor([1.0, 2.0])
        >>> chainrule.ggn(torch.square, lambda y: (y ** 2).sum(), (x,), (torch.ones(2),))
        tensor([ 8., 32.])
        >>> chainrule.ggn(torch.square, lambda y: (y ** 2).sum(), (x,), layout="operator").diagonal()
        tensor([ 8., 32.])

    Source: Schraudolph, *Fast curvature matrix-vector products for second-order gradient descent*, Neural Computation 14
    (2002).
    """
    where, single = chosen_primals(primals, argnums, "ggn(f, loss, primals, tangents)")
    alone = single or (argnums is None and len(primals) == 1)
    if layout is not None:
        _check_layout(func, layout, tangents, in_dims)
        return _gauss_newton_map(func, loss, primals, where, alone, has_aux, kwargs)
    chosen = tuple([primals[number] for number in where])
    leaves = check_tangents(chosen, (tangents,) if single else tangents, "ggn", "tangents")
    if in_dims is not None:
        dims = dims_of_primals(func, primals, in_dims, "ggn")

        def product(primals: Any, tangents: Any) -> Any:
            return ggn(func, loss, primals, tangents, argnums=argnums, has_aux=has_aux, **kwargs)

        dims_of_tangents = tuple([dims[number] for number in where])
        mapped = per_sample(product, (dims, dims_of_tangents[0] if single else dims_of_tangents), "ggn", has_aux=has_aux)
        return mapped(primals, tangents)
    traced = trace(func, primals, where, kwargs, "ggn", has_aux=has_aux)
    pushed = push_forward(traced, leaves, "ggn", "input")
    cotangents = tree_flatten(hvp(loss, (traced.output(),), (pushed,)))[0]
    active = [number for number, slot in enumerate(traced.out_slots) if slot is not None]
    pulled = pull_back(traced, active, tuple(cotangents[number] for number in active))
    result = with_graph(pulled[0] if alone else pulled, chosen)
    return (result, traced.aux) if has_aux else result


def _check_layout(func: Callable[..., Any], layout: str, tangents: Any, in_dims: Any) -> None:
    label = function_name(func)
    if layout != "operator":
        raise ValueError(f"ggn({label}): layout should be 'operator' or None, got {layout!r}")
    if tangents is not None:
        raise ValueError(f"ggn({label}, layout='operator'): got tangents; the result is a map, multiply it with them")
    if in_dims is not None:
        raise ValueError(f"ggn({label}, layout='operator'): a map for each sample cannot be stacked, leave in_dims out")


def _gauss_newton_map(
    func: Callable[..., Any],
    loss: Callable[..., Any],
    primals: tuple[Any, ...],
    where: tuple[int, ...],
    single: bool,
    has_aux: bool,
    kwargs: dict[str, Any],
) -> Any:
    """``Jᵀ H J`` as a map, and the auxiliary output."""
    jacobian, aux = jacobian_map(func, primals, where[0] if single else where, has_aux, kwargs, "ggn")
    curvature, _ = hessian_map(loss, (jacobian.output,), 0, False, {}, "ggn: the loss")
    found = ComposedMap(jacobian.T, ComposedMap(curvature, jacobian), symmetric=True)
    return (found, aux) if has_aux else found
