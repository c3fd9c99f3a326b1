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

from mpt.reporting.live import describe, figures, live_view
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
        ({"kind": "training_started", "step": 0, "max_steps": None, "samples": None}, "training"),
        ({"kind": "audit", "passed": False}, "audit FAILED"),
        ({"kind": "non_finite", "step": 3, "what": "loss", "value": "nan"}, "step 3  loss is nan"),
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
