"""What a probe says: facts, findings with causes and cures, the report of them all, and how it is shown.

Owns those types, and the wording around facts and findings: a table for people, JSON for machines. Text of other
programs is shown without control characters. Never looks at a machine.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from mooli.version import __version__

BACKENDS = ("cpu", "torch", "cuda", "ascend")
"""What a finding can stand in the way of."""

PROBLEM, WARNING = "problem", "warning"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is wrong.

    code: a stable name for programs. found: what was seen, with its value. cause: why that is wrong. cure: commands and
    sentences, in order. backends: those that it keeps from working. severity: a problem keeps them from working or
    makes answers wrong, a warning does not. subject: which of several things of a kind it is about; two findings with
    one code and one subject are the same, seen twice.
    """

    code: str
    found: str
    cause: str
    cure: tuple[str, ...]
    backends: tuple[str, ...] = ("ascend",)
    severity: str = PROBLEM
    subject: str = ""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(slots=True)
class Section:
    """What one probe has seen. facts: name to text, number, list or None, in the order in which they are shown.

    is_there: whether this machine has what it is about, such as a GPU.
    """

    name: str
    facts: dict[str, Any] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    is_there: bool = True


@dataclass(slots=True)
class Report:
    """All sections, and for whom: the backend that was asked for."""

    backend: str
    sections: list[Section]

    @property
    def findings(self) -> list[Finding]:
        """Every finding once, those that count first. Several probes may see the same thing."""
        unique: dict[tuple[str, str], Finding] = {}
        for section in self.sections:
            for finding in section.findings:
                unique.setdefault((finding.code, finding.subject), finding)
        return sorted(unique.values(), key=lambda finding: (not self.counts(finding), finding.severity != PROBLEM))

    def counts(self, finding: Finding) -> bool:
        """Whether it concerns the CPU, which must always work, or the backend that was asked for."""
        return bool({"cpu", self.backend} & set(finding.backends))

    @property
    def exit_status(self) -> int:
        return int(any(self.counts(finding) and finding.severity == PROBLEM for finding in self.findings))


# -- on paper ----------------------------------------------------------------------------------------------------------

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
