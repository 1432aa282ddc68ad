"""What recording costs for each kind of op: a plain call beside one under a tape."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from chainrule.capture.tape import Tape
from chainrule.rules.table import POLICY

Tensor = torch.Tensor

#: How often an op stands in the function that is timed, and the least number of runs.
_OPS, _RUNS = 20, 10

_INDEX = torch.tensor([2, 0, 1])
_MASK = torch.eye(4, dtype=torch.bool)
_SQUARE, _VECTOR, _SCALE = torch.full((4, 4), 0.5), torch.full((4,), 0.25), torch.ones(4)
_EYE = 4.0 * torch.eye(4)
_KERNEL = torch.full((1, 1, 3, 3), 0.5)

#: One op each, of a matrix x of shape (4, 4).
KINDS: dict[str, Callable[[Tensor], Any]] = {
    "sin": lambda x: x.sin(),
    "x * 2.5": lambda x: x * 2.5,
    "x + x": lambda x: x + x,
    "x ** 2": lambda x: x**2,
    "x > 0": lambda x: x > 0,
    "gelu": lambda x: F.gelu(x),
    "clamp": lambda x: x.clamp(0.0, 1.0),
    "where": lambda x: torch.where(_MASK, x, x),
    "roll": lambda x: x.roll(1, 0),
    "x[1:]": lambda x: x[1:],
    "x[:, 0]": lambda x: x[:, 0],
    "x[0]": lambda x: x[0],
    "x[..., None]": lambda x: x[..., None],
    "x[:, 1:]": lambda x: x[:, 1:],
    "x[1:, :2]": lambda x: x[1:, :2],
    "x[index]": lambda x: x[_INDEX],
    "gather": lambda x: x.gather(0, _INDEX[None]),
    "index_select": lambda x: x.index_select(0, _INDEX),
    "cat": lambda x: torch.cat([x, x]),
    "stack": lambda x: torch.stack([x, x]),
    "unbind": lambda x: x.unbind(),
    "split": lambda x: x.split(2),
    "chunk": lambda x: x.chunk(2),
    "view": lambda x: x.view(2, 8),
    "reshape": lambda x: x.reshape(-1),
    "flatten": lambda x: x.flatten(),
    "permute": lambda x: x.permute(1, 0),
    "transpose": lambda x: x.transpose(0, 1),
    "x.T": lambda x: x.T,
    "unsqueeze": lambda x: x.unsqueeze(0),
    "expand": lambda x: x.expand(3, 4, 4),
    "diagonal": lambda x: x.diagonal(),
    "sum": lambda x: x.sum(),
    "sum(1)": lambda x: x.sum(1),
    "mean(dim=-1, keepdim)": lambda x: x.mean(dim=-1, keepdim=True),
    "amax": lambda x: x.amax(1),
    "max(1)": lambda x: x.max(1),
    "var": lambda x: x.var(1),
    "norm": lambda x: x.norm(),
    "cumsum": lambda x: x.cumsum(0),
    "logsumexp": lambda x: x.logsumexp(1),
    "softmax": lambda x: x.softmax(-1),
    "F.softmax": lambda x: F.softmax(x, dim=-1),
    "matmul": lambda x: x @ _SQUARE,
    "mm": lambda x: torch.mm(x, _SQUARE),
    "mv": lambda x: x.mv(_VECTOR),
    "linear": lambda x: F.linear(x, _SQUARE, _VECTOR),
    "addmm": lambda x: torch.addmm(_VECTOR, x, _SQUARE),
    "einsum": lambda x: torch.einsum("ij,jk->ik", x, _SQUARE),
    "zeros_like": lambda x: torch.zeros_like(x),
    "x.new_zeros": lambda x: x.new_zeros(3),
    "to": lambda x: x.to(torch.float64),
    "clone": lambda x: x.clone(),
    "detach": lambda x: x.detach(),
    "masked_fill": lambda x: x.masked_fill(_MASK, 0.0),
    "F.pad": lambda x: F.pad(x, (1, 1)),
    "layer_norm": lambda x: F.layer_norm(x, (4,), _SCALE, _VECTOR),
    "view, conv2d": lambda x: F.conv2d(x.view(1, 1, 4, 4), _KERNEL),
    "embedding": lambda x: F.embedding(_INDEX, x),
    "dropout off": lambda x: F.dropout(x, 0.5, False),
    "add_": lambda x: x.add_(1.0),
    "mul_": lambda x: x.mul_(_SQUARE),
    "copy_": lambda x: x.copy_(_SQUARE),
    "clamp_": lambda x: x.clamp_(0.0, 1.0),
    "masked_fill_": lambda x: x.masked_fill_(_MASK, 0.5),
    "index_put_": lambda x: x.index_put_((_INDEX,), _VECTOR),
    "x[0] = number (three ops)": lambda x: x.__setitem__(0, 0.5),
    "x[1:, 2] = vector (five ops)": lambda x: x.__setitem__((slice(1, None), 2), _VECTOR[1:]),
    "x[mask] = number": lambda x: x.__setitem__(_MASK, 0.5),
    "x[1:].add_ (three ops)": lambda x: x[1:].add_(0.5),
    "std": lambda x: x.std(dim=1, correction=0),
    "norm(dim=1)": lambda x: x.norm(dim=1),
    "torch.linalg.norm": lambda x: torch.linalg.norm(x),
    "where beside a number": lambda x: torch.where(_MASK, x, 0.0),
    "1 / x": lambda x: 1 / x,
    "2 ** x": lambda x: 2**x,
    "remainder": lambda x: x % 0.3,
    "add with a factor": lambda x: torch.add(x, _SQUARE, alpha=2),
    "gelu, tanh": lambda x: F.gelu(x, approximate="tanh"),
    "tensordot": lambda x: torch.tensordot(x, _SQUARE, 1),
    "topk": lambda x: x.topk(2),
    "sort": lambda x: x.sort(1),
    "F.mse_loss": lambda x: F.mse_loss(x, _SQUARE),
    "F.normalize (four ops)": lambda x: F.normalize(x, dim=-1),
    "cosine_similarity (seven ops)": lambda x: F.cosine_similarity(x, _SQUARE, -1),
    "dropout (one op, and the draw)": lambda x: F.dropout(x, 0.5),
    "cdist (seven ops)": lambda x: torch.cdist(x, _SQUARE),
    "linalg.cross (nine ops)": lambda x: torch.linalg.cross(x[:, :3], _SQUARE[:, :3]),
    "kron (three ops)": lambda x: torch.kron(x, _SQUARE),
    "meshgrid (three ops)": lambda x: torch.meshgrid(x[0], _VECTOR, indexing="ij"),
    "linalg.det": lambda x: torch.linalg.det(x),
    "linalg.solve": lambda x: torch.linalg.solve(x + _EYE, _SQUARE),
    "x.shape": lambda x: x.shape,
}  # fmt: skip


def recording_costs(
    seconds: float = 0.02, kinds: dict[str, Callable[[Tensor], Any]] | None = None
) -> dict[str, tuple[float, float]]:
    """For each kind of op the seconds of a plain call, and of one under a tape: the least of several interleaved runs."""
    found: dict[str, tuple[float, float]] = {}
    for name, kind in (kinds or KINDS).items():
        plain = recorded = float("inf")
        _one_run(kind, True)
        finished, runs = perf_counter() + seconds, 0
        while runs < _RUNS or perf_counter() < finished:
            runs += 1
            plain = min(plain, _one_run(kind, False))
            recorded = min(recorded, _one_run(kind, True))
        found[name] = (plain / _OPS, recorded / _OPS)
    return found


def _one_run(kind: Callable[[Tensor], Any], under: bool) -> float:
    x = torch.full((4, 4), 0.5)
    tape = Tape(POLICY)
    tape.add_input(x)
    if not under:
        start = perf_counter()
        for _ in range(_OPS):
            kind(x)
        return perf_counter() - start
    with tape.recording():
        start = perf_counter()
        for _ in range(_OPS):
            kind(x)
        return perf_counter() - start
