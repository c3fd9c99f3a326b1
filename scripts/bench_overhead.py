"""What mpt costs a training step: tokens per CPU-second of `mpt train` against a plain Trainer script.

Each round runs both programs, and the plain one a second time as a null control, at two lengths, interleaved. The
difference of the two lengths leaves the steps alone: start-up, evaluation and the last save cancel. CPU time is
that of all processes of a run, the supervisor included. Prints one JSON object; the medians of the rounds and their
spread.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SEQUENCE_LENGTH = 256


def cpu_seconds(command: list[str]) -> float:
    """Run a command and give the CPU time of it and all processes that it waited for."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, check=False
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr.decode()[-3000:]}")
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def plain(steps: int, options: argparse.Namespace, folder: str) -> list[str]:
    return [
        *(sys.executable, str(ROOT / "scripts/plain_trainer.py"), "--steps", str(steps)),
        *("--precision", options.precision, "--batch", str(options.batch), "--output", folder),
    ]


def with_mpt(steps: int, options: argparse.Namespace, folder: str) -> list[str]:
    training = {"max_steps": steps, "learning_rate": 2e-3, "lr_scheduler_type": "cosine", "warmup_steps": 5}
    training |= {"weight_decay": 0.1, "logging_steps": 10, "eval_strategy": "no", "save_steps": 100000}
    return [
        *(sys.executable, "-m", "mpt", "train", "recipes/quickstart.yaml", "--resume", "never", "--runs-dir", folder),
        *(f"precision={options.precision}", f"micro_batch_size={options.batch}", f"global_batch_size={options.batch}"),
        *(
            "data.eval_fraction=0",
            "sample=null",
            f"data.sequence_length={SEQUENCE_LENGTH}",
            f"training={json.dumps(training)}",
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, nargs=2, default=(10, 60), metavar=("SHORT", "LONG"))
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--batch", type=int, default=8)
    options = parser.parse_args()
    short, long = options.steps
    tokens = (long - short) * options.batch * SEQUENCE_LENGTH
    programs = {"plain": plain, "mpt": with_mpt, "control": plain}
    rates: dict[str, list[float]] = {name: [] for name in programs}
    with tempfile.TemporaryDirectory() as folder:
        for round_number in range(options.rounds):
            for name, command in programs.items():
                seconds = [
                    cpu_seconds(command(steps, options, f"{folder}/{name}-{round_number}-{steps}"))
                    for steps in (short, long)
                ]
                rates[name].append(tokens / (seconds[1] - seconds[0]))
                print(f"round {round_number} {name}: {rates[name][-1]:.0f} tokens per CPU-second", file=sys.stderr)
    ratios = {
        name: [rate / base for rate, base in zip(rates[name], rates["plain"], strict=True)]
        for name in ("mpt", "control")
    }
    print(
        json.dumps(
            {
                "precision": options.precision,
                "steps": long - short,
                "rounds": options.rounds,
                "tokens_per_cpu_second": {name: round(statistics.median(values), 1) for name, values in rates.items()},
                "mpt_over_plain": round(statistics.median(ratios["mpt"]), 4),
                "mpt_over_plain_range": [round(min(ratios["mpt"]), 4), round(max(ratios["mpt"]), 4)],
                "control_over_plain": round(statistics.median(ratios["control"]), 4),
                "control_over_plain_range": [round(min(ratios["control"]), 4), round(max(ratios["control"]), 4)],
            }
        )
    )


if __name__ == "__main__":
    main()
