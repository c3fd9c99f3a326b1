"""A training that a soak disturbs: started, looked at from outside while it works, and checked against the undisturbed
one. What it does is a real `mpt train`; this module reads its directory and signals its processes."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from mpt.running import checkpoints
from mpt.running.heartbeat import Beat, read_beat
from mpt.running.journal import read_events
from mpt.running.manifest import read_manifest
from mpt.running.metrics import every_row, read_rows
from mpt.running.run_directory import RunDirectory

ROOT = Path(__file__).resolve().parent.parent
NAME = "soaked"
STEPS = 90
SAVE_STEPS = 3
# Each run meets them, the undisturbed one too: the two updates are left out, and every resumption has to know of them.
BAD_LOSS_AT = (STEPS // 3, STEPS // 2)
# What must repeat bit for bit.
ROW_KEYS = ("loss", "grad_norm", "learning_rate", "skipped", "tokens")
# Nothing that is waited for takes this long, on however busy a machine.
PATIENCE_S = 300.0


class Broken(Exception):  # noqa: N818 - what a soak is there to find
    """The run did not keep a promise."""


def recipe(processes: int, saves_in_background: bool) -> dict[str, Any]:
    """A model of 0.3 million weights with dropout on the builtin text: a step takes 20 ms on a CPU, a save 100."""
    model = {"model_type": "gpt2", "n_embd": 96, "n_layer": 2, "n_head": 2, "n_positions": 32}
    model |= {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
    return {
        "model": {"config": model},
        "tokenizer": {"train": "byte_level_bpe", "vocab_size": 512},
        "data": {"source": "builtin:python-reference", "sequence_length": 32, "eval_fraction": 0},
        "precision": "fp32",
        "distributed": {"processes_per_node": processes},
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "background_saving": saves_in_background,
        "training": {
            "max_steps": STEPS,
            "save_steps": SAVE_STEPS,
            "save_total_limit": 3,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "cosine",
        },
        # Faults come faster here than anybody's patience would allow for.
        "restart": {
            "max_restarts": 100_000,
            "max_attempts_without_progress": 100_000,
            "backoff": 0,
            "step_timeout": 3,
            "first_step_timeout": 60,
            "phase_timeout": 20,
        },
        "health": {"known_good_after": 6},
        "recovery": {"margin": 0},
    }


class SoakRun:
    """A run directory under `folder`, and the supervisor at work in it, if one is."""

    def __init__(self, folder: Path, processes: int) -> None:
        self.folder = folder
        self.processes = processes
        self.directory = RunDirectory(folder / NAME)
        self.supervisor: subprocess.Popen[bytes] | None = None
        self.log = folder / "supervisor.log"
        self._journal = b""  # what it held at the last check
        folder.mkdir(parents=True, exist_ok=True)

    # --- acting

    def begin(self, *, saves_in_background: bool = False) -> None:
        """Begin the run: its numbers are the same, however it saves."""
        text = yaml.safe_dump(recipe(self.processes, saves_in_background))
        self.folder.joinpath("soak.yaml").write_text(text, encoding="utf-8")
        self.start()

    def start(self) -> None:
        """Start the command that began the run, which goes on with it."""
        bad_numbers = json.dumps({"nan_loss_at": BAD_LOSS_AT})
        command = [sys.executable, "-m", "tests.training.faulty_train", bad_numbers, "train"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        with self.log.open("ab") as log:
            self.supervisor = subprocess.Popen(
                [*command, str(self.folder / "soak.yaml"), "--name", NAME, "--runs-dir", str(self.folder)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, cwd=self.folder,
                start_new_session=True,
            )  # fmt: skip

    def end(self) -> int:
        """Wait for the supervisor's end and that of its workers; give its exit code."""
        assert self.supervisor is not None
        self.until(lambda: self.code is not None, "the supervisor does not end")
        pids = [beat.pid for beat in self.beats() if beat is not None]
        self.until(lambda: not any(map(is_alive, pids)), "workers outlive their supervisor")
        code, self.supervisor = self.supervisor.returncode, None
        return int(code)

    def kill(self) -> None:
        """End whatever is left of the run, without asking."""
        if self.supervisor is not None:
            self.supervisor.kill()
            self.end()

    def clear(self) -> None:
        """Forget the run, for another one in its place."""
        shutil.rmtree(self.directory.path)
        self._journal = b""

    def until(self, condition: Callable[[], bool], failing: str, every: float = 0.005) -> None:
        """Wait for what another process does."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            if time.monotonic() > deadline:
                raise Broken(f"{failing}, for {PATIENCE_S:.0f} s")
            time.sleep(every)

    # --- looking

    @property
    def code(self) -> int | None:
        """The supervisor's exit code; None while it works."""
        return None if self.supervisor is None else self.supervisor.poll()

    @property
    def attempt(self) -> int:
        return max(self.directory.attempt_numbers(), default=0)

    def beats(self, attempt: int | None = None) -> list[Beat | None]:
        """Where each rank of an attempt is, the newest by default."""
        files = self.directory.attempt(attempt or self.attempt)
        return [read_beat(files.heartbeat(rank)) for rank in range(self.processes)]

    def begun(self, attempt: int) -> int:
        """How many steps an attempt has begun, by its slowest rank."""
        return min(0 if beat is None else beat.steps_begun for beat in self.beats(attempt))

    def events(self) -> list[dict[str, Any]]:
        return read_events(self.directory.journal)

    def sound(self) -> list[Path]:
        """The checkpoints that verify, the newest last."""
        listed = [path for _, path in checkpoints.list_checkpoints(self.directory)]
        return [path for path in listed if checkpoints.verify(path) is None]

    # --- checking

    def check(self, reference: dict[int, dict[str, Any]]) -> None:
        """Check what holds at any moment of any run: journal, lineages, newest checkpoint, numbers. Raises Broken."""
        events = self._check_journal()
        lineage = check_lineages(events)
        self._check_newest(lineage)
        check_rows(self.directory, reference)

    def check_end(self, undisturbed: "SoakRun") -> None:
        """Check a finished run against the undisturbed one, bit for bit. Raises Broken."""
        rows = read_rows(self.directory)
        if sorted(rows) != list(range(1, STEPS + 1)):
            raise Broken(f"the metrics hold {len(rows)} steps of {STEPS}")
        weights = [run.directory.final.joinpath("model.safetensors").read_bytes() for run in (self, undisturbed)]
        if weights[0] != weights[1]:
            raise Broken("the final weights are not those of the undisturbed run")
        losses = [
            event["train_loss"]
            for run in (self, undisturbed)
            for event in read_events(run.directory.journal)
            if event["kind"] == "finished"
        ]
        if len(set(losses)) != 1:
            raise Broken(f"the runs end with different losses: {losses}")
        left = sorted(path.name for path in self.directory.checkpoints.glob(".*"))
        if left:
            raise Broken(f"the run left half-written or half-deleted folders: {', '.join(left)}")
        for command in (["checkpoints", "verify"], ["doctor"]):
            done = subprocess.run(
                [sys.executable, "-m", "mpt", *command, str(self.directory.path)],
                capture_output=True, text=True, cwd=ROOT, check=False,
            )  # fmt: skip
            if done.returncode:
                raise Broken(f"mpt {' '.join(command)} ends with {done.returncode}: {done.stderr}")

    def _check_journal(self) -> list[dict[str, Any]]:
        content = self.directory.journal.read_bytes()
        if not content.startswith(self._journal):
            raise Broken("the journal was changed where it had been written")
        self._journal = content
        return read_events(self.directory.journal)

    def _check_newest(self, lineage: int) -> None:
        """A checkpoint may be replaced or pruned while it is read: then there is another newest one."""
        wrong: str | None = None
        for _ in range(5):
            listed = checkpoints.list_checkpoints(self.directory)
            if not listed:
                return
            path = listed[-1][1]
            wrong = checkpoints.verify(path)
            if wrong is None:
                found = read_manifest(path)["lineage"]
                if found > lineage:
                    raise Broken(f"{path.name} is of lineage {found}, and the run is in {lineage}")
                return
            time.sleep(0.2)
        raise Broken(f"the newest checkpoint, {path.name}, can't be used: {wrong}")


def check_lineages(events: list[dict[str, Any]]) -> int:
    """Check that the committed step never goes back within a lineage; give the newest lineage. Raises Broken."""
    lineage, committed = 1, 0
    for event in events:
        if event["kind"] == "checkpoints_quarantined":
            if event["lineage"] < lineage:
                raise Broken(f"lineage {event['lineage']} is given up after {lineage} had begun")
            lineage, committed = event["lineage"] + 1, event["step"]
        elif event["kind"] == "checkpoint_saved":
            if event["step"] <= committed:
                raise Broken(f"{event['name']} is saved after step {committed} of the same lineage")
            committed = event["step"]
        elif event["kind"] == "attempt_started":
            begins = int((event["resume_from"] or "checkpoint-0").rpartition("-")[2])
            if begins < committed:
                raise Broken(f"attempt {event['attempt']} begins at step {begins}, and {committed} was committed")
            committed = begins  # a kill came between the rename and its record
    return lineage


def check_rows(directory: RunDirectory, reference: dict[int, dict[str, Any]]) -> None:
    """Check that every step that any attempt made has the numbers of the undisturbed run. Raises Broken."""
    for row in every_row(directory):
        wrong = [key for key in ROW_KEYS if row[key] != reference[row["step"]][key]]
        if wrong:
            raise Broken(f"step {row['step']} of attempt {row['attempt']} has another {', '.join(wrong)}")


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
