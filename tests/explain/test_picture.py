"""The picture of an explanation: what is in it, as SVG, as files, in a notebook."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import chainrule
from chainrule.explain import picture

pytest.importorskip("matplotlib")
Tensor = torch.Tensor


def network(*sizes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(before, after), nn.Tanh()]
    return nn.Sequential(*layers).requires_grad_(False)


def shown(explanation: chainrule.Explanation, number: int = -1) -> list[str]:
    """The texts of the picture."""
    figure = picture.draw(explanation.accounts[number])
    return [text.get_text() for axes in figure.axes for text in axes.texts] + [axes.get_title(loc="left") for axes in figure.axes]


def test_boxes_carry_ops_sizes_and_the_order_of_elimination() -> None:
    found = chainrule.explain(chainrule.jacrev(network(12, 48, 7)))(torch.randn(12))
    texts = shown(found)
    for part in ("input\n12", "linear\n48", "tanh\n48", "linear\n7", "tanh\n7", "576\nof 576", "48\nof 2.3k"):
        assert part in texts
    order = {text: texts[texts.index(box) + 1] for text, box in (("tanh", "tanh\n48"), ("linear", "linear\n48"), ("last", "linear\n7"))}
    assert order == {"last": "1", "tanh": "2", "linear": "3"}
    forward = chainrule.explain(chainrule.jacfwd(network(12, 48, 7)))(torch.randn(12))
    texts = shown(forward)
    assert texts[texts.index("linear\n48") + 1] == "1"


def test_graph_of_an_account() -> None:
    account = chainrule.explain(chainrule.jacobian(lambda x: torch.sin(x) * x.sum()))(torch.randn(5)).accounts[0]
    roles = [vertex["role"] for vertex in account.vertices]
    assert roles.count("input") == 1 and roles.count("output") == 1 and len(roles) == 4
    edges = {(edge["source"], edge["target"]): edge for edge in account.edges}
    assert len(edges) == 4
    assert {(edge["stored"], edge["dense"]) for edge in account.edges} >= {(5, 25), (0, 5)}
    inner = {vertex["slot"] for vertex in account.vertices if vertex["role"] == "inner"}
    assert not account.eliminated or set(account.eliminated) == inner
    assert account.steps and all(step["flops"] >= 0 and step["bytes"] >= 0 for step in account.steps)
    assert sum(s["flops"] for s in account.steps) == next(
        a["flops"] for a in account.alternatives if a["order"] == account.chosen
    )


def test_memory_of_an_account() -> None:
    account = chainrule.explain(chainrule.jacobian(network(12, 48, 7)))(torch.randn(12)).accounts[0]
    assert account.memory["results"] == 4 * 7 * 12
    assert account.memory["recorded"] == 4 * (48 + 48 + 7 + 7)
    assert account.memory["peak"] == sum(account.memory[k] for k in ("recorded", "temporaries", "results"))
    assert "at the peak" in str(chainrule.explain(chainrule.jacobian(torch.sin))(torch.randn(3)))


LSTM = nn.LSTM(5, 7).requires_grad_(False)
CASES: dict[str, tuple[Callable[..., Any], Tensor]] = {
    "mlp": (chainrule.jacobian(network(4, 8, 3)), torch.randn(4)),
    "hessian": (chainrule.hessian(lambda x: torch.tanh(x).prod()), torch.randn(4)),
    "laplacian": (chainrule.laplacian(lambda x: torch.tanh(x).prod()), torch.randn(4)),
    "divergence": (chainrule.divergence(network(4, 8, 4)), torch.randn(4)),
    "ntk": (chainrule.ntk(lambda x: torch.outer(x, x)), torch.randn(4)),
    "lstm": (chainrule.jacobian(lambda x: LSTM(x)[0]), torch.randn(6, 1, 5)),
    "convolution": (chainrule.jacobian(nn.Conv2d(1, 2, 3)), torch.randn(1, 1, 5, 5)),
    "opaque": (chainrule.jacobian(lambda x: torch.linalg.householder_product(x, x[0])), torch.randn(4, 3)),
    "scalar": (chainrule.grad(torch.sin), torch.randn(())),
    "empty": (chainrule.jacobian(torch.sin), torch.randn(0)),
    "identity": (chainrule.jacobian(lambda x: x), torch.randn(3)),
    "constant": (chainrule.jacobian(lambda x: torch.ones(3) + 0 * x.detach()), torch.randn(3)),
    "many ops": (chainrule.jacobian(network(*[3] * 120)), torch.randn(3)),
    "many inputs": (chainrule.jacobian(lambda x: torch.stack([torch.sin(part) for part in x.unbind()])), torch.randn(70)),
    "text to escape": (chainrule.vmap(chainrule.jacobian(torch.sin)), torch.randn(2, 3)),
}


@pytest.mark.parametrize("name", CASES)
def test_every_picture_is_well_formed(name: str, tmp_path: Path) -> None:
    function, x = CASES[name]
    found = chainrule.explain(function)(x)
    html = found._repr_html_()
    if not found.accounts:
        assert "nothing was differentiated" in html
        return
    root = ET.fromstring(found.svg())
    assert root.tag.endswith("svg")
    assert html.count("<svg") == len(found.accounts)
    assert "&lt;" not in found.svg()[:200]
    for ending, start in ((".svg", b"<?xml"), (".png", b"\x89PNG"), (".pdf", b"%PDF")):
        path = tmp_path / f"picture{ending}"
        found.save(path)
        assert path.read_bytes().startswith(start)


def test_large_graphs_are_folded() -> None:
    found = chainrule.explain(CASES["many ops"][0])(CASES["many ops"][1])
    assert len(found.accounts[0].vertices) > 200
    boxes, edges = picture._boxes(found.accounts[0])
    assert len(boxes) <= picture._BOXES + 1 and len(edges) >= len(boxes) - 1
    assert any("ops:" in box.title for box in boxes)
    assert sum(len(box.slots) for box in boxes) == len(found.accounts[0].vertices)


def test_pictures_are_deterministic() -> None:
    function, x = CASES["mlp"]
    assert chainrule.explain(function)(x).svg() == chainrule.explain(function)(x).svg()


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    found = chainrule.explain(chainrule.jacobian(torch.sin))(torch.randn(3))
    for name in [name for name in sys.modules if name.startswith("matplotlib")] + ["matplotlib", "matplotlib.figure"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match="plot"):
        found.svg()
    assert "plot" in found._repr_html_() and "aten.sin.default" in found._repr_html_()


def test_numbers_of_accounts_are_checked() -> None:
    found = chainrule.explain(chainrule.jacobian(torch.sin))(torch.randn(3))
    with pytest.raises(IndexError):
        found.svg(3)


def test_an_account_that_is_not_there() -> None:
    with pytest.raises(IndexError, match="no plan to draw: nothing was differentiated.*plain vmap$"):
        chainrule.explain(lambda x: x * 2)(torch.ones(3)).svg()
    with pytest.raises(IndexError, match="there are 1 accounts, and none has the number 5"):
        chainrule.explain(chainrule.jacobian(torch.sin))(torch.ones(3)).svg(5)


def test_the_title_tells_the_peak_of_the_text() -> None:
    found = chainrule.explain(chainrule.hessian(lambda x: network(4, 8, 3)(x).prod()))(torch.randn(4))
    peak = f"{found.peak / 1000:.3g}kB" if found.peak >= 1000 else f"{found.peak}B"
    title = picture.draw(found.accounts[-1], found.peak).axes[0].get_title(loc="left")
    assert f"the whole call holds {peak} at the peak" in title
    assert "at the peak" in str(found)
