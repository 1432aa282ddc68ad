"""Contractions of Jacobians that do not form them: traces, tangent kernels, Gauss-Newton products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from chainrule.dispatch import entry_point
from chainrule.transforms.arguments import Argnums, function_name, tree_flatten, tree_unflatten
from chainrule.transforms.derivatives import check_tangents, hvp, pull_back, push_forward
from chainrule.transforms.nest import Level, run_level
from chainrule.transforms.second_order import check_real
from chainrule.transforms.trace import Traced, trace


def divergence(func: Callable[..., Any], argnums: Argnums = 0, *, has_aux: bool = False) -> Callable[..., Any]:
    """Return a function that computes the divergence of ``func``: the trace of its Jacobian.

    The Jacobian need not be formed: the trace is one contraction of the network of local Jacobians, in the order that
    costs least. The divergence per sample is ``vmap(divergence(func))``.

    Args:
        func: a function of real floating-point tensors that returns tensors of the structure and the shapes of what it
            is differentiated with respect to, or ``(output, aux)`` with ``has_aux``.
        argnums: the positional arguments to differentiate with respect to; an int, or a tuple or list of ints, where
            ``func`` returns a tuple with an entry for each.
        has_aux: whether ``func`` returns a pair whose second entry is passed through.

    Returns:
        A function returning the divergence, of shape ``()``; or ``(divergence, aux)``.

    Raises:
        RuntimeError: if arguments or outputs cannot be differentiated, are complex, or differ in structure or shape.

    Example:
        >>> import torch, chainrule
        >>> chainrule.divergence(lambda x: x ** 3)(torch.tensor([1.0, 2.0]))
        tensor(15.)
    """

    def finish(traced: Traced, single: bool) -> Any:
        check_real(traced, func, "divergence")
        _check_field(traced, func, single)
        pairs = [(o, i) for o, i in zip(traced.out_slots, traced.in_slots, strict=True) if o is not None]
        found = None
        if pairs:
            outputs, inputs = [o for o, _ in pairs], [i for _, i in pairs]
            found = traced.run("trace", outputs=outputs, inputs=inputs)["trace"]
        like = traced.out_leaves[0]
        return like.new_zeros(()) if found is None else found.to(like.dtype)

    return _transform(Level(func, "divergence", argnums, has_aux, finish, ("divergence",)))


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


def ntk(func: Callable[..., Any], argnums: Argnums = 0, *, has_aux: bool = False) -> Callable[..., Any]:
    """Return a function that computes the empirical neural tangent kernel ``J Jᵀ`` of ``func``.

    ``J`` is the Jacobian with respect to all leaves of the chosen arguments, usually a network's parameters. It is not
    formed: each parameter's share is a contraction of the factors of its Jacobian (for a linear layer, the Gram matrix
    of its inputs times that of the signals behind it).

    Args:
        func: a function of real floating-point tensors that returns a tensor, or ``(output, aux)`` with ``has_aux``.
        argnums: the positional arguments to differentiate with respect to; an int, or a tuple or list of ints.
        has_aux: whether ``func`` returns a pair whose second entry is passed through.

    Returns:
        A function returning the kernel, of shape ``(*output.shape, *output.shape)`` and the output's dtype; or
        ``(kernel, aux)``.

    Raises:
        RuntimeError: if arguments or outputs cannot be differentiated, are complex, or ``func`` returns more than one
            tensor.

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

    return _transform(Level(func, "ntk", argnums, has_aux, finish, ("ntk",)))


def _transform(level: Level) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        result, aux = run_level(level, args, kwargs)
        return (result, aux) if level.has_aux else result

    wrapper = entry_point(wrapper, level.func)
    level.mark(wrapper)
    return wrapper


def ggn(
    func: Callable[..., Any], loss: Callable[..., Any], primals: Any, tangents: Any, *, has_aux: bool = False, **kwargs: Any
) -> Any:
    """The product of the generalized Gauss-Newton matrix of ``loss(func(...))`` with a vector: ``Jᵀ H J v``.

    ``J`` is the Jacobian of ``func``, and ``H`` the Hessian of ``loss`` at its output. ``func`` runs once.

    Args:
        func: the model: a function of ``primals`` that returns tensors (any pytree).
        loss: a function of the model's output that returns a scalar tensor.
        primals: a tuple of positional arguments of ``func``; pytrees of floating-point tensors.
        tangents: a tuple of the same structure and shapes.
        has_aux: whether ``func`` returns ``(output, aux)``.
        kwargs: passed to ``func``.

    Returns:
        ``G v`` in the structure of ``primals`` (a single tree when there is one primal), or ``(G v, aux)``.

    Raises:
        RuntimeError: if the loss is not a scalar, or primals and tangents do not match.

    Example:
        >>> import torch, chainrule
        >>> x = torch.tensor([1.0, 2.0])
        >>> chainrule.ggn(torch.square, lambda y: (y ** 2).sum(), (x,), (torch.ones(2),))
        tensor([ 8., 32.])

    Source: Schraudolph, *Fast curvature matrix-vector products for second-order gradient descent*, Neural Computation 14
    (2002).
    """
    leaves = check_tangents(primals, tangents, "ggn", "tangents")
    traced = trace(func, primals, tuple(range(len(primals))), kwargs, "ggn", has_aux=has_aux)
    pushed = push_forward(traced, leaves, "ggn")
    product = hvp(loss, (traced.output(),), (pushed,))
    cotangents = tree_flatten(product)[0]
    active = [number for number, slot in enumerate(traced.out_slots) if slot is not None]
    pulled = pull_back(traced, active, tuple(cotangents[number] for number in active))
    result = pulled[0] if len(primals) == 1 else pulled
    return (result, traced.aux) if has_aux else result
