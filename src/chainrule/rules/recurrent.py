"""The pullback of an LSTM layer that torch runs as one kernel: what its gates were follows from the outputs that it gave.

With the hidden states known, the gates of all steps are one product of matrices; what is done step by step are the cell states
forward and the cotangents backward (Hochreiter and Schmidhuber 1997, with the forget gate of Gers et al. 2000).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from chainrule.rules.base import Call

aten = torch.ops.aten

#: Arguments of the op: the input, the weights of input and state, their biases, the hidden state and the cell state.
_TENSORS = 7

#: The outputs that have derivatives: hidden states, the last one, the last cell state.
_OUTPUT, _HIDDEN, _CELL = range(3)


class _Layer(NamedTuple):
    """What is static of a call: all that stands behind its tensors, by position."""

    reverse: bool
    batch_sizes: tuple[int, ...]
    mode: int
    hidden_size: int
    num_layers: int
    has_biases: bool
    bidirectional: bool
    batch_first: bool
    train: bool


class _Values(NamedTuple):
    """What a call read and gave."""

    input: Tensor
    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor
    b_hh: Tensor
    hidden: Tensor
    cell: Tensor
    output: Tensor
    last_hidden: Tensor
    last_cell: Tensor
    workspace: Tensor


def layer_pullback(call: Call, tensors: Sequence[Any], numbers: Sequence[int], output: int) -> Callable[..., Any] | None:
    """The pullback of one output of a call of ``mkldnn_rnn_layer``.

    Args:
        call: the call.
        tensors: the slots among its arguments, each once.
        numbers: which of them are differentiated.
        output: which output.

    Returns:
        A function of rows of cotangents, and the values of arguments and outputs in their order, to the rows of each tensor
        that is differentiated; None for calls that are left to torch's own formula.
    """
    layer = _Layer(*call.args[_TENSORS:])
    if layer.mode != 2 or layer.batch_sizes or output > _CELL:
        return None
    places = [place for place in range(_TENSORS) if layer.has_biases or place not in (3, 4)]
    wanted = [[place for place in places if call.args[place] == tensors[number]] for number in numbers]
    if not all(wanted):
        return None

    def pull(rows: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        return _pulled(layer, wanted, output, rows, *given)

    return pull


def _pulled(layer: _Layer, wanted: list[list[int]], output: int, rows: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    values = _Values(*tensors)
    alone = not torch._C._len_torch_dispatch_stack() and forward_ad._current_level < 0
    if alone and layer.train and rows.shape[0] == 1 and rows.__class__ is Tensor and values.input.numel():
        if not (torch.is_grad_enabled() and any([item.requires_grad for item in (rows, *tensors)])):
            return _by_kernel(layer, wanted, output, rows, values)
    several = rows.shape[0] != 1
    found = _by_gates(layer, {place for places in wanted for place in places}, output, rows if several else rows[0], values)
    summed = [_sum([found[place] for place in places]) for places in wanted]
    return tuple(summed if several else [item.unsqueeze(0) for item in summed])


def _sum(items: list[Tensor]) -> Tensor:
    total = items[0]
    for item in items[1:]:
        total = total + item
    return total


def _by_kernel(
    layer: _Layer, wanted: list[list[int]], output: int, rows: Tensor, values: _Values
) -> tuple[Tensor, ...]:
    """The same by torch's kernel, which nothing may differentiate."""
    seeds: list[Tensor | None] = [None, None, None]
    seeds[output] = rows[0]
    found = aten.mkldnn_rnn_layer_backward.default(
        *values[:10], *seeds, layer.reverse, layer.mode, layer.hidden_size, layer.num_layers, layer.has_biases, layer.train,
        layer.bidirectional, layer.batch_sizes, layer.batch_first, values.workspace,
    )  # fmt: skip
    return tuple([_sum([found[place].reshape(values[place].shape) for place in places]).unsqueeze(0) for places in wanted])


def _by_gates(layer: _Layer, wanted: set[int], output: int, seed: Tensor, values: _Values) -> dict[int, Tensor]:
    """The cotangents of the arguments at the `wanted` places, from one of an output, or rows of them in front."""
    x, w_ih, w_hh, b_ih, b_hh, first_hidden, first_cell, hidden, *_ = values
    steps = x.shape[0]
    # The steps in the order in which the kernel did them.
    order = range(steps - 1, -1, -1) if layer.reverse else range(steps)
    kept = hidden[1:] if layer.reverse else hidden[:-1]
    before = torch.cat([kept, first_hidden[None]] if layer.reverse else [first_hidden[None], kept])
    biases = (b_ih, b_hh) if layer.has_biases else (None, None)
    linear = torch.nn.functional.linear
    entered = linear(x, w_ih, biases[0]) + linear(before, w_hh, biases[1])
    opened, forgot, new, shown = entered.chunk(4, -1)
    opened, forgot, new, shown = opened.sigmoid(), forgot.sigmoid(), new.tanh(), shown.sigmoid()
    added, kept_shares = (opened * new).unbind(0), forgot.unbind(0)
    cells: list[Tensor] = [first_cell] * (steps + 1)
    for count, step in enumerate(order):
        cells[count + 1] = torch.addcmul(added[step], kept_shares[step], cells[count])
    previous, reached = torch.stack(cells[:-1]), torch.stack(cells[1:])
    if layer.reverse:
        previous, reached = previous.flip(0), reached.flip(0)
    bent = reached.tanh()
    by_cell = (shown * (1 - bent * bent)).unbind(0)
    gates = torch.cat(
        [new * opened * (1 - opened), previous * forgot * (1 - forgot), opened * (1 - new * new), bent * shown * (1 - shown)], -1
    ).unbind(0)
    seeds = seed.unbind(-3) if output == _OUTPUT else None
    zero = torch.zeros_like(seed) if output == _CELL else None
    of_hidden = seed if zero is None else zero
    of_cell = seed if output == _CELL else None
    found: list[Tensor] = []
    for count, step in enumerate(reversed(order)):
        if seeds is not None:
            of_hidden = seeds[step] if count == 0 else _onward(seeds[step], found[-1], w_hh)
        elif count:
            of_hidden = found[-1] @ w_hh
        of_cell = of_hidden * by_cell[step] if of_cell is None else torch.addcmul(of_cell, of_hidden, by_cell[step])
        found.append(torch.cat([of_cell, of_cell, of_cell, of_hidden], -1) * gates[step])
        of_cell = of_cell * kept_shares[step]
    assert of_cell is not None
    flow = torch.stack(found if layer.reverse else found[::-1], -3)
    return {place: _cotangent(place, flow, found[-1], of_cell, before, values) for place in wanted}


def _onward(seed: Tensor, found: Tensor, weight: Tensor) -> Tensor:
    return torch.addmm(seed, found, weight) if found.dim() == 2 else seed + found @ weight


def _cotangent(place: int, flow: Tensor, last: Tensor, of_cell: Tensor, before: Tensor, values: _Values) -> Tensor:
    """That of an argument, from those of the gates before their functions, at all steps and at the first one."""
    if place == 0:
        return flow @ values.w_ih
    if place in (1, 2):
        source = values.input if place == 1 else before
        return flow.flatten(-3, -2).transpose(-2, -1) @ source.flatten(0, 1)
    if place in (3, 4):
        return flow.sum((-3, -2))
    return last @ values.w_hh if place == 5 else of_cell


__all__ = ["layer_pullback"]
