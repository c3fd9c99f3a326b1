"""Ask the drivers of this computer. The only module that touches one; what follows from the answers is decided in
`mpt.hardware.readings`, which needs none.

NVML answers for NVIDIA, the kernel's KFD topology for AMD, torch itself (in a child process, as it takes seconds to
import) where neither can: Jetson and WSL without NVML, and Intel. A compiler such as /usr/local/bin/nvcc is no GPU.
"""

import json
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from mpt.hardware.host import read_host
from mpt.hardware.machine import Machine
from mpt.hardware.readings import DriverReading, GpuRecord, HostReading, MigRecord, to_machine
from mpt.terms import DeviceKind

TORCH_TIMEOUT_S = 120.0
KFD_NODES = Path("/sys/class/kfd/kfd/topology/nodes")


def detect_machine(environment: Mapping[str, str]) -> Machine:
    """Describe this computer as a training process started in `environment` will see it. Never raises for want of a
    device: without one the machine is its CPU, and the notes say why."""
    host = read_host()
    readings = [read_nvml()]
    if not readings[0].gpus and _has_nvidia_device():
        readings = [read_torch(DeviceKind.CUDA, environment, readings[0].notes)]
    readings.append(read_kfd(KFD_NODES, Path("/")))
    if not any(reading.gpus for reading in readings) and "+xpu" in (host.torch_version or ""):
        readings.append(read_torch(DeviceKind.XPU, environment))
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        readings.append(_apple_reading(host))
    return to_machine(readings, host, environment)


def read_nvml() -> DriverReading:
    """Ask NVML for every GPU, in PCI order; it knows nothing of CUDA_VISIBLE_DEVICES."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        # No library means no NVIDIA driver, which is nothing to tell. Anything else is a driver that is not well.
        is_absent = error.value == pynvml.NVML_ERROR_LIBRARY_NOT_FOUND
        return DriverReading(
            DeviceKind.CUDA, notes=() if is_absent else (f"the NVIDIA driver does not answer: {error}",)
        )
    try:
        return _read_gpus(pynvml)
    finally:
        pynvml.nvmlShutdown()


def read_kfd(nodes: Path, root: Path) -> DriverReading:
    """Ask the kernel for AMD GPUs: those whose render node this process may open, as a container gets some of them."""
    numbered = sorted((int(node.name), node) for node in nodes.glob("[0-9]*") if node.name.isdigit())
    gpus = [gpu for _, node in numbered if (gpu := _kfd_gpu(node, root)) is not None]
    return DriverReading(DeviceKind.ROCM, tuple(gpus))


def read_torch(kind: DeviceKind, environment: Mapping[str, str], notes: tuple[str, ...] = ()) -> DriverReading:
    """Ask torch, in a child process that sees `environment`."""
    try:
        answer = subprocess.run(
            [sys.executable, "-c", _ASK_TORCH, kind.value],
            capture_output=True, text=True, timeout=TORCH_TIMEOUT_S, env=dict(environment), check=True,
        )  # fmt: skip
        return parse_torch_answer(kind, answer.stdout, notes)
    except subprocess.TimeoutExpired:
        problem = f"it took more than {TORCH_TIMEOUT_S:.0f} s"
    except subprocess.CalledProcessError as error:
        problem = (error.stderr.strip().splitlines() or ["no message"])[-1]
    return DriverReading(kind, is_filtered=True, notes=(*notes, f"torch was asked for devices and failed: {problem}"))


def parse_torch_answer(kind: DeviceKind, stdout: str, notes: tuple[str, ...] = ()) -> DriverReading:
    """Read the last line that the child printed; libraries may have printed above it."""
    gpus = tuple(
        GpuRecord(
            name=record["name"],
            memory_bytes=record["memory_bytes"],
            compute_capability=(record["major"], record["minor"]) if kind is DeviceKind.CUDA else None,
            uuid=record["uuid"],
            has_bfloat16_conversions=record["has_bfloat16_conversions"],
            has_matrix_unit=record["has_matrix_unit"],
        )
        for record in json.loads(stdout.strip().splitlines()[-1])
    )
    said = (
        (*notes, "a GPU's device file exists, but torch sees no GPU") if kind is DeviceKind.CUDA and not gpus else notes
    )
    return DriverReading(kind, gpus, is_filtered=True, notes=said)


_ASK_TORCH = """
import json, sys
import torch
api = getattr(torch, sys.argv[1])
found = [api.get_device_properties(i) for i in range(api.device_count())]
print(json.dumps([{
    "name": p.name, "memory_bytes": p.total_memory, "uuid": str(p.uuid) if hasattr(p, "uuid") else None,
    "major": getattr(p, "major", None), "minor": getattr(p, "minor", None),
    "has_bfloat16_conversions": bool(getattr(p, "has_bfloat16_conversions", False)),
    "has_matrix_unit": bool(getattr(p, "has_subgroup_matrix_multiply_accumulate", False)),
} for p in found]))
"""


def _read_gpus(pynvml) -> DriverReading:  # type: ignore[no-untyped-def]  # the module, imported only when asked
    gpus, notes = [], []
    count = pynvml.nvmlDeviceGetCount()
    for index in range(count):
        try:
            gpus.append(_read_gpu(pynvml, pynvml.nvmlDeviceGetHandleByIndex(index)))
        except pynvml.NVMLError as error:
            notes.append(f"NVIDIA GPU {index} does not answer ({error}): it is left out")
    if count == 0:
        notes.append("an NVIDIA driver without a device")
    return DriverReading(DeviceKind.CUDA, tuple(gpus), notes=tuple(notes))


def _read_gpu(pynvml, handle: object) -> GpuRecord:  # type: ignore[no-untyped-def]
    try:
        memory_bytes = pynvml.nvmlDeviceGetMemoryInfo(handle).total
    except pynvml.NVMLError_NotSupported:  # memory shared with the CPU: GB10, Jetson
        memory_bytes = None
    try:
        is_mig_enabled = pynvml.nvmlDeviceGetMigMode(handle)[0] == pynvml.NVML_DEVICE_MIG_ENABLE
    except pynvml.NVMLError:
        is_mig_enabled = False
    return GpuRecord(
        name=_string(pynvml.nvmlDeviceGetName(handle)),
        memory_bytes=memory_bytes,
        compute_capability=tuple(pynvml.nvmlDeviceGetCudaComputeCapability(handle)),
        uuid=_string(pynvml.nvmlDeviceGetUUID(handle)),
        is_mig_enabled=is_mig_enabled,
        instances=tuple(_read_instances(pynvml, handle)) if is_mig_enabled else (),
    )


def _read_instances(pynvml, handle: object) -> list[MigRecord]:  # type: ignore[no-untyped-def]
    instances = []
    for place in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        try:
            mig = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, place)
        except pynvml.NVMLError:  # an empty place
            continue
        try:
            multiprocessors = pynvml.nvmlDeviceGetAttributes_v2(mig).multiprocessorCount
        except pynvml.NVMLError:
            multiprocessors = None
        instances.append(
            MigRecord(
                uuid=_string(pynvml.nvmlDeviceGetUUID(mig)),
                memory_bytes=pynvml.nvmlDeviceGetMemoryInfo(mig).total,
                name=_string(pynvml.nvmlDeviceGetName(mig)),
                multiprocessors=multiprocessors,
            )
        )
    return instances


def _string(value: str | bytes) -> str:
    """Old versions of the bindings return bytes."""
    return value.decode() if isinstance(value, bytes) else value


def _has_nvidia_device() -> bool:
    """Whether a device file says that there is a GPU though NVML does not: Jetson, and WSL with its driver."""
    dev = Path("/dev")
    return (
        any(re.fullmatch(r"nvidia\d+", path.name) for path in dev.glob("nvidia*"))
        or any(dev.glob("nvhost-gpu*"))
        or (dev / "nvgpu").exists()
        or ((dev / "dxg").exists() and Path("/usr/lib/wsl/lib/libcuda.so.1").exists())
    )


def _kfd_gpu(node: Path, root: Path) -> GpuRecord | None:
    """A node of the topology as a GPU; None for a CPU, or for a GPU that is closed to this process."""
    try:
        properties = dict(line.split(maxsplit=1) for line in (node / "properties").read_text().splitlines())
    except (OSError, ValueError):
        return None
    version = int(properties.get("gfx_target_version", "0"))
    if version == 0:
        return None
    render = f"renderD{properties.get('drm_render_minor', '')}"
    try:
        (root / "dev/dri" / render).open("rb").close()
    except OSError:
        return None
    product = root / "sys/class/drm" / render / "device/product_name"
    return GpuRecord(
        name=(product.read_text().strip() if product.exists() else "") or "AMD GPU",
        memory_bytes=_kfd_memory_bytes(node),
        architecture=gfx_name(version),
        uuid=f"GPU-{int(properties.get('unique_id', '0')):016x}",
    )


def gfx_name(target_version: int) -> str:
    """The gfx name of the kernel's packed number: major, minor and stepping, the last two in hexadecimal.

    >>> [gfx_name(version) for version in (90402, 90010, 110000, 120001)]
    ['gfx942', 'gfx90a', 'gfx1100', 'gfx1201']
    """
    major, rest = divmod(target_version, 10_000)
    minor, stepping = divmod(rest, 100)
    return f"gfx{major}{minor:x}{stepping:x}"


def _kfd_memory_bytes(node: Path) -> int | None:
    """The device's own memory: heaps 1 and 2 of include/uapi/linux/kfd_sysfs.h (public, private), not 0, the host's."""
    total = 0
    for bank in node.glob("mem_banks/*/properties"):
        properties = dict(line.split(maxsplit=1) for line in bank.read_text().splitlines())
        total += int(properties["size_in_bytes"]) if properties.get("heap_type") in ("1", "2") else 0
    return total or None


def _apple_reading(host: HostReading) -> DriverReading:
    """The one GPU of an Apple chip; its memory is the computer's."""
    gpu = GpuRecord(host.cpu_name, host.memory_bytes, architecture=str(host.macos_major) if host.macos_major else None)
    return DriverReading(DeviceKind.MPS, (gpu,), notes=("unified memory: the GPU shares it with everything else",))
