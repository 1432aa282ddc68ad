"""Many steps of stencils with ends: local Jacobians by rows."""

import pytest
import torch
from torch.nn import functional as F  # noqa: N812 - torch's own name

import chainrule
from chainrule.plan import sparse


def padded(u):
    return u + 0.1 * F.pad(u[2:] - 2 * u[1:-1] + u[:-2], (1, 1)) + 0.05 * u * u


def joined(u):
    zero = u.new_zeros(1)
    return u + 0.1 * torch.cat([u[1:] - u[:-1], zero]) - 0.1 * torch.cat([zero, u[1:] - u[:-1]]) + 0.05 * u * u


def written(u):
    v = u.clone()
    v[1:-1] = u[1:-1] + 0.1 * (u[2:] - 2 * u[1:-1] + u[:-2]) + 0.05 * u[1:-1] ** 2
    return v


def extended(u):
    v = torch.cat([u[:1], u, u[-1:]])
    return u + 0.1 * (v[2:] - 2 * u + v[:-2]) + 0.05 * u * u


def replicated(u):
    v = F.pad(u[None], (1, 1), mode="replicate")[0]
    return u + 0.1 * (v[2:] - 2 * u + v[:-2]) + 0.05 * u * u


def around(u):
    return u + 0.1 * (torch.cat([u[-1:], u[:-1]]) - 2 * u + torch.cat([u[1:], u[:1]])) + 0.05 * u * u


def walls(u):
    inner = u[1:-1, 1:-1]
    spread = u[2:, 1:-1] + u[:-2, 1:-1] + u[1:-1, 2:] + u[1:-1, :-2] - 4 * inner
    return u + F.pad(0.1 * spread + 0.05 * inner**2, (1, 1, 1, 1))


def moved(u):
    """Rows are read in any order, and twice."""
    return u + 0.3 * u[torch.arange(len(u)).flip(0)] * u + 0.1 * u[(torch.arange(len(u)) * 7) % len(u)]


STEPS = (padded, joined, written, extended, replicated, around, walls, moved)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("count", [3, 6, 11])
def test_many_steps_with_ends(step, count):
    """Three calls at other points; tolerance: a few ulps for each step."""

    def unrolled(u):
        for _ in range(count):
            u = step(u)
        return u

    jacobian = chainrule.jacobian(unrolled, layout="sparse_coo")
    shape = (7, 9) if step is walls else (23,)
    reached = None
    for seed in range(3):
        u = torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        wanted = torch.func.jacrev(unrolled)(u)
        found = jacobian(u)
        torch.testing.assert_close(found.to_dense(), wanted, rtol=1e-12, atol=1e-13)
        reached = wanted != 0 if reached is None else reached | (wanted != 0)
    assert found._nnz() == int(reached.sum())  # no entry but those that are there


def test_hessians_of_many_steps():
    def energy(u):
        for _ in range(5):
            u = padded(u)
        return (u**2).sum()

    hessian = chainrule.hessian(energy, layout="sparse_coo")
    for seed in range(3):
        u = torch.rand(19, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(hessian(u).to_dense(), torch.func.hessian(energy)(u), rtol=1e-11, atol=1e-12)


def test_ends_take_no_more_terms_than_the_middle(monkeypatch):
    """After some steps there is one term of all taps, beside one of what the ends add."""
    terms = []
    find = sparse.find_blocks
    monkeypatch.setattr(sparse, "find_blocks", lambda maps, w: terms.extend(len(m.terms) for m in maps.values()) or find(maps, w))

    def unrolled(u):
        for _ in range(8):
            u = extended(u)
        return u

    chainrule.jacobian(unrolled, layout="sparse_coo")(torch.rand(61, dtype=torch.float64))
    assert max(terms) <= 6
