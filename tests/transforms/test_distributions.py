"""``torch.distributions`` with their default validation, against torch.func and the closed form of a sample's derivative."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributions as D
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import transforms as T

import chainrule


@pytest.fixture(autouse=True)
def validated(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the default validation, which torch.compile turns off for the whole process once it is used."""
    monkeypatch.setattr(D.Distribution, "_validate_args", True)


def positive(x: Tensor) -> Tensor:
    return F.softplus(x) + 0.1


def unit(x: Tensor) -> Tensor:
    return 0.1 + 0.8 * torch.sigmoid(x)


def simplex(x: Tensor) -> Tensor:
    return torch.softmax(x, -1)


def scale(x: Tensor) -> Tensor:
    return (x.reshape(3, 3) * 0.3).tril(-1) + torch.diag(positive(x[:3]))


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda x: D.Normal(x, positive(x)).log_prob(x**2).sum(),
    "normal cdf": lambda x: D.Normal(x[0], positive(x[1])).cdf(x).sum(),
    "normal icdf": lambda x: D.Normal(x[0], positive(x[1])).icdf(unit(x)).sum(),
    "gamma": lambda x: D.Gamma(positive(x[0]), positive(x[1])).log_prob(positive(x)).sum(),
    "beta": lambda x: D.Beta(positive(x[0]), positive(x[1])).log_prob(unit(x)).sum(),
    "student": lambda x: D.StudentT(positive(x[0]) + 3, x[1], positive(x[2])).log_prob(x).sum(),
    "bernoulli": lambda x: D.Bernoulli(logits=x).log_prob((x > 0).to(x.dtype)).sum(),
    "binomial": lambda x: D.Binomial(5, logits=x).log_prob(torch.tensor(2.0, dtype=x.dtype)).sum(),
    "poisson": lambda x: D.Poisson(positive(x)).log_prob(torch.tensor(3.0, dtype=x.dtype)).sum(),
    "categorical": lambda x: D.Categorical(logits=x).log_prob(torch.tensor(1)) + D.Categorical(simplex(x)).entropy(),
    "dirichlet": lambda x: D.Dirichlet(positive(x)).log_prob(simplex(2 * x)),
    "multivariate normal": lambda x: D.MultivariateNormal(x[:3], scale_tril=scale(x)).log_prob(x[3:6]),
    "mixture": lambda x: D.MixtureSameFamily(D.Categorical(logits=x[:3]), D.Normal(x[3:6], positive(x[6:]))).log_prob(x[4]),
    "independent": lambda x: D.Independent(D.Normal(x[:3], positive(x[3:6])), 1).log_prob(x[6:]),
    "transformed": lambda x: D.TransformedDistribution(D.Normal(x, positive(x)), [T.TanhTransform(), T.AffineTransform(1.0, 2.0)])
    .log_prob(1 + 1.8 * torch.tanh(x))
    .sum(),
    "stick-breaking": lambda x: T.StickBreakingTransform().log_abs_det_jacobian(x, T.StickBreakingTransform()(x)),
    "divergence of gammas": lambda x: D.kl_divergence(
        D.Gamma(positive(x[0]), positive(x[1])), D.Gamma(positive(x[2]), positive(x[3]))
    ),
    "divergence of categoricals": lambda x: D.kl_divergence(D.Categorical(logits=x), D.Categorical(logits=x.flip(0) + x**2)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_under_vmap(name: str) -> None:
    function = FUNCTIONS[name]
    transforms: list[Callable[[Any], Callable[[Tensor], Tensor]]] = [
        lambda m: function,
        lambda m: m.grad(function),
        lambda m: m.jacrev(m.grad(function)),
        lambda m: lambda row: m.grad(function)(row),
    ]
    for transform in transforms:
        for _ in range(4):
            x = torch.randn(3, 9, dtype=torch.float64)
            wanted = torch.stack([transform(torch.func)(row) for row in x])
            torch.testing.assert_close(chainrule.vmap(transform(chainrule))(x), wanted)
            torch.testing.assert_close(chainrule.vmap(chainrule.vmap(transform(chainrule)))(x[None]), wanted[None])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_alone(name: str) -> None:
    function = FUNCTIONS[name]
    for _ in range(4):
        x, v = torch.randn(2, 9, dtype=torch.float64)
        torch.testing.assert_close(chainrule.grad(function)(x), torch.func.grad(function)(x))
        torch.testing.assert_close(chainrule.jacfwd(function)(x), torch.func.grad(function)(x))
        torch.testing.assert_close(chainrule.jvp(function, (x,), (v,))[1], torch.func.grad(function)(x) @ v)
        torch.testing.assert_close(chainrule.hessian(function)(x), torch.func.jacrev(torch.func.jacrev(function))(x))


def test_one_invalid_sample_raises_the_error_of_the_distribution() -> None:
    for transform in (lambda f: f, chainrule.grad):
        mapped = chainrule.vmap(transform(lambda x: D.Normal(x, x).log_prob(x)))
        for _ in range(4):
            mapped(torch.rand(4) + 0.5)
        with pytest.raises(ValueError, match="Expected parameter scale"):
            mapped(torch.tensor([1.0, 2.0, -1.0, 3.0]))
        mapped(torch.rand(4) + 0.5)


@pytest.mark.parametrize("ask", [torch._is_all_true, torch._is_any_true])
def test_one_answer_for_all_samples(ask: Callable[[Tensor], Tensor]) -> None:
    calls: list[Callable[[Any, Any, Tensor], Tensor]] = [
        lambda m, f, x: m.vmap(f)(x),
        lambda m, f, x: m.vmap(m.vmap(f))(x),
        lambda m, f, x: m.vmap(m.vmap(m.grad(f)))(x),
        lambda m, f, x: m.vmap(m.jacrev(f))(x),
        lambda m, f, x: m.jacrev(m.vmap(f))(x),
    ]

    def chosen(x: Tensor) -> Tensor:
        return x.sin() if ask(x > 0) else x.cos()

    def given(x: Tensor) -> Any:
        return x * ask(x > 0)

    for signs in ([1.0, 1.0], [1.0, -1.0], [-1.0, -1.0], [1.0, 1.0], [-1.0, 1.0], [1.0, 1.0]):
        x = (torch.rand(2, 3, dtype=torch.float64) + 0.1) * torch.tensor(signs, dtype=torch.float64)[:, None]
        for function in (chosen, given):
            for call in calls:
                torch.testing.assert_close(call(chainrule, function, x), call(torch.func, function, x))


@pytest.mark.parametrize("transform", [chainrule.grad, chainrule.jacobian, chainrule.jacfwd])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_the_derivative_of_a_gamma_sample_is_that_of_what_was_drawn(shape: tuple[int, ...], transform: Any) -> None:
    for seed in range(4):
        x = torch.rand(shape, dtype=torch.float64) + 0.5
        torch.manual_seed(seed)
        wanted = torch._standard_gamma_grad(x, torch._standard_gamma(x))
        following = torch.rand(())
        torch.manual_seed(seed)
        torch.testing.assert_close(transform(lambda x: torch._standard_gamma(x).sum())(x), wanted)
        assert torch.equal(torch.rand(()), following)  # nothing else was drawn


SAMPLES: dict[str, Callable[[Tensor], Tensor]] = {
    "gamma": lambda x: D.Gamma(positive(x), positive(x)).rsample(),
    "student": lambda x: D.StudentT(positive(x)).rsample(),
    "dirichlet": lambda x: D.Dirichlet(positive(x)).rsample() ** 2,
    "normal": lambda x: D.Normal(x, positive(x)).rsample(),
    "of constants": lambda x: D.Normal(x, positive(x)).sample() * x,
    "torch.normal": lambda x: torch.normal(x, positive(x)) * x,
    "exponential": lambda x: x.clone().exponential_() * x,
}


@pytest.mark.parametrize("name", SAMPLES)
def test_samples(name: str) -> None:
    def total(x: Tensor) -> Tensor:
        return SAMPLES[name](x).sum()

    for seed in range(4):
        x = torch.randn(4, dtype=torch.float64, requires_grad=True)
        torch.manual_seed(seed)
        (wanted,) = torch.autograd.grad(total(x), x)
        following = torch.rand(())
        for transform in (chainrule.grad, chainrule.jacobian):
            torch.manual_seed(seed)
            torch.testing.assert_close(transform(total)(x.detach()), wanted)
            assert torch.equal(torch.rand(()), following)


def test_gamma_samples_under_vmap() -> None:
    def total(x: Tensor) -> Tensor:
        return SAMPLES["gamma"](x).sum()

    for seed in range(4):
        x = torch.randn(3, 4, dtype=torch.float64)
        found = []
        for library in (chainrule, torch.func):
            torch.manual_seed(seed)
            found.append(library.vmap(library.grad(total), randomness="different")(x))
        torch.testing.assert_close(*found)


def test_compile_says_how_to_leave_the_validation_out() -> None:
    with pytest.raises(chainrule.CompileError, match="validate_args=False"):
        chainrule.compile(chainrule.grad(lambda x: D.Normal(x, 1.0).log_prob(x**2).sum()))(torch.randn(3))
    compiled = chainrule.compile(chainrule.grad(lambda x: D.Normal(x, 1.0, validate_args=False).log_prob(x**2).sum()))
    for _ in range(3):
        x = torch.randn(3, dtype=torch.float64)
        expected = torch.func.grad(lambda x: D.Normal(x, 1.0, validate_args=False).log_prob(x**2).sum())(x)
        torch.testing.assert_close(compiled(x), expected)
