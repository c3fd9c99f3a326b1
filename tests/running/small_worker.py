"""A worker without torch that keeps the protocol: journal, metrics, checkpoints, stop file, last word.

Its "weights" are a chain of hashes, so that a resumed run equals an uninterrupted one only if no step was lost or made
twice. What befalls it stands in the environment variable SMALL_WORKER, as JSON.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from mpt.running.checkpoints import commit, promote
from mpt.running.heartbeat import Heartbeat, read_beat
from mpt.running.journal import Journal
from mpt.running.lineage import current_lineage
from mpt.running.run_directory import RunDirectory
from mpt.running.stacks import answer_with_stacks
from mpt.running.tie import die_with_parent

DEFAULTS = {"steps": 20, "save_steps": 5, "step_s": 0.01, "setup_s": 0.0, "faults": [], "save_s": 0.0}


class Worker:
    def __init__(self, run: RunDirectory, attempt: int) -> None:
        self.run = run
        self.attempt = attempt
        self.rank = int(os.environ.get("RANK", "0"))
        self.journal = Journal(run.journal, attempt, self.rank)
        self.wishes = DEFAULTS | json.loads(os.environ.get("SMALL_WORKER", "{}"))
        self.state = "begin"
        answer_with_stacks(run.attempt(attempt), self.rank)
        self.heartbeat = Heartbeat(run.attempt(attempt), self.rank)

    def train(self) -> int:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if self.rank == 0:
            self.journal.append("phase", phase="imports")
        self.plan = json.loads(self.run.attempt(self.attempt).plan.read_text())
        resume_from = self.plan["resume_from"]
        self.suffer(0)
        time.sleep(self.wishes["setup_s"])
        first = 1
        if resume_from is not None:
            folder = self.run.checkpoints / resume_from
            self.state = folder.joinpath("state").read_text()
            first = int(resume_from.rpartition("-")[2]) + 1
        steps = self.wishes["steps"]
        if self.rank == 0:
            self.journal.append("training_started", step=first - 1, max_steps=steps, samples=steps)
        for step in range(first, steps + 1):
            self.heartbeat.step(step)
            self.suffer(step)
            time.sleep(self.wishes["step_s"])
            self.state = hashlib.sha256(f"{self.state} {step}".encode()).hexdigest()
            if self.rank > 0:
                continue
            self.write_row(step)
            is_stopping = self.run.attempt(self.attempt).stop.exists() and "ignore_stop" not in self.wishes
            if is_stopping:
                self.journal.append("stop_requested", step=step, by="stop file")
            if is_stopping or step % self.wishes["save_steps"] == 0 or step == steps:
                self.save(step)
            if is_stopping:
                self.journal.append("stopped", step=step, checkpoint=f"checkpoint-{step}")
                return 80
        if self.rank > 0:
            return 0
        self.run.final.mkdir(exist_ok=True)
        self.run.final.joinpath("state").write_text(self.state)
        self.journal.append("finished", step=steps, train_loss=1.0, eval_loss=None)
        time.sleep(self.wishes.get("leave_s", 0))
        return 0

    def write_row(self, step: int) -> None:
        row = {"step": step, "attempt": self.attempt, "loss": int(self.state[:8], 16) / 2**32, "learning_rate": 1e-3}
        with self.run.metrics.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def save(self, step: int) -> None:
        self.heartbeat.phase("saving")
        staging = self.run.checkpoints / f".staging-{step}"
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        staging.joinpath("state").write_text(self.state)
        time.sleep(self.wishes["save_s"])
        final = self.run.checkpoints / f"checkpoint-{step}"
        lineage = current_lineage(self.run)
        world_size = self.plan["values"]["world_size"]["value"]
        commit(staging, final, step=step, world_size=world_size, lineage=lineage, health={"finite": True})
        self.journal.append("checkpoint_saved", step=step, name=f"checkpoint-{step}")
        if self.wishes.get("promotes") and step > self.wishes["save_steps"]:
            promote(self.journal, step - self.wishes["save_steps"])

    def has_lost_peer(self) -> bool:
        beat = read_beat(self.run.attempt(self.attempt).heartbeat(1))
        if beat is None:
            return False
        try:
            return Path(f"/proc/{beat.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except FileNotFoundError:
            return True

    def suffer(self, step: int) -> None:
        """Let happen what the test wants at this step of this attempt and rank (by default in every attempt)."""
        for fault in self.wishes["faults"]:
            here = (fault["step"], fault.get("attempt", self.attempt), fault.get("rank", 0))
            if here == (step, self.attempt, self.rank):
                self.happen(fault["do"], step)

    def happen(self, what: str, step: int) -> None:
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif what == "exit":
            print("the last thing it said", flush=True)
            os._exit(17)
        elif what == "raise":
            self.journal.append("failed", problem="ValueError: odd", remedy="See the log.", exit_code=1)
            sys.exit(1)
        elif what == "diverge":
            if self.plan["values"]["learning_rate"]["value"] > self.wishes.get("calm_rate", 0.0):
                told = {"code": "N2", "onset": step, "reason": "loss is nan, for 3 steps in a row"}
                self.journal.append("diverged", step=step, what="loss", value=float("nan"), **told)
                sys.exit(81)
        elif what.isdecimal():
            self.journal.append("failed", problem=f"a problem {what}", remedy="Mend it.", exit_code=int(what))
            sys.exit(int(what))
        elif what == "stop_itself":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif what == "sleep":
            time.sleep(300)
        elif what == "lose_peer":
            # As a rank that waits for a dead one in a collective: it notices after the other's end, and dies of it.
            while not self.has_lost_peer():
                time.sleep(0.01)
            self.journal.append("failed", problem="connection reset by peer", remedy="", exit_code=1)
            sys.exit(1)
        elif what == "need_memory":
            size = self.plan["values"]["micro_batch_size"]["value"]
            if size > 2:
                self.journal.append("failed", problem=f"out of memory: {size}", remedy="Less.", exit_code=86)
                sys.exit(86)
        elif what == "leave_an_orphan":
            # As a data loader does: a child that outlives its killed parent, in a session of its own.
            child = subprocess.Popen(["sleep", "300"], start_new_session=True)
            Path(self.run.path / "orphan").write_text(str(child.pid))
            os.kill(os.getpid(), signal.SIGKILL)
        else:
            raise AssertionError(what)


if __name__ == "__main__":
    die_with_parent()
    sys.exit(Worker(RunDirectory(Path(sys.argv[1])), int(sys.argv[2])).train())
