"""THE table of cards: one row a product, each with its source; and the making of a `Device` from it.

Peaks are dense (no sparsity) TFLOPS with fp32 accumulation, which is what training uses: GeForce cards do that at half
the rate of their advertised fp16-accumulating figure, datacentre and professional cards at the full one. They agree
with 2 x FMA per clock and multiprocessor x multiprocessors x boost clock. What is not known is None or left out, never
guessed. What an architecture computes stands in `mpt.hardware.capability`.

`memory_gib` is what the driver reports for the card (`nvidia-smi`, `amd-smi`), for those that name a card without
having one; a detected card has its own number. Both count what the driver keeps for itself, 1 to 3 per cent.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from mpt.hardware.capability import (
    Capability,
    ComputeCapability,
    amd_capability,
    intel_capability,
    nvidia_capability,
)
from mpt.hardware.machine import Device
from mpt.terms import DeviceKind, Feature

MIB_PER_GIB = 1024

_A100 = "NVIDIA A100 datasheet (1758950)"
_AMPERE = "NVIDIA Ampere GA102 whitepaper v2"
_ADA = "NVIDIA Ada whitepaper v2.1"
_V100 = "NVIDIA V100 datasheet (1165301)"
_H100 = "nvidia.com/data-center/h100"
_BLACKWELL = "NVIDIA DGX B200 datasheet; stas00/ml-engineering, compute/accelerator"
_CUDA_GPUS = "CUDA GPUs page (capability), product page (memory)"


@dataclass(frozen=True, slots=True)
class Card:
    """One product. `spec` is its name for --machine, `name` the driver's, `pattern` all that drivers call it."""

    spec: str
    name: str
    source: str
    compute_capability: ComputeCapability | None = None
    architecture: str | None = None
    kind: DeviceKind = DeviceKind.CUDA
    memory_gib: float | None = None
    peak_tflops: Mapping[str, float] = field(default_factory=dict)
    bandwidth_gb_s: float | None = None
    multiprocessors: int | None = None  # given where cards are cut into MIG instances
    pattern: str = ""
    aliases: tuple[str, ...] = ()
    lacks: tuple[Feature, ...] = ()
    note: str = ""

    def is_called(self, driver_name: str) -> bool:
        return re.fullmatch(self.pattern or re.escape(_bare(self.name)), _bare(driver_name), re.IGNORECASE) is not None


def _peaks(
    fp32: float | None = None, tf32: float | None = None, half: float | None = None, fp8: float | None = None,
    *, bf16: bool = True,
) -> dict[str, float]:  # fmt: skip
    rates = {"fp32": fp32, "tf32": tf32, "fp16": half, "bf16": half if bf16 else None, "fp8": fp8}
    return {name: rate for name, rate in rates.items() if rate is not None}


def _mib(memory_mib: int) -> float:
    return memory_mib / MIB_PER_GIB


_V100_SXM2, _V100_PCIE = _peaks(15.7, None, 125, bf16=False), _peaks(14, None, 112, bf16=False)
_A100_PEAKS = _peaks(19.5, 156, 312)
_H100_SXM = _peaks(67, 494.7, 989.4, 1978.9)
_B200 = _peaks(80, 1125, 2250, 4500)


def _listed(spec: str, name: str, capability: ComputeCapability, memory_gib: float | None, **more: object) -> Card:
    """A card of which capability and memory are known and no rates."""
    return Card(spec, name, _CUDA_GPUS, capability, memory_gib=memory_gib, **more)  # type: ignore[arg-type]


_NO_TC = (Feature.FP16_TENSOR_CORES,)

# fmt: off
CARDS: tuple[Card, ...] = (
    # Volta and Turing
    Card("V100-SXM2-16GB", "Tesla V100-SXM2-16GB", _V100, (7, 0), memory_gib=16, peak_tflops=_V100_SXM2,
         bandwidth_gb_s=900, aliases=("V100", "V100-16GB"), note="V100 alone is read as the 16 GB SXM2 card"),
    Card("V100-SXM2-32GB", "Tesla V100-SXM2-32GB", _V100, (7, 0), memory_gib=32, peak_tflops=_V100_SXM2,
         bandwidth_gb_s=900, aliases=("V100-32GB",)),
    Card("V100-PCIE-16GB", "Tesla V100-PCIE-16GB", _V100, (7, 0), memory_gib=16, peak_tflops=_V100_PCIE,
         bandwidth_gb_s=900),
    Card("V100-PCIE-32GB", "Tesla V100-PCIE-32GB", _V100, (7, 0), memory_gib=32, peak_tflops=_V100_PCIE,
         bandwidth_gb_s=900),
    Card("V100S", "Tesla V100S-PCIE-32GB", "NVIDIA V100S datasheet", (7, 0), memory_gib=32,
         peak_tflops=_peaks(16.4, None, 130, bf16=False)),
    Card("T4", "Tesla T4", "NVIDIA T4 datasheet (951643)", (7, 5), memory_gib=_mib(15360),
         peak_tflops=_peaks(8.1, None, 65, bf16=False), bandwidth_gb_s=320),
    Card("RTX-2080-Ti", "NVIDIA GeForce RTX 2080 Ti", "NVIDIA Turing whitepaper (Founders Edition)", (7, 5),
         memory_gib=11, peak_tflops=_peaks(14.2, None, 56.9, bf16=False), bandwidth_gb_s=616),
    # TU116 and TU117 have no tensor cores (techpowerup.com and tomshardware.com reviews of the GTX 1660).
    *(_listed(spec, f"NVIDIA GeForce {spec.replace('-', ' ')}", (7, 5), memory, lacks=_NO_TC)
      for spec, memory in (("GTX-1650", 4), ("GTX-1660", 6), ("GTX-1660-SUPER", 6), ("GTX-1660-Ti", 6))),
    # Ampere
    Card("A100-SXM4-40GB", "NVIDIA A100-SXM4-40GB", _A100, (8, 0), memory_gib=40, peak_tflops=_A100_PEAKS,
         bandwidth_gb_s=1555, multiprocessors=108, aliases=("A100", "A100-40GB"),
         note="A100 alone is read as the 40 GB card: say A100-80GB for the other"),
    Card("A100-SXM4-80GB", "NVIDIA A100-SXM4-80GB", _A100, (8, 0), memory_gib=80, peak_tflops=_A100_PEAKS,
         bandwidth_gb_s=2039, multiprocessors=108, aliases=("A100-80GB",)),
    Card("A100-PCIE-40GB", "NVIDIA A100-PCIE-40GB", _A100, (8, 0), memory_gib=40, peak_tflops=_A100_PEAKS,
         bandwidth_gb_s=1555, multiprocessors=108),
    Card("A100-PCIE-80GB", "NVIDIA A100 80GB PCIe", _A100, (8, 0), memory_gib=80, peak_tflops=_A100_PEAKS,
         bandwidth_gb_s=1935, multiprocessors=108, pattern=r"A100 80GB PCIe|A100-PCIE-80GB"),
    Card("A30", "NVIDIA A30", "NVIDIA A30 datasheet", (8, 0), memory_gib=24, peak_tflops=_peaks(half=165),
         bandwidth_gb_s=933),
    Card("A10", "NVIDIA A10", "NVIDIA A10 datasheet", (8, 6), memory_gib=_mib(23028),
         peak_tflops=_peaks(31.2, 62.5, 125), bandwidth_gb_s=600),
    Card("A10G", "NVIDIA A10G", "derived from 80 multiprocessors at 1.71 GHz; half the A10's tensor rate", (8, 6),
         memory_gib=_mib(23028), peak_tflops=_peaks(35, 35, 70), bandwidth_gb_s=600),
    Card("A40", "NVIDIA A40", _AMPERE, (8, 6), memory_gib=_mib(46068), peak_tflops=_peaks(37.4, 74.8, 149.7),
         bandwidth_gb_s=696),
    Card("RTX-A6000", "NVIDIA RTX A6000", _AMPERE, (8, 6), memory_gib=_mib(49140),
         peak_tflops=_peaks(38.7, 77.4, 154.8), bandwidth_gb_s=768, aliases=("A6000",)),
    Card("RTX-3090", "NVIDIA GeForce RTX 3090", _AMPERE, (8, 6), memory_gib=24, peak_tflops=_peaks(35.6, 35.6, 71),
         bandwidth_gb_s=936, aliases=("3090",)),
    # Ada Lovelace
    Card("L4", "NVIDIA L4", _ADA, (8, 9), memory_gib=_mib(23034), peak_tflops=_peaks(30.3, 60, 121, 242),
         bandwidth_gb_s=300),
    Card("L40", "NVIDIA L40", _ADA, (8, 9), memory_gib=_mib(46068), peak_tflops=_peaks(90.5, 90.5, 181, 362),
         bandwidth_gb_s=864),
    Card("L40S", "NVIDIA L40S", "nvidia.com/data-center/l40s", (8, 9), memory_gib=_mib(46068),
         peak_tflops=_peaks(91.6, 183, 362, 733), bandwidth_gb_s=864),
    Card("RTX-4090", "NVIDIA GeForce RTX 4090", _ADA, (8, 9), memory_gib=_mib(24564),
         peak_tflops=_peaks(82.6, 82.6, 165.2, 330.3), bandwidth_gb_s=1008, aliases=("4090",)),
    # Hopper
    Card("H100-SXM", "NVIDIA H100 80GB HBM3", _H100, (9, 0), memory_gib=_mib(81559), peak_tflops=_H100_SXM,
         bandwidth_gb_s=3350, multiprocessors=132, aliases=("H100", "H100-80GB", "H100-SXM5-80GB")),
    Card("H100-PCIE", "NVIDIA H100 PCIe", _H100, (9, 0), memory_gib=_mib(81559),
         peak_tflops=_peaks(51, 378, 756, 1513), bandwidth_gb_s=2000, multiprocessors=114, aliases=("H100-PCIE-80GB",)),
    Card("H100-NVL", "NVIDIA H100 NVL", "torchtitan and nanochat tables, one GPU of the pair", (9, 0),
         memory_gib=_mib(95830), peak_tflops=_peaks(half=835), bandwidth_gb_s=3900, aliases=("H100-NVL-94GB",)),
    Card("H200", "NVIDIA H200", "NVIDIA H200 datasheet (hpc-datasheet-sc23-h200)", (9, 0), memory_gib=_mib(143771),
         peak_tflops=_H100_SXM, bandwidth_gb_s=4800, multiprocessors=132, aliases=("H200-SXM", "H200-141GB")),
    Card("H20", "NVIDIA H20", "torchtitan table", (9, 0), memory_gib=_mib(97871), peak_tflops=_peaks(half=148),
         aliases=("H20-96GB",)),
    _listed("GH200", "NVIDIA GH200 480GB", (9, 0), _mib(97871), pattern=r"GH200 (120|480)GB"),
    # Blackwell
    Card("B200", "NVIDIA B200", _BLACKWELL, (10, 0), memory_gib=_mib(183359), peak_tflops=_B200, bandwidth_gb_s=8000),
    Card("GB200", "NVIDIA GB200", _BLACKWELL, (10, 0), memory_gib=_mib(189471),
         peak_tflops=_peaks(80, 1250, 2500, 5000), bandwidth_gb_s=8000),
    Card("B300", "NVIDIA B300 SXM6 AC", _BLACKWELL, (10, 3), memory_gib=_mib(275040), peak_tflops=_B200,
         bandwidth_gb_s=8000, pattern=r"B300( SXM6 AC)?"),
    _listed("GB300", "NVIDIA GB300", (10, 3), None),
    Card("RTX-5090", "NVIDIA GeForce RTX 5090", "NVIDIA RTX Blackwell whitepaper", (12, 0), memory_gib=_mib(32607),
         peak_tflops=_peaks(104.8, 104.8, 209.5, 419), bandwidth_gb_s=1792, aliases=("5090",)),
    # Cards without rates, for naming them
    _listed("P100", "Tesla P100-PCIE-16GB", (6, 0), 16, lacks=_NO_TC, pattern=r"P100-(PCIE|SXM2)-16GB"),
    _listed("GTX-1080-Ti", "NVIDIA GeForce GTX 1080 Ti", (6, 1), 11, lacks=_NO_TC),
    _listed("GTX-1080", "NVIDIA GeForce GTX 1080", (6, 1), 8, lacks=_NO_TC),
    _listed("RTX-3080", "NVIDIA GeForce RTX 3080", (8, 6), 10, aliases=("3080",)),
    _listed("RTX-3060", "NVIDIA GeForce RTX 3060", (8, 6), 12, aliases=("3060",)),
    _listed("RTX-3090-Ti", "NVIDIA GeForce RTX 3090 Ti", (8, 6), _mib(24564)),
    _listed("RTX-4080", "NVIDIA GeForce RTX 4080", (8, 9), 16, aliases=("4080",)),
    _listed("RTX-6000-Ada", "NVIDIA RTX 6000 Ada Generation", (8, 9), _mib(49140)),
    _listed("L20", "NVIDIA L20", (8, 9), _mib(46068)),
    _listed("RTX-5080", "NVIDIA GeForce RTX 5080", (12, 0), 16, aliases=("5080",)),
    _listed("GB10", "NVIDIA GB10", (12, 1), None, aliases=("DGX-Spark",)),
    _listed("Orin", "Orin", (8, 7), None),
    _listed("Thor", "NVIDIA Thor", (11, 0), None),
    # AMD. An MI250X is two devices (GCDs): the row is one of them.
    Card("MI250X", "AMD Instinct MI250X", "amd.com MI250X page, halved: one GCD", architecture="gfx90a",
         kind=DeviceKind.ROCM, memory_gib=64, peak_tflops=_peaks(24, None, 191.5), bandwidth_gb_s=1638,
         note="one device is one die (GCD): a card has two"),
    Card("MI300X", "AMD Instinct MI300X", "amd.com MI300X page", architecture="gfx942", kind=DeviceKind.ROCM,
         memory_gib=_mib(196592), peak_tflops=_peaks(163.4, 653.7, 1307.4, 2614.9), bandwidth_gb_s=5300,
         pattern=r"MI300X( OAM)?"),
    Card("MI355X", "AMD Instinct MI355X", "amd.com MI355X page; stas00/ml-engineering", architecture="gfx950",
         kind=DeviceKind.ROCM, memory_gib=288, peak_tflops=_peaks(157.3, None, 2500, 5000), bandwidth_gb_s=8000,
         pattern=r"MI355X( OAM)?"),
    Card("Max-1550", "Intel(R) Data Center GPU Max 1550", "torchtitan table (native bf16)", kind=DeviceKind.XPU,
         aliases=("PVC",)),
)
# fmt: on


def find_card(driver_name: str) -> Card | None:
    """The row of a driver's name. The whole name must fit: an "RTX 4090 Laptop GPU" is no RTX 4090.

    >>> [find_card(name).spec for name in ("NVIDIA A10", "NVIDIA A10G", "NVIDIA L40", "NVIDIA L40S", "NVIDIA L4")]
    ['A10', 'A10G', 'L40', 'L40S', 'L4']
    >>> find_card("NVIDIA GeForce RTX 4090 Laptop GPU") is None
    True
    """
    return next((card for card in CARDS if card.is_called(driver_name)), None)


@dataclass(frozen=True, slots=True)
class MigShare:
    """A MIG instance: its profile (`3g.40gb`), and how many of the card's multiprocessors it has, where known."""

    profile: str
    multiprocessors: int | None = None


def build_gpu(
    name: str,
    kind: DeviceKind,
    *,
    memory_gib: float | None,
    compute_capability: ComputeCapability | None = None,
    architecture: str | None = None,
    capability: Capability | None = None,
    index: int | None = None,
    uuid: str | None = None,
    mig: MigShare | None = None,
) -> Device:
    """Describe a GPU by its row and its capability. `name` is the driver's; a MIG instance gives its card's.

    `capability` overrides the tables, for drivers that state features outright (Intel, Apple).
    """
    card = find_card(name)
    if capability is None:
        capability = _capability_of(kind, compute_capability, architecture, card)
    notes = list(capability.notes)
    if card is None and capability.is_known and kind in (DeviceKind.CUDA, DeviceKind.ROCM):
        judged = architecture or "{}.{}".format(*(compute_capability or ("?", "?")))
        notes.append(f"not in the table of cards: judged by {judged}, peak rates unknown")
    peaks, bandwidth = (dict(card.peak_tflops), card.bandwidth_gb_s) if card else ({}, None)
    if mig is not None:
        peaks, bandwidth = _mig_peaks(peaks, card, mig), None
        name = f"{name} MIG {mig.profile}".strip()
    return Device(
        name=name,
        kind=kind,
        generation=capability.generation,
        memory_gib=memory_gib,
        native=capability.native,
        emulated=capability.emulated,
        compute_capability=compute_capability,
        architecture=architecture,
        index=index,
        uuid=uuid,
        is_mig=mig is not None,
        is_known=card is not None or kind is DeviceKind.MPS,
        peak_tflops=peaks,
        bandwidth_gb_s=bandwidth,
        notes=tuple(notes),
    )


def _capability_of(
    kind: DeviceKind, compute_capability: ComputeCapability | None, architecture: str | None, card: Card | None
) -> Capability:
    match kind:
        case DeviceKind.ROCM:
            return amd_capability(architecture)
        case DeviceKind.XPU:  # torch.xpu states its features; a named card is one that the table knows to have bf16
            return intel_capability(has_bfloat16_conversions=card is not None)
        case _:
            return nvidia_capability(compute_capability, lacks=card.lacks if card else ())


def _mig_peaks(peaks: Mapping[str, float], card: Card | None, mig: MigShare) -> dict[str, float]:
    """The card's peaks in proportion to multiprocessors; empty where either count is unknown."""
    if card is None or not card.multiprocessors or not mig.multiprocessors:
        return {}
    return {name: round(rate * mig.multiprocessors / card.multiprocessors, 1) for name, rate in peaks.items()}


def _bare(name: str) -> str:
    """Drop the maker and the family, which drivers write or leave out (`Tesla T4`, `NVIDIA Tesla T4`)."""
    return re.sub(r"^((NVIDIA|AMD|Tesla|GeForce|Instinct|Intel(\(R\))?)\s+)+", "", name.strip(), flags=re.IGNORECASE)
