"""What the whole test run shares."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import HubServer, hub_for_this_process


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hugging Face Hub of this test's own, on the loopback interface."""
    with hub_for_this_process(tmp_path / "hub_cache", monkeypatch) as server:
        yield server


def pytest_terminal_summary(terminalreporter):
    """One line for the sweep, whose architectures may have been swept in several processes."""
    counts = [
        dict(value)
        for reports in terminalreporter.stats.values()
        for report in reports
        if getattr(report, "when", None) == "call"
        for name, value in report.user_properties
        if name == "sweep"
    ]
    if counts:
        roles: Counter[str] = sum(map(Counter, counts), Counter())
        parts = ", ".join(f"{count:,} {role}" for role, count in roles.most_common())
        replaced = sum(1 for count in counts if count)
        terminalreporter.write_line(
            f"{replaced} of {len(counts)} architectures replaced: {roles.total():,} activations ({parts})"
        )
