"""Ops that are recorded as others without a way through torch's dispatcher for each of these.

Torch's composite kernels, and decompositions written with torch's functions, come back to the recording op by op, each time
by the dispatcher. For the commonest composite ops the parts are written down here: each function gets ``run(op, *args)``,
which runs one part and records it, and the op's own arguments. It does what torch's kernel does for the usual arguments,
and returns `NotImplemented`, before it has run anything, for all others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

aten = torch.ops.aten
Tensor = torch.Tensor
Run = Callable[..., Any]

_MEAN, _SUM = 1, 2
_LOW = (torch.float16, torch.bfloat16)


def _dropout(run: Run, input: Tensor, p: float, train: bool) -> Any:
    if not train or p == 0:
        return input
    if not input.is_cpu or not 0 < p < 1:  # accelerators have one kernel for it
        return NotImplemented
    noise = run(aten.empty_like.default, input)
    if not _may_draw(input) or not input.is_contiguous():
        return run(aten.mul.Tensor, input, run(aten.div_.Tensor, run(aten.bernoulli_.float, noise, 1 - p), 1 - p))
    # Torch's own draw, which is in place, without a write: it gives memory in the order of the dimensions.
    return run(aten.mul.Tensor, input, run(aten.div.Tensor, run(aten.bernoulli.p, noise, 1 - p), 1 - p))


def _may_draw(input: Tensor) -> bool:
    """Whether random numbers for a tensor are drawn as torch's composite kernels do, and by no vmap."""
    return input.__class__ is Tensor and input.is_cpu and input.dtype.is_floating_point and input.numel() > 0


def _layer_norm(
    run: Run, input: Tensor, shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None,
    eps: float = 1e-5, cudnn_enable: bool = True,
) -> Any:  # fmt: skip
    return run(aten.native_layer_norm.default, input, shape, weight, bias, eps)[0]


def _layer_norm_in_parts(
    run: Run, input: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Any:
    """The op with a mean and a scale that torch's autograd does not take for constants."""
    if input.dtype in _LOW or not input.numel():
        return NotImplemented
    dims = [*range(input.dim() - len(shape), input.dim())]
    mean = run(aten.mean.dim, input, dims, True)
    centred = run(aten.sub.Tensor, input, mean)
    variance = run(aten.mean.dim, run(aten.mul.Tensor, centred, centred), dims, True)
    scale = run(aten.rsqrt.default, run(aten.add.Tensor, variance, eps))
    out = run(aten.mul.Tensor, centred, scale)
    out = out if weight is None else run(aten.mul.Tensor, out, weight)
    return out if bias is None else run(aten.add.Tensor, out, bias), mean, scale


def _softmax(run: Run, input: Tensor, dim: int, dtype: torch.dtype | None = None) -> Any:
    return NotImplemented if dtype is not None else run(aten._softmax.default, input, dim, False)


def _log_softmax(run: Run, input: Tensor, dim: int, dtype: torch.dtype | None = None) -> Any:
    return NotImplemented if dtype is not None else run(aten._log_softmax.default, input, dim, False)


def _convolution(dims: int) -> Callable[..., Any]:
    def convolve(
        run: Run, input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Sequence[int] = (1,),
        padding: Sequence[int] = (0,), dilation: Sequence[int] = (1,), groups: int = 1,
    ) -> Any:  # fmt: skip
        missing = dims + 2 - input.dim()
        if missing not in (0, 1) or weight.dim() != dims + 2 or input.is_complex() or weight.is_complex():
            return NotImplemented
        if missing:
            input = run(aten.unsqueeze.default, input, 0)
        sizes = [list(item) * dims if len(item) == 1 else list(item) for item in (stride, padding, dilation)]
        out = run(aten.convolution.default, input, weight, bias, *sizes, False, [0] * dims, groups)
        return run(aten.squeeze.dim, out, 0) if missing else out

    return convolve


def _batch_norm(
    run: Run, input: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None, variance: Tensor | None,
    training: bool, momentum: float, eps: float, cudnn_enabled: bool,
) -> Any:  # fmt: skip
    # On other devices torch chooses among kernels; statistics that are updated are left to it as well.
    known = mean is not None and variance is not None
    if not input.is_cpu or not input.numel() or training == known or (training and (mean is not None or variance is not None)):
        return NotImplemented
    return run(aten.native_batch_norm.default, input, weight, bias, mean, variance, training, momentum, eps)[0]


def has_classes(input: Tensor, target: Tensor) -> bool:
    """Whether the targets are one class each, of the shape that the logits ask for."""
    whole = not (target.dtype.is_floating_point or target.dtype.is_complex)
    return whole and input.dim() > 0 and target.shape == (
        input.shape[1:1] if input.dim() == 1 else input.shape[:1] + input.shape[2:]
    )  # fmt: skip


def _is_own(tensor: Tensor) -> bool:
    """Whether a tensor is torch's own, or what a vmap has in its place."""
    kind = tensor.__class__
    return kind is Tensor or getattr(kind, "is_mapped", False)


def is_plain_nll(input: Tensor, target: Tensor, weight: Tensor | None) -> bool:
    """Whether the loss is recorded whole: one class for each row of a matrix, or for one row, on tensors of torch's own."""
    return (
        _is_own(input)
        and _is_own(target)
        and (weight is None or (_is_own(weight) and weight.dtype is input.dtype and weight.shape == input.shape[-1:]))
        and input.dtype in (torch.float32, torch.float64)
        and input.dim() in (1, 2)
        and input.shape[-1] > 1
        and target.dtype is torch.long
        and target.shape == input.shape[:-1]
    )


def _number(run: Run, like: Tensor, number: float) -> Tensor:
    """A number as a tensor without dimensions, made by a part where that can be heard (:mod:`chainrule.capture.composites`)."""
    if like.__class__ is Tensor:
        found: Tensor = run(aten.new_full.default, like, [], number)
        return found
    return torch.full((), number, dtype=like.dtype, device=like.device)


def nll_loss(
    run: Run, input: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignored: int
) -> tuple[Tensor, Tensor]:
    """The negative log-likelihood of the targets' classes, and the total weight of those that count.

    The mean over no target is NaN, and its derivatives are zero, as torch's kernels have it.
    """
    classes = 0 if input.dim() == 1 else 1
    # What depends on the targets alone is a constant: it is run, but not recorded.
    kept = run(aten.ne.Scalar, target, ignored)
    place = run(aten.mul.Tensor, target, kept)
    nothing = _number(run, input, 0.0)
    picked = run(aten.gather.default, input, classes, run(aten.unsqueeze.default, place, classes))
    picked = run(aten.squeeze.dim, picked, classes)
    if weight is not None:
        shares = run(aten.index.Tensor, weight, [place]) if place.dim() else run(aten.squeeze.dim, run(
            aten.index_select.default, weight, 0, run(aten.view.default, place, [1])), 0)  # fmt: skip
        picked = run(aten.mul.Tensor, picked, shares)
    if reduction not in (_MEAN, _SUM):
        return run(aten.neg.default, run(aten.where.self, kept, picked, nothing)), nothing
    if weight is None:
        total = run(aten.sum.default, kept, dtype=input.dtype)
    else:
        total = run(aten.sum.default, run(aten.where.self, kept, shares, nothing))
    if reduction == _SUM or not target.numel():
        # A sum of no terms at all is divided by zero, and has nothing to differentiate.
        picked = run(aten.neg.default, run(aten.sum.default, run(aten.where.self, kept, picked, nothing)))
        return picked if reduction == _SUM else run(aten.div.Tensor, picked, total), total
    if weight is None:
        scale, rest = run(aten.clamp.default, run(aten.neg.default, total), None, -1), run(aten.div.Tensor, nothing, total)
    else:
        some = run(aten.any.default, kept)
        scale = run(aten.where.self, some, run(aten.neg.default, total), _number(run, input, -1.0))
        rest = run(aten.where.self, some, nothing, _number(run, input, math.nan))
    picked = run(aten.where.self, kept, picked, rest)
    return run(aten.div.Tensor, run(aten.sum.default, picked), scale), total


def _cross_entropy(
    run: Run, input: Tensor, target: Tensor, weight: Tensor | None = None, reduction: int = _MEAN, ignored: int = -100,
    smoothing: float = 0.0,
) -> Any:  # fmt: skip
    if input.dtype in _LOW:
        return NotImplemented
    if not has_classes(input, target):
        return _cross_entropy_of_shares(run, input, target, weight, reduction, smoothing)
    whole = is_plain_nll(input, target, weight)
    if not whole and (smoothing or weight is not None):
        return NotImplemented
    logarithms = run(aten._log_softmax.default, input, 0 if input.dim() == 1 else 1, False)
    if not whole:
        return nll_loss(run, logarithms, target, None, reduction, ignored)[0]
    loss, total = run(aten.nll_loss_forward.default, logarithms, target, weight, reduction, ignored)
    return smoothed(run, loss, total, logarithms, target, weight, reduction, ignored, smoothing) if smoothing else loss


def _cross_entropy_of_shares(
    run: Run, input: Tensor, target: Tensor, weight: Tensor | None, reduction: int, smoothing: float
) -> Any:
    """The cross-entropy where each target is a share of every class."""
    if weight is not None or input.shape != target.shape or input.dtype != target.dtype or not input.numel():
        return NotImplemented
    classes = 0 if input.dim() == 1 else 1
    logarithms = run(aten._log_softmax.default, input, classes, False)
    if smoothing:
        target = run(aten.add.Tensor, run(aten.mul.Tensor, target, 1 - smoothing), smoothing / input.shape[classes])
    products = run(aten.mul.Tensor, logarithms, target)
    if reduction not in (_MEAN, _SUM):
        return run(aten.neg.default, run(aten.sum.dim_IntList, products, [classes]))
    total = run(aten.neg.default, run(aten.sum.default, products))
    return total if reduction == _SUM else run(aten.div.Tensor, total, input.numel() / input.shape[classes])


def smoothed(
    run: Run, loss: Tensor, total: Tensor, logarithms: Tensor, target: Tensor, weight: Tensor | None, reduction: int,
    ignored: int, smoothing: float
) -> Tensor:  # fmt: skip
    """The loss of targets that share some of their weight with all classes.

    Args:
        run: runs a part.
        loss: the loss without that, of a total weight of the targets.
        total: that weight.
        logarithms: of the probabilities of the classes.
        target: the targets.
        weight: of each class.
        reduction: what is made of the losses of all targets.
        ignored: the target that does not count.
        smoothing: the weight that is shared.
    """
    classes = 0 if logarithms.dim() == 1 else 1
    kept = run(aten.ne.Scalar, target, ignored)
    nothing = _number(run, logarithms, 0.0)
    share = -smoothing / logarithms.shape[classes]
    if weight is not None:
        shape = [-1 if dim == classes else 1 for dim in range(logarithms.dim())]
        logarithms = run(aten.mul.Tensor, logarithms, run(aten.view.default, weight, shape))
    rest = run(aten.where.self, kept, run(aten.sum.dim_IntList, logarithms, [classes]), nothing)
    if reduction in (_MEAN, _SUM):
        rest = run(aten.sum.default, rest)
    if reduction == _MEAN:
        # Without a target that counts the loss is NaN already.
        rest = run(aten.div.Tensor, rest, run(aten.where.self, run(aten.any.default, kept), total, _number(run, logarithms, 1.0)))
    rest = run(aten.mul.Tensor, rest, share)
    found: Tensor = run(aten.add.Tensor, run(aten.mul.Tensor, loss, 1 - smoothing), rest)
    return found


def _cosine_similarity(run: Run, one: Tensor, two: Tensor, dim: int = 1, eps: float = 1e-8) -> Any:
    if one.shape != two.shape or one.dtype != two.dtype or not one.is_floating_point() or not one.dim():
        return NotImplemented
    alone = not torch._C._len_torch_dispatch_stack()
    units = []
    for item in (one, two):
        norm = run(aten.linalg_vector_norm.default, item, 2, [dim], True)
        # The clamp does not stop the derivative.
        if alone:
            rest = torch.clamp_min(norm, eps) - norm
        else:  # what stops a derivative is not the same to each transform
            rest = run(aten.sub.Tensor, run(aten.clamp_min.default, norm, eps), norm)
            rest = run(aten.detach.default, rest)
        norm = run(aten.add.Tensor, norm, rest)
        units.append(run(aten.div.Tensor, item, norm))
    return run(aten.sum.dim_IntList, run(aten.mul.Tensor, *units), [dim])


def _nll_loss_nd(
    run: Run, input: Tensor, target: Tensor, weight: Tensor | None = None, reduction: int = _MEAN, ignored: int = -100
) -> Any:
    if input.dtype in _LOW or not has_classes(input, target):
        return NotImplemented
    if is_plain_nll(input, target, weight):
        return run(aten.nll_loss_forward.default, input, target, weight, reduction, ignored)[0]
    return nll_loss(run, input, target, None, reduction, ignored)[0] if weight is None else NotImplemented


def _attention(
    run: Run, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, dropout: float = 0.0,
    causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
) -> Any:  # fmt: skip
    draws = 0 < dropout < 1 and _may_draw(query) and query.dim() == key.dim() and key.numel() > 0
    if mask is not None or enable_gqa or (dropout and not draws):
        return NotImplemented
    query = run(aten.mul.Tensor, query, 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale)
    scores = run(aten.matmul.default, query, run(aten.transpose.int, key, -2, -1))
    if causal:
        keep = torch.ones((query.shape[-2], key.shape[-2]), dtype=torch.bool, device=query.device).tril()
        scores = run(aten.where.self, keep, scores, torch.full((), -math.inf, dtype=scores.dtype, device=query.device))
    weights = _dropout(run, run(aten._softmax.default, scores, -1, False), dropout, True)
    return run(aten.matmul.default, weights, value)


def _flatten(run: Run, input: Tensor, start: int = 0, end: int = -1) -> Any:
    rank = input.dim()
    first, last = (start + rank if start < 0 else start), (end + rank if end < 0 else end)
    # Whatever cannot be a view is copied by torch, in its own layout.
    if not 0 <= first < last < rank or not input.is_contiguous():
        return NotImplemented
    shape = input.shape
    return run(aten.view.default, input, [*shape[:first], math.prod(shape[first : last + 1]), *shape[last + 1 :]])


def _unflatten(run: Run, input: Tensor, dim: int, sizes: Sequence[int]) -> Any:
    rank = input.dim()
    place = dim + rank if dim < 0 else dim
    if not 0 <= place < rank or not sizes or min(sizes) < 1 or math.prod(sizes) != input.shape[place]:
        return NotImplemented
    return run(aten.view.default, input, [*input.shape[:place], *sizes, *input.shape[place + 1 :]])


def _outer(run: Run, one: Tensor, two: Tensor) -> Any:
    if one.dim() != 1 or two.dim() != 1 or one.dtype is not two.dtype:
        return NotImplemented
    return run(aten.mul.Tensor, run(aten.unsqueeze.default, one, 1), two)


def _chunks(run: Run, input: Tensor, count: int, dim: int = 0, *, op: Any = aten.split.Tensor) -> Any:
    if not input.dim() or count < 1 or not input.shape[dim]:
        return NotImplemented
    return run(op, input, -(-input.shape[dim] // count), dim)


def _unsafe_chunks(run: Run, input: Tensor, count: int, dim: int = 0) -> Any:
    return _chunks(run, input, count, dim, op=aten.unsafe_split.Tensor)


def _sections(run: Run, input: Tensor, sizes: Sequence[int], dim: int = 0) -> Any:
    return run(aten.split_with_sizes.default, input, sizes, dim)


def _pad(run: Run, input: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Any:
    if mode == "circular":
        return _pad_around(run, input, pad)
    if mode != "constant":
        return NotImplemented
    return run(aten.constant_pad_nd.default, input, pad, 0.0 if value is None else value)


def _pad_around(run: Run, input: Tensor, pad: Sequence[int]) -> Any:
    """The last values before the first, and the first after the last, of all dimensions but batch and channels."""
    pairs = [*zip(pad[::2], pad[1::2], strict=True)] if len(pad) % 2 == 0 else []
    shape = input.shape
    if not pairs or len(shape) != len(pairs) + 2 or not input.numel():
        return NotImplemented
    if not all(0 <= before <= shape[-1 - n] and 0 <= after <= shape[-1 - n] for n, (before, after) in enumerate(pairs)):
        return NotImplemented
    for number, (before, after) in enumerate(pairs):
        dim = len(shape) - 1 - number
        parts = [input]
        if before:
            parts.insert(0, run(aten.slice.Tensor, input, dim, shape[dim] - before, shape[dim], 1))
        if after:
            parts.append(run(aten.slice.Tensor, input, dim, 0, after, 1))
        if len(parts) > 1:
            input = run(aten.cat.default, parts, dim)
    return input if any(pad) else run(aten.clone.default, input)


def _lstm_cell(
    run: Run, input: Tensor, state: Sequence[Tensor], w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Any:  # fmt: skip
    return _lstm_step(run, _linear(run, input, w_ih, b_ih), state, w_hh, b_hh) if input.is_cpu else NotImplemented


def _lstm_step(
    run: Run, entered: Tensor, state: Sequence[Tensor], w_hh: Tensor, b_hh: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The next hidden state and cell, from the linear function of the input."""
    hidden, cell = state
    gates = run(aten.add.Tensor, _linear(run, hidden, w_hh, b_hh), entered)
    into, forget, new, out = _unsafe_chunks(run, gates, 4, 1)
    into, forget, out = (run(aten.sigmoid.default, gate) for gate in (into, forget, out))
    kept = run(aten.mul.Tensor, into, run(aten.tanh.default, new))
    cell = run(aten.add.Tensor, run(aten.mul.Tensor, forget, cell), kept)
    return run(aten.mul.Tensor, out, run(aten.tanh.default, cell)), cell


def _gru_cell(
    run: Run, input: Tensor, hidden: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
) -> Any:
    return gru_step(run, _linear(run, input, w_ih, b_ih), hidden, w_hh, b_hh) if input.is_cpu else NotImplemented


def _plain_cell(activation: Any) -> Callable[..., Any]:
    def cell(
        run: Run, input: Tensor, hidden: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None,
        b_hh: Tensor | None = None,
    ) -> Any:  # fmt: skip
        return run(activation, run(aten.add.Tensor, _linear(run, hidden, w_hh, b_hh), _linear(run, input, w_ih, b_ih)))

    return cell


def _plain_layers(activation: Any) -> Callable[..., Any]:
    def layers(
        run: Run, input: Tensor, state: Tensor, parameters: Sequence[Tensor], has_biases: bool, layers: int, dropout: float,
        train: bool, bidirectional: bool, batch_first: bool,
    ) -> Any:  # fmt: skip
        def step(entered: Tensor, state: Sequence[Tensor], w_hh: Tensor, b_hh: Tensor | None) -> Sequence[Tensor]:
            return (run(activation, run(aten.add.Tensor, _linear(run, state[0], w_hh, b_hh), entered)),)

        options = has_biases, layers, dropout if train else 0.0, bidirectional, batch_first
        return _recurrent(run, input, [state], parameters, step, *options)

    return layers


def gru_step(run: Run, entered: Tensor, hidden: Tensor, w_hh: Tensor, b_hh: Tensor | None) -> Tensor:
    """The next hidden state, from the linear function of the input."""
    reset_in, update_in, new_in = _unsafe_chunks(run, entered, 3, 1)
    reset, update, new = _unsafe_chunks(run, _linear(run, hidden, w_hh, b_hh), 3, 1)
    reset = run(aten.sigmoid.default, run(aten.add.Tensor, reset, reset_in))
    update = run(aten.sigmoid.default, run(aten.add.Tensor, update, update_in))
    new = run(aten.tanh.default, run(aten.add.Tensor, new_in, run(aten.mul.Tensor, new, reset)))
    kept = run(aten.mul.Tensor, run(aten.sub.Tensor, hidden, new), update)
    state: Tensor = run(aten.add.Tensor, kept, new)
    return state


def _linear(run: Run, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = run(aten.linear.default, input, weight) if bias is None else run(aten.linear.default, input, weight, bias)
    return out


def _gru(
    run: Run, input: Tensor, state: Tensor, parameters: Sequence[Tensor], has_biases: bool, layers: int, dropout: float,
    train: bool, bidirectional: bool, batch_first: bool,
) -> Any:  # fmt: skip
    def step(entered: Tensor, state: Sequence[Tensor], w_hh: Tensor, b_hh: Tensor | None) -> Sequence[Tensor]:
        return (gru_step(run, entered, state[0], w_hh, b_hh),)

    options = has_biases, layers, dropout if train else 0.0, bidirectional, batch_first
    return _recurrent(run, input, [state], parameters, step, *options)


def _lstm(
    run: Run, input: Tensor, states: Sequence[Tensor], parameters: Sequence[Tensor], has_biases: bool, layers: int,
    dropout: float, train: bool, bidirectional: bool, batch_first: bool,
) -> Any:  # fmt: skip
    if input.__class__ is Tensor:  # torch has one kernel for all of it
        return NotImplemented

    def step(entered: Tensor, state: Sequence[Tensor], w_hh: Tensor, b_hh: Tensor | None) -> Sequence[Tensor]:
        return _lstm_step(run, entered, state, w_hh, b_hh)

    options = has_biases, layers, dropout if train else 0.0, bidirectional, batch_first
    return _recurrent(run, input, states, parameters, step, *options)


def _recurrent(
    run: Run, input: Tensor, states: Sequence[Tensor], parameters: Sequence[Tensor], step: Callable[..., Sequence[Tensor]],
    has_biases: bool, layers: int, dropout: float, bidirectional: bool, batch_first: bool,
) -> Any:  # fmt: skip
    """Layers of cells along the time, and the last state of each.

    Args:
        run: runs a part.
        input: of shape (time, batch, features).
        states: what a cell keeps, for each layer and direction; the first is its output.
        parameters: for each layer and direction the weights of input and state, and their biases.
        step: from the linear function of an input, the states and the parameters of the state to the next states.
        has_biases: whether there are biases.
        layers: how many layers there are.
        dropout: the share of values that is dropped between layers.
        bidirectional: whether each layer runs along the time in both directions.
        batch_first: whether the first two dimensions of input and output are swapped.
    """
    directions = 2 if bidirectional else 1
    each = 4 if has_biases else 2
    if not input.is_cpu or dropout or input.dim() != 3 or len(parameters) != layers * directions * each:
        return NotImplemented
    if not input.numel():
        return NotImplemented
    outputs = run(aten.transpose.int, input, 0, 1) if batch_first else input
    begun = [run(aten.unbind.int, state, 0) for state in states]
    finals = []
    for layer in range(layers):
        made = []
        for direction in range(directions):
            number = layer * directions + direction
            w_ih, w_hh, b_ih, b_hh = (*parameters[number * each : (number + 1) * each], None, None)[:4]
            state: Sequence[Tensor] = [items[number] for items in begun]
            steps = run(aten.unbind.int, _linear(run, outputs, w_ih, b_ih), 0)
            found = []
            for entered in reversed(steps) if direction else steps:
                state = step(entered, state, w_hh, b_hh)
                found.append(state[0])
            finals.append(state)
            made.append(run(aten.stack.default, found[::-1] if direction else found, 0))
        outputs = made[0] if directions == 1 else run(aten.cat.default, made, 2)
    if batch_first:
        outputs = run(aten.transpose.int, outputs, 0, 1)
    return outputs, *(run(aten.stack.default, [*items], 0) for items in zip(*finals, strict=True))


def _nll_loss_forward(
    run: Run, input: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignored: int
) -> Any:
    if not is_plain_nll(input, target, weight):
        return NotImplemented
    return nll_loss(run, input, target, weight, reduction, ignored)


def _linear_of_batch(run: Run, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    """A linear layer as torch has it, with what autograd keeps: a matrix in the place of more dimensions, the weight's view."""
    if weight.dim() != 2 or not input.numel() or not weight.numel():
        return NotImplemented
    if input.dim() == 2:
        turned = run(aten.t.default, weight)
        return run(aten.mm.default, input, turned) if bias is None else run(aten.addmm.default, bias, input, turned)
    if input.dim() < 3:
        return NotImplemented
    shape, whole = input.shape, input.is_contiguous()
    flat = run(aten.view.default if whole else aten.reshape.default, input, [-1, shape[-1]])
    out = run(aten.view.default, _linear(run, flat, weight, bias if whole else None), [*shape[:-1], weight.shape[0]])
    return out if whole or bias is None else run(aten.add.Tensor, out, bias)


def _products(run: Run, one: Tensor, two: Tensor) -> Any:
    """Products of as many matrices on both sides, or with one on the right, as torch has them, with what it keeps."""
    shape, other = one.shape, two.shape
    if len(shape) > 2 and len(other) == 2 and one.dtype == two.dtype and one.numel() and two.numel():
        flat = run(aten.mm.default, run(aten.reshape.default, one, [-1, shape[-1]]), two)
        return run(aten.view.default, flat, [*shape[:-1], other[-1]])
    if len(shape) < 3 or shape[:-2] != other[:-2] or shape[-1] != other[-2] or one.dtype != two.dtype:
        return NotImplemented
    if not one.numel() or not two.numel():
        return NotImplemented
    if len(shape) == 3:
        return run(aten.bmm.default, one, two)
    one, two = (run(aten.reshape.default, item, [-1, *item.shape[-2:]]) for item in (one, two))
    return run(aten.view.default, run(aten.bmm.default, one, two), [*shape[:-1], other[-1]])


#: By the op that arrives.
DIRECT: dict[Any, Callable[..., Any]] = {
    aten.dropout.default: _dropout,
    aten.layer_norm.default: _layer_norm,
    aten.native_layer_norm.default: _layer_norm_in_parts,
    aten.softmax.int: _softmax,
    aten.log_softmax.int: _log_softmax,
    aten.conv1d.default: _convolution(1),
    aten.conv2d.default: _convolution(2),
    aten.conv3d.default: _convolution(3),
    aten.batch_norm.default: _batch_norm,
    aten.cross_entropy_loss.default: _cross_entropy,
    aten.cosine_similarity.default: _cosine_similarity,
    aten.nll_loss_forward.default: _nll_loss_forward,
    aten.nll_loss_nd.default: _nll_loss_nd,
    aten.scaled_dot_product_attention.default: _attention,
    aten.flatten.using_ints: _flatten,
    aten.unflatten.int: _unflatten,
    aten.outer.default: _outer,
    aten.chunk.default: _chunks,
    aten.unsafe_chunk.default: _unsafe_chunks,
    aten.split.sizes: _sections,
    aten.pad.default: _pad,
    aten.lstm_cell.default: _lstm_cell,
    aten.gru_cell.default: _gru_cell,
    aten.rnn_tanh_cell.default: _plain_cell(aten.tanh.default),
    aten.rnn_relu_cell.default: _plain_cell(aten.relu.default),
    aten.rnn_tanh.input: _plain_layers(aten.tanh.default),
    aten.rnn_relu.input: _plain_layers(aten.relu.default),
    aten.gru.input: _gru,
    aten.lstm.input: _lstm,
}

#: The same for calls that torch's autograd has to see, with what it keeps among the parts.
JOINED_DIRECT: dict[Any, Callable[..., Any]] = {
    aten.linear.default: _linear_of_batch,
    aten.matmul.default: _products,
}

__all__ = ["DIRECT", "JOINED_DIRECT", "Run", "has_classes", "is_plain_nll", "nll_loss", "smoothed"]
