"""A Machine as JSON and back: `mpt detect-precision --json` writes it, `--machine FILE` and run directories read it.

What is written is everything, and reading it gives an equal Machine. A key that is no part of a machine is refused: a
misspelt `memory_gb` would otherwise be memory that silently is unknown. The decision that `detect-precision` writes
beside the machine is skipped.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from mpt.errors import MptError
from mpt.hardware.machine import Device, Machine
from mpt.terms import DeviceKind, Feature

DECISION_KEYS = frozenset({"precision", "reason", "rejected"})

Positive = Annotated[FiniteFloat, Field(gt=0)]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _DeviceRecord(_Record):
    name: str
    kind: DeviceKind
    generation: str
    memory_gib: Positive | None
    native: tuple[Feature, ...]
    emulated: tuple[Feature, ...] = ()
    compute_capability: Annotated[str, Field(pattern=r"^\d+\.\d+$")] | None = None
    architecture: str | None = None
    index: int | None = None
    uuid: str | None = None
    is_mig: bool = False
    is_known: bool = True
    peak_tflops: dict[str, Positive] = {}
    bandwidth_gb_s: Positive | None = None
    notes: tuple[str, ...] = ()


class _MachineRecord(_Record):
    devices: Annotated[tuple[_DeviceRecord, ...], Field(min_length=1)]
    nodes: Annotated[int, Field(ge=1)] = 1
    host_memory_gib: Positive | None = None
    cpu_cores: Annotated[int, Field(ge=1)] | None = None
    source: str = "detected"
    notes: tuple[str, ...] = ()


def machine_to_json(machine: Machine) -> dict[str, Any]:
    """Every field, ready for json.dumps; a compute capability is written "9.0"."""
    written = asdict(machine)
    for device in written["devices"]:
        capability = device["compute_capability"]
        device["compute_capability"] = None if capability is None else "{}.{}".format(*capability)
    return written


def machine_from_json(data: object, origin: str) -> Machine:
    """Read what `machine_to_json` wrote. Raises MptError with all that is wrong; `origin` is the file's name there."""
    if isinstance(data, Mapping):
        data = {key: value for key, value in data.items() if key not in DECISION_KEYS}
    try:
        record = _MachineRecord.model_validate(data)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, found['loc'])) or 'the file'}: {found['msg']}" for found in error.errors()]
        raise MptError(
            "\n".join(f"{origin}: {problem}" for problem in problems),
            remedy="`mpt detect-precision --json > FILE` writes a machine as it must be.",
        ) from None
    devices = tuple(_to_device(device) for device in record.devices)
    if len({device.kind for device in devices}) > 1:
        raise MptError(
            f"{origin}: devices of several kinds in one machine: {', '.join(sorted({d.kind for d in devices}))}",
            remedy="Describe machines whose devices share one driver stack.",
        )
    return Machine(**{**dict(record), "devices": devices})


def _to_device(record: _DeviceRecord) -> Device:
    capability = None
    if record.compute_capability is not None:
        major, minor = record.compute_capability.split(".")
        capability = (int(major), int(minor))
    return Device(**{**dict(record), "compute_capability": capability})
