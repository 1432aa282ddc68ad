"""What a workload is: one computation, written once for each library, and the ratios to reach."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

Expression = Callable[..., Any]


@dataclass(frozen=True)
class Targets:
    """Ratios to reach; None where none is set.

    Attributes:
        peer_eager: time of the best torch.func expression over ours, at least this.
        eager_hand: our time over that of the hand-written formula, at most this.
        best_compiled: time of the best of all peers over ours compiled, at least this.
        eager_function: our time over that of one evaluation of the function itself, at most this.
        differences_eager: time with SciPy's finite differences over ours, at least this.
    """

    peer_eager: float | None = None
    eager_hand: float | None = None
    best_compiled: float | None = None
    eager_function: float | None = None
    differences_eager: float | None = None


@dataclass(frozen=True)
class Workload:
    """One computation.

    Every expression takes the tensors that ``inputs`` makes; the fastest of several is the one reported.

    Attributes:
        key: the row's name, such as ``A2``.
        title: what is computed.
        inputs: makes the tensors, in float64 on the CPU; the runner casts and moves them.
        ours: expressions in chainrule, by name.
        peers: expressions in torch.func (or plain autograd), by name.
        hand: what an expert would write by hand, or None.
        autograd: the same by ``torch.autograd.grad`` in plain code, or None.
        jax: makes expressions from the ``jax`` module, by name; None where there is none.
        targets: the ratios to reach.
        dtype: the dtype that is timed.
        tolerance: the relative tolerance of the agreement in float64.
        sizes: for a growth study, workloads of the same kind by size.
        exponent: the fitted exponents of time and memory over size to reach, at most this; None where none is set.
        section: where the row belongs; its key's first letter if empty.
        function: what is differentiated, on the same tensors, for the ratio to one evaluation of it.
        coloured: expressions in torch.func that compress by a colouring made beforehand, by name.
        differences: expressions with SciPy's finite differences, by name.
        reference: what all results are compared with, where it is no peer's result.
        reduced: what of a result is compared, from the expression's column, its result and the inputs; all of it if None.
        account: what else there is to say of the inputs' row, by title.
        solve: whether a whole solve is timed: nothing is compiled and no memory measured.
        compiled: whether ours and the peers are timed compiled too.
        large: whether ``--quick`` leaves the workload out.
    """

    key: str
    title: str
    inputs: Callable[[], tuple[torch.Tensor, ...]]
    ours: Mapping[str, Expression]
    peers: Mapping[str, Expression]
    hand: Expression | None = None
    autograd: Expression | None = None
    jax: Callable[[Any], Mapping[str, Expression]] | None = None
    targets: Targets = Targets()
    dtype: torch.dtype = torch.float32
    tolerance: float = 1e-9
    sizes: Mapping[int, Workload] = field(default_factory=dict)
    exponent: float | None = None
    section: str = ""
    function: Expression | None = None
    coloured: Mapping[str, Expression] = field(default_factory=dict)
    differences: Mapping[str, Expression] = field(default_factory=dict)
    reference: Expression | None = None
    reduced: Callable[[str, Any, tuple[torch.Tensor, ...]], Any] | None = None
    account: Callable[..., Mapping[str, str]] | None = None
    solve: bool = False
    compiled: bool = True
    large: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "section", self.section or self.key[0])

    def tensors(self, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, ...]:
        """The inputs, the same ones every time, in ``dtype`` on ``device`` (integer tensors keep their dtype)."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            made = self.inputs()
        return tuple(t.to(device=device, dtype=dtype if t.is_floating_point() else t.dtype) for t in made)
