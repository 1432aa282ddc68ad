"""The calls of a compiled function with one signature, as one Python function.

It looks at the arguments, and at what the graph depends on beside them, calls the graph's functions in a straight line, and
puts the result together, without lists of leaves, keys and structures in between. Shapes, strides, dtypes and devices are
compared by torch's own guards (those of `torch.compile`), in one call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.utils._pytree import TreeSpec

from chainrule.capture.surroundings import same
from chainrule.execute.accounts import read_ledger
from chainrule.execute.compiled import Run
from chainrule.execute.memory import current_watch
from chainrule.maps.staging import Instruction
from chainrule.transforms.arguments import tree_unflatten

#: Takes arguments and keyword arguments; NotImplemented where they have another signature, or something else has changed.
Call = Callable[[tuple[Any, ...], dict[str, Any]], Any]

#: Longer programs are called, and not written out once more.
_LONGEST = 100

_COMPARED = frozenset({int, float, complex, str, bytes, torch.Size})

_SPARSE = frozenset({torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc})


def tensor_kind(tensor: torch.Tensor) -> Any:
    """What a graph depends on of a closed-over tensor, but for its values; for sparse ones the number of entries, too."""
    layout = tensor.layout
    memory: Any = tensor.stride() if layout is torch.strided else layout
    if layout in _SPARSE:
        memory = layout, tensor._nnz(), tensor.dense_dim()
    return (tensor.shape, tensor.dtype, tensor.device, memory, tensor.requires_grad, tensor.is_neg() or tensor.is_conj())


def gradient_kind(tensor: torch.Tensor) -> Any:
    """What Python may have seen of the ``grad`` of a tensor, but for its values; None where there is none."""
    grad = tensor.grad
    return None if grad is None else (grad.shape, grad.dtype, grad.device, grad.stride(), grad.requires_grad)


_STATE: dict[str, Any] = {
    "dispatch_modes": torch._C._len_torch_dispatch_stack,
    "function_modes": torch._C._len_torch_function_stack,
    "functorch": torch._C._are_functorch_transforms_active,
    "ledger": read_ledger,
    "watch": current_watch,
    "autocast": torch._C._is_any_autocast_enabled,
    "grad": torch.is_grad_enabled,
    "inference": torch.is_inference_mode_enabled,
    "dtype": torch.get_default_dtype,
    "forward": forward_ad,
    "equal": torch.equal,
    "gradient_kind": gradient_kind,
    "tensor_kind": tensor_kind,
    "same": same,
    "unflatten": tree_unflatten,
}


class _Unknown(Exception):  # noqa: N818 - never reaches a user
    """There is no such function for these arguments."""


def call_of(
    graph: Any, args: tuple[Any, ...], kwargs: dict[str, Any], counts: list[int]
) -> Call | None:
    """The function for arguments like these; None where they hold something other than plain containers and tensors.

    Args:
        graph: the graph (of :mod:`chainrule.transforms.compile`) that these arguments are replayed with.
        args: positional arguments.
        kwargs: keyword arguments.
        counts: its first entry is increased by each call.
    """
    if torch._C._len_torch_function_stack() or torch._C._is_any_autocast_enabled():
        return None
    try:
        return _Writer(graph, counts).function(args, kwargs)
    except _Unknown:
        return None


def _guard(tensors: Sequence[torch.Tensor]) -> Callable[..., bool]:
    """Whether tensors are of the classes, shapes, strides, dtypes, devices and dispatch keys of these; each is another object."""
    try:
        made = torch._C._dynamo.guards.TensorGuards(  # type: ignore[attr-defined]
            *tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None
        )
    except (AttributeError, TypeError, RuntimeError):
        raise _Unknown from None
    check: Callable[..., bool] = made.check
    if not check(*tensors):
        raise _Unknown
    return check


class _Writer:
    """Writes the function.

    Args:
        graph: the graph.
        counts: see :func:`call_of`.
    """

    def __init__(self, graph: Any, counts: list[int]) -> None:
        self.graph = graph
        self.source = getattr(graph.run, "source_of", None)
        self.names: dict[str, Any] = {**_STATE, "counts": counts, "hold": graph.surroundings.is_same}
        self.lines: list[str] = []
        self.given: list[torch.Tensor] = []
        self._count = 0

    def function(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """The function for arguments like these."""
        self._match(args, "args")
        self._match(kwargs, "kwargs")
        if not self.given or len(set(map(id, self.given))) < len(self.given):
            raise _Unknown
        self._guards()
        graph = self.graph
        instructions: list[Instruction] | None = getattr(graph.run, "instructions", None)
        short = self.source is not None and instructions is not None and len(instructions) <= _LONGEST
        found, checked = self._straight(instructions or []) if short else self._called()
        if checked:
            right = " and ".join(f"equal({one}, {self._name(known)})" for one, known in zip(checked, graph.expected, strict=True))
            self._unless(right)
        self.lines.append("counts[0] += 1")
        for position, value in graph.statics:
            found.insert(position, self._name(value))
        leaves = iter(found)
        self.lines.append(f"return {self._result(graph.spec, leaves)}")
        text = "def call(args, kwargs):\n" + "".join(f"    {line}\n" for line in self.lines)
        names = {**(self.source.namespace if short else {}), **self.names}  # type: ignore[union-attr]
        exec(compile(text, "<chainrule call>", "exec"), names)  # noqa: S102 - our own generated source
        call: Call = names["call"]
        return call

    def _name(self, value: Any) -> str:
        name = f"k{self._count}"
        self._count += 1
        self.names[name] = value
        return name

    def _unless(self, condition: str) -> None:
        self.lines += [f"if not ({condition}):", "    return NotImplemented"]

    def _match(self, value: Any, place: str) -> None:
        """Take an argument apart, and compare what is no tensor."""
        kind = value.__class__
        if kind is torch.Tensor or kind is torch.nn.Parameter:
            self.lines.append(f"a{len(self.given)} = {place}")
            self.given.append(value)
        elif kind is tuple or kind is list or kind is dict:
            whole = place
            if not place.isidentifier():
                whole = f"t{len(self.lines)}"
                self.lines.append(f"{whole} = {place}")
            if kind is dict and not value:
                self._unless(f"{whole}.__class__ is dict and not {whole}")
                return
            if kind is dict:
                self._unless(f"{whole}.__class__ is dict and [*{whole}] == {self._name([*value])}")
                parts = f"t{len(self.lines)}"
                self.lines.append(f"{parts} = [*{whole}.values()]")
                whole, value = parts, [*value.values()]
            else:
                self._unless(f"{whole}.__class__ is {kind.__name__} and len({whole}) == {len(value)}")
            for number, item in enumerate(value):
                self._match(item, f"{whole}[{number}]")
        elif isinstance(value, (tuple, list, dict)) and kind is not torch.Size:
            raise _Unknown
        else:
            known = self._name(value)
            self._unless(f"{place} is {known}" + (f" or same({place}, {known})" if kind in _COMPARED else ""))

    def _guards(self) -> None:
        """Compare the state of torch, the tensors, and what was found beside the arguments."""
        graph, names = self.graph, [f"a{number}" for number in range(len(self.given))]
        state = f"grad() is {torch.is_grad_enabled()} and inference() is {torch.is_inference_mode_enabled()}"
        self.names.update(check=_guard(self.given), default=torch.get_default_dtype())
        self._unless(f"{state} and dtype() is default and ledger() is None and watch() is None and forward._current_level < 0")
        self.lines += ["if dispatch_modes() or function_modes() or functorch() or autocast():", "    return NotImplemented"]
        conditions = [f"check({', '.join(names)})"]
        if not torch.is_grad_enabled():  # torch's guards leave it out then
            conditions += [f"{name}.requires_grad is {t.requires_grad}" for name, t in zip(names, self.given, strict=True)]
        beside = [tensor for tensor in (*graph.closed, *graph.seen) if tensor.layout is torch.strided]
        others = [tensor for tensor in graph.closed if tensor.layout is not torch.strided]  # torch's guards ask for strides
        conditions += [f"tensor_kind({self._name(tensor)}) == {self._name(tensor_kind(tensor))}" for tensor in others]
        if beside:
            self.names["check_beside"] = _guard(beside)
            conditions.append(f"check_beside({', '.join(self._name(tensor) for tensor in beside)})")
            if not torch.is_grad_enabled():
                conditions += [f"{self._name(t)}.requires_grad is {t.requires_grad}" for t in beside]
        conditions += [f"{self._name(tensor)}.grad is {self._name(grad)}" for tensor, grad in graph.grads]
        conditions += [f"gradient_kind({self._name(tensor)}) == {self._name(kind)}" for tensor, kind in graph.asked]
        self._unless(" and ".join([*conditions, "hold()"]))

    def _straight(self, instructions: list[Instruction]) -> tuple[list[str], list[str]]:
        """The graph's calls, written out: the names of its results, and of what has to have known values."""
        source = self.source
        assert source is not None
        for number, slot in source.program.inputs.items():
            if slot in source.used:
                closed = number - len(self.given)
                self.lines.append(f"v{slot} = " + (f"a{number}" if closed < 0 else self._name(self.graph.closed[closed])))
        self.lines += [line.strip() for line in source.block(instructions, source.wanted)]
        names = [f"v{slot}" for slot in source.wanted]
        results = [f"{name}.clone()" if number in source.copied else name for number, name in enumerate(names)]
        count = len(results) - len(self.graph.expected)
        return results[:count], names[count:]

    def _called(self) -> tuple[list[str], list[str]]:
        """A call of the graph's function."""
        run: Run = self.graph.run
        # Behind the checks, code that a compiler has made needs no function around it.
        self.names["run"] = getattr(run, "code", run)
        given = [*map(self._name, getattr(run, "constants", ())), *(f"a{number}" for number in range(len(self.given)))]
        self.lines.append(f"found = run([{', '.join([*given, *map(self._name, self.graph.closed)])}])")
        total = self.graph.count
        names = [f"found[{number}]" for number in range(total)]
        count = total - len(self.graph.expected)
        return names[:count], names[count:]

    def _result(self, spec: TreeSpec, leaves: Any) -> str:
        """The expression of a result of a structure."""
        if spec.type is None:
            leaf: str = next(leaves)
            return leaf
        children = [self._result(child, leaves) for child in spec._children] if spec.type in (tuple, list, dict) else []
        if spec.type is tuple:
            return f"({', '.join(children)}{',' if len(children) == 1 else ''})"
        if spec.type is list:
            return f"[{', '.join(children)}]"
        if spec.type is dict:
            return "{" + ", ".join(f"{self._name(key)}: {item}" for key, item in zip(spec.context, children, strict=True)) + "}"
        items = [next(leaves) for _ in range(spec.num_leaves)]
        return f"unflatten([{', '.join(items)}], {self._name(spec)})"


__all__ = ["Call", "call_of", "gradient_kind", "tensor_kind"]
