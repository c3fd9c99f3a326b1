"""Compare two files of gradients: `python -m mpt.training.compare_gradients CANDIDATE REFERENCE`, for
`mpt.measuring.compare`, which imports no torch.

Prints one JSON object: the cosine over all parameters at once, and those of the parameters that differ most.
"""

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

# Elements that are in memory as float64 at once.
CHUNK = 1 << 22
LOWEST = 5
# A parameter with less than this share of the gradient's norm is not listed: its own may be rounding and nothing else
# (the bias of an attention's keys has the gradient zero, mathematically).
TELLING_SHARE = 1e-4


def compare_gradients(candidate: Path, reference: Path) -> dict[str, Any]:
    """Compute `cosine`, `norms`, `lowest`, `parameters` and `dropout`; all sums are float64.

    `cosine` is None where a gradient is zero or not finite as a whole, and the norm of one that is not finite is None.
    Parameters that only one file has are left out and counted in `unmatched`.
    """
    products: dict[str, tuple[float, float, float]] = {}
    with safe_open(candidate, framework="pt") as one, safe_open(reference, framework="pt") as other:
        names, others = set(one.keys()), set(other.keys())
        for name in sorted(names & others):
            products[name] = _products(one.get_tensor(name), other.get_tensor(name))
        dropout = max(float((file.metadata() or {}).get("dropout", 0)) for file in (one, other))
    dot, first, second = (sum(product[place] for product in products.values()) for place in range(3))
    return {
        "cosine": _cosine(dot, first, second),
        "norms": [math.sqrt(square) if math.isfinite(square) else None for square in (first, second)],
        "lowest": _lowest(products, second),
        "parameters": len(products),
        "unmatched": len(names ^ others),
        "dropout": dropout,
    }


def _products(one: torch.Tensor, other: torch.Tensor) -> tuple[float, float, float]:
    """Sum a*b, a*a and b*b."""
    dot = first = second = 0.0
    for a, b in zip(one.flatten().split(CHUNK), other.flatten().split(CHUNK), strict=True):
        wide_a, wide_b = a.double(), b.double()
        dot += float(wide_a @ wide_b)
        first += float(wide_a @ wide_a)
        second += float(wide_b @ wide_b)
    return dot, first, second


def _lowest(products: Mapping[str, tuple[float, float, float]], total: float) -> list[dict[str, Any]]:
    """List the parameters with the lowest cosines, each with its share of the reference's norm."""
    found: list[dict[str, Any]] = []
    for name, (dot, first, second) in products.items():
        cosine = _cosine(dot, first, second)
        share = math.sqrt(second / total) if 0 < total < math.inf else 0.0
        if cosine is not None and share >= TELLING_SHARE:
            found.append({"name": name, "cosine": cosine, "share": share})
    return sorted(found, key=lambda entry: entry["cosine"])[:LOWEST]


def _cosine(dot: float, first: float, second: float) -> float | None:
    if not (0 < first < math.inf and 0 < second < math.inf):
        return None
    return max(-1.0, min(1.0, dot / math.sqrt(first) / math.sqrt(second)))


if __name__ == "__main__":
    print(json.dumps(compare_gradients(Path(sys.argv[1]), Path(sys.argv[2]))))
