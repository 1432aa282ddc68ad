"""The Jacobian of a function as an object: products, transposes, sums, and what can be read off without forming it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from numbers import Real
from typing import Any

import torch

from chainrule.execute.engine import execute
from chainrule.execute.sparse import execute_sparse
from chainrule.plan.algebra import Added, AlgebraRequest, Composed, Expression, Scaled, Transposed
from chainrule.plan.sparse import SparseExpression
from chainrule.transforms.map_blocks import diagonal_by_blocks, needs_blocks
from chainrule.transforms.map_digits import diagonal_of_squares, is_of_squares, trace_of_squares
from chainrule.transforms.map_entries import diagonal_of_entries, prefers_entries
from chainrule.transforms.map_frame import Frame
from chainrule.transforms.map_norms import frobenius_norm
from chainrule.transforms.map_reading import entries, matrix, pieces
from chainrule.transforms.map_structure import Structure, structure_of
from chainrule.transforms.scipy_operator import scipy_operator
from chainrule.transforms.spaces import Parts, Space, by_leaf, positions
from chainrule.transforms.sparse_blocks import sparse_blocks, sparse_matrix
from chainrule.uncompiled import hide_from_dynamo


class LinearMap(ABC):
    """A linear map between trees of tensors that is known by its structure; no matrix is formed unless it is asked for.

    Made by :func:`chainrule.linear_map`, by ``jacobian(..., layout="operator")`` and ``hessian(..., layout="operator")``,
    and from other maps by ``J.T``, ``J @ K``, ``J + K``, ``J - K``, ``-J``, ``a * J``, ``J / a``, ``J.gram()``,
    ``J.normal()``.

    Elements of its spaces are trees (``J @ v`` takes a tree of the structure of the differentiated arguments and returns one
    of the structure of the outputs). Several of them side by side stand in one more dimension *behind* those of each leaf, as
    the columns of a matrix: where ``v`` has leaves of shape ``s``, ``V`` has leaves of shape ``(*s, k)``, and ``J @ V`` has
    leaves of the outputs' shapes with a last dimension ``k``. On the left they are the rows of a matrix: ``U @ J`` takes
    leaves with ``k`` *before* the outputs' shapes and returns such of the inputs'. Rows and columns are numbered through the
    flattened leaves, one leaf after the other.

    Results are differentiable by autograd and by chainrule's transforms, with respect to the primals, to the vectors and to
    the factors.

    Attributes:
        in_space: the space of tangents.
        out_space: the space that they are mapped to.
        symmetric: whether the map equals its transpose by construction.
    """

    #: Arrays of NumPy leave operators with a map on their right to it, instead of taking it for an element.
    __array_ufunc__ = None

    def __init__(self, out_space: Space, in_space: Space, *, symmetric: bool = False) -> None:
        self.out_space = out_space
        self.in_space = in_space
        self.symmetric = symmetric

    @abstractmethod
    def _expression(self, frame: Frame) -> Expression:
        """How the map is made of Jacobians."""

    @abstractmethod
    def _push(self, leaves: list[torch.Tensor], columns: int | None) -> list[torch.Tensor]:
        """Apply the map; with columns, these stand last."""

    @abstractmethod
    def _pull(self, leaves: list[torch.Tensor], columns: int | None) -> list[torch.Tensor]:
        """Apply the transposed map; with columns, these stand last."""

    @property
    def halves(self) -> tuple[LinearMap, LinearMap] | None:
        """For a composition, the map that is applied last and the one that is applied first."""
        return None

    @property
    def shape(self) -> tuple[int, int]:
        """The numbers of rows and columns of the flattened map."""
        return self.out_space.size, self.in_space.size

    @property
    def out_shape(self) -> Any:
        """The shapes of the outputs, in their structure."""
        return self.out_space.shape_tree

    @property
    def in_shape(self) -> Any:
        """The shapes of what is mapped, in its structure."""
        return self.in_space.shape_tree

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the flattened map."""
        return torch.promote_types(self.out_space.dtype, self.in_space.dtype)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.shape[0]}×{self.shape[1]}, {str(self.dtype).removeprefix('torch.')}, "
            f"{self.in_space} -> {self.out_space})"
        )

    # Products

    def explained_products(self) -> str:
        """Multiply zeros from each side (for :func:`chainrule.explain`), and return what was multiplied.

        Example:
            >>> import torch, chainrule
            >>> chainrule.linear_map(torch.square, torch.ones(2)).explained_products()
            'JacobianMap(2×2, float32, (2,) -> (2,)): its product with one vector, and that of its transpose'
        """
        sources, targets = self.in_space, self.out_space
        self._push([sources.zeros(n, dtype) for n, dtype in enumerate(sources.dtypes)], None)
        if not self.symmetric:
            self._pull([targets.zeros(n, dtype) for n, dtype in enumerate(targets.dtypes)], None)
        return f"{self!r}: its product with one vector" + ("" if self.symmetric else ", and that of its transpose")

    def matvec(self, vector: Any) -> Any:
        """The product with one element of the input space.

        Args:
            vector: a tree with leaves of the shapes ``in_shape``.

        Returns:
            A tree with leaves of the shapes ``out_shape``.

        Raises:
            ValueError: if the structure or a shape does not fit.
            TypeError: if a leaf is no tensor of the input's dtype.

        Example:
            >>> import torch, chainrule
            >>> chainrule.linear_map(torch.square, torch.tensor([1.0, 2.0])).matvec(torch.ones(2))
            tensor([2., 4.])
        """
        return self._applied(vector, "matvec", False)

    def matmat(self, matrix: Any) -> Any:
        """The product with several elements of the input space, which stand in the last dimension.

        Args:
            matrix: a tree with leaves of the shapes ``(*in_shape, k)``.

        Returns:
            A tree with leaves of the shapes ``(*out_shape, k)``.

        Raises:
            ValueError: if the structure or a shape does not fit.
            TypeError: if a leaf is no tensor of the input's dtype.

        Example:
            >>> import torch, chainrule
            >>> chainrule.linear_map(torch.square, torch.tensor([1.0, 2.0])).matmat(torch.eye(2))
            tensor([[2., 0.],
                    [0., 4.]])
        """
        return self._applied(matrix, "matmat", True)

    def _applied(self, tree: Any, method: str, several: bool | None) -> Any:
        name = f"{type(self).__name__}.{method}" if method != "@" else f"{type(self).__name__} @ v"
        leaves, columns = self.in_space.leaves_of(tree, name)
        if several is not None and several != (columns is not None):
            wanted = "(*shape, k)" if several else "shape"
            raise ValueError(f"{name}: expected leaves of {wanted} for the input's shapes {self.in_space}")
        return self.out_space.tree(self._push(leaves, columns))

    def __matmul__(self, other: Any) -> Any:
        if isinstance(other, LinearMap):
            if not self.in_space.fits(other.out_space):
                raise ValueError(
                    f"LinearMap @ LinearMap: the left map takes {self.in_space} and the right one returns {other.out_space} "
                    "(structures, shapes and dtypes must be equal)"
                )
            return ComposedMap(self, other)
        return self._applied(other, "@", None)

    def __rmatmul__(self, other: Any) -> Any:
        leaves, rows = self.out_space.leaves_of(other, f"u @ {type(self).__name__}", rows=True)
        if rows is None:
            return self.in_space.tree(self._pull(leaves, None))
        found = self._pull([leaf.movedim(0, -1) for leaf in leaves], rows)
        return self.in_space.tree([leaf.movedim(-1, 0) for leaf in found])

    @property
    def T(self) -> LinearMap:  # noqa: N802 - torch's name
        """The transposed map: from the output space to the input space."""
        return self if self.symmetric else TransposedMap(self)

    @property
    def mT(self) -> LinearMap:  # noqa: N802 - torch's name
        """The transposed map, as :attr:`T`."""
        return self.T

    def gram(self) -> LinearMap:
        """``J Jᵀ``, a symmetric map; of a network with respect to its parameters, the empirical tangent kernel.

        ``J.gram().dense()`` contracts the factors of the Jacobians without forming J where that costs less.
        """
        return ComposedMap(self, self.T, symmetric=True)

    def normal(self) -> LinearMap:
        """``Jᵀ J``, a symmetric map; the Gauss-Newton matrix of a sum of squares."""
        return ComposedMap(self.T, self, symmetric=True)

    # Sums and multiples

    def __add__(self, other: Any) -> LinearMap:
        if not isinstance(other, LinearMap):
            return NotImplemented
        if not (self.in_space.fits(other.in_space) and self.out_space.fits(other.out_space)):
            raise ValueError(
                f"LinearMap + LinearMap: the spaces differ: {self.in_space} -> {self.out_space} and {other.in_space} -> "
                f"{other.out_space} (structures, shapes and dtypes must be equal)"
            )
        return AddedMap(self, other)

    def __sub__(self, other: Any) -> LinearMap:
        return self + -other if isinstance(other, LinearMap) else NotImplemented

    def __radd__(self, other: Any) -> LinearMap:
        return self if type(other) is int and other == 0 else NotImplemented  # ``sum(maps)`` begins with it

    def __pos__(self) -> LinearMap:
        return self

    def __neg__(self) -> LinearMap:
        return ScaledMap(self, -1.0, None)

    def __mul__(self, factor: Any) -> LinearMap:
        if isinstance(factor, bool) or not isinstance(factor, (Real, torch.Tensor)):
            return NotImplemented
        if not isinstance(factor, torch.Tensor):
            factor = torch.tensor(float(factor), dtype=self.dtype, device=self.out_space.devices[0])
        elif factor.dim() or factor.is_complex():
            raise ValueError(
                f"LinearMap * factor: expected a number or a real tensor of no dimensions, got {factor.dtype} of shape "
                f"{tuple(factor.shape)}"
            )
        return ScaledMap(self, 1.0, factor.to(self.out_space.devices[0], self.dtype))

    __rmul__ = __mul__

    def __truediv__(self, factor: Any) -> LinearMap:
        if isinstance(factor, bool) or not isinstance(factor, (Real, torch.Tensor)):
            return NotImplemented
        return self * (1.0 / factor)

    # What is read off

    def _request(
        self, kind: str, rows: Parts | None = None, columns: Parts | None = None, *, symmetric: bool = False, sized: bool = False
    ) -> tuple[Any, AlgebraRequest, list[torch.Tensor]]:
        frame = Frame()
        expression = self._expression(frame)

        def selected(parts: Parts | None) -> tuple[tuple[int, int | None], ...]:
            if parts is None:
                return ()
            return tuple(
                (leaf, None if local is None else frame.seed(local))
                for leaf, local in zip(parts.leaves, parts.local, strict=True)
            )

        request = AlgebraRequest(kind, expression, selected(rows), selected(columns), symmetric, sized=sized)
        return frame.tape, request, frame.seeds

    def read(self, kind: str, *parts: Parts | None, symmetric: bool = False, sized: bool = False) -> dict[Any, Any]:
        """The results of a request about the map's expression (see :class:`~chainrule.plan.algebra.AlgebraRequest`)."""
        tape, request, seeds = self._request(kind, *parts, symmetric=symmetric, sized=sized)
        return execute(tape, request, seeds)

    def block_dtype(self, o: int, i: int) -> torch.dtype:
        """The dtype of the block of an output leaf and an input leaf."""
        return torch.promote_types(self.out_space.dtypes[o], self.in_space.dtypes[i])

    def dense(self, *, flat: bool = False) -> Any:
        """The map as dense tensors.

        Args:
            flat: whether to return one matrix over the flattened leaves instead of a tree of blocks.

        Returns:
            For each output leaf, the tree of blocks over the input's leaves, each of shape ``(*output.shape, *input.shape)``
            (as :func:`chainrule.jacobian` returns it); with ``flat``, a tensor of shape ``J.shape``.

        Example:
            >>> import torch, chainrule
            >>> chainrule.linear_map(torch.square, torch.tensor([1.0, 2.0])).dense()
            tensor([[2., 0.],
                    [0., 4.]])
        """
        everything = by_leaf(self.out_space, None), by_leaf(self.in_space, None)
        if flat:
            return matrix(self, *everything)
        return self.out_space.tree([self.in_space.tree(line) for line in pieces(self, *everything)])

    def rows(self, index: Any) -> Any:
        """Some rows, by their numbers in the flattened output.

        Args:
            index: a number, a slice, or a list or one-dimensional tensor of numbers or of truth values.

        Returns:
            A tree of the structure of the input, with leaves of shape ``(k, *input.shape)`` for k rows (without the first
            dimension for a single number).

        Raises:
            IndexError: if a number is out of range.
            TypeError: if the index is of another kind.

        Example:
            >>> import torch, chainrule
            >>> chainrule.linear_map(torch.square, torch.tensor([1.0, 2.0])).rows(1)
            tensor([0., 4.])
        """
        name = f"{type(self).__name__}.rows"
        chosen = positions(index, self.shape[0], name)
        parts = by_leaf(self.out_space, chosen)
        lines = pieces(self, parts, by_leaf(self.in_space, None))
        leaves = []
        for i, dtype in enumerate(self.in_space.dtypes):
            column = [line[i] for line in lines] or [self.in_space.zeros(i, dtype, before=(0,))]
            leaf = column[0] if len(column) == 1 else torch.cat(column)
            leaf = leaf if parts.order is None else leaf.index_select(0, parts.order.to(leaf.device))
            leaves.append(leaf[0] if chosen.single else leaf)
        return self.in_space.tree(leaves)

    def columns(self, index: Any) -> Any:
        """Some columns, by their numbers in the flattened input.

        Args:
            index: as for :meth:`rows`.

        Returns:
            A tree of the structure of the output, with leaves of shape ``(*output.shape, k)`` for k columns (without the
            last dimension for a single number).

        Raises:
            IndexError: if a number is out of range.
            TypeError: if the index is of another kind.

        Example:
            >>> import torch, chainrule
            >>> chainrule.linear_map(torch.square, torch.tensor([1.0, 2.0])).columns([1, 0])
            tensor([[0., 2.],
                    [4., 0.]])
        """
        name = f"{type(self).__name__}.columns"
        chosen = positions(index, self.shape[1], name)
        parts = by_leaf(self.in_space, chosen)
        leaves = []
        for o, line in enumerate(pieces(self, by_leaf(self.out_space, None), parts)):
            row = line or [self.out_space.zeros(o, self.out_space.dtypes[o], after=(0,))]
            leaf = row[0] if len(row) == 1 else torch.cat(row, -1)
            leaf = leaf if parts.order is None else leaf.index_select(-1, parts.order.to(leaf.device))
            leaves.append(leaf[..., 0] if chosen.single else leaf)
        return self.out_space.tree(leaves)

    def block(self, rows: Any, columns: Any) -> torch.Tensor:
        """Where some rows and some columns cross: a matrix of shape ``(number of rows, number of columns)``.

        Args:
            rows: as for :meth:`rows`.
            columns: as for :meth:`columns`.

        Raises:
            IndexError: if a number is out of range.
            TypeError: if an index is of another kind.

        Example:
            >>> import torch, chainrule
            >>> chainrule.linear_map(torch.square, torch.tensor([1.0, 2.0, 3.0])).block([0, 2], slice(1, 3))
            tensor([[0., 0.],
                    [0., 6.]])
        """
        name = f"{type(self).__name__}.block"
        chosen = [positions(key, size, name) for key, size in zip((rows, columns), self.shape, strict=True)]
        return matrix(self, by_leaf(self.out_space, chosen[0]), by_leaf(self.in_space, chosen[1]))

    def __getitem__(self, key: Any) -> torch.Tensor:
        """Entries of the flattened map, as the same index would give of its matrix; two lists are read side by side."""
        name = f"{type(self).__name__}[...]"
        items = key if isinstance(key, tuple) else (key,)
        if (missing := [n for n, item in enumerate(items) if item is Ellipsis]) and len(items) <= 3:
            items = (*items[: missing[0]], *[slice(None)] * (3 - len(items)), *items[missing[0] + 1 :])
        elif len(items) == 1:
            items = (*items, slice(None))
        if len(items) != 2 or any(item is Ellipsis or item is None for item in items):
            raise TypeError(f"{name}: expected an index of rows, or one of rows and one of columns")
        whole = [isinstance(item, slice) and item == slice(None) for item in items]
        rows, columns = (positions(item, size, name) for item, size in zip(items, self.shape, strict=True))
        if rows.listed and columns.listed and not rows.single and not columns.single:
            return entries(self, rows, columns, name)
        crossing = matrix(
            self,
            by_leaf(self.out_space, None if whole[0] else rows),
            by_leaf(self.in_space, None if whole[1] else columns),
        )
        crossing = crossing[:, 0] if columns.single else crossing
        return crossing[0] if rows.single else crossing

    def _need_square(self, method: str) -> None:
        if self.in_space.shapes != self.out_space.shapes:
            raise ValueError(
                f"{type(self).__name__}.{method}: needs a map of a space to itself, and this one goes from {self.in_space} to "
                f"{self.out_space}"
            )

    def diagonal(self) -> Any:
        """The diagonal of a map of a space to itself; the rest is not computed.

        Returns:
            A tree of the input's structure and shapes.

        Raises:
            ValueError: if the leaves of the output do not have the shapes of the input's.

        Example:
            >>> import torch, chainrule
            >>> chainrule.linear_map(torch.square, torch.tensor([1.0, 2.0])).diagonal()
            tensor([2., 4.])
        """
        self._need_square("diagonal")
        if prefers_entries(self, "diagonal"):
            found = diagonal_of_entries(self)
        elif needs_blocks(self, "diagonal"):
            found = dict(enumerate(self.in_space.unflatten(diagonal_by_blocks(self))))
        else:
            found = diagonal_of_squares(self) if is_of_squares(self) else self.read("diagonal")
        leaves = []
        for number in range(len(self.in_space.shapes)):
            dtype = self.block_dtype(number, number)
            leaf = found.get(number)
            leaves.append(self.in_space.zeros(number, dtype) if leaf is None else leaf.to(dtype))
        return self.in_space.tree(leaves)

    def trace(self) -> torch.Tensor:
        """The trace of a map of a space to itself, of shape ``()``; exact, by one contraction of the factors.

        Raises:
            ValueError: if the leaves of the output do not have the shapes of the input's.

        Example:
            >>> import torch, chainrule
            >>> chainrule.linear_map(torch.square, torch.tensor([1.0, 2.0])).trace()
            tensor(6.)
        """
        self._need_square("trace")
        if prefers_entries(self, "trace"):
            parts = [part.sum() for part in diagonal_of_entries(self).values()]
            return self._scalar(sum(parts[1:], parts[0]) if parts else None)
        if needs_blocks(self, "trace"):
            return diagonal_by_blocks(self).sum()
        return self._scalar(trace_of_squares(self) if is_of_squares(self) else self.read("trace").get("trace"))

    def _scalar(self, value: torch.Tensor | None) -> torch.Tensor:
        if value is None:
            return torch.zeros((), dtype=self.dtype, device=self.out_space.devices[0])
        return value.to(self.dtype)

    def norm(self) -> torch.Tensor:
        """The Frobenius norm, of shape ``()``; exact.

        The sum of squares is one contraction of the factors with themselves, or is taken over the non-zeros where these are
        fewer than what that holds. Where even the cheapest order makes a large matrix, it is taken over blocks of columns or
        rows. Where it is out of the dtype's range while the norm is not (entries around 1e20 in float32), the entries are scaled
        by the largest of them; not inside of transforms and compiled functions, and not in dense maps of more than 2**28 entries
        (2**20 where the squares are too small).

        Example:
            >>> import torch, chainrule
            >>> chainrule.linear_map(torch.square, torch.tensor([1.5, 2.0])).norm()
            tensor(5.)
        """
        return frobenius_norm(self)

    def sparse(self, *, flat: bool = False) -> Any:
        """The map as sparse tensors in coordinate form, read off the terms: nothing of the dense size is made.

        Where the entries stand is planned once for maps of one signature (and for each value of their index tensors).

        Args:
            flat: whether to return one matrix over the flattened leaves instead of a tree of blocks.

        Returns:
            As :meth:`dense`, with coalesced ``torch.sparse_coo`` tensors. Entries that are structurally zero are left out.

        Raises:
            RuntimeError: inside of a function that is differentiated, where the entries depend on what it is differentiated
                with respect to; and where there are complex values between the inputs and the outputs.

        Example:
            >>> import torch, chainrule
            >>> chainrule.linear_map(torch.square, torch.tensor([1.0, 2.0])).sparse().values()
            tensor([2., 4.])
        """
        frame = Frame()
        expression = self._expression(frame)
        sizes = (tuple(self.out_space.sizes), tuple(self.in_space.sizes)) if flat else None
        found = execute_sparse(frame.tape, SparseExpression(expression, self.symmetric, sizes), frame.seeds)
        assemble = sparse_matrix if flat else sparse_blocks
        return assemble(found, self.out_space, self.in_space, f"{type(self).__name__}.sparse")

    def structure(self) -> Structure:
        """A readable account of the terms that the map consists of: axes, factors, bytes, what is diagonal.

        Nothing is computed for it. ``print(J.structure())`` shows it; its attributes are for programs.
        """
        return structure_of(*self._request("blocks", by_leaf(self.out_space, None), by_leaf(self.in_space, None)), self)

    def scipy(self) -> Any:
        """The map as a ``scipy.sparse.linalg.LinearOperator`` on flattened vectors, float64 numpy arrays in and out.

        Products are computed in the map's own dtypes and on its devices, outside of autograd.

        Raises:
            ImportError: if scipy is not installed.

        Example:
            >>> import torch, chainrule
            >>> operator = chainrule.linear_map(torch.square, torch.tensor([1.0, 2.0])).scipy()
            >>> operator.shape
            (2, 2)
        """
        return scipy_operator(self)


class TransposedMap(LinearMap):
    """The transpose of another map."""

    def __init__(self, of: LinearMap) -> None:
        super().__init__(of.in_space, of.out_space)
        self._of = of

    @property
    def T(self) -> LinearMap:  # noqa: N802 - torch's name
        """The map itself."""
        return self._of

    def _expression(self, frame: Frame) -> Expression:
        return Transposed(self._of._expression(frame))

    def _push(self, leaves: list[torch.Tensor], columns: int | None) -> list[torch.Tensor]:
        return self._of._pull(leaves, columns)

    def _pull(self, leaves: list[torch.Tensor], columns: int | None) -> list[torch.Tensor]:
        return self._of._push(leaves, columns)


class ScaledMap(LinearMap):
    """Another map times a number."""

    def __init__(self, of: LinearMap, number: float, factor: torch.Tensor | None) -> None:
        super().__init__(of.out_space, of.in_space, symmetric=of.symmetric)
        self._of = of
        self._number = number
        self._factor = factor

    def _expression(self, frame: Frame) -> Expression:
        of = self._of._expression(frame)
        return Scaled(of, self._number, None if self._factor is None else frame.seed(self._factor))

    def _scaled(self, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
        if self._factor is None:
            return [leaf * self._number for leaf in leaves]
        return [leaf * self._factor.to(leaf.dtype) for leaf in leaves]

    def _push(self, leaves: list[torch.Tensor], columns: int | None) -> list[torch.Tensor]:
        return self._scaled(self._of._push(leaves, columns))

    def _pull(self, leaves: list[torch.Tensor], columns: int | None) -> list[torch.Tensor]:
        return self._scaled(self._of._pull(leaves, columns))


class AddedMap(LinearMap):
    """The sum of two maps."""

    def __init__(self, one: LinearMap, two: LinearMap) -> None:
        super().__init__(one.out_space, one.in_space, symmetric=one.symmetric and two.symmetric)
        self._parts = (one, two)

    def _expression(self, frame: Frame) -> Expression:
        return Added(tuple(part._expression(frame) for part in self._parts))

    def _push(self, leaves: list[torch.Tensor], columns: int | None) -> list[torch.Tensor]:
        one, two = (part._push(leaves, columns) for part in self._parts)
        return [torch.add(a, b) for a, b in zip(one, two, strict=True)]

    def _pull(self, leaves: list[torch.Tensor], columns: int | None) -> list[torch.Tensor]:
        one, two = (part._pull(leaves, columns) for part in self._parts)
        return [torch.add(a, b) for a, b in zip(one, two, strict=True)]


class ComposedMap(LinearMap):
    """One map after another."""

    def __init__(self, left: LinearMap, right: LinearMap, *, symmetric: bool = False) -> None:
        super().__init__(left.out_space, right.in_space, symmetric=symmetric)
        self._left = left
        self._right = right

    @property
    def halves(self) -> tuple[LinearMap, LinearMap] | None:
        """The map that is applied last and the one that is applied first."""
        return self._left, self._right

    def _expression(self, frame: Frame) -> Expression:
        return Composed(self._left._expression(frame), self._right._expression(frame))

    def _push(self, leaves: list[torch.Tensor], columns: int | None) -> list[torch.Tensor]:
        return self._left._push(self._right._push(leaves, columns), columns)

    def _pull(self, leaves: list[torch.Tensor], columns: int | None) -> list[torch.Tensor]:
        return self._right._pull(self._left._pull(leaves, columns), columns)


for _method in (
    "__getitem__", "_applied", "block", "columns", "diagonal", "norm", "read", "rows", "sparse", "structure", "trace",
):  # fmt: skip
    hide_from_dynamo(getattr(LinearMap, _method))

__all__ = ["AddedMap", "ComposedMap", "Frame", "LinearMap", "ScaledMap", "TransposedMap"]
