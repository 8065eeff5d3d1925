"""What came out of the conformance suite."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

MARKS = {True: "pass", False: "FAIL", None: "----"}


@dataclass(frozen=True, slots=True)
class Result:
    """The result of one check."""

    check: str
    passed: bool | None
    """None: there was nothing to check."""
    detail: str
    """What was seen, what is wrong, or why there was nothing to check."""
    seconds: float = 0.0

    def __str__(self) -> str:
        return f"  {MARKS[self.passed]}  {self.check:<16} {self.seconds:6.1f} s  {self.detail}"


@dataclass(frozen=True, slots=True)
class Sheet:
    """The results of one plugin's models that are run by the same code, or of a plugin that doesn't load."""

    title: str
    results: Sequence[Result]

    @property
    def passed(self) -> bool:
        return all(result.passed is not False for result in self.results)

    def summary(self) -> str:
        counts = [sum(result.passed is mark for result in self.results) for mark in (True, False, None)]
        said = ", ".join(
            f"{n} {what}" for n, what in zip(counts, ("passed", "failed", "with nothing to check"), strict=True) if n
        )
        return f"{self.title}: {'conforms' if self.passed else 'does not conform'} ({said})"

    def render(self) -> str:
        return "\n".join([self.title, *map(str, self.results), self.summary()])

    def to_dict(self) -> dict[str, Any]:
        """The sheet, JSON-ready."""
        return {"title": self.title, "passed": self.passed, "results": [asdict(result) for result in self.results]}
