"""Facts about a machine, as frozen values. Says nothing of what to do with them (`mpt.planning`), and asks no driver
(`mpt.hardware.detect`)."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from mpt.terms import DeviceKind, Feature


@dataclass(frozen=True, slots=True)
class Device:
    """One device as torch sees it: a GPU, a MIG instance, an MI250X die (GCD), or the CPU as a whole.

    `native` is what the silicon computes, `emulated` what runs, slower, by other means. A feature in neither is absent.
    `is_known` is False for a card that the table does not list: it is then judged by its compute capability alone.
    `peak_tflops` holds dense peaks by precision, with fp32 accumulation; empty where unknown.
    """

    name: str
    kind: DeviceKind
    generation: str
    memory_gib: float | None
    native: tuple[Feature, ...]
    emulated: tuple[Feature, ...] = ()
    compute_capability: tuple[int, int] | None = None
    architecture: str | None = None  # AMD's gfx name
    index: int | None = None
    uuid: str | None = None
    is_mig: bool = False
    is_known: bool = True
    peak_tflops: Mapping[str, float] = field(default_factory=dict)
    bandwidth_gb_s: float | None = None
    notes: tuple[str, ...] = ()

    def computes(self, feature: Feature) -> bool:
        """Whether the device has `feature` natively."""
        return feature in self.native


@dataclass(frozen=True, slots=True)
class Machine:
    """The devices of one node, and how many such nodes there are.

    `source` says where the facts come from: "detected", "named" (`--machine 8xH100`) or the file that was read.
    `notes` carry what a person should know of them: a driver without a device, unlike cards, MIG.
    `host_memory_gib` and `cpu_cores` are one node's, None where unknown (a named machine).
    """

    devices: tuple[Device, ...]
    nodes: int = 1
    host_memory_gib: float | None = None
    cpu_cores: int | None = None
    source: str = "detected"
    notes: tuple[str, ...] = ()

    @property
    def kind(self) -> DeviceKind:
        return self.devices[0].kind

    @property
    def is_cpu(self) -> bool:
        return self.kind is DeviceKind.CPU

    @property
    def device_count(self) -> int:
        """Devices over all nodes."""
        return len(self.devices) * self.nodes

    @property
    def label(self) -> str:
        """The machine in the words of `--machine`: `2x8xNVIDIA H100 80GB HBM3`."""
        counts: dict[str, int] = {}
        for device in self.devices:
            counts[device.name] = counts.get(device.name, 0) + 1
        node = "+".join(name if count == 1 else f"{count}x{name}" for name, count in counts.items())
        return node if self.nodes == 1 else f"{self.nodes}x{node if node[0].isdigit() else '1x' + node}"

    def all_compute(self, feature: Feature) -> bool:
        """Whether every device has `feature` natively: one emulating rank paces the whole job."""
        return all(device.computes(feature) for device in self.devices)

    @property
    def memory_gib(self) -> float | None:
        """The smallest device's memory: what a rank may count on."""
        known = [device.memory_gib for device in self.devices]
        return None if any(memory is None for memory in known) else min(m for m in known if m is not None)
