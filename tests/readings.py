"""What the tests of readings share: whether two readings of a call's arguments are the same."""

from typing import Any

from torch import Tensor


def same(one: Any, two: Any) -> bool:
    """Whether two readings agree: tensors by identity, numbers also in their type."""
    if isinstance(one, (list, tuple)):
        return type(one) is type(two) and len(one) == len(two) and all(map(same, one, two))
    return one is two or (type(one) is type(two) and not isinstance(one, Tensor) and one == two)
