"""What an attempt is asked to measure: `measure.json` in its folder, written by `mpt.measuring`, obeyed by the worker.

An attempt with that file makes its first steps as planned, writes what is asked for, and ends without saving a model.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from mpt.running.run_directory import AttemptDirectory, write_json


@dataclass(frozen=True, slots=True)
class Measure:
    """`steps` optimizer steps are made, or fewer where the run has fewer; `keeps_gradients` of the first one.

    `incident` is the folder of an incident whose step is made again, in the place of the run's own data and weights.
    `evaluates`: no step is made; the model is evaluated as it was loaded, with the adapters of the folder `adapter`.
    """

    steps: int
    keeps_gradients: bool = False
    incident: str | None = None
    evaluates: bool = False
    adapter: str | None = None


def gradients_file(attempt: AttemptDirectory) -> Path:
    """Name the file that holds the first step's gradients: fp32, unscaled, before clipping, by parameter."""
    return attempt.path / "gradients.safetensors"


def evaluation_file(attempt: AttemptDirectory) -> Path:
    """Name the file that says what an evaluation came to."""
    return attempt.path / "evaluation.json"


def ask_to_measure(attempt: AttemptDirectory, measure: Measure) -> None:
    """Write the wish before the attempt starts. Raises StorageError where the folder can't be written."""
    write_json(_file(attempt), asdict(measure))


def asked_measure(attempt: AttemptDirectory) -> Measure | None:
    """Read the wish; None for an attempt that simply trains."""
    file = _file(attempt)
    return Measure(**json.loads(file.read_text(encoding="utf-8"))) if file.exists() else None


def _file(attempt: AttemptDirectory) -> Path:
    return attempt.path / "measure.json"
