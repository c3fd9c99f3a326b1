"""The hardware table: each card by its driver's name, each feature by a set of compute capabilities."""

import itertools

import pytest

from mpt.hardware.capability import (
    AMD_ARCHITECTURES,
    NVIDIA_EMULATED,
    NVIDIA_GENERATIONS,
    NVIDIA_NATIVE,
    amd_capability,
    apple_capability,
    cpu_capability,
    intel_capability,
    nvidia_capability,
)
from mpt.hardware.table import CARDS, Card, MigShare, build_gpu, find_card
from mpt.terms import DeviceKind, Feature, Precision


@pytest.mark.parametrize(
    ("driver_name", "spec"),
    [
        ("Tesla V100-SXM2-16GB", "V100-SXM2-16GB"),
        ("Tesla V100-SXM2-32GB", "V100-SXM2-32GB"),
        ("Tesla V100-PCIE-16GB", "V100-PCIE-16GB"),
        ("Tesla V100S-PCIE-32GB", "V100S"),
        ("Tesla T4", "T4"),
        ("NVIDIA T4", "T4"),
        ("NVIDIA GeForce RTX 2080 Ti", "RTX-2080-Ti"),
        ("GeForce RTX 2080 Ti", "RTX-2080-Ti"),
        ("NVIDIA GeForce GTX 1660", "GTX-1660"),
        ("NVIDIA GeForce GTX 1660 Ti", "GTX-1660-Ti"),
        ("NVIDIA A100-SXM4-40GB", "A100-SXM4-40GB"),
        ("A100-SXM4-40GB", "A100-SXM4-40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100-SXM4-80GB"),
        ("NVIDIA A100-PCIE-40GB", "A100-PCIE-40GB"),
        ("NVIDIA A100 80GB PCIe", "A100-PCIE-80GB"),
        ("NVIDIA A30", "A30"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA A40", "A40"),
        ("NVIDIA RTX A6000", "RTX-A6000"),
        ("NVIDIA GeForce RTX 3090", "RTX-3090"),
        ("NVIDIA GeForce RTX 3090 Ti", "RTX-3090-Ti"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40", "L40"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA GeForce RTX 4090", "RTX-4090"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX-6000-Ada"),
        ("NVIDIA H100 80GB HBM3", "H100-SXM"),
        ("NVIDIA H100 PCIe", "H100-PCIE"),
        ("NVIDIA H100 NVL", "H100-NVL"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA H20", "H20"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA GB200", "GB200"),
        ("NVIDIA B300 SXM6 AC", "B300"),
        ("NVIDIA GeForce RTX 5090", "RTX-5090"),
        ("NVIDIA GB10", "GB10"),
        ("Tesla P100-SXM2-16GB", "P100"),
        ("AMD Instinct MI250X", "MI250X"),
        ("AMD Instinct MI300X", "MI300X"),
        ("AMD Instinct MI300X OAM", "MI300X"),
        ("AMD Instinct MI355X", "MI355X"),
    ],
)
def test_a_driver_name_finds_its_row(driver_name: str, spec: str) -> None:
    card = find_card(driver_name)
    assert card is not None
    assert card.spec == spec


@pytest.mark.parametrize(
    "driver_name",
    [
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA A100-SXM-64GB",
        "NVIDIA H200 NVL",
        "NVIDIA H1000",
        "Quadro RTX 6000",
        "AMD Radeon Graphics",
        "",
    ],
)
def test_a_name_that_merely_looks_like_a_listed_card_is_unknown(driver_name: str) -> None:
    assert find_card(driver_name) is None


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.spec)
def test_every_row_is_found_by_its_own_name_only_and_names_its_source(card: Card) -> None:
    assert [other.spec for other in CARDS if other.is_called(card.name)] == [card.spec]
    assert card.source


def test_no_two_rows_share_a_name() -> None:
    names = [name.lower() for card in CARDS for name in (card.spec, *card.aliases)]
    assert [name for name, group in itertools.groupby(sorted(names)) if len(list(group)) > 1] == []


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.spec)
def test_a_row_states_peaks_only_for_what_its_silicon_computes(card: Card) -> None:
    device = build_gpu(
        card.name,
        card.kind,
        memory_gib=card.memory_gib,
        compute_capability=card.compute_capability,
        architecture=card.architecture,
    )
    assert device.is_known
    assert set(device.peak_tflops) <= set(Precision)
    for name in device.peak_tflops:
        assert device.computes(Feature(name)), name


@pytest.mark.parametrize("card", [card for card in CARDS if "fp8" in card.peak_tflops], ids=lambda card: card.spec)
def test_a_dense_fp8_peak_is_twice_the_16_bit_one(card: Card) -> None:
    # Half a per cent: datasheets round each figure on its own. L40S: 733 against 724.
    assert card.peak_tflops["fp8"] / card.peak_tflops["bf16"] == pytest.approx(2, rel=0.013)


def test_the_peaks_are_dense_and_accumulate_in_fp32() -> None:
    assert {
        spec: CARD[spec].peak_tflops.get("bf16") for spec in ("A100-SXM4-80GB", "H100-SXM", "RTX-4090", "A10G")
    } == {
        "A100-SXM4-80GB": 312,
        "H100-SXM": 989.4,
        "RTX-4090": 165.2,
        "A10G": 70,
    }
    assert CARD["T4"].peak_tflops == {"fp32": 8.1, "fp16": 65}


CARD = {card.spec: card for card in CARDS}

NATIVE_BF16 = {(8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1)}


@pytest.mark.parametrize(
    ("feature", "capabilities"),
    [
        (Feature.TF32, NATIVE_BF16),
        (Feature.BF16, NATIVE_BF16),
        (Feature.FP8, {(8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1)}),
        (Feature.MXFP8, {(10, 0), (10, 3)}),
        (Feature.NVFP4, {(10, 0), (10, 3)}),
        (Feature.FP16_TENSOR_CORES, {(7, 0), (7, 2), (7, 5)} | NATIVE_BF16),
        (Feature.FLASH_ATTENTION_2, NATIVE_BF16),
        (Feature.FLASH_ATTENTION_3, {(9, 0)}),
        (Feature.FLASH_ATTENTION_4, {(9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1)}),
    ],
)
def test_a_feature_is_native_on_exactly_these_compute_capabilities(
    feature: Feature, capabilities: set[tuple[int, int]]
) -> None:
    assert {cc for cc in NVIDIA_GENERATIONS if feature in nvidia_capability(cc).native} == capabilities


def test_bf16_is_emulated_wherever_it_is_not_native() -> None:
    for capability in NVIDIA_GENERATIONS:
        found = nvidia_capability(capability)
        assert (Feature.BF16 in found.native) != (Feature.BF16 in found.emulated)


def test_no_capability_has_a_feature_natively_and_emulated() -> None:
    for feature, capabilities in NVIDIA_EMULATED.items():
        assert not capabilities & NVIDIA_NATIVE[feature]
    for found in AMD_ARCHITECTURES.values():
        assert not set(found.native) & set(found.emulated)


@pytest.mark.parametrize("compute_capability", [None, (5, 2), (8, 8), (9, 1), (10, 7), (13, 0), (0, 0)])
def test_an_unknown_compute_capability_is_granted_fp32_alone(compute_capability: tuple[int, int] | None) -> None:
    found = nvidia_capability(compute_capability)
    assert (found.native, found.emulated, found.generation) == ((Feature.FP32,), (), "unknown")
    assert "nothing beyond fp32" in found.notes[0]


def test_gtx_16_has_the_capability_of_a_t4_and_no_tensor_cores() -> None:
    gtx = build_gpu("NVIDIA GeForce GTX 1660", DeviceKind.CUDA, memory_gib=6, compute_capability=(7, 5))
    t4 = build_gpu("Tesla T4", DeviceKind.CUDA, memory_gib=15, compute_capability=(7, 5))
    assert t4.computes(Feature.FP16_TENSOR_CORES)
    assert not gtx.computes(Feature.FP16_TENSOR_CORES)
    assert gtx.computes(Feature.FP16)


def test_an_unlisted_card_is_judged_by_its_compute_capability() -> None:
    device = build_gpu("NVIDIA RTX 4000 Ada", DeviceKind.CUDA, memory_gib=20, compute_capability=(8, 9))
    assert not device.is_known
    assert device.computes(Feature.FP8)
    assert device.peak_tflops == {}
    assert any("8.9" in note for note in device.notes)


def test_a_mig_instance_has_its_share_of_the_peak() -> None:
    device = build_gpu(
        "NVIDIA A100-SXM4-80GB",
        DeviceKind.CUDA,
        memory_gib=39.25,
        compute_capability=(8, 0),
        mig=MigShare("3g.40gb", 42),
    )
    assert device.is_mig
    assert device.peak_tflops["bf16"] == pytest.approx(312 * 42 / 108, abs=0.05)  # rounded to one decimal
    assert device.bandwidth_gb_s is None


@pytest.mark.parametrize(
    ("architecture", "native", "not_native"),
    [
        ("gfx908", {Feature.BF16, Feature.FP16_TENSOR_CORES}, {Feature.TF32, Feature.FP8, Feature.FLASH_ATTENTION_2}),
        ("gfx90a", {Feature.BF16, Feature.FLASH_ATTENTION_2}, {Feature.TF32, Feature.FP8}),
        ("gfx942:sramecc+:xnack-", {Feature.BF16, Feature.TF32, Feature.FP8}, {Feature.MXFP8}),
        ("gfx950", {Feature.BF16, Feature.FP8}, {Feature.TF32}),
        ("gfx1100", {Feature.BF16}, {Feature.FP8, Feature.TF32}),
        ("gfx1201", {Feature.BF16, Feature.FP8}, {Feature.TF32}),
        ("gfx803", {Feature.FP32}, {Feature.FP16, Feature.BF16}),
        (None, {Feature.FP32}, {Feature.FP16, Feature.BF16}),
    ],
)
def test_an_amd_gpu_is_judged_by_its_gfx_name(
    architecture: str | None, native: set[Feature], not_native: set[Feature]
) -> None:
    found = set(amd_capability(architecture).native)
    assert native <= found
    assert not not_native & found


def test_tf32_on_gfx950_is_emulated() -> None:
    assert Feature.TF32 in amd_capability("gfx950").emulated


@pytest.mark.parametrize(
    ("flags", "native", "emulated"),
    [
        (set(), {Feature.FP32}, {Feature.FP16, Feature.BF16, Feature.FP8}),
        ({"avx2"}, {Feature.FP32, Feature.BITSANDBYTES}, {Feature.FP16, Feature.BF16, Feature.FP8}),
        ({"avx512f"}, {Feature.FP32}, {Feature.FP16, Feature.BF16, Feature.FP8}),
        ({"avx512_bf16"}, {Feature.FP32, Feature.BF16}, {Feature.FP16, Feature.FP8}),
        ({"amx_bf16"}, {Feature.FP32, Feature.BF16}, {Feature.FP16, Feature.FP8}),
        ({"avx512_fp16"}, {Feature.FP32, Feature.FP16}, {Feature.BF16, Feature.FP8}),
        ({"amx_fp16", "amx_bf16"}, {Feature.FP32, Feature.FP16, Feature.BF16}, {Feature.FP8}),
    ],
)
def test_a_cpu_is_judged_by_its_flags(flags: set[str], native: set[Feature], emulated: set[Feature]) -> None:
    found = cpu_capability("x86_64", flags)
    assert (set(found.native), set(found.emulated)) == (native, emulated)


@pytest.mark.parametrize(
    ("chip", "macos", "native", "emulated"),
    [
        ("Apple M1", 14, False, True),
        ("Apple M2 Max", 15, False, True),
        ("Apple M4", 14, True, False),
        ("Apple M4", 13, False, False),
        ("Apple M4", None, False, False),
    ],
)
def test_bf16_on_apple_needs_macos_14_and_is_emulated_before_m3(
    chip: str, macos: int | None, native: bool, emulated: bool
) -> None:
    found = apple_capability(chip, macos)
    assert (Feature.BF16 in found.native, Feature.BF16 in found.emulated) == (native, emulated)


@pytest.mark.parametrize("has_it", [True, False])
def test_bf16_on_intel_is_what_the_driver_says(has_it: bool) -> None:
    found = intel_capability(has_bfloat16_conversions=has_it)
    assert (Feature.BF16 in found.native, Feature.BF16 in found.emulated) == (has_it, not has_it)
