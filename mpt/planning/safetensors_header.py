"""The header of a safetensors file: every tensor's dtype, shape and place. JSON after its length in 8 bytes,
little-endian (huggingface/safetensors, README, "Format")."""

import json
import struct
from pathlib import Path
from typing import Any

LARGEST_HEADER = 100_000_000  # bytes; the format's own limit


def read_header(path: Path) -> dict[str, Any] | None:
    """Read the header: tensor name -> {"dtype", "shape", "data_offsets"}; None for what is no such file."""
    try:
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            header = json.loads(file.read(min(length, LARGEST_HEADER)))
    except (OSError, ValueError, struct.error):
        return None
    if not isinstance(header, dict):
        return None
    return {name: entry for name, entry in header.items() if name != "__metadata__"}
