"""The process that measures: started, asked, ended. The other end is `mpt.training.sensitivity`."""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mpt.errors import ExitCode, MptError
from mpt.planning.plan import Plan
from mpt.running.launcher import build_command
from mpt.running.run_directory import RunDirectory, write_json

MODULE = "mpt.training.sensitivity"
LOG_LINES = 15


class Child:
    """A context that holds the process; what it says of its progress goes to `say`.

    `folder` is an empty directory for the plan, the log and a tokenizer that must be trained.
    """

    def __init__(self, plan: Plan, folder: Path, say: Callable[[str], None], environ: Mapping[str, str]) -> None:
        write_json(folder / "plan.json", plan.to_json())
        self._log = folder / "child.log"
        self._say = say
        command = build_command(plan, RunDirectory(folder), 1, environ)
        inherited = {key: value for key, value in environ.items() if key not in command.without}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                (sys.executable, "-m", MODULE, str(folder)),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**inherited, **command.environment},
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):  # a request that it never read
                    pipe.close()

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request and wait for the answer. Raises MptError with the child's own words where it fails."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):  # it has ended, and its last line says why
            print(json.dumps(request), file=self._process.stdin, flush=True)
        for line in self._process.stdout:
            message = json.loads(line)
            if "say" in message:
                self._say(message["say"])
            elif "error" in message:
                raise self._failed(**message["error"])
            else:
                return dict(message["answer"])
        code = self._process.wait()
        raise self._failed(
            f"the measuring process ended with {code} and said nothing",
            "Where that is -9, the system ran out of memory: set micro_batch_size or data.sequence_length lower.",
            ExitCode.BUG,
        )

    def _failed(self, problem: str, remedy: str, exit_code: int) -> MptError:
        if exit_code == ExitCode.BUG:
            for line in self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]:
                self._say(f"| {line}")
            remedy = "A bug in mpt or below it; the end of its log stands above." if "traceback" in remedy else remedy
        return MptError(f"measuring failed: {problem}", remedy=remedy, exit_code=ExitCode(exit_code))
