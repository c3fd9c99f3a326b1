"""The long form of a plan: every value, who decided it, why, and what was rejected."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from mpt.planning.engines import without_engine
from mpt.planning.explain import count
from mpt.planning.layers import count_layers
from mpt.planning.plan import Plan


def print_plan(plan: Plan) -> None:
    """Print the plan on stdout, wrapped to the width of the terminal."""
    console = Console(highlight=False)
    console.print(Text.assemble((plan.name, "bold"), f" on {plan.machine.label}"))
    facts = plan.facts
    console.print(
        f"{facts.model_type}: {count(facts.parameters)} parameters, {facts.layers} layers, hidden size "
        f"{facts.hidden_size}, vocabulary {facts.vocab_size} ({facts.source})\n"
    )
    for key, decision in plan.values.items():
        is_list = key == "layers" and decision.value is not None
        value = count_layers(decision.value) if is_list else shown(gathered(decision.value))
        console.print(Text.assemble((f"{key}: ", "bold"), (value, "cyan"), f"  ({decision.origin})"))
        if is_list:
            console.print(Padding(_layer_table(decision.value["modules"]), (0, 0, 0, 4)))
            continue
        style = "bold yellow" if decision.reason.startswith("EMULATED") else ""
        console.print(Padding(Text(decision.reason, style), (0, 0, 0, 4)))
        for option in decision.rejected:
            text = Text.assemble("not ", (shown(option.value), "cyan"), f": {option.reason}", style="dim")
            console.print(Padding(text, (0, 0, 0, 4)))
    _print_memory(console, plan)
    for note in (*plan.machine.notes, *plan.deepspeed_notes):
        console.print(f"note: {note}", soft_wrap=True)
    wishes = without_engine(plan)
    if wishes:
        console.print(f"note: this version plans {', '.join(wishes)} and can't train it yet", soft_wrap=True)


def _print_memory(console: Console, plan: Plan) -> None:
    memory = plan.memory
    capacity = "unknown" if memory.capacity_gib is None else f"{memory.capacity_gib:.1f} GiB"
    verdict = "fits" if memory.fits else "DOES NOT FIT"
    console.print(
        Text.assemble(("memory: ", "bold"), (f"{memory.peak_gib:.2f} GiB", "cyan"), f" of {capacity}  ({verdict})")
    )
    parts = ", ".join(f"{name} {gib:.2f}" for name, gib in memory.parts_gib.items() if gib >= 0.005)
    console.print(Padding(Text(f"a device, estimated: {parts}"), (0, 0, 0, 4)))


def _layer_table(listed: Sequence[Mapping[str, str]]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="cyan")
    table.add_column(justify="right")
    table.add_column(no_wrap=True, overflow="fold")
    table.add_column(style="dim")
    for name, precision, reason, number in group_layers(listed):
        table.add_row(precision, f"{number} x", name, reason)
    return table


def group_layers(listed: Sequence[Mapping[str, str]]) -> list[tuple[str, str, str, int]]:
    """Gather layers that differ in their numbers alone: (name with the numbers' range, precision, reason, how many).

    >>> names = ("h.0.up", "h.0.down", "h.1.up", "h.1.down", "h.3.up", "head")
    >>> group_layers([{"name": name, "precision": "fp8", "reason": "large"} for name in names])[:2]
    [('h.{0,1,3}.up', 'fp8', 'large', 3), ('h.{0,1}.down', 'fp8', 'large', 2)]
    """
    rows: list[Row] = [(entry["name"].split("."), entry["precision"], entry["reason"], 1) for entry in listed]
    for place in range(max((len(row[0]) for row in rows), default=0) - 1, -1, -1):
        rows = _merged(rows, place)
    return [(".".join(parts), precision, reason, number) for parts, precision, reason, number in rows]


Row = tuple[list[str], str, str, int]


def _merged(rows: Sequence[Row], place: int) -> list[Row]:
    """Merge the rows that differ in the number at one place of their names."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        parts, precision, reason, _ = row
        is_numbered = place < len(parts) and parts[place].isdigit()
        rest = [*parts[:place], "", *parts[place + 1 :]] if is_numbered else parts
        groups.setdefault((*rest, precision, reason), []).append(row)
    merged = []
    for group in groups.values():
        parts, precision, reason, _ = group[0]
        if len(group) > 1:
            parts = [*parts[:place], _ranges([int(row[0][place]) for row in group]), *parts[place + 1 :]]
        merged.append((parts, precision, reason, sum(row[3] for row in group)))
    return merged


def _ranges(numbers: Sequence[int]) -> str:
    """Write numbers in braces, three and more in a row as a range.

    >>> _ranges([0, 1, 2, 3, 7, 9, 10])
    '{0..3,7,9,10}'
    """
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    written = [f"{run[0]}..{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in runs]
    return f"{{{','.join(written)}}}"


def gathered(value: Any) -> Any:
    """Write the modules that a value lists as one name with the numbers' range, where they differ in it alone.

    >>> gathered({"layers": 2, "target_modules": ["h.0.up", "h.1.up"]})
    {'layers': 2, 'target_modules': ['h.{0,1}.up']}
    """
    if not isinstance(value, Mapping):
        return value
    same = {"precision": "", "reason": ""}
    return {
        key: [name for name, *_ in group_layers([{"name": name, **same} for name in listed])]
        if key in ("target_modules", "skipped") and isinstance(listed, list)
        else listed
        for key, listed in value.items()
    }


def shown(value: Any) -> str:
    """Write a value as a recipe would.

    >>> shown(True), shown(None), shown({"optimizer": "cpu"}), shown("bf16")
    ('true', 'none', '{"optimizer": "cpu"}', 'bf16')
    """
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value)
