"""What a person sees while a run goes on: a progress bar on a terminal, plain lines elsewhere."""

import math
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any, cast

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from mpt.reporting.findings_text import read_findings, told
from mpt.running.attempt import View

# Without a terminal: a line at least this often, so that a log shows life and stays short.
PLAIN_EVERY_S = 10.0
PHASES = {
    "imports": "loading libraries",
    "data": "preparing data",
    "model": "building the model",
    "setup": "setting up",
    "compiling": "compiling DeepSpeed's operators (first run only, minutes)",
    "training": "training",
    "evaluating": "evaluating",
    "saving": "saving",
    "sampling": "generating a sample",
}


@contextmanager
def live_view(stream: IO[str] | None = None) -> Iterator[View]:
    """Give the view that fits `stream` (stderr): a bar on a terminal, lines otherwise."""
    screen = Screen(sys.stderr if stream is None else stream)
    console = Console(file=cast(IO[str], screen), highlight=False)
    if not console.is_terminal or console.is_dumb_terminal:
        yield PlainView(screen)
        return
    view = BarView(console)
    with Live(view.picture, console=console, transient=True, redirect_stdout=False, redirect_stderr=False):
        yield view


class Screen:
    """A text stream that may be taken away: a closed terminal or pipe must not end the training that it showed."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._is_there = True

    def write(self, text: str) -> int:
        if self._is_there:
            try:
                self._stream.write(text)
            except (OSError, ValueError):
                self._is_there = False
        return len(text)

    def flush(self) -> None:
        if self._is_there:
            try:
                self._stream.flush()
            except (OSError, ValueError):
                self._is_there = False

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    @property
    def encoding(self) -> str:
        return str(getattr(self._stream, "encoding", "utf-8"))


class PlainView:
    """One line at a time."""

    def __init__(self, screen: Screen) -> None:
        self._screen = screen
        self._max_steps: int | None = None
        self._skips = SkipCount()
        self._is_first = True
        self._printed_at = -math.inf

    def attempt(self, number: int, resume_from: str | None) -> None:
        self._is_first = True
        if number > 1 or resume_from:
            self.note(f"attempt {number}, from {resume_from or 'the beginning'}")

    def event(self, event: Mapping[str, Any]) -> None:
        if event["kind"] == "training_started":
            self._max_steps = event.get("max_steps")
        text = describe(event)
        if text is not None:
            self.note(text)

    def row(self, row: Mapping[str, Any]) -> None:
        if "loss" not in row:
            return
        skips = self._skips.note(row)
        now = time.monotonic()
        is_due = self._is_first or row["step"] == self._max_steps or now - self._printed_at >= PLAIN_EVERY_S
        if is_due:
            self._is_first, self._printed_at = False, now
            of = f"/{self._max_steps}" if self._max_steps else ""
            self.note(f"step {row['step']}{of}  {figures(row, skips)}")

    def note(self, text: str) -> None:
        self._screen.write(f"{text}\n")
        self._screen.flush()


class BarView:
    """A progress bar with the newest step's figures under it; what happens once scrolls by above."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._skips = SkipCount()
        self._figures = Text("", no_wrap=True, overflow="ellipsis")
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            console=console,
            expand=True,
        )
        self._bar: TaskID = self._bars.add_task("starting", total=None)
        self.picture = Group(self._bars, self._figures)

    def attempt(self, number: int, resume_from: str | None) -> None:
        self._bars.reset(self._bar, total=None, description="starting")
        if number > 1 or resume_from:
            self.note(f"attempt {number}, from {resume_from or 'the beginning'}")

    def event(self, event: Mapping[str, Any]) -> None:
        if event["kind"] == "phase":
            phase = str(event.get("phase"))
            self._bars.update(self._bar, description=PHASES.get(phase, phase))
            return
        if event["kind"] == "training_started":
            # The speed is that of this attempt: the steps before it are no work of its own.
            self._bars.reset(self._bar, total=event.get("max_steps"), completed=event["step"], description="training")
        text = describe(event)
        if text is not None:
            self.note(text)

    def row(self, row: Mapping[str, Any]) -> None:
        if "loss" in row:
            self._bars.update(self._bar, completed=row["step"], description="training")
            self._figures.plain = figures(row, self._skips.note(row))

    def note(self, text: str) -> None:
        self._console.print(text, soft_wrap=True, markup=False)


class SkipCount:
    """How many of the steps shown so far were skipped; a step that a later attempt makes anew counts once."""

    def __init__(self) -> None:
        self._steps: set[int] = set()
        self._attempt: object = None

    def note(self, row: Mapping[str, Any]) -> int:
        """Count a step's row; give the number of skipped steps up to it."""
        if row.get("attempt") != self._attempt:
            self._attempt = row.get("attempt")
            self._steps = {step for step in self._steps if step < row["step"]}
        if row.get("skipped"):
            self._steps.add(row["step"])
        return len(self._steps)


def figures(row: Mapping[str, Any], skips: int = 0) -> str:
    """Write a step's numbers, short enough for 80 columns; `skips` counts the skipped steps up to it.

    >>> figures({"loss": 4.12345, "learning_rate": 0.002, "grad_norm": 1.5, "tokens_per_second": 5123.4,
    ...          "loss_scale": 65536.0, "memory_gib": 0.8123, "skipped": False})
    'loss 4.123  lr 2.0e-03  norm 1.50  scale 65536  5123 tok/s  0.8 GiB'
    >>> figures({"loss": 4.12345, "loss_scale": 2.0**27, "skipped": False}, skips=3)
    'loss 4.123  scale 2^27  3 skips'
    """
    parts = [f"loss {number(row['loss'], '.3f')}"]
    for key, word, form in (("learning_rate", "lr", ".1e"), ("grad_norm", "norm", ".2f")):
        if row.get(key) is not None:
            parts.append(f"{word} {number(row[key], form)}")
    if row.get("loss_scale") is not None:
        parts.append(f"scale {spell_loss_scale(row['loss_scale'])}")
    if row.get("skipped"):
        parts.append("SKIPPED")
    elif skips:
        parts.append(f"{skips} skip{'s' * (skips > 1)}")
    if row.get("tokens_per_second") is not None:
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


def spell_metrics(metrics: Mapping[str, Any] | None) -> str:
    """Write the metrics of an evaluation, to stand behind its loss.

    >>> spell_metrics({"accuracy": 0.875, "perplexity": 12.3456}), spell_metrics(None)
    ('  accuracy 0.8750  perplexity 12.35', '')
    """
    parts = []
    for name, value in (metrics or {}).items():
        is_small = isinstance(value, str) or abs(value) < 10
        parts.append(f"  {name} {number(value, '.4f' if is_small else '.4g')}")
    return "".join(parts)


def spell_loss_scale(value: Any) -> str:
    """Write a loss scale; beyond six digits a power of two is shorter, and exact.

    >>> [spell_loss_scale(value) for value in (65536.0, 2.0**27, 0.25, "inf", None)]
    ['65536', '2^27', '0.25', 'inf', 'None']
    """
    if not isinstance(value, (int, float)):
        return str(value)
    fraction, exponent = math.frexp(value)
    return f"2^{exponent - 1}" if value >= 1e6 and fraction == 0.5 else format(value, "g")


def describe(event: Mapping[str, Any]) -> str | None:
    """Say an event in words; None for those that are not for people."""
    at = f"step {event.get('step')}"
    match event["kind"]:
        case "notice":
            return str(event.get("text"))
        case "preflight":
            return "\n".join(told(read_findings(event.get("findings", ())))) or None
        case "training_started":
            of = f" of {event['max_steps']}" if event.get("max_steps") else ""
            samples = f", {event['samples']} samples" if event.get("samples") is not None else ""
            return f"training from step {event['step']}{of}{samples}" if event["step"] else f"training{samples}"
        case "audit":
            return "audit passed: what runs is what was planned" if event.get("passed") else "audit FAILED"
        case "evaluated" if event.get("eval_loss") is not None:
            best = event.get("best_step")
            of = at if best is None else f"best model, of step {best}"
            return f"{of}  evaluation loss {number(event['eval_loss'], '.4f')}{spell_metrics(event.get('metrics'))}"
        case "stopped_early":
            best = f"{event.get('metric')} was best at step {event.get('best_step')}, {number(event['best'], '.4g')}"
            return f"{at}  stopped early: {best}, and no better in {event.get('patience')} evaluations since"
        case "checkpoint_saved":
            return f"{at}  saved {event.get('name')}"
        case "save_failed":
            in_a_row = f" ({event['in_a_row']} in a row)" if event.get("in_a_row", 1) > 1 else ""
            return f"{at}  NOT SAVED{in_a_row}: {event.get('problem')}"
        case "step_skipped":
            return f"{at}  skipped: {event.get('reason')} (loss scale {spell_loss_scale(event.get('loss_scale'))})"
        case "alarm" if event.get("what") == "skip_rate":
            share = f"{number(event.get('share', '?'), '.0%')} of the last {event.get('window')} steps"
            return f"{at}  ALARM: {share} were skipped by overflow. {event.get('remedy')}"
        case "alarm":
            return f"{at}  ALARM: {event.get('what')}. {event.get('remedy')}"
        case "health":
            return f"{at}  {event.get('code')}: {event.get('reason')}"
        case "autopsy":
            return f"{at}  {event.get('cause')} (incidents/{event.get('incident')})"
        case "plan_changed" if event["changes"]:
            listed = ", ".join(f"{change['key']} {change['was']} -> {change['now']}" for change in event["changes"])
            return f"the plan is changed: {listed}"
        case "recovered":
            seconds = number(event.get("seconds", "?"), ".1f")
            return f"{at}  the first after attempt {event.get('from_attempt')} broke, {seconds} s ago"
        case "stop_requested" if "step" in event:
            return f"{at}  stop requested by {event.get('by')}"
        case _:
            return None
