"""Machines by name and by file."""

import dataclasses
import json
from pathlib import Path

import pytest

from mpt.errors import ExitCode, MptError
from mpt.hardware.machine_json import machine_from_json, machine_to_json
from mpt.hardware.specs import parse_machine
from mpt.terms import DeviceKind, Feature


@pytest.mark.parametrize(
    ("spec", "nodes", "names", "memory_gib"),
    [
        ("T4", 1, ["Tesla T4"], 15),
        ("t4", 1, ["Tesla T4"], 15),
        (" tesla t4 ", 1, ["Tesla T4"], 15),
        ("1xT4", 1, ["Tesla T4"], 15),
        ("8xH100", 1, ["NVIDIA H100 80GB HBM3"] * 8, 81559 / 1024),
        ("2x8xA100-80GB", 2, ["NVIDIA A100-SXM4-80GB"] * 8, 80),
        ("2 X 8 x a100-80gb", 2, ["NVIDIA A100-SXM4-80GB"] * 8, 80),
        ("a100-40gb", 1, ["NVIDIA A100-SXM4-40GB"], 40),
        ("4xV100+4xA100", 1, ["Tesla V100-SXM2-16GB"] * 4 + ["NVIDIA A100-SXM4-40GB"] * 4, 16),
        ("2x1xT4+L4", 2, ["Tesla T4", "NVIDIA L4"], 15),
        ("rtx4090", 1, ["NVIDIA GeForce RTX 4090"], 24564 / 1024),
        ("RTX 4090", 1, ["NVIDIA GeForce RTX 4090"], 24564 / 1024),
        ("4090", 1, ["NVIDIA GeForce RTX 4090"], 24564 / 1024),
        ("NVIDIA A100 80GB PCIe", 1, ["NVIDIA A100 80GB PCIe"], 80),
        ("A100-80GB:3g.40gb", 1, ["NVIDIA A100-SXM4-80GB MIG 3g.40gb"], 38),
        ("8xMI300X", 1, ["AMD Instinct MI300X"] * 8, 196592 / 1024),
    ],
)
def test_a_spec_names_a_machine(spec: str, nodes: int, names: list[str], memory_gib: float) -> None:
    machine = parse_machine(spec)
    assert machine.nodes == nodes
    assert [device.name for device in machine.devices] == names
    assert machine.memory_gib == memory_gib
    assert machine.source == "named"
    assert [device.index for device in machine.devices] == list(range(len(names)))


@pytest.mark.parametrize(
    "spec", ["T4", "8xH100", "2x8xA100-80GB", "2x4xV100+4xA100-80GB", "A100-80GB:3g.40gb", "cpu", "3xT4+L4", "Max-1550"]
)
def test_the_label_of_a_machine_names_it_again(spec: str) -> None:
    machine = parse_machine(spec)
    again = parse_machine(machine.label)
    assert dataclasses.replace(again, notes=()) == dataclasses.replace(machine, notes=())


NO_MACHINES = """
    x 8x 0xT4 0x8xT4 8x0xT4 -1xT4 2x2x2xT4 T4+2x8xL4 T4+ H1000 100001xT4 2x50001xT4 1000000000000000000000xT4 nan T4;rm
    T4+cpu T4+MI300X T4:1g.5gb A100:9g.90gb A100:3g.80gb A100: 2xA100:1g.5gb
"""


@pytest.mark.parametrize("spec", ["", " ", *NO_MACHINES.split()])
def test_a_spec_that_names_no_machine_is_refused(spec: str) -> None:
    with pytest.raises(MptError) as refused:
        parse_machine(spec)
    assert refused.value.exit_code is ExitCode.USAGE
    assert refused.value.remedy


def test_the_largest_machine_is_accepted() -> None:
    assert parse_machine("100000xT4").device_count == 100_000


def test_an_unknown_name_is_answered_with_close_ones_and_the_list() -> None:
    with pytest.raises(MptError) as refused:
        parse_machine("8xH10")
    assert "H100" in refused.value.remedy.partition("Known:")[0]
    assert "MI300X" in refused.value.remedy.partition("Known:")[2]


def test_a_loose_name_says_how_it_was_read() -> None:
    assert "40 GB" in parse_machine("A100").notes[0]
    assert parse_machine("A100-SXM4-40GB").notes == ()


def test_cpu_is_the_cpu_of_this_computer() -> None:
    machine = parse_machine("cpu")
    assert machine.kind is DeviceKind.CPU
    assert machine.all_compute(Feature.FP32)
    assert machine.cpu_cores
    assert machine.memory_gib


def test_processes_on_one_cpu_share_its_memory() -> None:
    machine, one = parse_machine("2xCPU"), parse_machine("cpu")
    assert machine.device_count == 2
    assert machine.host_memory_gib == one.host_memory_gib
    assert machine.memory_gib == pytest.approx((one.memory_gib or 0) / 2)  # the same division, in another order


@pytest.mark.parametrize("spec", ["T4", "2x4xV100+4xA100", "A100-80GB:3g.40gb", "8xMI300X", "cpu", "GB10", "Max-1550"])
def test_a_machine_survives_json(spec: str, tmp_path: Path) -> None:
    machine = parse_machine(spec)
    text = json.dumps(machine_to_json(machine), allow_nan=False)
    assert machine_from_json(json.loads(text), "here") == machine
    path = tmp_path / "machine.json"
    path.write_text(text)
    assert parse_machine(str(path)) == dataclasses.replace(machine, source=str(path))


def test_the_decision_beside_a_machine_is_skipped() -> None:
    machine = parse_machine("T4")
    written = {**machine_to_json(machine), "precision": "fp16", "reason": "...", "rejected": []}
    assert machine_from_json(written, "here") == machine


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"nodes": 0}, "nodes"),
        ({"devices": []}, "devices"),
        ({"memory": 3}, "memory"),
        ({"devices": [{"name": "X"}]}, "devices.0.kind"),
        ({"host_memory_gib": float("nan")}, "host_memory_gib"),
        ({"host_memory_gib": -1}, "host_memory_gib"),
        ({"cpu_cores": "many"}, "cpu_cores"),
    ],
)
def test_a_wrong_machine_file_is_refused_by_key(change: dict[str, object], named: str, tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    path.write_text(json.dumps({**machine_to_json(parse_machine("T4")), **change}))
    with pytest.raises(MptError, match=f"{path}: {named}:"):
        parse_machine(str(path))


def test_a_misspelt_key_of_a_device_is_refused(tmp_path: Path) -> None:
    written = machine_to_json(parse_machine("T4"))
    written["devices"][0]["memory_gb"] = written["devices"][0].pop("memory_gib")
    path = tmp_path / "machine.json"
    path.write_text(json.dumps(written))
    with pytest.raises(MptError, match=r"devices\.0\.memory_gb"):
        parse_machine(str(path))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"devices": null}', "\x00"])
def test_a_file_that_holds_no_machine_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    path.write_text(text)
    with pytest.raises(MptError, match=r"machine\.json"):
        parse_machine(str(path))


def test_a_missing_file_is_refused() -> None:
    with pytest.raises(MptError, match="No such file"):
        parse_machine("nowhere/machine.json")
