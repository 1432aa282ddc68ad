"""`compile`: a nest of transforms as one flat graph per input signature."""

from __future__ import annotations

import dataclasses
import functools
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.autograd import forward_ad
from torch.utils._pytree import keystr, tree_flatten_with_path

from chainrule.capture.reads import NoReads
from chainrule.capture.surroundings import Surroundings
from chainrule.capture.whole_recorder import CompileError, WholeRecorder
from chainrule.execute.accounts import current_ledger, read_ledger
from chainrule.execute.compiled import Flat, Run, run_watched
from chainrule.execute.memory import current_watch, unwatched
from chainrule.execute.simplify import root
from chainrule.maps.staging import Program, Staged
from chainrule.transforms.arguments import LEAF, function_name, structure_key, tree_flatten, tree_unflatten
from chainrule.transforms.compiled_calls import Call, call_of, gradient_kind, tensor_kind
from chainrule.uncompiled import hide_from_dynamo

aten = torch.ops.aten

__all__ = ["BACKENDS", "CacheInfo", "CompileError", "Graph", "OtherValues", "compile", "modes"]

BACKENDS = ("replay", "inductor", "cudagraphs")

#: Signatures that are kept per function.
_SIGNATURES = 64

#: How many graphs one signature may have (what the function reads outside of its arguments may take turns), and how often
#: it is recorded before it runs without a graph.
_GRAPHS = 8
_RECORDINGS = 16

#: So many functions are kept that compare the arguments, run a graph and build the result in one; so many are made per graph
#: (arguments of one signature may differ in what they are more strict about).
_SHORTENED = 8
_CALLS = 2

_STATIC = (int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device, torch.Size)
_AUTOCAST = ("cpu", "cuda")
_PLAIN_TENSORS = frozenset({torch.Tensor, torch.nn.Parameter})


class CacheInfo(NamedTuple):
    """How a compiled function was used.

    Attributes:
        hits: calls that replayed a graph.
        misses: calls that recorded one.
        eager: calls that ran without a graph.
        size: the graphs that are kept.
    """

    hits: int
    misses: int
    eager: int
    size: int


class OtherValues(Exception):  # noqa: N818 - never reaches a user
    """A graph was made for other values of index tensors."""


@dataclass(slots=True)
class Graph:
    """The graph of a signature, and what it depends on beside it."""

    run: Run | None
    surroundings: Surroundings
    closed: list[torch.Tensor]
    kinds: list[Any]
    spec: Any
    statics: list[tuple[int, Any]]
    flat: Flat | None
    reason: str = ""
    #: Tensors that no call uses, of which the function may have read shape or dtype; gradients that were used, and of what.
    seen: list[torch.Tensor] = field(default_factory=list)
    grads: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    #: Tensors whose gradients Python asked for without using them in calls, and what they have to be.
    asked: list[tuple[torch.Tensor, Any]] = field(default_factory=list)
    #: What the last results have to be; they are no results of the function.
    expected: list[torch.Tensor] = field(default_factory=list)
    #: How many functions for arguments of this signature were made.
    calls: int = 0

    def __post_init__(self) -> None:
        used = {id(tensor): tensor for tensor in self.closed}
        found = [*self.surroundings.tensors, *self.closed]
        self.seen = [tensor for tensor in self.surroundings.tensors if id(tensor) not in used and tensor.layout is torch.strided]
        self.kinds = self.kinds + [tensor_kind(tensor) for tensor in self.seen]
        self.grads = [(t, t.grad) for t in found if t.is_leaf and t.grad is not None and id(t.grad) in used]
        known = {id(t) for t, _ in self.grads}
        self.asked = [(t, kind) for t, kind in self.asked if id(t) not in known]

    def holds(self) -> bool:
        """Whether what the graph depends on, beside the arguments, is as it was."""
        if not (self.kinds or self.asked):
            return self.surroundings.hold()
        return (
            self.surroundings.hold()
            and [tensor_kind(t) for t in (*self.closed, *self.seen)] == self.kinds
            and all(tensor.grad is grad for tensor, grad in self.grads)
            and all(gradient_kind(tensor) == kind for tensor, kind in self.asked)
        )

    @property
    def is_alone(self) -> bool:
        """Whether it is run on nothing but the arguments, depends on surroundings alone beside them, and returns what a run does.

        That is one tensor, or a tuple of tensors as the run itself has it.
        """
        beside = self.kinds or self.asked or self.closed or self.statics or self.expected
        return not beside and self.run is not None and self.is_flat

    @property
    def is_flat(self) -> bool:
        """Whether it returns one tensor, or a tuple of tensors as the run itself has it."""
        return self.spec is LEAF or _is_flat(self.spec, self.count)

    @property
    def is_constant(self) -> bool:
        """Whether it does nothing but return constants."""
        source = getattr(self.run, "source_of", None)
        if source is None or source.kept or self.expected:
            return False
        return bool(source.used.isdisjoint(source.program.inputs.values()))

    @property
    def count(self) -> int:
        """The number of results of :attr:`run`."""
        return 0 if self.flat is None else len(self.flat.results)

    def replay(self, tensors: list[torch.Tensor]) -> Any:
        """The results for the tensors among the arguments, in order, of a graph that holds and can be run.

        Raises:
            OtherValues: what a sparse pattern depends on has other values than it had.
        """
        assert self.run is not None
        if (watch := current_watch()) is None:
            found = self.run(tensors + self.closed)
        else:
            found = run_watched(self.run, tensors + self.closed, watch, plain=self.flat is not None and not self.flat.joined)
        if self.expected:
            found, checked = found[: -len(self.expected)], found[-len(self.expected) :]
            if not all(map(torch.equal, checked, self.expected)):
                raise OtherValues
        if self.statics:
            found = list(found)
            for position, value in self.statics:
                found.insert(position, value)
        return tree_unflatten(found, self.spec)  # type: ignore[arg-type]


@dataclass(slots=True)
class _Signature:
    graphs: list[Graph] = field(default_factory=list)
    recordings: int = 0


def compile(function: Callable[..., Any], *, backend: str = "replay") -> Callable[..., Any]:  # noqa: A001 - torch's name
    """Turn a function, or a nest of transforms of it, into one flat graph of ATen calls per input signature.

    The first call with a new signature runs `function` and records every call that reaches torch, derivatives and batching
    included. Later calls replay the record: no Python of `function`, no tape, no planning. A signature is the structure of
    the arguments; shape, strides, dtype, device and ``requires_grad`` of the tensors among them; the values of the other
    arguments; grad mode, inference mode, autocast and default dtype.

    Tensors that `function` closes over (parameters and buffers of modules too) are inputs of the graph: values written
    into them, by an optimiser for instance, are seen by the next call. When something else that `function` reads is replaced
    (the content of a closure, a global, an attribute of a module or a tensor), the call is recorded anew. A call that itself
    replaces such a thing (counting, appending to a list) is never replayed: after 16 of them the function is called as it is,
    with a warning. What else Python does (printing, random numbers of Python or NumPy) happens only when a call is recorded.

    Inside other transforms, under a dispatch mode, and when it returns something that is neither a tensor nor a plain
    value, the function is called as if it had not been compiled. So are first calls inside of
    ``torch.autograd.forward_ad.dual_level``, whose tangents a graph that is there carries on.

    Args:
        function: a function of tensors, in any nesting of tuples, lists and dictionaries, and of hashable static values.
        backend: ``"replay"`` calls torch's functions in a straight line; ``"inductor"`` generates code for the graph by
            torch's compiler (results may differ in the last digits, and random numbers are drawn otherwise);
            ``"cudagraphs"`` captures the calls in a CUDA graph.

    Returns:
        A function with the arguments and results of `function`. It has the methods ``cache_info()``, ``cache_clear()``,
        ``graph(*args)`` (the `torch.fx.GraphModule`) and ``source(*args)`` (the code that replays it).

    Raises:
        ValueError: `backend` is none of the three.
        CompileError: when called: `function` reads the value of a tensor into Python, has a shape that depends on values,
            or the backend cannot run the graph.
        TypeError: when called: a static argument is not hashable.

    Example:
        >>> import torch, chainrule
        >>> laplacian = chainrule.compile(chainrule.vmap(chainrule.laplacian(lambda x: (x**4).sum())))
        >>> laplacian(torch.ones(2, 3))
        tensor([36., 36.])
        >>> laplacian(torch.zeros(2, 3))
        tensor([0., 0.])
        >>> laplacian.cache_info().hits
        1

    """
    if backend not in BACKENDS:
        raise ValueError(f"chainrule.compile: backend must be one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    compiled = _Compiled(function, backend)

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        for call in compiled.calls:
            found = call(args, kwargs)
            if found is not NotImplemented:
                return found
        return compiled(args, kwargs)

    wrapper.cache_info = compiled.cache_info  # type: ignore[attr-defined]
    wrapper.cache_clear = compiled.cache_clear  # type: ignore[attr-defined]
    wrapper.graph = compiled.graph  # type: ignore[attr-defined]
    wrapper.source = compiled.source  # type: ignore[attr-defined]
    wrapper._held = compiled.held  # type: ignore[attr-defined]
    wrapper._changed = compiled.changed  # type: ignore[attr-defined]
    return hide_from_dynamo(wrapper)


class _Compiled:
    """The graphs of one function."""

    def __init__(self, function: Callable[..., Any], backend: str) -> None:
        self.function = function
        self.backend = backend
        self._signatures: OrderedDict[Any, _Signature] = OrderedDict()
        self._lock = threading.RLock()
        self._misses = self._eager = 0
        self._hits = [0]
        #: Functions for signatures that were met twice, the newest first.
        self.calls: tuple[Call, ...] = ()

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():
            return self.function(*args, **kwargs)
        if current_ledger() is not None:  # plans are accounted for, not calls of a graph
            return self.function(*args, **kwargs)
        leaves, spec = tree_flatten((args, kwargs) if kwargs else args)
        try:
            key = _key(leaves, spec)
            signature = None if key is None else self._signatures.get(key)
        except TypeError as error:
            where = _unhashable(args, kwargs)
            raise TypeError(
                f"chainrule.compile: an argument of {function_name(self.function)} that is not a tensor must be hashable, "
                f"{where} is not: {error}"
            ) from None
        if key is None:
            self._eager += 1
            return self.function(*args, **kwargs)
        if signature is not None:
            for graph in signature.graphs:
                if graph.holds():
                    try:
                        found = self._run(graph, leaves, args, kwargs)
                    except OtherValues:
                        continue
                    if graph.calls < _CALLS:
                        self._shorten(graph, args, kwargs)
                    return found
        return self._first(key, leaves, args, kwargs)

    def _run(self, graph: Graph, leaves: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if graph.run is None:
            self._eager += 1
            return self.function(*args, **kwargs)
        values = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if any(map(torch.is_autocast_enabled, _AUTOCAST)):
            with _no_casts():
                found = graph.replay(values)
        else:
            found = graph.replay(values)
        self._hits[0] += 1
        return found

    def _shorten(self, graph: Graph, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Make a function for arguments like these."""
        with self._lock:
            graph.calls += 1
            call = call_of(graph, args, kwargs, self._hits) if graph.run is not None else None
            if call is not None:
                self.calls = (call, *self.calls[: _SHORTENED - 1])

    def _first(self, key: Any, leaves: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if forward_ad._current_level >= 0:  # torch's own forward mode calls ops that cannot be recorded
            self._eager += 1
            return self.function(*args, **kwargs)
        with self._lock:
            signature = self._signatures.get(key)
            if signature is None:
                signature = self._signatures[key] = _Signature()
                while len(self._signatures) > _SIGNATURES:
                    self._signatures.popitem(last=False)
            if signature.recordings >= _RECORDINGS:
                self._eager += 1
                return self.function(*args, **kwargs)
            signature.recordings += 1
            if signature.recordings == _RECORDINGS:
                changed = next((g.surroundings.changed for g in signature.graphs if g.surroundings.changed), "something")
                warnings.warn(
                    f"chainrule.compile: {function_name(self.function)} was recorded {_RECORDINGS} times with one signature, "
                    f"because {changed} is replaced in or between calls (or index tensors have other values); from now on it is "
                    "called without a graph. Give what changes as an argument, or write into a tensor.",
                    stacklevel=4,
                )
            self._misses += 1
            try:
                with unwatched():
                    result, graph = self._record(leaves, args, kwargs)
            except BaseException:
                signature.recordings -= 1  # an error is an error each time
                raise
            signature.graphs.insert(0, graph)
            del signature.graphs[_GRAPHS:]
            return result

    def _record(self, leaves: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Graph]:
        """Run the function and make a graph of the run."""
        surroundings = Surroundings([self.function, *(leaf for leaf in leaves if not isinstance(leaf, torch.Tensor))])
        result, recorder, given = self._run_recorded(args, kwargs, surroundings)
        out_leaves, spec = tree_flatten(result)
        statics = [(n, leaf) for n, leaf in enumerate(out_leaves) if not isinstance(leaf, torch.Tensor)]
        tensors = [leaf for leaf in out_leaves if isinstance(leaf, torch.Tensor)]
        staged = [recorder.staged(leaf) for leaf in tensors]
        program, closed, conditions = recorder.program, recorder.found, recorder.conditions
        kinds = [tensor_kind(tensor) for tensor in closed]
        asked = [(tensor, gradient_kind(tensor)) for tensor, _ in recorder.asked.values()]
        joined = torch.is_grad_enabled() and recorder.joined
        reason = _hidden_state(surroundings) or _obstacle(statics, tensors, recorder, joined=joined)
        # What the user gets is his own tensor where it was one, and never a constant of the graph.
        own = {id(alias): leaf for alias, leaf in given}
        constants = {id(t) for t, s in zip(tensors, staged, strict=True) if s is not None and s.slot in program.constants}
        mine = [own.get(id(leaf), leaf.clone() if id(leaf) in constants else leaf) for leaf in out_leaves]
        result = tree_unflatten(mine, spec)
        if reason:
            return result, Graph(None, surroundings, closed, kinds, spec, statics, None, reason, asked=asked)
        results = [s for s in staged if s is not None] + [s for s, _ in conditions]
        flat = Flat(program, results, len(given) + len(closed), len(given), joined)
        if joined:
            flat.detach(*_in_graph(recorder))
        program._input_values.clear()  # a cycle that would hold the tensors of this run
        flat.results = [Staged(program, s.slot, None) for s in flat.results]  # type: ignore[arg-type]
        values = [*(leaf for _, leaf in given), *closed]
        if self.backend == "inductor":
            with _no_casts():
                run = flat.inductor(values)
        elif self.backend == "cudagraphs":
            run = flat.cudagraph(values)
        else:
            run = flat.replay()
        expected = [known for _, known in conditions]
        return result, Graph(run, surroundings, closed, kinds, spec, statics, flat, expected=expected, asked=asked)

    def _run_recorded(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], surroundings: Surroundings
    ) -> tuple[Any, WholeRecorder, list[tuple[torch.Tensor, torch.Tensor]]]:
        """Run the function on aliases of its arguments; they are returned with what they stand for."""
        leaves, spec = tree_flatten((args, kwargs))
        given: list[tuple[torch.Tensor, torch.Tensor]] = []
        aliases: dict[int, torch.Tensor] = {}
        for number, leaf in enumerate(leaves):
            if isinstance(leaf, torch.Tensor):
                alias = aliases.get(id(leaf))
                if alias is None:
                    alias = aliases[id(leaf)] = aten.alias.default(leaf)
                leaves[number] = alias
                given.append((alias, leaf))
        called, named = tree_unflatten(leaves, spec)
        recorder = WholeRecorder([alias for alias, _ in given], surroundings.generators, surroundings.tensors)
        try:
            with NoReads(recorder), recorder:
                result = self.function(*called, **named)
        except Exception as error:
            # TorchScript gives errors another type.
            if recorder.refusal is None or isinstance(error, CompileError):
                raise
            raise recorder.refusal from error
        if recorder.refusal is not None:
            raise recorder.refusal  # the function has caught it, and went on some other way
        recorder.finish()
        return result, recorder, given

    def cache_info(self) -> CacheInfo:
        """How often the function was called, and how."""
        size = sum(len(signature.graphs) for signature in self._signatures.values())
        return CacheInfo(self._hits[0], self._misses, self._eager, size)

    def cache_clear(self) -> None:
        """Forget all graphs."""
        with self._lock:
            self._signatures.clear()
            self.calls = ()
            self._misses = self._eager = self._hits[0] = 0

    def graph(self, *args: Any, **kwargs: Any) -> fx.GraphModule:
        """The graph for these arguments; its placeholders are the tensors among them, then what is closed over."""
        return self._flat(args, kwargs).graph()

    def source(self, *args: Any, **kwargs: Any) -> str:
        """The straight-line code that the replay backend runs for these arguments."""
        return str(self._flat(args, kwargs).replay().source)  # type: ignore[attr-defined]

    def held(self, *args: Any) -> Graph | None:
        """The graph of the last call with this signature, if there is one that holds."""
        leaves, spec = tree_flatten(args)
        key = _key(leaves, spec)
        graphs = self._signatures[key].graphs if key in self._signatures else []
        return next((graph for graph in graphs if graph.run is not None and graph.holds()), None)

    def changed(self, *args: Any) -> str:
        """What was replaced since the graphs of this signature were recorded, in words; empty where nothing is known to be."""
        leaves, spec = tree_flatten(args)
        key = _key(leaves, spec)
        graphs = self._signatures[key].graphs if key in self._signatures else []
        return next((graph.surroundings.changed for graph in graphs if graph.surroundings.changed), "")

    def _flat(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Flat:
        leaves, spec = tree_flatten((args, kwargs) if kwargs else args)
        key = _key(leaves, spec)
        if key is None:
            raise CompileError("chainrule.compile: there is no graph for arguments that are not plain strided tensors")
        graphs = self._signatures[key].graphs if key in self._signatures else []
        found = next((graph for graph in graphs if graph.holds()), None)
        if found is None:
            if forward_ad._current_level >= 0:
                raise CompileError("chainrule.compile: no graph is recorded inside of torch.autograd.forward_ad.dual_level")
            found = self._recorded(key, leaves, args, kwargs)
            if found.flat is None and not found.holds():  # the first call may have set something up
                found = self._recorded(key, leaves, args, kwargs)
        if found.flat is None:
            raise CompileError(f"chainrule.compile: there is no graph: {found.reason}")
        return found.flat


    def _recorded(self, key: Any, leaves: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Graph:
        """The graph of a call that is made now."""
        self._first(key, leaves, args, kwargs)
        return self._signatures[key].graphs[0]


@contextmanager
def _no_casts() -> Iterator[None]:
    """Without autocast: the casts are in the graph, and calls that ran outside of autocast must not be cast."""
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


def _is_flat(spec: Any, count: int) -> bool:
    """Whether a structure is a tuple of so many leaves."""
    numbers = tuple(range(count))
    return bool(tree_unflatten(list(numbers), spec) == numbers)


def modes() -> Any:
    """What a graph depends on beside the arguments, as part of its key; None where calls run without a graph."""
    if _dispatch_modes() or _functorch() or read_ledger() is not None or _function_modes() or _autocast():
        return None
    return _grad_enabled(), _inference(), _default_dtype()


#: Asked in every call of a solver.
_dispatch_modes, _function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
_functorch, _autocast = torch._C._are_functorch_transforms_active, torch._C._is_any_autocast_enabled
_grad_enabled, _inference, _default_dtype = torch.is_grad_enabled, torch.is_inference_mode_enabled, torch.get_default_dtype


def _key(leaves: Sequence[Any], spec: Any) -> Any:
    """The signature of a call; None for tensors that no graph can have."""
    parts: list[Any] = [
        structure_key(spec), torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype(),
        torch.get_default_device() if torch._C._len_torch_function_stack() else None,
        *(torch.get_autocast_dtype(d) for d in _AUTOCAST if torch.is_autocast_enabled(d)),
    ]  # fmt: skip
    count = 0
    for leaf in leaves:
        kind = leaf.__class__
        if kind in _PLAIN_TENSORS:
            count += 1
            if leaf.layout is not torch.strided or leaf.is_conj() or leaf.is_neg():
                return None
            parts += (leaf.shape, leaf.dtype, leaf.device, leaf.stride(), leaf.requires_grad)
        elif isinstance(leaf, torch.Tensor):
            return None
        else:
            parts.append(_static(leaf))
    if count > 1 and len(set(map(id, leaves))) < len(leaves):
        parts.append(_repeated(leaves))
    return tuple(parts)


def _repeated(leaves: Sequence[Any]) -> tuple[int, ...]:
    """Which of the tensors are one object: for each the number of the first such."""
    first: dict[int, int] = {}
    return tuple(first.setdefault(id(leaf), n) for n, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor))


def _static(value: Any) -> Any:
    """The key of an argument that is not a tensor: values of other types, though equal, are others."""
    kind = value.__class__
    if kind is float or kind is complex:
        return kind, value, repr(value)  # 0.0 is not -0.0
    if kind.__eq__ is object.__eq__ or kind in _STATIC:
        return kind, value
    if kind is frozenset:
        return kind, frozenset(map(_static, value))
    if kind is slice:  # not hashable before Python 3.12
        return kind, *map(_static, (value.start, value.stop, value.step))
    if dataclasses.is_dataclass(value) and kind.__hash__ is not None:
        return kind, *(_static(getattr(value, f.name)) for f in dataclasses.fields(value))
    hash(value)
    return kind, value, id(value)


def _unhashable(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """The first argument without a hash, as it stands in a call."""
    for name, given in (*((f"args[{number}]", item) for number, item in enumerate(args)), *kwargs.items()):
        for path, leaf in tree_flatten_with_path(given)[0]:
            try:
                hash(leaf if isinstance(leaf, torch.Tensor) else _static(leaf))
            except TypeError:
                return f"{name}{keystr(path)}"
    return "the structure of one"


def _writes_outside(program: Program) -> bool:
    """Whether calls write to something that was there before."""
    producers = {slot: i for i in program.instructions for slot in i.outputs}
    return any(
        root(program, producers, slot) not in producers and root(program, producers, slot) not in program.constants
        for i in program.instructions
        for slot in i.writes
    )


def _hidden_state(surroundings: Surroundings) -> str:
    """Why a replay would leave out what the call does to Python's own values, if so."""
    if surroundings.iterators:
        return f"it reads an iterator ({surroundings.iterators[0]}), which moves on with each call"
    return "" if surroundings.hold() else f"the call itself changes {surroundings.changed}"


def _obstacle(
    statics: Sequence[tuple[int, Any]], tensors: Sequence[torch.Tensor], recorder: WholeRecorder, *, joined: bool
) -> str:
    """Why a recorded run cannot be replayed, if so."""
    if recorder.obstacle:
        return recorder.obstacle
    for _, value in statics:
        if not isinstance(value, _STATIC):
            return f"a result is of type {type(value).__name__}, neither a tensor nor a plain value"
    if recorder.conditions and _writes_outside(recorder.program):
        return "a sparse pattern depends on values, and it writes to what was there before"
    if any(tensor.__class__ not in _PLAIN_TENSORS for tensor in tensors):
        return "a result is no plain tensor"
    if not joined:
        return "a result has a graph of its own" if any(tensor.requires_grad for tensor in tensors) else ""
    if _writes_outside(recorder.program):
        return "autograd has to see calls that write to what was there before"
    try:
        nodes = [value.grad_fn for value in (*recorder.values(), *tensors) if value.grad_fn is not None]
    except RuntimeError:
        return "views that torch makes several of at once were written to through another tensor, and autograd forbids their use"
    if any(isinstance(node, torch.autograd.function.BackwardCFunction) for node in nodes):  # type: ignore[attr-defined]
        return "autograd has to see an autograd.Function (a user's, or the zeros that are gradients of a constant result)"
    return ""


def _in_graph(recorder: WholeRecorder) -> tuple[set[int], set[int]]:
    """The slots of the values without and with a graph."""
    without: set[int] = set()
    inside: set[int] = set()
    for staged in recorder.known.values():
        (inside if staged.value.requires_grad else without).add(staged.slot)
    return without - inside, inside
