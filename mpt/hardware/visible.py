"""Which GPUs a process will see: CUDA_VISIBLE_DEVICES and its kin, read as torch and CUDA read them. Pure.

torch/cuda/__init__.py: `_parse_visible_devices`, `_transform_uuid_to_ordinals`, `_device_count_nvml`. Its rules are odd
and are kept: parsing stops at the first thing that makes no sense, and a repeated device leaves none at all.
"""

import re
from collections.abc import Mapping, Sequence


def visible_ordinals(value: str | None, uuids: Sequence[str | None]) -> list[int]:
    """The positions in the driver's list that a process sees; `value` None means the variable is not set.

    >>> two = ["GPU-aaaa", "GPU-abbb"]
    >>> [visible_ordinals(value, two) for value in (None, "1,0", "", "1,1")]
    [[0, 1], [1, 0], [], []]
    >>> visible_ordinals("GPU-ab", two), visible_ordinals("GPU-a", two)
    ([1], [])
    """
    if value is None:
        return list(range(len(uuids)))
    if value.startswith("GPU-"):
        return _by_prefix(value, "GPU-", uuids)
    chosen: list[int] = []
    for element in value.split(","):
        ordinal = _leading_integer(element.strip())
        if ordinal in chosen:
            return []
        if ordinal < 0:
            break
        chosen.append(ordinal)
    # The first ordinal that does not exist ends the list, as in _device_count_nvml.
    first_bad = next((place for place, ordinal in enumerate(chosen) if ordinal >= len(uuids)), len(chosen))
    return chosen[:first_bad]


def visible_mig(value: str, uuids: Sequence[str | None]) -> list[int]:
    """The positions of the MIG instances that a value such as `MIG-5c5c...` names."""
    return _by_prefix(value, "MIG-", uuids)


def visible_amd_ordinals(environment: Mapping[str, str], uuids: Sequence[str | None]) -> list[int]:
    """AMD's two steps: ROCR_VISIBLE_DEVICES chooses, then HIP_VISIBLE_DEVICES counts within what is left.

    HIP reads CUDA_VISIBLE_DEVICES where its own variable is not set (ROCm documentation, "GPU isolation techniques").

    >>> visible_amd_ordinals({"ROCR_VISIBLE_DEVICES": "2,3", "HIP_VISIBLE_DEVICES": "1"}, [None] * 4)
    [3]
    """
    left = visible_ordinals(environment.get("ROCR_VISIBLE_DEVICES"), uuids)
    hip = environment.get("HIP_VISIBLE_DEVICES", environment.get("CUDA_VISIBLE_DEVICES"))
    return [left[place] for place in visible_ordinals(hip, [uuids[ordinal] for ordinal in left])]


def _leading_integer(text: str) -> int:
    """The integer that a text begins with, as strtoul reads it: `1gpu2` is 1. No integer: -1."""
    match = re.match(r"[+-]?[0-9]+", text)
    return int(match[0]) if match else -1


def _by_prefix(value: str, prefix: str, uuids: Sequence[str | None]) -> list[int]:
    candidates: list[str] = []
    for element in value.split(","):
        if element in candidates:
            return []
        if not element.startswith(prefix):
            break
        candidates.append(element)
    chosen: list[int] = []
    for candidate in candidates:
        matches = [place for place, uuid in enumerate(uuids) if uuid is not None and uuid.startswith(candidate)]
        if len(matches) != 1:  # unknown or ambiguous: parsing ends here
            break
        if matches[0] in chosen:
            return []
        chosen.append(matches[0])
    return chosen
