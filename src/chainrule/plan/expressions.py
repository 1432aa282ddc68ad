"""How linear maps are put together from the Jacobians of recorded runs, and what is asked of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Jacobian:
    """The Jacobian of some slots of a tape with respect to others; an output that depends on no input has no slot."""

    inputs: tuple[int, ...]
    outputs: tuple[int | None, ...]


@dataclass(frozen=True)
class Transposed:
    """The transpose of an expression."""

    of: Expression


@dataclass(frozen=True)
class Scaled:
    """An expression times a number, and times a seed of no dimensions, if there is one."""

    of: Expression
    number: float = 1.0
    seed: int | None = None


@dataclass(frozen=True)
class Added:
    """The sum of expressions between the same spaces."""

    parts: tuple[Expression, ...]


@dataclass(frozen=True)
class Composed:
    """The composition ``left ∘ right``."""

    left: Expression
    right: Expression


Expression = Jacobian | Transposed | Scaled | Added | Composed

#: A number of an output or an input, and the seed that holds the flat positions of the wanted elements; None for all.
Selection = tuple[int, int | None]


#: Before the key of a result, that of the sizes of its terms.
SIZES = "sizes"


class OfExpression:
    """A request about an expression in Jacobians.

    Attributes:
        expression: the map.
    """

    expression: Expression

    @property
    def inputs(self) -> tuple[int, ...]:
        """The slots differentiated with respect to."""
        return tuple(slot for jacobian in jacobians(self.expression) for slot in jacobian.inputs)

    @property
    def outputs(self) -> tuple[int, ...]:
        """The slots differentiated."""
        return tuple(slot for jacobian in jacobians(self.expression) for slot in jacobian.outputs if slot is not None)


@dataclass(frozen=True)
class AlgebraRequest(OfExpression):
    """What is asked of an expression.

    Attributes:
        kind: ``blocks`` (the blocks of some outputs and inputs, or some rows and columns of them), ``entries`` (single ones:
            the seeds of a pair of selections are read side by side), ``diagonal`` (of the blocks of an output and the input
            of the same number), ``trace`` (the sum of these) or ``squares`` (the sum of the squares of all entries).
        expression: the map.
        rows: which outputs, whole or in part.
        columns: which inputs, whole or in part; for ``entries``, the partners of ``rows``.
        symmetric: whether the map is symmetric: of ``blocks``, those above the diagonal are left out.
        sized: whether the sizes of the terms of ``squares``, ``diagonal`` and ``trace`` are wanted, too: for a result, under
            its key with :data:`SIZES` before it, the sum of the magnitudes of the terms that it is the sum of; nothing where
            there is one term.
    """

    kind: str
    expression: Expression
    rows: tuple[Selection, ...] = ()
    columns: tuple[Selection, ...] = ()
    symmetric: bool = False
    order: str = "auto"
    sized: bool = False


def jacobians(expression: Expression) -> list[Jacobian]:
    """The Jacobians that an expression is made of, each once."""
    return list(dict.fromkeys(_leaves(expression)))


def _leaves(expression: Expression) -> Iterator[Jacobian]:
    if isinstance(expression, Jacobian):
        yield expression
    elif isinstance(expression, Added):
        for part in expression.parts:
            yield from _leaves(part)
    elif isinstance(expression, Composed):
        yield from _leaves(expression.left)
        yield from _leaves(expression.right)
    else:
        yield from _leaves(expression.of)


__all__ = [
    "SIZES", "Added", "AlgebraRequest", "Composed", "Expression", "Jacobian", "OfExpression", "Scaled", "Selection", "Transposed",
    "jacobians",
]  # fmt: skip
