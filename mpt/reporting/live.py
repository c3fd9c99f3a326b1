"""What a person sees while a run goes on: a progress bar on a terminal, plain lines elsewhere. Fed by the supervisor."""

import math
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeRemainingColumn

# Without a terminal: a line at least this often, so that a log shows life and stays short.
PLAIN_EVERY_S = 10.0
PHASES = {
    "imports": "loading libraries",
    "data": "preparing data",
    "model": "building the model",
    "setup": "setting up",
    "training": "training",
    "evaluating": "evaluating",
    "saving": "saving",
    "sampling": "generating a sample",
}


class LiveView(Protocol):
    def attempt(self, number: int, resume_from: str | None) -> None: ...

    def event(self, event: Mapping[str, Any]) -> None: ...

    def row(self, row: Mapping[str, Any]) -> None: ...

    def note(self, text: str) -> None: ...


@contextmanager
def live_view() -> Iterator[LiveView]:
    """Give the view that fits stderr: a bar on a terminal, lines otherwise."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield PlainView()
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False) as progress:
        yield BarView(progress)


class PlainView:
    """One line at a time on stderr."""

    def __init__(self) -> None:
        self._max_steps: int | None = None
        self._printed_at = -math.inf

    def attempt(self, number: int, resume_from: str | None) -> None:
        if number > 1 or resume_from:
            self._print(f"attempt {number}, from {resume_from or 'the beginning'}")

    def event(self, event: Mapping[str, Any]) -> None:
        if event["kind"] == "training_started":
            self._max_steps = event["max_steps"]
        text = describe(event)
        if text is not None:
            self._print(text)

    def row(self, row: Mapping[str, Any]) -> None:
        if "loss" not in row:
            return
        now = time.monotonic()
        is_last = row["step"] == self._max_steps
        if row["step"] == 1 or is_last or now - self._printed_at >= PLAIN_EVERY_S:
            self._printed_at = now
            of = f"/{self._max_steps}" if self._max_steps else ""
            self._print(f"step {row['step']}{of}  {figures(row)}")

    def note(self, text: str) -> None:
        self._print(text)

    def _print(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


class BarView:
    """A progress bar with the figures of the newest step under it; what happens once scrolls by above."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._bar: TaskID = progress.add_task("starting", total=None)
        self._figures: TaskID | None = None
        self._phase = "starting"

    def attempt(self, number: int, resume_from: str | None) -> None:
        if number > 1 or resume_from:
            self.note(f"attempt {number}, from {resume_from or 'the beginning'}")

    def event(self, event: Mapping[str, Any]) -> None:
        if event["kind"] == "phase":
            self._progress.update(self._bar, description=PHASES.get(event["phase"], event["phase"]))
            return
        if event["kind"] == "training_started":
            self._progress.update(self._bar, total=event["max_steps"], completed=event["step"])
        text = describe(event)
        if text is not None:
            self.note(text)

    def row(self, row: Mapping[str, Any]) -> None:
        if "loss" in row:
            self._progress.update(self._bar, completed=row["step"], description=f"training  {figures(row)}")

    def note(self, text: str) -> None:
        self._progress.console.print(text, soft_wrap=True)


def figures(row: Mapping[str, Any]) -> str:
    """Write a step's numbers, short enough for 80 columns.

    >>> figures({"loss": 4.12345, "learning_rate": 0.002, "grad_norm": 1.5, "tokens_per_second": 5123.4,
    ...          "loss_scale": 65536.0, "memory_gib": 0.8123, "skipped": False})
    'loss 4.123  lr 2.0e-03  norm 1.50  scale 65536  5123 tok/s  0.8 GiB'
    """
    parts = [f"loss {number(row['loss'], '.3f')}", f"lr {number(row['learning_rate'], '.1e')}"]
    if row.get("grad_norm") is not None:
        parts.append(f"norm {number(row['grad_norm'], '.2f')}")
    if row.get("loss_scale") is not None:
        parts.append(f"scale {number(row['loss_scale'], 'g')}")
    if row.get("skipped"):
        parts.append("SKIPPED")
    parts.append(f"{number(row['tokens_per_second'], '.0f')} tok/s")
    if row.get("memory_gib") is not None:
        parts.append(f"{number(row['memory_gib'], '.1f')} GiB")
    return "  ".join(parts)


def number(value: Any, form: str) -> str:
    """Write a number; a non-finite one stands in the files as a text and stays one.

    >>> number(1.25, ".1f"), number("nan", ".1f")
    ('1.2', 'nan')
    """
    return value if isinstance(value, str) else format(value, form)


def describe(event: Mapping[str, Any]) -> str | None:
    """Say an event in words; None for those that are not for people."""
    match event["kind"]:
        case "notice":
            return str(event["text"])
        case "training_started":
            of = f" of {event['max_steps']}" if event["max_steps"] else ""
            samples = f", {event['samples']} samples" if event.get("samples") is not None else ""
            return f"training from step {event['step']}{of}{samples}" if event["step"] else f"training{samples}"
        case "audit":
            return "audit passed: what runs is what was planned" if event["passed"] else "audit FAILED"
        case "evaluated" if event.get("eval_loss") is not None:
            return f"step {event['step']}  evaluation loss {number(event['eval_loss'], '.4f')}"
        case "checkpoint_saved":
            return f"step {event['step']}  saved {event['name']}"
        case "step_skipped":
            return f"step {event['step']}  skipped: {event['reason']} (loss scale {event['loss_scale']})"
        case "non_finite":
            return f"step {event['step']}  {event['what']} is {event['value']}"
        case "stop_requested" if "step" in event:
            return f"step {event['step']}  stop requested by {event['by']}"
        case _:
            return None
