"""Jacobians of PyTorch's operator database, chainrule beside torch.func: a table of what is wrong and what fails.

Run as a script: ``python tests/rules/sweep_operator_database.py [first letters or names …]``.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.testing._internal.common_methods_invocations import op_db

import chainrule

LARGEST = 200
"""Samples with more elements in input or output are left out: the sweep looks for errors, not for speed."""

SKIPPED = frozenset({"empty", "empty_like", "new_empty", "new_empty_strided", "empty_strided", "empty_permuted"})

EXPLAINED = {
    "__rpow__": "NaN of a negative base: torch multiplies it with the zeros of other places",
    "as_strided_scatter": "torch's derivative by the tensor passes what is written over",
    "bfloat16": "jacfwd has the dtype of the output",
    "float": "jacfwd has the dtype of the output",
    "half": "jacfwd has the dtype of the output",
    "native_layer_norm": "torch has zeros for the second and third outputs",
    "special.entr": "NaN of a negative argument: torch multiplies it with the zeros of other places",
}
"""Ops that differ, and why torch's numbers are not taken for right."""


def samples(op: Any, most: int) -> Iterator[tuple[Callable[..., Any], tuple[torch.Tensor, ...]]]:
    """Functions of the differentiable positional tensors of an op's first small samples."""
    taken = 0
    for sample in op.sample_inputs("cpu", torch.float64, requires_grad=False):
        if taken >= most:
            return
        items = [sample.input, *sample.args]
        places = [k for k, item in enumerate(items) if isinstance(item, torch.Tensor) and item.is_floating_point()]
        if not places or any(items[k].numel() > LARGEST for k in places):
            continue
        kwargs = sample.kwargs

        def function(*tensors: torch.Tensor, items: Any = items, places: Any = places, kwargs: Any = kwargs) -> Any:
            filled = list(items)
            for place, tensor in zip(places, tensors, strict=True):
                filled[place] = tensor
            result = op(*filled, **kwargs)
            leaves = torch.utils._pytree.tree_leaves(result)
            return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]

        taken += 1
        yield function, tuple(items[k] for k in places)


def _outcome(run: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    try:
        return torch.utils._pytree.tree_leaves(run())
    except Exception as error:  # noqa: BLE001
        return error


def compare(op: Any, most: int = 3) -> set[str]:
    """What goes wrong with an op: ``jacrev wrong``, ``jacfwd error: …``."""
    problems: set[str] = set()
    for function, arguments in samples(op, most):
        argnums = tuple(range(len(arguments)))
        wanted = _outcome(lambda: torch.func.jacrev(function, argnums)(*arguments))
        if isinstance(wanted, Exception) or any(not leaf.is_floating_point() for leaf in wanted):
            continue
        if sum(leaf.numel() for leaf in wanted) > LARGEST**2:
            continue
        for name in ("jacrev", "jacfwd"):
            got = _outcome(lambda: getattr(chainrule, name)(function, argnums)(*arguments))
            if isinstance(got, Exception):
                problems.add(f"{name} error: {type(got).__name__}: {str(got)[:100]!r}")
            elif len(got) != len(wanted) or not all(map(_close, got, wanted)):
                problems.add(f"{name} wrong")
    return problems


def _close(one: torch.Tensor, other: torch.Tensor) -> bool:
    # Rounding of float64 in at most a few hundred terms, with room for conditioning of the factorisations.
    return one.shape == other.shape and one.dtype == other.dtype and torch.allclose(one, other, atol=1e-8, rtol=1e-6, equal_nan=True)


def sweep(wanted: Callable[[str], bool]) -> dict[str, set[str]]:
    """The problems of the differentiable ops whose name is ``wanted``."""
    found: dict[str, set[str]] = {}
    for op in op_db:
        name = f"{op.name}.{op.variant_test_name}" if op.variant_test_name else op.name
        if op.name in SKIPPED or not op.supports_autograd or not wanted(name) or torch.float64 not in op.dtypes:
            continue
        start = time.perf_counter()
        problems = compare(op)
        took = time.perf_counter() - start
        if problems:
            found[name] = problems
            print(f"{name:50s} {took:6.2f} s  {sorted(problems)} {EXPLAINED.get(name, 'NOT EXPLAINED')}", flush=True)
    return found


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    names = sys.argv[1:]
    failures = sweep(lambda name: not names or any(name.startswith(given) for given in names))
    unexplained = failures.keys() - EXPLAINED.keys()
    print(f"{len(failures)} ops differ, {len(unexplained)} without a known reason")
    sys.exit(1 if unexplained else 0)
