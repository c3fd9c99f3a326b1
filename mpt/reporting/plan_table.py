"""The long form of a plan: every value, who decided it, why, and what was rejected."""

import json
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from mpt.planning.engines import without_engine
from mpt.planning.explain import count
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
        console.print(Text.assemble((f"{key}: ", "bold"), (shown(decision.value), "cyan"), f"  ({decision.origin})"))
        console.print(Padding(Text(decision.reason), (0, 0, 0, 4)))
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


def shown(value: Any) -> str:
    """Write a value as a recipe would.

    >>> shown(True), shown(None), shown({"optimizer": "cpu"}), shown("bf16")
    ('true', 'none', '{"optimizer": "cpu"}', 'bf16')
    """
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value)
