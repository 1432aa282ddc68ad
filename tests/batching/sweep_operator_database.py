"""Sweep PyTorch's operator database: chainrule's vmap against a loop, and torch.vmap where we fail.

Not part of the test suite: run ``python tests/batching/sweep_operator_database.py [forward|inner|outer] [name-prefix]``.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from chainrule.batching.mode import VmapMode
from chainrule.transforms.vmap import vmap

BATCH = 3
RANDOM = (
    "rand", "bernoulli", "normal", "dropout", "multinomial", "empty", "rrelu", "uniform", "cauchy", "exponential",
    "geometric", "log_normal", "randint", "feature_alpha", "new_empty", "as_strided_partial", "jiterator", "sparse",
)  # fmt: skip

EXPLAINED = {
    "addbmm_": "a tensor of one element is made larger by the write, which a sample in a batch cannot be",
    "argwhere": "the shape of the result depends on the values",
}
"""Where torch.vmap gives a result and ours an error, and why."""


def variant(x: torch.Tensor, index: int) -> torch.Tensor:
    """A copy of `x` that stays in the domain of the op."""
    if not x.dtype.is_floating_point and not x.dtype.is_complex:
        return x.detach().clone()
    return x.detach() * (1 + 0.1 * index)


def which_batched(count: int) -> Iterator[list[bool]]:
    """All batched, only the first, all but the first."""
    yield [True] * count
    if count > 1:
        yield [True] + [False] * (count - 1)
        yield [False] + [True] * (count - 1)


def compare(actual: Any, expected: list[Any]) -> str | None:
    """A difference between a batched result and the results of the samples, in words."""
    actual_leaves = [x for x in tree_flatten(actual)[0] if isinstance(x, torch.Tensor)]
    sample_leaves = [[x for x in tree_flatten(sample)[0] if isinstance(x, torch.Tensor)] for sample in expected]
    for position, leaf in enumerate(actual_leaves):
        wanted = torch.stack([leaves[position] for leaves in sample_leaves])
        if leaf.dtype != wanted.dtype:
            return f"dtype {leaf.dtype} not {wanted.dtype}"
        if leaf.shape != wanted.shape:
            return f"shape {tuple(leaf.shape)} not {tuple(wanted.shape)}"
        if not torch.allclose(leaf.detach(), wanted.detach(), rtol=1e-6, atol=1e-7, equal_nan=True):
            return f"values differ by {(leaf - wanted).abs().max() if leaf.numel() else 0}"
    return None


def gradient_of(func: Callable[..., Any]) -> Callable[..., Any]:
    """The gradients of the sum of all outputs of `func` with respect to its floating tensors."""

    def gradient(*args: Any, **kwargs: Any) -> Any:
        leaves, spec = tree_flatten((args, kwargs))
        leaves = [x.detach().clone() if isinstance(x, torch.Tensor) else x for x in leaves]
        floating = [x for x in leaves if isinstance(x, torch.Tensor) and x.dtype.is_floating_point]
        for x in floating:
            x.requires_grad_()
        args, kwargs = tree_unflatten(leaves, spec)
        outputs = [x for x in tree_flatten(func(*args, **kwargs))[0] if isinstance(x, torch.Tensor)]
        total = sum((x * x.detach().cos()).sum().abs() for x in outputs if x.requires_grad)
        return torch.autograd.grad(total, floating, allow_unused=True, materialize_grads=True)

    return gradient


def outer_gradient(function: Callable[..., Any], stacks: list[torch.Tensor], transform: Callable[..., Any]) -> Any:
    """The gradients, with respect to the stacks, of the sum of all outputs of the mapped function."""
    leaves = [s.clone() for s in stacks]
    floating = [x.requires_grad_() for x in leaves if x.dtype.is_floating_point]
    outputs = transform(function)(*[x.clone() for x in leaves])
    total = sum((x * x.detach().cos()).sum().abs() for x in outputs if x.requires_grad)
    return torch.autograd.grad(total, floating, allow_unused=True, materialize_grads=True)


def loop_transform(function: Callable[..., Any]) -> Callable[..., Any]:
    """What vmap means."""

    def looped(*values: torch.Tensor) -> Any:
        samples = [function(*[v[b].clone() for v in values]) for b in range(BATCH)]
        return [torch.stack(items) for items in zip(*samples, strict=True)]

    return looped


def check_outer(func: Callable[..., Any], leaves: list[Any], spec: Any) -> Iterator[tuple[str, str]]:
    """Gradients taken outside of vmap."""
    tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    for batched in which_batched(len(tensors)):
        mapped = [i for i, flag in zip(tensors, batched, strict=True) if flag]
        stacks = [torch.stack([variant(leaves[i], b) for b in range(BATCH)]) for i in mapped]

        def call(*values: torch.Tensor, mapped: list[int] = mapped) -> Any:
            filled = [x.detach().clone() if isinstance(x, torch.Tensor) else x for x in leaves]
            for i, value in zip(mapped, values, strict=True):
                filled[i] = value
            args, kwargs = tree_unflatten(filled, spec)
            return [x for x in tree_flatten(func(*args, **kwargs))[0] if isinstance(x, torch.Tensor)]

        try:
            expected = outer_gradient(call, stacks, loop_transform)
        except Exception:
            continue
        try:
            actual = outer_gradient(call, stacks, vmap)
        except Exception as error:
            yield "ERROR", f"{batched} {type(error).__name__}: {str(error)[:160]}"
            continue
        for a, e in zip(actual, expected, strict=True):
            if a.shape != e.shape or not torch.allclose(a, e, rtol=1e-6, atol=1e-7, equal_nan=True):
                yield "WRONG", f"{batched} gradients differ by {(a - e).abs().max()}"


def check_sample(func: Callable[..., Any], leaves: list[Any], spec: Any) -> Iterator[tuple[str, str]]:
    """Problems of one call: (kind, message)."""
    tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    for batched in which_batched(len(tensors)):
        stacks = {
            i: torch.stack([variant(leaves[i], b) for b in range(BATCH)])
            for i, flag in zip(tensors, batched, strict=True)
            if flag
        }

        def call(*values: torch.Tensor, stacks: dict[int, torch.Tensor] = stacks) -> Any:
            filled = [x.detach().clone() if isinstance(x, torch.Tensor) else x for x in leaves]
            for i, value in zip(stacks, values, strict=True):
                filled[i] = value
            args, kwargs = tree_unflatten(filled, spec)
            return tree_map(lambda x: x if isinstance(x, torch.Tensor) else None, func(*args, **kwargs))

        try:
            expected = [call(*[s[b].clone() for s in stacks.values()]) for b in range(BATCH)]
            torch.stack([x for x in tree_flatten(expected[0])[0] if isinstance(x, torch.Tensor)][:1])
        except Exception:
            continue

        def run(transform: Callable[..., Any], call: Any = call, stacks: Any = stacks) -> Any:
            def tensors_only(*values: torch.Tensor) -> Any:
                return [x for x in tree_flatten(call(*values))[0] if isinstance(x, torch.Tensor)]

            return transform(tensors_only)(*[s.clone() for s in stacks.values()])

        try:
            problem = compare(run(vmap), expected)
            if problem:
                yield "WRONG", f"{batched} {problem}"
        except Exception as error:
            try:
                run(torch.vmap)
                kind = "ERROR"
            except Exception:
                kind = "both"
            yield kind, f"{batched} {type(error).__name__}: {str(error)[:160]}"


def main(kind_of_sweep: str, prefix: str) -> int:
    """Sweep the ops whose name starts with `prefix`: "forward", "inner" or "outer" (where gradients are taken).

    Returns:
        The number of ops with problems that are not explained.
    """
    unexplained: set[str] = set()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    counts = {"WRONG": 0, "ERROR": 0, "both": 0}
    original = VmapMode.__init__

    class Names(list):  # type: ignore[type-arg]
        """A list that is shared by all modes of one op."""

    current = [""]
    names: dict[str, Names] = {}

    def init(self: VmapMode, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.fallbacks = names.setdefault(current[0], Names())

    VmapMode.__init__ = init  # type: ignore[method-assign]
    for op in op_db:
        if not op.name.startswith(prefix) or any(word in op.name for word in RANDOM):
            continue
        current[0] = f"{op.name}{'.' + op.variant_test_name if op.variant_test_name else ''}"
        dtype = torch.float64 if op.supports_dtype(torch.float64, "cpu") else torch.int64
        if not op.supports_dtype(dtype, "cpu"):
            continue
        try:
            samples = list(op.sample_inputs("cpu", dtype))[:12]
        except Exception:
            continue
        variants = {"": op.op}
        if kind_of_sweep == "inner":
            variants = {"": gradient_of(op.op)}
        if kind_of_sweep != "forward" and not op.supports_autograd:
            continue
        check = check_outer if kind_of_sweep == "outer" else check_sample
        if op.inplace_variant is not None and kind_of_sweep != "inner":
            variants["_"] = lambda x, *a, _f=op.inplace_variant, **k: _f(x, *a, **k)
        for suffix, func in variants.items():
            seen: set[tuple[str, str]] = set()
            for sample in samples:
                leaves, spec = tree_flatten(((sample.input, *sample.args), sample.kwargs))
                for kind, message in check(func, leaves, spec):
                    if (kind == "both" and kind_of_sweep != "inner") or (suffix and "inplace" in message):
                        counts[kind] += 1
                        continue
                    if (kind, message[:60]) not in seen:
                        seen.add((kind, message[:60]))
                        counts[kind] += 1
                        name = current[0] + suffix
                        known = EXPLAINED.get(name) if kind == "ERROR" else None
                        if known is None:
                            unexplained.add(name)
                        print(kind, name, message, f"[{known or 'NOT EXPLAINED'}]", flush=True)
    print(counts)
    looped: dict[str, int] = {}
    for found in names.values():
        for name in found:
            looped[name] = looped.get(name, 0) + 1
    print("loops:", dict(sorted(looped.items())))
    print(f"{len(unexplained)} ops without a known reason")
    return len(unexplained)


if __name__ == "__main__":
    failures = main(sys.argv[1] if len(sys.argv) > 1 else "forward", sys.argv[2] if len(sys.argv) > 2 else "")
    sys.exit(1 if failures else 0)
