"""What reads values where torch's dispatcher does not see it: refused by compile, or called without a graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import chainrule

DOUBLE = torch.float64


def _number(x: Tensor) -> Tensor:
    return x[0].detach().abs().long()


def _with_row(x: Tensor, row: int) -> Tensor:
    z = torch.zeros(3, 1, dtype=DOUBLE)
    z[[_number(x) - 1], [row]] = 5.0
    return (z[:, 0] * x).sum()


#: Shapes that depend on values.
SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "where": lambda x: x.sum() * torch.where(x > 0)[0].numel(),
    "where-index": lambda x: x[torch.where(x > 0)].pow(2).mean(),
    "nonzero-tuple": lambda x: x.sum() * torch.nonzero(x > 0, as_tuple=True)[0].numel(),
    "nonzero-method": lambda x: x.sum() * (x > 0).nonzero(as_tuple=True)[0].numel(),
    "argwhere": lambda x: x.sum() * torch.argwhere(x > 0).shape[0],
    "repeat_interleave": lambda x: torch.repeat_interleave(x, x.detach().abs().long()).pow(2).sum(),
    "one_hot": lambda x: x.sum() * nn.functional.one_hot(x.detach().abs().long()).shape[1],
    "packed": lambda x: pack_padded_sequence(x.reshape(1, 3), x[:1].detach().abs().long(), batch_first=True).data.pow(2).sum(),
}

#: Values in new tensors, or in Python.
VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "Tensor": lambda x: (x * torch.Tensor([x[0].detach(), 1.0, 2.0])).sum(),
    "Tensor-of-all": lambda x: (x * torch.Tensor(list(x.detach()))).sum(),
    "DoubleTensor": lambda x: (x * torch.DoubleTensor((x[0].detach(), 1.0, 2.0))).sum(),
    "FloatTensor": lambda x: (x * torch.FloatTensor([[x[0].detach(), 1.0, 2.0]])).sum(),
    "LongTensor": lambda x: x[torch.LongTensor([x.argmax()])].pow(2).sum(),
    "IntTensor": lambda x: x[torch.IntTensor([x.argmax()])].pow(2).sum(),
    "BoolTensor": lambda x: (x * torch.BoolTensor([x[0] > 1, True, True])).pow(2).sum(),
    "new": lambda x: (x * x.new([x[0].detach(), 1.0, 2.0])).sum(),
    "tensor-named": lambda x: (x * torch.tensor(data=[x[0].detach(), 1.0, 2.0])).sum(),
    "as_tensor-named": lambda x: (x * torch.as_tensor(data=[x[0].detach(), 1.0, 2.0])).sum(),
    "asarray-named": lambda x: (x * torch.asarray(obj=[x[0].detach(), 1.0, 2.0])).sum(),
    "tensor_split-named": lambda x: torch.tensor_split(x, tensor_indices_or_sections=x.detach()[:1].long())[0].pow(2).sum(),
    "sparse": lambda x: (
        torch.sparse_coo_tensor([[0, 1, 2]], [x[0].detach(), 1.0, 2.0], (3,), check_invariants=False).to_dense().mul(x).sum()
    ),
    "index-in-lists": lambda x: x.reshape(3, 1)[[_number(x) - 1], [0]].pow(2).sum(),
    "write-in-lists": lambda x: _with_row(x, 0),
    "float": lambda x: x.sum() * float(x[0]),
    "complex": lambda x: x.sum() * complex(x[0]).real,
    "range": lambda x: x.sum() * len(range(_number(x))),
}

#: Taken to another tensor, for the same memory.
TAKEN: dict[str, Callable[[Tensor], Tensor]] = {
    "Parameter": lambda x: (x * nn.Parameter(x.detach())).sum(),
    "Parameter-of-part": lambda x: (x * nn.Parameter(x[1:].detach(), requires_grad=False).sum()).sum(),
    "as_subclass": lambda x: (x * x.detach().as_subclass(Tensor)).sum(),
    "to_dlpack": lambda x: (x * torch.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(x.detach()))).sum(),
}

TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor]], Callable[[Tensor], Any]]] = {
    "plain": lambda f: f,
    "grad": chainrule.grad,
    "jacobian": lambda f: chainrule.jacobian(lambda x: f(x).reshape(1)),
    "hessian": chainrule.hessian,
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", [*SHAPES, *VALUES])
def test_reading_values_is_refused(name: str, transform: str) -> None:
    function = (SHAPES | VALUES)[name]
    x = torch.tensor([2.0, 1.0, -1.0], dtype=DOUBLE)
    try:
        TRANSFORMS[transform](function)(x)
    except (RuntimeError, TypeError) as error:
        pytest.skip(f"refused without compile as well: {error}")
    compiled = chainrule.compile(TRANSFORMS[transform](function))
    for _ in range(2):
        with pytest.raises(chainrule.CompileError):
            compiled(x)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", TAKEN)
def test_values_of_an_argument_in_another_tensor_are_those_of_each_call(name: str, transform: str) -> None:
    take = TRANSFORMS[transform]
    compiled = chainrule.compile(take(TAKEN[name]))
    for _ in range(4):
        x = torch.randn(3, dtype=DOUBLE)
        torch.testing.assert_close(compiled(x), take(TAKEN[name])(x))


def test_masks_of_closed_over_tensors_are_refused() -> None:
    mask = torch.tensor([1.0, -1.0, 2.0])
    compiled = chainrule.compile(chainrule.grad(lambda x: x[torch.where(mask > 0)].pow(2).sum()))
    with pytest.raises(chainrule.CompileError, match="depends on values"):
        compiled(torch.ones(3))


def test_constants_may_be_made_and_asked() -> None:
    """Numbers, lists of them, and what is computed from shapes alone."""
    kept = nn.Parameter(torch.ones(3))

    def function(x: Tensor) -> Tensor:
        places = torch.where(torch.arange(x.shape[0]) > 0, 1, 0)
        x = x + x[torch.where(torch.arange(x.shape[0]) > 0)].sum()
        index = x.reshape(3, 1)[[0, 2], [0, 0]]
        return (x * torch.Tensor([1.0, 2.0, 3.0]) * places * x.new([1.0, 2.0, 3.0])).sum() + index.square().sum() + (kept * x).sum()

    compiled = chainrule.compile(chainrule.grad(function))
    for _ in range(3):
        x = torch.randn(3)
        torch.testing.assert_close(compiled(x), chainrule.grad(function)(x))
    assert compiled.cache_info().hits == 2


def test_an_argument_that_is_closed_over_as_well_keeps_its_graph() -> None:
    weight = nn.Parameter(torch.randn(3, dtype=DOUBLE))
    compiled = chainrule.compile(chainrule.grad(lambda x: (x * x * weight.detach()).sum()))
    for _ in range(3):
        torch.testing.assert_close(compiled(weight), 2 * weight.square(), check_dtype=True)
    assert compiled.cache_info().hits == 2
