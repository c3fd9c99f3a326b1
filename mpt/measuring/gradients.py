"""The first gradients of two measured attempts: compared by a child process (`mpt.training.compare_gradients`), because
this side imports no torch, and deleted. Called by `mpt.measuring.compare`.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from mpt.errors import ExitCode, MptError
from mpt.measuring.comparison import Gradient, Side, without_cosine
from mpt.running.measured import gradients_file
from mpt.running.run_directory import RunDirectory
from mpt.running.signals import StopWish

POLL_S = 0.1


def compare_gradients(
    scratch: Sequence[RunDirectory], sides: Sequence[Side], wish: StopWish, environment: Mapping[str, str]
) -> Gradient | None:
    """Compare the candidate's and the reference's first gradients; None where a signal came before the end.

    Raises MptError where the child fails.
    """
    reason = without_cosine(*sides)
    if reason is not None:
        return Gradient(None, reason)
    found = _ask_child([str(gradients_file(run.attempt(1))) for run in scratch], wish, environment)
    if found is None:
        return None
    reason = None if found["cosine"] is not None else "a gradient of the first step is zero or not finite"
    return Gradient.from_json({**found, "reason": reason})


def delete_gradients(scratch: Sequence[RunDirectory]) -> None:
    """Delete what was kept to be compared: as large as the model in fp32, twice."""
    for run in scratch:
        with suppress(OSError):
            gradients_file(run.attempt(1)).unlink(missing_ok=True)


def _ask_child(files: Sequence[str], wish: StopWish, environment: Mapping[str, str]) -> dict[str, Any] | None:
    tie = (sys.executable, "-m", "mpt.running.tie", str(os.getpid()), "--")
    child = subprocess.Popen(
        (*tie, sys.executable, "-m", "mpt.training.compare_gradients", *files),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=dict(environment),
        start_new_session=True,  # the terminal's Ctrl-C is for this process alone
    )
    while True:
        try:
            out, err = child.communicate(timeout=POLL_S)
            break
        except subprocess.TimeoutExpired:
            if wish.signal is not None:
                child.kill()
    if wish.signal is not None:
        return None
    if child.returncode != 0:
        said = (err.strip().splitlines() or [f"exit status {child.returncode}"])[-1]
        raise MptError(
            f"the gradients of the comparison could not be compared: {said}",
            remedy="Leave the comparison out to train without it.",
            exit_code=ExitCode.BUG,
        )
    return dict(json.loads(out.splitlines()[-1]))
