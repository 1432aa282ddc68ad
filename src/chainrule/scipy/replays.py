"""What solvers call again and again: transforms of a user's function, replayed as one graph where that leaves nothing out."""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
import torch

from chainrule.capture.whole_recorder import CompileError
from chainrule.dispatch import LightMode
from chainrule.scipy.extra_arguments import Form, only_scales, same_values
from chainrule.scipy.plain_code import looks_at_types, only_computes
from chainrule.scipy.small_arrays import SmallArrays, small_arrays
from chainrule.transforms.arguments import LEAF
from chainrule.transforms.compile import Graph, OtherValues, modes
from chainrule.transforms.compile import compile as compile_function

#: After so many calls of one signature a function that only computes is recorded: that takes as long as some fifty calls.
CALLS = 32

#: The same of values alone: a replay takes little less time than the call itself, so that it has to be worth a record by then.
VALUES = 128

#: The value of fewer ops is not replayed: what a replay looks at first takes as long as it saves. So it is with a few more, but
#: for small arrays.
_LEAST_OPS = 3
_FEW_OPS = 6

_FLOAT64 = np.dtype(np.float64)

#: Runs of more ops are not recorded unasked: Python is a small part of what they cost, and recording takes seconds.
_OPS = 200

#: A function is called plainly after so many recordings of which none was replayed: what it reads is replaced each time.
_WASTED = 3

#: So many graphs are kept.
_KEPT = 64

#: So many transforms of one function are kept: the numbers and words among the further arguments tell them apart.
_ENTRIES = 128

#: Numbers are trusted after so many of them.
_TRUSTED = 3

#: After so many solves in which tensors in the place of numbers gave something else, the numbers themselves are recorded.
_DISAGREED = 3

#: Under this name a function keeps its replays, so that they live as long as it does.
ATTRIBUTE = "_chainrule_replays"


class Replayed:
    """A function of tensors, made of a user's, that is replayed by :func:`chainrule.compile`.

    Unasked, only a function is run for counting and recording whose code shows that runs leave no traces: the value of the
    plain call is the same before and after them.

    Args:
        function: what is called.
        user: the user's function in it.
        value: the part of ``function`` that only runs ``user``; its ops are counted.
        is_forced: whether it is replayed from the first call on, and errors of recording are raised. Otherwise it is once
            calls repeat, where the code of ``user`` visibly does nothing but compute and its values decide no branch.
        others: further functions of the user's that ``function`` calls.
        after: how many calls of one signature are plain, unless it is forced.
        form: how further arguments are made of the last tensors that it is given; None if there are none.

    Attributes:
        plain: what is called.
        known: for usual tensors, by their shapes: the modes and the graph, None where calls stay plain; of a graph that reads
            nothing beside the arguments also how to ask whether it holds, its run, and whether its results come in a tuple.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        user: Any,
        value: Callable[..., Any],
        *,
        is_forced: bool,
        others: Sequence[Any] = (),
        after: int = CALLS,
        form: Form | None = None,
    ) -> None:
        self.plain = self._tracked = function
        self._unbound = None if form is None else function
        self._user, self._value, self._is_forced = user, value, is_forced
        self._others, self._after = others, after
        self._floats: tuple[int, ...] = ()
        if form is not None:
            self.plain, self._tracked, self._floats = form.plain(function), form.tracked(function), form.floats
            self._value = self.plain if value is function else form.plain(value)
            self._tracked_value = self._tracked if value is function else form.tracked(value)
        #: Numbers among the further arguments for which tensors in their place are known to give the same.
        self._agreed: set[Any] = set()
        self._is_trusted: bool | None = None
        self._compiled: Any = None
        self._counts: dict[Any, int] = {}
        self._wasted: dict[Any, int] = {}
        self._graphs: dict[Any, Graph] = {}
        self.known: dict[tuple[torch.Size, ...], tuple[Any, Graph | None, Any, Any, bool]] = {}
        #: By the shapes of arrays: the modes, the code of a graph, and whether its results come in a tuple.
        self._small: dict[tuple[torch.Size, ...], tuple[Any, SmallArrays, bool]] = {}
        self._codes: dict[Any, tuple[Graph, SmallArrays | None]] = {}
        self._few: set[Any] = set()

    def arrays(self, args: Sequence[Any]) -> Any:
        """The results for arrays, as new arrays, where code for small ones is known; None otherwise."""
        if not self._small:
            return None
        shapes = []
        for array in args:
            if array.__class__ is not np.ndarray or array.dtype is not _FLOAT64:
                return None
            shapes.append(array.shape)
        last = self._small.get(tuple(shapes))  # type: ignore[arg-type]
        if last is None:
            return None
        known, code, several = last
        if modes() != known or not code.holds():
            return None
        found = code(args)
        if found is None:
            if code.is_refused:
                self._small.clear()
            return None
        return found if several else found[0]

    def usual(self, tensors: list[torch.Tensor]) -> Any:
        """Call or replay it, in fewer steps, with different float64 tensors: contiguous, on the CPU and without a graph."""
        last = self.known.get((tensors[0].shape,) if len(tensors) == 1 else tuple([t.shape for t in tensors]))
        if last is not None:
            known, graph, holds, run, several = last
            if graph is None:
                return self.plain(*tensors)
            if modes() == known:
                if run is not None:
                    if holds():
                        found = run(tensors)
                        return found if several else found[0]
                elif graph.holds():
                    try:
                        return graph.replay(tensors)
                    except OtherValues:
                        pass
        return self(*tensors)

    def is_constant(self, arrays: Sequence[np.ndarray]) -> bool:
        """Whether it is known that usual tensors of these shapes all give the same: the graph that was replayed reads none."""
        last = self.known.get(tuple([array.shape for array in arrays]))  # type: ignore[misc]
        return last is not None and last[1] is not None and last[1].is_constant

    def __call__(self, *args: Any) -> Any:
        """Call or replay it."""
        key = (_key(args), modes())
        graph = self._graphs.get(key)
        if graph is not None:
            if graph.holds():
                try:
                    found = graph.replay([a for a in args if a.__class__ is torch.Tensor])
                    if self._wasted:
                        self._wasted.pop(key, None)
                    self._note_usual(args, key, graph)
                    return found
                except OtherValues:
                    pass
            del self._graphs[key]
            self._codes.pop(key, None)
            self._small.clear()
            self.known.clear()
        calls = self._counts.get(key, 0)
        if calls < 0:
            self._note_usual(args, key, None)
            return self.plain(*args)
        if not self._is_forced:
            if None in key:
                return self.plain(*args)
            if calls < self._after:
                self._counts[key] = calls + 1
                return self.plain(*args)
            if calls == self._after and not self._pays(key, args):
                return self._never(key, args)
            self._counts[key] = self._after + 1
        return self._recorded(key, args)

    def _note_usual(self, args: tuple[Any, ...], key: Any, graph: Graph | None) -> None:
        if None in key or not all(map(_is_usual, args)):
            return
        if len(self.known) >= _KEPT:
            self.known.clear()
            self._small.clear()
        alone = graph is not None and graph.is_alone
        holds, run = (graph.surroundings.is_same, graph.run) if alone else (None, None)  # type: ignore[union-attr]
        several = alone and graph.spec is not LEAF  # type: ignore[union-attr]
        shapes = tuple([a.shape for a in args])
        self.known[shapes] = key[1], graph, holds, run, several
        code = None if graph is None else self._code(key, graph)
        if code is not None:
            self._small[shapes] = key[1], code, graph.spec is not LEAF  # type: ignore[union-attr]

    def _code(self, key: Any, graph: Graph) -> SmallArrays | None:
        found = self._codes.get(key)
        if found is None or found[0] is not graph:
            if len(self._codes) >= _KEPT:
                self._codes.clear()
            found = self._codes[key] = graph, small_arrays(graph)
        return None if found[1] is None or found[1].is_refused else found[1]

    def _pays(self, key: Any, args: tuple[Any, ...]) -> bool:
        """Whether the function may be recorded unasked, and a run is short enough."""
        if not self._only_computes():
            return False
        with _Counter() as counter:
            self._value(*args)
        if self.plain is self._value and counter.count < _FEW_OPS:
            self._few.add(key)
            return counter.count >= _LEAST_OPS
        return counter.count <= _OPS

    def _only_computes(self) -> bool:
        return all(only_computes(function) for function in (self._user, *self._others))

    def _never(self, key: Any, args: tuple[Any, ...]) -> Any:
        self._counts[key] = -1
        return self.plain(*args)

    def _recorded(self, key: Any, args: tuple[Any, ...]) -> Any:
        """Record a call; also again, when what the function closes over was replaced: by something that does more, perhaps."""
        if not self._is_forced and not self._only_computes():
            return self._never(key, args)
        if self._floats:
            self._agreed.clear()
            self._is_trusted = None
            if not self.agrees(args):
                self._counts[key] = 0
                return self.plain(*args)
        if self._compiled is None:
            self._compiled = compile_function(self._tracked)
        wasted = 0 if None in key else self._wasted.get(key, 0)
        if wasted >= _WASTED:
            if self._is_forced:
                self._warn(args)
            return self._never(key, args)
        misses = self._compiled.cache_info().misses
        try:
            found = self._compiled(*args)
        except CompileError:
            if self._is_forced:
                raise
            if self._floats:
                _note_disagreed(self._user, _DISAGREED)
            return self._never(key, args)  # nothing but a result was computed until here
        if self._compiled.cache_info().misses > misses:
            self._wasted[key] = wasted + 1
        else:
            self._wasted.pop(key, None)
        graph = None if None in key else self._compiled._held(*args)
        if graph is not None:
            if len(self._graphs) >= _KEPT:
                self._graphs.clear()
            self._graphs[key] = graph
            if key in self._few and self._code(key, graph) is None:
                del self._graphs[key]
                self._counts[key] = -1
        return found

    @property
    def unbound(self) -> Callable[..., Any]:
        """The same for further arguments as they are, in the place of the tensors that they are made of."""
        return self if self._unbound is None else self._unbound

    @property
    def has_graphs(self) -> bool:
        """Whether some calls are replayed."""
        return bool(self._graphs)

    @property
    def is_trusted(self) -> bool:
        """Whether :meth:`agrees` need not be asked for other numbers.

        That is so after some agreed, if nothing is computed with numbers that could raise errors of Python's or depends on
        their type.
        """
        if self._is_trusted is None and len(self._agreed) >= _TRUSTED:
            graphs = self._graphs.values()
            self._is_trusted = not any(map(looks_at_types, (self._user, *self._others))) and all(
                graph.flat is not None and only_scales(graph.flat.program, [graph.flat.given + n for n in self._floats])
                for graph in graphs
            )
        return self._is_trusted is True

    def agrees(self, args: Sequence[torch.Tensor]) -> bool:
        """Whether the function gives the same for tensors in the place of the numbers among its further arguments.

        It could look at their type, compute in another precision, or raise errors that torch does not.
        """
        numbers = tuple([float(args[n].item()).hex() for n in self._floats])
        if numbers in self._agreed:
            return True
        try:
            agree = same_values(self._tracked_value(*args), self._value(*args))
        except Exception:  # noqa: BLE001 - a plain call raises what it has to raise
            agree = False
        if not agree:
            _note_disagreed(self._user, 1)
            return False
        if len(self._agreed) >= _KEPT:
            self._agreed.clear()
        self._agreed.add(numbers)
        return True

    def _warn(self, args: tuple[Any, ...]) -> None:
        changed = self._compiled._changed(*args) or "something that it reads"
        name = getattr(self._user, "__qualname__", None) or repr(self._user)
        warnings.warn(
            f"chainrule.scipy: compiled=True, but {name} cannot be replayed: {changed} is replaced between its calls (or index "
            f"tensors have other values). It was recorded {_WASTED} times in vain, and is called plainly from now on. Write "
            "what changes into a tensor, or leave compiled=True out.",
            stacklevel=3,
        )


def _key(args: tuple[Any, ...]) -> Any:
    """The arguments as a part of a key; None for those that the calls of a graph cannot be told by."""
    parts: list[Any] = []
    for argument in args:
        if argument.__class__ is torch.Tensor:
            parts.append((argument.shape, argument.dtype, argument.stride(), argument.device, argument.requires_grad))
        elif argument.__class__ in _STATIC:
            parts.append((argument.__class__, argument))
        else:
            return None
    return tuple(parts) if len(args) < 2 or len({*map(id, args)}) == len(args) else None


_STATIC = (int, str, bool)


def _is_usual(argument: Any) -> bool:
    """Whether an argument is one of those of :meth:`Replayed.usual`."""
    return (
        argument.__class__ is torch.Tensor and argument.dtype is torch.float64 and argument.is_cpu
        and argument.is_contiguous() and not argument.requires_grad
    )  # fmt: skip


class _Counter(LightMode):
    """Counts the ops of a run."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an op and count it."""
        self.count += 1
        return func(*args, **(kwargs or {}))


class _Store:
    """The replays of one function."""

    def __init__(self, owner: Any) -> None:
        self.owner = owner
        self.entries: dict[Hashable, Replayed] = {}
        #: How often tensors in the place of numbers gave something else.
        self.disagreed = 0

    def __reduce__(self) -> Any:
        """Copies of the function start anew."""
        return _Store, (None,)


def replayed(
    user: Any,
    key: Hashable,
    make: Callable[[], Callable[..., Any]],
    value: Callable[..., Any],
    *,
    is_forced: bool,
    others: Sequence[Any] = (),
    after: int = CALLS,
    form: Form | None = None,
) -> Replayed:
    """A transform of a user's function; where that is a Python function, the one that an earlier solve made under ``key``.

    Args:
        user: the user's function.
        key: tells apart what is made of it.
        make: makes it.
        value: as for :class:`Replayed`.
        is_forced: as for :class:`Replayed`.
        others: as for :class:`Replayed`; they are part of the key.
        after: as for :class:`Replayed`.
        form: as for :class:`Replayed`; it is a part of the key.
    """
    if not (isinstance(user, types.FunctionType) and (not others or all(isinstance(f, types.FunctionType) for f in others))):
        return Replayed(make(), user, value, is_forced=is_forced, others=others, after=after, form=form)
    store = _store_of(user)
    if store is None:  # `functools.wraps` copies attributes
        store = user.__dict__[ATTRIBUTE] = _Store(user)
    whole = (key, is_forced, *others) if form is None else (key, is_forced, form, *others)
    found: Replayed | None = store.entries.get(whole)
    if found is None:
        if len(store.entries) >= _ENTRIES:
            del store.entries[next(iter(store.entries))]
        found = Replayed(make(), user, value, is_forced=is_forced, others=others, after=after, form=form)
        store.entries[whole] = found
    return found


def _store_of(user: Any) -> _Store | None:
    store = user.__dict__.get(ATTRIBUTE) if isinstance(user, types.FunctionType) else None
    return store if store is not None and store.owner is user else None


def _note_disagreed(user: Any, times: int) -> None:
    store = _store_of(user)
    if store is not None:
        store.disagreed += times


def has_disagreed(user: Any) -> bool:
    """Whether a function is known to need the numbers among its further arguments themselves, in the place of tensors."""
    store = _store_of(user)
    return store is not None and store.disagreed >= _DISAGREED


__all__ = ["ATTRIBUTE", "CALLS", "VALUES", "Replayed", "has_disagreed", "replayed"]
