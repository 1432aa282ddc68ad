"""Parameters in nests of containers, as the one vector that SciPy's solvers change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree


def ravel(parameters: Any) -> tuple[np.ndarray, Callable[[torch.Tensor], Any]]:
    """Parameters as one vector, and the function that puts such a vector back.

    Args:
        parameters: tensors of real floating point numbers in any nest of tuples, lists and dictionaries, such as
            ``dict(module.named_parameters())``.

    Returns:
        The values, a float64 array ``(n,)``, and a function from a tensor ``(n,)`` to the nest; its tensors have the shapes,
        dtypes and devices of the parameters, and derivatives go through it.

    Raises:
        TypeError: if something in the nest is no tensor of real floating point numbers.
        ValueError: when called, if the vector has another length.

    Example:
        >>> import torch
        >>> from chainrule import functional_call
        >>> from chainrule.scipy import minimize, ravel
        >>> model = torch.nn.Linear(2, 1).double()
        >>> x, y = torch.eye(2).double(), torch.tensor([[3.0], [4.0]]).double()
        >>> start, restore = ravel(dict(model.named_parameters()))
        >>> found = minimize(lambda v: ((functional_call(model, restore(v), x) - y) ** 2).sum(), start)
        >>> _ = model.load_state_dict(restore(torch.from_numpy(found.x)))
        >>> [round(value, 3) for value in model(x).flatten().tolist()]
        [3.0, 4.0]
    """
    leaves, spec = pytree.tree_flatten(parameters)
    for leaf in leaves:
        if not isinstance(leaf, torch.Tensor) or not leaf.dtype.is_floating_point:
            kind = leaf.dtype if isinstance(leaf, torch.Tensor) else type(leaf).__name__
            raise TypeError(f"chainrule.scipy.ravel: parameters must be tensors of real floating point numbers, got {kind}")
    kinds = [(tuple(leaf.shape), leaf.numel(), leaf.dtype, leaf.device) for leaf in leaves]
    counts = [count for _, count, _, _ in kinds]
    values = [leaf.detach().to("cpu", torch.float64).reshape(-1).numpy() for leaf in leaves]
    vector = np.concatenate([np.empty(0), *values])

    def restore(vector: torch.Tensor) -> Any:
        if tuple(vector.shape) != (sum(counts),):
            raise ValueError(f"chainrule.scipy.ravel: expected a vector of {sum(counts)} values, got shape {tuple(vector.shape)}")
        parts = vector.split(counts) if counts else ()
        tensors = [
            part.reshape(shape).to(device, dtype) for part, (shape, _, dtype, device) in zip(parts, kinds, strict=True)
        ]
        return pytree.tree_unflatten(tensors, spec)

    return vector, restore


__all__ = ["ravel"]
