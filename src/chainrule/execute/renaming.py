"""Instructions on values of other names."""

from __future__ import annotations

from typing import Any

from chainrule.maps.staging import Instruction, Ref, reads


def renamed(instruction: Instruction, names: dict[int, int]) -> Instruction:
    """The same instruction on values of other names."""
    if names.keys().isdisjoint(reads(instruction)):
        return instruction
    function, args, kwargs, outputs, is_tuple, writes, keep = instruction
    kwargs = {name: _renamed(item, names) for name, item in kwargs.items()} if kwargs else kwargs
    return Instruction(function, _renamed(args, names), kwargs, outputs, is_tuple, writes, keep)


def _renamed(tree: Any, names: dict[int, int]) -> Any:
    kind = tree.__class__
    if kind is Ref:
        return Ref(names.get(tree.slot, tree.slot))
    if kind is list:
        return [_renamed(item, names) for item in tree]
    if kind is tuple:
        return tuple([_renamed(item, names) for item in tree])
    return tree
