"""A report on paper: a table for people, JSON for machines.

Owns the wording around facts and findings. Text of other programs is shown without control characters.
"""

from __future__ import annotations

import json
from typing import Any

from mooli.doctor.findings import PROBLEM, Finding, Report, Section
from mooli.version import __version__

SCHEMA = 1
"""Raised when a key of the JSON changes its meaning."""

_MAX_SHOWN = 300


def report_json(report: Report) -> str:
    findings = [finding.to_dict() | {"counts": report.counts(finding)} for finding in report.findings]
    return json.dumps(
        {
            "schema": SCHEMA,
            "mooli": __version__,
            "backend": report.backend,
            "status": "ok" if report.exit_status == 0 else "problems",
            "exit_status": report.exit_status,
            "sections": {section.name: section.facts for section in report.sections},
            "not_here": [section.name for section in report.sections if not section.is_there],
            "findings": findings,
        },
        indent=2,
        default=str,
    )


def report_table(report: Report) -> str:
    lines = [f"mooli doctor {__version__}, for backend {report.backend}"]
    for section in report.sections:
        lines += ["", f"{section.name}: {_mark(report, section)}"]
        width = max((len(name) for name in section.facts), default=0)
        lines += [f"  {name:<{width}}  {_value(value)}" for name, value in section.facts.items()]
    findings = report.findings
    for number, finding in enumerate(findings, 1):
        lines += ["", *_paragraph(number, finding, report.counts(finding))]
    lines += ["", _summary(report, findings)]
    return "\n".join(lines)


def _mark(report: Report, section: Section) -> str:
    """How a section stands, in a few words."""
    problems = [finding for finding in section.findings if finding.severity == PROBLEM]
    if any(report.counts(finding) for finding in problems):
        return "PROBLEM"
    backends = sorted({backend for finding in problems for backend in finding.backends})
    state = "ok" if section.is_there else "not here"
    state = f"problem, only for {', '.join(backends)}" if backends else state
    others = len(section.findings) - len(problems)
    return f"{state}, {others} to note" if others else state


def _paragraph(number: int, finding: Finding, counts: bool) -> list[str]:
    where = ", ".join(finding.backends)
    kind = finding.severity if counts else f"{finding.severity}, only for {where}"
    head = f"{number}. [{kind}] {finding.code}"
    cure = [f"   {'cure:  ' if i == 0 else '       '}{printable(line, None)}" for i, line in enumerate(finding.cure)]
    return [head, f"   found: {printable(finding.found, 1000)}", f"   cause: {printable(finding.cause, None)}", *cure]


def _summary(report: Report, findings: list[Finding]) -> str:
    counted = [finding for finding in findings if report.counts(finding) and finding.severity == PROBLEM]
    if counted:
        return f"{len(counted)} problem{'' if len(counted) == 1 else 's'} for backend {report.backend}, see above."
    rest = f" {len(findings)} to note, see above." if findings else ""
    return f"Everything that backend {report.backend} needs is here.{rest}"


def _value(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return printable(", ".join(map(str, value)), _MAX_SHOWN)
    return printable(str(value), _MAX_SHOWN)


def printable(text: str, most: int | None) -> str:
    """On one line, without what moves a terminal's cursor, at most `most` characters."""
    clean = "".join(char if char.isprintable() else " " for char in text)
    clean = " ".join(clean.split(" ")) if most is None else " ".join(clean.split())
    return clean if most is None or len(clean) <= most else f"{clean[: most - 1]}…"
