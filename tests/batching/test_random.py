"""Random ops under the three settings of `randomness`: the draws are those of torch.vmap."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from chainrule.transforms.vmap import vmap

DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "rand": lambda x: x + torch.rand(3),
    "randn": lambda x: x + torch.randn(3),
    "randint": lambda x: x + torch.randint(0, 9, (3,)),
    "randn_like": torch.randn_like,
    "rand_like_constant": lambda x: torch.rand_like(torch.ones(2)),
    "normal_": lambda x: x.clone().normal_(),
    "dropout": lambda x: F.dropout(x, 0.5),
    "normal": lambda x: torch.normal(torch.zeros(3), torch.ones(3)),
}
DIFFERENT_ONLY: dict[str, Callable[[Tensor], Tensor]] = {
    "bernoulli": lambda x: torch.bernoulli(x.sigmoid()),
    "multinomial": lambda x: torch.multinomial(x.abs(), 2),
}


def seeded(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    torch.manual_seed(7)
    return function(x)


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("randomness", ["same", "different"])
def test_draws(name: str, randomness: str) -> None:
    x = torch.ones(4, 3)
    ours = seeded(vmap(DRAWS[name], randomness=randomness), x)
    assert (ours == ours[0]).all() == (randomness == "same")
    if name != "normal":
        assert torch.equal(ours, seeded(torch.vmap(DRAWS[name], randomness=randomness), x))


@pytest.mark.parametrize("name", DIFFERENT_ONLY)
def test_draws_from_mapped_parameters(name: str) -> None:
    x = torch.ones(40, 3)
    result = vmap(DIFFERENT_ONLY[name], randomness="different")(x)
    assert not (result == result[0]).all()
    with pytest.raises(RuntimeError, match="same numbers"):
        vmap(DIFFERENT_ONLY[name], randomness="same")(x)


@pytest.mark.parametrize("name", [*DRAWS, *DIFFERENT_ONLY])
def test_error_is_the_default(name: str) -> None:
    with pytest.raises(RuntimeError, match="randomness"):
        vmap({**DRAWS, **DIFFERENT_ONLY}[name])(torch.ones(4, 3))


def test_what_draws_nothing_is_allowed() -> None:
    x = torch.ones(4, 2, 3)
    assert torch.equal(vmap(lambda s: F.dropout(s, training=False))(x), x)
    vmap(lambda s: F.scaled_dot_product_attention(s, s, s))(x)


def test_nested_levels_have_their_own_setting() -> None:
    x = torch.ones(3, 4)
    result = vmap(vmap(lambda s: s + torch.rand(()), randomness="same"), randomness="different")(x)
    assert (result == result[:, :1]).all()
    assert not (result == result[:1]).all()


def test_chunks_share_their_draws_when_same() -> None:
    result = vmap(lambda s: s + torch.rand(3), randomness="same", chunk_size=2)(torch.zeros(5, 3))
    assert (result == result[0]).all()
