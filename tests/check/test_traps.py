"""Every trap of the format, made by hand: the check names it, its layer, and the loaders that fall into it."""

from __future__ import annotations

import pytest

from qcompiler.check.findings import KINDS, Severity
from tests.check.conftest import Base, Check
from tests.check.tensor_traps import TRAPS
from tests.check.traps import Trap


@pytest.mark.parametrize("trap", TRAPS, ids=lambda trap: trap.name)
def test_a_trap_is_named_with_its_layer_and_loaders(trap: Trap, base: Base, checked: Check) -> None:
    edited = base(trap.base)
    trap.edit(edited)
    report = checked(edited)
    assert not report.ok
    found = [finding for finding in report.of(Severity.ERROR) if finding.code == trap.code]
    assert trap.layer in {finding.layer for finding in found}, report.findings
    here = [finding for finding in found if finding.layer == trap.layer]
    assert {loader for finding in here for loader in finding.loaders} == set(trap.loaders)
    assert all(finding.message and finding.mend for finding in found)
    assert {f.code for f in report.of(Severity.ERROR)} == {trap.code, *trap.also}


def test_every_error_has_a_trap() -> None:
    errors = {code for code, kind in KINDS.items() if kind.severity is Severity.ERROR}
    elsewhere = {"illegal"}
    assert errors - {trap.code for trap in TRAPS} == elsewhere
