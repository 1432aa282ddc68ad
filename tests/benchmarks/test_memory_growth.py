"""C1 and C3 take memory in proportion to their non-zeros: by the plan's own account, and by the allocator's."""

import math
from collections.abc import Callable

import pytest
import torch

import chainrule
from benchmarks.measure import peak_memory
from benchmarks.scientific import brusselator, brusselator_state, rolled, rosenbrock, sliced
from chainrule.execute.memory import watching

Tensor = torch.Tensor

#: What a call may hold at once beside its result, in numbers per non-zero: the function's own values (some twenty arrays of the
#: input's size, with about six non-zeros to an element on the grid and three on the chain) and the parts of the result.
MOST = 10

EXPONENT = 1.1

CASES: dict[str, tuple[Callable[[], Callable[[Tensor], Tensor]], Callable[[int], Tensor]]] = {
    "C1": (
        lambda: chainrule.jacobian(brusselator(rolled), layout="sparse_csr"),
        lambda n: brusselator_state(round(math.sqrt(n / 2))),
    ),
    "C2": (
        lambda: chainrule.jacobian(brusselator(sliced), layout="sparse_csr"),
        lambda n: brusselator_state(round(math.sqrt(n / 2))),
    ),
    "C3": (lambda: chainrule.hessian(rosenbrock, layout="sparse_csr"), lambda n: torch.linspace(-1, 1, n, dtype=torch.float64)),
}

SIZES = (1000, 4000, 16_000)
LARGE = (1000, 10_000, 100_000, 1_000_000)


def exponent(sizes: list[int], values: list[int]) -> float:
    x, y = [math.log(n) for n in sizes], [math.log(v) for v in values]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def check(name: str, sizes: tuple[int, ...]) -> None:
    make, state = CASES[name]
    derivative = make()
    counts, planned, allocated = [], [], []
    for n in sizes:
        x = state(n)
        found = derivative(x)
        with watching() as watch:
            derivative(x)
        nonzeros = found.values().numel()
        peak = peak_memory(derivative, (x,), "cpu")
        for held in (watch.peak, peak):
            assert held <= (MOST + 1) * nonzeros * 8
        # The plan's account is that of the allocator, up to small tensors.
        assert abs(peak - watch.peak) <= 0.1 * peak + 4096
        # A dense temporary would be this large.
        assert max(watch.peak, peak) < x.numel() ** 2 * 8 / 2
        counts.append(nonzeros)
        planned.append(watch.peak)
        allocated.append(peak)
    assert exponent(counts, planned) <= EXPONENT
    assert exponent(counts, allocated) <= EXPONENT


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")
@pytest.mark.parametrize("name", CASES)
def test_memory_is_linear_in_the_non_zeros(name: str) -> None:
    check(name, SIZES)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")
@pytest.mark.parametrize("name", CASES)
def test_memory_is_linear_up_to_a_million_unknowns(name: str) -> None:
    check(name, LARGE)
