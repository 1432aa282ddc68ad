"""Gradients at arguments that require grad: values and all orders of their graphs against torch.func and finite differences."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map

import chainrule

RUNS = 4


def _seed(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def _rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=_seed(seed), dtype=torch.float64)


def _joined(tree):
    return tree_map(lambda leaf: leaf.detach().clone().requires_grad_(), tree)


def _mlp(p, x):
    return torch.tanh(F.linear(x, p["w1"], p["b1"])) @ p["w2"]


def _params(width=4, seed=0):
    return {
        "w1": _rand(width, 3, seed=seed), "b1": _rand(width, seed=seed + 1), "w2": _rand(width, 2, seed=seed + 2),
        "unused": _rand(2, seed=seed + 3),
    }  # fmt: skip


def _maml(lib):
    def loss(p, x):
        return _mlp(p, x).pow(2).mean()

    def outer(p, x):
        inner = lib.grad(loss)(p, x)
        return loss({name: p[name] - 0.1 * inner[name] for name in p}, x + 1)

    return outer


def _written(lib):
    def f(p, x):
        out = x.new_zeros(4, 2)
        out[0] = (p["w1"] * 2).sum()
        out[1:] = _mlp(p, x)[:3]
        out[2, 1] *= p["b1"][0]
        return out.pow(2).sum()

    return f


def _cases():
    def plain(lib):
        return lambda p, x: _mlp(p, x).pow(2).mean()

    def relu(lib):
        return lambda p, x: F.relu(F.linear(x, p["w1"], p["b1"])).sum()

    def linear_in_one(lib):
        return lambda p, x: (p["w2"] * 3).sum() + p["b1"].pow(3).sum()

    def layer_norm(lib):
        def normalised(x, weight):
            if lib is chainrule:
                return F.layer_norm(x, (4,), weight)
            # written out: torch takes mean and scale for constants from the third derivative on
            centred = x - x.mean(-1, keepdim=True)
            return centred * (centred.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * weight

        return lambda p, x: (normalised(F.linear(x, p["w1"]), p["b1"]) @ p["w2"]).pow(3).mean()

    def vmapped(lib):
        return lambda p, x: lib.vmap(lambda row: _mlp(p, row).sin().sum())(x).pow(2).sum()

    def branch(lib):
        return lambda p, x: _mlp(p, x).sum() if p["b1"].sum() > 1e6 else _mlp(p, x).exp().sum()

    def softmax(lib):
        return lambda p, x: F.cross_entropy(_mlp(p, x), torch.tensor([0, 1, 1, 0]))

    return [plain, relu, linear_in_one, layer_norm, vmapped, branch, softmax, _maml, _written]


@pytest.mark.parametrize("case", _cases(), ids=lambda case: case.__name__)
@pytest.mark.parametrize("with_value", [False, True])
def test_graphs_of_gradients_are_those_of_torch_func(case, with_value):
    name = "grad_and_value" if with_value else "grad"
    for run in range(RUNS):
        found = []
        for lib in (torch.func, chainrule):
            p, x = _joined(_params(seed=7 * run)), _rand(4, 3, seed=run + 50)
            result = getattr(lib, name)(case(lib))(p, x)
            leaves = tree_flatten(result)[0]
            weights = [_rand(*leaf.shape, seed=n + 90) for n, leaf in enumerate(leaves)]
            penalty = sum((leaf.sin() * weight).sum() for leaf, weight in zip(leaves, weights, strict=True))
            first = torch.autograd.grad(penalty, list(p.values()), create_graph=True, allow_unused=True, materialize_grads=True)
            total = sum((item * item).sum() for item in first)
            second = [torch.zeros(())]
            if total.requires_grad:
                second = torch.autograd.grad(
                    total, list(p.values()), allow_unused=True, materialize_grads=True
                )
            found.append([*leaves, *first, *second])
            assert lib is torch.func or all(leaf.requires_grad for leaf in leaves)
        for ours, theirs in zip(found[1], found[0], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("run", range(RUNS))
def test_gradients_of_all_orders_against_finite_differences(run):
    x, shape = _rand(4, 3, seed=run), (2, 3)

    def loss(w, b):
        return torch.tanh(F.linear(x, w, b)).pow(2).sum() * b.sum()

    def gradients(w, b):
        return chainrule.grad(loss, argnums=(0, 1))(w, b)

    given = _rand(*shape, seed=run + 1).requires_grad_(), _rand(2, seed=run + 2).requires_grad_()
    assert torch.autograd.gradcheck(gradients, given, nondet_tol=1e-12)
    assert torch.autograd.gradgradcheck(gradients, given, nondet_tol=1e-12)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 1, 3)])
def test_odd_shapes(shape):
    for run in range(RUNS):
        results = []
        for lib in (torch.func, chainrule):
            p = [_rand(*shape, seed=run).requires_grad_(), _rand(1, seed=run + 1).requires_grad_()]
            found = lib.grad(lambda p: (p[0].sin() * p[1]).sum() ** 3)(p)
            sum(item.pow(2).sum() for item in found).backward()
            results.append([*found, *[leaf.grad for leaf in p]])
        for ours, theirs in zip(*results[::-1], strict=True):
            torch.testing.assert_close(ours, theirs)


def test_strided_and_derived_arguments():
    for _ in range(RUNS):
        results = []
        for lib in (torch.func, chainrule):
            base = _rand(3, 4).requires_grad_()
            p = {"w": base.t(), "v": base[0].exp()}
            found = lib.grad(lambda p: (p["w"] @ p["w"].T).sin().sum() * p["v"].sum())(p)
            (found["w"].sum() * found["v"].prod()).backward()
            results.append([*found.values(), base.grad])
        for ours, theirs in zip(*results[::-1], strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["grad", "grad_and_value"])
def test_aux_is_part_of_the_graph(name):
    def f(p, x):
        out = _mlp(p, x)
        return out.pow(2).sum(), {"out": out, "half": p["b1"] / 2, "mask": out > 0, "const": torch.ones(2)}

    for run in range(RUNS):
        results = []
        for lib in (torch.func, chainrule):
            p, x = _joined(_params(seed=run)), _rand(4, 3)
            result = getattr(lib, name)(f, has_aux=True)(p, x)
            gradient, aux = (result[0], result[1][1]) if name == "grad_and_value" else result
            total = aux["out"].sin().sum() + aux["half"].pow(3).sum() + gradient["w1"].pow(2).sum()
            own = torch.autograd.grad(total, list(p.values()), allow_unused=True, materialize_grads=True)
            results.append([*gradient.values(), aux["out"], aux["half"], aux["mask"], *own])
        for ours, theirs in zip(*results[::-1], strict=True):
            torch.testing.assert_close(ours, theirs)


def test_closed_over_parameters_and_other_arguments_have_their_part():
    for run in range(RUNS):
        results = []
        for lib in (torch.func, chainrule):
            p, scale, x = _joined(_params(seed=run)), _rand(2, seed=3).requires_grad_(), _rand(4, 3, seed=9).requires_grad_()
            found = lib.grad(lambda p, x, scale=scale: ((_mlp(p, x) * scale).sin() * (scale * 2)).sum())(p, x)
            total = sum(leaf.pow(2).sum() for leaf in found.values())
            first = torch.autograd.grad(total, [*p.values(), scale, x], create_graph=True, allow_unused=True, materialize_grads=True)
            second = torch.autograd.grad(
                sum(leaf.pow(2).sum() for leaf in first), [*p.values(), scale, x], allow_unused=True, materialize_grads=True
            )
            results.append([*found.values(), *first, *second])
        for ours, theirs in zip(*results[::-1], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_random_numbers_are_drawn_once():
    p, calls = _joined(_params()), itertools.count()

    def loss(p, x):
        next(calls)
        return F.dropout(_mlp(p, x), 0.5).pow(2).sum()

    for run in range(RUNS):
        results = []
        for lib in (torch.func, chainrule):
            torch.manual_seed(run)
            found = lib.grad(loss, **({"argnums": 0}))(p, _rand(4, 3)) if lib is chainrule else _seeded_gradient(loss, p)
            total = found["w1"].pow(2).sum()
            results.append([*found.values(), *torch.autograd.grad(total, [p["w1"], p["w2"]])])
        for ours, theirs in zip(*results[::-1], strict=True):
            torch.testing.assert_close(ours, theirs)
    assert next(calls) == 2 * RUNS


def _seeded_gradient(loss, p):
    """By torch's autograd, which draws the same numbers (torch.func draws those of a level)."""
    found = torch.autograd.grad(loss(p, _rand(4, 3)), list(p.values()), create_graph=True, allow_unused=True, materialize_grads=True)
    return dict(zip(p, found, strict=True))


def test_results_may_be_written_to():
    for _ in range(RUNS):
        p = _joined(_params())
        gradient, value = chainrule.grad_and_value(lambda p: _mlp(p, _rand(4, 3)).pow(3).sum())(p)
        expected = torch.autograd.grad(gradient["w1"].sin().sum(), p["w2"], retain_graph=True)[0]
        value.mul_(2)
        gradient["w1"].add_(1.0)
        found = torch.autograd.grad((gradient["w1"] - 1).sin().sum() + value * 0, p["w2"])[0]
        torch.testing.assert_close(found, expected)


def test_values_that_were_written_to_are_refused():
    for _ in range(RUNS):
        p = _joined(_params())
        gradient = chainrule.grad(lambda p: _mlp(p, _rand(4, 3)).pow(2).sum())(p)
        with torch.no_grad():
            p["w2"].add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            gradient["w1"].sum().backward()
    for _ in range(RUNS):
        p, x = _joined(_params()), _rand(4, 3)
        gradient = chainrule.grad(lambda p, x=x: _mlp(p, x).pow(2).sum())(p)
        x.zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            gradient["w1"].sum().backward()


def test_a_second_backward_needs_the_graph_to_be_kept():
    p = _joined(_params())
    total = chainrule.grad(lambda p: _mlp(p, _rand(4, 3)).pow(2).sum())(p)["w1"].pow(2).sum()
    first = torch.autograd.grad(total, p["w1"], retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(total, p["w1"])[0], first)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(total, p["w1"])


def test_what_a_function_does_with_its_own_graph():
    scale = _rand(2).requires_grad_()

    def inner_gradient(p, x):
        out = (_mlp(p, x) * scale).pow(2).sum()
        first, own = torch.autograd.grad(out, [p["w1"], scale], create_graph=True)
        return first.pow(2).sum() + own.sum()

    def without(p, x):
        with torch.no_grad():
            fixed = p["w1"] * 2
        return (fixed * p["w1"]).pow(2).sum() + (p["w2"].detach() * p["w2"]).sum()

    def hooked(p, x):
        hidden = p["w1"] * 2
        hidden.register_hook(lambda g: g * g)
        return hidden.pow(3).sum()

    for f in (inner_gradient, without, hooked):
        for _ in range(RUNS):
            p, x = _joined(_params()), _rand(4, 3)
            found = chainrule.grad(f)(p, x)
            if f is hooked:  # torch's own double backward would call the hook again
                expected = list(torch.func.grad(f)(p, x).values())
            else:
                expected = torch.autograd.grad(f(p, x), list(p.values()), create_graph=True, allow_unused=True, materialize_grads=True)
            for ours, theirs in zip(found.values(), expected, strict=True):
                torch.testing.assert_close(ours, theirs)
            wanted = [p["w1"], p["w2"], scale]
            total = sum(leaf.pow(2).sum() for leaf in found.values())
            own = torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True)
            total = sum(leaf.pow(2).sum() for leaf in expected)
            theirs = torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True)
            torch.testing.assert_close(own, theirs)


def test_modules_with_their_own_parameters():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 3, 3, padding=1), nn.BatchNorm1d(3), nn.GELU(), nn.Flatten(), nn.Linear(12, 2)).double()
    p = dict(model.named_parameters())
    for run in range(RUNS):
        results = []
        for lib in (torch.func, chainrule):
            buffers = {name: item.clone() for name, item in model.named_buffers()}
            x = _rand(5, 2, 4, seed=run)


            def loss(p, x=x, buffers=buffers):
                return torch.func.functional_call(model, (p, buffers), (x,)).pow(2).mean()

            if lib is chainrule:
                found = lib.grad(loss)(p)
            else:
                found = dict(zip(p, torch.autograd.grad(loss(p), list(p.values()), create_graph=True), strict=True))
            total = sum(leaf.pow(2).sum() for leaf in found.values())
            own = torch.autograd.grad(total, list(p.values()))
            results.append([*found.values(), *own, *buffers.values()])
        for ours, theirs in zip(*results[::-1], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)


def test_the_results_have_one_node():
    p = _joined(_params())
    for _ in range(RUNS):
        gradient, value = chainrule.grad_and_value(lambda p: _mlp(p, _rand(4, 3)).pow(2).sum())(p)
        assert len({leaf.grad_fn for leaf in (*gradient.values(), value)}) == 1


def test_without_gradients_there_is_no_graph():
    p = _joined(_params())
    for _ in range(RUNS):
        with torch.no_grad():
            found = chainrule.grad(lambda p: _mlp(p, _rand(4, 3)).pow(2).sum())(p)
        assert not any(leaf.requires_grad for leaf in found.values())


def test_batches_of_cotangents():
    x = _rand(4, 3)

    def loss(b, p):
        return _mlp({**p, "b1": b}, x).pow(2).sum()

    for _ in range(RUNS):
        p = _joined(_params())
        found = chainrule.grad(lambda p: loss(p["b1"], p))(p)["b1"]
        rows = torch.autograd.grad(
            found, p["b1"], torch.eye(4, dtype=torch.float64), is_grads_batched=True, retain_graph=True, create_graph=True
        )[0]
        hessian = torch.func.hessian(loss)(p["b1"], p)
        torch.testing.assert_close(rows, hessian)
        ours, theirs = (torch.autograd.grad(item.pow(2).sum(), list(p.values())[:3], retain_graph=True) for item in (rows, hessian))
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("case", ["plain", "several", "identity", "constant"])
def test_pullbacks_have_the_graphs_of_torch_func(case):
    def several(p, x):
        out = _mlp(p, x)
        return {"out": out, "row": out[0], "own": p["b1"].exp(), "first": p["w1"]}

    functions = {
        "plain": _mlp, "several": several, "identity": lambda p, x: p["b1"], "constant": lambda p, x: p["b1"] * 0 + x.sum(),
    }  # fmt: skip
    for run in range(RUNS):
        results = []
        for lib in (torch.func, chainrule):
            p, x = _joined(_params(seed=run)), _rand(4, 3).requires_grad_()
            out, pull = lib.vjp(functions[case], p, x)
            leaves, spec = tree_flatten(out)
            given = [_rand(*leaf.shape, seed=n + 20).requires_grad_() for n, leaf in enumerate(leaves)]
            found = [tree_flatten(pull(torch.utils._pytree.tree_unflatten(given, spec)))[0] for _ in range(2)]
            torch.testing.assert_close(*found)
            wanted = [*p.values(), x, *given]
            total = sum(leaf.pow(2).sum() for leaf in (*found[1], *leaves))
            first = torch.autograd.grad(total, wanted, create_graph=True, allow_unused=True, materialize_grads=True)
            total = sum(leaf.pow(2).sum() for leaf in first)
            second = torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True)
            results.append([*leaves, *found[0], *first, *second])
        for ours, theirs in zip(*results[::-1], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_pullbacks_with_aux():
    for run in range(RUNS):
        results = []
        for lib in (torch.func, chainrule):
            p, x = _joined(_params(seed=run)), _rand(4, 3)
            out, pull, aux = lib.vjp(lambda p, x=x: (_mlp(p, x), [p["b1"].sin(), x]), p, has_aux=True)
            total = pull(torch.ones_like(out))[0]["w1"].pow(2).sum() + aux[0].pow(2).sum() + out.sin().sum()
            own = torch.autograd.grad(total, list(p.values()), allow_unused=True, materialize_grads=True)
            results.append([out, *aux, *own])
        for ours, theirs in zip(*results[::-1], strict=True):
            torch.testing.assert_close(ours, theirs)


def test_pullbacks_without_gradients_have_no_graph():
    p = _joined(_params())
    for _ in range(RUNS):
        out, pull = chainrule.vjp(lambda p: _mlp(p, _rand(4, 3)), p)
        assert out.requires_grad
        with torch.no_grad():
            assert not any(leaf.requires_grad for leaf in pull(torch.ones_like(out))[0].values())
