"""Throw random faults at a real training, and prove that it ends as if there had been none.

Each fault comes at a random moment of a `mpt train` that saves every few steps. When the run is back at work after it,
the journal is read and must have grown only, the newest checkpoint must verify, no committed step of a lineage may be
lost, and every step made so far must have the numbers of the undisturbed run. A run that comes to its end is compared
with that one bit for bit, and another begins. Prints a line a fault; exit code 1 where a promise was broken.
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from soak_faults import FAULTS, poison_the_newest
from soak_run import SAVE_STEPS, Broken, SoakRun

from mpt.errors import MptError
from mpt.running.metrics import read_rows


class Lane:
    """One run after another, with a chance of its own; `reference` is the undisturbed run."""

    def __init__(self, number: int, run: SoakRun, reference: SoakRun, chance: random.Random) -> None:
        self.number = number
        self.name = f"lane {number}"
        self.run = run
        self.reference = reference
        self.rows: dict[int, dict[str, Any]] = read_rows(reference.directory)
        self.chance = chance
        self.thrown: Counter[str] = Counter()
        self.ends = 0
        self.now = ""
        self._is_poisoned = False

    def soak(self, faults: int) -> str | None:
        """Throw so many faults, and let the last run end; give what was broken, None where nothing was."""
        try:
            self._begin()
            while self.thrown.total() < faults:
                self._throw()
            while self.ends == 0 or self.run.supervisor is not None:
                self._go_on(10**9)
        except (Broken, MptError, OSError) as error:
            return f"{self.name}, after {self.now or 'the start'}: {error or type(error).__name__}"
        finally:
            self.run.kill()
        return None

    def _throw(self) -> None:
        if not self._go_on(self.chance.randint(1, 3 * SAVE_STEPS)):
            return
        (fault,) = self.chance.choices(list(FAULTS), list(FAULTS.values()))
        if fault is poison_the_newest and self._is_poisoned:  # a second time, recovery would rightly change the plan
            return
        self._is_poisoned = self._is_poisoned or fault is poison_the_newest
        at = max((beat.step for beat in self.run.beats() if beat is not None), default=0)
        self.now = "a fault"
        try:
            said = fault(self.run, self.chance)
        except (ProcessLookupError, FileNotFoundError):
            return  # the process had ended, or the checkpoint was deleted: nothing was done
        self.now = said
        self.thrown[fault.__name__] += 1
        self._go_on(1)
        print(f"{self.name} {self.thrown.total():4}  step {at:3}  {said}", flush=True)

    def _go_on(self, steps: int) -> bool:
        """Let the newest attempt make some steps, and check the run; False where it ended, and another was begun."""
        run = self.run
        run.until(lambda: run.code is not None or run.begun(run.attempt) > steps, "the run makes no step", every=0.01)
        run.check(self.rows)
        if run.code is None:
            return True
        code = run.end()
        if code:
            raise Broken(f"the run ended with exit code {code}:\n{run.log.read_text(errors='replace')[-3000:]}")
        run.check_end(self.reference)
        self.ends += 1
        self._is_poisoned = False
        print(f"{self.name}       a run ended after {run.attempt} attempts, as the undisturbed one", flush=True)
        run.clear()
        if steps < 10**9:
            self._begin()
        return False

    def _begin(self) -> None:
        """Begin a run; of two after each other, and of those of two lanes, one saves in the background."""
        self.run.begin(saves_in_background=(self.number + self.ends) % 2 == 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=200, help="how many, in all lanes together")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--lanes", type=int, default=2, help="runs side by side")
    parser.add_argument("--processes", type=int, default=1, help="ranks of a run")
    options = parser.parse_args()
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="mpt-soak-"))
    undisturbed = SoakRun(folder / "undisturbed", options.processes)
    undisturbed.begin()
    code = undisturbed.end()
    if code:
        sys.exit(f"the undisturbed run ended with {code}:\n{undisturbed.log.read_text(errors='replace')[-3000:]}")
    lanes = [
        Lane(
            number,
            SoakRun(folder / f"lane-{number}", options.processes),
            undisturbed,
            random.Random(f"{options.seed} {number}"),
        )
        for number in range(1, options.lanes + 1)
    ]
    shares = [options.faults // len(lanes) + (number < options.faults % len(lanes)) for number in range(len(lanes))]
    with ThreadPoolExecutor(len(lanes)) as pool:
        broken = [said for said in pool.map(Lane.soak, lanes, shares) if said is not None]
    thrown: Counter[str] = sum((lane.thrown for lane in lanes), Counter())
    for name, count in thrown.most_common():
        print(f"{count:5}  {name.replace('_', ' ')}")
    minutes = (time.monotonic() - began) / 60
    ends = sum(lane.ends for lane in lanes)
    print(f"{thrown.total()} faults, {ends} runs to the end, {minutes:.0f} minutes, --seed {options.seed}")
    for said in broken:
        print(f"BROKEN in {said}")
    if broken:
        print(f"the runs are kept in {folder}")
        return 1
    shutil.rmtree(folder)
    print("nothing was lost: every step and the final weights are those of the undisturbed run")
    return 0


if __name__ == "__main__":
    sys.exit(main())
