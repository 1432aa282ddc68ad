"""What the summary of a test run shows besides failures."""

from __future__ import annotations

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The checks that the examples print, whether they hold or not (output of tests that pass is not shown otherwise)."""
    reports = [report for outcome in ("passed", "failed") for report in terminalreporter.stats.get(outcome, [])]
    checks = [(r.nodeid, text) for r in reports if r.when == "call" for name, text in r.user_properties if name == "checks"]
    if checks:
        terminalreporter.section("checks of the examples")
        for nodeid, text in sorted(checks):
            terminalreporter.write_line(f"{nodeid}\n{text}")
