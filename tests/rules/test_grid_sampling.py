"""``grid_sample`` in every mode, against torch.func, and forward mode against the transposed Jacobian's product."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

import chainrule

#: Before 2.12, torch does not differentiate the gradients of grid_sample, nor maps all of them.
DIFFERENTIATED = pytest.mark.skipif(torch.__version__ < "2.12", reason="torch.func cannot do this")
DOUBLE = {"dtype": torch.float64}
SHAPES = (
    ((2, 3, 4, 5), (2, 3, 2, 2)), ((1, 1, 1, 6), (1, 4, 1, 2)), ((2, 2, 3, 4, 2), (2, 2, 3, 1, 3)), ((1, 2, 2, 1, 3), (1, 1, 2, 2, 3)),
)  # fmt: skip
OPTIONS = [
    *itertools.product(SHAPES, ("bilinear", "nearest"), ("zeros", "border", "reflection"), (False, True)),
    *itertools.product(SHAPES[:2], ("bicubic",), ("zeros", "border", "reflection"), (False, True)),
]


def _transforms(x: Any, grid: Any, weights: Any) -> dict[str, Any]:
    def loss(f: Any) -> Any:
        return lambda *args: (f(*args) ** 2 * weights).sum()

    return {
        "grad": lambda lib, f: lib.grad(loss(f), (0, 1))(x, grid),
        "jacrev": lambda lib, f: lib.jacrev(f, (0, 1))(x, grid),
        "jacrev-grad": lambda lib, f: lib.jacrev(lib.grad(loss(f), 1), (0, 1))(x, grid),
        "vmap-grad": lambda lib, f: lib.vmap(lib.grad(loss(f), (0, 1)))(torch.stack([x, -x]), torch.stack([grid, grid.flip(1)])),
        "vmap-jacrev": lambda lib, f: lib.vmap(lib.jacrev(f, (0, 1)), (None, 0))(x, torch.stack([grid, grid.flip(1)])),
    }


@DIFFERENTIATED
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_derivatives(options: Any) -> None:
    (shape, places), mode, padding, corners = options
    torch.manual_seed(0)
    # Places within, beyond and far beyond the input.
    x, grid = torch.randn(shape, **DOUBLE), torch.randn(places, **DOUBLE) * 1.5

    def sample(x: Any, grid: Any) -> Any:
        return F.grid_sample(x, grid, mode=mode, padding_mode=padding, align_corners=corners)

    out = sample(x, grid)
    for name, transform in _transforms(x, grid, torch.randn(out.shape, **DOUBLE)).items():
        if mode == "nearest" and name == "jacrev-grad":
            assert not any(part.any() for part in transform(chainrule, sample))
            continue
        if len(shape) == 5 and name == "jacrev-grad":
            # torch has no second derivative there: central differences of the gradient.
            continue
        expected = transform(torch.func, sample)
        for _ in range(2):
            # Sums of at most 16 products of numbers of size one, and of sizes of the input as slopes.
            torch.testing.assert_close(transform(chainrule, sample), expected, rtol=1e-10, atol=1e-11)
    v, u = torch.randn_like(x), torch.randn_like(grid)
    by_x, by_grid = chainrule.jacrev(sample, (0, 1))(x, grid)
    pushed = torch.tensordot(by_x, v, x.dim()) + torch.tensordot(by_grid, u, grid.dim())
    torch.testing.assert_close(chainrule.jvp(sample, (x, grid), (v, u))[1], pushed, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(chainrule.jacfwd(sample, (0, 1))(x, grid), (by_x, by_grid), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
def test_second_derivatives_of_volumes_by_differences(padding: str) -> None:
    torch.manual_seed(1)
    x, grid = torch.randn(1, 2, 3, 4, 2, **DOUBLE), torch.rand(1, 2, 2, 1, 3, **DOUBLE) * 2 - 1

    def loss(x: Any, grid: Any) -> Any:
        return F.grid_sample(x, grid, padding_mode=padding, align_corners=False).pow(3).sum()

    found = chainrule.jacrev(chainrule.grad(loss, 1), 1)(x, grid)
    step = 1e-6
    for number in range(grid.numel()):
        unit = torch.zeros_like(grid)
        unit.view(-1)[number] = step
        difference = (torch.func.grad(loss, 1)(x, grid + unit) - torch.func.grad(loss, 1)(x, grid - unit)) / (2 * step)
        # Rounding of 1e-16 over the step, and the step's square, times derivatives of size 100.
        torch.testing.assert_close(found[..., *[int(i) for i in torch.unravel_index(torch.tensor(number), grid.shape)]], difference, rtol=1e-6, atol=1e-6)


def test_rows_and_structure() -> None:
    x, grid = torch.randn(1, 2, 5, 6, **DOUBLE), torch.rand(1, 3, 4, 2, **DOUBLE) * 2 - 1

    def sample(x: Any) -> Any:
        return F.grid_sample(x, grid, align_corners=False)

    assert "opaque" not in str(chainrule.explain(chainrule.jacrev(sample))(x))
    found = chainrule.jacobian(sample, layout="sparse_csr")(x)
    torch.testing.assert_close(found.to_dense(), torch.func.jacrev(sample)(x).reshape(24, 60))
    assert found.values().numel() <= 24 * 4


def test_nothing_to_sample() -> None:
    x, grid = torch.randn(2, 3, 4, 5, **DOUBLE), torch.zeros(2, 0, 3, 2, **DOUBLE)
    by_x, by_grid = chainrule.jacrev(lambda x, g: F.grid_sample(x, g, align_corners=True), (0, 1))(x, grid)
    assert by_x.shape == (2, 3, 0, 3, 2, 3, 4, 5)
    assert by_grid.shape == (2, 3, 0, 3, 2, 0, 3, 2)


MAPPED = [
    *itertools.product((2,), ("bilinear", "nearest", "bicubic"), ("zeros", "border", "reflection"), (False, True)),
    *itertools.product((3,), ("bilinear", "nearest"), ("zeros", "border", "reflection"), (False, True)),
]


def _mapped(rank: int, count: int = 3) -> tuple[Any, Any]:
    shape, places = ((2, 3, 4, 5), (2, 3, 2, 2)) if rank == 2 else ((1, 2, 2, 4, 3), (1, 2, 1, 3, 3))
    return torch.randn(count, *shape, **DOUBLE), torch.randn(count, *places, **DOUBLE) * 1.2


@DIFFERENTIATED
@pytest.mark.parametrize("options", MAPPED, ids=str)
def test_gradients_of_samples(options: Any) -> None:
    rank, mode, padding, corners = options

    def sample(x: Any, grid: Any) -> Any:
        return F.grid_sample(x, grid, mode=mode, padding_mode=padding, align_corners=corners)

    def loss(x: Any, grid: Any) -> Any:
        return (sample(x, grid) ** 3).sum()

    torch.manual_seed(2)
    for _ in range(5):
        x, grid = _mapped(rank)
        cotangent = torch.randn_like(sample(x[0], grid[0]))
        for transform in (
            lambda lib: lib.vmap(lib.grad(loss, 0))(x, grid),
            lambda lib: lib.vmap(lib.grad(loss, 1))(x, grid),
            lambda lib: lib.vmap(lib.grad(loss, (0, 1)))(x, grid),
            lambda lib: lib.vmap(lib.grad(loss, (0, 1)), (None, 0))(x[0], grid),
            lambda lib: lib.vmap(lib.grad(loss, (0, 1)), (0, None))(x, grid[0]),
            lambda lib: lib.vmap(lambda x, grid: lib.vjp(sample, x, grid)[1](cotangent))(x, grid),
            lambda lib: lib.vmap(lib.vmap(lib.grad(loss, (0, 1))))(x[None], grid[None]),
        ):
            # As in test_derivatives: sums of products of numbers of size one, and of squares of such.
            torch.testing.assert_close(transform(chainrule), transform(torch.func), rtol=1e-9, atol=1e-9)


def test_gradients_of_samples_are_one_kernel() -> None:
    x, grid = _mapped(2)

    def loss(x: Any, grid: Any) -> Any:
        return F.grid_sample(x, grid, align_corners=False).square().sum()

    for transform in (
        lambda: chainrule.vmap(chainrule.grad(loss, (0, 1)))(x, grid),
        lambda: chainrule.vmap(lambda x, grid: chainrule.grad(loss, (0, 1))(x, grid))(x, grid),
        lambda: chainrule.vmap(lambda x, grid: chainrule.vjp(loss, x, grid)[1](x.new_ones(())))(x, grid),
    ):
        for _ in range(4):
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                transform()
            names = {event.name for event in profile.events()}
            assert "aten::grid_sampler_2d_backward" in names
            assert not {"aten::gather", "aten::scatter_add", "aten::floor"} & names


@DIFFERENTIATED
@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("within", [False, True])
def test_derivatives_of_gradients_of_samples(rank: int, within: bool) -> None:
    """Torch has no derivative of the kernel for volumes: central differences."""

    def sample(x: Any, grid: Any) -> Any:
        return F.grid_sample(x, grid, align_corners=False)

    def loss(x: Any, grid: Any) -> Any:
        return (sample(x, grid) ** 3).sum()

    def mapped(lib: Any) -> Any:
        gradient = lib.grad(loss, (0, 1))
        return lib.vmap((lambda x, grid: gradient(x, grid)) if within else gradient)

    def outer(lib: Any) -> Any:
        return lambda x, grid: sum(part.square().sum() for part in mapped(lib)(x, grid))

    torch.manual_seed(3)
    for _ in range(4):
        x, grid = _mapped(rank)
        grid = grid.tanh() * 0.7
        mapped(chainrule)(x, grid)  # with a plan of its own
        given = x.clone().requires_grad_(), grid.clone().requires_grad_()
        ours = [chainrule.grad(outer(chainrule), (0, 1))(x, grid), torch.autograd.grad(outer(chainrule)(*given), given)]
        chained = chainrule.jvp(mapped(chainrule), (x, grid), (x.sin(), grid.cos()))[1]
        step = 1e-6
        for number in (0, 1):
            direction = torch.randn_like((x, grid)[number])
            moved = [[a + sign * step * direction if n == number else a for n, a in enumerate((x, grid))] for sign in (1, -1)]
            slope = (outer(torch.func)(*moved[0]) - outer(torch.func)(*moved[1])) / (2 * step)
            for found in ours:
                # Rounding of 1e-16 over the step times values of size 1e5, and the step's square.
                torch.testing.assert_close((found[number] * direction).sum(), slope, rtol=1e-4, atol=1e-4)
        ahead, behind = (mapped(torch.func)(x + sign * step * x.sin(), grid + sign * step * grid.cos()) for sign in (1, -1))
        for one, two, found in zip(ahead, behind, chained, strict=True):
            torch.testing.assert_close(found, (one - two) / (2 * step), rtol=1e-4, atol=1e-4)
        size = grid[0].numel()
        found = chainrule.vmap(chainrule.hessian(loss, 1))(x, grid).reshape(3, size, size)
        pushed = torch.bmm(found, grid.cos().reshape(3, size, 1)).reshape(3, size)
        twice = chainrule.jvp(lambda g: mapped(chainrule)(x, g)[1], (grid,), (grid.cos(),))[1]
        torch.testing.assert_close(pushed, twice.flatten(1), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("count", "shape", "places"), [
    (0, (1, 2, 3, 4), (1, 2, 2, 2)), (3, (2, 2, 3, 4), (2, 0, 2, 2)), (2, (2, 1, 1, 1), (2, 1, 1, 2)), (1, (1, 1, 2, 1), (1, 1, 1, 2)),
])  # fmt: skip
def test_odd_shapes_of_samples(count: int, shape: tuple[int, ...], places: tuple[int, ...]) -> None:
    x, grid = torch.randn(count, *shape, **DOUBLE), torch.rand(count, *places, **DOUBLE)

    def loss(x: Any, grid: Any) -> Any:
        return (F.grid_sample(x, grid, align_corners=False) ** 3).sum()

    for _ in range(4):
        found = chainrule.vmap(chainrule.grad(loss, (0, 1)))(x, grid)
        assert [part.shape for part in found] == [x.shape, grid.shape]
        if count:
            wanted = [torch.func.grad(loss, (0, 1))(one, two) for one, two in zip(x, grid, strict=True)] if grid.numel() else []
            for number, part in enumerate(found):
                expected = torch.stack([pair[number] for pair in wanted]) if wanted else torch.zeros_like(part)
                torch.testing.assert_close(part, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore:Since version 1.3.0")
@pytest.mark.parametrize("corners", [False, True])
@pytest.mark.parametrize("size", [(2, 3, 4, 5), (1, 1, 1, 3), (3, 1, 2, 3, 4), (1, 2, 1, 1, 1)], ids=str)
def test_grids_of_affine_maps(size: Any, corners: bool) -> None:
    """A linear function: its Jacobian is what it makes of unit matrices."""
    torch.manual_seed(4)
    rank = len(size) - 2
    theta, several = torch.randn(size[0], rank, rank + 1, **DOUBLE), torch.randn(3, size[0], rank, rank + 1, **DOUBLE)

    def places(theta: Any) -> Any:
        return F.affine_grid(theta, size, align_corners=corners)

    units = torch.eye(theta.numel(), **DOUBLE).reshape(-1, *theta.shape)
    jacobian = torch.stack([places(unit) for unit in units], -1).reshape(*places(theta).shape, *theta.shape)
    for _ in range(4):
        for given in (theta, theta.transpose(1, 2).contiguous().transpose(1, 2)):
            for transform in (chainrule.jacrev, chainrule.jacfwd, chainrule.jacobian):
                torch.testing.assert_close(transform(places)(given), jacobian)
        torch.testing.assert_close(chainrule.vmap(places)(several), torch.stack([places(one) for one in several]))
        mapped = chainrule.vmap(places, in_dims=2, out_dims=1)(several.movedim(0, 2))
        torch.testing.assert_close(mapped, torch.stack([places(one) for one in several], 1))
        torch.testing.assert_close(chainrule.vmap(chainrule.jacrev(places))(several), jacobian.expand(3, *jacobian.shape))
        found = chainrule.vmap(chainrule.grad(lambda theta: places(theta).sin().sum()))(several)
        expected = [torch.tensordot(places(one).cos(), jacobian, places(one).dim()) for one in several]
        torch.testing.assert_close(found, torch.stack(expected))
        curvature = chainrule.hessian(lambda theta: places(theta).sin().sum())(theta)
        rows = jacobian.reshape(-1, theta.numel())
        expected_curvature = (rows.T @ (-places(theta).sin().reshape(-1, 1) * rows)).reshape(curvature.shape)
        torch.testing.assert_close(curvature, expected_curvature)


def test_a_selection_from_one_leaves_gradients_of_samples_one_kernel() -> None:
    """A sample with a dimension of one before it, taken away behind the sampling."""
    x, grid = _mapped(2)

    def sample(x: Any, grid: Any) -> Any:
        return F.grid_sample(x[None], grid[None], align_corners=False)[0]

    given = x[:, 0], grid[:, 0]
    for _ in range(4):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            found = chainrule.vmap(lambda x, grid: chainrule.vjp(sample, x, grid)[1](x.new_ones(3, 3, 2)))(*given)
        names = {event.name for event in profile.events()}
        assert "aten::grid_sampler_2d_backward" in names
        assert not {"aten::gather", "aten::scatter_add", "aten::floor"} & names
        expected = torch.func.vmap(lambda x, grid: torch.func.vjp(sample, x, grid)[1](x.new_ones(3, 3, 2)))(*given)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
