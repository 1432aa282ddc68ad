"""What the tables say: targets, exponents, rows of an earlier run, what a quick run leaves out."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as program
from benchmarks import report
from benchmarks.measure import Options, Row, measure
from benchmarks.section_c_sparse import rosenbrock_row

KEYS = ["A1", "C1", "C1a", "B15csr"]


def rows() -> list[Row]:
    sparse = Row("C1", "grid", times={"eager": 1e-3, "function": 2e-4}, first_call=0.5, nonzeros=12)
    sparse.ratios, sparse.targets = {"eager_function": 5.0, "peer_eager": 20.0}, {"eager_function": 10.0, "peer_eager": 50.0}
    part = Row("B15csr", "blocks", "C", times={"eager": 1e-3}, notes={"chainrule": "3 runs"})
    return [Row("A1", "layer", times={"eager": 1e-4}), sparse, part]


def test_section_c_has_its_own_table() -> None:
    (_, _, dense), (_, head, sparse) = report.tables(rows())
    assert [cells[0] for cells in dense] == ["A1"]
    assert [cells[0] for cells in sparse] == ["C1", "B15csr"]
    found = dict(zip(head, sparse[0], strict=True))
    assert found["non-zeros"] == "12"
    assert (found["planning"], found["first call"], found["chainrule"]) == ("499 ms", "500 ms", "1.00 ms")
    assert found["eager/function"] == "5.00 (≤ 10)"
    assert found["tf/eager"] == "20.0 (≥ 50 !)"


def test_exponents_are_marked() -> None:
    entry = {
        "key": "C1", "sizes": [10, 100], "exponent": 1.1, "eager": [1.0, 20.0], "eager_exponent": 1.3,
        "eager_bytes": [80, 800], "eager_bytes_exponent": 1.0, "peer": [1.0, None],
    }  # fmt: skip
    table = report.growth_table(entry)
    assert "1.30 (≤ 1.1 !)" in table
    assert "1.00 (≤ 1.1)" in table
    assert "| torch.func | 1.00 s | – | – |" in table


def test_rows_of_an_earlier_run_are_kept_and_named(tmp_path: Path) -> None:
    first, second = rows()[:2], rows()[2:]
    report.write_results(tmp_path, first, {}, {}, [{"key": "C1", "sizes": [1, 2], "eager": [1.0, 2.0]}], KEYS)
    report.write_results(tmp_path, second, {}, {}, [], KEYS)
    data = json.loads((tmp_path / "results.json").read_text())
    assert [row["key"] for row in data["rows"]] == ["A1", "C1", "B15csr"]
    assert data["rows"][2]["section"] == "C"
    assert data["settings"]["rows of an earlier run"] == "A1, C1"
    assert data["growth"][0]["key"] == "C1"
    text = (tmp_path / "RESULTS.md").read_text()
    assert "| B15csr | chainrule | 3 runs |" in text


def test_a_quick_run_leaves_large_rows_out() -> None:
    options, chosen, target, left_out = program._parse(["--only", "C", "--quick", "--no-jax"])
    assert options.quick
    assert target is None
    assert {"C1d", "C3b", "C6f", "B17csr"} <= set(left_out)
    assert {"C1", "C2", "C3", "C4", "C5a", "C7", "B15csr"} <= {workload.key for workload in chosen}
    whole = program._parse(["--only", "C", "--no-jax"])
    assert not whole[3]
    assert {workload.key for workload in whole[1]} == set(left_out) | {workload.key for workload in chosen}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")
def test_a_sparse_row_is_measured() -> None:
    options = Options(rounds=1, seconds=0.001, compiled=False)
    row = measure(rosenbrock_row("C3", 30, dense=True), options)
    assert row.section == "C"
    assert row.nonzeros == 88
    assert set(row.ratios) >= {"eager_function", "peer_eager", "eager_hand"}
    assert row.memory["eager"] > 88 * 8
    assert row.plan > 0
    entry = program._growth(rosenbrock_row("C3", 30, sizes={n: rosenbrock_row("C3", n) for n in (30, 300)}), options)
    assert entry["sizes"] == [30, 300]
    # Values grow with n or n - 1, apart from a few scalars.
    assert 0.9 <= entry["eager_bytes_exponent"] <= 1.05
    assert "peer" not in entry
    torch.set_num_threads(1)


def test_brackets_in_a_table_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """A terminal's table takes them for its own markup, unless they are escaped."""
    report.print_table(["piece", "time"], [["recording x[index]", "1 µs"]], "overhead")
    assert "x[index]" in capsys.readouterr().out
