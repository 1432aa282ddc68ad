"""Linear maps of large functions: what is held for them is linear in their structure, and no dense matrix is made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import chainrule
from chainrule import LinearMap, linear_map
from chainrule.execute.memory import watching
from tests.transforms.map_kinds import KERNEL, WEIGHT, Cubed, matrix_of, randn
from tests.transforms.test_blocks import peak_bytes
from tests.transforms.test_linear_map import close, vector_in

LARGE = 4000


def large_kinds() -> dict[str, tuple[LinearMap, int]]:
    """Square maps of 4000×4000 (128 MB if dense), and what their structure needs at once, in numbers."""
    torch.manual_seed(0)
    x, n = randn(LARGE), LARGE
    tall, wide = randn(n, 3), randn(3, n)
    index = torch.randperm(n)
    source, target, weight = torch.randint(n, (3 * n,)), torch.randint(n, (3 * n,)), randn(3 * n)
    return {
        "graph": (linear_map(lambda x: torch.zeros_like(x).index_add(0, target, weight * (x[source] - x[target]).tanh()), x), 60 * n),
        "scatter": (linear_map(lambda x: torch.zeros_like(x).scatter_add(0, target, weight * x[source] ** 2), x), 60 * n),
        "element-wise": (linear_map(lambda x: torch.sin(x) * x, x), n),
        "stencil": (linear_map(lambda x: torch.roll(x, 1) * x - torch.roll(x, -1) ** 2, x), 8 * n),
        "gather": (linear_map(lambda x: torch.exp(x[index]), x), 4 * n),
        "upwind": (linear_map(lambda u: torch.where(u > 0, u - torch.roll(u, 1), torch.roll(u, -1) - u) * u, x), 12 * n),
        "low rank": (linear_map(lambda x: torch.tanh(tall @ torch.tanh(wide @ x)), x), 12 * n),
        "block-diagonal": (linear_map(lambda x: torch.tanh(x.reshape(-1, 4) @ WEIGHT[:4, :4]).reshape(-1, 4) @ WEIGHT[:4, :4], x.reshape(-1, 4)), 16 * n),
        "softmax": (linear_map(lambda x: torch.softmax(x.reshape(-1, 4), -1), x.reshape(-1, 4)), 16 * n),
        "convolution": (linear_map(lambda x: torch.nn.functional.conv1d(x, KERNEL[:1], padding=1), x.reshape(1, 1, -1)), 16 * n),
    }


ACTED_ON = 1000


def acted_on_kinds() -> dict[str, LinearMap]:
    """Square maps that are known by how they act, or have no factors smaller than a triangle of the matrix."""
    torch.manual_seed(0)
    x, n = torch.rand(ACTED_ON, dtype=torch.float64) + 0.5, ACTED_ON
    return {
        "cumulative sum": linear_map(lambda x: torch.cumsum(x, 0).sin(), x),
        "cumulative product": linear_map(lambda x: torch.cumprod(x, 0), x),
        "logcumsumexp": linear_map(lambda x: torch.logcumsumexp(x, 0), x),
        "Fourier transform": linear_map(lambda x: torch.fft.irfft(torch.fft.rfft(x) * torch.fft.rfft(x).abs(), n=n), x),
        "convolution 2-d": linear_map(
            lambda x: torch.nn.functional.conv2d(x.sin(), KERNEL[:1].reshape(1, 1, 1, 3), padding=(0, 1)), x.reshape(1, 1, -1, 10)
        ),
        "opaque": linear_map(lambda x: Cubed.apply(x.cos()), x),
    }


METHODS: dict[str, Callable[[LinearMap, Any, Any], Any]] = {
    "product": lambda J, v, u: J @ v,
    "transposed product": lambda J, v, u: J.T @ u,
    "diagonal": lambda J, v, u: J.diagonal(),
    "trace": lambda J, v, u: J.trace(),
    "norm": lambda J, v, u: J.norm(),
    "gram product": lambda J, v, u: J.gram() @ u,
    "normal product": lambda J, v, u: J.normal() @ v,
    "gram diagonal": lambda J, v, u: J.gram().diagonal(),
    "gram trace": lambda J, v, u: J.gram().trace(),
    "normal diagonal": lambda J, v, u: J.normal().diagonal(),
    "normal trace": lambda J, v, u: J.normal().trace(),
    "sum diagonal": lambda J, v, u: (J + 2 * J.T.T).diagonal(),
    "square trace": lambda J, v, u: (J @ J).trace(),
    "rows": lambda J, v, u: J.rows([5, 7]),
    "columns": lambda J, v, u: J.columns([5, 7]),
    "entries": lambda J, v, u: J[[5, 7], [5, 8]],
    "structure": lambda J, v, u: J.structure(),
}


@pytest.mark.parametrize("name", list(large_kinds()))
@pytest.mark.parametrize("method", METHODS)
def test_no_dense_matrix(name: str, method: str) -> None:
    """Neither by the plan's own account nor by the allocator's; what is allowed is linear in n, a hundredth of n²."""
    J, size = large_kinds()[name]
    (v, _), (u, _) = vector_in(J.in_space), vector_in(J.out_space)
    call = METHODS[method]
    allowed = 8 * 10 * size
    assert allowed < 8 * LARGE * LARGE / 6
    call(J, v, u)
    with watching() as watch:
        call(J, v, u)
    assert watch.peak <= allowed, f"{watch.peak} bytes planned"
    held = peak_bytes(lambda: call(J, v, u))
    assert held <= allowed + 8 * 64 * 64, f"{held} bytes allocated"


@pytest.mark.parametrize("name", list(acted_on_kinds()))
def test_what_has_no_small_factors_is_read_by_blocks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix of 8 MB: blocks of half a megabyte, and what is on the way to them, are all that is held."""
    block = 1 << 19
    monkeypatch.setattr("chainrule.transforms.map_blocks.BLOCK_BYTES", block)
    J = acted_on_kinds()[name]
    (v, _), (u, _) = vector_in(J.in_space), vector_in(J.out_space)
    full = J.dense(flat=True)
    products = {"gram": full @ full.T, "normal": full.T @ full, "square": full @ full, "sum": 3 * full, "": full}
    for method, call in METHODS.items():
        found = call(J, v, u)
        with watching() as watch:
            call(J, v, u)
        assert watch.peak <= 3 * block, f"{method}: {watch.peak} bytes planned"
        of, _, what = method.rpartition(" ")
        if what in ("diagonal", "trace"):
            expected = products[of].diagonal() if what == "diagonal" else products[of].trace()
            close(found.reshape(expected.shape), expected, ACTED_ON)
    close(J.norm(), full.norm(), ACTED_ON**2)
    assert peak_bytes(J.norm) <= 6 * block


@pytest.mark.parametrize("method", ["product", "diagonal", "trace"])
def test_no_dense_hessian(method: str) -> None:
    x = randn(LARGE)
    H = chainrule.hessian(lambda x: ((x[1:] - x[:-1] ** 2) ** 2).sum(), layout="operator")(x)
    METHODS[method](H, x, x)
    with watching() as watch:
        METHODS[method](H, x, x)
    assert watch.peak <= 8 * 40 * LARGE
    assert peak_bytes(lambda: METHODS[method](H, x, x)) <= 8 * 40 * LARGE


def test_gram_of_a_network_is_contracted() -> None:
    """The kernel of a wide layer: less is held than the Jacobian takes."""
    torch.manual_seed(0)
    inputs, w = randn(8, 400), randn(300, 400)
    J = linear_map(lambda w: torch.tanh(inputs @ w.T).sum(1), w)
    gram = J.gram().dense()
    expected = matrix_of(lambda w: torch.tanh(inputs @ w.T).sum(1), (w,))
    close(gram, expected @ expected.T, 120000)
    with watching() as watch:
        J.gram().dense()
    assert watch.peak < 8 * (8 * 300 * 400) / 4


def test_norm_of_a_large_dense_map_by_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chainrule.transforms.map_blocks.BLOCK_BYTES", 4096)
    torch.manual_seed(0)
    x, left, right = randn(60), randn(90, 80), randn(80, 60)
    function = lambda x: torch.tanh(left @ torch.tanh(right @ x))  # noqa: E731
    close(linear_map(function, x).norm(), torch.func.jacrev(function)(x).norm(), 5400)


def test_norms_are_planned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a norm is taken by blocks of rows, too, is found out once per signature."""
    monkeypatch.setattr("chainrule.transforms.map_blocks.BLOCK_BYTES", 4096)
    torch.manual_seed(0)
    left, right = randn(41, 40), randn(40, 42)
    function = lambda x: torch.tanh(left @ torch.tanh(right @ x))  # noqa: E731
    linear_map(function, randn(42)).norm()
    planned: list[int] = []
    for name in ("planning.plan_algebra", "prediction.predicted_peak"):
        monkeypatch.setattr(f"chainrule.execute.{name}", lambda *args: planned.append(1))
    x = randn(42)
    close(linear_map(function, x).norm(), torch.func.jacrev(function)(x).norm(), 41 * 42)
    assert not planned


@pytest.mark.parametrize(
    "read",
    [lambda H: H.norm(), lambda H: H.normal().diagonal(), lambda H: (H @ H).trace(), lambda H: (H + H.T).norm()],
    ids=["norm", "normal diagonal", "trace of the square", "norm of a sum"],
)
def test_an_energy_of_low_rank_and_a_stencil(read: Callable[[LinearMap], torch.Tensor]) -> None:
    """Whether its entries are few is found out without listing those of the part that is of low rank."""

    def energy(u: torch.Tensor) -> torch.Tensor:
        return (((0.1 * u).sum() * u.sin() + u.roll(1) ** 2) ** 2).sum() / 2

    x = randn(40)
    expected = read(linear_map(lambda v: torch.func.hessian(energy)(x) @ v, x))
    close(read(chainrule.hessian(energy, layout="operator")(x)), expected, 1600)
    for _ in range(3):
        x = randn(3000)
        assert peak_bytes(lambda x=x: read(chainrule.hessian(energy, layout="operator")(x))) < 8 * 3000 * 3000 / 4
