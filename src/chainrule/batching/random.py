"""Random ops under vmap: `randomness` says whether the samples share their draws."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from chainrule.batching.fallback import loop_over_samples
from chainrule.rules.batching_base import Batched, any_batched, bind, logical_shape, physical

aten = torch.ops.aten

ERROR = (
    "vmap: called random operation while in randomness error mode ({func}). Please either use the 'same' or "
    "'different' randomness flags on vmap or perform the random operation outside of vmap"
)


def run_random(
    mode: Any, entry: Any, func: Any, args: Sequence[Any], inner: list[Any], named: dict[str, Any], batched: bool
) -> Any:
    """Run a random op by the level's `randomness`; NotImplemented if this call draws nothing.

    Raises:
        RuntimeError: `randomness` is ``"error"``, or the op cannot honour it.

    """
    if _draws_nothing(func, inner, named):
        return NotImplemented
    if mode.randomness == "error":
        raise RuntimeError(ERROR.format(func=func))
    if args and entry.out_names == ["self"]:
        return _draw_inplace(mode, func, args, inner, named, batched)
    if entry.out_names:
        raise RuntimeError(f"vmap: {func} writes random numbers with out=; call it without out=")
    run = _SHAPED.get(func)
    if run is not None:
        return mode._wrap(run(mode, func, inner, named))
    if mode.randomness == "same":
        if not batched:
            return mode._wrap(func(*inner, **named))
        return mode._wrap(_same_for_all(func, inner, named, mode.size))
    return mode._wrap(_different(mode, func, inner, named))


def drop(mode: Any, tensor: Any, share: float, training: bool) -> Any:
    """Dropout as the parts that torch has it in, on the stored tensor; NotImplemented, with nothing drawn, for what is not plain.

    Args:
        mode: the level, the only mode.
        tensor: a tensor of it.
        share: of the values that are dropped.
        training: whether any are.
    """
    inner = getattr(tensor, "inner", None)
    if inner.__class__ is not Batched or tensor.level is not mode:
        return NotImplemented
    if not training or share == 0:
        return tensor
    value = inner.value
    plain = value.__class__ is Tensor and value.is_cpu and value.is_contiguous() and value.is_floating_point()
    if not plain or value.requires_grad or not 0 < share < 1 or mode.randomness not in ("same", "different"):
        return NotImplemented
    shape = value.shape if mode.randomness == "different" else value.shape[1:]
    noise = torch.empty(shape, dtype=value.dtype).bernoulli_(1 - share).div_(1 - share)
    return mode._wrap(Batched(value * noise))


def _draws_nothing(func: Any, inner: Sequence[Any], named: dict[str, Any]) -> bool:
    """Dropout outside training, attention without dropout."""
    bound = bind(func, inner, named)
    if "dropout_p" in bound:
        return not bound["dropout_p"]
    for name in ("train", "training"):
        if name in bound:
            return bound[name] is False
    return "dropout" in bound and not bound["dropout"]


def _draw_inplace(
    mode: Any, func: Any, args: Sequence[Any], inner: list[Any], named: dict[str, Any], batched: bool
) -> Any:
    target = args[0]
    if mode.randomness == "same":
        if not batched:
            func(*inner, **named)
        elif any_batched(*inner[1:]):
            raise RuntimeError(f"vmap: {func} cannot draw the same numbers with parameters that differ between samples")
        else:
            value = mode.upgrade(target, func).value
            sample = torch.empty(value.shape[1:], dtype=value.dtype, device=value.device)
            func(sample, *inner[1:], **named)
            value.copy_(sample.expand_as(value))
        return target
    value = mode.upgrade(target, func).value
    func(value, *[_padded(arg, value.dim()) for arg in inner[1:]], **named)
    return target


def _padded(arg: Any, rank: int) -> Any:
    if arg.__class__ is not Batched:
        return arg
    value = arg.value
    while value.dim() < rank:
        value = value.unsqueeze(1)
    return value


def _different(mode: Any, func: Any, inner: list[Any], named: dict[str, Any]) -> Any:
    size = mode.size
    if func in _ELEMENTWISE:
        tensors = [x for x in inner if x.__class__ is Batched or isinstance(x, Tensor)]
        rank = max(len(logical_shape(x)) for x in tensors)
        values = [
            _padded(Batched(physical(x, size)), rank + 1) if x.__class__ is Batched or isinstance(x, Tensor) else x
            for x in inner
        ]
        result = func(*values, **named)
        return Batched(result) if isinstance(result, Tensor) else tuple(Batched(item) for item in result)
    if func is aten.multinomial.default:
        return _multinomial(func, inner, named, size)
    if not any_batched(*inner, *named.values()):
        # A loop needs something that is batched: the draws of each sample are independent calls.
        results = [func(*inner, **named) for _ in range(size)]
        return Batched(torch.stack(results)) if isinstance(results[0], Tensor) else _stack_all(results)
    return loop_over_samples(func, inner, named, size)


def _stack_all(results: list[Any]) -> Any:
    return tuple(
        Batched(torch.stack(items)) if isinstance(items[0], Tensor) else items[0]
        for items in zip(*results, strict=True)
    )


def _multinomial(func: Any, inner: list[Any], named: dict[str, Any], size: int) -> Batched:
    weights = physical(inner[0], size)
    shape = weights.shape[:-1]
    drawn = func(weights.reshape(-1, weights.shape[-1]), *inner[1:], **named)
    return Batched(drawn.reshape(*shape, drawn.shape[-1]))


def _same_for_all(func: Any, inner: list[Any], named: dict[str, Any], size: int) -> Any:
    """One draw for all samples where the op's draw does not depend on the batched values."""
    if func is aten.native_dropout.default:
        value = inner[0].value
        _, mask = func(torch.ones(value.shape[1:], dtype=value.dtype, device=value.device), *inner[1:], **named)
        probability = inner[1]
        scale = 0.0 if probability == 1 else 1.0 / (1.0 - probability)
        return Batched(value * mask * scale), mask
    raise RuntimeError(
        f"vmap: {func} cannot draw the same numbers for inputs that differ between samples; use "
        "randomness='different', or draw outside of vmap"
    )


def _with_size(position: int) -> Callable[..., Any]:
    """A factory whose argument at `position` is a size."""

    def factory(mode: Any, func: Any, inner: list[Any], named: dict[str, Any]) -> Any:
        if mode.randomness == "same":
            return func(*inner, **named)
        inner = list(inner)
        inner[position] = [mode.size, *inner[position]]
        return Batched(func(*inner, **named))

    return factory


def _like(mode: Any, func: Any, inner: list[Any], named: dict[str, Any]) -> Any:
    source = inner[0]
    shape = logical_shape(source)
    value = source.value if source.__class__ is Batched else source
    if mode.randomness == "different":
        shape = torch.Size((mode.size, *shape))
    named = {key: item for key, item in named.items() if key != "memory_format"}
    drawn = func(torch.empty(shape, dtype=value.dtype, device=value.device), *inner[1:], **named)
    return Batched(drawn) if mode.randomness == "different" else drawn


def _randperm(mode: Any, func: Any, inner: list[Any], named: dict[str, Any]) -> Any:
    if mode.randomness == "same":
        return func(*inner, **named)
    return Batched(torch.stack([func(*inner, **named) for _ in range(mode.size)]))


_SHAPED: dict[Any, Callable[..., Any]] = {
    aten.rand.default: _with_size(0),
    aten.rand.generator: _with_size(0),
    aten.randn.default: _with_size(0),
    aten.randn.generator: _with_size(0),
    aten.randint.default: _with_size(1),
    aten.randint.generator: _with_size(1),
    aten.randint.low: _with_size(2),
    aten.randint.low_generator: _with_size(2),
    aten.normal.float_float: _with_size(2),
    aten.randperm.default: _randperm,
    aten.randperm.generator: _randperm,
    aten.rand_like.default: _like,
    aten.randn_like.default: _like,
    aten.randint_like.default: _like,
    aten.randint_like.low_dtype: _like,
}

_ELEMENTWISE = {
    aten.bernoulli.default,
    aten.bernoulli.p,
    aten.poisson.default,
    aten.native_dropout.default,
    aten.normal.Tensor_float,
    aten.normal.float_Tensor,
    aten.normal.Tensor_Tensor,
    aten.binomial.default,
    aten._standard_gamma.default,
    aten._sample_dirichlet.default,
    aten.rrelu_with_noise_functional.default,
}
