"""``explain``: what was recorded, which order was taken and why, and what each alternative would have cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch.utils._pytree import tree_leaves

from chainrule.capture.surroundings import Surroundings
from chainrule.capture.whole_recorder import CompileError
from chainrule.execute.accounts import Account, Ledger, collecting, uncollected
from chainrule.execute.memory import peak_of, watching
from chainrule.explain import picture
from chainrule.explain.picture import dearest_steps

#: What is said where no derivative was planned.
_NOTHING = "nothing was differentiated: no output depends on the inputs, or the call is a plain vmap"

_ORDERS = {
    "forward": "forward accumulation",
    "reverse": "reverse accumulation",
    "network": "one contraction of the whole network of local Jacobians",
    "greedy": "greedy vertex elimination",
    "colours": "columns that share no row pushed through together (colouring)",
    "curvatures": "the curvature of each op between forward maps, after one pullback",
}

_TITLES = {
    "jacobian": "Jacobian",
    "sparse": "sparse Jacobian",
    "pull": "pullback (vjp)",
    "push": "pushforward (jvp)",
    "blocks": "blocks of the Jacobian",
    "diagonal": "diagonal of the Jacobian",
    "trace": "trace of the Jacobian",
    "gram": "Jacobian times its transpose",
    "laplacian": "Laplacian",
    "hessian_diagonal": "diagonal of the Hessian",
}


@runtime_checkable
class HasProducts(Protocol):
    """What plans nothing before it is multiplied: a linear map."""

    def explained_products(self) -> str:
        """Make a product from each side, and tell what they are."""


class Explanation:
    """The account of one call of a transformed function.

    ``str()`` gives readable text, :attr:`data` the same as plain dictionaries.

    Attributes:
        result: what the transformed function returned.
        accounts: one account per executed request; those of inner transforms come first.
        loops: names of ops that ``vmap`` ran sample by sample.
        products: of linear maps in the result, what the accounts of their products are.
        peak: the bytes that a call with a cached plan holds at the peak, all levels of a nest together: the prediction of its
            plans, or what one such call was seen to hold where that is more (autograd's graph, code around the transforms).
    """

    def __init__(self, result: Any, ledger: Ledger, peak: int = 0, products: tuple[str, ...] = ()) -> None:
        self.result = result
        self.peak = peak
        self.products = products
        self.accounts: list[Account] = ledger.accounts
        self.loops = list(ledger.loops)

    @property
    def data(self) -> list[dict[str, Any]]:
        """The accounts as plain dictionaries."""
        return [asdict(account) for account in self.accounts]

    @property
    def opaque(self) -> list[str]:
        """Names of the ops whose derivative is torch's own formula, in order of first use."""
        names = [op["op"] for account in self.accounts for op in account.ops if op["kind"] == "opaque"]
        return list(dict.fromkeys(names))

    def __str__(self) -> str:
        """The readable account."""
        parts = [_account_text(account, number, len(self.accounts)) for number, account in enumerate(self.accounts, 1)]
        if not parts:
            parts.append(_NOTHING)
        parts[:0] = self.products
        if self.peak:
            parts.append(f"the whole call holds {_number(self.peak).strip()}B at the peak")
        if self.loops:
            parts.append("run sample by sample under vmap: " + ", ".join(dict.fromkeys(self.loops)))
        return "\n\n".join(parts)

    __repr__ = __str__

    def svg(self, number: int = -1) -> str:
        """The picture of one account (see :attr:`accounts`) as SVG; by default of the last.

        Args:
            number: which account.

        Raises:
            ImportError: if matplotlib is not installed.
            IndexError: if there is no such account.
        """
        return picture.svg(self._account(number), self.peak)

    def save(self, path: str | Path, number: int = -1) -> None:
        """Write the picture of one account into a file; its ending says how (``.svg``, ``.png``, ``.pdf``).

        Args:
            path: the file.
            number: which account.

        Raises:
            ImportError: if matplotlib is not installed.
            IndexError: if there is no such account.
        """
        picture.save(self._account(number), Path(path), self.peak)

    def _account(self, number: int) -> Account:
        if not self.accounts:
            raise IndexError(f"explain: there is no plan to draw: {_NOTHING}")
        if not -len(self.accounts) <= number < len(self.accounts):
            raise IndexError(f"explain: there are {len(self.accounts)} accounts, and none has the number {number}")
        return self.accounts[number]

    def _repr_html_(self) -> str:
        """The pictures and the text, for a notebook."""
        parts = []
        for account in self.accounts:
            try:
                parts.append(picture.svg(account, self.peak))
            except ImportError as error:
                parts.append(f"<p>{escape(str(error))}</p>")
                break
        return "".join(parts) + f"<pre>{escape(str(self))}</pre>"


def explain(transformed: Callable[..., Any]) -> Callable[..., Explanation]:
    """Return a function that runs a transformed function and explains how its derivative was computed.

    Args:
        transformed: a transformed function, as ``chainrule.jacobian(f)``, or any function that uses transforms. Of a
            generator (``jacobian_blocks``) the first item is explained. A linear map (``layout="operator"``) plans nothing
            before it is multiplied: a product with one vector from each side is explained.

    Returns:
        A function of the same arguments that returns an :class:`Explanation`: the ops on the tape with their kind
        (structured, decomposed, opaque), the elimination order taken and why, predicted flops, bytes moved and peak
        bytes of each alternative, the calls that a replay makes, and the memory of the whole call. Plans are made anew for
        it, not taken from the cache. The function is run five times, the last four times as usual, for the memory: random
        numbers that it draws there are drawn again later, and running statistics are set back.

    Example:
        >>> import torch, chainrule
        >>> account = chainrule.explain(chainrule.jacobian(torch.tanh))(torch.ones(3))
        >>> account.data[0]["chosen"] in ("forward", "reverse", "network", "greedy")
        True
    """

    def explained(*args: Any, **kwargs: Any) -> Explanation:
        def call() -> tuple[Any, tuple[str, ...]]:
            found = transformed(*args, **kwargs)
            if isinstance(found, Generator):
                with closing(found):
                    found = next(found, None)
            return found, tuple(leaf.explained_products() for leaf in tree_leaves(found) if isinstance(leaf, HasProducts))

        with collecting() as ledger:
            result, products = call()
        with _unwritten(transformed):
            return Explanation(result, ledger, _peak(call), products)

    return explained


@contextmanager
def _unwritten(function: Callable[..., Any]) -> Iterator[None]:
    """Afterwards, tensors that a function finds outside of its arguments (running statistics) are what they were before."""
    try:
        found = Surroundings([function]).tensors
    except CompileError:  # more than are followed
        found = []
    plain = [tensor for tensor in found if not tensor.requires_grad and not tensor.is_inference()]
    kept = [(tensor, tensor.clone()) for tensor in plain]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in kept:
                # Batch norm does not count its writes as versions.
                if not torch.equal(tensor, value):
                    tensor.copy_(value)


def _peak(call: Callable[[], Any]) -> int:
    """The predicted memory of a call at the peak. What it draws at random is drawn again later."""
    with torch.random.fork_rng(), uncollected():
        # The first makes the plan, the second its form under vmap: neither is what later calls do. Compiled functions run
        # without their graphs while somebody watches, so that all of them are alike.
        for _ in range(2):
            with watching():
                call()
        return peak_of(call)


def _account_text(account: Account, number: int, count: int) -> str:
    title = _TITLES[account.kind]
    which = f"[{number}/{count}] " if count > 1 else ""
    shapes = ", ".join(map(str, account.output_shapes)), ", ".join(map(str, account.input_shapes))
    lines = [f"{which}{title} of outputs {shapes[0]} with respect to inputs {shapes[1]}"]
    lines.append(f"  tape: {account.recorded} recorded ops, {len(account.ops)} between inputs and outputs")
    for op in account.ops:
        lines.append(f"    {op['op']:<44} {op['kind']:<11} {op['family']:<13} {_shapes(op['shapes'])}")
    kinds = Counter(op["kind"] for op in account.ops)
    if kinds.get("opaque"):
        text = "op(s) are opaque: differentiated by torch's own formula, one row at a time where needed"
        lines.append(f"  {kinds['opaque']} {text}")
    lines.append(f"  order: {_ORDERS.get(account.chosen, account.chosen)} ({_reason(account)})")
    for item in sorted(account.alternatives, key=lambda a: float(a["cost"])):
        mark = "→" if item["order"] == account.chosen else " "
        lines.append(
            f"    {mark} {item['order']:<8} {_number(item['flops'])}flops  {_number(item['bytes'])}B moved  "
            f"{_number(item['peak_bytes'])}B peak"
        )
    if account.steps:
        lines.append("  steps:")
        for step in dearest_steps(account.steps):
            shape = "" if step["shape"] is None else _shapes([tuple(step["shape"])])
            cost = f"{_number(step['flops'])}flops  {_number(step['bytes'])}B moved"
            lines.append(f"    {step['label'] or 'value':<30} {shape:<14} {cost}")
    if account.memory:
        bytes_of = {name: _number(size).strip() + "B" for name, size in account.memory.items()}
        lines.append(
            f"  memory: {bytes_of['recorded']} of recorded values, {bytes_of['temporaries']} of temporaries and "
            f"{bytes_of['results']} of results"
        )
    if account.uncounted:
        lines.append(f"    not counted: the work space of {', '.join(account.uncounted)}")
    for block in account.blocks:
        rows, columns = block["shape"]
        share = 100 * block["entries"] / max(rows * columns, 1)
        kind = "structurally dense" if block["dense"] else f"{share:.3g} % of the places"
        arrays = ", ".join(map(_term_text, block["terms"], block["parts"]))
        lines.append(f"  block {rows} × {columns}: {block['entries']} entries, {kind}; terms hold {arrays}")
    names = Counter(call["call"] for call in account.calls)
    listed = ", ".join(f"{name}×{times}" if times > 1 else name for name, times in names.items())
    count = len(account.calls)
    lines.append(f"  program: {count} call{'' if count == 1 else 's'}" + (f" ({listed})" if listed else ""))
    return "\n".join(lines)


def _term_text(sizes: tuple[int, ...], dense: tuple[int, int, int] | None) -> str:
    """What a term of a sparse block holds, and the dense blocks that it fills."""
    text = "×".join(map(str, sizes)) or "number"
    if dense is None:
        return text
    count, rows, columns = dense
    return f"{text} ({f'{count} dense blocks' if count > 1 else 'a dense block'} of {rows} × {columns})"


def _reason(account: Account) -> str:
    if account.kind in ("pull", "push"):
        return "one vector is pushed or pulled through the tape"
    if account.order != "auto":
        return "pinned by the transform"
    others = [a for a in account.alternatives if a["order"] != account.chosen]
    if not others:
        return "the only candidate"
    mine = next(a for a in account.alternatives if a["order"] == account.chosen)
    second = min(others, key=lambda a: float(a["cost"]))
    if second["cost"] == mine["cost"]:
        return f"as cheap as {second['order']}"
    return f"predicted {second['cost'] / max(mine['cost'], 1):.2f}x cheaper than {second['order']}"


def _shapes(shapes: list[tuple[int, ...]]) -> str:
    return ", ".join("×".join(map(str, shape)) if shape else "scalar" for shape in shapes)


def _number(value: float) -> str:
    for unit in ("", "k", "M", "G", "T"):
        if abs(value) < 1000:
            return f"{value:6.4g} {unit}"
        value /= 1000
    return f"{value:6.4g} P"
