"""Runs of the innermost function of a nest, and the plans that are known for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from chainrule.batching.mode import VmapMode
from chainrule.batching.tensor import BatchTensor
from chainrule.capture.numbers import note_numbers
from chainrule.capture.tape import Tape
from chainrule.dispatch import entry_point, is_differentiated
from chainrule.execute import engine
from chainrule.execute.cached_plans import CachedPlan
from chainrule.shortcuts import FLOATING
from chainrule.transforms.arguments import flatten_inputs, resolve_argnums, structure_key, tree_flatten
from chainrule.transforms.levels import Chain, Level, Part, Run, agree, note_apart
from chainrule.transforms.nest_routes import given_key
from chainrule.transforms.trace import PLAIN_CLASSES, Traced, trace
from chainrule.transforms.vmap import Mapping

#: In place of a plan: this nest is run level by level.
BY_LEVELS = CachedPlan([], None)


def run_of(chain: Chain, traced: Traced, seeds: tuple[torch.Tensor, ...] = ()) -> Run | None:
    """A run by the route of a nest, as it goes on; None where it cannot run as a whole."""
    levels = chain.levels[0]
    if len(levels) > 1 and (traced.tape.hooks or not agree(levels, traced.tape)):
        note_apart(levels)
        return None
    traced.in_leaves = [traced.tape.values[slot] for slot in traced.in_slots]
    number: Any = 0 if levels[0].argnums is None else levels[0].argnums
    wanted = [((number,), level.argnums is not None) for level in levels]
    key, cached = cached_for(nest_key(levels, wanted, traced, seeds), [traced.tape])
    return Run([Part(levels, wanted, traced)], traced.tape.values, key, cached)


class _NotWhole(Exception):  # noqa: N818 - never leaves this module
    """This nest cannot run as a whole."""


def run_innermost(
    chain: Chain, args: tuple[Any, ...], kwargs: dict[str, Any], seeds: tuple[torch.Tensor, ...] = (), *, owned: bool = False
) -> Run | None:
    """Run the innermost function and look the plan up; None where the nest cannot run as a whole.

    With ``owned``, mapped tensors among the arguments were made for this run.
    """
    parts: list[Part] = []
    try:
        _run_part(chain, len(chain.levels) - 1, args, kwargs, (), parts, owned=owned)
    except _NotWhole:
        return None
    keys: list[Any] = [nest_key(part.levels, part.wanted, part.traced, seeds) for part in parts]
    values = parts[-1].traced.tape.values
    if len(parts) > 1:
        values, wiring = _stored_values(parts)
        keys.append(wiring)
    return Run(parts, values, *cached_for(keys[0] if len(keys) == 1 else tuple(keys), [part.traced.tape for part in parts]))


def _run_part(
    chain: Chain, number: int, args: tuple[Any, ...], kwargs: dict[str, Any], around: Sequence[Any], parts: list[Part], *,
    owned: bool = False,
) -> None:
    """Run the function of a part, which runs the parts inside of it, and append all of them."""
    levels = chain.levels[number]
    wanted, union = _positions(levels, args)
    func, first, has_aux = levels[0].func, levels[0], levels[0].has_aux
    if number:
        func = entry_point(lambda *args, **kwargs: _run_mapped(chain, number - 1, args, kwargs, parts))
    several = len(levels) > 1 or len(chain.levels) > 1
    traced = trace(
        func, args, union, kwargs, first.name, has_aux=has_aux, respect_no_grad=several or first.respect_no_grad, owned=owned
    )
    if traced.hidden or (several and (traced.tape.hooks or not agree([n for part in chain.levels for n in part], traced.tape))):
        # Hooks are those of the innermost level alone.
        note_apart(chain.levels[0])
        raise _NotWhole
    traced.in_leaves = [traced.tape.values[slot] for slot in traced.in_slots]
    parts.append(Part(levels, wanted, traced, around))


def _positions(levels: Sequence[Level], args: tuple[Any, ...]) -> tuple[list[tuple[tuple[int, ...], bool]], tuple[int, ...]]:
    """For each level the positions of what it differentiates, and whether that is one; and all of these positions."""
    count = len(args)
    number = levels[0].argnums
    if number is None and count == 1:
        number = 0
    if number.__class__ is int and 0 <= number < count:  # type: ignore[operator]
        # One tensor, the same for all levels.
        arg, argnums = args[number], [level.argnums for level in levels]  # type: ignore[index]
        if arg.__class__ in PLAIN_CLASSES and arg.dtype in FLOATING:
            if all([n.__class__ is int and n == number or n is None and count == 1 for n in argnums]):
                chosen: tuple[int, ...] = (number,)  # type: ignore[assignment]
                return [(chosen, n is not None) for n in argnums], chosen
    wanted = []
    checked: tuple[int, ...] = ()
    for level in reversed(levels):
        if level.argnums is None:
            positions, single = tuple(range(count)), False
        else:
            positions, single = resolve_argnums(level.argnums, count, level.name)
        if positions != checked:
            flatten_inputs(tuple([args[p] for p in positions]), level.name)
            checked = positions
        wanted.append((positions, single))
    wanted.reverse()
    union = wanted[0][0]
    if any(positions != union for positions, _ in wanted):
        union = tuple(sorted({p for positions, _ in wanted for p in positions}))
        if not all(isinstance(args[p], torch.Tensor) for p in union):
            raise _NotWhole
    return wanted, union


def _run_mapped(
    chain: Chain, number: int, args: tuple[Any, ...], kwargs: dict[str, Any], parts: list[Part]
) -> list[torch.Tensor]:
    """Run a part inside of the mappings that lead to it; returns the stored outputs of its function."""
    around: list[tuple[Mapping, VmapMode]] = []

    def enter(mappings: list[Mapping], args: tuple[Any, ...]) -> None:
        if not mappings:
            _run_part(chain, number, args, kwargs, around, parts)
            return
        _, mode = mappings[0].enter(lambda *mapped: enter(mappings[1:], mapped), args)
        around.insert(0, (mappings[0], mode))
        if not mode.size:
            raise _NotWhole

    enter(chain.mappings[number], args)
    return [_stored(leaf, around)[0] for leaf in parts[-1].traced.out_leaves]


def _stored(tensor: Any, around: Sequence[tuple[Mapping, VmapMode]]) -> tuple[Any, tuple[bool, ...]]:
    """The tensor behind one of some mappings, and for each of their levels on the way to it whether it is batched there."""
    flags: list[bool] = []
    while tensor.__class__ is BatchTensor and any(tensor.level is mode for _, mode in around):
        flags.append(tensor.batched)
        tensor = tensor.value
    return tensor, tuple(flags)


def _stored_values(parts: Sequence[Part]) -> tuple[list[Any], Any]:
    """All stored values of the tapes of some parts, each once, and how the tapes are made of them."""
    values = [*parts[-1].traced.tape.values]
    known = {id(value): number for number, value in enumerate(values)}
    wiring: list[Any] = []
    around: list[tuple[Mapping, VmapMode]] = []
    for part in reversed(parts[:-1]):
        around.extend(part.around)
        for mapping, mode in part.around:
            dims, spec = tree_flatten(mapping.out_dims)
            wiring.append((mode.size, tuple(dims), structure_key(spec)))
        for value in part.traced.tape.values:
            tensor, flags = _stored(value, around)
            number = known.get(id(tensor))
            if number is not None:
                wiring.append((number, flags))
                continue
            known[id(tensor)] = len(values)
            values.append(tensor)
            wiring.append((flags, tensor.shape, tensor.dtype, tensor.device) if isinstance(tensor, torch.Tensor) else None)
    return values, tuple(wiring)


def nest_key(
    levels: Sequence[Level],
    wanted: Sequence[tuple[tuple[int, ...], bool]],
    traced: Traced,
    seeds: tuple[torch.Tensor, ...],
) -> Any:
    """The key of the program of a part of a nest."""
    # What another transform differentiates takes no kernels (see `is_only_mapped`).
    around = ("differentiated",) if is_differentiated() else ()
    return traced.tape.signature(
        (
            *around,
            tuple([(level.key, *place) for level, place in zip(levels, wanted, strict=True)]),
            structure_key(traced.in_spec),
            structure_key(traced.out_spec),
            tuple([
                (leaf.shape, leaf.dtype, leaf.device) if slot is None else slot
                for slot, leaf in zip(traced.out_slots, traced.out_leaves, strict=True)
            ]),
            given_key(seeds, traced.in_leaves),
            traced.grad_enabled,
            # Steps that one level takes for constants look like constants for all of them, which another run may have.
            traced.tape.saw_blocked,
        )
    )


def cached_for(key: Any, tapes: Sequence[Tape]) -> tuple[Any, Any]:
    """The key, None if it is none, and the plan for it."""
    try:
        cached: Any = engine.CACHE.get(key)
    except TypeError:
        key, cached = None, BY_LEVELS
    if cached is None:
        for tape in tapes:
            note_numbers(tape)
        if not all(isinstance(value, torch.Tensor) for tape in tapes for value in tape.values):
            cached = BY_LEVELS
    return key, cached
