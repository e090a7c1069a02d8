"""What conformance checks leave behind: one line for each check, and an error if any failed."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


class NotRun(Exception):
    """Raised by a check that cannot say anything here, with the reason."""


@dataclass(frozen=True)
class Check:
    """One check: `state` is "ok", "failed" or "not run"; `why` is the failure, or the reason why it was not run."""

    subject: str
    name: str
    state: str
    why: str = ""

    def __str__(self) -> str:
        return f"{self.state:8}{self.subject}: {self.name}" + (f": {self.why}" if self.why else "")


@dataclass
class Report:
    """All checks of one backend; prints as a list."""

    backend: str
    checks: list[Check] = field(default_factory=list)

    @property
    def failed(self) -> list[Check]:
        """The checks that failed."""
        return [check for check in self.checks if check.state == "failed"]

    @property
    def ok(self) -> bool:
        """Whether something was checked and nothing failed."""
        return any(check.state == "ok" for check in self.checks) and not self.failed

    def __str__(self) -> str:
        passed = sum(check.state == "ok" for check in self.checks)
        not_run = len(self.checks) - passed - len(self.failed)
        title = f"{self.backend}: {passed} checks passed, {len(self.failed)} failed, {not_run} not run"
        return "\n".join([title, *(f"  {check}" for check in self.checks)])

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"backend": self.backend, "ok": self.ok, "checks": [vars(check) for check in self.checks]}

    def run(self, subject: str, name: str, check: Callable[[], Any]) -> Any:
        """Run a check and note its outcome; what it returned, or None if it failed or was not run."""
        try:
            result = check()
        except NotRun as reason:
            self.checks.append(Check(subject, name, "not run", str(reason)))
        except Exception as error:
            self.checks.append(Check(subject, name, "failed", _told(error)))
        else:
            self.checks.append(Check(subject, name, "ok"))
            return result
        return None


class ConformanceError(AssertionError):
    """A backend breaks its contract; lists all failures. `report` holds every check."""

    def __init__(self, report: Report) -> None:
        self.report = report
        if not report.checks:
            super().__init__(f"{report.backend!r} brings no method and no kernel: there is nothing to check")
            return
        lines = [f"backend {report.backend!r} failed {len(report.failed)} of {len(report.checks)} checks"]
        super().__init__("\n  - ".join([*lines, *(f"{c.subject}: {c.name}: {c.why}" for c in report.failed)]))


def _told(error: Exception) -> str:
    """A failure in one line; an error that is no failed check also says where it came from."""
    if isinstance(error, AssertionError) and str(error):
        return str(error)
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({frame.filename}:{frame.lineno} in {frame.name})"


def require(condition: Any, message: str) -> None:
    """Fail a check; unlike `assert`, also under `python -O`."""
    if not condition:
        raise AssertionError(message)
