"""Functions that write to memory, against the same function written without writes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

import chainrule

torch.set_num_threads(1)


def vector(*shape):
    return torch.linspace(0.2, 1.7, max(1, torch.Size(shape).numel()), dtype=torch.float64).reshape(shape).sin() + 0.1


CASES = {}


def case(functional, *inputs):
    """Register a mutating function beside its functional twin (None: torch.func runs the function as it is)."""

    def register(mutating):
        CASES[mutating.__name__] = (mutating, functional or mutating, inputs)
        return mutating

    return register


@case(lambda x: torch.stack([x[i].sin() * x.sum() for i in range(4)]), vector(4))
def loop_over_rows(x):
    out = torch.zeros(4, dtype=x.dtype)
    for i in range(4):
        out[i] = x[i].sin() * x.sum()
    return out


@case(lambda x: torch.stack([x[0], x[0] * x[1], x[0] * x[1] * x[2]]), vector(3))
def recurrence(x):
    out = torch.empty(3, dtype=x.dtype)
    out[0] = x[0]
    for i in range(1, 3):
        out[i] = out[i - 1] * x[i]
    return out


@case(lambda x: torch.cat([x[:1] * 2, x[1:3].exp() + 1, x[3:]]).sin(), vector(5))
def slices_assigned(x):
    y = x.clone()
    y[:1] *= 2
    y[1:3] = x[1:3].exp() + 1
    return y.sin()


@case(lambda x: (x * 3 + 1).sin(), vector(4))
def chain_in_place(x):
    y = x * 3
    y += 1
    y.sin_()
    return y


@case(lambda x: (x.exp().sin(), x.exp().sin() * 2), vector(4))
def view_of_a_mutated_base(x):
    y = x.exp()
    view = y.view(2, 2)
    y.sin_()
    return view.reshape(4), view.reshape(-1) * 2


@case(lambda x: torch.cat([x[:2] * 5, x[2:]]) ** 2, vector(4))
def base_of_a_mutated_view(x):
    y = x * 1
    view = y.view(2, 2)
    view[0] *= 5
    return y**2


@case(lambda x: (x.t() * torch.tensor([1.0, 7.0], dtype=torch.float64)).t().reshape(6), vector(2, 3))
def through_a_transpose(x):
    y = x.clone()
    y.t()[:, 1] *= 7
    return y.flatten()


@case(lambda x: x + torch.diag(x.diagonal() ** 2), vector(3, 3))
def through_a_diagonal(x):
    y = x.clone()
    y.diagonal().add_(x.diagonal() ** 2)
    return y


@case(lambda x: torch.stack([x[0], x[1] * x[0], x[2]]).reshape(3, 2) * 2, vector(3, 2))
def through_unsqueeze_and_permute(x):
    y = x * 2
    y.unsqueeze(1).permute(2, 1, 0)[:, 0, 1].mul_(x[0])
    return y


@case(lambda x: torch.cat([x[:2].sin(), x[2:].cos()]), vector(5))
def split_pieces(x):
    y = x.clone()
    first, second = y.split([2, 3])
    first.sin_()
    second.cos_()
    return y


@case(lambda x: torch.stack([x[0] ** 2, x[1] ** 3]), vector(2, 3))
def unbound_rows(x):
    y = x.clone()
    one, two = y.unbind(0)
    one.pow_(2)
    two.pow_(3)
    return y


@case(lambda x: torch.where(x > 0.8, x**2, x.exp()), vector(6))
def mask_assigned(x):
    y = x.exp()
    y[x > 0.8] = x[x > 0.8] ** 2
    return y


@case(lambda x, s: torch.where(x > 0.8, s, x.exp()), vector(6), vector())
def scalar_to_a_mask(x, s):
    y = x.exp()
    y[x > 0.8] = s
    return y


@case(lambda x: torch.stack([x[1], x[0], x[2] * 2, x[3]]), vector(4))
def index_assigned(x):
    y = x.clone()
    y[torch.tensor([1, 0])] = x[:2]
    y.index_put_((torch.tensor([2]),), x[2:3], accumulate=True)
    return y


@case(lambda x: torch.where(x < 0.7, torch.zeros_like(x), x) * 2, vector(5))
def masked_fill_in_place(x):
    y = x * 2
    y.masked_fill_(x < 0.7, 0.0)
    return y


@case(lambda x: x.new_zeros(4).index_add(0, torch.tensor([0, 0, 3]), x), vector(3))
def index_add_in_place(x):
    return torch.zeros(4, dtype=x.dtype).index_add_(0, torch.tensor([0, 0, 3]), x)


@case(lambda x: x.new_zeros(3).scatter_add(0, torch.tensor([2, 2, 1]), x.sin()), vector(3))
def scatter_add_in_place(x):
    out = torch.zeros(3, dtype=x.dtype)
    out.scatter_add_(0, torch.tensor([2, 2, 1]), x.sin())
    return out


@case(lambda x: x.sin() + x, vector(3))
def copy_in_place(x):
    buffer = torch.empty(3, dtype=x.dtype)
    buffer.copy_(x.sin())
    buffer += x
    return buffer


@case(lambda x: x[1].expand(2, 3) * 1, vector(2, 3))
def copy_broadcasts(x):
    buffer = torch.empty(2, 3, dtype=x.dtype)
    buffer.copy_(x[1])
    return buffer


@case(lambda x: (x.float().double() ** 2), vector(3))
def copy_casts(x):
    buffer = torch.empty(3, dtype=torch.float32)
    buffer.copy_(x)
    return buffer.double() ** 2


@case(lambda x: x.sin() * x.exp(), vector(3))
def out_argument(x):
    buffer = torch.empty(3, dtype=x.dtype)
    torch.sin(x, out=buffer)
    return torch.mul(buffer, x.exp(), out=torch.empty(3, dtype=x.dtype))


@case(lambda x: (x * 2).sin(), vector(3))
def an_input_is_written(x):
    x.mul_(2)
    return x.sin()


@case(lambda x: x.new_zeros(3) + torch.stack([x[0], 0 * x[1], x[2]]), vector(3))
def zeroed_in_place(x):
    y = x.clone()
    y[1].zero_()
    return y


@case(lambda x: torch.stack([x[0], x[2].detach(), x[2]]), vector(3))
def filled_with_a_constant(x):
    y = x.clone()
    y[1] = x[2].item()
    return y


@case(lambda x: x.sum().expand(2, 2) * 1, vector(3))
def filled_with_a_tensor(x):
    y = torch.empty(2, 2, dtype=x.dtype)
    y.fill_(x.sum())
    return y


@case(lambda x: (x.exp() * 2, x.exp() * 2 + 1), vector(3))
def the_derivative_reads_what_is_overwritten(x):
    y = x.exp()
    z = y * 2
    y.zero_()
    return z, z + 1


@case(lambda x: (x**2) * (x**2 + 1), vector(3))
def written_between_two_reads(x):
    y = x**2
    first = y * 1
    y += 1
    return first * y


@case(lambda x: (x * 2 + 1, (x * 2 + 1) * 2), vector(2, 3))
def two_views_of_one_memory(x):
    y = x * 2
    one, two = y.reshape(6), y.t()
    one.add_(1)
    return y, two.t() * 2


@case(lambda x: torch.cumsum(x.flip(0), 0).flip(0), vector(4))
def backwards_accumulation(x):
    y = x.clone()
    for i in range(2, -1, -1):
        y[i] += y[i + 1]
    return y


@case(lambda x: torch.stack([x[:, 0] * x[:, 1], x[:, 1]], 1), vector(3, 2))
def column_updated_by_column(x):
    y = x.clone()
    y[:, 0] *= y[:, 1]
    return y


@case(lambda x: torch.stack([torch.stack([x[0, 0], 3 * x[0, 1]]), torch.stack([x[1, 0], 3 * x[1, 1]])]), vector(2, 2))
def strided_columns(x):
    y = x.clone()
    y[..., 1::2] *= 3
    return y


@case(lambda x: x.flip(0), vector(4))
def swapped(x):
    y = x.clone()
    for i in range(2):
        keep = y[i].clone()
        y[i] = y[3 - i]
        y[3 - i] = keep
    return y


@case(lambda x: torch.relu(x - 0.5), vector(4))
def module_in_place(x):
    return torch.nn.ReLU(inplace=True)(x - 0.5)


@case(lambda x: x.new_ones(2, 3) * torch.stack([x, x.sin()]), vector(3))
def rows_set_to_vectors(x):
    out = torch.ones(2, 3, dtype=x.dtype)
    out[0] = x
    out[1].copy_(x.sin())
    return out


@case(lambda x: torch.stack([x[0].real, x[1] * 2]), vector(2))
def select_scatter_of_scalars(x):
    y = x.clone()
    y.select(0, 1).mul_(2)
    return y


@case(lambda x: x.reshape(2, 2)[:, [1, 0]].sin(), vector(4))
def as_strided_written(x):
    y = torch.zeros(2, 2, dtype=x.dtype)
    y.as_strided((2, 2), (1, 2)).copy_(x.reshape(2, 2)[:, [1, 0]].t().sin())
    return y


@case(lambda x: (torch.where(torch.eye(3, dtype=torch.bool), x.sum() * torch.ones_like(x), x)), vector(3, 3))
def fill_diagonal_view(x):
    y = x.clone()
    y.diagonal(0).copy_(x.sum())
    return y


@case(lambda x: (x.reshape(2, 2) + 1).reshape(4) * 2, vector(4))
def expanded_view_of_a_view(x):
    y = x * 1
    y.view(2, 2).view(4).view(2, 2)[:].add_(1)
    return y * 2


@case(lambda x: torch.cat([x[:1] * 2, x[1:]]), vector(2, 3))
def a_view_changes_shape_in_place(x):
    y = x.clone()
    row = y[0]
    row.unsqueeze_(0)
    row.mul_(2)
    return y


@case(lambda x: (x * x).t() * 1, vector(2, 3))
def a_base_changes_shape_in_place(x):
    y = x.clone()
    flat = y.view(-1)
    y.t_()
    flat.mul_(x.reshape(-1))
    return y * 1


@case(lambda x: x.t() + 1, vector(2, 3))
def shapes_change_in_place(x):
    y = x.clone()
    y.transpose_(0, 1)
    y.unsqueeze_(0)
    y.squeeze_(0)
    y += 1
    return y.swapaxes_(0, 1).swapaxes_(0, 1)


@case(None, vector(2, 3))
def a_reshape_that_copies(x):
    y = x.clone()
    flat = y.t().reshape(-1)
    flat.mul_(2)
    whole = y.t().contiguous()
    whole += 1
    last = y.t().flatten()
    last.sin_()
    return y, flat, whole, last


@case(None, vector(2, 3))
def composite_views_of_constants(x):
    y = torch.zeros(2, 3, dtype=x.dtype)
    y.flatten().add_(x.flatten())
    y.view_as(y).mul_(3)
    y.narrow(0, 0, 1).mul_(2)
    y.movedim(0, 1)[1].mul_(2)
    y.swapaxes(0, 1)[0] += 1
    return y


@case(lambda x: (x[:, :2] + x[:, 2:], x[:, 2:] * 1), vector(2, 4))
def chunks_added_to_each_other(x):
    one, two = x.clone().chunk(2, 1)
    one += two
    return one, two


@case(lambda x: x.flip(0).flip(0).flip(0), vector(3, 2))
def copied_from_itself(x):
    y = x.clone()
    y.copy_(y.flip(0))
    return y


@case(lambda x: torch.stack([x[0].sin(), x[1].cos()]), vector(2, 3))
def out_argument_is_a_view(x):
    out = torch.zeros(2, 3, dtype=x.dtype)
    torch.sin(x[0], out=out[0])
    torch.cos(x[1], out=out[1])
    return out


def tree_close(one, two):
    one, two = (torch.utils._pytree.tree_leaves(t) for t in (one, two))
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("transform", ["jacrev", "jacfwd", "jacobian"])
def test_first_order(name, transform):
    mutating, functional, inputs = CASES[name]
    numbers = tuple(range(len(inputs)))
    expected = torch.func.jacrev(functional, numbers)(*inputs)
    got = getattr(chainrule, transform)(mutating, numbers)(*(x.clone() for x in inputs))
    tree_close(got, expected)


@pytest.mark.parametrize("name", CASES)
def test_values_and_twice_cached(name):
    mutating, functional, inputs = CASES[name]
    for shift in (0.0, 0.01):
        shifted = tuple(x + shift for x in inputs)
        out, pull = chainrule.vjp(mutating, *(x.clone() for x in shifted))
        expected, reference = torch.func.vjp(functional, *shifted)
        tree_close(out, expected)
        seeds = torch.utils._pytree.tree_map(lambda t: torch.cos(t.detach() + 3), expected)
        tree_close(pull(seeds), reference(seeds))
        tangents = tuple(x.cos() for x in inputs)
        pushed = chainrule.jvp(mutating, tuple(x.clone() for x in shifted), tangents)
        tree_close(pushed, torch.func.jvp(functional, shifted, tangents))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("order", ["jacfwd(jacrev)", "jacrev(jacrev)"])
def test_second_order(name, order):
    mutating, functional, inputs = CASES[name]
    outer = chainrule.jacfwd if order.startswith("jacfwd") else chainrule.jacrev
    expected = torch.func.jacfwd(torch.func.jacrev(functional))(*inputs)
    got = outer(chainrule.jacrev(mutating))(*(x.clone() for x in inputs))
    tree_close(got, expected)


def _wants_values(name):
    # Branches on values or writes to unbatched memory that vmap has to refuse.
    return name in {"mask_assigned", "scalar_to_a_mask", "filled_with_a_constant", "composite_views_of_constants"}


@pytest.mark.parametrize("name", [n for n in CASES if not _wants_values(n)])
def test_under_vmap(name):
    mutating, functional, inputs = CASES[name]
    batch = tuple(torch.stack([x, x * 0.7 + 0.1]) for x in inputs)
    expected = torch.func.vmap(torch.func.jacrev(functional))(*batch)
    tree_close(chainrule.vmap(chainrule.jacrev(_own_memory(mutating)))(*batch), expected)


def _own_memory(function):
    return lambda *args: function(*(a.clone() for a in args))


def test_writes_into_a_captured_tensor_are_seen_and_differentiated():
    x = vector(3)
    log = torch.zeros(3, dtype=torch.float64)

    def function(x):
        log.copy_(x * 2)
        log[1] = x[0] ** 2
        return log.sin()

    got = chainrule.jacrev(function)(x)
    expected = torch.func.jacrev(lambda x: torch.stack([x[0] * 2, x[0] ** 2, x[2] * 2]).sin())(x)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(log, torch.stack([x[0] * 2, x[0] ** 2, x[2] * 2]))


def test_a_write_under_detach_changes_the_value_only():
    x = vector(3)

    def function(x):
        y = x**2
        y.detach().mul_(3)
        return y

    out, pull = chainrule.vjp(function, x)
    torch.testing.assert_close(out, 3 * x**2)
    torch.testing.assert_close(pull(torch.ones(3, dtype=x.dtype))[0], 2 * x)


def test_the_input_keeps_its_new_value():
    x = vector(3)
    before = x.clone()
    chainrule.jacrev(lambda x: x.mul_(2).sin())(x)
    torch.testing.assert_close(x, before * 2)


@pytest.mark.parametrize("resize", [lambda y: y.resize_(5), lambda y: y.set_(torch.zeros(5, dtype=y.dtype))])
def test_resizing_an_active_tensor_is_a_clear_error(resize):
    def function(x):
        y = x * 2
        resize(y)
        return y.sum()

    with pytest.raises(RuntimeError, match="resize"):
        chainrule.grad(function)(vector(3))
    torch.testing.assert_close(chainrule.grad(lambda x: (x**2).sum())(vector(3)), 2 * vector(3))


def written_real_part(x):
    z = torch.complex(x.sin(), x)
    z.real.add_(x**2)
    return z.abs()



@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("shape", [(2, 3), (7, 2), (3, 3, 3)])
def test_a_filled_diagonal_is_constant(shape, wrap):
    def filled(x):
        y = x.sin()
        y.fill_diagonal_(3.0, wrap)
        return y * x

    x = torch.randn(shape, dtype=torch.float64)
    places = torch.zeros(shape, dtype=torch.bool).fill_diagonal_(True, wrap)
    expected = torch.where(places, 3.0, x.sin() + x * x.cos())
    torch.testing.assert_close(chainrule.grad(lambda x: filled(x).sum())(x), expected)
    torch.testing.assert_close(chainrule.jvp(filled, (x,), (torch.ones_like(x),))[1], expected)


def test_writes_through_the_real_part():
    x = torch.randn(4, dtype=torch.float64)
    expected = torch.diag(((x.sin() + x**2) * (x.cos() + 2 * x) + x) / ((x.sin() + x**2) ** 2 + x**2).sqrt())
    torch.testing.assert_close(chainrule.jacrev(written_real_part)(x), expected)
    torch.testing.assert_close(chainrule.jacfwd(written_real_part)(x), expected)


def test_a_masked_write_per_sample():
    def masked(x):
        y = x.sin()
        y[x > 0] = 0.0
        return y * x

    batch = torch.randn(5, 4, dtype=torch.float64)
    slope = torch.where(batch > 0, 0.0, batch.sin() + batch * batch.cos())
    curvature = torch.where(batch > 0, 0.0, 2 * batch.cos() - batch * batch.sin())
    for _ in range(2):
        torch.testing.assert_close(chainrule.vmap(chainrule.jacrev(masked))(batch), torch.diag_embed(slope))
        torch.testing.assert_close(chainrule.vmap(chainrule.jacfwd(masked))(batch), torch.diag_embed(slope))
        found = chainrule.vmap(chainrule.hessian(lambda x: masked(x).sum()))(batch)
        torch.testing.assert_close(found, torch.diag_embed(curvature))


@pytest.mark.parametrize("inplace", [lambda x: F.dropout(x, 0.5, inplace=True), lambda x: F.alpha_dropout(x, 0.4, True, inplace=True)])
def test_values_dropped_in_place(inplace):
    """What dropout keeps of a tensor that it writes to has a derivative."""

    def loss(x):
        return (inplace(x * 1.0) ** 2).sum()

    for seed in range(3):
        x = torch.rand(6, dtype=torch.float64)
        torch.manual_seed(seed)
        expected = torch.func.grad(loss)(x)
        torch.manual_seed(seed)
        torch.testing.assert_close(chainrule.grad(loss)(x), expected)


@pytest.mark.parametrize("made", [torch.zeros, torch.ones, lambda *shape, dtype: torch.rand(5, 3, dtype=dtype).t()[:, :4].t()])
def test_rows_of_a_constant_assigned(made):
    """Memory that was no value of the run becomes one with the first write through a view, and constants beside it stay constants."""
    weights = torch.rand(4, 3, dtype=torch.float64)

    def loss(x):
        kept = made(4, 3, dtype=torch.float64) * 1
        part = kept[1:]
        kept[0] = x[1] * weights[0]
        part[1, 2] = x.sum()
        part[2] = 1.5
        weights[1:].sum()
        kept[:, 1] += weights[:, 1]
        return (kept**2).sum() + (part**3).sum() + (kept[0] * weights[1]).sum()

    for _ in range(3):
        x = torch.rand(3, 3, dtype=torch.float64)
        torch.manual_seed(1)
        expected = torch.func.grad(loss)(x)
        torch.manual_seed(1)
        torch.testing.assert_close(chainrule.grad(loss)(x), expected)


@pytest.mark.parametrize("training", [False, True])
def test_rrelu_in_place_has_the_slopes_that_its_value_has(training: bool) -> None:
    x = torch.randn(40, dtype=torch.float64)

    def func(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = torch.nn.functional.rrelu(y * 1.0, training=training, inplace=True)
        return (out * out).sum(), out

    slopes, out = chainrule.grad(func, has_aux=True)(x)
    torch.testing.assert_close(slopes, 2 * out * out / x)
    torch.manual_seed(5)
    second = chainrule.hessian(lambda y: func(y)[0])(x)
    torch.manual_seed(5)
    torch.testing.assert_close(second, torch.diag(2 * (func(x)[1] / x) ** 2))
    mapped, out = chainrule.vmap(chainrule.grad(func, has_aux=True), randomness="different")(x.view(4, 10))
    torch.testing.assert_close(mapped, 2 * out * out / x.view(4, 10))
    if training:
        assert (out / x.view(4, 10)).unique().numel() > 4
