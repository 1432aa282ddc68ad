"""Masks that differ between samples, of any level of `vmap`: writes through them, beside a loop over the samples.

All comparisons are exact: indexing rounds nothing.
"""

import pytest
import torch
from torch import Tensor

import chainrule

vmap = chainrule.vmap
DRAWN = torch.Generator().manual_seed(3)
TABLES = torch.randn(4, 3, 5, 2, generator=DRAWN, dtype=torch.float64)


def put(tensor: Tensor, index, value) -> Tensor:
    changed = tensor.clone()
    changed[index] = value
    return changed


#: The shape of a mask, the index that it is in, and the value that is written to a tensor of shape (5, 2).
WRITES = {
    "vector": ((5,), lambda mask: mask, lambda x: 0.5),
    "matrix": ((5, 2), lambda mask: mask, lambda x: x.sum()),
    "second dimension": ((2,), lambda mask: (slice(None), mask), lambda x: 0.5),
    "truth": ((), lambda mask: mask, lambda x: 0.5),
    "truth, values": ((), lambda mask: mask, lambda x: 2 * x),
    "truth, values with a dimension more": ((), lambda mask: mask, lambda x: (2 * x)[None]),
    "truth, a row": ((), lambda mask: mask, lambda x: x[0].exp()),
    "truth, slice": ((), lambda mask: (mask, slice(1, 3)), lambda x: x[2:4]),
    "slice, truth": ((), lambda mask: (slice(1, 3), mask), lambda x: x[2:4][:, None]),
    "number, truth": ((), lambda mask: (1, mask), lambda x: x[0]),
    "truth, number": ((), lambda mask: (mask, -1), lambda x: x[0]),
    "..., truth": ((), lambda mask: (Ellipsis, mask), lambda x: x[..., None] - 1),
    "truth, None": ((), lambda mask: (mask, None), lambda x: 3.0),
}


def looped(function, first: Tensor, second: Tensor) -> Tensor:
    return torch.stack([function(a, b) for a, b in zip(first, second, strict=True)])


@pytest.mark.parametrize("name", WRITES)
def test_writes(name):
    shape, index, value = WRITES[name]
    masks = torch.rand(4, *shape, generator=DRAWN) > 0.5
    masks[0], masks[1] = True, False

    def written(x, mask):
        return put(x, index(mask), value(x))

    expected = looped(written, TABLES[:, 0], masks)
    nested = torch.stack([torch.stack([written(x, mask) for x in table]) for table, mask in zip(TABLES, masks, strict=True)])
    for _ in range(4):  # the calls after the first ones replay
        assert torch.equal(vmap(written)(TABLES[:, 0], masks), expected)
        # The mask belongs to the outer level.
        assert torch.equal(vmap(lambda table, mask: vmap(lambda x: written(x, mask))(table))(TABLES, masks), nested)
        # The tensor does not differ between the samples of the outer level.
        around = vmap(lambda mask: vmap(lambda x: written(x, mask))(TABLES[0]))(masks)
        assert torch.equal(around, torch.stack([torch.stack([written(x, mask) for x in TABLES[0]]) for mask in masks]))


@pytest.mark.parametrize("name", WRITES)
def test_derivatives_of_writes(name):
    shape, index, value = WRITES[name]
    masks = torch.rand(4, *shape, generator=DRAWN) > 0.5

    def energy(x, mask):
        return (put(x, index(mask), value(x)) ** 3).sum()

    def by_autograd(x, mask):
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(energy(leaf, mask), leaf)[0]

    expected = looped(by_autograd, TABLES[:, 0], masks)
    nested = torch.stack([looped(by_autograd, table, mask.expand(3, *shape)) for table, mask in zip(TABLES, masks, strict=True)])
    for _ in range(4):
        torch.testing.assert_close(vmap(chainrule.grad(energy))(TABLES[:, 0], masks), expected)
        found = vmap(lambda table, mask: vmap(lambda x: chainrule.grad(energy)(x, mask))(table))(TABLES, masks)
        torch.testing.assert_close(found, nested)


def test_index_put_with_the_mask_of_an_outer_level():
    masks = torch.rand(4, 5, generator=DRAWN) > 0.5
    zero = torch.zeros((), dtype=torch.float64)
    found = vmap(lambda table, mask: vmap(lambda x: x.index_put((mask,), zero))(table))(TABLES, masks)
    assert torch.equal(found, torch.where(masks[:, None, :, None], 0, TABLES))


READS = {
    "vector": ((5,), lambda x, mask: x[mask].sum()),
    "truth": ((), lambda x, mask: x[mask].sum()),
    "truth, slice": ((), lambda x, mask: x[mask, 1:].sum()),
    "values": ((5,), lambda x, mask: put(x, mask, torch.ones(2, dtype=torch.float64)).sum()),
    "truth and list": ((), lambda x, mask: put(x, (mask, torch.tensor([0, 1])), 0.0).sum()),
}


@pytest.mark.parametrize("name", READS)
def test_what_has_no_fixed_shape_says_so(name):
    shape, function = READS[name]
    masks = torch.rand(4, *shape, generator=DRAWN) > 0.5
    for _ in range(2):
        with pytest.raises(RuntimeError, match="a boolean mask that differs between samples"):
            vmap(function)(TABLES[:, 0], masks)
        with pytest.raises(RuntimeError, match="a boolean mask that differs between samples"):
            vmap(lambda table, mask: vmap(lambda x: function(x, mask))(table))(TABLES, masks)


def test_a_mask_of_another_shape_is_an_error():
    masks = torch.ones(4, 1, dtype=torch.bool)
    with pytest.raises(IndexError, match="does not match"):
        vmap(lambda x, mask: put(x, mask, 0.0))(TABLES[:, 0], masks)


def test_an_integer_beside_a_mask():
    """A mask is not the only index: no place of it is taken for another."""
    masks = torch.rand(4, 2, generator=DRAWN) > 0.5
    with pytest.raises(RuntimeError, match="a boolean mask that differs between samples"):
        vmap(lambda x, mask: put(x, (torch.tensor([0, 2]), mask), 0.0))(TABLES[:, 0], masks)


#: The shape of a tensor, and the index that holds a mask: too short, too long, of a later dimension, beside other tensors.
MISFITS = {
    "short": ((5,), torch.tensor([True, False])),
    "long": ((5,), torch.tensor([True] * 7)),
    "long, false at the end": ((5,), torch.tensor([True] * 5 + [False])),
    "second dimension": ((5, 4), (slice(None), torch.tensor([True, False, True]))),
    "a matrix": ((5, 4), torch.ones(5, 3, dtype=torch.bool)),
    "after an index": ((5, 4), (torch.tensor([0, 1]), torch.tensor([True, True]))),
    "too many dimensions": ((5,), torch.ones(5, 1, dtype=torch.bool)),
}
USES = {
    "get": lambda x, index: x[index],
    "set": lambda x, index: put(x, index, 9.0),
    "set values": lambda x, index: put(x, index, x.sum()),
    "set in a constant": lambda x, index: put(torch.zeros(x.shape, dtype=x.dtype), index, x.sum()),
    "index_put_": lambda x, index: (x * 1).index_put_(index if isinstance(index, tuple) else (index,), x.sum()),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("name", MISFITS)
def test_a_mask_of_another_length_raises_what_torch_says_of_a_sample(name: str, use: str) -> None:
    shape, index = MISFITS[name]
    if use == "index_put_" and isinstance(index, tuple) and isinstance(index[0], slice):
        pytest.skip("index_put_ takes tensors alone")

    def function(x: Tensor) -> Tensor:
        return USES[use](x, index)

    with pytest.raises(IndexError) as expected:
        function(torch.randn(shape, dtype=torch.float64))
    transforms = [vmap(function), vmap(chainrule.jacrev(function)), vmap(chainrule.jacfwd(function)), vmap(vmap(function))]
    for transformed, sizes in zip(transforms, [[3], [3], [3], [3, 2]], strict=True):
        for _ in range(3):
            with pytest.raises(IndexError) as found:
                transformed(torch.randn(*sizes, *shape, dtype=torch.float64))
            if name != "too many dimensions":
                assert str(found.value) == str(expected.value)


def test_a_mask_that_differs_between_samples_and_is_too_short() -> None:
    x = torch.randn(3, 5, dtype=torch.float64)
    with pytest.raises(IndexError, match=r"shape of the mask \[2\] at index 0 does not match the shape of the indexed tensor \[5\] at index 0"):
        vmap(lambda x: put(x, x[:2] > 0, 1.0))(x)
