"""Machines by name, for planning without having one: `T4`, `8xH100`, `2x8xA100-80GB`, `4xV100+4xA100`, `cpu`, a file.

SPEC  := [NODES x] GROUP [+ GROUP ...]  |  a path, which ends in .json or has a slash
GROUP := [COUNT x] CARD [:PROFILE]            PROFILE: a MIG instance, `A100-80GB:3g.40gb`
"""

import difflib
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

from mpt.errors import MptError
from mpt.hardware.host import read_host
from mpt.hardware.machine import Device, Machine
from mpt.hardware.machine_json import machine_from_json
from mpt.hardware.readings import to_cpu_device
from mpt.hardware.table import CARDS, Card, MigShare, build_gpu

MOST_DEVICES = 100_000
MIG_PROFILE = re.compile(r"([1-7])g\.(\d+)gb", re.IGNORECASE)
# What every MIG instance has at least of its profile's memory: `nvidia-smi mig -lgip` lists 4.75 GiB for a 1g.5gb and
# 39.5 GiB for a 7g.40gb (NVIDIA MIG user guide).
MIG_MEMORY_SHARE = 0.95
MIG_CAPABILITIES = frozenset({(8, 0), (9, 0), (10, 0), (10, 3)})
HOW_TO_NAME = "Name a machine like T4, 8xH100, 2x8xA100-80GB, 4xV100+4xA100, A100-80GB:3g.40gb or cpu, or give a file."


def parse_machine(spec: str) -> Machine:
    """Describe the machine that `spec` names, or that the file `spec` holds (see `mpt detect-precision --json`).

    `cpu` is this computer's CPU, with its own features and memory: naming it is how a run is kept off the GPUs; `2xcpu`
    is two processes that share it. Raises MptError for what can't be read, with close names.

    >>> parse_machine("2x8xh100").label
    '2x8xNVIDIA H100 80GB HBM3'
    """
    text = spec.strip()
    if text.lower().endswith(".json") or "/" in text:  # a file called T4 in this folder is no machine
        return _from_file(Path(text))
    nodes, groups = _split(text)
    if any(group.card is None for group in groups):
        return _cpu_machine(text, nodes, groups)
    devices = [device for group in groups for device in [_to_device(group)] * group.count]
    if len({device.kind for device in devices}) > 1:
        raise MptError(f"--machine {text}: one machine can't mix NVIDIA, AMD and Intel devices", remedy=HOW_TO_NAME)
    if any(group.mig_profile for group in groups) and len(devices) * nodes > 1:
        raise MptError(
            f"--machine {text}: a process sees one MIG instance, and NCCL can't join several",
            remedy="Name one instance, such as A100-80GB:3g.40gb.",
        )
    notes = dict.fromkeys(g.card.note for g in groups if g.card is not None and g.card.note and g.is_loosely_named)
    indexed = tuple(replace(device, index=index) for index, device in enumerate(devices))
    return Machine(devices=indexed, nodes=nodes, source="named", notes=tuple(notes))


@dataclass(frozen=True, slots=True)
class _Group:
    """`count` equal devices; `card` None is the CPU."""

    count: int
    card: Card | None
    mig_profile: str | None = None
    is_loosely_named: bool = False


def _split(text: str) -> tuple[int, list[_Group]]:
    nodes = 1
    groups = []
    for place, part in enumerate(text.split("+")):
        numbers, name = _leading_counts(part.strip())
        if len(numbers) > (2 if place == 0 else 1):
            raise MptError(f"--machine {text}: too many counts in {part.strip()!r}", remedy=HOW_TO_NAME)
        if len(numbers) == 2:
            nodes = numbers.pop(0)
        groups.append(_group(text, numbers[0] if numbers else 1, name))
    total = nodes * sum(group.count for group in groups)
    if min(nodes, *(group.count for group in groups)) < 1:
        raise MptError(f"--machine {text}: a machine has at least one device", remedy=HOW_TO_NAME)
    if total > MOST_DEVICES:
        raise MptError(f"--machine {text}: {total} devices are more than {MOST_DEVICES}", remedy=HOW_TO_NAME)
    return nodes, groups


def _leading_counts(part: str) -> tuple[list[int], str]:
    """Split the counts off a group.

    >>> _leading_counts("2x8xA100"), _leading_counts("RTX-4090")
    (([2, 8], 'A100'), ([], 'RTX-4090'))
    """
    numbers = []
    while found := re.match(r"(\d{1,18})\s*[x×*]\s*(?=\S)", part, re.IGNORECASE):  # noqa: RUF001
        numbers.append(int(found[1]))
        part = part[found.end() :]
    return numbers, part


def _group(text: str, count: int, name: str) -> _Group:
    if re.fullmatch(r"cpu(\s*\(.*\))?", name, re.IGNORECASE):
        return _Group(count, None)
    card_name, colon, profile = name.partition(":")
    if not colon:
        card_name, _, profile = name.partition(" MIG ")
    wanted = _plain(card_name)
    card = next((card for card in CARDS if card.is_called(card_name.strip()) or wanted in _names_of(card)), None)
    if not wanted or card is None:
        raise _unknown(text, name)
    if colon or profile:
        _check_profile(text, card, profile)
    exact = (_plain(card.spec), _plain(card.name))
    says_which = wanted in exact or "gb" in wanted or bool(profile)
    return _Group(count, card, profile or None, is_loosely_named=not says_which)


def _check_profile(text: str, card: Card, profile: str) -> None:
    found = MIG_PROFILE.fullmatch(profile)
    if found is None:
        raise MptError(
            f"--machine {text}: {profile!r} is no MIG profile", remedy="Profiles look like 1g.10gb or 3g.40gb."
        )
    if card.compute_capability not in MIG_CAPABILITIES:
        raise MptError(f"--machine {text}: {card.spec} can't be cut into MIG instances", remedy=HOW_TO_NAME)
    if card.memory_gib is not None and int(found[2]) > card.memory_gib + 2:
        raise MptError(
            f"--machine {text}: a {profile} instance does not fit a card of {card.memory_gib:.0f} GiB",
            remedy="`nvidia-smi mig -lgip` lists the profiles of a card.",
        )


def _to_device(group: _Group) -> Device:
    card = group.card
    assert card is not None
    memory_gib, mig = card.memory_gib, None
    if group.mig_profile is not None:
        found = MIG_PROFILE.fullmatch(group.mig_profile)
        assert found is not None
        memory_gib, mig = MIG_MEMORY_SHARE * int(found[2]), MigShare(group.mig_profile.lower())
    return build_gpu(
        card.name,
        card.kind,
        memory_gib=memory_gib,
        compute_capability=card.compute_capability,
        architecture=card.architecture,
        mig=mig,
    )


def _cpu_machine(text: str, nodes: int, groups: list[_Group]) -> Machine:
    if any(group.card is not None for group in groups):
        raise MptError(f"--machine {text}: a machine trains on GPUs or on its CPU, not on both", remedy=HOW_TO_NAME)
    host = read_host()
    processes = sum(group.count for group in groups)
    device = to_cpu_device(host, memory_share=1 / processes)
    notes = ["cpu: this computer's own CPU"]
    if processes > 1:
        notes.append(f"{processes} processes share the CPU and its memory")
    host_memory_gib = None if device.memory_gib is None else device.memory_gib * processes
    return Machine((device,) * processes, nodes, host_memory_gib, host.cpu_cores, "named", tuple(notes))


def _from_file(path: Path) -> Machine:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MptError(
            f"{path}: {error.strerror if isinstance(error, OSError) else f'not JSON: {error}'}",
            remedy="`mpt detect-precision --json > FILE` on the machine in question writes such a file.",
        ) from None
    return replace(machine_from_json(data, str(path)), source=str(path))


def _names_of(card: Card) -> set[str]:
    return {_plain(name) for name in (card.spec, card.name, *card.aliases)}


def _plain(name: str) -> str:
    """Drop the maker, the family and every separator: `NVIDIA GeForce RTX 4090` and `rtx-4090` are one."""
    words = re.sub(r"\b(nvidia|amd|instinct|intel|tesla|geforce)\b|\(r\)", "", name.lower())
    return re.sub(r"[^a-z0-9]", "", words)


def _unknown(text: str, name: str) -> MptError:
    listed = {_plain(known): known for card in CARDS for known in (card.spec, *card.aliases)}
    close = [listed[match] for match in difflib.get_close_matches(_plain(name), listed, n=3, cutoff=0.5)]
    hint = f"Did you mean {' or '.join(close)}? " if close else ""
    return MptError(
        f"--machine {text}: no card called {name!r} is known",
        remedy=f"{hint}Known: {', '.join(card.spec for card in CARDS)}, cpu.",
    )
