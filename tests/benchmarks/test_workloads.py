"""Every expression of every workload computes the same thing."""

import pytest
import torch

import chainrule
from benchmarks import section_a, section_b, section_c
from benchmarks.__main__ import SECTIONS
from benchmarks.measure import check_agreement
from benchmarks.scientific import Adjustment, brusselator, brusselator_state, hand_brusselator, rolled
from benchmarks.section_c_implicit import CORRECTION, STEP, Brusselator, implicit_step
from benchmarks.section_c_sparse import Coloured
from benchmarks.workload import Workload

#: Rows whose peers take many seconds or gigabytes in float64.
LARGE = {"A4", "A6", "A9"}

WORKLOADS = [workload for section in SECTIONS for workload in section.WORKLOADS]

CHECKED = [
    *(pytest.param(w, id=w.key, marks=[pytest.mark.slow] if w.key in LARGE else []) for w in section_a.WORKLOADS),
    *(pytest.param(w, id=f"{w.key}-small") for w in (*section_b.SMALL, *section_c.SMALL)),
    *(pytest.param(w, id=w.key, marks=[pytest.mark.slow]) for w in section_b.WORKLOADS),
]


# torch.func.linearize folds constants of a graph, which warns of an attribute that torch itself leaves out.
@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning")
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")
@pytest.mark.parametrize("workload", CHECKED)
def test_expressions_agree(workload: Workload) -> None:
    check_agreement(workload, "cpu")


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning")
@pytest.mark.parametrize("workload", [pytest.param(w, id=f"{w.key}-small") for w in section_b.SMALL if w.jax is not None])
def test_expressions_in_jax_agree(workload: Workload) -> None:
    jax = pytest.importorskip("jax")
    jax.config.update("jax_enable_x64", True)
    check_agreement(workload, "cpu", jax)


@pytest.mark.parametrize("workload", [pytest.param(w, id=w.key) for w in WORKLOADS])
def test_inputs_are_reproducible(workload: Workload) -> None:
    first, second = (workload.tensors(torch.float64, "cpu") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_every_row_has_a_small_one() -> None:
    for section in (section_b, section_c):
        assert [w.key for w in section.SMALL] == [w.key for w in section.WORKLOADS]


def test_bundle_adjustment() -> None:
    problem = Adjustment(3, 10, 25)
    x = problem.start()
    expected = torch.func.jacrev(problem.residuals)(x)
    found = chainrule.jacobian(problem.residuals, layout="sparse_coo")(x)
    torch.testing.assert_close(found.to_dense(), expected, rtol=1e-9, atol=1e-9)
    # Two rows of 15 places (but for the two principal points of the other row) and one of one, per observation.
    assert found._nnz() == 25 * (2 * 14 + 1)
    # What the pattern leaves out is zero whatever the values are, and nothing else: per observation, of 31 places, these two.
    pattern = torch.sparse_coo_tensor(found.indices(), torch.ones(found._nnz()), found.shape, check_invariants=True).to_dense() != 0
    seen = torch.zeros(pattern.shape, dtype=torch.bool)
    for _ in range(5):
        at = problem.start() + 0.1 * torch.randn(x.shape, dtype=x.dtype)
        dense = torch.func.jacrev(problem.residuals)(at)
        assert not bool(dense[~pattern].any())
        seen |= dense != 0
    assert torch.equal(seen, pattern)
    for observation, camera in enumerate(problem.camera.tolist()):
        block = pattern[2 * observation : 2 * observation + 2, 11 * camera : 11 * camera + 11]
        assert (~block).nonzero().tolist() == [[0, 8], [1, 7]]


def test_an_implicit_step_solves_its_equation() -> None:
    problem = Brusselator(6)
    start = brusselator_state(6).reshape(-1).numpy()
    found, iterations = implicit_step(problem.exact, start)
    residual = found - start - STEP * problem.value(found)
    # The last correction was CORRECTION of the solution at most; the matrix that it is multiplied by is I - STEP J.
    scale = 1 + STEP * abs(problem.exact(found)[1]).sum(1).max()
    assert abs(residual).max() <= CORRECTION * scale * abs(found).max()
    assert 1 < iterations < 10


def test_the_colouring_by_hand_gives_the_dense_jacobian() -> None:
    state = brusselator_state(6)
    rhs = brusselator(rolled)
    found = Coloured(rhs, hand_brusselator(state))
    assert found.seeds.shape[0] < state.numel()
    dense = torch.func.jacfwd(rhs)(state).reshape(state.numel(), -1)
    torch.testing.assert_close(found(state).to_dense(), dense, rtol=1e-12, atol=1e-12)


def test_keys_are_unique() -> None:
    keys = [workload.key for workload in WORKLOADS]
    assert len(set(keys)) == len(keys)
