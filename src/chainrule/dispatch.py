"""How torch's dispatch modes are entered and left here: without the bookkeeping that costs a microsecond or two a time."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable
from functools import wraps
from types import CodeType, FrameType, FunctionType, TracebackType
from typing import Any, Self, TypeVar

import torch
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils import _python_dispatch as modes
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import TorchDispatchMode

from chainrule.calls import CONSTANTS, constant_beside, shared_constant
from chainrule.dispatcher_state import find_state
from chainrule.function_arguments import READINGS, Joined, Over
from chainrule.function_bodies import body_of
from chainrule.function_globals import original_of
from chainrule.function_schemas import NAMED, BySchema, Required
from chainrule.functions import (
    COMPARISONS,
    CONVERSIONS,
    CONVERTING,
    FACTS,
    FRESH,
    MAKERS,
    MAKING_GRAPHS,
    NEUTRAL,
    REQUIRES_GRAD,
    SHAPED,
    TABLE,
    WRITERS,
)
from chainrule.functions import Function as TorchFunction
from chainrule.shortcuts import AUTOCAST_KEYS, COMPLEX, FLOATING, REAL, Handler, configure, set_excluded
from chainrule.subclasses import is_bare
from chainrule.tensor_facts import find_tensor_facts
from chainrule.uncompiled import hide_code, refusal_of_operators, run_uncompiled

aten = torch.ops.aten

Function = TypeVar("Function", bound=Callable[..., Any])

_push = torch._C._push_on_torch_dispatch_stack
_pop = torch._C._pop_torch_dispatch_stack


def entry_point(function: Function, like: Callable[..., Any] | None = None) -> Function:
    """Mark the function that a transform returns (or is): its own code is hidden from dynamo and from function modes.

    Inside of another transform, torch would show every look at a tensor's shape or dtype to the outer one.

    Args:
        function: the transform's own.
        like: the user's function, whose name, documentation and attributes the result bears; `function` itself by default.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        if (dynamo := _loaded("torch._dynamo.eval_frame")) is not None:
            run_uncompiled(dynamo, is_at_work)
        count = _count_functions()
        if not count or not isinstance(_function_at(count - 1), LightMode):
            try:
                return function(*args, **kwargs)
            except Exception as error:
                if error.__class__.__module__ == "torch._dynamo.exc" and "Higher Order Operator" in str(error):
                    raise RuntimeError(refusal_of_operators("on functions")) from error
                raise
        mode = _pop_function()
        try:
            return function(*args, **kwargs)
        finally:
            _push_function(mode)

    source = function if like is None else like
    if source.__class__ is FunctionType:
        # What functools.wraps does, in a fraction of its time: transforms are often made anew for each call.
        run.__name__, run.__qualname__, run.__doc__ = source.__name__, source.__qualname__, source.__doc__
        run.__module__, run.__annotations__ = source.__module__, source.__annotations__
        attributes = run.__dict__
        attributes.update(source.__dict__)
        attributes["__wrapped__"] = source
        attributes["_torchdynamo_disable"] = True
    else:
        wraps(source)(run)
        run._torchdynamo_disable = True  # type: ignore[attr-defined]
    if run.__code__ not in _HIDDEN:
        _HIDDEN.append(run.__code__)
        hide_code(run.__code__)
    return run  # type: ignore[return-value]


_loaded = sys.modules.get

#: The code of the functions that :func:`entry_point` returns, once dynamo knows of it (there is only one).
_HIDDEN: list[CodeType] = []


_exclude = torch._C._dispatch_tls_set_dispatch_key_excluded
_PYTHON = torch._C.DispatchKey.Python
_count = torch._C._len_torch_dispatch_stack
_at = torch._C._get_dispatch_stack_at
_push_function = torch._C._push_on_torch_function_stack
_pop_function = torch._C._pop_torch_function_stack
_count_functions = torch._C._len_torch_function_stack
_function_at = torch._C._get_function_stack_at
_TENSOR = torch.Tensor
_ONLY_TENSOR = (torch.Tensor,)
_NO_FUNCTIONS = torch._C._disabled_torch_function_impl
_DATA = torch.Tensor.data.__get__  # type: ignore[attr-defined]
_functorch_level = torch._C._functorch.peek_interpreter_stack  # type: ignore[attr-defined]

#: What sorts of functions the compiled handlers tell apart, as they number them.
_QUERY, _MAKES_NEW = 1, 2


def _entries() -> dict[Any, tuple[Any, Any, int, Any]]:
    """What is known of each function in one place: its entries in the tables, or None, and the sorts it is of."""
    queries = FACTS - {REQUIRES_GRAD}
    return {
        func: (TABLE.get(func), READINGS.get(func), _QUERY * (func in queries) + _MAKES_NEW * (func in FRESH), WRITERS.get(func))
        for func in {*TABLE, *READINGS, *queries, *FRESH, *WRITERS}
    }


configure(
    entries=_entries(), joined=Joined, over=Over, count=_count,
    level=_functorch_level, exclude=_exclude, python_key=_PYTHON, tensor=torch.Tensor,
    parameter=torch.nn.Parameter, mv=torch.mv, addmv=torch.addmv,
    real=REAL, floating=FLOATING, complex=COMPLEX, constants=CONSTANTS, shared_constant=shared_constant,
    strided=torch.strided, autocast=torch._C._is_any_autocast_enabled, grad_enabled=torch.is_grad_enabled,
    comparisons=COMPARISONS, makers=MAKERS, shaped=SHAPED,
    by_schema=BySchema, named=NAMED, required=Required, getitem=torch.Tensor.__getitem__,
    select=aten.select.int, slice=aten.slice.Tensor, unsqueeze=aten.unsqueeze.default,
    index=aten.index.Tensor, long=torch.int64, bool=torch.bool, push=_push, pop=_pop, at=_at, push_function=_push_function,
    pop_function=_pop_function, function_at=_function_at, flags=vars(modes),
    where=torch.where, where_op=aten.where.self, to_copy=aten._to_copy.default, to_op=aten.to.dtype, conversions=CONVERSIONS,
    constant_beside=constant_beside, clone=torch.clone, expand_op=aten.expand.default, fill_op=aten.fill_.Scalar,
    copy_op=aten.copy_.default, zero_op=aten.zero_.default, copy_=torch.Tensor.copy_, fill_=torch.Tensor.fill_,
    zero_=torch.Tensor.zero_, put_op=aten.index_put_.default, put=torch.Tensor.index_put_, setitem=torch.Tensor.__setitem__,
    included_keys=torch._C._dispatch_tls_local_include_set,
    excluded_keys=torch._C._dispatch_tls_local_exclude_set, autocast_keys=AUTOCAST_KEYS, forward_mode=vars(forward_ad),
    set_grad=torch._C._set_grad_enabled, detach_op=aten.detach.default, device=torch.device("cpu"),
    converting=CONVERTING, make_tensor=torch.tensor,
    products={aten.matmul.default: {(2, 2): aten.mm.default, (2, 1): aten.mv.default}},
)  # fmt: skip


#: Whether the compiled handlers know the dispatcher's state without asking in Python.
KNOWS_STATE = find_state()

#: Whether they know tensors without asking in Python.
KNOWS_TENSORS = find_tensor_facts()


def _without_handlers(excluded: bool) -> None:
    _exclude(_PYTHON, excluded)


#: Keeps torch from the handlers of all modes, in a third of the time of taking a mode off the stack, or lets it reach them again.
without_handlers: Callable[[bool], None] = set_excluded if KNOWS_STATE else _without_handlers


def is_at_work() -> bool:
    """Whether a mode of this package is on in this thread."""
    return any([isinstance(_at(place), LightMode) for place in range(_count())])


def functions_are_replaced() -> bool:
    """Whether a user's function mode is on, which may make something else of a call: what runs now is not for other runs."""
    for place in range(_count_functions()):
        if not isinstance(_function_at(place), (LightMode, FunctionWatch, DeviceContext)):
            return True
    return False


#: By a function of torch, what looks at its arguments and returns another way to call it on them, or None. A layer above fills
#: it: with ways that keep torch from reading values of tensors that have none.
OTHERWISE: dict[Any, Callable[..., Callable[[], Any] | None]] = {}

#: Functions that modes take in ways of their own: called with the mode and the arguments. Layers above put them here.
TAKEN: dict[Any, Callable[..., Any]] = {}



def _asked_from_here() -> bool:
    """Whether code of this package calls the function that a mode takes: it goes by what torch says."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_globals is _GLOBALS:
        frame = frame.f_back
    return frame is not None and frame.f_globals.get("__name__", "").startswith("chainrule.")


_GLOBALS = globals()

#: Torch's words.
DATA_UNDER_VMAP = "accessing `data` under vmap transform is not allowed. Use detach()."


class FunctionWatch(TorchFunctionMode):
    """A function mode that leaves calls as they are, but has ``data``, ``requires_grad`` and hooks seen by the innermost mode.

    Torch reads ``data`` without its dispatcher, which says of it that it is ``detach``: a constant for all transforms, and
    not for the innermost one only. A mode that cannot stand on the stack of function modes itself has this one there.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a function of torch."""
        if func == _DATA or func == REQUIRES_GRAD or func in TAKEN:
            for place in reversed(range(_count())):
                if isinstance(mode := _at(place), LightMode):
                    if func == _DATA:
                        return mode.read_data(args[0])
                    if func == REQUIRES_GRAD:
                        return func(*args) or mode.requires_grad(args[0])
                    return TAKEN[func](mode, *args, **(kwargs or {}))
        return func(*args, **kwargs) if kwargs else func(*args)


def is_differentiated() -> bool:
    """Whether a mode is on that differentiates what runs."""
    places = range(torch._C._len_torch_dispatch_stack())
    return any([getattr(torch._C._get_dispatch_stack_at(place), "differentiates", False) for place in places])


class LightMode(Handler, TorchDispatchMode):
    """A dispatch mode that stays out of compiled regions, and is cheap to enter.

    A mode that has :meth:`run_function` is a function mode as well, for the functions of
    :data:`chainrule.functions.TABLE`: it takes such a call before torch's dispatcher does. Whatever it does not take goes
    to the dispatcher as usual, and from there to ``__torch_dispatch__``. Only the innermost mode stands on the stack of
    function modes, and it hands the calls on to the next one itself.

    Attributes:
        below: the mode that the calls of this one go to next; None for torch itself.
        graphs: whether a tensor was made to require a gradient while this mode was on.
    """

    #: Whether the mode takes functions.
    takes_functions = False
    #: Whether the mode makes tensors of a class of its own.
    maps = False
    #: Whether ``data`` is something of its own for the mode.
    reads_data = False
    #: Whether the mode serves a transform that pulls cotangents back.
    reverse = False
    #: Whether what runs while the mode is on is differentiated.
    differentiates = False

    below: LightMode | None

    def __init_subclass__(cls, **given: Any) -> None:
        """Keep the handler in the class itself, too: torch looks it up by a new name each time, which no cache knows."""
        super().__init_subclass__(**given)
        if "__torch_function__" not in cls.__dict__:
            cls.__torch_function__ = cls.__torch_function__  # type: ignore[method-assign]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Otherwise torch wraps the handler in a function that costs about 2 µs per op.
        return False

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let compiled regions run as they are."""
        return True

    def __init__(self) -> None:
        self._entered: list[tuple[Any, ...]] = []

    def run_function(self, function: TorchFunction, args: tuple[Any, ...]) -> Any:
        """Run a function of the table on arguments without keywords; NotImplemented leaves it to the dispatcher.

        Nothing may have been done when NotImplemented is returned. The handlers of this mode and of those below it are
        off.
        """
        return NotImplemented

    def run_op(self, op: Any, args: tuple[Any, ...], named: tuple[tuple[str, Any], ...] = ()) -> Any:
        """Run an op with positional arguments, and named ones as sorted pairs, where :meth:`run_function` may be called."""
        return NotImplemented

    def read_data(self, tensor: torch.Tensor) -> torch.Tensor:
        """The ``data`` of a tensor."""
        return tensor.data

    def unwrapped(self, tensor: Any) -> Any:
        """What stands for a tensor outside of this mode."""
        return tensor

    def holder(self, tensor: torch.Tensor) -> tuple[LightMode | None, Any]:
        """The innermost mode around this one to which a tensor depends on inputs, and what stands for the tensor there."""
        found: Any = tensor
        place = _count() - 1
        while place >= 0 and _at(place) is not self:
            place -= 1
        while place >= 0:
            mode = _at(place)
            if isinstance(mode, LightMode):
                if mode is not self and mode.is_active(found):
                    return mode, found
                found = mode.unwrapped(found)
            place -= 1
        return None, found

    def is_active(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor depends on inputs of this mode."""
        return False

    def belongs_to(self, tensor: torch.Tensor) -> tuple[LightMode | None, Any]:
        """The innermost mode, this one or one around it, to which a tensor depends on inputs, and what stands for it there."""
        return (self, tensor) if self.is_active(tensor) else self.holder(tensor)

    def requires_grad(self, tensor: torch.Tensor) -> bool:
        """What is said of a tensor's ``requires_grad``, where torch itself would say no: as in torch.func."""
        if _ASIDE.mode is not None or _asked_from_here():
            return False
        mode, stored = self.belongs_to(tensor)
        return mode is not None and mode.reverse and stored is tensor

    def ignores(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> bool:
        """Whether a function among :data:`chainrule.functions.FRESH` does not concern this mode, on these arguments."""
        return False

    def ignores_below(self, args: tuple[Any, ...]) -> bool:
        """Whether a conversion on these arguments does not concern this mode, which stands on another."""
        return False

    def make_shaped(self, func: Any, args: tuple[Any, ...]) -> Any:
        """What a function among :data:`chainrule.functions.SHAPED` makes, where the next mode makes it; else NotImplemented."""
        return NotImplemented

    def note_ignored(self, args: tuple[Any, ...], kwargs: dict[str, Any] | None, out: Any) -> None:
        """Take notice of the result of a function that was ignored."""

    def hear_function(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> None:
        """Take notice of a call, where somebody listens."""

    def take_function(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Take a function of the tables, if this mode is the innermost one."""
        if self.heard is not None:
            self.hear_function(func, args, kwargs)
        if func in FACTS:
            fact = func(*args, **kwargs) if kwargs else func(*args)
            return fact if fact or func != REQUIRES_GRAD else self.requires_grad(args[0])
        if func in OTHERWISE and (call := OTHERWISE[func](*args)) is not None:
            _push_function(self)
            try:
                return call()
            finally:
                _pop_function()
        if types and types != _ONLY_TENSOR and self._makes_plain(types):
            with torch._C.DisableTorchFunctionSubclass():
                return self.take_function(func, (), args, kwargs)
        if func in FRESH and self._depth == 1 and self.ignores(func, args, kwargs) and self._takes(types):
            without_handlers(True)
            try:
                out = func(*args, **kwargs) if kwargs else func(*args)
            finally:
                without_handlers(False)
            if func not in SHAPED:
                self.note_ignored(args, kwargs, out)
            return out
        if not kwargs and self.below is not None and (
            func in SHAPED or (func in CONVERTING and self.ignores_below(args))
        ) and self._takes(types):
            out = self.make_shaped(func, args)
            if out is not NotImplemented:
                if func not in SHAPED:
                    self.note_ignored(args, kwargs, out)
                return out
        function = TABLE.get(func)
        reading = READINGS.get(func)
        if function is None and reading is None:
            if func == _DATA:
                return self.read_data(args[0])
            if (taken := TAKEN.get(func)) is not None:
                return taken(self, *args, **kwargs) if kwargs else taken(self, *args)
            if func in MAKING_GRAPHS:
                mode: LightMode | None = self
                while mode is not None:
                    mode.graphs, mode = True, mode.below
                return func(*args, **kwargs) if kwargs else func(*args)
            if (original := original_of(func)) is not None:  # its replacement has called it
                return self.take_function(original, types, args, kwargs)
            return self._run_body(func, types, args, kwargs)
        if self._takes(types):
            without_handlers(True)
            try:
                out = NotImplemented
                if function is not None and (not kwargs or kwargs in NEUTRAL):
                    out = self.run_function(function, args)
                if out is NotImplemented and reading is not None and (read := reading(args, kwargs or {})) is not None:
                    if read[0] not in NAMED:  # only torch's own functions give results with names
                        out = self.run_op(*read)
                        out = tuple(out) if out.__class__ is list else out
            finally:
                without_handlers(False)
            if out is not NotImplemented:
                return out
        return self._run_body(func, types, args, kwargs)

    def _run_body(self, func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Any:
        """Run a function that torch has in Python with this mode on, so that what it calls is taken; others as they are."""
        body = body_of(func)
        if body is None or not self._takes(types):
            return func(*args, **kwargs) if kwargs else func(*args)
        _push_function(self)
        try:
            return body(*args, **kwargs) if kwargs else body(*args)
        finally:
            _pop_function()

    def _makes_plain(self, types: Any) -> bool:
        """Whether results are not made tensors of a subclass that is nothing more: it cannot hold a mapped tensor."""
        mode: LightMode | None = self
        while mode is not None and not mode.maps:
            mode = mode.below
        return mode is not None and all([kind.__torch_function__ is _NO_FUNCTIONS or is_bare(kind) for kind in types])

    def _takes(self, types: Any) -> bool:
        """Whether calls on tensors of these types may be taken."""
        return (
            # No class with its own way; methods without arguments name that of their tensor, whichever it is.
            (not types or all([kind is _TENSOR or kind.__torch_function__ is _NO_FUNCTIONS for kind in types]))
            and _count() == self._depth  # no other dispatch mode is inside of this one
            and _functorch_level() is None
        )

    def _enter(self) -> Self:
        _push(self)
        depth, taken, stands, pushed = _count(), None, False, False
        below = self.below
        if self.takes_functions:
            under = _at(depth - 2) if depth > 1 else None
            if under is None or (isinstance(under, LightMode) and under.takes_functions and under._depth == depth - 1):
                functions = _count_functions()
                top = _function_at(functions - 1) if functions else None
                if top is None or isinstance(top, LightMode):
                    taken = None if top is None else _pop_function()
                    _push_function(self)
                    self.below, stands, pushed = under, True, True
            if not stands and self.reads_data:
                functions = _count_functions()
                if not functions or not isinstance(_function_at(functions - 1), FunctionWatch):
                    _push_function(FunctionWatch())
                    pushed = True
        inside, real = modes._is_in_torch_dispatch_mode, modes._is_in_non_infra_torch_dispatch_mode
        self._entered.append((inside, real, taken, self._depth, below, pushed))
        self._depth = depth if stands else -1
        modes._is_in_torch_dispatch_mode = modes._is_in_non_infra_torch_dispatch_mode = True
        return self

    def _exit(self) -> None:
        inside, real, taken, self._depth, self.below, pushed = self._entered.pop()
        modes._is_in_torch_dispatch_mode, modes._is_in_non_infra_torch_dispatch_mode = inside, real
        if pushed:
            _pop_function()
            if taken is not None:
                _push_function(taken)
        _pop(None)


class _Aside(threading.local):
    mode: LightMode | None = None


_ASIDE = _Aside()


class functions_aside:  # noqa: N801 - used like torch.no_grad
    """Run a block without the innermost mode's look at functions, which torch extends to every look at a tensor's shape.

    What is to be seen by the mode is called by :func:`seen_by`.
    """

    __slots__ = ("_before", "_mode")

    def __enter__(self) -> None:
        count = _count_functions()
        found = count and isinstance(_function_at(count - 1), LightMode)
        self._before, self._mode = _ASIDE.mode, _pop_function() if found else None
        _ASIDE.mode = self._mode

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _ASIDE.mode = self._before
        if self._mode is not None:
            _push_function(self._mode)


class unasked:  # noqa: N801 - used like torch.no_grad
    """Run a block of this package's own inside of a mode that was just entered: its looks at tensors are not the mode's."""

    __slots__ = ("_mode",)

    def __init__(self, mode: LightMode) -> None:
        self._mode = mode

    def __enter__(self) -> None:
        _pop_function()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _push_function(self._mode)


class functions_seen:  # noqa: N801 - used like torch.no_grad
    """Run a block of this package's own with the innermost mode as a function mode, where no function mode is on.

    The mode then takes the block's calls before torch's dispatcher does.
    """

    __slots__ = ("_pushed",)

    def __enter__(self) -> None:
        depth = _count()
        mode = _at(depth - 1) if depth and not _count_functions() else None
        self._pushed = isinstance(mode, LightMode) and mode.takes_functions and mode._depth == depth
        if self._pushed:
            _push_function(mode)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._pushed:
            _pop_function()


def mode_aside() -> LightMode | None:
    """The mode whose look at functions is off in this block (:class:`functions_aside`)."""
    return _ASIDE.mode


def seen_by(mode: LightMode, function: Callable[..., Any], args: Iterable[Any], kwargs: dict[str, Any]) -> Any:
    """Call a function as one that the mode takes."""
    _push_function(mode)
    try:
        return function(*args, **kwargs) if kwargs else function(*args)
    finally:
        _pop_function()


class again:  # noqa: N801 - used like torch.no_grad
    """Run a block inside a mode's own handler under that mode: its ops arrive at the handler, functions do not.

    Torch's composite kernels must not be shown to function modes, which would call the op itself in their place.
    """

    __slots__ = ("_guard", "_mode")

    def __init__(self, mode: LightMode) -> None:
        self._mode = mode

    def __enter__(self) -> None:
        self._guard = torch._C.DisableTorchFunction()
        self._guard.__enter__()
        _push(self._mode)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _pop(None)
        self._guard.__exit__(kind, error, traceback)


class undispatched:  # noqa: N801 - used like torch.no_grad
    """Run a block without any mode."""

    __slots__ = ("_guards",)

    def __enter__(self) -> None:
        self._guards = torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch()
        for guard in self._guards:
            guard.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for guard in reversed(self._guards):
            guard.__exit__(kind, error, traceback)
