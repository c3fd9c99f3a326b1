"""Tiny real runs: a two-layer Llama from scratch on the Python language reference, each in a process of its own.

Most are forked from a process that made the imports (`forks`); a `fresh` one is started as the supervisor starts it.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from mpt.hardware.specs import parse_machine
from mpt.planning.model_facts import learn_model_facts
from mpt.planning.modules import learn_modules
from mpt.planning.plan import resolve
from mpt.recipe.schema import Recipe
from mpt.running.journal import last_word, read_events
from mpt.running.run_directory import RunDirectory, write_atomically
from tests.training.forks import ENVIRONMENT, Forked, fork_server

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
BERT = {
    "model_type": "bert",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
FP16 = {"mode": "fp16", "allow_emulation": True}


def on_any_cpu(precision: Any) -> Any:
    """Allow the 16-bit modes to be emulated: a CPU without AVX512-BF16 trains in the same formats, only slower."""
    block = {"mode": precision} if isinstance(precision, str) else precision
    if block.get("mode") in ("bf16", "bf16_pure", "fp16"):
        return {"allow_emulation": True} | block
    return precision


def tiny_recipe(**changes: Any) -> Recipe:
    """Build the recipe; a change of a section replaces the keys that it names."""
    recipe: dict[str, Any] = {
        "model": {"config": LLAMA},
        "tokenizer": {"train": "byte_level_bpe", "vocab_size": 512},
        "data": {"source": "builtin:python-reference", "sequence_length": 64},
        "precision": "fp32",
        "micro_batch_size": 8,
        "training": {"max_steps": 8, "learning_rate": 3e-3, "save_steps": 4, "save_total_limit": 5},
    }
    for key, value in changes.items():
        old = recipe.get(key)
        recipe[key] = old | value if isinstance(old, dict) and isinstance(value, dict) else value
    recipe["precision"] = on_any_cpu(recipe["precision"])
    return Recipe.model_validate(recipe)


@dataclass
class Run:
    """A run directory, and the worker processes that are started in it."""

    directory: RunDirectory
    recipe: Recipe
    fault: dict[str, Any] | None = None
    """What befalls the worker (`tests.training.faulty_worker`)."""
    task_folder: str | None = None
    """Where a task of the user's own lies."""
    is_fresh: bool = False
    """Whether its workers are new interpreters, and several of them torchrun's."""

    @property
    def path(self) -> Path:
        return self.directory.path

    def prepare(self, attempt: int = 1, resume_from: str | None = None) -> None:
        """Write the attempt's plan, as the supervisor would."""
        modules = learn_modules(self.recipe)
        plan = resolve(
            self.recipe,
            parse_machine("cpu"),
            learn_model_facts(self.recipe),
            name="tiny",
            modules=modules,
            task_folder=self.task_folder,
        )
        text = json.dumps(plan.to_json() | {"resume_from": resume_from})
        self.directory.checkpoints.mkdir(parents=True, exist_ok=True)
        write_atomically(self.directory.attempt(attempt).plan, text)

    def start(self, attempt: int = 1, processes: int = 1) -> "subprocess.Popen[str] | Forked":
        log, arguments = self.directory.attempt(attempt).log, [str(self.path), str(attempt)]
        if not self.is_fresh:
            program = ["worker"] if self.fault is None else ["faulty", json.dumps(self.fault)]
            return fork_server().start([*program, *arguments], log, processes)
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--max-restarts", "0"]
        launcher += ["--master-port", str(free_port())]
        command = [sys.executable, *(launcher if processes > 1 else []), "-m", "mpt.training.worker", *arguments]
        with log.open("w") as output:
            return subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, text=True, env=os.environ | ENVIRONMENT
            )

    def train(self, attempt: int = 1, resume_from: str | None = None, processes: int = 1) -> int:
        """Run an attempt to its end; give the exit code."""
        self.prepare(attempt, resume_from)
        return self.start(attempt, processes).wait(timeout=400)

    def log(self, attempt: int = 1) -> str:
        return self.directory.attempt(attempt).log.read_text()

    @property
    def events(self) -> list[dict[str, Any]]:
        return read_events(self.directory.journal)

    def last_word(self, attempt: int = 1) -> dict[str, Any]:
        word = last_word(self.events, attempt)
        assert word is not None, self.log(attempt)
        return word

    def texts(self, kind: str, key: str) -> list[Any]:
        return [event[key] for event in self.events if event["kind"] == kind]

    @property
    def steps(self) -> dict[int, dict[str, Any]]:
        """The last metrics row of each step."""
        lines = self.directory.metrics.read_text().splitlines()
        rows = [json.loads(line) for line in lines if line.endswith("}")]  # a kill may have torn one
        return {row["step"]: row for row in rows if "loss" in row}

    @property
    def trajectory(self) -> dict[int, tuple[Any, ...]]:
        """What must repeat bit for bit, by step."""
        keys = ("loss", "grad_norm", "learning_rate", "loss_scale", "skipped", "tokens")
        return {step: tuple(row[key] for key in keys) for step, row in self.steps.items()}

    def audit(self, attempt: int = 1) -> dict[str, Any]:
        """What the audit found, by what was looked at."""
        report = json.loads(self.directory.attempt(attempt).audit.read_text())
        return {check["what"]: check["found"] for check in report["checks"]}

    def weights(self, folder: Path | None = None) -> dict[str, Any]:
        from safetensors.torch import load_file

        return load_file((folder or self.directory.final) / "model.safetensors")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def continue_from(run: Run, checkpoint: str, make: Callable[..., Run], processes: int = 1) -> Run:
    """Copy a run as it was when `checkpoint` was its newest, and train on from there: a kill at that moment."""
    step = int(checkpoint.rpartition("-")[2])
    resumed = make()
    resumed.recipe = run.recipe
    shutil.copytree(run.directory.checkpoints / checkpoint, resumed.directory.checkpoints / checkpoint)
    shutil.copytree(run.path / "tokenizer", resumed.path / "tokenizer")
    rows = [row for row in run.directory.metrics.read_text().splitlines() if json.loads(row)["step"] <= step]
    resumed.directory.metrics.write_text("\n".join([*rows, '{"step": 9, "torn']))
    assert resumed.train(2, checkpoint, processes) == 0, resumed.log(2)
    return resumed


def save_base(folder: Path) -> str:
    """Save a tiny Llama, as its seed draws it, to put adapters on."""
    from transformers import AutoModelForCausalLM, LlamaConfig, set_seed

    from mpt.training.tokenizer import train_tokenizer

    set_seed(42)
    config = LlamaConfig(vocab_size=512, **{key: value for key, value in LLAMA.items() if key != "model_type"})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    train_tokenizer((topics[name] for name in sorted(topics)), 512).save_pretrained(folder)
    return str(folder)
