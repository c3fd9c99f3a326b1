"""What is shown fits 80 columns, on a terminal and off it, and nothing that is shown can end a run."""

import io
import os
import pty
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from fcntl import ioctl
from pathlib import Path
from termios import TIOCSWINSZ
from typing import Any

import pytest

from mpt.reporting.live import SkipCount, describe, figures, live_view, spell_loss_scale
from tests.running.small_runs import PROGRAM, ROOT, SmallRun

ROW: dict[str, Any] = {
    "step": 7, "attempt": 1, "loss": 4.12345, "grad_norm": 12.5, "learning_rate": 2e-5, "loss_scale": 65536.0,
    "skipped": True, "tokens": 4096, "tokens_per_second": 51234.5, "step_time_s": 0.1, "memory_gib": 71.25,
}  # fmt: skip


def test_a_full_row_fits_80_columns() -> None:
    assert figures(ROW) == "loss 4.123  lr 2.0e-05  norm 12.50  scale 65536  SKIPPED  51234 tok/s  71.2 GiB"
    assert len(figures(ROW)) <= 80


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", None])
@pytest.mark.parametrize("key", ["grad_norm", "learning_rate", "loss_scale", "tokens_per_second", "memory_gib"])
def test_a_missing_or_non_finite_number_is_no_trouble(key: str, value: str | None) -> None:
    text = figures(ROW | {key: value})
    assert (value in text) if value else text.startswith("loss 4.123")


@pytest.mark.parametrize(
    ("skipped", "skips", "text"),
    [
        (False, 0, ""),
        (False, 1, "  1 skip"),
        (False, 12, "  12 skips"),
        (True, 1, "  SKIPPED"),
        (True, 12, "  SKIPPED"),
    ],
)
def test_the_loss_scale_stands_with_what_it_skipped_so_far(skipped: bool, skips: int, text: str) -> None:
    row = {"loss": 4.0, "loss_scale": 65536.0, "skipped": skipped}
    assert figures(row, skips) == f"loss 4.000  scale 65536{text}"


@pytest.mark.parametrize(
    ("scale", "text"),
    [(1.0, "1"), (0.125, "0.125"), (3000.0, "3000"), (2.0**19, "524288"), (2.0**20, "2^20"), (3e6, "3e+06")],
)  # fmt: skip
def test_a_loss_scale_is_short(scale: float, text: str) -> None:
    assert spell_loss_scale(scale) == text


def test_skips_are_counted_over_attempts_and_each_step_once() -> None:
    """Attempt 1 gets to step 4, attempt 2 goes on from step 2: of the steps after it, only the new ones count."""
    count = SkipCount()

    def skips_after(attempt: int, step: int, skipped: bool) -> int:
        return count.note({"attempt": attempt, "step": step, "skipped": skipped})

    assert [skips_after(1, step, step != 3) for step in (1, 2, 3, 4)] == [1, 2, 2, 3]
    assert [skips_after(2, step, step == 4) for step in (3, 4, 5)] == [2, 3, 3]
    assert count.note({"attempt": 2, "step": 6}) == 3


def test_plain_lines_tell_the_skips_that_they_leave_out() -> None:
    stream = io.StringIO()
    with live_view(stream) as view:
        view.attempt(1, None)
        view.event({"kind": "training_started", "step": 0, "max_steps": 4, "samples": 100})
        for step in (1, 2, 3, 4):
            view.row(ROW | {"step": step, "skipped": step in (2, 3)})
    first, last = stream.getvalue().splitlines()[1:]
    assert first == f"step 1/4  {figures(ROW | {'skipped': False})}"
    assert "scale 65536  2 skips" in last


def show(view: Any) -> None:
    view.attempt(2, "checkpoint-5")
    view.event({"kind": "phase", "phase": "setup"})
    view.event({"kind": "training_started", "step": 5, "max_steps": 8, "samples": 100})
    for step in (6, 7, 8):
        view.row(ROW | {"step": step})
    view.row({"step": 8, "attempt": 2, "eval_loss": 3.5})
    for event in (
        {"kind": "evaluated", "step": 8, "eval_loss": "nan"},
        {"kind": "checkpoint_saved", "step": 8, "name": "checkpoint-8"},
        {"kind": "notice", "text": "[bold]not markup[/]"},
        {"kind": "something_new", "step": 8},
    ):
        view.event(event)
    view.note("a note")


def test_without_a_terminal_there_are_plain_lines() -> None:
    stream = io.StringIO()
    with live_view(stream) as view:
        show(view)
    assert stream.getvalue().splitlines() == [
        "attempt 2, from checkpoint-5",
        "training from step 5 of 8, 100 samples",
        f"step 6/8  {figures(ROW)}",
        f"step 8/8  {figures(ROW)}",
        "step 8  evaluation loss nan",
        "step 8  saved checkpoint-8",
        "[bold]not markup[/]",
        "a note",
    ]


def test_a_stream_that_is_closed_meanwhile_is_no_trouble() -> None:
    stream = io.StringIO()
    with live_view(stream) as view:
        stream.close()
        show(view)


@pytest.mark.parametrize(
    ("event", "text"),
    [
        (
            {"kind": "save_failed", "step": 4, "problem": "runs/x can't be written: full", "in_a_row": 1},
            "step 4  NOT SAVED: runs/x can't be written: full",
        ),
        (
            {"kind": "save_failed", "step": 8, "problem": "runs/x can't be written: full", "in_a_row": 2},
            "step 8  NOT SAVED (2 in a row): runs/x can't be written: full",
        ),
        ({"kind": "training_started", "step": 0, "max_steps": None, "samples": None}, "training"),
        ({"kind": "audit", "passed": False}, "audit FAILED"),
        ({"kind": "health", "step": 3, "code": "N2", "reason": "loss is nan"}, "step 3  N2: loss is nan"),
        (
            {"kind": "step_skipped", "step": 3, "reason": "overflow: why", "loss_scale": 2.0**27},
            "step 3  skipped: overflow: why (loss scale 2^27)",
        ),
        (
            {"kind": "alarm", "step": 60, "what": "skip_rate", "share": 0.153, "window": 59, "remedy": "Do this."},
            "step 60  ALARM: 15% of the last 59 steps were skipped by overflow. Do this.",
        ),
        (
            {"kind": "alarm", "step": 60, "what": "something else", "remedy": "Do that."},
            "step 60  ALARM: something else. Do that.",
        ),
        ({"kind": "stop_requested", "step": 3, "by": "SIGTERM"}, "step 3  stop requested by SIGTERM"),
        ({"kind": "stop_requested", "by": "SIGTERM"}, None),
        ({"kind": "evaluated", "step": 3, "eval_loss": None}, None),
        ({"kind": "phase", "phase": "data"}, None),
    ],
)
def test_events_in_words(event: dict[str, Any], text: str | None) -> None:
    assert describe(event) == text


@pytest.mark.parametrize("columns", [80, 200])
def test_on_a_terminal_a_bar_shows_step_total_and_figures_and_no_line_is_too_long(
    new_run: Callable[..., SmallRun], columns: int
) -> None:
    run = new_run(step_s=0.1)
    terminal, end = pty.openpty()
    ioctl(end, TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = os.environ | {"SMALL_WORKER": '{"step_s": 0.1}', "TERM": "xterm", "PYTHONPATH": str(ROOT)}
    for name in ("COLUMNS", "LINES", "NO_COLOR"):
        environment.pop(name, None)
    process = subprocess.Popen(
        [*PROGRAM, str(run.runs_dir), "auto"], stdout=subprocess.DEVNULL, stderr=end, env=environment, cwd=ROOT
    )
    os.close(end)
    seen = b""
    while True:
        try:
            seen += os.read(terminal, 65536)
        except OSError:  # EIO: the other end was closed
            break
    os.close(terminal)
    assert process.wait() == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen.decode())
    lines = [line for line in re.split(r"[\r\n]+", text) if str(run.runs_dir) not in line]
    assert max(map(len, lines)) <= columns
    assert re.search(r"training ━+.* *\d+/20", text)
    assert re.search(r"^loss 0\.\d{3}  lr 1\.0e-03", "\n".join(lines), re.MULTILINE)
    assert "step 10  saved checkpoint-10" in text


def test_nothing_here_imports_torch() -> None:
    program = "import sys, mpt.reporting.live, mpt.reporting.summary; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "False\n"
    assert Path(ROOT, "mpt").is_dir()
