"""What a probe hands back, as plain data: facts, and findings with their cause and cure.

Owns the types and nothing else: no probing, no printing.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

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
