"""Which optional packages are installed here: found without importing them."""

import os
import re
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from shutil import which

# Packages on which a decision depends.
CONSIDERED = (
    "accelerate",
    "bitsandbytes",
    "datasets",
    "deepspeed",
    "liger_kernel",
    "peft",
    "scipy",
    "sklearn",
    "torch",
    "torchao",
    "transformer_engine",
    "transformers",
    # Trackers (`mpt.recipe.trackers`).
    *("azureml", "clearml", "codecarbon", "comet_ml", "dagshub", "dvclive", "flytekit", "mlflow", "neptune"),
    *("swanlab", "tensorboard", "trackio", "wandb"),
)


# Distributions that share a folder, or are of use in some versions alone: from, and below (transformers 5.23,
# utils/import_utils.py).
VERSIONS: dict[str, tuple[tuple[int, ...], tuple[int, ...] | None]] = {
    "flash-attn": ((2, 3, 3), None),
    "flash-attn-3": ((), None),
    "flash-attn-4": ((), None),
    "kernels": ((0, 18, 2), (0, 19)),
}


def installed_packages() -> frozenset[str]:
    """Name those of the considered packages that are installed in this environment, in a version that is of use."""
    found = {name for name in CONSIDERED if find_spec(name) is not None}
    has_compiler = any(which(name) for name in (os.environ.get("CXX"), "g++", "clang++") if name)
    return frozenset(found | {name for name in VERSIONS if _is_of_use(name)} | ({"c++"} if has_compiler else set()))


def _is_of_use(name: str) -> bool:
    try:
        installed = numbers(version(name))
    except PackageNotFoundError:
        return False
    first, below = VERSIONS[name]
    return first <= installed and (below is None or installed < below)


def numbers(text: str) -> tuple[int, ...]:
    """Read the numbers that a version begins with.

    >>> numbers("2.8.3.post1"), numbers("3.0.0b1"), numbers("dev")
    ((2, 8, 3), (3, 0, 0), ())
    """
    read = re.match(r"\d+(\.\d+)*", text)
    return tuple(map(int, read[0].split("."))) if read else ()
