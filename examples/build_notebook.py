"""Write and execute ``tour.ipynb`` from the functions of ``tour.py``."""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

HERE = Path(__file__).resolve().parent

CELLS: tuple[tuple[str, str], ...] = (
    (
        "markdown",
        "# Jacobians and Hessians, with structure\n\n"
        "For `predict(W, b, x) = tanh(W x + b)` the Jacobian with respect to `x` is `diag(1 - y²) W`: one multiplication per "
        "entry. torch.func gets there by pushing an identity matrix through a vectorised pullback; chainrule keeps the diagonal "
        "a diagonal. "
        "Every computation below is done by both, compared in float64, and timed in float32 on one CPU thread.",
    ),
    (
        "code",
        "import inspect\n\nimport torch\n\nimport chainrule\nimport tour\n\ntorch.set_num_threads(1)\n"
        "steps = list(tour.steps())\nprint(inspect.getsource(tour.predict))",
    ),
    (
        "markdown",
        "## One import changes\n\nThe transforms have torch.func's names and signatures.",
    ),
    (
        "code",
        "weight, bias, x = tour.layer(16, 16)\n"
        "ours = chainrule.jacrev(tour.predict, argnums=2)(weight, bias, x)\n"
        "theirs = torch.func.jacrev(tour.predict, argnums=2)(weight, bias, x)\n"
        "torch.testing.assert_close(ours, theirs)\nours.shape",
    ),
    ("markdown", "## Rows of a Jacobian: a loop, a vectorised pullback, `jacrev`"),
    ("code", "show(0, 4)"),
    (
        "markdown",
        "## Tall and wide\n\nThe order matters to torch.func: pushing 32 columns or pulling 2048 rows. With the structure kept, "
        "both orders cost the same here.",
    ),
    ("code", "show(4, 10)"),
    ("markdown", "## Hessians\n\nA Hessian is a Jacobian of a Jacobian, in any order of modes."),
    ("code", "show(10, 13)"),
    ("markdown", "## Batches\n\nBy `vmap`, or by summing over the batch."),
    ("code", "show(13, 16)"),
    ("markdown", "## Hessian-vector products"),
    ("code", "show(16, 18)"),
    (
        "markdown",
        "## What was planned\n\n`explain` shows the ops, the order that was taken, and what the others would have cost.",
    ),
    ("code", "print(tour.plan_text())"),
)

SHOW = (
    "def show(start, stop):\n"
    "    print(tour.HEADER)\n"
    "    for step in steps[start:stop]:\n"
    "        outcome = tour.run(step, budget=0.1)\n"
    "        assert outcome.agrees, step.title\n"
    "        print(tour.row(outcome))"
)


def build(path: Path) -> None:
    """Write the notebook and run it; an error in a cell is raised."""
    cells = []
    for number, (kind, text) in enumerate(CELLS):
        cell = new_markdown_cell(text) if kind == "markdown" else new_code_cell(text)
        cell["id"] = f"cell-{number}"
        cells.append(cell)
    helper = new_code_cell(SHOW)
    helper["id"] = "show"
    cells.insert(2, helper)
    notebook = new_notebook(cells=cells)
    notebook.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(HERE)}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    nbformat.write(notebook, path)


if __name__ == "__main__":
    build(HERE / "tour.ipynb")
    print("written: tour.ipynb", file=sys.stderr)
