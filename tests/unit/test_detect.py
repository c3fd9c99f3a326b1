"""What drivers said becomes the right machine. The readings are what real drivers report; no driver is needed."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from mpt.hardware.detect import detect_machine, parse_torch_answer, read_kfd
from mpt.hardware.host import cgroup_limits, parse_cpuinfo, parse_meminfo
from mpt.hardware.machine import Machine
from mpt.hardware.readings import DriverReading, GpuRecord, HostReading, MigRecord, to_machine
from mpt.hardware.visible import visible_amd_ordinals, visible_ordinals
from mpt.terms import DeviceKind, Feature

MIB = 2**20
HOST = HostReading("Xeon", "x86_64", frozenset({"avx2"}), 64 * 2**30, 16, torch_version="2.13.0+cu130")


def gpu(name: str, capability: tuple[int, int], memory_mib: int, uuid: str = "GPU-0") -> GpuRecord:
    return GpuRecord(name, memory_mib * MIB, capability, uuid=uuid)


T4 = gpu("Tesla T4", (7, 5), 15360, "GPU-74")
V100 = gpu("Tesla V100-SXM2-16GB", (7, 0), 16384, "GPU-70")
A100 = gpu("NVIDIA A100-SXM4-80GB", (8, 0), 81920, "GPU-80")
RTX_4090 = gpu("NVIDIA GeForce RTX 4090", (8, 9), 24564)
L40S = gpu("NVIDIA L40S", (8, 9), 46068)
H100 = gpu("NVIDIA H100 80GB HBM3", (9, 0), 81559)
B200 = gpu("NVIDIA B200", (10, 0), 183359)
RTX_5090 = gpu("NVIDIA GeForce RTX 5090", (12, 0), 32607)


def on(*gpus: GpuRecord, environment: Mapping[str, str] | None = None, host: HostReading = HOST) -> Machine:
    return to_machine([DriverReading(DeviceKind.CUDA, gpus)], host, environment or {})


@pytest.mark.parametrize(
    ("record", "generation", "bf16", "fp8", "mxfp8"),
    [
        (T4, "Turing", False, False, False),
        (V100, "Volta", False, False, False),
        (A100, "Ampere", True, False, False),
        (RTX_4090, "Ada Lovelace", True, True, False),
        (L40S, "Ada Lovelace", True, True, False),
        (H100, "Hopper", True, True, False),
        (B200, "Blackwell", True, True, True),
        (RTX_5090, "Blackwell", True, True, False),
    ],
    ids=lambda value: value.name if isinstance(value, GpuRecord) else "",
)
def test_a_card_is_described_by_its_reading(
    record: GpuRecord, generation: str, bf16: bool, fp8: bool, mxfp8: bool
) -> None:
    machine = on(record)
    device = machine.devices[0]
    assert (device.name, device.generation, device.compute_capability) == (
        record.name, generation, record.compute_capability,
    )  # fmt: skip
    assert device.is_known
    assert device.memory_gib == (record.memory_bytes or 0) / 2**30
    assert [device.computes(f) for f in (Feature.BF16, Feature.FP8, Feature.MXFP8)] == [bf16, fp8, mxfp8]
    assert (machine.host_memory_gib, machine.cpu_cores, machine.notes) == (64, 16, ())


def test_unlike_gpus_are_named_and_the_weakest_decides() -> None:
    machine = on(V100, A100, A100)
    assert not machine.all_compute(Feature.BF16)
    assert machine.memory_gib == 16
    assert "1x Tesla V100-SXM2-16GB, 2x NVIDIA A100-SXM4-80GB" in machine.notes[0]


UUIDS = ["GPU-aaaa", "GPU-abbb", "GPU-cccc", None]


@pytest.mark.parametrize(
    ("value", "ordinals"),
    [
        (None, [0, 1, 2, 3]),
        ("", []),
        ("0", [0]),
        ("2,0", [2, 0]),
        (" 1 , 2 ", [1, 2]),
        ("1gpu2,2ampere", [1, 2]),
        ("+1", [1]),
        ("-1", []),
        ("1,-1,2", [1]),
        ("NoDevFiles", []),
        ("0,none,2", [0]),
        ("0,0", []),
        ("0,1,0", []),
        ("0,-1,0", [0]),
        ("4", []),
        ("0,9,1", [0]),
        ("0,,1", [0]),
        ("GPU-c", [2]),
        ("GPU-cccc,GPU-aa", [2, 0]),
        ("GPU-a", []),
        ("GPU-cccc,GPU-cccc", []),
        ("GPU-cccc,GPU-c", []),
        ("GPU-cccc,0", [2]),
        ("GPU-zz,GPU-cccc", []),
        ("0,GPU-cccc", [0]),
    ],
)
def test_the_visible_devices_are_those_that_torch_sees(value: str | None, ordinals: list[int]) -> None:
    assert visible_ordinals(value, UUIDS) == ordinals


@pytest.mark.slow
@pytest.mark.parametrize("value", ["", "2,0", "1gpu2,2ampere", "1,-1,2", "0,0", "0,none", "GPU-cccc,GPU-aa", "GPU-a"])
def test_torch_itself_reads_the_variable_so(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    theirs = torch.cuda._parse_visible_devices()
    if theirs and isinstance(theirs[0], str):
        theirs = torch.cuda._transform_uuid_to_ordinals(theirs, [uuid or "" for uuid in UUIDS])
    assert visible_ordinals(value, UUIDS) == theirs


@pytest.mark.parametrize(
    ("environment", "ordinals"),
    [
        ({}, [0, 1, 2, 3]),
        ({"HIP_VISIBLE_DEVICES": "2"}, [2]),
        ({"ROCR_VISIBLE_DEVICES": "2,3"}, [2, 3]),
        ({"ROCR_VISIBLE_DEVICES": "2,3", "HIP_VISIBLE_DEVICES": "1"}, [3]),
        ({"ROCR_VISIBLE_DEVICES": "2,3", "HIP_VISIBLE_DEVICES": "2"}, []),
        ({"HIP_VISIBLE_DEVICES": "1", "CUDA_VISIBLE_DEVICES": "0"}, [1]),
        ({"CUDA_VISIBLE_DEVICES": "0"}, [0]),
        ({"HIP_VISIBLE_DEVICES": ""}, []),
    ],
)
def test_amd_devices_are_chosen_in_two_steps(environment: dict[str, str], ordinals: list[int]) -> None:
    assert visible_amd_ordinals(environment, [None] * 4) == ordinals


def test_a_chosen_device_keeps_its_place_in_the_drivers_order() -> None:
    machine = on(T4, A100, environment={"CUDA_VISIBLE_DEVICES": "GPU-80"})
    assert [(device.name, device.index, device.uuid) for device in machine.devices] == [(A100.name, 1, "GPU-80")]


def test_numbers_on_a_box_of_unlike_gpus_are_read_in_pci_order_and_that_is_said() -> None:
    machine = on(T4, A100, environment={"CUDA_VISIBLE_DEVICES": "0"})
    assert machine.devices[0].name == T4.name
    assert "CUDA_DEVICE_ORDER=PCI_BUS_ID" in machine.notes[0]
    settled = on(T4, A100, environment={"CUDA_VISIBLE_DEVICES": "0", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"})
    assert settled.notes == ()


def test_hidden_gpus_leave_the_cpu_and_a_note() -> None:
    machine = on(H100, H100, environment={"CUDA_VISIBLE_DEVICES": ""})
    assert machine.is_cpu
    assert machine.notes == ("CUDA_VISIBLE_DEVICES='' hides all 2 GPUs: the CPU is used",)


def test_a_driver_without_a_device_leaves_the_cpu_and_a_note() -> None:
    reading = DriverReading(DeviceKind.CUDA, notes=("an NVIDIA driver without a device",))
    machine = to_machine([reading], HOST, {})
    assert machine.is_cpu
    assert machine.devices[0].name == "CPU (Xeon)"
    assert machine.memory_gib == 64
    assert machine.notes == ("an NVIDIA driver without a device", "no GPU found: the CPU is used")


def test_no_driver_leaves_the_cpu() -> None:
    machine = to_machine([], HOST, {})
    assert machine.is_cpu
    assert machine.notes == ("no GPU found: the CPU is used",)


def sliced(name: str = "NVIDIA A100-SXM4-80GB") -> GpuRecord:
    instances = (
        MigRecord("MIG-aaaa", 40192 * MIB, f"{name} MIG 3g.40gb", 42),
        MigRecord("MIG-bbbb", 9728 * MIB, f"{name} MIG 1g.10gb", 14),
    )
    return GpuRecord(name, 81920 * MIB, (8, 0), uuid="GPU-mig", is_mig_enabled=True, instances=instances)


@pytest.mark.parametrize(
    ("visible", "uuid"),
    [
        (None, "MIG-aaaa"),
        ("0", "MIG-aaaa"),
        ("GPU-mig", "MIG-aaaa"),
        ("MIG-b", "MIG-bbbb"),
        ("MIG-b,MIG-a", "MIG-bbbb"),
    ],
)
def test_a_process_sees_one_mig_instance(visible: str | None, uuid: str) -> None:
    machine = on(sliced(), environment={} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
    assert [device.uuid for device in machine.devices] == [uuid]
    assert machine.devices[0].is_mig


def test_a_mig_instance_has_its_own_memory_and_its_cards_capability() -> None:
    device = on(sliced(), environment={"CUDA_VISIBLE_DEVICES": "MIG-bbbb"}).devices[0]
    assert device.name == "NVIDIA A100-SXM4-80GB MIG 1g.10gb"
    assert device.memory_gib == 9.5
    assert device.compute_capability == (8, 0)
    assert device.is_known
    assert device.peak_tflops["bf16"] == pytest.approx(312 * 14 / 108, abs=0.05)  # rounded to one decimal


def test_cuda_shows_no_whole_gpu_beside_a_mig_instance() -> None:
    machine = on(A100, sliced())
    assert [device.uuid for device in machine.devices] == ["MIG-aaaa"]
    assert "one instance" in machine.notes[0]


def test_mig_mode_without_an_instance_is_no_device() -> None:
    empty = GpuRecord("NVIDIA A100-SXM4-80GB", 81920 * MIB, (8, 0), is_mig_enabled=True)
    machine = on(empty)
    assert machine.is_cpu
    assert "MIG mode without an instance" in machine.notes[0]
    assert [device.is_mig for device in on(empty, A100).devices] == [False]


def test_a_mig_uuid_that_is_not_there_leaves_the_cpu_and_a_note() -> None:
    machine = on(sliced(), environment={"CUDA_VISIBLE_DEVICES": "MIG-zzzz"})
    assert machine.is_cpu
    assert "MIG-zzzz" in machine.notes[0]


@pytest.mark.parametrize(("version", "is_said"), [("2.13.0+cpu", True), ("2.13.0", False), ("2.13.0+cu130", False)])
def test_a_torch_built_without_cuda_is_said(version: str, is_said: bool) -> None:
    host = HostReading("Xeon", "x86_64", frozenset(), None, 1, torch_version=version)
    assert any("without CUDA" in note for note in on(T4, host=host).notes) is is_said


def test_memory_that_the_driver_does_not_state_is_unknown() -> None:
    machine = on(GpuRecord("NVIDIA GB10", None, (12, 1)))
    assert machine.memory_gib is None
    assert "does not say" in machine.notes[0]


def test_an_answer_from_torch_is_not_filtered_again() -> None:
    line = (
        '[{"name": "Orin", "memory_bytes": 1073741824, "uuid": null, "major": 8, "minor": 7,'
        ' "has_bfloat16_conversions": false, "has_matrix_unit": false}]'
    )
    reading = parse_torch_answer(DeviceKind.CUDA, f"a library says hello\n{line}\n", ("NVML said no",))
    machine = to_machine([reading], HOST, {"CUDA_VISIBLE_DEVICES": "3"})
    assert machine.devices[0].compute_capability == (8, 7)
    assert machine.devices[0].computes(Feature.BF16)
    assert machine.notes[0] == "NVML said no"


def test_an_apple_gpu_is_judged_by_its_chip() -> None:
    reading = DriverReading(DeviceKind.MPS, (GpuRecord("Apple M3 Pro", 2**35, architecture="15"),))
    device = to_machine([reading], HOST, {}).devices[0]
    assert (device.kind, device.is_known, device.computes(Feature.BF16)) == (DeviceKind.MPS, True, True)


UNIQUE_ID = "21b6d61638a86f8c"  # as rocminfo prints one; the kernel has it in decimal


def write_kfd(root: Path) -> Path:
    """A topology as the kernel shows it: a CPU, two GPUs of which one is open to us."""
    nodes = root / "nodes"
    texts = {
        "0": "cpu_cores_count 48\nsimd_count 0\ngfx_target_version 0\n",
        "1": f"simd_count 1216\ngfx_target_version 90402\ndrm_render_minor 128\nunique_id {int(UNIQUE_ID, 16)}\n",
        "2": "simd_count 1216\ngfx_target_version 90402\ndrm_render_minor 129\nunique_id 5\n",
    }
    for number, text in texts.items():
        bank = nodes / number / "mem_banks/0"
        bank.mkdir(parents=True)
        (nodes / number / "properties").write_text(text)
        (bank / "properties").write_text(f"heap_type {0 if number == '0' else 1}\nsize_in_bytes 206141652992\n")
    (root / "dev/dri").mkdir(parents=True)
    (root / "dev/dri/renderD128").touch()
    product = root / "sys/class/drm/renderD128/device"
    product.mkdir(parents=True)
    (product / "product_name").write_text("AMD Instinct MI300X OAM\n")
    return nodes


def test_amd_gpus_are_read_from_the_kernel(tmp_path: Path) -> None:
    reading = read_kfd(write_kfd(tmp_path), tmp_path)
    machine = to_machine([reading], HOST, {})
    assert [device.name for device in machine.devices] == ["AMD Instinct MI300X OAM"]
    device = machine.devices[0]
    assert (device.kind, device.architecture, device.uuid) == (DeviceKind.ROCM, "gfx942", f"GPU-{UNIQUE_ID}")
    assert device.memory_gib == pytest.approx(191.98, abs=0.01)  # GiB to two decimals
    assert device.computes(Feature.FP8)


def test_no_amd_driver_is_no_amd_gpu(tmp_path: Path) -> None:
    assert read_kfd(tmp_path / "none", tmp_path).gpus == ()


def test_a_cpu_has_the_flags_that_all_its_cores_have() -> None:
    assert parse_cpuinfo("") == ("", frozenset())
    assert parse_cpuinfo("model name\t: Xeon\nflags\t\t: avx2 amx_bf16\n")[1] == {"avx2", "amx_bf16"}
    assert parse_cpuinfo("processor : 0\nFeatures\t: fp asimdhp bf16\n") == ("", frozenset({"fp", "asimdhp", "bf16"}))
    assert parse_meminfo("nothing") is None


def test_the_limits_of_every_control_group_above_are_read(tmp_path: Path) -> None:
    group = tmp_path / "sys/fs/cgroup/slurm/job"
    group.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/slurm/job\n")
    (group / "memory.max").write_text("max\n")
    (group.parent / "memory.max").write_text("1073741824\n")
    assert cgroup_limits(tmp_path) == [1073741824]


def test_this_computer_is_described_without_a_device() -> None:
    machine = detect_machine({**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert machine.cpu_cores == len(os.sched_getaffinity(0))
    assert machine.source == "detected"


@pytest.mark.gpu
def test_nvml_and_torch_describe_the_same_gpus() -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    machine = detect_machine(os.environ)
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    assert [d.compute_capability for d in machine.devices] == [(p.major, p.minor) for p in properties]
    for device, theirs in zip(machine.devices, properties, strict=True):
        # NVML counts what the driver keeps for itself: up to 3 per cent more.
        assert device.memory_gib == pytest.approx(theirs.total_memory / 2**30, rel=0.03)


def test_detection_does_not_import_torch() -> None:
    script = "import os, sys; from mpt.hardware.detect import detect_machine; detect_machine(os.environ); "
    script += "sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    assert subprocess.run([sys.executable, "-c", script], env=environment, check=False).returncode == 0
