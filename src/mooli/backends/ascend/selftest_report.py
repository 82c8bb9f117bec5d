"""The self-test for people: `mooli selftest --device npu`.

Owns the table. Never judges: what is off was decided by the tests.
"""

from __future__ import annotations

from collections.abc import Sequence

from mooli.backends.ascend.selftest import Outcome


def selftest_lines() -> tuple[list[str], bool]:
    """Test the current NPU, keep the result for engines to come, and say it: (lines, whether everything agreed).

    Raises BackendUnavailableError if there is no NPU and none is simulated.
    """
    from mooli.backends.ascend.bring_up import open_npu
    from mooli.backends.ascend.selftest import decode_work
    from mooli.backends.ascend.selftest_record import record_path, test_and_record

    npu = open_npu()
    switches, outcomes = test_and_record(npu)
    lines = [str(npu.versions), "", *table(outcomes), ""]
    if npu.is_simulated:
        lines.append("SIMULATED: this shows that the calls are right by the documents, and nothing about a device.")
    lines.append(f"a decode step of 4 rows in a model of 2 layers: {decode_work(npu, switches)}")
    if switches.off:
        lines.append(f"switched off: {', '.join(switches.off)}; plain torch or the next best operation is used instead")
    else:
        lines.append("everything agrees with plain torch")
    lines.append(f"kept in {record_path(npu.versions)}")
    return lines, not switches.off


def table(outcomes: Sequence[Outcome]) -> list[str]:
    """A line for each check: what, how it went, how far from plain torch."""
    rows = [("operation", "checked with", "result", "error")]
    for outcome in outcomes:
        error = "-" if outcome.error is None else f"{outcome.error:.1e}"
        rows.append((outcome.name, outcome.what, "differs" if outcome.failure else "agrees", error))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return lines + [f"  {outcome.failure}" for outcome in outcomes if outcome.failure]
