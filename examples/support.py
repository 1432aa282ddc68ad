"""What the examples share: their options, the checks that they print, and the file of their picture."""

from __future__ import annotations

import argparse
import io
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from scipy import sparse

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass
class Report:
    """The checks of one example, printed as they are made.

    Attributes:
        small: the example is to run at the small size, in seconds.
        picture: the file to draw into (its suffix says the format), or None for no picture.
        failed: the checks that did not hold.
    """

    small: bool = False
    picture: Path | None = None
    failed: list[str] = field(default_factory=list)

    def say(self, text: str) -> None:
        """Print a line that is no check."""
        print(text, flush=True)

    def check(self, what: str, value: float, *, below: float) -> None:
        """Print a number beside the bound that it has to stay under (a NaN does not)."""
        holds = value < below
        print(f"  [{'ok' if holds else 'FAILED'}] {what}: {value:.3g} (below {below:.3g})", flush=True)
        if not holds:
            self.failed.append(what)

    def save(self, figure: Figure) -> None:
        """Write the picture, where one was asked for; PNG files small enough to be kept beside the documentation."""
        if self.picture is None:
            return
        if self.picture.suffix == ".png":
            from PIL import Image  # noqa: PLC0415 - it comes with matplotlib, which only pictures need

            drawn = io.BytesIO()
            figure.savefig(drawn, format="png", bbox_inches="tight", dpi=80)
            colours = Image.open(drawn).convert("RGB").quantize(48, dither=Image.Dither.NONE)
            colours.save(self.picture, optimize=True)
        else:
            figure.savefig(self.picture, bbox_inches="tight")
        self.say(f"picture: {self.picture}")


def seconds(call: Callable[[], object]) -> float:
    """The wall-clock seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def to_scipy(matrix: torch.Tensor) -> sparse.csr_array:
    """A ``torch.sparse_csr`` matrix as SciPy's; both share their memory."""
    parts = matrix.values(), matrix.col_indices(), matrix.crow_indices()
    return sparse.csr_array(tuple(part.numpy() for part in parts), shape=tuple(matrix.shape))


def main(example: Callable[[Report], None], description: str | None, arguments: Sequence[str] | None = None) -> int:
    """Run an example from the command line.

    Args:
        example: makes its checks on the report that it is given.
        description: the example's docstring; its first line heads the output.
        arguments: the command line, ``sys.argv`` where None.

    Returns:
        The exit status: 0 only if every check holds.
    """
    title = (description or "").strip().splitlines()[0]
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--small", action="store_true", help="a small size, which takes seconds")
    parser.add_argument("--picture", type=Path, help="draw into this file (.svg, .png or .pdf; needs matplotlib)")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state", UserWarning)  # torch's own
    report = Report(options.small, options.picture)
    report.say(title)
    example(report)
    report.say("every check holds" if not report.failed else f"{len(report.failed)} checks FAILED")
    return 1 if report.failed else 0
