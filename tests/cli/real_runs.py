"""`python -m mpt train` as a person starts it: in a folder of its own, with a tiny recipe and a text file."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import yaml

from mpt.running.journal import read_events
from mpt.running.run_directory import RunDirectory

ROOT = Path(__file__).parents[2]
MPT = (sys.executable, "-m", "mpt")
RECIPE: dict[str, Any] = {
    "model": {"config": {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 32}},
    "tokenizer": {"train": "byte_level_bpe", "vocab_size": 300},
    "data": {"source": "reference.txt", "sequence_length": 32},
    "precision": "fp32",
    "micro_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "training": {"max_steps": 6, "save_steps": 3, "learning_rate": 1e-3, "eval_strategy": "steps", "eval_steps": 3},
    "sample": {"prompt": "The ", "max_new_tokens": 5},
}


@dataclass(frozen=True)
class Folder:
    """A working directory with `tiny.yaml` and `reference.txt` in it."""

    path: Path

    def write(self, **changes: Any) -> None:
        """Write the text and the recipe; a change replaces a whole top-level key."""
        text = "\n\n".join(topics[name] for name in sorted(topics))[:40_000]
        self.path.mkdir(exist_ok=True)
        self.path.joinpath("reference.txt").write_text(text, encoding="utf-8")
        self.path.joinpath("tiny.yaml").write_text(yaml.safe_dump({**RECIPE, **changes}), encoding="utf-8")

    @property
    def run(self) -> RunDirectory:
        return RunDirectory(self.path / "runs" / "tiny")

    @property
    def events(self) -> list[dict[str, Any]]:
        return read_events(self.run.journal)

    def listed(self, kind: str, key: str) -> list[Any]:
        return [event.get(key) for event in self.events if event["kind"] == kind]

    @property
    def plans(self) -> list[dict[str, Any]]:
        """The plans of the attempts so far."""
        return [json.loads(self.run.attempt(number).plan.read_text()) for number in self.run.attempt_numbers()]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Every whole line of the metrics so far."""
        if not self.run.metrics.exists():
            return []
        text = self.run.metrics.read_text(encoding="utf-8")
        return [json.loads(line) for line in text.split("\n")[:-1] if line.startswith("{") and line.endswith("}")]

    @property
    def files(self) -> set[str]:
        """Every file and folder under `runs`."""
        return {str(path.relative_to(self.path)) for path in self.path.joinpath("runs").rglob("*")}

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        """Start `mpt train` in a session of its own."""
        return subprocess.Popen(
            [*MPT, "train", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            cwd=self.path, env=environment(), start_new_session=True,
        )  # fmt: skip

    def train(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """Carry `mpt train` out to its end."""
        return subprocess.run(
            [*MPT, "train", *arguments], capture_output=True, text=True,
            cwd=self.path, env=environment(), timeout=400, check=False,
        )  # fmt: skip


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
