"""What the watch over the numbers, a checkpoint, and a restart cost, each against doing without.

steps: one real training, in which each three steps are judged by the health monitor, by one that judges nothing, and by
that one again (the null control), in a random order. CPU time of the process, from one step's beginning to the next
one's; what is printed is the median over all such threes of the relative difference. Two programs beside each other
could not show a per cent. The time inside the monitor, and inside all of the watch over a step, is counted too.

saves: the Trainer's own and mpt's, in turn, of one model with its AdamW state, in one process and on one disk. mpt's
looks for numbers that are not finite, hashes every file and has the disk confirm it; so a plain save whose files are
fsynced afterwards stands beside it, and a plain one again as null control. Of a save in the background only what the
training waits for is counted: the copy, and the small files.

restarts: seconds from a `kill -9` of the training process to the end of the next step, by `mpt train` and by `torchrun
--max-restarts 3` with a plain script that resumes from its last checkpoint; and the CPU seconds of the new process. The
clock counts what else the machine does; CPU seconds do not.
"""

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mpt.errors import ExitCode
from mpt.hardware.specs import parse_machine
from mpt.planning.model_facts import learn_model_facts
from mpt.planning.modules import learn_modules
from mpt.planning.plan import resolve
from mpt.recipe.schema import Recipe
from mpt.running.heartbeat import read_beat
from mpt.running.measured import Measure, ask_to_measure
from mpt.running.run_directory import RunDirectory, make_durable, write_atomically

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("steps", "saves", "restarts")
WARM_UP = 6  # steps
HEAD = 64
STEP_FIRST = 2  # of the save part: AdamW has its state after the first step
POLL_S = 0.02
GIVE_UP_S = 300.0
WATCHED = ("begin", "add_batch", "add_loss", "agree", "conclude", "write_step")
PLAIN, SYNCED, MPT, AGAIN = "plain", "plain, then fsync", "mpt", "plain again"
BEHIND = "mpt in the background, until the training goes on"


def recipe_of(options: argparse.Namespace, *, hidden: int, layers: int, steps: int) -> Recipe:
    config = {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": hidden * 11 // 4 // 16 * 16,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // HEAD,
        "max_position_embeddings": options.sequence_length,
    }
    return Recipe.model_validate(
        {
            "model": {"config": config},
            "tokenizer": {"train": "byte_level_bpe", "vocab_size": 2048},
            "data": {
                "source": "builtin:python-reference",
                "sequence_length": options.sequence_length,
                "eval_fraction": 0,
            },
            "precision": "fp32",
            "micro_batch_size": options.batch,
            "gradient_accumulation_steps": 1,
            "training": {"max_steps": steps, "learning_rate": 1e-4, "save_strategy": "no"},
        }
    )


# --- in a process of mpt's worker


def probe(kind: str, run: RunDirectory, rounds: int) -> int:
    """Carry out the run's first attempt with clocks in it; what they say goes into probe.json."""
    told: dict[str, Any] = {}
    {"steps": clock_steps, "saves": clock_saves}[kind](told, run, rounds)
    from mpt.training.worker import main as work

    code = work([str(run.path), "1"])
    run.path.joinpath("probe.json").write_text(json.dumps(told), encoding="utf-8")
    return code


def clock_steps(told: dict[str, Any], run: RunDirectory, rounds: int) -> None:
    """Let each step be judged by one of three monitors, and count its CPU time."""
    from mpt.training import session
    from mpt.training.health import HealthMonitor
    from mpt.training.step_watch import StepWatch
    from mpt.training.verdict import FINE, Verdict

    inside = {"monitor": 0.0, "watch": 0.0, "judged": 0}

    class Timed(HealthMonitor):
        def before_update(self, *arguments: Any) -> Verdict:
            began = time.thread_time()
            verdict = super().before_update(*arguments)
            inside["monitor"] += time.thread_time() - began
            inside["judged"] += 1
            return verdict

        def after_update(self, *arguments: Any, **keywords: Any) -> Verdict:
            began = time.thread_time()
            verdict = super().after_update(*arguments, **keywords)
            inside["monitor"] += time.thread_time() - began
            return verdict

    class Idle(HealthMonitor):
        def before_update(self, *arguments: Any) -> Verdict:
            return FINE

        def after_update(self, *arguments: Any, **keywords: Any) -> Verdict:
            return FINE

    def timed(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            began = time.thread_time()
            try:
                return method(*arguments, **keywords)
            finally:
                inside["watch"] += time.thread_time() - began

        return call

    for name in WATCHED:
        setattr(StepWatch, name, timed(getattr(StepWatch, name)))
    begin, build = StepWatch.begin, session.build_monitor
    monitors: list[HealthMonitor] = []
    threes: list[list[float]] = []
    order: list[int] = []
    draw = random.Random(0)

    def build_all(plan: Any) -> HealthMonitor:
        monitor = build(plan)
        monitor.__class__ = Timed
        monitors.append(monitor)
        for _ in range(2):
            monitors.append(build(plan))
            monitors[-1].__class__ = Idle
        return monitor

    def begin_next(watch: StepWatch, number: int, learning_rate: float) -> None:
        now = time.process_time()
        if order:
            threes[-1][order.pop(0)] += now
        if not order:
            order.extend(draw.sample(range(3), 3))
            threes.append([0.0, 0.0, 0.0])
        watch.health = monitors[order[0]]
        threes[-1][order[0]] -= time.process_time()
        begin(watch, number, learning_rate)

    session.build_monitor = build_all
    StepWatch.begin = begin_next  # type: ignore[method-assign]
    told |= {"threes": threes, "inside": inside}


def clock_saves(told: dict[str, Any], run: RunDirectory, rounds: int) -> None:
    """Save in each way at one step, in another order each round."""
    from transformers import Trainer

    from mpt.training.background import Background
    from mpt.training.trainer import PlanTrainer, StepHooks

    told |= {way: [] for way in (PLAIN, SYNCED, MPT, BEHIND, AGAIN)} | {"bytes": {}}
    on_step_end = StepHooks.on_step_end

    def save_plainly(trainer: PlanTrainer, folder: Path) -> Path:
        trainer.saver.staging = folder
        try:
            Trainer._save_checkpoint(trainer, trainer.model_wrapped, None)
        finally:
            trainer.saver.staging = None
        return folder

    def save(trainer: PlanTrainer, way: str) -> Path:
        if way in (MPT, BEHIND):
            trainer.saver.newest = None
            trainer.saver.background = Background() if way == BEHIND else None
            trainer._save_checkpoint(trainer.model_wrapped, None)
            return run.checkpoints / f"checkpoint-{trainer.state.global_step}"
        folder = save_plainly(trainer, run.checkpoints / "plain")
        if way == SYNCED:
            for path in [*folder.rglob("*"), folder]:
                make_durable(path)
        return folder

    def save_all(hooks: StepHooks, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        if state.global_step == STEP_FIRST:
            ways = [PLAIN, SYNCED, MPT, BEHIND, AGAIN]
            for number in range(rounds + 1):  # the first is not counted
                for way in ways:
                    os.sync()
                    clock, cpu = time.perf_counter(), time.process_time()
                    folder = save(hooks.trainer, way)
                    spent = (time.perf_counter() - clock, time.process_time() - cpu)
                    hooks.trainer.saver.finish()
                    told["bytes"][way] = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
                    shutil.rmtree(folder)
                    if number:
                        told[way].append(spent)
                ways = [*ways[1:], ways[0]]
        on_step_end(hooks, args, state, control, **keywords)

    StepHooks.on_step_end = save_all  # type: ignore[method-assign]


def run_probe(kind: str, recipe: Recipe, steps: int, rounds: int) -> dict[str, Any]:
    """Start a worker with clocks in it and give what they said."""
    plan = resolve(recipe, parse_machine("cpu"), learn_model_facts(recipe), name="bench", modules=learn_modules(recipe))
    with tempfile.TemporaryDirectory(prefix="bench-health-") as scratch:
        run = RunDirectory(Path(scratch) / "run")
        run.checkpoints.mkdir(parents=True)
        write_atomically(run.attempt(1).plan, json.dumps(plan.to_json()))
        ask_to_measure(run.attempt(1), Measure(steps))
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, __file__, "--probe", kind, str(run.path), "--rounds", str(rounds)]
        with run.attempt(1).log.open("w") as log:
            status = subprocess.run(command, stdout=log, stderr=log, env=environment, check=False).returncode
        if status != ExitCode.STOPPED:  # as a measured attempt ends
            sys.exit(f"{kind} ended with {status}:\n{run.attempt(1).log.read_text()[-3000:]}")
        told: dict[str, Any] = json.loads(run.path.joinpath("probe.json").read_text(encoding="utf-8"))
        return told


# --- what is measured


def measure_steps(options: argparse.Namespace) -> None:
    recipe = recipe_of(options, hidden=options.hidden, layers=2, steps=options.steps)
    costs: list[float] = []
    controls: list[float] = []
    steps: list[float] = []
    monitor_us: list[float] = []
    watch_us: list[float] = []
    for number in range(options.rounds):
        told = run_probe("steps", recipe, options.steps, options.rounds)
        threes = told["threes"][WARM_UP // 3 : -1]  # the last one may be unfinished
        costs += [(judged - idle) / idle for judged, idle, _ in threes]
        controls += [(again - idle) / idle for _, idle, again in threes]
        steps += [time for three in threes for time in three]
        monitor_us.append(1e6 * told["inside"]["monitor"] / told["inside"]["judged"])
        watch_us.append(1e6 * told["inside"]["watch"] / options.steps)
        print(f"round {number + 1}: {statistics.median(costs):+.2%} so far", file=sys.stderr)
    step_us = 1e6 * statistics.median(steps)
    tokens = options.batch * options.sequence_length
    print(f"steps: {len(costs)} threes of steps in {options.rounds} processes, {tokens} tokens a step")
    print("| | median | 95 % interval of the median |")
    print("|---|---|---|")
    for name, values in (("judged, over not judged", costs), ("null control", controls)):
        low, high = interval(values)
        print(f"| CPU time of a step, {name} | {statistics.median(values):+.2%} | {low:+.2%} to {high:+.2%} |")
    print(
        f"| inside the monitor | {statistics.median(monitor_us):.0f} us of {step_us / 1000:.1f} ms a step "
        f"| {statistics.median(monitor_us) / step_us:.3%} of it |"
    )
    print(
        f"| inside all of the watch: sums, verdicts, heartbeat, metrics row | {statistics.median(watch_us):.0f} us "
        f"| {statistics.median(watch_us) / step_us:.3%} |"
    )


def measure_saves(options: argparse.Namespace) -> None:
    recipe = recipe_of(options, hidden=options.save_hidden, layers=options.save_layers, steps=STEP_FIRST + 1)
    told = run_probe("saves", recipe, STEP_FIRST, options.rounds)
    size = told["bytes"]
    print(
        f"saves: {learn_model_facts(recipe).parameters / 1e6:.0f} M parameters with their AdamW state, "
        f"{size[PLAIN] / 1e6:.0f} MB on the disk, {(size[MPT] - size[PLAIN]) / 1e3:.1f} kB more by mpt; "
        f"{options.rounds} rounds"
    )
    print(
        "| | CPU s, the least | over plain | median (range) | s by the clock, the least | over plain | median (range) |"
    )
    print("|---|---|---|---|---|---|---|")
    for way in (PLAIN, AGAIN, SYNCED, MPT, BEHIND):
        cells = []
        for column in (1, 0):
            values = [spent[column] for spent in told[way]]
            # What else the machine does only ever adds: the least is what a save takes.
            least = min(spent[column] for spent in told[PLAIN])
            cells += [f"{min(values):.2f}", f"{min(values) / least:.2f}", spread(values)]
        print(f"| {way} | {' | '.join(cells)} |")


def measure_restarts(options: argparse.Namespace) -> None:
    found: dict[str, list[tuple[float, float]]] = {"mpt": [], "torchrun": []}
    for number in range(options.rounds):
        for name, start in (("mpt", start_mpt), ("torchrun", start_torchrun)):
            with tempfile.TemporaryDirectory(prefix="bench-health-") as scratch:
                found[name].append(kill_and_wait(*start(Path(scratch), options)))
            print(f"round {number + 1}: {name}: {found[name][-1][0]:.1f} s", file=sys.stderr)
    print(f"restarts: kill -9 to the end of the next step, {options.rounds} times each")
    print("| | s by the clock | range | CPU s of the new process | range |")
    print("|---|---|---|---|---|")
    for name, values in found.items():
        seconds, cpu = [value[0] for value in values], [value[1] for value in values]
        told = [f"{statistics.median(each):.1f} | {min(each):.1f} to {max(each):.1f}" for each in (seconds, cpu)]
        print(f"| {name} | {' | '.join(told)} |")


Steps = Callable[[], list[tuple[int, int]]]  # (process, step) of each step so far


def start_mpt(folder: Path, options: argparse.Namespace) -> tuple["subprocess.Popen[bytes]", Steps]:
    training = {"max_steps": 100000, "learning_rate": 2e-3, "lr_scheduler_type": "cosine", "warmup_steps": 5}
    training |= {"weight_decay": 0.1, "save_steps": 5, "save_total_limit": 2}
    run = RunDirectory(folder / "run")
    command = [
        *(sys.executable, "-m", "mpt", "train", "recipes/quickstart.yaml", "--runs-dir", str(folder), "--name", "run"),
        *("precision=fp32", f"micro_batch_size={options.batch}", f"global_batch_size={options.batch}"),
        *("data.eval_fraction=0", "sample=null", "data.sequence_length=256", f"training={json.dumps(training)}"),
    ]

    def steps() -> list[tuple[int, int]]:
        found = []
        for row in lines_of(run.metrics):
            beat = read_beat(run.attempt(row["attempt"]).heartbeat(0))
            found.append((0 if beat is None else beat.pid, row["step"]))
        return found

    return launch(command, folder), steps


def start_torchrun(folder: Path, options: argparse.Namespace) -> tuple["subprocess.Popen[bytes]", Steps]:
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"),
        *("--max-restarts", "3", str(ROOT / "scripts/plain_trainer.py"), "--steps", "100000", "--precision", "fp32"),
        *("--batch", str(options.batch), "--output", str(folder / "run"), "--save-steps", "5"),
    ]
    told = folder / "run/steps.jsonl"
    return launch(command, folder), lambda: [(row["pid"], row["step"]) for row in lines_of(told)]


def launch(command: Sequence[str], folder: Path) -> "subprocess.Popen[bytes]":
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with folder.joinpath("output.txt").open("w") as output:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
        )


def kill_and_wait(program: "subprocess.Popen[bytes]", steps: Steps) -> tuple[float, float]:
    """Kill the training process once it has saved and gone on; give seconds to the next step, and its CPU time."""
    try:
        made = wait_for(program, steps, lambda found: len(found) >= 8)
        victim = made[-1][0]
        os.kill(victim, signal.SIGKILL)
        killed = time.monotonic()
        made = wait_for(program, steps, lambda found: bool(found) and found[-1][0] not in (0, victim))
        return time.monotonic() - killed, cpu_of(made[-1][0])
    finally:
        os.killpg(program.pid, signal.SIGKILL)  # its own session, which it leads
        program.wait()


def wait_for(
    program: "subprocess.Popen[bytes]", steps: Steps, is_there: Callable[[list[tuple[int, int]]], bool]
) -> list[tuple[int, int]]:
    began = time.monotonic()
    while program.poll() is None and time.monotonic() - began < GIVE_UP_S:
        made = steps()
        if is_there(made):
            return made
        time.sleep(POLL_S)
    sys.exit(f"{program.args!r} made no step for {GIVE_UP_S:g} s, or ended with {program.returncode}")


def cpu_of(pid: int) -> float:
    """Read the CPU seconds that a process has used so far, all threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def lines_of(path: Path) -> list[dict[str, Any]]:
    """Read whole JSON lines; the last may be under way."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1] if line]


# --- numbers


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def interval(values: Sequence[float], draws: int = 2000) -> tuple[float, float]:
    """Give the 95 % interval of the median, by drawing from the values again and again."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(draws))
    return medians[draws // 40], medians[-1 - draws // 40]


def read_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read and check the arguments: what is wrong with them must not show after an hour."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--rounds", type=int, default=3, help="processes to train in; saves and kills of each sort")
    parser.add_argument("--steps", type=int, default=306, help=f"of the part `steps`, the first {WARM_UP} not counted")
    parser.add_argument("--hidden", type=int, default=256, help=f"of the part `steps`, a multiple of {HEAD}")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--save-hidden", type=int, default=768, help=f"of the part `saves`, a multiple of {HEAD}")
    parser.add_argument("--save-layers", type=int, default=8)
    parser.add_argument("--probe", nargs=2, metavar=("KIND", "RUN"), help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    asked = [name.strip() for name in given.only.split(",")]
    unknown = [name for name in asked if name not in PARTS]
    if unknown:
        parser.error(f"--only: {', '.join(map(repr, unknown))}; there are {', '.join(PARTS)}")
    given.only = [name for name in PARTS if name in asked]
    for name in ("hidden", "save_hidden"):
        size = getattr(given, name)
        if size < HEAD or size % HEAD:
            parser.error(f"--{name.replace('_', '-')} {size}: it must be a multiple of {HEAD}")
    least = {"rounds": 1, "steps": WARM_UP + 6, "batch": 1, "sequence_length": 2, "save_layers": 1}
    for name, smallest in least.items():
        if getattr(given, name) < smallest:
            parser.error(f"--{name.replace('_', '-')} {getattr(given, name)}: it must be at least {smallest}")
    return given


def main() -> int:
    given = read_arguments()
    if given.probe:
        return probe(given.probe[0], RunDirectory(Path(given.probe[1])), given.rounds)
    print(f"{parse_machine('cpu').label}; 1 thread; torch {version('torch')}; {time.strftime('%Y-%m-%d')}")
    for name, measure in (("steps", measure_steps), ("saves", measure_saves), ("restarts", measure_restarts)):
        if name in given.only:
            print(flush=True)
            measure(given)
    return 0


if __name__ == "__main__":
    sys.exit(main())
