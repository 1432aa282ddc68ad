"""Write the tables of the README from ``results.json``: ``python -m benchmarks.readme``."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from benchmarks import report

HERE = Path(__file__).parent
HEADER = ["| | workload | chainrule | torch.func | speed-up | by hand |", "|---|---|---|---|---|---|"]


def line(row: dict[str, Any]) -> str:
    """A row of a table."""
    times = row["times"]
    speed_up = f"{times['peer'] / times['eager']:.2f}×"
    hand = report.seconds(times["hand"]) if "hand" in times else "–"
    cells = (row["key"], row["title"], report.seconds(times["eager"]), report.seconds(times["peer"]), speed_up, hand)
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Replace both tables."""
    measured = json.loads((HERE / "results.json").read_text())
    readme = HERE.parent / "README.md"
    text = readme.read_text()
    for section in "AB":
        rows = [row for row in measured["rows"] if row["section"] == section and "peer" in row["times"]]
        table = "\n".join([*HEADER, *map(line, rows)])
        pattern = rf"\| \| workload \|[^\n]*\n\|---[^\n]*\n(?:\| {section}\d[^\n]*\n?)+"
        text, count = re.subn(pattern, lambda _, table=table: table + "\n", text)
        if count != 1:
            raise SystemExit(f"README.md has {count} tables of section {section}")
    readme.write_text(text)


if __name__ == "__main__":
    main()
