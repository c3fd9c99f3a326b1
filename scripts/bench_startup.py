"""CPU seconds of the commands that need no torch, and the memory of a supervisor at work. Prints one JSON object."""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = {
    "--help": ["--help"],
    "detect-precision": ["detect-precision"],
    "generate-ds-config": ["generate-ds-config", "recipes/llama3-8b-zero3.yaml", "--machine", "8xH100"],
    "validate": ["validate", "recipes/quickstart.yaml"],
    "plan": ["plan", "recipes/llama3-8b-zero3.yaml", "--machine", "8xH100"],
    "check --no-data": ["check", "recipes/llama3-8b-zero3.yaml", "--machine", "8xH100", "--no-data"],
    "doctor": ["doctor", "recipes/llama3-8b-zero3.yaml", "--machine", "8xH100"],
}


def cpu_seconds(arguments: list[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "mpt", *arguments], cwd=ROOT, capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def supervisor_peak_mib() -> float:
    """Train a few steps and read the supervisor's own peak resident memory (VmHWM), not its children's."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "mpt", "train", "recipes/quickstart.yaml", "--runs-dir", folder]
        command += ["training.max_steps=20", "training.eval_strategy=no"]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        peak_kib = 0
        while process.poll() is None:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
            except OSError:
                break
            peak_kib = max(
                [peak_kib, *(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))]
            )
            time.sleep(0.2)
        if process.wait():
            sys.exit(f"the run ended with {process.returncode}")
    return peak_kib / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    os.environ["OMP_NUM_THREADS"] = "1"
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(rounds):
        for name, arguments in COMMANDS.items():
            seconds[name].append(cpu_seconds(arguments))
    print(
        json.dumps(
            {
                "cpu_seconds": {name: round(statistics.median(values), 3) for name, values in seconds.items()},
                "supervisor_peak_mib": round(supervisor_peak_mib(), 1),
            }
        )
    )


if __name__ == "__main__":
    main()
