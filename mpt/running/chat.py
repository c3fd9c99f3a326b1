"""A model in a child process (`mpt.training.chat`) that answers: this side imports no torch.

Both talk in JSON lines over the child's stdin and stdout. The child dies with this process, and a Ctrl-C in the
terminal reaches this process alone, which then asks the child to end its answer.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mpt.errors import ExitCode, MptError
from mpt.planning.plan import Plan
from mpt.running.launcher import worker_environment


class Chat:
    """A model that is loaded. `ready` is what the child said of it: `chat_template` true or false, `device`."""

    def __init__(self, plan: Plan, adapter: str | None, environment: Mapping[str, str]) -> None:
        """Load the model. Raises MptError where that fails, as the child says."""
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - until `close`
        self._child = subprocess.Popen(
            (
                sys.executable,
                "-m",
                "mpt.running.tie",
                str(os.getpid()),
                "--",
                sys.executable,
                "-m",
                "mpt.training.chat",
            ),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            encoding="utf-8",
            env={**environment, **worker_environment(plan, 1, environment)},
            start_new_session=True,
        )
        self.ready: Mapping[str, Any] = {}
        try:
            self._send({"plan": plan.to_json(), "adapter": adapter})
            self.ready = self._receive()
        except BaseException:
            self.close()
            raise

    def ask(self, messages: Sequence[Mapping[str, str]], **settings: Any) -> Iterator[Mapping[str, Any]]:
        """Give the answer as it is generated: {"text": ...} again and again, and {"done": {...}} at its end."""
        self._send({"messages": list(messages), **settings})
        while True:
            told = self._receive()
            yield told
            if "done" in told:
                return

    def interrupt(self) -> None:
        """Let the answer end where it is; its "done" still comes."""
        self._child.send_signal(signal.SIGINT)

    def close(self) -> None:
        """End the child."""
        self._child.kill()
        self._child.wait()
        self._log.close()

    def __enter__(self) -> "Chat":
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def _send(self, message: Mapping[str, Any]) -> None:
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(f"{json.dumps(message)}\n")
            self._child.stdin.flush()
        except BrokenPipeError:
            raise self._died() from None

    def _receive(self) -> dict[str, Any]:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line.endswith("\n"):
            raise self._died()
        told: dict[str, Any] = json.loads(line)
        if "problem" in told:
            raise MptError(told["problem"], remedy=told["remedy"], exit_code=ExitCode(told["exit_code"]))
        return told

    def _died(self) -> MptError:
        code = self._child.wait()
        self._log.seek(0)
        said = [line for line in self._log.read().splitlines() if line.strip()]
        last = f": {said[-1].strip()}" if said else ""
        return MptError(
            f"the process with the model ended (exit status {code}){last}",
            remedy="Too little memory is the usual reason; --machine cpu keeps off the GPUs.",
            exit_code=ExitCode.BUG,
        )
