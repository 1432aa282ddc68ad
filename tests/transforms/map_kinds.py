"""Functions whose Jacobians are of every kind that a linear map can be of, and the dense matrices that they equal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch.utils import _pytree as pytree

Tensor = torch.Tensor


class Kind(NamedTuple):
    """A function and the arguments that it is differentiated at."""

    function: Callable[..., Any]
    primals: tuple[Any, ...]


def randn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype)


_generator = torch.Generator().manual_seed(3)


def fixed(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=_generator)


WEIGHT, KERNEL, IMAGE_KERNEL = fixed(5, 6), fixed(2, 1, 3), fixed(3, 2, 3, 3)
INDEX = torch.tensor([3, 0, 0, 5])


class Cubed(torch.autograd.Function):
    """A user's op: known by its own backward only."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * cotangent


def network(p: dict[str, Tensor], x: Tensor) -> Tensor:
    return torch.tanh(x @ p["first"].T + p["bias"]) @ p["second"].T


def parameters() -> dict[str, Tensor]:
    return {"first": randn(4, 3), "bias": randn(4), "second": randn(2, 4)}


BATCH, LAYERS = fixed(6, 3), {"first": fixed(4, 3), "bias": fixed(4), "second": fixed(2, 4)}


def upwind(u: Tensor) -> Tensor:
    return torch.where(u > 0, u - torch.roll(u, 1), torch.roll(u, -1) - u) * u


def several(x: Tensor, y: dict[str, Tensor]) -> dict[str, Any]:
    return {
        "product": x[:2] * y["a"],
        "list": [y["b"].sum() * x, torch.arange(3.0, dtype=torch.float64)],
        "unused": y["a"].detach() * 2,
    }


def make_kinds() -> dict[str, Kind]:
    """Fresh arguments for every kind."""
    return {
        "identity": Kind(lambda x: x, (randn(4),)),
        "element-wise": Kind(lambda x: torch.sin(x) * x, (randn(7),)),
        "element-wise 2-d": Kind(lambda x: torch.exp(-x * x), (randn(3, 4),)),
        "dense": Kind(lambda x: WEIGHT @ x, (randn(6),)),
        "dense square": Kind(lambda x: torch.tanh(WEIGHT.T @ torch.tanh(WEIGHT @ x)), (randn(6),)),
        "slice": Kind(lambda x: x[1:6:2], (randn(7),)),
        "gather": Kind(lambda x: torch.cos(x)[INDEX], (randn(6),)),
        "scatter": Kind(lambda x: torch.zeros(6, dtype=x.dtype).index_add(0, INDEX, x * x), (randn(4),)),
        "concatenation": Kind(lambda x: torch.cat([x.flip(0), F.pad(x[1:], (1, 1))]) ** 2, (randn(4),)),
        "roll": Kind(lambda x: torch.roll(x, 2) * x, (randn(5),)),
        "convolution": Kind(lambda x: F.conv1d(x, KERNEL, padding=1), (randn(1, 1, 6),)),
        "convolution 2-d": Kind(lambda x: F.conv2d(x, IMAGE_KERNEL, stride=2, padding=1), (randn(2, 2, 4, 3),)),
        "pooling": Kind(lambda x: F.max_pool1d(x, 2), (randn(1, 2, 6),)),
        "sort": Kind(lambda x: torch.sort(x * 2).values, (randn(5),)),
        "reduction": Kind(lambda x: (x * x).sum(0), (randn(3, 4),)),
        "mean": Kind(lambda x: x.mean(1, keepdim=True) - x, (randn(3, 4),)),
        "cumulative sum": Kind(lambda x: torch.cumsum(x * x, 0), (randn(5),)),
        "broadcasting": Kind(lambda x: x[:, None] * torch.ones(2, dtype=x.dtype) + x[None, :2], (randn(3),)),
        "outer product": Kind(lambda x: x[:, None] * x[None, :], (randn(3),)),
        "softmax": Kind(lambda x: torch.softmax(x, -1), (randn(3, 4),)),
        "normalisation": Kind(lambda x: F.layer_norm(x, (4,)), (randn(3, 4),)),
        "opaque": Kind(lambda x: Cubed.apply(WEIGHT.T @ Cubed.apply(WEIGHT @ x)), (randn(6),)),
        "upwind": Kind(upwind, (randn(6),)),
        "composition": Kind(
            lambda x: torch.softmax(F.conv1d(torch.tanh(x), KERNEL).reshape(2, 4)[:, INDEX[1:3]] @ WEIGHT[:2, :3], -1),
            (randn(1, 1, 6),),
        ),
        "parameters": Kind(lambda p: network(p, BATCH), (parameters(),)),
        "two arguments": Kind(network, (parameters(), randn(2, 3))),
        "block-diagonal": Kind(lambda x: network(LAYERS, x), (randn(6, 3),)),
        "scalar output": Kind(lambda x: (x**3).sum(), (randn(5),)),
        "scalar input": Kind(lambda x: x * torch.arange(3.0, dtype=torch.float64), (randn(()),)),
        "scalar": Kind(torch.sin, (randn(()),)),
        "trees": Kind(several, (randn(3), {"a": randn(2), "b": randn(2, 2)})),
        "same twice": Kind(lambda x: (x, x * x, x), (randn(3),)),
        "constant": Kind(lambda x: torch.ones(2, dtype=x.dtype), (randn(3),)),
        "empty input": Kind(lambda x, y: torch.cat([x, y * y]), (randn(0), randn(2))),
        "empty output": Kind(lambda x: x[:0] * 2, (randn(3),)),
        "one by one": Kind(lambda x: x * x, (randn(1, 1),)),
        "float32": Kind(lambda x: torch.tanh(WEIGHT.float() @ x), (randn(6, dtype=torch.float32),)),
        "not contiguous": Kind(lambda x: torch.sin(x) @ WEIGHT[:4, :3], (randn(4, 3).T[:, ::1],)),
        "strided": Kind(lambda x: (x * x).T, (randn(4, 6)[::2, ::3],)),
    }


def flat(tree: Any) -> Tensor:
    """The leaves of a tree as one vector."""
    return torch.cat([leaf.reshape(-1) for leaf in pytree.tree_leaves(tree)])


def matrix_of(function: Callable[..., Any], primals: tuple[Any, ...]) -> Tensor:
    """The Jacobian over the flattened leaves, by torch.func."""
    leaves, spec = pytree.tree_flatten(primals)
    vector = torch.cat([leaf.reshape(-1) for leaf in leaves])

    def of_vector(vector: Tensor) -> Tensor:
        parts = vector.split([leaf.numel() for leaf in leaves])
        return flat(function(*pytree.tree_unflatten([p.reshape(t.shape) for p, t in zip(parts, leaves, strict=True)], spec)))

    if of_vector(vector).numel() == 0:
        return vector.new_zeros(0, vector.numel())
    found: Tensor = torch.func.jacrev(of_vector)(vector)
    return found
