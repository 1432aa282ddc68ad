"""Programs that are recorded on tensors without memory are those that a run would have recorded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import chainrule
from chainrule.capture.tape import Tape
from chainrule.execute import engine, planning
from chainrule.execute.engine import CACHE
from chainrule.execute.planning import frugal
from chainrule.execute.workspace import observe
from chainrule.maps.dry_run import DryRun, NotDryError, dry, is_complete, shadow
from chainrule.maps.first_run import first_run
from chainrule.maps.staging import Ref

WEIGHT = torch.linspace(-1, 1, 36, dtype=torch.float64).reshape(6, 6).sin()
KERNEL = torch.linspace(-1, 1, 27, dtype=torch.float64).reshape(1, 3, 3, 3).cos()

FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "product": (lambda x: x.prod(0) * x, (6,)),
    "cumprod": (lambda x: x.cumprod(0), (70,)),
    "logcumsumexp": (lambda x: torch.logcumsumexp(x, 0), (70,)),
    "attention": (lambda x: torch.softmax(x @ WEIGHT @ x.T, -1) @ x, (5, 6)),
    "convolution": (lambda x: torch.nn.functional.conv2d(x, KERNEL).tanh(), (2, 3, 5, 4)),
    "distances": (lambda x: torch.cdist(x, WEIGHT), (4, 6)),
    "sort": (lambda x: x.sort(0)[0].square(), (5, 3)),
    "spectrum": (lambda x: torch.fft.rfft(x).abs(), (9,)),
    "loop": (lambda x: torch.stack([x[i] * x[i - 1] for i in range(6)]), (6,)),
    "inverse": (lambda x: torch.linalg.inv(x @ x.T + WEIGHT.T @ WEIGHT), (6, 4)),
    "empty": (lambda x: x[:0].sin(), (3,)),
    "scalar": (lambda x: x.exp() * x, ()),
    "transposed": (lambda x: (x.T.reshape(-1) * x.T.reshape(-1).flip(0)).tanh(), (3, 4)),
}

#: torch.func's derivative of ``cdist`` is wrong.
FORMULAS = {"distances": lambda x: (x.unsqueeze(1) - WEIGHT).square().sum(-1).sqrt()}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_plans_made_without_a_run_are_right_in_every_call(name: str) -> None:
    function, shape = FUNCTIONS[name]
    for transform, oracle in ((chainrule.jacobian, torch.func.jacrev), (chainrule.jacrev, torch.func.jacrev)):
        CACHE.clear()
        for number in range(4):
            x = torch.rand(shape, dtype=torch.float64) + 0.5
            x = x if number < 2 or x.dim() < 2 else x.transpose(0, -1).contiguous().transpose(0, -1)
            with frugal():
                found = transform(function)(x)
            torch.testing.assert_close(found, oracle(FORMULAS.get(name, function))(x))


@pytest.mark.parametrize("name", ["cumprod", "attention", "convolution", "sort", "inverse", "transposed"])
def test_the_program_is_the_one_of_a_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function, shape = FUNCTIONS[name]
    x = torch.rand(shape, dtype=torch.float64) + 0.5
    programs = []
    planned = planning.plan_of

    def seen(*args: object, **kwargs: object) -> object:
        found = planned(*args, **kwargs)  # type: ignore[arg-type]
        programs.append([str(i.function) for i in found.program.instructions])
        kinds.append(list(found.program.kinds.values()))
        return found

    kinds: list[object] = []
    for module in (engine, planning):
        monkeypatch.setattr(module, "plan_of", seen)
    CACHE.clear()
    chainrule.jacobian(function)(x)
    CACHE.clear()
    with frugal():
        chainrule.jacobian(function)(x)
    assert len(programs) == 2 and programs[0] == programs[1]
    assert kinds[0] == kinds[1]  # the true device among them


def test_nothing_is_run_and_no_memory_taken() -> None:
    x = torch.rand(300, 300)

    def record() -> DryRun:
        with dry():
            program = first_run()
        value = program.input(0, x)
        for _ in range(5):
            value = torch.tanh(value @ value) + torch.ones(300, device=value.device)
        assert value.device == x.device and value.shape == x.shape
        assert isinstance(program, DryRun)
        return program

    program, space = observe(record)
    assert space.work + space.results < x.nbytes
    assert is_complete(program)


def test_what_needs_values_is_refused() -> None:
    program = DryRun()
    value = program.input(0, torch.ones(3))
    with pytest.raises(NotDryError, match="values"):
        program.constant(value.value * 2)
    with pytest.raises(NotDryError, match="user"):
        program.call(Tape.forget.__get__(object()), value)
    with pytest.raises(NotDryError, match="plain"):
        shadow(torch.ones(2, 2).to_sparse())
    program.instructions.append(program.call(torch.sin, value).program.instructions[0]._replace(args=(value.value, Ref(0))))
    assert not is_complete(program)


class _Counted(torch.autograd.Function):
    calls = 0

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * x

    @staticmethod
    def setup_context(ctx: object, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)  # type: ignore[attr-defined]

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        assert not grad.is_meta
        _Counted.calls += 1
        return 2 * ctx.saved_tensors[0] * grad  # type: ignore[attr-defined]


def test_code_of_a_user_is_run_on_values_only() -> None:
    x = torch.rand(5, dtype=torch.float64)
    CACHE.clear()
    with frugal():
        found = chainrule.jacobian(lambda x: _Counted.apply(x).sin())(x)
    torch.testing.assert_close(found, torch.diag((x * x).cos() * 2 * x))


def test_gradients_flow_through_a_first_call_that_was_planned_without_a_run() -> None:
    x = (torch.rand(6, dtype=torch.float64) + 0.5).requires_grad_()
    for _ in range(2):
        CACHE.clear()
        with frugal():
            found = chainrule.jacobian(lambda x: x.cumprod(0).sin())(x)
        expected = torch.func.jacrev(lambda x: x.cumprod(0).sin())(x)
        for result in (found, expected):
            assert result.requires_grad
        (one,), (two,) = (torch.autograd.grad(result.square().sum(), x) for result in (found, expected))
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize(
    "function",
    [lambda x: x.cumprod(0), lambda x: torch.logcumsumexp(x, 0), lambda x: _rolled(x, 20), lambda x: x.sort()[0].square()],
)
def test_a_large_jacobian_holds_on_the_first_call_about_what_it_holds_later(function: Callable[[Tensor], Tensor]) -> None:
    x = torch.rand(500) + 0.5
    transform = chainrule.jacobian(function)
    CACHE.clear()
    peaks = []
    for _ in range(3):
        found, space = observe(lambda: transform(x))
        peaks.append(space.work + space.results)
        torch.testing.assert_close(found, torch.func.jacrev(function)(x), rtol=1e-4, atol=1e-4)
    # Masks and indices that the plan keeps are made in the first call.
    assert peaks[0] <= peaks[2] + 0.6 * x.numel() ** 2 * 4


@pytest.mark.parametrize(
    ("function", "size"),
    [(lambda x: x.prod(), 1000), (lambda x: x.cumprod(0).sum(), 300), (lambda x: x.sin().prod() * x.norm(), 800)],
)
def test_a_hessian_whose_record_would_be_long_is_not_recorded_as_a_whole(
    function: Callable[[Tensor], Tensor], size: int
) -> None:
    """The first call holds what the plan of its outer Jacobian predicts, not all that it computes on the way."""
    x = (torch.rand(size, dtype=torch.float64) * 0.2 + 0.9).requires_grad_()
    transform = chainrule.hessian(function)
    CACHE.clear()
    expected = torch.func.hessian(function)(x.detach())
    peaks = []
    for _ in range(4):
        found, space = observe(lambda: transform(x.detach()))
        peaks.append(space.work + space.results)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    # A record as a whole holds 5 to 20 times what later calls do.
    assert peaks[0] <= 2 * max(peaks[1:]), (peaks, expected.nbytes)


@pytest.mark.parametrize("transform", [chainrule.hessian, lambda f: chainrule.jacfwd(chainrule.jacrev(f))])
def test_nests_that_are_not_recorded_as_a_whole_are_right_in_every_call(
    transform: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chainrule.maps.first_run._LONG", 1)
    monkeypatch.setattr("chainrule.maps.first_run._TIMES", 0)
    weight = torch.rand(4, 3, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor) -> Tensor:
        return (x * weight).tanh().prod() + x.cumprod(0).sin().sum()

    CACHE.clear()
    ours = transform(function)
    for call in range(4):
        x = torch.rand(3, 4, dtype=torch.float64).T + 0.3 if call == 2 else torch.rand(4, 3, dtype=torch.float64) + 0.3
        x.requires_grad_(call % 2 == 1)
        found, expected = ours(x), torch.func.hessian(function)(x)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
        of = (weight, x) if x.requires_grad else (weight,)
        for one, two in zip(*(torch.autograd.grad(r.square().sum(), of) for r in (found, expected)), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-11)
        with torch.no_grad():
            assert not ours(x).requires_grad


def _rolled(x: Tensor, steps: int) -> Tensor:
    for _ in range(steps):
        x = torch.cat([x[1:], (x[0] * x[1]).sin()[None]])
    return x
