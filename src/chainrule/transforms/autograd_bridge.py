"""torch.autograd inside a transformed function: ``autograd.grad``, ``backward`` and users' ``autograd.Function``.

A tape does not ask torch to build a graph (it would cost every op), so torch's engine does not know the tape's tensors.
Three entry points of torch are wrapped once, when chainrule is imported; outside of a chainrule transform, and for tensors
that torch's own graph knows, they do exactly what they did before:

- the backward engine: a request for gradients with respect to tensors of an active tape is answered from the tape;
- ``autograd.Function.apply``: on tensors of an active tape the call is recorded as one op whose derivative is the
  user's own ``backward`` (and ``jvp``);
- ``torch.utils.checkpoint`` without reentry: what it would run is run, and nothing is computed anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch.autograd.variable import Variable
from torch.nn.modules._functions import BackwardHookFunction
from torch.utils import checkpoint
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from chainrule.batching.arguments import APPLY_CODES
from chainrule.batching.duals import refuse_duals
from chainrule.batching.mode import VmapMode
from chainrule.batching.tensor import BatchTensor, wrap_batched, wrap_constant
from chainrule.capture.slots import Slot
from chainrule.capture.tape import Tape
from chainrule.dispatch import TAKEN, LightMode, undispatched
from chainrule.execute.engine import execute
from chainrule.modes_off import without_innermost
from chainrule.plan.planner import Request
from chainrule.rules.batching_base import Batched
from chainrule.rules.custom_function import FunctionContext, FunctionOp, packed
from chainrule.rules.opaque import OWN_GRAPH
from chainrule.transforms.merged import APART, Apart

_UNUSED = (
    "One of the differentiated Tensors appears to not have been used in the graph. Set allow_unused=True if this is the desired "
    "behavior."
)


class EngineBridge:
    """torch's backward engine, with requests about taped tensors answered from the tape."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        """Everything else is torch's engine."""
        return getattr(self._engine, name)

    def run_backward(self, tensors: Sequence[Any], grad_tensors: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        """Compute gradients; the arguments are those of torch's engine."""
        if OWN_GRAPH.asked:
            _expect_saved(views=False)
        elif torch._C._len_torch_dispatch_stack():
            names = ("keep_graph", "create_graph", "inputs", "allow_unreachable", "accumulate_grad")
            options = dict(zip(names, args, strict=False)) | kwargs
            tape = _tape_for(tensors, options.get("inputs") or ())
            if tape is not None:
                return _answer(tape, tensors, grad_tensors, options)
            if (mode := _mapped_by(tensors)) is not None and _asks_outside(mode, tensors, options):
                return self._by_samples(mode, tensors, grad_tensors, options)
        _expect_saved()
        return self._engine.run_backward(tensors, grad_tensors, *args, **kwargs)

    def _by_samples(
        self, mode: VmapMode, outputs: Sequence[Any], cotangents: Sequence[Any], options: dict[str, Any]
    ) -> tuple[Any, ...]:
        """Gradients with respect to tensors from outside of a mapped function, which the graph of the stored tensors knows."""
        inputs = list(options.get("inputs") or ())
        results: dict[int, Any] = {}
        inner = [number for number, item in enumerate(inputs) if item.__class__ is BatchTensor]
        if inner:
            known = options | {"keep_graph": True, "inputs": tuple([inputs[number] for number in inner])}
            results.update(zip(inner, self._engine.run_backward(outputs, cotangents, **known), strict=True))
        outer = [number for number in range(len(inputs)) if number not in inner]
        stored = [(out, _seed_of(out, seed)) for out, seed in zip(outputs, cotangents, strict=True)]
        with undispatched():
            pairs = [[_samples(item, mode) for item in pair] for pair in stored]
            pairs = [pair for pair in pairs if _requires_grad(pair[0])]
            found = [
                torch.autograd.grad(
                    [out[sample] for out, _ in pairs], [inputs[number] for number in outer], [seed[sample] for _, seed in pairs],
                    retain_graph=True, create_graph=bool(options.get("create_graph")), allow_unused=True,
                )
                for sample in range(mode.size if pairs else 0)
            ]  # fmt: skip
            rows = [None if any(g is None for g in column) else torch.stack(column) for column in zip(*found, strict=True)]
        for number, row in zip(outer, rows or [None] * len(outer), strict=True):
            results[number] = None if row is None else wrap_batched(Batched(row), mode)
        if not options.get("allow_unreachable") and any(result is None for result in results.values()):
            raise RuntimeError(_UNUSED)
        return tuple([results[number] for number in range(len(inputs))])


def _expect_saved(*, views: bool = True) -> None:
    """Tell the tapes that what torch's autograd has kept may come back, and views that it has made."""
    for mode in _get_current_dispatch_mode_stack() if torch._C._len_torch_dispatch_stack() else ():
        if isinstance(mode, Tape):
            mode.expect_saved(views=views)


def _node_of(mode: LightMode, tensor: torch.Tensor) -> Any:
    """``Tensor.grad_fn``: by a node of torch's graph one gets at what it has kept."""
    _expect_saved()
    return tensor.grad_fn


def _mapped_by(outputs: Sequence[Any]) -> VmapMode | None:
    """The innermost vmap, if outputs are tensors of it."""
    for mode in reversed(_get_current_dispatch_mode_stack()):
        if isinstance(mode, VmapMode):
            return mode if any(o.__class__ is BatchTensor and o.level is mode for o in outputs) else None
    return None


def _asks_outside(mode: VmapMode, outputs: Sequence[Any], options: dict[str, Any]) -> bool:
    """Whether a request is for gradients with respect to tensors from outside of a mapped function.

    Raises:
        RuntimeError: if it is one that cannot be answered.
    """
    inputs = options.get("inputs") or ()
    if inputs:
        asked = any([_has_graph(item) and (item.__class__ is not BatchTensor or not mode.graphs) for item in inputs])
    else:
        asked = not mode.graphs and any([_has_graph(output) for output in outputs])
    mapped = any([item.__class__ is BatchTensor for item in inputs]) and not mode.graphs
    if asked and (mapped or not inputs or options.get("accumulate_grad") or torch._C._len_torch_dispatch_stack() > 1):
        raise RuntimeError(
            "vmap: torch.autograd was asked, inside of a mapped function, for gradients with respect to tensors from outside of "
            "it (or to what was computed on the way from them). Use chainrule.grad, with these tensors as arguments."
        )
    return asked


def _requires_grad(tensor: torch.Tensor) -> bool:
    """What torch says of a tensor: modes say otherwise of those that they differentiate with respect to."""
    with torch._C.DisableTorchFunction():
        return tensor.requires_grad


def _has_graph(tensor: torch.Tensor) -> bool:
    return _requires_grad(tensor) or (tensor.__class__ is BatchTensor and _requires_grad(tensor.value))


def _seed_of(output: torch.Tensor, cotangent: Any) -> Any:
    if cotangent is not None:
        return cotangent
    if output.numel() != 1:
        raise RuntimeError("grad can be implicitly created only for scalar outputs")
    return torch.ones_like(output)


def _samples(tensor: Any, mode: VmapMode) -> torch.Tensor:
    """The stored tensor, with a batch dimension."""
    if tensor.__class__ is not BatchTensor:
        return tensor.expand(mode.size, *tensor.shape)  # type: ignore[no-any-return]
    value: torch.Tensor = tensor.value
    return value if tensor.batched else value.expand(mode.size, *value.shape)


def _tape_for(outputs: Sequence[Any], inputs: Sequence[Any]) -> Tape | None:
    """The innermost tape that alone can answer: it knows tensors that torch's graph does not."""
    if not all(isinstance(t, torch.Tensor) for t in (*outputs, *inputs)):
        return None
    # The graph of mapped tensors themselves lacks what ran on the stored ones.
    foreign = [t for t in (inputs or outputs) if t.__class__ is BatchTensor or not _requires_grad(t)]
    innermost = True
    for mode in reversed(_get_current_dispatch_mode_stack()):
        if not isinstance(mode, Tape):
            continue
        # What torch keeps for its backward may be tensors that the tape has not seen: the tape itself has all of them.
        if innermost and inputs and all(mode.is_active(t) for t in inputs) and any(mode.is_active(t) for t in outputs):
            return mode
        innermost = False
        if foreign and all(mode.is_active(t) for t in foreign):
            return mode
    return None


def _answer(tape: Tape, outputs: Sequence[torch.Tensor], cotangents: Sequence[Any], options: dict[str, Any]) -> Any:
    inputs = list(options.get("inputs") or ())
    accumulate = bool(options.get("accumulate_grad"))
    if not inputs:
        inputs = [tape.values[slot] for slot in tape.inputs]
    seeds, slots = [], []
    for output, cotangent in zip(outputs, cotangents, strict=True):
        slot = tape.slot_of(output)
        if slot is None or not tape.active[slot]:
            continue
        if cotangent is None:
            if output.numel() != 1:
                raise RuntimeError("grad can be implicitly created only for scalar outputs")
            cotangent = torch.ones_like(output)
        seeds.append(cotangent)
        slots.append(slot)
    slots_of = [tape.slot_of(t) for t in inputs]
    wanted = [None if slot is None else tape.sources.get(slot, slot) for slot in slots_of]
    known = tuple(dict.fromkeys(slot for slot in wanted if slot is not None))
    request = Request("pull", known, tuple(slots), "auto", tuple(slots))
    found = execute(tape, request, seeds) if slots else {}
    results = [None if slot is None else found.get(slot) for slot in wanted]
    if not options.get("create_graph"):
        results = [None if r is None else r.detach() for r in results]
    if accumulate:
        for tensor, result in zip(inputs, results, strict=True):
            if result is not None:
                tensor.grad = result if tensor.grad is None else tensor.grad + result
        return ()
    if not options.get("allow_unreachable") and any(r is None for r in results):
        raise RuntimeError(_UNUSED)
    return tuple(results)


def _apply_function(original: Callable[..., Any], function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``function.apply`` under the modes that are active: peeled off one by one, innermost first."""
    stack = _get_current_dispatch_mode_stack()
    if not stack or not any(isinstance(mode, (Tape, VmapMode)) for mode in stack):
        return original(*args, **kwargs)
    if function.__module__.startswith("torch.utils.checkpoint"):
        # Reentrant checkpointing is no derivative of its own: run what it would run. The other kind saves its inputs by such a
        # function in some versions of torch, and does nothing where that has no graph.
        return torch.empty((0,)) if function.__name__ == "_NoopSaveInputs" else args[0](*args[2:])
    _expect_saved(views=False)
    if function is BackwardHookFunction:
        raise RuntimeError(
            "chainrule: full backward hooks of modules (register_full_backward_hook, register_full_backward_pre_hook) are not "
            "heeded inside of a transform. Remove them, or register hooks on tensors in forward: Tensor.register_hook is heeded."
        )
    mode = stack[-1]
    if isinstance(mode, Tape):
        return _apply_under_tape(original, function, mode, args, kwargs)
    if isinstance(mode, VmapMode) and _batched(mode, args) and _has_own_vmap(function):
        return _apply_own_vmap(function, mode, args)
    if isinstance(mode, VmapMode) and any(isinstance(m, Tape) for m in stack) and _batched(mode, args):
        return _apply_per_sample(original, function, mode, args, kwargs)
    if isinstance(mode, VmapMode):
        return original(*args, **kwargs)
    with without_innermost():
        return _apply_function(original, function, args, kwargs)


def _apply_under_tape(
    original: Callable[..., Any], function: Any, tape: Tape, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    refuse_duals(args, f"autograd.Function {function.__name__} inside of a transform")
    touched = tape.touches(args) and not tape.is_blocked(args)
    if not touched:
        with without_innermost():
            return _apply_function(original, function, args, kwargs)
    copies: dict[int, torch.Tensor] = {}
    given = args
    with without_innermost():
        if _marks_dirty(function):
            # What it writes to may be read by derivatives before: it gets copies, whose values are written back as by any op.
            given = tuple([tape.outside(torch.ops.aten.clone.default, a) if isinstance(a, torch.Tensor) else a for a in args])
            copies = {id(one): two for one, two in zip(given, args, strict=True) if one is not two}
        outputs, context = _run_forward(original, function, given, kwargs)
    several = isinstance(outputs, (tuple, list))
    flat = list(outputs) if several else [outputs]
    fresh: list[Any] = []
    for out in flat:
        if isinstance(out, torch.Tensor) and tape.slot_of(out) is not None:
            # An input returned as it is (or written to) is a new value of the function.
            with without_innermost():
                out = tape.outside(torch.ops.aten.alias.default, out)
        fresh.append(out)
    _record_function(tape, function, args, kwargs, context, fresh)
    written = getattr(context, "dirty_tensors", flat) if copies else ()
    for number, out in enumerate(flat if written else ()):
        if (target := copies.get(id(out))) is not None and any(out is one for one in written):
            fresh[number] = target.copy_(fresh[number])
    return (tuple(fresh) if isinstance(outputs, tuple) else fresh) if several else fresh[0]


def _marks_dirty(function: Any) -> bool:
    """Whether a user's function says that it writes to its arguments."""
    codes = [getattr(call, "__code__", None) for call in (function.forward, function.setup_context)]
    return any("mark_dirty" in code.co_names for code in codes if code is not None)


def _run_forward(original: Callable[..., Any], function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Run the forward once, outside of the innermost tape; return the outputs and the context for ``backward``."""
    stack = _get_current_dispatch_mode_stack()
    for number, mode in enumerate(stack):
        if isinstance(mode, VmapMode) and any(isinstance(m, Tape) and m.touches(_inner(args, mode)) for m in stack[:number]):
            raise RuntimeError(
                f"chainrule: autograd.Function {function.__name__} is differentiated both inside and outside of a vmap; "
                "its own backward cannot be kept for the outer derivative. Move the vmap outside of all derivatives."
            )
    if any(isinstance(m, Tape) for m in stack):
        outer = next(m for m in reversed(stack) if isinstance(m, Tape))
        if outer is stack[-1] and outer.touches(args):
            return _forward_and_record_outer(original, function, outer, args, kwargs)
    if torch.is_grad_enabled() and not stack and any(isinstance(a, torch.Tensor) and _requires_grad(a) for a in args):
        outputs = original(*args, **kwargs)
        first = outputs[0] if isinstance(outputs, (tuple, list)) else outputs
        if isinstance(first, torch.Tensor) and first.grad_fn is not None:
            return outputs, first.grad_fn
        return outputs, FunctionContext(tuple(False for _ in args))
    context = FunctionContext(tuple(isinstance(a, torch.Tensor) and a.dtype.is_floating_point for a in args))
    with torch.no_grad():
        if function.setup_context is torch.autograd.Function.setup_context:
            return function.forward(context, *args, **kwargs), context
        innermost = stack[-1] if stack else None
        if isinstance(innermost, VmapMode) and _batched(innermost, args) and _has_own_vmap(function):
            outputs = _apply_own_vmap(function, innermost, args)
        else:
            outputs = function.forward(*args, **kwargs)
        function.setup_context(context, args, outputs)
        return outputs, context


def _forward_and_record_outer(
    original: Callable[..., Any], function: Any, outer: Tape, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Any]:
    """A tape outside of the innermost one sees the inputs too: it records the same call with the same context."""
    with without_innermost():
        outputs, context = _run_forward(original, function, args, kwargs)
    several = isinstance(outputs, (tuple, list))
    flat = list(outputs) if several else [outputs]
    if not outer.is_blocked(args, kwargs):
        _record_function(outer, function, args, kwargs, context, flat)
    return outputs, context


def _record_function(
    tape: Tape, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], context: Any, outputs: Sequence[Any]
) -> None:
    """Append a call of a user's function to a tape.

    Several outputs are one vector there, and pieces of it: `backward`, which need not be linear, is given all their cotangents
    at once. Not where it wants None for those that are missing: these would be zeros.
    """
    inert = {id(t) for t in getattr(context, "non_differentiable", None) or ()}
    static = tuple(item for item in args if not isinstance(item, torch.Tensor))
    lowered = (Slot(tape.add_object(context)), *tape.lower(args))
    recorded = [out if isinstance(out, torch.Tensor) and id(out) not in inert else None for out in outputs]
    parts = [out for out in recorded if out is not None and out.is_floating_point()]
    together = len(parts) > 1 and len({id(out) for out in parts}) == len(parts) and getattr(context, "materialize_grads", True)
    if not together or len({(out.dtype, out.device) for out in parts}) > 1:
        tape.record_lowered(FunctionOp(function, static), lowered, tape.lower_kwargs(kwargs), recorded)
        return
    with without_innermost():
        vector, flat = packed(parts), [out.reshape(-1) for out in parts]
    layout = tuple(tuple(out.shape) if out is not None and out.is_floating_point() else None for out in recorded)
    tape.record_lowered(FunctionOp(function, static, layout), lowered, tape.lower_kwargs(kwargs), [vector])
    none = tape.lower_kwargs({})
    sizes = [out.numel() for out in parts]
    tape.record_lowered(torch.ops.aten.split_with_sizes.default, tape.lower((vector, sizes)), none, flat)
    for part, out in zip(flat, parts, strict=True):
        tape.record_lowered(torch.ops.aten.view.default, tape.lower((part, list(out.shape))), none, [out])


def _inner(args: Sequence[Any], mode: VmapMode) -> list[Any]:
    return [a.value if isinstance(a, BatchTensor) and a.level is mode else a for a in args]


def _batched(mode: VmapMode, args: Sequence[Any]) -> bool:
    return any(isinstance(a, BatchTensor) and a.level is mode and a.batched for a in args)


def _has_own_vmap(function: Any) -> bool:
    return function.vmap is not torch.autograd.Function.vmap


class VmapInfo(NamedTuple):
    """What a user's ``vmap`` staticmethod is told about the level, with torch's names."""

    batch_size: int
    randomness: str


def _apply_own_vmap(function: Any, mode: VmapMode, args: tuple[Any, ...]) -> Any:
    """The user's ``vmap`` staticmethod, on the stored tensors; it says where its outputs carry the batch.

    Raises:
        RuntimeError: the staticmethod does not return a pair, or its ``out_dims`` do not fit its outputs.

    """
    APART.met += 1
    if mode.merged:
        raise Apart
    batched = [isinstance(a, BatchTensor) and a.level is mode and a.batched for a in args]
    in_dims = tuple(0 if is_batched else None for is_batched in batched)
    with without_innermost():
        returned = function.vmap(VmapInfo(mode.size, mode.randomness), in_dims, *_inner(args, mode))
        if not (isinstance(returned, tuple) and len(returned) == 2):
            raise RuntimeError(
                f"vmap: {function.__name__}.vmap should return a pair (outputs, out_dims); it returned {type(returned).__name__}"
            )
        outputs, out_dims = returned
        several = isinstance(outputs, (tuple, list))
        flat = list(outputs) if several else [outputs]
        dims = list(out_dims) if isinstance(out_dims, (tuple, list)) else [out_dims] * len(flat)
        if len(dims) != len(flat):
            raise RuntimeError(
                f"vmap: {function.__name__}.vmap returned {len(flat)} outputs, but out_dims for {len(dims)}: {out_dims}"
            )
        stored = [
            Batched(out.movedim(dim, 0)) if isinstance(out, torch.Tensor) and dim is not None else out
            for out, dim in zip(flat, dims, strict=True)
        ]
    wrapped = [
        wrap_batched(out, mode)
        if isinstance(out, Batched)
        else wrap_constant(out, mode)
        if isinstance(out, torch.Tensor)
        else out
        for out in stored
    ]
    return tuple(wrapped) if several else wrapped[0]


def _apply_per_sample(
    original: Callable[..., Any], function: Any, mode: VmapMode, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Under a vmap inside of a derivative: one call per sample, so that each is recorded with its own backward."""
    with without_innermost():
        outputs = []
        for number in range(mode.size):
            sample = [
                (a.value[number] if a.batched else a.value) if isinstance(a, BatchTensor) and a.level is mode else a
                for a in args
            ]
            outputs.append(_apply_function(original, function, tuple(sample), kwargs))
        several = isinstance(outputs[0], (tuple, list))
        stacked = [torch.stack(column) for column in (zip(*outputs, strict=True) if several else [outputs])]
    mode.fallbacks.append(f"autograd.Function {function.__name__}")
    wrapped = [wrap_batched(Batched(value), mode) for value in stacked]
    return tuple(wrapped) if several else wrapped[0]


def _plain_apply() -> Callable[..., Any]:
    """Torch's own `Function.apply` as a function of the class: a Python function up to torch 2.13, then one in C."""
    method = torch.autograd.Function.__dict__["apply"]
    if isinstance(method, classmethod):
        return method.__func__

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        return method.__get__(None, cls)(*args, **kwargs)

    APPLY_CODES.append(apply.__code__)
    return apply


class _NoRecomputation:
    """The context in which checkpointing packs what torch's graph saves, but inside of a transform.

    What the graph saves there are tensors of the transform's levels and plans: running the function once more, after the
    transform has ended, would not give them.

    Args:
        hooks: torch's context.
    """

    def __init__(self, hooks: Any) -> None:
        self._hooks = hooks
        self._entered = not any(
            isinstance(mode, (Tape, VmapMode)) for mode in _get_current_dispatch_mode_stack()
        )

    def __enter__(self) -> None:
        if self._entered:
            self._hooks.__enter__()

    def __exit__(self, *error: object) -> None:
        if self._entered:
            self._hooks.__exit__(*error)


def install() -> None:
    """Wrap torch's entry points (once)."""
    engine = Variable._execution_engine  # type: ignore[attr-defined]
    if isinstance(engine, EngineBridge):
        return
    Variable._execution_engine = EngineBridge(engine)  # type: ignore[attr-defined,assignment]
    plain = _plain_apply()

    @wraps(plain)
    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if torch._C._len_torch_dispatch_stack():
            return _apply_function(lambda *a, **k: plain(cls, *a, **k), cls, args, kwargs)
        return plain(cls, *args, **kwargs)

    hooks = getattr(checkpoint, "_checkpoint_hook", None)
    if hooks is not None:
        checkpoint._checkpoint_hook = lambda *args: _NoRecomputation(hooks(*args))  # type: ignore[misc, assignment]
    TAKEN[torch.Tensor.grad_fn.__get__] = _node_of  # type: ignore[union-attr]
    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[assignment, method-assign]


__all__ = ["EngineBridge", "install"]
