"""Trees of arguments are put together as torch's pytree does it."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

import chainrule
from chainrule.transforms.arguments import tree_flatten, tree_unflatten

Pair = namedtuple("Pair", ["one", "two"])

TREES: list[Any] = [
    0, (), [], {}, (1,), [1, 2], {"b": 1, "a": 2}, {"a": [1, (2, {"c": 3})], "b": ()}, Pair(1, {"a": 2}),
    OrderedDict([("z", 1), ("a", [2, 3])]), ({"a": Pair([1], 2)}, [OrderedDict(b=3)], None),
]  # fmt: skip


@pytest.mark.parametrize("tree", TREES, ids=repr)
def test_trees_come_back(tree: Any) -> None:
    leaves, spec = tree_flatten(tree)
    found = tree_unflatten(leaves, spec)
    assert found == tree == pytree.tree_unflatten(leaves, spec)
    assert type(found) is type(tree)


def test_too_few_leaves_are_refused() -> None:
    _, spec = tree_flatten({"a": 1, "b": [2, 3]})
    with pytest.raises(ValueError, match="leaves"):
        tree_unflatten([1, 2], spec)


def test_pullbacks_keep_the_order_and_kinds_of_their_arguments() -> None:
    x = torch.randn(3, dtype=torch.float64)
    given = {"b": Pair(x, [x * 2]), "a": OrderedDict(y=x * 3)}
    _, pull = chainrule.vjp(lambda t: t["b"].one * t["b"].two[0] + t["a"]["y"] ** 2, given)
    for scale in (1.0, 2.0):  # the second cotangent of one run takes a shorter way
        (found,) = pull(torch.full((3,), scale, dtype=torch.float64))
        assert list(found) == ["b", "a"]
        assert type(found["b"]) is Pair and type(found["a"]) is OrderedDict
        torch.testing.assert_close(found["b"].one, scale * 2 * x)
        torch.testing.assert_close(found["b"].two[0], scale * x)
        torch.testing.assert_close(found["a"]["y"], scale * 6 * x)


def test_cotangents_of_other_kinds_on_one_run() -> None:
    x = torch.randn(4, dtype=torch.float64)
    _, pull = chainrule.vjp(torch.sin, x)
    several = torch.randn(5, 4, dtype=torch.float64)
    for _ in range(2):
        torch.testing.assert_close(pull(several[0])[0], several[0] * x.cos())
        torch.testing.assert_close(chainrule.vmap(pull)(several)[0], several * x.cos())
        torch.testing.assert_close(chainrule.jvp(lambda c: pull(c)[0], (several[0],), (several[1],))[1], several[1] * x.cos())
