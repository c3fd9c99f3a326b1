"""What a kind of silicon computes: one row a feature (NVIDIA) or an architecture (AMD), each with its source.

Every feature is a set of compute capabilities, never a `>=`: capability is not an ordered scale. sm_120 (RTX 50) lacks
the tcgen05 tensor cores of sm_100 (B200), so `capability >= (10, 0)` is wrong for MXFP8. What is not listed is unknown,
and an unknown capability is granted fp32 and nothing else. Single products stand in `mpt.hardware.table`.
"""

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass

from mpt.terms import Feature

ComputeCapability = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Capability:
    """What an architecture computes natively, what it emulates, and what a person should know of it."""

    generation: str
    native: tuple[Feature, ...]
    emulated: tuple[Feature, ...] = ()
    notes: tuple[str, ...] = ()
    is_known: bool = True


# NVIDIA, "CUDA GPU Compute Capability" and "Legacy CUDA GPU Compute Capability" (developer.nvidia.com/cuda-gpus).
# 11.0 was 10.1 before CUDA 13 (Jetson Thor).
NVIDIA_GENERATIONS: Mapping[ComputeCapability, str] = {
    (6, 0): "Pascal", (6, 1): "Pascal", (6, 2): "Pascal",
    (7, 0): "Volta", (7, 2): "Volta", (7, 5): "Turing",
    (8, 0): "Ampere", (8, 6): "Ampere", (8, 7): "Ampere", (8, 9): "Ada Lovelace",
    (9, 0): "Hopper",
    (10, 0): "Blackwell", (10, 3): "Blackwell Ultra", (11, 0): "Blackwell", (12, 0): "Blackwell", (12, 1): "Blackwell",
}  # fmt: skip

_ALL = frozenset(NVIDIA_GENERATIONS)
_PASCAL = frozenset({(6, 0), (6, 1), (6, 2)})
_VOLTA_AND_TURING = frozenset({(7, 0), (7, 2), (7, 5)})
_AMPERE = frozenset({(8, 0), (8, 6), (8, 7)})
_ADA, _HOPPER = frozenset({(8, 9)}), frozenset({(9, 0)})
_BLACKWELL_DATACENTRE = frozenset({(10, 0), (10, 3)})
_BLACKWELL_OTHERS = frozenset({(11, 0), (12, 0), (12, 1)})
_FROM_AMPERE = _AMPERE | _ADA | _HOPPER | _BLACKWELL_DATACENTRE | _BLACKWELL_OTHERS

NVIDIA_NATIVE: Mapping[Feature, Set[ComputeCapability]] = {
    Feature.FP32: _ALL,
    # torch/cuda/__init__.py, is_tf32_supported: what has native bf16.
    Feature.TF32: _FROM_AMPERE,
    # Half arithmetic from 6.x on; Pascal has no tensor cores, so fp16 saves memory there and no time.
    Feature.FP16: _ALL,
    # TensorRT support matrix. GTX 16 cards are 7.5 without tensor cores: see `lacks` in mpt.hardware.table.
    Feature.FP16_TENSOR_CORES: _VOLTA_AND_TURING | _FROM_AMPERE,
    # torch/cuda/__init__.py, is_bf16_supported(including_emulation=False): major >= 8. By default it says True on a T4.
    Feature.BF16: _FROM_AMPERE,
    # torch._scaled_mm: (8, 9) or major >= 9 (aten/src/ATen/native/cuda/ScaledBlas.cpp).
    Feature.FP8: _ADA | _HOPPER | _BLACKWELL_DATACENTRE | _BLACKWELL_OTHERS,
    # Training matmuls. TransformerEngine docs, mxfp8 and nvfp4: 10.0 and 10.3; not on 12.0+ "for all gemm layouts".
    Feature.MXFP8: _BLACKWELL_DATACENTRE,
    Feature.NVFP4: _BLACKWELL_DATACENTRE,
    # Dao-AILab/flash-attention README: Ampere or newer.
    Feature.FLASH_ATTENTION_2: _FROM_AMPERE,
    # hopper/README: H100 and H800. Its assertion allows 8.x, for which the kernels were not written.
    Feature.FLASH_ATTENTION_3: _HOPPER,
    # flash_attn/cute: forward on 8 to 12, backward on 9 to 12.
    Feature.FLASH_ATTENTION_4: _HOPPER | _BLACKWELL_DATACENTRE | _BLACKWELL_OTHERS,
    # bitsandbytes 0.50.2: SM60 on x86-64, SM75 on aarch64, which is what TX2 (6.2) and Xavier (7.2) are.
    Feature.BITSANDBYTES: _ALL - {(6, 2), (7, 2)},
}

# bf16: torch converts and computes in fp32. fp8: torchao's float8 `emulate=True` rounds to fp8 and multiplies wider.
NVIDIA_EMULATED: Mapping[Feature, Set[ComputeCapability]] = {
    Feature.BF16: _PASCAL | _VOLTA_AND_TURING,
    Feature.FP8: _PASCAL | _VOLTA_AND_TURING | _AMPERE,
}

_OLD_WHEELS = "PyTorch wheels for CUDA 12.8 and newer start at compute capability 7.5: this card needs the cu126 build"
_NO_TENSOR_CORES = "fp16 without tensor cores: it saves memory and hardly any time"


def nvidia_capability(compute_capability: ComputeCapability | None, *, lacks: Iterable[Feature] = ()) -> Capability:
    """Judge an NVIDIA GPU by its compute capability; `lacks` are features that its product was made without.

    >>> nvidia_capability((7, 5)).emulated
    (<Feature.BF16: 'bf16'>, <Feature.FP8: 'fp8'>)
    >>> nvidia_capability((14, 2)).native
    (<Feature.FP32: 'fp32'>,)
    """
    if compute_capability is None or compute_capability not in NVIDIA_GENERATIONS:
        known = "unknown" if compute_capability is None else "{}.{} not in the table".format(*compute_capability)
        return _unknown(f"compute capability {known}")
    missing = set(lacks)
    native = tuple(f for f in Feature if compute_capability in NVIDIA_NATIVE[f] and f not in missing)
    notes = []
    if Feature.BF16 not in native:
        notes.append("bf16 is emulated: slower than fp32, though torch.cuda.is_bf16_supported() says True")
    if Feature.FP16_TENSOR_CORES not in native:
        notes.append(_NO_TENSOR_CORES)
    if compute_capability in _PASCAL | {(7, 0), (7, 2)}:
        notes.append(_OLD_WHEELS)
    emulated = tuple(f for f in Feature if compute_capability in NVIDIA_EMULATED.get(f, frozenset()))
    return Capability(NVIDIA_GENERATIONS[compute_capability], native, emulated, tuple(notes))


_MATRIX_16_BIT = (Feature.FP32, Feature.FP16, Feature.BF16, Feature.FP16_TENSOR_CORES)
_FA2_AND_BNB = (Feature.FLASH_ATTENTION_2, Feature.BITSANDBYTES)
_RDNA3 = Capability("RDNA 3", (*_MATRIX_16_BIT, *_FA2_AND_BNB), (Feature.FP8,))
_RDNA4 = Capability(
    "RDNA 4",
    (*_MATRIX_16_BIT, Feature.FP8, *_FA2_AND_BNB),
    notes=("fp8 needs ROCm 6.3, and TransformerEngine refuses it here",),
)

# AMD, by gfx name. LLVM AMDGPU usage guide (which MFMA instructions exist); torch/cuda/__init__.py is_tf32_supported;
# aten ScaledBlas.cpp (fp8: gfx94*, gfx95*, gfx120*); ROCm 7.0 release notes (TF32 emulation on gfx950); GPUOpen "How to
# accelerate AI applications on RDNA 3 using WMMA"; flash-attention README (composable kernel); bitsandbytes 0.50.2.
AMD_ARCHITECTURES: Mapping[str, Capability] = {
    "gfx908": Capability(
        "CDNA", (*_MATRIX_16_BIT, Feature.BITSANDBYTES), (Feature.FP8,), ("bf16 runs at half the rate of fp16",)
    ),
    "gfx90a": Capability("CDNA 2", (*_MATRIX_16_BIT, *_FA2_AND_BNB), (Feature.FP8,)),
    "gfx942": Capability(
        "CDNA 3",
        (Feature.FP32, Feature.TF32, *_MATRIX_16_BIT[1:], Feature.FP8, *_FA2_AND_BNB),
        notes=("fp8 is the fnuz kind here: e4m3 ends at 240, not at 448",),
    ),
    "gfx950": Capability("CDNA 4", (*_MATRIX_16_BIT, Feature.FP8, *_FA2_AND_BNB), (Feature.TF32,)),
    **dict.fromkeys(("gfx1100", "gfx1101", "gfx1102"), _RDNA3),
    **dict.fromkeys(("gfx1200", "gfx1201"), _RDNA4),
}


def amd_capability(architecture: str | None) -> Capability:
    """Judge an AMD GPU by its gfx name; what follows a colon (`gfx90a:sramecc+:xnack-`) does not matter here.

    torch.cuda.is_bf16_supported() is True for every AMD GPU, so the name is the only evidence.

    >>> amd_capability("gfx90a:sramecc+:xnack-").generation
    'CDNA 2'
    """
    name = (architecture or "").split(":")[0]
    listed = AMD_ARCHITECTURES.get(name)
    return _in_feature_order(listed or _unknown(f"architecture {name or 'unknown'} not in the table"))


def intel_capability(*, has_bfloat16_conversions: bool, has_matrix_unit: bool = False) -> Capability:
    """Judge an Intel GPU by the properties that torch.xpu reports.

    torch/xpu/__init__.py: native bf16 is `has_bfloat16_conversions`, TF32 `has_subgroup_matrix_multiply_accumulate`;
    `is_bf16_supported()` says True for any XPU. bitsandbytes 0.50.2 supports XPU.
    """
    native = [Feature.FP32, Feature.FP16, Feature.BITSANDBYTES]
    native += [Feature.BF16] if has_bfloat16_conversions else []
    native += [Feature.TF32, Feature.FP16_TENSOR_CORES] if has_matrix_unit else []
    emulated = () if has_bfloat16_conversions else (Feature.BF16,)
    return _in_feature_order(Capability("Intel Xe", tuple(native), emulated))


def apple_capability(chip: str, macos_major: int | None) -> Capability:
    """Judge an Apple GPU by its chip's name.

    bf16 needs macOS 14 and is emulated by Metal on M1 and M2 (transformers/utils/import_utils.py,
    is_torch_bf16_gpu_available). No TF32, no fp8, no bitsandbytes.
    """
    native: list[Feature] = [Feature.FP32, Feature.FP16]
    emulated: list[Feature] = []
    if macos_major is not None and macos_major >= 14:
        (emulated if chip.startswith(("Apple M1", "Apple M2")) else native).append(Feature.BF16)
    return _in_feature_order(Capability(chip or "Apple", tuple(native), tuple(emulated)))


def cpu_capability(architecture: str, flags: Set[str]) -> Capability:
    """Judge a CPU by its flags, spelt as in /proc/cpuinfo; torch.cpu.get_capabilities() reads the same ones.

    On Arm `bf16` is FEAT_BF16 and `asimdhp` half arithmetic (Linux arm64 elf_hwcaps). bitsandbytes needs AVX2.

    >>> cpu_capability("x86_64", {"avx2"}).native
    (<Feature.FP32: 'fp32'>, <Feature.BITSANDBYTES: 'bitsandbytes'>)
    """
    evidence = {
        Feature.FP16: {"amx_fp16", "avx512_fp16", "asimdhp"},
        Feature.BF16: {"amx_bf16", "avx512_bf16", "bf16"},
        Feature.BITSANDBYTES: {"avx2"},
    }
    native = [Feature.FP32, *(feature for feature, wanted in evidence.items() if flags & wanted)]
    emulated = [f for f in (Feature.FP16, Feature.BF16) if f not in native] + [Feature.FP8]
    return _in_feature_order(Capability(architecture, tuple(native), tuple(emulated)))


def _unknown(what: str) -> Capability:
    return Capability(
        "unknown", (Feature.FP32,), notes=(f"{what}: nothing beyond fp32 is taken for granted",), is_known=False
    )


def _in_feature_order(capability: Capability) -> Capability:
    return Capability(
        capability.generation,
        tuple(feature for feature in Feature if feature in capability.native),
        tuple(feature for feature in Feature if feature in capability.emulated),
        capability.notes,
        capability.is_known,
    )
