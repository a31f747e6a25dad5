"""What the whole test run shares."""

from collections import Counter


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
