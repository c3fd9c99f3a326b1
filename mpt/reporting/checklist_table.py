"""The checklist of a recipe as a table in the terminal."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mpt.planning.checklist import POINTS
from mpt.planning.checklist.point import Point, Status
from mpt.planning.plan import Plan
from mpt.reporting.finding import to_lines

MARKS = {Status.TICKED: ("ok", "green"), Status.GAIN: ("gain", "bold yellow"), Status.NOT_APPLICABLE: ("n/a", "dim")}
LEAST_GIB = 0.05


def print_checklist(plan: Plan, points: Sequence[Point]) -> None:
    """Print a plan's checklist on stdout, wrapped to the width of the terminal."""
    console = Console(highlight=False)
    memory = plan.memory
    capacity = "" if memory.capacity_gib is None else f" of {memory.capacity_gib:.1f}"
    fits = "" if memory.fits else ": DOES NOT FIT"
    console.print(
        Text.assemble((plan.name, "bold"), f" on {plan.machine.label}, {memory.peak_gib:.1f}{capacity} GiB{fits}\n")
    )
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(ratio=1, min_width=22)
    table.add_column(ratio=2)
    for point in points:
        mark, style = MARKS[point.status]
        dim = "dim" if point.status is Status.NOT_APPLICABLE else ""
        table.add_row(Text(mark, style), Text(point.title, dim), _said(point, dim))
    console.print(table)
    count = sum(point.status is Status.GAIN for point in points)
    console.print(
        f"\n{count} of {len(points)} points to gain" if count else f"\nnothing to gain in {len(points)} points"
    )


def checklist_reference() -> str:
    """List the points in Markdown, for the README."""
    rows = [f"| `{code}` | {title} |" for code, title, _ in POINTS]
    return "\n".join(["| code | what is looked at |", "|---|---|", *rows]) + "\n"


def _said(point: Point, style: str) -> Text:
    text = Text(point.reason, style)
    if point.status is Status.GAIN:
        gained = [gained for gained in (spell_speed(point.speed), spell_memory(point.memory_gib), point.gain) if gained]
        text.append(f"\n{'; '.join(gained)}")
        for line in to_lines(point.recipe):
            text.append(f"\n{line}", "cyan")
    return text


def spell_speed(speed: float | None) -> str:
    """Spell an upper bound.

    >>> spell_speed(1.98), spell_speed(1.004), spell_speed(None)
    ('multiplications at most 1.98 times as fast', '', '')
    """
    return "" if speed is None or speed < 1.01 else f"multiplications at most {speed:.2f} times as fast"


def spell_memory(gib: float | None) -> str:
    """Spell memory freed or taken; too little to tell is nothing.

    >>> spell_memory(6.04), spell_memory(-2), spell_memory(0.01), spell_memory(None)
    ('6.0 GiB less', '2.0 GiB more', '', '')
    """
    if gib is None or abs(gib) < LEAST_GIB:
        return ""
    return f"{abs(gib):.1f} GiB {'less' if gib > 0 else 'more'}"
