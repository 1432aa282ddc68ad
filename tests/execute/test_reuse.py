"""Plans that write over what nobody reads again: the same numbers, in less memory, and nothing of the caller's changed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

import chainrule
from chainrule.execute import engine
from chainrule.execute.cached_plans import CachedPlan
from chainrule.execute.memory import watching
from chainrule.execute.reuse import SMALLEST, written_over
from chainrule.maps.assembly import assembled
from tests.transforms.test_blocks import peak_bytes

tf = torch.func
Tensor = torch.Tensor

#: Rows of enough float64 numbers to be worth it.
N = 4 * SMALLEST // 8 // 64
TALL = torch.randn(400, 300)
X, W, V = (torch.randn(size, 64, dtype=torch.float64) for size in (N, 64, 64))
IMAGES, KERNEL = torch.randn(4, 3, 40, 40, dtype=torch.float64), torch.randn(8, 3, 3, 3, dtype=torch.float64)

CASES: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    "relu between products": (lambda x: (torch.relu(x @ W) @ V).sin().sum(), X),
    "a chain": (lambda x: (x.sin().exp() * x.cos()).square().add(1.0).sqrt().sum(), X),
    "a value read twice": (lambda x: ((y := torch.relu(x @ W)) * y.sin() + y).sum(), X),
    "products of transposes": (lambda x: (torch.relu(x.T.reshape(-1, 64)).sin() @ W).square().sum(), X),
    "pooled convolutions": (lambda k: F.max_pool2d(torch.relu(F.conv2d(IMAGES, k)), 2).square().sum(), KERNEL),
    "gathered": (lambda x: x.gather(0, torch.arange(N - 1, -1, -1).unsqueeze(1).expand(N, 64)).sin().sum(), X),
    "chosen": (lambda x: torch.where(x > 0, x.sin() * x, 0.0).square().sum() + torch.where(x < 1, x.cos(), x).square().sum(), X),
    "a part": (lambda x: torch.relu(x[: N // 2] * 2).sin().sum() + x[N // 2 :].square().sum(), X),
    "broadcast": (lambda x: (torch.relu(x).unsqueeze(0) * torch.ones(3, 1, 1, dtype=x.dtype)).sin().sum(), X),
}  # fmt: skip


def _plan() -> CachedPlan:
    (plan,) = (p for p in engine.CACHE._plans.values() if isinstance(p, CachedPlan))
    return plan


@pytest.mark.parametrize("name", CASES)
def test_same_numbers(name: str) -> None:
    function, x = CASES[name]
    before = x.clone()
    gradient = chainrule.grad(function)
    wanted = tf.grad(function)(x)
    engine.CACHE.clear()
    kept = [gradient(x) for _ in range(4)]
    for found in kept:
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)  # sums of some thousand float64 in another order
    assert torch.equal(x, before)
    assert len({found.data_ptr() for found in kept}) == len(kept)
    kept[0].zero_()
    torch.testing.assert_close(gradient(x), wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("layout", [lambda t: t, lambda t: t.T.contiguous().T, lambda t: torch.stack([t, t], 1)[:, 0]])
def test_other_layouts_than_the_planned_one(layout: Callable[[Tensor], Tensor]) -> None:
    """What was a copy when the plan was made may be a view of the caller's tensor later."""
    gradient = chainrule.grad(lambda x, y: (torch.relu(x.reshape(-1)) * y.reshape(-1)).sum(), (0, 1))
    engine.CACHE.clear()
    first, second = X.T.contiguous().T, X.sin()
    for _ in range(3):
        gradient(first, second)
    x, y = layout(X), layout(X.cos())
    kept = x.clone(), y.clone()
    for found, wanted in zip(gradient(x, y), tf.grad(lambda x, y: (torch.relu(x) * y).sum(), (0, 1))(x, y), strict=True):
        torch.testing.assert_close(found, wanted)
    assert torch.equal(x, kept[0]) and torch.equal(y, kept[1])


def test_something_is_written_over_and_predicted() -> None:
    wide = torch.randn(64, 512, dtype=torch.float64)
    engine.CACHE.clear()
    for _ in range(3):
        chainrule.grad(lambda x: (torch.relu(x @ wide) @ wide.T).sin().sum())(X)
    source = _plan().runner.source_of  # type: ignore[union-attr]
    assert any(written_over(i) is not None for i in source.plain)
    plain, kept = source.memory(), source.kept
    source.plain = kept
    assert plain.peak < source.memory().peak


def test_small_results_are_left_alone() -> None:
    engine.CACHE.clear()
    for _ in range(3):
        chainrule.grad(CASES["relu between products"][0])(X[:2])
    runner = _plan().runner
    assert runner is not None and runner.plain is runner  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", CASES)
def test_under_other_transforms(name: str) -> None:
    function, x = CASES[name]
    several = torch.stack([x, x.sin()])
    ours = chainrule.vmap(chainrule.grad(function))
    for _ in range(3):
        torch.testing.assert_close(ours(several), torch.stack([tf.grad(function)(t) for t in several]), rtol=1e-9, atol=1e-9)
    tangent = x.cos()
    product = chainrule.jvp(chainrule.grad(function), (x,), (tangent,))[1]
    wanted = tf.grad(lambda t: (tf.grad(function)(t) * tangent).sum())(x)
    torch.testing.assert_close(product, wanted, rtol=1e-9, atol=1e-9)
    compiled = chainrule.compile(chainrule.grad(function))
    for _ in range(2):
        torch.testing.assert_close(compiled(x), tf.grad(function)(x), rtol=1e-9, atol=1e-9)


def test_autograd_is_followed() -> None:
    function, x = CASES["relu between products"]
    engine.CACHE.clear()
    gradient = chainrule.grad(function)
    for _ in range(3):
        gradient(x)
    leaf = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(gradient(leaf).square().sum(), leaf)
    twin = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(function(twin), twin, create_graph=True)
    (wanted,) = torch.autograd.grad(first.square().sum(), twin)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_threads_do_not_share_memory() -> None:
    function, x = CASES["relu between products"]
    gradient = chainrule.grad(function)
    inputs = [x * (n + 1) for n in range(4)]
    wanted = [tf.grad(function)(t) for t in inputs]
    found: list[Tensor | None] = [None] * 4

    def work(number: int) -> None:
        for _ in range(5):
            found[number] = gradient(inputs[number])

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_watched_calls_write_over_too() -> None:
    function, x = CASES["a chain"]
    for _ in range(3):
        chainrule.grad(function)(x)
    with watching() as watch:
        chainrule.grad(function)(x)
    assert watch.peak > 0


def test_scattered_terms_are_added_where_they_stand() -> None:
    """The Jacobian's diagonal is added to the zeros that the rest was scattered into: nothing else of its size is held."""
    index = torch.randint(60, (50,))

    def function(x: Tensor) -> Tensor:
        return torch.outer(x[index].sin(), x)

    x = torch.randn(60, dtype=torch.float64)
    derivative = chainrule.jacobian(function)
    for _ in range(3):
        torch.testing.assert_close(derivative(x), torch.func.jacrev(function)(x))
    result = derivative(x)
    assert not result._is_view()
    assert peak_bytes(lambda: derivative(x)) < 1.3 * result.nbytes


@pytest.mark.parametrize(
    ("function", "sizes"),
    [
        (lambda x: x.cumsum(0), (300,)),
        (lambda x: x.sin().cumsum(0), (300,)),
        (lambda x: x.cumsum(0).exp(), (300,)),
        (lambda x: x.flip(0).cumsum(0), (300,)),
        (lambda x: x.sort().values.cumsum(0), (300,)),
        (lambda x: x.cumsum(1), (3, 90)),
        (lambda x: torch.stack([TALL @ x, TALL @ x.sin()]), (300,)),
    ],
)
def test_scans_triangles_and_stacks_hold_little_beside_the_result(function: Callable[[Tensor], Tensor], sizes: Any) -> None:
    """A triangle is cut out of ones, a running sum is made over its operand, and a product in its place of a stack."""
    transformed = chainrule.jacobian(function)
    for _ in range(3):
        x = torch.randn(sizes)
        expected = torch.autograd.functional.jacobian(function, x)
        torch.testing.assert_close(transformed(x), expected, rtol=1e-4, atol=1e-4)
    with watching() as watch:
        transformed(x)
    # A mask of a byte an element, where there is one.
    assert watch.peak <= 1.3 * expected.numel() * expected.element_size()


def _residual(x: torch.Tensor) -> torch.Tensor:
    for _ in range(5):
        x = x + 0.1 * torch.tanh(RESIDUAL @ x)
    return x


RESIDUAL = torch.randn(150, 150, dtype=torch.float64) / 12


def test_sums_wait_for_the_last_reader_of_what_they_are_written_over() -> None:
    """In ``J + d * (W J)`` the sum is computed after the product that reads J, too, so that three matrices are held and not four."""
    x = torch.randn(8, 150, dtype=torch.float64)
    engine.CACHE.clear()
    mapped = chainrule.vmap(chainrule.jacrev(_residual))
    for _ in range(4):
        found = mapped(x)
    torch.testing.assert_close(found, torch.func.vmap(torch.func.jacrev(_residual))(x))
    programs = [
        runner.source_of
        for plan in engine.CACHE._plans.values() if isinstance(plan, CachedPlan)
        for runner, _ in plan.batched.values() if runner is not None
    ]
    (source,) = programs
    sums = [i for i in source.plain if i.function is torch.addcmul and len(source.program.kinds[i.outputs[0]][0]) == 3]
    assert len(sums) >= 7  # two a step, but for the first
    assert all(written_over(i) is not None for i in sums)


def test_what_is_observed_is_what_is_run() -> None:
    """An assembly over its own operand allocates nothing; run without that, it would need the memory of a second result."""
    x = torch.randn(400)
    engine.CACHE.clear()
    function = chainrule.jacobian(lambda x: torch.softmax(x, 0).log())
    function(x)
    with watching() as watch:
        found = function(x)
    torch.testing.assert_close(found, torch.func.jacrev(lambda x: torch.softmax(x, 0).log())(x))
    assert watch.peak < 1.1 * found.nbytes
    source = _plan().runner.source_of  # type: ignore[union-attr]
    assert any(i.function is assembled for i in source.plain)
    assert sum(space.results for space in source.inside_plain.values()) < 1.1 * found.nbytes
    assert not source.inside
