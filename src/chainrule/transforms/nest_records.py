"""Records of nests: what all levels compute, written down as one program."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch

from chainrule.capture.recorder import Recorder
from chainrule.execute.accounts import UNCACHED, collecting
from chainrule.execute.collection import postponed_collection
from chainrule.execute.replay import part_constants
from chainrule.maps.first_run import without_long_records
from chainrule.maps.staging import Program, Staged
from chainrule.transforms.arguments import tree_flatten
from chainrule.transforms.levels import Linearized, LinearPlan, NestPlan, Run
from chainrule.transforms.nest_parts import run_parts
from chainrule.transforms.nest_runs import BY_LEVELS


def _distinct(seeds: tuple[torch.Tensor, ...], taken: Collection[int]) -> tuple[torch.Tensor, ...]:
    """Seeds each of which is an object of its own, by which a program that others will serve tells it from the rest."""
    known = set(taken)
    found = []
    for seed in seeds:
        one = torch.ops.aten.alias.default(seed) if id(seed) in known else seed
        known.add(id(one))
        found.append(one)
    return tuple(found)


def recorded_within(run: Run, seeds: tuple[torch.Tensor, ...]) -> tuple[Any, Any]:
    """As :func:`record_parts`, where the record of all levels does not have to be long.

    A record holds every value until it is complete. The plan of a large Jacobian that stands alone is made without running it.

    Raises:
        LongRecordError: if it would be long, and its last level can do without.
    """
    part = run.parts[0]
    alone = len(run.parts) == 1 and run.key is not None and not seeds and len(part.levels) > 1
    if not alone or part.levels[-1].key[0] != "jacobian" or torch._C._len_torch_dispatch_stack():
        return record_parts(run, seeds)
    # What the levels record must not stand on the tape if they are run one by one after all.
    here = replace(part, traced=replace(part.traced, tape=part.traced.tape.fork()))
    with without_long_records():
        return record_parts(replace(run, parts=[here]), seeds)


def record_parts(
    run: Run, seeds: tuple[torch.Tensor, ...], made: list[torch.Tensor] | None = None
) -> tuple[Any, Any]:
    """Run the levels and write down what they compute as one program."""
    slots = {id(value): slot for slot, value in enumerate(run.values)}
    seeds = _distinct(seeds, slots)
    numbers = {id(seed): number for number, seed in enumerate(seeds)}

    def find(program: Program, tensor: torch.Tensor) -> Staged | None:
        slot = slots.get(id(tensor))
        if slot is not None:
            return program.input(slot, tensor)
        number = numbers.get(id(tensor))
        if number is None and made:
            number = next((n for n, seed in enumerate(made) if seed is tensor), None)
        return None if number is None else program.input(("seed", number), tensor)

    recorder = Recorder(find)
    with postponed_collection(), recorder, collecting(UNCACHED):
        run.traced.tape.settle()
        result = run_parts(run.parts, seeds, made)
    linear: Linearized | None = None
    if made is not None:
        outputs, pulled, linear = result
        later, spec = tree_flatten(pulled)
        leaves = [*outputs, *later]
    else:
        leaves, spec = tree_flatten(result)
    sources: list[int | None] = [slots.get(id(leaf)) for leaf in leaves]
    staged = [None if source is not None else recorder.staged(leaf) for leaf, source in zip(leaves, sources, strict=True)]
    whole = all(s is not None or source is not None for s, source in zip(staged, sources, strict=True))
    program = recorder.program
    program._input_values.clear()  # a cycle that would hold the tensors of this run
    if not (recorder.pure and whole) or (linear is not None and program.writes):
        return result, BY_LEVELS
    part_constants(program, leaves)
    bare = [None if s is None else Staged(program, s.slot, None) for s in staged]  # type: ignore[arg-type]
    keys = list(range(len(leaves)))
    if linear is not None:
        first = len(linear.leaves)
        plan: NestPlan = LinearPlan(keys, (program, bare), first=first, active=linear.active, out_spec=linear.spec)
    else:
        plan = NestPlan(keys, (program, bare))
    plan.spec, plan.sources = spec, sources
    return result, plan
