"""Lists of entries that meet very often: products take memory in the number of their entries, not of the pairs that meet."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import chainrule
from chainrule.execute import engine
from chainrule.maps import meeting_blocks
from tests.transforms.test_blocks import peak_bytes

Tensor = torch.Tensor
DOUBLE = torch.float64
SIZE = 160
MATRIX = torch.randn(SIZE, SIZE, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
#: Of 160³ / 6 pairs of entries each would take several numbers of 8 bytes; dense arrays of 160² are held a few at a time.
LARGE = 100 * 8 * SIZE**2


def running(x: Tensor) -> Tensor:
    return x.cumsum(0).tanh().cumsum(0)


def masked(x: Tensor) -> Tensor:
    return torch.where(x > 0, x.cumsum(0), x).cumsum(0)


def products(x: Tensor) -> Tensor:
    return x.cumprod(0).tanh().cumprod(0)


def exponentials(x: Tensor) -> Tensor:
    return x.logcumsumexp(0).sin().logcumsumexp(0)


def turned(x: Tensor) -> Tensor:
    return x.cumsum(0).tanh().flip(0)[: len(x) - 3].cumsum(0)


def dense_after(x: Tensor) -> Tensor:
    return MATRIX[: len(x), : len(x)] @ x.cumsum(0).tanh()


def dense_before(x: Tensor) -> Tensor:
    return (MATRIX[: len(x), : len(x)] @ x).tanh().cumsum(0)


def lines(x: Tensor) -> Tensor:
    return torch.outer(x, x[:2]).cumsum(0).tanh().cumsum(0)


def summands(x: Tensor) -> Tensor:
    return x.cumsum(0).tanh().cumsum(0) * x + x.flip(0).cumsum(0)


CHAINS = [running, masked, products, exponentials, turned, dense_after, dense_before]


def point(size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("function", CHAINS)
def test_jacobians_take_memory_in_the_number_of_their_entries(function: Callable[[Tensor], Tensor]) -> None:
    x = point(SIZE)
    found: list[Tensor] = []
    engine.CACHE.clear()
    assert peak_bytes(lambda: found.append(chainrule.jacobian(function, layout="sparse_coo")(x))) < LARGE
    expected = torch.func.jacrev(function)(x)
    torch.testing.assert_close(found[0].to_dense(), expected, rtol=1e-10, atol=1e-10)


def test_gram_matrices_hessians_and_patterns_take_no_more() -> None:
    x = point(SIZE)
    engine.CACHE.clear()

    def cost(x: Tensor) -> Tensor:
        return running(x).sin().sum()

    calls: list[tuple[Callable[[], object], int]] = [
        (lambda: chainrule.linear_map(lambda x: x.sin().cumsum(0), x).gram().sparse(), 1),
        (lambda: chainrule.linear_map(running, x).normal().sparse(), 1),
        (lambda: chainrule.hessian(cost, layout="sparse_coo")(x), 2),
        (lambda: chainrule.sparsity(running, x), 1),
    ]
    for call, share in calls:
        assert peak_bytes(call) < share * LARGE


def test_the_pattern_of_running_sums_is_a_triangle() -> None:
    pattern = chainrule.sparsity(running, point(SIZE))
    assert torch.equal(pattern.indices, torch.tril_indices(SIZE, SIZE))
    # Nothing leads from the last elements to the result, and each row ends where its element does.
    rows, columns = chainrule.sparsity(turned, point(SIZE)).indices
    assert rows.numel() == int((torch.func.jacrev(lambda x: x.cumsum(0).flip(0)[: SIZE - 3].cumsum(0))(point(SIZE)) != 0).sum())
    assert int(rows.max()) == SIZE - 4 and int(columns.max()) == SIZE - 1


def as_blocks_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting_blocks, "_PAIRS", 1)
    monkeypatch.setattr(meeting_blocks, "_PER_ELEMENT", 0)
    monkeypatch.setattr(meeting_blocks, "_LISTED", 1e12)
    engine.CACHE.clear()


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks, however few pairs there are."""
    as_blocks_always(monkeypatch)


def scattered(x: Tensor) -> Tensor:
    index = torch.tensor([1, 0, 3, 3, 5, 1, 0, 2])
    return torch.zeros(7, dtype=x.dtype).index_add(0, index, x[index].sin())[index] * x[1]


def added(x: Tensor) -> Tensor:
    index = torch.tensor([1, 0, 3, 3, 5, 1, 0, 2, 1, 4])
    return torch.zeros(8, dtype=x.dtype).index_add(0, index, torch.zeros(8, dtype=x.dtype).index_add(0, index, x[index]).sin()[index])


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("function", [*CHAINS, lines, summands, scattered, added])
def test_blocks_are_exact(function: Callable[[Tensor], Tensor]) -> None:
    def cost(x: Tensor) -> Tensor:
        return function(x).sin().sum()

    for seed in range(4):
        x = point(8, seed)
        dense = torch.func.jacrev(function)(x)
        flat = dense.reshape(-1, 8)
        linear = chainrule.linear_map(function, x)
        for found, expected in (
            (chainrule.jacobian(function, layout="sparse_coo")(x), dense),
            (chainrule.jacrev(function, layout="sparse_coo")(x), dense),
            (chainrule.jacfwd(function, layout="sparse_coo")(x), dense),
            (chainrule.jacobian(function, layout="sparse_csr")(x), flat),
            (linear.gram().sparse(flat=True), flat @ flat.T),
            (linear.normal().sparse(flat=True), flat.T @ flat),
            (chainrule.hessian(cost, layout="sparse_coo")(x), torch.func.hessian(cost)(x)),
            (chainrule.hessian(cost, layout="sparse_coo", triangular="lower")(x), torch.func.hessian(cost)(x).tril()),
        ):
            # Sums of at most a few hundred products of numbers of size about ten.
            torch.testing.assert_close(found.to_dense(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("function", [*CHAINS, lines, summands, scattered, added])
def test_blocks_have_the_places_of_lists(function: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    x = point(8)
    engine.CACHE.clear()

    def patterns() -> list[Tensor]:
        linear = chainrule.linear_map(lambda y: function(y), x)
        return [chainrule.sparsity(function, x).indices, linear.gram().sparse().indices(), linear.normal().sparse().indices()]

    listed = patterns()
    as_blocks_always(monkeypatch)
    assert all(torch.equal(one, two) for one, two in zip(listed, patterns(), strict=True))


@pytest.mark.usefixtures("always")
def test_blocks_under_vmap_and_with_graphs() -> None:
    batch = torch.randn(3, 8, dtype=DOUBLE)
    found = torch.stack([chainrule.jacobian(running, layout="sparse_coo")(x).to_dense() for x in batch])
    mapped = chainrule.vmap(chainrule.jacobian(running, layout="sparse_coo"))(batch)
    torch.testing.assert_close(mapped.to_dense(), found)
    x = point(8).requires_grad_()
    (ours,) = torch.autograd.grad((chainrule.jacobian(running, layout="sparse_coo")(x).coalesce().values() ** 2).sum(), x)
    (theirs,) = torch.autograd.grad((torch.func.jacrev(running)(x) ** 2).sum(), x)
    torch.testing.assert_close(ours, theirs)


def test_few_pairs_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product in which entries hardly meet stays a list."""
    monkeypatch.setattr(meeting_blocks, "_multiplied", None)
    monkeypatch.setattr(meeting_blocks, "_times_block", None)
    generator = torch.Generator().manual_seed(0)
    ends = torch.randint(2000, (2, 12_000), generator=generator)

    def graph(x: Tensor) -> Tensor:
        for _ in range(2):
            x = torch.zeros(2000, dtype=x.dtype).index_add(0, ends[0], x[ends[1]].sin())
        return x

    x = torch.randn(2000, dtype=DOUBLE, generator=generator)
    v = torch.randn(2000, dtype=DOUBLE, generator=generator)
    found = chainrule.jacobian(graph, layout="sparse_coo")(x)
    torch.testing.assert_close((found @ v[:, None])[:, 0], torch.func.jvp(graph, (x,), (v,))[1])
