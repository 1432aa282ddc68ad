"""The recorder: what can be run again on other values is told apart from what cannot."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch

import chainrule
from chainrule import CompileError
from chainrule.capture.recorder import Recorder
from chainrule.capture.tape import BelowAutograd
from chainrule.execute.replay import compile_program
from chainrule.maps.staging import Program, Staged

Tensor = torch.Tensor


def record(function: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> tuple[Recorder, Tensor]:
    def find(program: Program, tensor: Tensor) -> Staged | None:
        for number, given in enumerate((x, y)):
            if tensor is given:
                return program.input(number, tensor)
        return None

    recorder = Recorder(find)
    with BelowAutograd(), recorder:
        result = function(x, y)
    return recorder, result


def written(x: Tensor, y: Tensor) -> Tensor:
    z = torch.zeros(3)
    z += x
    z[0] = y[1]
    return z * y


def written_in_part(x: Tensor) -> Tensor:
    z = torch.zeros(3)
    z[0] = x[1]
    return z


PURE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "arithmetic": lambda x, y: x * y + x.sin() / y,
    "equal calls": lambda x, y: (x * y).sin() + (x * y).sin() * (x * y),
    "one minus a product": lambda x, y: 1 - x * y,
    "product and sum": lambda x, y: (x * y + x) - (y * y) + (x * y).sum(),
    "difference with itself": lambda x, y: (x * y) - (x * y),
    "integers beside numbers": lambda x, y: 1 - (x * y) * 2,
    "product with ones": lambda x, y: torch.ones(3) * x * torch.ones_like(y),
    "constants": lambda x, y: x * torch.arange(3) + torch.tensor([1, 2, 3]).float() * y,
    "views": lambda x, y: torch.outer(x, y).t().reshape(-1)[2:5],
    "several results": lambda x, y: torch.stack(torch.unbind(torch.outer(x, y)), 1).topk(1)[0],
    "the input itself": lambda x, y: x,
    "writes": written,
    "a written constant": lambda x, y: torch.arange(3).mul_(2) * x,
    "a constant, used and then written": lambda x, y: (lambda z: (z * x, z.add_(y), z)[0] * z)(torch.ones(3)),
    "a write to a part of a constant": lambda x, y: written_in_part(x) * x,
}


@pytest.mark.parametrize("name", PURE)
def test_a_pure_program_gives_the_same_on_other_values(name: str) -> None:
    function = PURE[name]
    x, y = torch.randn(3), torch.randn(3)
    if name == "constants":
        function(x, y)  # torch.tensor() makes a tensor that no op made
        recorder, _ = record(lambda x, y: x * torch.arange(3), x, y)
        assert recorder.pure
        return
    recorder, result = record(function, x, y)
    assert recorder.pure
    staged = recorder.staged(result)
    assert staged is not None
    run = compile_program(recorder.program, [staged])
    for _ in range(3):
        values = torch.randn(3), torch.randn(3)
        copies = [value.clone() for value in values]
        (found,) = run(values, ())
        torch.testing.assert_close(found, function(*copies))
        found.zero_()
        assert all(torch.equal(value, copy) for value, copy in zip(values, copies, strict=True))


UNKNOWN = torch.randn(3)

IMPURE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a value read": lambda x, y: x * y.sum().item(),
    "a shape that depends on values": lambda x, y: x[y > 0],
    "a random draw": lambda x, y: x + torch.rand(3),
    "a tensor from elsewhere": lambda x, y: x * UNKNOWN,
}


@pytest.mark.parametrize("name", IMPURE)
def test_what_cannot_be_run_again_is_found(name: str) -> None:
    recorder, _ = record(IMPURE[name], torch.randn(3), torch.randn(3))
    assert not recorder.pure


def test_results_that_share_memory_are_copied() -> None:
    x, y = torch.randn(3), torch.randn(3)
    recorder, _ = record(lambda x, y: x * y, x, y)
    with BelowAutograd(), recorder:
        product = x * y
        view = product[1:]
    staged = [recorder.staged(product), recorder.staged(view), recorder.staged(x)]
    run = compile_program(recorder.program, staged)
    product, view, same = run((x, y), ())
    view.zero_()
    same.zero_()
    assert product.abs().min() > 0 and x.abs().min() > 0


def _caught(x: Tensor) -> Tensor:
    try:
        return torch.linalg.cholesky(torch.diag(x))
    except torch.linalg.LinAlgError:
        return torch.diag(x * 0)


def _seeded(x: Tensor) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return x + torch.randn(3, dtype=x.dtype)


def _own_generator(x: Tensor) -> Tensor:
    return x + torch.randn(3, dtype=x.dtype, generator=torch.Generator().manual_seed(0))


WEIGHT = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
BUFFER = torch.ones(3, dtype=torch.float64)

#: How values, shapes and memory leave torch where its dispatcher does not see it.
REFUSED: dict[str, Callable[[Tensor], object]] = {
    "tensor of tensors": lambda x: torch.tensor([x[0], x[1]]) * 2,
    "as_tensor of tensors": lambda x: torch.as_tensor([[x[0]], [x[1]]]) * 2,
    "asarray of tensors": lambda x: torch.asarray([x[0]]) * 2,
    "new_tensor of tensors": lambda x: x.new_tensor([x[0]]) * 2,
    "tensor_split at a tensor": lambda x: torch.tensor_split(x, (x > 0).sum().reshape(1)),
    "apply_": lambda x: x.clone().apply_(lambda value: value + 1),
    "map_": lambda x: x.clone().map_(x, lambda value, other: value + other),
    "deepcopy": lambda x: copy.deepcopy(x) * x,
    "deepcopy of a parameter": lambda x: copy.deepcopy(WEIGHT) * x,
    "a parameter of a result": lambda x: torch.nn.Parameter(x * 2) * 3,
    "values of a closed-over tensor": lambda x: x * BUFFER.tolist()[0],
    "an array of a closed-over tensor": lambda x: x * float(BUFFER.numpy()[0]),
    "another shape for an argument": lambda x: x.unsqueeze_(0) * 2,
    "another memory for an argument": lambda x: x.set_(torch.ones(3, dtype=x.dtype)) * 2,
    "other data for an argument": lambda x: setattr(x, "data", torch.ones(3, dtype=x.dtype)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_graph_does_not_see_is_refused_each_time(name: str) -> None:
    compiled = chainrule.compile(REFUSED[name])
    for _ in range(18):  # more often than a signature is recorded
        with pytest.raises(CompileError):
            compiled(torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("function", [_caught, _seeded, _own_generator])
def test_what_a_replay_would_get_wrong_runs_without_a_graph(function: Callable[[Tensor], Tensor]) -> None:
    compiled = chainrule.compile(function)
    for sign in (-1.0, 1.0, -1.0):
        x = torch.full((3,), sign, dtype=torch.float64)
        if sign > 0 and function is _caught:
            continue  # a graph of the other way would raise the error in a call with a negative number
        torch.testing.assert_close(compiled(x), function(x), rtol=0, atol=0)
    assert compiled.cache_info().eager >= 1
    if function is _caught:
        x = torch.ones(3, dtype=torch.float64)
        torch.testing.assert_close(compiled(x), function(x), rtol=0, atol=0)


def test_seeds_outside_are_those_of_closed_over_generators() -> None:
    generator = torch.Generator()
    compiled = chainrule.compile(lambda x: x + torch.randn(3, dtype=x.dtype, generator=generator))
    x = torch.zeros(3, dtype=torch.float64)
    found = []
    for _ in range(3):
        generator.manual_seed(5)
        found.append(compiled(x))
    assert compiled.cache_info().hits == 2
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_errors_are_not_counted_as_recordings() -> None:
    broken = True

    def function(x: Tensor) -> Tensor:
        if broken:
            raise ValueError("broken")
        return x * 2

    compiled = chainrule.compile(function)
    for _ in range(20):
        with pytest.raises(ValueError, match="broken"):
            compiled(torch.ones(3))
    broken = False
    for _ in range(3):
        assert torch.equal(compiled(torch.ones(3)), torch.full((3,), 2.0))
    assert compiled.cache_info().hits == 2


def _writes(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    total = b.sum()
    a.add_(1)
    return total + b.sum(), a * b


@pytest.mark.parametrize("backend", ["replay", "inductor"])
def test_writes_to_arguments_that_share_memory(backend: str) -> None:
    compiled = chainrule.compile(_writes, backend=backend)

    def pairs() -> list[tuple[Tensor, Tensor]]:
        whole = torch.arange(3.0)
        return [(whole, whole), (torch.arange(3.0), torch.ones(3)), (whole := torch.arange(3.0), whole)]

    for given, wanted in zip(pairs(), pairs(), strict=True):
        torch.testing.assert_close(compiled(*given), _writes(*wanted))
        torch.testing.assert_close(given, wanted)


@pytest.mark.parametrize("backend", ["replay", "inductor"])
def test_autocast_is_as_it_was_at_each_call(backend: str) -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", enabled=False):
            full = x @ x
        return full, x @ x

    compiled, x = chainrule.compile(function, backend=backend), torch.randn(4, 4)
    for kind in (torch.bfloat16, torch.bfloat16, torch.float16, torch.float16):
        with torch.autocast("cpu", dtype=kind):
            full, cast = compiled(x)
        assert full.dtype == torch.float32 and cast.dtype == kind
        torch.testing.assert_close(full, x @ x)


def test_a_write_through_views_is_a_graph_of_torch() -> None:
    def function(a: Tensor) -> tuple[Tensor, Tensor]:
        part = a[1:]
        part.mul_(3)
        flat = a.view(-1)
        flat[0] = 7
        return part, flat

    graph = chainrule.compile(function).graph(torch.arange(4.0))
    given = torch.arange(4.0)
    number = torch.tensor(7.0)
    part, flat = graph(given, *[number] * (len([n for n in graph.graph.nodes if n.op == "placeholder"]) - 1))
    assert torch.equal(flat, torch.tensor([7.0, 3.0, 6.0, 9.0])) and torch.equal(part, given[1:])


@pytest.mark.parametrize(("size", "strides", "offset", "pure"), [
    ((2, 3, 4), (8, 2, 1), None, True), ((2, 8, 1), (8, 1, 1), 0, True), ((1, 8, 2), (8, 1, 8), None, True), ((2, 3, 3), (8, 2, 1), 1, False),
    ((2, 2, 4), (8, 2, 1), None, False), ((3, 4), (2, 1), None, False), ((8, 2), (1, 8), None, False),
])  # fmt: skip
def test_views_by_strides_that_are_windows(size, strides, offset, pure):
    """They are recorded as windows, which any strides have; other views by strides are not replayed."""
    def function(x: Tensor, y: Tensor) -> Tensor:
        return (x * y).as_strided(size, strides, offset).sin()

    x, y = torch.randn(2, 8), torch.randn(2, 8)
    recorder, result = record(function, x, y)
    assert recorder.pure is pure
    torch.testing.assert_close(result, function(x, y))
    if pure:
        run = compile_program(recorder.program, [recorder.staged(result)])
        x, y = torch.randn(8, 2).t(), torch.randn(8, 2).t()
        torch.testing.assert_close(run((x, y), ())[0], function(x.contiguous(), y.contiguous()))


@pytest.mark.parametrize("size", [4, 40])
@pytest.mark.parametrize("kept", [True, False])
def test_views_by_strides_of_memory_of_the_program(size: int, kept: bool):
    """What the program lays out itself lies alike in each run, a small constant among it: writes to its diagonals are replayed."""
    def function(x: Tensor, y: Tensor) -> Tensor:
        made = torch.zeros(size, size) if kept else (x * y).new_zeros((size, size))
        made.as_strided((size,), (size + 1,), 0).copy_(x * y)
        made.as_strided((size - 1,), (size + 1,), 1).copy_(x[1:])
        return made

    x, y = torch.randn(size), torch.randn(size)
    recorder, result = record(function, x, y)
    assert recorder.pure
    run = compile_program(recorder.program, [recorder.staged(result)])
    found = []
    for _ in range(3):
        x, y = torch.randn(size, 2).unbind(1)
        found.append((run((x, y), ())[0], function(x, y)))
    for one, wanted in found:
        assert torch.equal(one, wanted)


@pytest.mark.parametrize("function", [
    lambda x, y: x.as_strided((2,), (1,), 1) * y[0], lambda x, y: torch.zeros_like(x).as_strided((2,), (1,), 1) + y[0],
    lambda x, y: torch.zeros(3)[1:].as_strided((2,), (1,), 0) + y[0], lambda x, y: torch.zeros(3).as_strided((2,), (1,)) + y[0],
])  # fmt: skip
def test_views_by_strides_of_other_memory_are_not_replayed(function):
    recorder, _ = record(function, torch.randn(3), torch.randn(3))
    assert not recorder.pure


def test_stacks_of_matrices_are_laid_out_for_the_library():
    """Where both strides of the matrices are other than one, torch would multiply them one by one."""
    def function(x: Tensor, y: Tensor) -> Tensor:
        return torch.bmm(x.permute(2, 0, 1), y.permute(2, 0, 1))

    x, y = torch.randn(8, 8, 5), torch.randn(8, 8, 5)
    recorder, result = record(function, x, y)
    calls = [instruction.function for instruction in recorder.program.instructions]
    assert calls.count(torch.clone) == 2
    run = compile_program(recorder.program, [recorder.staged(result)])
    torch.testing.assert_close(run((y, x), ())[0], function(y, x))
