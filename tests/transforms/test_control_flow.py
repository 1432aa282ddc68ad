"""Python in the function: branches, loops, printing, values; nothing left behind, several threads."""

from __future__ import annotations

import gc
import threading

import pytest
import torch

import chainrule
from chainrule.execute import engine, planning
from chainrule.plan.planner import plan

TRANSFORMS = ["jacrev", "jacfwd", "jacobian", "hessian"]


def branching(x: torch.Tensor) -> torch.Tensor:
    total = torch.zeros_like(x)
    for k in range(3):
        total = total + x ** (k + 1)
    if total.sum() > 0:
        total = total * 2
    print("inside", x.shape, float(x[0]))
    return total * x.detach().max().item() + torch.from_numpy(x.detach().numpy() * 0)


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_branches_loops_and_values(name: str, sign: float, capsys: pytest.CaptureFixture[str]) -> None:
    x = sign * torch.tensor([0.5, 1.0, 1.5], dtype=torch.float64)
    factor = (2.0 if sign > 0 else 1.0) * x.max().item()
    found = getattr(chainrule, name)(branching)(x)
    first = torch.diag(factor * (1 + 2 * x + 3 * x**2))
    second = torch.zeros(3, 3, 3, dtype=torch.float64)
    second[range(3), range(3), range(3)] = factor * (2 + 6 * x)
    torch.testing.assert_close(found, second if name == "hessian" else first)
    assert "inside" in capsys.readouterr().out


def test_vmap_says_what_to_do_instead_of_branching() -> None:
    with pytest.raises(RuntimeError, match="vmap") as caught:
        chainrule.vmap(lambda x: x if x.sum() > 0 else -x)(torch.ones(2, 3))
    assert "where" in str(caught.value)


def test_an_exception_leaves_nothing_behind() -> None:
    def failing(x: torch.Tensor) -> torch.Tensor:
        chainrule.grad(lambda y: (y**2).sum())(x)
        raise KeyError("own")

    for transform in (chainrule.jacrev, chainrule.hessian, chainrule.vmap):
        with pytest.raises(KeyError):
            transform(failing)(torch.ones(2, 2))
        assert torch._C._len_torch_dispatch_stack() == 0
        assert torch.is_grad_enabled()
    weight = torch.ones(2, requires_grad=True)
    assert (weight * 2).requires_grad


def tensors() -> int:
    gc.collect()
    return sum(type(item) in (torch.Tensor, torch.nn.Parameter) for item in gc.get_objects())


def repeat(times: int) -> None:
    x = torch.randn(5)
    weight = torch.randn(5, 5)
    calls = [
        lambda: chainrule.jacobian(lambda a: torch.tanh(weight @ a))(x),
        lambda: chainrule.grad(lambda a: torch.logsumexp(weight @ a, 0))(x),
        lambda: chainrule.vmap(chainrule.grad(lambda a: (a**3).sum()))(weight),
        lambda: chainrule.hvp(lambda a: (a**4).sum(), (x,), (x,)),
    ]
    for call in calls:
        call()
        call()
    before = tensors()
    for number in range(times):
        calls[number % len(calls)]()
    assert tensors() <= before


def test_no_growth_over_calls() -> None:
    repeat(200)


@pytest.mark.slow
def test_no_growth_over_many_calls() -> None:
    repeat(10_000)


CALLS = {
    "grad": lambda f, x: chainrule.grad(lambda a: f(a).sum())(x),
    "vjp": lambda f, x: chainrule.vjp(f, x)[1](x)[0],
    "jvp": lambda f, x: chainrule.jvp(f, (x,), (x,))[1],
    "linearize": lambda f, x: chainrule.linearize(f, x)[1](x),
    "hvp": lambda f, x: chainrule.hvp(lambda a: f(a).sum(), (x,), (x,)),
    "vhp": lambda f, x: chainrule.vhp(lambda a: f(a).sum(), (x,), (x,)),
    "vmap of jacrev": lambda f, x: chainrule.vmap(chainrule.jacrev(f))(x.expand(2, -1)),
    **{name: lambda f, x, name=name: getattr(chainrule, name)(f)(x) for name in TRANSFORMS},
    **{f"{name} in chunks": lambda f, x, name=name: getattr(chainrule, name)(f, chunk_size=2)(x) for name in TRANSFORMS},
}


@pytest.mark.parametrize("name", CALLS)
def test_a_second_call_does_not_plan_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    planned: list[int] = []
    engine.CACHE.clear()  # routes that functions share hold this cache
    monkeypatch.setattr(planning, "plan", lambda *args, **kwargs: planned.append(1) or plan(*args, **kwargs))
    counts = []
    for _ in range(3):
        CALLS[name](lambda a: torch.sin(a) * a.sum(), torch.randn(5, dtype=torch.float64))
        counts.append(len(planned))
    assert counts[0] > 0
    assert counts == counts[:1] * 3


def test_the_cache_stays_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    engine.CACHE.clear()
    monkeypatch.setattr(engine.CACHE, "limit", 8)
    for size in range(1, 25):
        x = torch.randn(size, dtype=torch.float64)
        torch.testing.assert_close(chainrule.jacobian(torch.sin)(x), torch.diag(x.cos()))
        assert len(engine.CACHE) <= 8


def test_threads() -> None:
    failures: list[str] = []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for number in range(25):
            size = 3 + (seed + number) % 4
            x = torch.randn(size, dtype=torch.float64, generator=generator)
            found = chainrule.jacobian(lambda a: torch.sin(a) * a.sum())(x)
            wanted = torch.diag(x.cos() * x.sum()) + x.sin()[:, None]
            rows = chainrule.vmap(chainrule.grad(lambda a: (a**2).sum()))(x[:, None])
            if not (torch.allclose(found, wanted) and torch.allclose(rows[:, 0], 2 * x)):
                failures.append(f"{seed} {number}")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
