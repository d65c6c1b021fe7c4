"""What a check says to do mends what it found, and two findings of one cause do not say opposite things."""

from __future__ import annotations

from qcompiler.check.findings import CheckReport, Severity
from tests.check.checkpoints import DOWN
from tests.check.conftest import Base, Check
from tests.check.traps import give_zero_points


def mends(report: CheckReport) -> set[str]:
    """Of errors."""
    return {finding.mend for finding in report.of(Severity.ERROR)}


def test_zero_points_that_mean_something_are_not_to_be_removed(base: Base, checked: Check) -> None:
    edited = base("packed")
    give_zero_points(edited, DOWN)
    assert mends(checked(edited)) == {"remove it, or write symmetric: false"}
    edited.change(f"{DOWN}.weight_zero_point", lambda words: words + 1)
    assert mends(checked(edited)) == {"write symmetric: false"}
