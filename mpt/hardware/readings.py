"""What drivers said, as plain values, and the Machine that follows from it. Pure: `mpt.hardware.detect` asks."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mpt.hardware.capability import Capability, apple_capability, cpu_capability, intel_capability
from mpt.hardware.machine import Device, Machine
from mpt.hardware.table import MigShare, build_gpu
from mpt.hardware.visible import visible_amd_ordinals, visible_mig, visible_ordinals
from mpt.terms import DeviceKind

BYTES_PER_GIB = 2**30


@dataclass(frozen=True, slots=True)
class MigRecord:
    """A MIG instance as NVML describes it. `name` ends in its profile: "NVIDIA A100-SXM4-40GB MIG 1g.5gb"."""

    uuid: str | None
    memory_bytes: int | None
    name: str = ""
    multiprocessors: int | None = None


@dataclass(frozen=True, slots=True)
class GpuRecord:
    """A GPU as its driver describes it. `instances` are the MIG instances that exist where `is_mig_enabled`."""

    name: str
    memory_bytes: int | None
    compute_capability: tuple[int, int] | None = None
    architecture: str | None = None
    uuid: str | None = None
    is_mig_enabled: bool = False
    instances: tuple[MigRecord, ...] = ()
    has_bfloat16_conversions: bool = False  # torch.xpu's property
    has_matrix_unit: bool = False


@dataclass(frozen=True, slots=True)
class DriverReading:
    """One driver's answer: its GPUs, in the driver's own order, and what went wrong.

    `is_filtered` is True where the environment's choice of devices is already applied (an answer from torch).
    """

    kind: DeviceKind
    gpus: tuple[GpuRecord, ...] = ()
    is_filtered: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class HostReading:
    """The computer around the devices. `cpu_flags` are /proc/cpuinfo's; `torch_version` is the installed package's."""

    cpu_name: str
    architecture: str
    cpu_flags: frozenset[str]
    memory_bytes: int | None
    cpu_cores: int
    torch_version: str | None = None
    macos_major: int | None = None


def to_machine(readings: Sequence[DriverReading], host: HostReading, environment: Mapping[str, str]) -> Machine:
    """Describe the machine that a training process started in `environment` will see.

    The first reading with a visible GPU is the machine; with none, it is the CPU, and the notes say why.
    """
    notes: list[str] = []
    devices: tuple[Device, ...] = ()
    for reading in readings:
        devices, said = _visible_devices(reading, environment)
        notes += [*reading.notes, *said]
        if devices:
            break
    if not devices:
        if not any(reading.gpus for reading in readings):
            notes.append("no GPU found: the CPU is used")
        devices = (to_cpu_device(host),)
    notes += _notes_on(devices, host)
    return Machine(
        devices=devices,
        host_memory_gib=_gib(host.memory_bytes),
        cpu_cores=host.cpu_cores,
        source="detected",
        notes=tuple(notes),
    )


def to_cpu_device(host: HostReading, memory_share: float = 1.0) -> Device:
    """The CPU as a whole as one device; `memory_share` is its part of the memory where several processes share it."""
    capability = cpu_capability(host.architecture, host.cpu_flags)
    memory_gib = _gib(host.memory_bytes)
    return Device(
        name=f"CPU ({host.cpu_name})" if host.cpu_name else "CPU",
        kind=DeviceKind.CPU,
        generation=capability.generation,
        memory_gib=None if memory_gib is None else memory_gib * memory_share,
        native=capability.native,
        emulated=capability.emulated,
    )


def _visible_devices(reading: DriverReading, environment: Mapping[str, str]) -> tuple[tuple[Device, ...], list[str]]:
    if reading.kind is DeviceKind.MPS:
        return tuple(_to_device(reading.kind, gpu, 0) for gpu in reading.gpus), []
    value = environment.get("CUDA_VISIBLE_DEVICES")
    if reading.kind is DeviceKind.CUDA and not reading.is_filtered and value is not None and value.startswith("MIG-"):
        return _named_mig_instance(reading, value)
    uuids = [gpu.uuid for gpu in reading.gpus]
    if reading.is_filtered or reading.kind is DeviceKind.XPU:
        ordinals = list(range(len(uuids)))
    elif reading.kind is DeviceKind.ROCM:
        ordinals = visible_amd_ordinals(environment, uuids)
    else:
        ordinals = visible_ordinals(value, uuids)
    if reading.gpus and not ordinals:
        return (), [f"{_hiding_variables(reading.kind, environment)} hides all {len(uuids)} GPUs: the CPU is used"]
    visible = [(ordinal, reading.gpus[ordinal]) for ordinal in ordinals]
    notes = _order_note(reading, value, environment)
    if any(gpu.is_mig_enabled for _, gpu in visible):
        devices, said = _with_mig(visible)
        return devices, notes + said
    return tuple(_to_device(reading.kind, gpu, ordinal) for ordinal, gpu in visible), notes


def _named_mig_instance(reading: DriverReading, value: str) -> tuple[tuple[Device, ...], list[str]]:
    owned = [(ordinal, gpu, mig) for ordinal, gpu in enumerate(reading.gpus) for mig in gpu.instances]
    chosen = visible_mig(value, [mig.uuid for _, _, mig in owned])
    if not chosen:
        return (), [f"CUDA_VISIBLE_DEVICES={value} names no MIG instance of this machine: the CPU is used"]
    ordinal, gpu, mig = owned[chosen[0]]
    notes = [_ONE_INSTANCE] if len(chosen) > 1 else []
    return (_to_device(reading.kind, gpu, ordinal, mig),), notes


_ONE_INSTANCE = "MIG: CUDA shows a process one instance, the first of those named, and no whole GPU beside it"


def _with_mig(visible: Sequence[tuple[int, GpuRecord]]) -> tuple[tuple[Device, ...], list[str]]:
    """CUDA enumerates a single compute instance, and no whole GPU beside one (NVIDIA MIG user guide, "CUDA Device
    Enumeration"). A GPU in MIG mode without an instance is nothing to CUDA."""
    instances = [(ordinal, gpu, mig) for ordinal, gpu in visible for mig in gpu.instances if gpu.is_mig_enabled]
    if instances:
        ordinal, gpu, mig = instances[0]
        notes = [_ONE_INSTANCE] if len(instances) > 1 or len(visible) > 1 else []
        return (_to_device(DeviceKind.CUDA, gpu, ordinal, mig),), notes
    whole = tuple(_to_device(DeviceKind.CUDA, gpu, ordinal) for ordinal, gpu in visible if not gpu.is_mig_enabled)
    note = f"{len(visible) - len(whole)} GPU in MIG mode without an instance: it can't be used until one is created"
    return whole, [note]


def _to_device(kind: DeviceKind, gpu: GpuRecord, ordinal: int, mig: MigRecord | None = None) -> Device:
    share = None
    if mig is not None:
        share = MigShare(profile=mig.name.rpartition(" MIG ")[2], multiprocessors=mig.multiprocessors)
    return build_gpu(
        gpu.name,
        kind,
        memory_gib=_gib((mig or gpu).memory_bytes),
        compute_capability=gpu.compute_capability,
        architecture=gpu.architecture,
        capability=_stated_capability(kind, gpu),
        index=ordinal,
        uuid=(mig or gpu).uuid,
        mig=share,
    )


def _stated_capability(kind: DeviceKind, gpu: GpuRecord) -> Capability | None:
    """The capability of a GPU whose driver states it outright; None where the tables must say."""
    if kind is DeviceKind.XPU:
        return intel_capability(
            has_bfloat16_conversions=gpu.has_bfloat16_conversions, has_matrix_unit=gpu.has_matrix_unit
        )
    if kind is DeviceKind.MPS:
        return apple_capability(gpu.name, int(gpu.architecture) if gpu.architecture else None)
    return None


def _order_note(reading: DriverReading, value: str | None, environment: Mapping[str, str]) -> list[str]:
    """CUDA counts the fastest GPU first by default, NVML in PCI order: numbers are ambiguous where GPUs differ."""
    is_numbered = bool(value) and not str(value).startswith("GPU-")
    if reading.kind is not DeviceKind.CUDA or reading.is_filtered or not is_numbered:
        return []
    if len({gpu.name for gpu in reading.gpus}) < 2 or environment.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID":
        return []
    return [
        "unlike GPUs: CUDA_VISIBLE_DEVICES is read in PCI order, as nvidia-smi counts; "
        "mpt starts training with CUDA_DEVICE_ORDER=PCI_BUS_ID"
    ]


def _notes_on(devices: Sequence[Device], host: HostReading) -> list[str]:
    notes = []
    names = Counter(device.name for device in devices)
    if len(names) > 1:
        listed = ", ".join(f"{count}x {name}" for name, count in names.items())
        notes.append(f"unlike devices ({listed}): all of them run what every one of them computes")
    build = (host.torch_version or "").partition("+")[2]
    kind = devices[0].kind
    if kind is DeviceKind.CUDA and build.startswith(("cpu", "rocm", "xpu")):
        notes.append(f"the installed torch {host.torch_version} was built without CUDA: it will not see these GPUs")
    if kind is DeviceKind.ROCM and build and not build.startswith("rocm"):
        notes.append(f"the installed torch {host.torch_version} was built without ROCm: it will not see these GPUs")
    if any(device.memory_gib is None for device in devices):
        notes.append("the driver does not say how much memory a device has")
    return notes


def _hiding_variables(kind: DeviceKind, environment: Mapping[str, str]) -> str:
    names = ["CUDA_VISIBLE_DEVICES"]
    if kind is DeviceKind.ROCM:
        names = ["ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", *names]
    return " ".join(f"{name}={environment[name]!r}" for name in names if name in environment)


def _gib(size_bytes: int | None) -> float | None:
    return None if size_bytes is None else size_bytes / BYTES_PER_GIB
