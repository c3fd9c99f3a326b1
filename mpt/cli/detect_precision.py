"""`mpt detect-precision`: what the devices compute, and which precision mpt would train in, with its reasons."""

import json as json_module
import os
import textwrap
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from mpt.hardware.machine import Device, Machine
    from mpt.planning.decision import Decision
    from mpt.terms import Precision

WIDTH = 80


def detect_precision(
    machine: Annotated[
        str | None,
        typer.Option(
            "--machine", metavar="SPEC", help="A machine by name (T4, 8xH100, cpu) or file, instead of this one."
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what the devices compute and which precision `auto` chooses, with the reason."""
    from mpt.hardware.detect import detect_machine
    from mpt.hardware.specs import parse_machine
    from mpt.planning.precision import choose_precision

    found = detect_machine(os.environ) if machine is None else parse_machine(machine)
    decision = choose_precision(None, found)
    if json:
        print(json_module.dumps(to_json_object(found, decision), indent=2, allow_nan=False))
    else:
        print(describe(found, decision))


def to_json_object(machine: "Machine", decision: "Decision[Precision]") -> dict[str, Any]:
    """The machine, whole, and the decision beside it; `--machine FILE` reads it back."""
    from mpt.hardware.machine_json import machine_to_json

    return {
        **machine_to_json(machine),
        "precision": decision.value,
        "reason": decision.reason,
        "rejected": [{"precision": option.value, "reason": option.reason} for option in decision.rejected],
    }


def describe(machine: "Machine", decision: "Decision[Precision]") -> str:
    """The same for a person: equal devices once, with their number."""
    lines = []
    for device, count in _counted(machine.devices):
        lines += _device_lines(device, count)
    if machine.nodes > 1:
        lines.append(f"{machine.nodes} nodes like this: {machine.device_count} devices")
    lines += [_wrapped("note: ", note) for note in machine.notes]
    lines += ["", f"precision: {decision.value}", _wrapped("  because ", decision.reason)]
    lines += [_wrapped(f"  not {option.value}: ", option.reason) for option in decision.rejected]
    return "\n".join(lines)


def _counted(devices: Iterable["Device"]) -> list[tuple["Device", int]]:
    """Group devices that differ only in their place."""
    groups: dict[tuple[object, ...], list[Device]] = {}
    for device in devices:
        alike = (device.name, device.memory_gib, device.native, device.compute_capability, device.architecture)
        groups.setdefault(alike, []).append(device)
    return [(group[0], len(group)) for group in groups.values()]


def _device_lines(device: "Device", count: int) -> list[str]:
    facts = [device.generation]
    if device.compute_capability is not None:
        facts.append("compute capability {}.{}".format(*device.compute_capability))
    if device.architecture is not None:
        facts.append(device.architecture)
    facts.append("memory unknown" if device.memory_gib is None else f"{device.memory_gib:.1f} GiB")
    if device.bandwidth_gb_s is not None:
        facts.append(f"{device.bandwidth_gb_s:g} GB/s")
    lines = [f"{count} x {device.name}" if count > 1 else device.name, f"  {', '.join(facts)}"]
    lines += _feature_lines(device)
    if device.peak_tflops:
        peaks = ", ".join(f"{name} {rate:g}" for name, rate in device.peak_tflops.items())
        lines.append(_wrapped("  peak      ", f"{peaks} TFLOPS (dense)"))
    lines += [_wrapped("  note      ", note) for note in device.notes]
    return lines


def _feature_lines(device: "Device") -> list[str]:
    from mpt.terms import Feature

    absent = [feature for feature in Feature if feature not in (*device.native, *device.emulated)]
    named: list[tuple[str, Iterable[Feature]]] = [
        ("native", device.native), ("emulated", device.emulated), ("absent", absent)
    ]  # fmt: skip
    return [_wrapped(f"  {label:<10}", ", ".join(features)) for label, features in named if features]


def _wrapped(label: str, text: str) -> str:
    indent = " " * min(len(label), 12)
    return textwrap.fill(label + text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
