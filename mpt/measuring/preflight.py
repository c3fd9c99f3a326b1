"""What `mpt check` finds: the plan judged here, the data by a child process that prepares it as a run would."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpt.errors import MptError
from mpt.planning.checks import DataFacts, Finding, Severity, judge
from mpt.planning.checks.finding import in_order
from mpt.planning.checks.of_plan import refused, trainable
from mpt.planning.plan import Plan
from mpt.recipe.sources import check_sources
from mpt.running.run_directory import write_json
from mpt.terms import Check

MODULE = "mpt.training.check"
LOG_LINES = 15

Look = Callable[[Plan], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Checked:
    """What was found. `plan` None: it was refused. `facts` None: the data was not looked at, or can't be used."""

    plan: Plan | None
    findings: tuple[Finding, ...]
    facts: DataFacts | None = None
    notices: tuple[str, ...] = ()

    @property
    def may_start(self) -> bool:
        """Whether `mpt train` would get as far as building the model."""
        return not any(finding.stops for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Give it as JSON values."""
        return {
            "ok": self.may_start,
            "recipe": None if self.plan is None else self.plan.name,
            "machine": None if self.plan is None else self.plan.machine.label,
            "findings": [finding.to_json() for finding in self.findings],
            "data": None if self.facts is None else self.facts.to_json(),
            "notices": list(self.notices),
        }


def preflight(make_plan: Callable[[], Plan], look: Look | None) -> Checked:
    """Check a recipe. `look` learns of the data; None leaves the data alone. What is refused is a finding too."""
    try:
        plan = make_plan()
    except MptError as error:
        return Checked(None, (refused(error),))
    before = list(trainable(plan))
    ignored = plan.recipe.preflight.ignore
    if look is None or any(finding.code is Check.NO_ENGINE for finding in before):
        return Checked(plan, in_order([*before, *judge(plan, None)], ignored))
    try:
        check_sources(plan.recipe.data)
        told = look(plan)
    except MptError as error:
        unusable = Finding(Check.DATA_REFUSED, Severity.ERROR, error.problem, error.remedy)
        return Checked(plan, in_order([*before, unusable, *judge(plan, None)], ignored))
    facts = DataFacts.from_json(told["facts"])
    return Checked(plan, in_order([*before, *judge(plan, facts)], ignored), facts, tuple(told["notices"]))


def look_in_child(plan: Plan, environ: Mapping[str, str]) -> dict[str, Any]:
    """Have the data prepared and looked at in a process of its own. Raises MptError with what that says."""
    with tempfile.TemporaryDirectory(prefix="mpt-check-") as folder:
        write_json(Path(folder) / "plan.json", plan.to_json())
        command = [sys.executable, "-m", MODULE, folder]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, env=dict(environ)
        )
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        told: dict[str, Any] = json.loads(lines[-1])
        if "error" in told:
            raise MptError(told["error"]["problem"], remedy=told["error"]["remedy"])
        return told
    last = " | ".join(done.stderr.strip().splitlines()[-LOG_LINES:]) or "it said nothing"
    raise MptError(
        f"the process that looks at the data ended with {done.returncode}: {last}",
        remedy="Where that is -9, the system ran out of memory; else a bug in mpt or below it.",
    )
