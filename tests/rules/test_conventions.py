"""Second derivatives at kinks and bounds: those of the first derivatives that are given there, in every version of torch."""

import pytest
import torch
import torch.nn.functional as F

import chainrule

D = torch.float64


def _places():
    return torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0], dtype=D)


def _curvatures(function, *args):
    """The Hessian by three ways, as matrices over all arguments."""
    numbers = tuple(range(len(args)))
    for transform in (
        lambda: chainrule.hessian(function, numbers)(*args),
        lambda: chainrule.jacrev(chainrule.jacrev(function, numbers), numbers)(*args),
        lambda: chainrule.jacfwd(chainrule.grad(function, numbers), numbers)(*args),
    ):
        for _ in range(3):  # planned, then replayed
            rows = transform()
            yield torch.cat([
                torch.cat([block.reshape(args[i].numel(), args[j].numel()) for j, block in enumerate(row)], 1)
                for i, row in enumerate(rows)
            ])  # fmt: skip


@pytest.mark.parametrize("given", [("pos_weight",), ("weight",), ("weight", "pos_weight")], ids=str)
def test_logits_of_zero(given):
    """A loss that is smooth in the logits, so at zero too: closed form by sigmoids, and torch."""
    x, target = _places(), torch.rand(7, dtype=D)
    factors = [torch.rand(7, dtype=D) + 0.5 for _ in given]

    def loss(x, target, *factors):
        named = dict(zip(given, factors, strict=True))
        return F.binary_cross_entropy_with_logits(x, target, reduction="sum", **named)

    numbers = tuple(range(2 + len(given)))
    rows = torch.func.jacrev(torch.func.jacrev(loss, numbers), numbers)(x, target, *factors)
    expected = torch.cat([torch.cat(list(row), 1) for row in rows])
    positive, other = {"weight": (target, 1 - target), "pos_weight": (target, torch.zeros(()))}[given[-1]]
    scale = factors[0] if len(given) == 2 else 1.0
    slope = scale * (other * torch.sigmoid(x) - positive * torch.sigmoid(-x))
    for found in _curvatures(loss, x, target, *factors):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(found[:7, -7:].diagonal(), slope, rtol=1e-10, atol=1e-12)


def test_targets_of_logits_far_below_zero():
    """No term is lost where the softplus function is nearly linear."""
    x, weight = torch.tensor([-21.0, -23.0], dtype=D), torch.tensor([3.0, 2.0], dtype=D)

    def loss(x, target):
        return F.binary_cross_entropy_with_logits(x, target, pos_weight=weight, reduction="sum")

    # The slope by the target, (w - 1) log(1 + e^-x) - x, less what is linear.
    found = chainrule.grad(loss, 1)(x, torch.full((2,), 0.3, dtype=D)) + x * weight
    torch.testing.assert_close(found, (weight - 1) * torch.log1p(torch.exp(x)), rtol=1e-3, atol=0)


@pytest.mark.parametrize("size", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("name", ["huber", "smooth"])
def test_losses_at_their_bends(name, size):
    """Huber's loss counts the bend as quadratic, the smooth L1 loss as linear."""
    x, weight = _places(), torch.linspace(1, 2, 7, dtype=D)

    def loss(x, target):
        if name == "huber":
            return (F.huber_loss(x, target, reduction="none", delta=size) * weight).sum()
        return (F.smooth_l1_loss(x, target, reduction="none", beta=size) * weight).sum()

    inside = x.abs() <= size if name == "huber" else x.abs() < size
    block = torch.diag(inside * weight / (1 if name == "huber" else size))
    expected = torch.cat((torch.cat((block, -block), 1), torch.cat((-block, block), 1)))
    for found in _curvatures(loss, x, torch.zeros_like(x)):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_a_leaky_slope_at_zero():
    """``prelu`` has the left derivative at zero, the weight itself."""
    x, weight = _places(), torch.tensor([0.3], dtype=D)
    expected = torch.zeros(8, 8, dtype=D)
    expected[:7, 7] = expected[7, :7] = (x <= 0).to(D)
    for found in _curvatures(lambda x, weight: F.prelu(x, weight).sum(), x, weight):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("corners", [False, True])
@pytest.mark.parametrize("padding", ["border", "reflection"])
def test_samples_at_the_border(padding, corners):
    """Places at the outermost points have no derivative, so none of higher order either, by the grid and by the input."""
    size = 4
    edge = 1.0 if corners else 1 - 1 / size
    line = torch.tensor([-edge, -0.4, 0.1, edge], dtype=D)
    grid = torch.cartesian_prod(line, line).reshape(1, 16, 1, 2)
    image, weight = torch.randn(1, 1, size, size, dtype=D), torch.linspace(1, 2, 16, dtype=D).reshape(1, 1, 16, 1)

    def total(grid, image):
        return (F.grid_sample(image, grid, padding_mode=padding, align_corners=corners) * weight).sum()

    at_edge = (grid.abs() == edge).flatten()
    for found in _curvatures(total, grid, image):
        torch.testing.assert_close(found, found.T, rtol=1e-12, atol=1e-12)
        assert not found[:32][at_edge].any()
        assert found[:32][~at_edge].any(1).all()
