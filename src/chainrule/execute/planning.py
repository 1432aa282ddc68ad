"""Making the plan of a request: by running it, or without running anything."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any

import torch
from torch.autograd import forward_ad

from chainrule.batching.mode import VmapMode
from chainrule.capture.tape import Tape
from chainrule.dispatch import functions_are_replaced, functions_aside
from chainrule.execute.cached_plans import CachedPlan
from chainrule.execute.collection import postponed_collection
from chainrule.execute.replay import bare, owned, without_values
from chainrule.maps.dry_run import DryRun, NotDryError, dry, is_complete
from chainrule.plan.algebra import AlgebraRequest, plan_algebra
from chainrule.plan.planner import Planned, Request, plan
from chainrule.settings import setting

#: From so many entries on, a Jacobian is planned without being run.
_LARGE = 1 << 17

#: The modes that see none of the calls of a plan which is made without being run.
_MODES = frozenset({Tape, VmapMode})

#: Whether all plans are made so.
_FRUGAL: ContextVar[bool] = ContextVar("chainrule_frugal", default=False)


def frugal() -> AbstractContextManager[None]:
    """Plans that are made inside need no more memory than their later runs."""
    return setting(_FRUGAL, True)


def is_large(tape: Any, request: Request | AlgebraRequest) -> bool:
    """Whether the first run of a plan is to hold no more than later ones do."""
    if not isinstance(request, Request) or request.kind not in ("jacobian", "pull", "push"):
        return False
    if _FRUGAL.get():
        return True
    outputs, inputs = ([tape.values[slot].numel() for slot in set(slots)] for slots in (request.outputs, request.inputs))
    return request.kind == "jacobian" and sum(outputs) * sum(inputs) >= _LARGE


def planned_dry(tape: Any, request: Request | AlgebraRequest, seeds: Sequence[torch.Tensor]) -> CachedPlan | None:
    """The plan of a request, which nothing is run for; None where it can be made by running it only."""
    modes = range(torch._C._len_torch_dispatch_stack())
    if forward_ad._current_level >= 0 or any(torch._C._get_dispatch_stack_at(place).__class__ not in _MODES for place in modes):
        return None
    if torch._C._are_functorch_transforms_active() or functions_are_replaced():
        return None
    try:
        with dry():
            planned = plan_of(tape, request, seeds)
            results = owned(planned.program, planned.results)
    except (NotDryError, NotImplementedError, RuntimeError, TypeError, ValueError, AttributeError, IndexError):
        return None  # what is wrong with the request itself is said by the run
    if not isinstance(planned.program, DryRun) or not is_complete(planned.program):
        return None
    recorded = (without_values(planned.program), [bare(r) for r in results])
    return CachedPlan(planned.keys, recorded, staged=request.kind in ("pull", "push"))


def plan_of(
    tape: Any, request: Request | AlgebraRequest, seeds: Sequence[torch.Tensor], *, compare: bool = False
) -> Planned:
    """The plan of a request, which is run as it is made unless this is a dry run; ``compare`` tells all orders' costs."""
    with postponed_collection(), functions_aside():
        if isinstance(request, AlgebraRequest):
            return plan_algebra(tape, request, seeds)
        return plan(tape, request, seeds, compare=compare)


def key_of(tape: Any, request: Request | AlgebraRequest, seeds: Sequence[torch.Tensor]) -> Any:
    """The key of the plan of a request."""
    return (tape.signature(request), tuple([(seed.shape, seed.dtype) for seed in seeds]) if seeds else ())
