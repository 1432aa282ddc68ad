"""Linear maps: sums of terms, operators known by how they act, their composition, addition and dense form."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from chainrule.maps import sums
from chainrule.maps.assembly import assembled_node
from chainrule.maps.compose import Workspace, dense_factor, join, settle
from chainrule.maps.entries import (
    embed_diagonals,
    is_part,
    joined_pieces,
    on_diagonals,
    part_of,
    repeated_axes,
    written_term,
)  # fmt: skip
from chainrule.maps.merging import (
    add_terms,
    densify_onehots,
    matching_axes,
    merge,
    pattern_of,
    shared_factors,
    taken_together,
    without_factors,
)
from chainrule.maps.nodes import CALL_COST, MOVED_COST, Node, postorder
from chainrule.maps.rows import Row, is_dense_row, pulled
from chainrule.maps.staging import Program, Staged
from chainrule.maps.sums import stacked_products
from chainrule.maps.terms import Axis, Factor, Term, dims_of, new_axes
from chainrule.maps.views import expand_to, permute

Action = Callable[[Program, Staged], Staged]

#: Pieces of a result of fewer elements than this are not worth calls of their own.
_FEWEST = 1 << 12


@dataclass(frozen=True)
class Operator:
    """A local Jacobian known by how it acts on rows of tangents or cotangents.

    Attributes:
        out_shape: the shape of the op's output.
        in_shape: the shape of its input.
        push: tangents of shape ``(R, *in_shape)`` to ``(R, *out_shape)``.
        pull: cotangents of shape ``(R, *out_shape)`` to ``(R, *in_shape)``.
        diagonal: pairs ``(output dimension, input dimension)`` on which the op acts entry by entry (a batch dimension).
        flops: multiply-adds of one row.
        label: the op's name, for ``explain``.
        terms: the same map as a sum of terms, where its structure may be worth more than the op's kernel.
        structure: makes the same map as a sum of terms, for sparse plans; None where the op is not known so.
        whole: whether ``pull`` is a user's function, which need not be linear: it is given whole cotangents, not their parts.
    """

    out_shape: tuple[int, ...]
    in_shape: tuple[int, ...]
    push: Action
    pull: Action
    diagonal: tuple[tuple[int, int], ...] = ()
    flops: int = 0
    label: str = ""
    terms: tuple[Term, ...] = ()
    structure: Callable[[], tuple[Term, ...]] | None = None
    whole: bool = False

    def transpose(self) -> Operator:
        """The operator read from the output to the input."""
        return Operator(
            self.in_shape,
            self.out_shape,
            self.pull,
            self.push,
            tuple((i, o) for o, i in self.diagonal),
            self.flops,
            self.label,
            tuple(term.transpose() for term in self.terms),
        )


@dataclass(frozen=True)
class LinearMap:
    """A map from tensors of ``in_shape`` to tensors of ``out_shape``: the sum of its terms and operators.

    Attributes:
        out_shape: the shape of the output.
        in_shape: the shape of the input.
        terms: what is known by its structure.
        operators: what is known by how it acts.
        row: the op's own way to multiply one dense row by the whole map; None where there is none, or it is not wanted.
    """

    out_shape: tuple[int, ...]
    in_shape: tuple[int, ...]
    terms: tuple[Term, ...] = ()
    operators: tuple[Operator, ...] = ()
    row: Row | None = None

    def transpose(self) -> LinearMap:
        """The transposed map."""
        return LinearMap(
            self.in_shape,
            self.out_shape,
            tuple(term.transpose() for term in self.terms),
            tuple(operator.transpose() for operator in self.operators),
        )

    @property
    def is_zero(self) -> bool:
        """Whether the map has no term at all."""
        return not self.terms and not self.operators


def compose(left: LinearMap, right: LinearMap, workspace: Workspace, *, eager: bool) -> LinearMap:
    """The composition ``left ∘ right``.

    At most one of the two may hold operators. With ``eager`` every product with an internal sum is contracted at once
    (a pinned accumulation order); without, the network is kept for a contraction order to be chosen later.
    """
    if right.row is not None and not left.operators and is_dense_row(left.terms, left.out_shape):
        return LinearMap((), right.in_shape, (pulled(left.terms[0], right.row, right.in_shape, workspace),))
    terms: list[Term] = []
    for one in left.terms:
        for two in right.terms:
            if not _has_empty_axis(one, two):
                joined = join(one, two, workspace)
                if joined.scale != 0.0:
                    terms.append(settle(joined, workspace, bands=True) if eager else joined)
    for operator in right.operators:
        if operator.whole:
            terms.append(_pull(_dense(left, workspace), operator, workspace))
            continue
        terms.extend(_all_through(left.terms, operator, workspace, eager))
    if left.operators:
        lifted = tuple(t.transpose() for t in right.terms)
        for operator in left.operators:
            terms.extend(found.transpose() for found in _all_through(lifted, operator.transpose(), workspace, eager))
    return LinearMap(left.out_shape, right.in_shape, tuple(terms))


def _dense(linear_map: LinearMap, workspace: Workspace) -> Term:
    """A map as one term of one factor."""
    out_axes, in_axes = new_axes(linear_map.out_shape), new_axes(linear_map.in_shape)
    factor = Factor(densify(linear_map, workspace), (*out_axes, *in_axes))
    return Term(dims_of(out_axes), dims_of(in_axes), (factor,))


def _has_empty_axis(one: Term, two: Term) -> bool:
    return one.is_empty or two.is_empty


def _all_through(terms: Sequence[Term], operator: Operator, workspace: Workspace, eager: bool) -> list[Term]:
    """A sum of terms composed with an operator: term by term, or added up before if that is predicted to cost less."""
    if any(factor.node.running is not None for other in operator.terms for factor in other.factors):
        joined = [join(t, o, workspace) for t in terms for o in operator.terms if not _has_empty_axis(t, o)]
        return [settle(t, workspace, bands=True) if eager else t for t in joined if t.scale != 0.0]
    merged = merge(terms, workspace, force=False)
    apart = [found for term in merged for found in _through(term, operator, workspace)]
    if len(merged) < 2 or workspace.sparse or any(term.onehots for term in merged):
        return apart
    whole = [found for term in merge(merged, workspace, force=True) for found in _through(term, operator, workspace)]
    return min((apart, whole), key=_terms_cost)


def _through(term: Term, operator: Operator, workspace: Workspace) -> list[Term]:
    """A term composed with an operator: by the operator's kernel, or by its terms if that is predicted to cost less.

    The kernel needs dense rows. The terms are tried where the rows would be identities or index relations.
    """
    acted = {axis for d, dim in enumerate(term.in_dims) if d not in {o for o, _ in operator.diagonal} for axis in dim}
    outside = {axis for dim in term.out_dims for axis in dim}
    tied = {axis for h in term.onehots for axis in (*h.sources, h.target)}
    if not operator.terms or not any(axis in outside or axis in tied for axis in acted if axis.size > 1):
        return [_pull(term, operator, workspace)]
    if any(_has_empty_axis(term, other) for other in operator.terms):
        return [_pull(term, operator, workspace)]
    joined = [join(term, other, workspace) for other in operator.terms]
    structured = [settle(found, workspace, bands=True) for found in joined if found.scale != 0.0]
    pulled = [_pull(term, operator, workspace)]
    return min((pulled, structured), key=_terms_cost)


def _terms_cost(terms: Sequence[Term]) -> float:
    """What it costs to compute the entries of terms, in multiply-adds."""
    nodes = postorder([factor.node for term in terms for factor in term.factors])
    work = sum((node.flops + MOVED_COST * node.bytes) * node.batch + CALL_COST for node in nodes if node.flops or node.bytes)
    entries = sum(math.prod(axis.size for axis in term.carried_axes()) for term in terms)
    return work + MOVED_COST * entries


def _pull(term: Term, operator: Operator, workspace: Workspace) -> Term:
    """Apply ``operator`` transposed to the rows of a term (whose input is the operator's output)."""
    term = settle(term, workspace)
    in_axes = {axis for dim in term.in_dims for axis in dim}
    term = densify_onehots(term, workspace, lambda h: h.target in in_axes or bool(in_axes.intersection(h.sources)))
    diagonal_out = {out for out, _ in operator.diagonal}
    acted = [axis for d, dim in enumerate(term.in_dims) if d not in diagonal_out for axis in dim]
    outside = {axis for dim in term.out_dims for axis in dim} | {
        axis for d, dim in enumerate(term.in_dims) if d in diagonal_out for axis in dim
    }
    term = _break_diagonals(term, [a for a in dict.fromkeys(acted) if a in outside], workspace, only=diagonal_out)
    term = settle(term, workspace)
    inner = list(dict.fromkeys(axis for dim in term.in_dims for axis in dim))
    if len(inner) != sum(len(dim) for dim in term.in_dims):
        raise AssertionError("an operator was applied to a term with a diagonal inside its input")
    inner_set = set(inner)
    carried = term.carried_axes()
    rest = [axis for axis in term.outer_axes() if axis in carried and axis not in inner_set]
    factor = dense_factor(term, [*rest, *inner], workspace)
    rows = math.prod(axis.size for axis in rest)
    names = {axis: number for number, axis in enumerate([*rest, *inner])}
    have, want = tuple(names[a] for a in factor.axes), tuple(range(len(names)))
    full = tuple(a.size for a in [*rest, *inner])
    out_shape, in_shape = operator.out_shape, operator.in_shape

    def compute(program: Program, value: Staged) -> Staged:
        value = expand_to(value, have, want)
        if tuple(value.shape) != full:
            value = torch.broadcast_to(value, full)
        if full != (rows, *out_shape):
            value = torch.reshape(value, (rows, *out_shape))
        return operator.pull(program, value)

    raw = Node(
        (rows, *in_shape),
        (factor.node,),
        compute,
        flops=rows * max(operator.flops, math.prod(out_shape)),
        moved=rows * (math.prod(out_shape) + math.prod(in_shape)),
        label=operator.label,
    )
    in_dims: list[tuple[Axis, ...]] = []
    source = {i: o for o, i in operator.diagonal}
    for dim, size in enumerate(in_shape):
        in_dims.append(term.in_dims[source[dim]] if dim in source else (Axis(size),))
    axes = (*rest, *(axis for dim in in_dims for axis in dim))
    sizes = tuple(a.size for a in axes)
    node = raw if sizes == raw.sizes else Node(sizes, (raw,), lambda p, v: torch.reshape(v, sizes), label="reshape")
    return Term(term.out_dims, tuple(in_dims), (Factor(node, axes),), term.onehots)


def _break_diagonals(term: Term, axes: Sequence[Axis], workspace: Workspace, only: set[int]) -> Term:
    """Give the input dimensions (those not in ``only``) fresh axes tied to the old ones by dense identities."""
    if not axes:
        return term
    mapping = {axis: Axis(axis.size) for axis in axes}
    in_dims = tuple(
        dim if d in only else tuple(mapping.get(axis, axis) for axis in dim) for d, dim in enumerate(term.in_dims)
    )
    ties = tuple(Factor(workspace.eye(axis.size), (axis, new)) for axis, new in mapping.items())
    return replace(term, in_dims=in_dims, factors=term.factors + ties)


def add_maps(maps: Sequence[LinearMap], workspace: Workspace, *, force: bool = False) -> LinearMap:
    """The sum of maps between the same spaces (none of them with operators)."""
    first = maps[0]
    terms = merge([term for m in maps for term in m.terms], workspace, force=force)
    return LinearMap(first.out_shape, first.in_shape, terms)


def densify(linear_map: LinearMap, workspace: Workspace) -> Node:
    """The map as one dense array of shape ``(*out_shape, *in_shape)``."""
    shape = (*linear_map.out_shape, *linear_map.in_shape)
    if linear_map.operators:
        start = LinearMap(linear_map.out_shape, linear_map.out_shape, (_identity_like(linear_map.out_shape),))
        linear_map = add_maps(
            [replace(linear_map, operators=()), compose(start, replace(linear_map, terms=()), workspace, eager=True)],
            workspace,
        )
    terms = [t for t in linear_map.terms if not any(a.size == 0 for a in t.all_axes())]
    if not terms or math.prod(shape) == 0:
        dtype, device = workspace.dtype, workspace.device
        return Node(
            shape, (), lambda program: program.call(torch.zeros, shape, dtype=dtype, device=device), label="zeros"
        )
    settled = [settle(term, workspace, bands=True) for term in merge(terms, workspace, force=False)]
    return _dense_sum(settled, workspace, shape)


def _dense_sum(terms: Sequence[Term], workspace: Workspace, shape: tuple[int, ...]) -> Node:
    """The sum of settled terms as one dense array of ``shape``."""
    if math.prod(shape) < sums.MANY:
        single, nodes = joined_pieces(terms, workspace, shape)
        return _total([*nodes, *(dense_term(term, workspace, shape) for term in single)], shape)
    full = [t for t in terms if not t.onehots and not repeated_axes(t)]
    placed = [t for t in terms if is_part(t) and not any(t is other for other in full)]
    nodes = [dense_term(t, workspace, shape) for t in terms if not any(t is other for other in (*full, *placed))]
    groups: dict[object, list[Term]] = {}
    for term in full:
        groups.setdefault(pattern_of(term), []).append(term)
    aligned = [_with_common_factors(_on_same_axes(group), workspace, math.prod(shape)) for group in groups.values()]
    if not nodes and len(aligned) == 1 and not any(term.onehots for term in placed):
        whole = stacked_products(aligned[0], [on_diagonals(term, workspace) for term in placed], workspace, shape)
        if whole is not None:
            return whole
    for group in aligned:
        stacked = stacked_products(group, (), workspace, shape)
        nodes.extend([stacked] if stacked is not None else [dense_term(term, workspace, shape) for term in group])
    if len(placed) > 1 and len(placed) * _FEWEST > math.prod(shape):
        # Many small pieces are concatenated in one call.
        placed, pieces = joined_pieces(placed, workspace, shape)
        nodes.extend(pieces)
    base = _total(nodes, shape) if nodes else None
    if not placed:
        assert base is not None
        return base
    return assembled_node(base, [part_of(term, workspace) for term in placed], shape)


def _total(nodes: Sequence[Node], shape: tuple[int, ...]) -> Node:
    total = nodes[0]
    for node in nodes[1:]:
        total = Node(
            shape, (total, node), lambda program, x, y: torch.add(x, y), flops=total.numel, moved=3 * total.numel, label="add"
        )
    return total


def _on_same_axes(terms: Sequence[Term]) -> list[Term]:
    """Terms of one pattern with the same axes at the same places."""
    host = terms[0]
    return [host, *(term.rename(matching_axes(term, host) or {}) for term in terms[1:])]


def _with_common_factors(terms: Sequence[Term], workspace: Workspace, numel: int) -> list[Term]:
    """Terms that share factors as one, where the sum of what is left is much smaller than the result."""

    def add(host: Term, term: Term) -> Term | None:
        common = shared_factors(host, term)
        rest = without_factors(host, common).carried_axes() | without_factors(term, common).carried_axes()
        if not common or sums.SAVING * math.prod(axis.size for axis in rest) > numel:
            return None
        return add_terms(host, term, workspace, True)

    return taken_together(terms, add)


def _identity_like(shape: tuple[int, ...]) -> Term:
    dims = tuple((Axis(size),) for size in shape)
    return Term(dims, dims)


def dense_term(term: Term, workspace: Workspace, shape: tuple[int, ...]) -> Node:
    """A settled term as a dense array; diagonals and relations are written into zeros, nothing is multiplied by them."""
    if term.onehots:
        return written_term(term, workspace, shape)
    if not repeated_axes(term):
        positions = tuple(axis for side in (term.out_dims, term.in_dims) for dim in side for axis in dim)
        factor = dense_factor(term, list(dict.fromkeys(positions)), workspace)
        return _broadcast_node(factor, positions, shape)
    diagonal = on_diagonals(term, workspace)
    sizes, pairs = diagonal.places

    def compute(program: Program, value: Staged) -> Staged:
        return program.call(embed_diagonals, diagonal.read(value), sizes, pairs, shape)

    moved = math.prod(shape) + diagonal.node.numel
    return Node(shape, (diagonal.node,), compute, moved=moved, label="block diagonal")


def _broadcast_node(factor: Factor, positions: tuple[Axis, ...], shape: tuple[int, ...]) -> Node:
    # A size-one axis may stand twice (it is not worth a diagonal): its later places are plain size-one dimensions.
    order_axes = list(dict.fromkeys(positions))
    names = {axis: number for number, axis in enumerate(order_axes)}
    have, order = tuple(names[a] for a in factor.axes), tuple(range(len(order_axes)))
    full = tuple(a.size for a in order_axes)

    def compute(program: Program, value: Staged) -> Staged:
        if have != order:
            value = torch.broadcast_to(expand_to(value, have, order), full)
        return value if tuple(value.shape) == shape else torch.reshape(value, shape)

    moved = 0 if have == order else math.prod(shape)
    return Node(shape, (factor.node,), compute, moved=moved, label="output")


__all__ = ["LinearMap", "Operator", "Row", "add_maps", "compose", "densify", "embed_diagonals", "merge", "permute"]
