"""Runs that look at values, recorded with what they saw."""

import pytest
import torch

from chainrule.capture.guarded import GuardedRecorder, OtherCourseError
from chainrule.execute.replay import compile_program


def _recorded(function, x):
    recorder = GuardedRecorder(lambda program, tensor: program.input(0, tensor) if tensor is x else None)
    with torch.no_grad(), recorder:
        out = function(x)
    return recorder, compile_program(recorder.program, [recorder.staged(out)])


def test_a_branch_is_compared():
    function = lambda x: x.sin() if bool((x > 0).any()) else x.cos()  # noqa: E731
    recorder, run = _recorded(function, torch.tensor([1.0, -1.0]))
    assert recorder.pure
    other = torch.tensor([-3.0, 2.0])
    assert torch.equal(run([other], ())[0], other.sin())
    with pytest.raises(OtherCourseError):
        run([-other.abs()], ())


def test_a_shape_is_compared():
    function = lambda x: torch.nonzero(x).sum(0) * x.sum()  # noqa: E731
    recorder, run = _recorded(function, torch.tensor([1.0, 0.0, 2.0]))
    assert recorder.pure
    other = torch.tensor([0.0, 4.0, 5.0])
    assert torch.equal(run([other], ())[0], function(other))
    with pytest.raises(OtherCourseError):
        run([torch.ones(3)], ())


def test_what_is_the_same_in_every_run_is_not_compared():
    seen = []

    def function(x):
        count = torch.arange(5)
        seen.append((recorder_of[0].is_same(count), recorder_of[0].is_same(x + 1)))
        return x * int(count.max())

    recorder_of = []
    x = torch.ones(2)
    recorder = GuardedRecorder(lambda program, tensor: program.input(0, tensor) if tensor is x else None)
    recorder_of.append(recorder)
    with torch.no_grad(), recorder:
        function(x)
    assert recorder.pure
    assert seen == [(True, False)]
    assert not any(instruction.keep for instruction in recorder.program.instructions)


def test_no_number_is_compared_with_another():
    recorder, _ = _recorded(lambda x: x * (float(x.sum()) > 0), torch.tensor([float("nan")]))
    assert not recorder.pure
