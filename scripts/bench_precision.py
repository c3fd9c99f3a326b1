"""Step time, tokens per CPU-second, peak memory and numbers of each precision, beside a bare matrix multiplication.

Each precision trains the same Llama on the same text through mpt's own worker, in a process of its own. Rounds are
interleaved (fp32, bf16, ..., fp32, bf16, ...), so that a machine that slows down slows all of them; what is printed is
the median over rounds of each round's median step, the first two steps left out. fp32 runs twice a round: the second
is the null control, and differences smaller than its own from the first mean nothing.

The limit is `torch.mm` of the model's largest layer in both formats, timed in between: a step can't gain more from
bf16 than its matrix multiplications do. CPU-seconds are the process's own user time, which other load does not lengthen
as it does the clock.

The numbers are compared as `mpt train --compare-to fp32` compares them, in the first round: by how much the losses
differ from fp32's at most, and the cosine of the first step's gradients with fp32's.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mpt.errors import ExitCode
from mpt.hardware.machine import Machine
from mpt.hardware.specs import parse_machine
from mpt.measuring.comparison import WARM_UP, Comparison, side_of
from mpt.measuring.gradients import compare_gradients, delete_gradients
from mpt.planning.model_facts import learn_model_facts
from mpt.planning.modules import learn_modules
from mpt.planning.plan import resolve
from mpt.recipe.schema import Recipe
from mpt.running.measured import Measure, ask_to_measure
from mpt.running.metrics import read_rows
from mpt.running.run_directory import RunDirectory, write_atomically
from mpt.running.signals import StopWish
from mpt.terms import Feature

# A CPU without a format computes it all the same, slower: the table says which ones.
PRECISIONS: dict[str, Any] = {
    "fp32": {"mode": "fp32"},
    "fp32 again": {"mode": "fp32"},
    "bf16": {"mode": "bf16"},
    "bf16_pure": {"mode": "bf16_pure"},
    "fp16": {"mode": "fp16"},
    "fp8": {"mode": "fp8", "fp8": {"keep_first": 0, "keep_last": 0}},
}
FEATURES = {"bf16": Feature.BF16, "bf16_pure": Feature.BF16, "fp16": Feature.FP16, "fp8": Feature.FP8}
HEAD = 64  # the size of an attention head
LOOKS = ("after_set_up", "before_first_step", "after_first_step")
WITHOUT_AUDIT = f"""
from mpt.training.audit import Audit
for look in {LOOKS}:
    setattr(Audit, look, lambda audit, trainer: None)
"""


def recipe_of(precision: Any, hidden: int, layers: int, length: int, steps: int) -> Recipe:
    config = {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": hidden * 11 // 4 // 16 * 16,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // HEAD,
        "max_position_embeddings": length,
    }
    return Recipe.model_validate(
        {
            "model": {"config": config},
            "tokenizer": {"train": "byte_level_bpe", "vocab_size": 2048},
            "data": {"source": "builtin:python-reference", "sequence_length": length, "eval_fraction": 0},
            "precision": {"allow_emulation": True} | precision,
            "micro_batch_size": 2,
            "gradient_accumulation_steps": 1,
            "training": {"max_steps": steps, "learning_rate": 1e-4, "save_strategy": "no"},
        }
    )


def train(
    name: str, recipe: Recipe, run: RunDirectory, threads: int, *, keeps_gradients: bool = False, prelude: str = ""
) -> dict[str, float]:
    """Train once in a process of its own; give seconds a step, tokens a CPU-second and peak GiB."""
    plan = resolve(recipe, parse_machine("cpu"), learn_model_facts(recipe), name="bench", modules=learn_modules(recipe))
    run.checkpoints.mkdir(parents=True)
    write_atomically(run.attempt(1).plan, json.dumps(plan.to_json()))
    # A measured attempt saves no weights: what is timed is the steps.
    steps = int(plan.value("max_steps"))
    ask_to_measure(run.attempt(1), Measure(steps, keeps_gradients=keeps_gradients))
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    code = f"{prelude}\nimport sys\nfrom mpt.training.worker import main\nsys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, str(run.path), "1"]
    with run.attempt(1).log.open("w") as log:
        status = subprocess.run(command, stdout=log, stderr=log, env=environment, check=False).returncode
    if status != ExitCode.STOPPED:  # as a measured attempt ends
        sys.exit(f"{name} ended with {status}:\n{run.attempt(1).log.read_text()[-3000:]}")
    rows = [row for _, row in sorted(read_rows(run).items())]
    timed = rows[WARM_UP:]
    return {
        "seconds": statistics.median(row["step_time_s"] for row in timed),
        "tokens_per_cpu_s": sum(row["tokens"] for row in timed) / sum(row["cpu_time_s"] for row in timed),
        "memory_gib": max(row["memory_gib"] for row in rows),
    }


def matmul_ratio(hidden: int, rows: int, threads: int) -> float:
    """Time torch.mm of the widest layer in fp32 and bf16, interleaved; give fp32 over bf16."""
    code = f"""
import statistics, time, torch
torch.set_num_threads({threads})
a = torch.randn({rows}, {hidden}); b = torch.randn({hidden}, {hidden * 11 // 4 // 16 * 16})
pairs = {{torch.float32: (a, b), torch.bfloat16: (a.bfloat16(), b.bfloat16())}}
times = {{dtype: [] for dtype in pairs}}
for _ in range(15):
    for dtype, (x, y) in pairs.items():
        began = time.perf_counter(); x @ y; times[dtype].append(time.perf_counter() - began)
print(statistics.median(times[torch.float32]) / statistics.median(times[torch.bfloat16]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout)


def read_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read and check the arguments: what is wrong with them must not show after hours."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024, help=f"a multiple of {HEAD}")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=6, help=f"more than {WARM_UP}, which are left out")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--audit", action="store_true", help="what the audit costs of a 100-step run, and nothing else")
    parser.add_argument("--only", default=",".join(PRECISIONS), help=f"some of {', '.join(PRECISIONS)}; fp32 always")
    given = parser.parse_args(arguments)
    asked = [name.strip() for name in given.only.split(",")]
    unknown = [name for name in asked if name not in PRECISIONS]
    if unknown:
        parser.error(f"--only: {', '.join(map(repr, unknown))}; there are {', '.join(PRECISIONS)}")
    given.only = [name for name in PRECISIONS if name == "fp32" or name in asked]
    if given.steps <= WARM_UP:
        parser.error(f"--steps {given.steps}: the first {WARM_UP} are left out, so more are needed")
    if given.hidden < HEAD or given.hidden % HEAD:
        parser.error(f"--hidden {given.hidden}: it must be a multiple of {HEAD}")
    for name, least in (("layers", 1), ("sequence_length", 2), ("rounds", 1), ("threads", 1)):
        if getattr(given, name) < least:
            parser.error(f"--{name.replace('_', '-')} {getattr(given, name)}: it must be at least {least}")
    return given


def main() -> None:
    given = read_arguments()
    if given.audit:
        audit_cost(given.rounds, given.threads)
        return
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in given.only}
    compared: dict[str, Comparison] = {}
    matmuls: list[float] = []
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        reference = RunDirectory(Path(scratch) / "fp32-0")
        for number in range(given.rounds):
            matmuls.append(matmul_ratio(given.hidden, 2 * given.sequence_length, given.threads))
            for name in given.only:
                recipe = recipe_of(PRECISIONS[name], given.hidden, given.layers, given.sequence_length, given.steps)
                run = RunDirectory(Path(scratch) / f"{name.replace(' ', '-')}-{number}")
                measured[name].append(train(name, recipe, run, given.threads, keeps_gradients=number == 0))
                print(f"round {number + 1}: {name}: {measured[name][-1]['seconds']:.3f} s a step", file=sys.stderr)
                if number == 0 and name != "fp32":
                    compared[name] = compare(name, run, reference, given.steps)
                    delete_gradients([run])
            delete_gradients([reference])
    print(describe(parse_machine("cpu"), given.threads))
    print()
    report(measured, compared, matmuls, parse_machine("cpu"))
    print(f"{given.rounds} rounds in {time.monotonic() - began:.0f} s", file=sys.stderr)


def compare(name: str, run: RunDirectory, reference: RunDirectory, steps: int) -> Comparison:
    """Compare a run with the one in fp32: losses of every step, gradients of the first."""
    sides = [side_of(word, read_rows(made), None) for word, made in ((name, run), ("fp32", reference))]
    gradient = compare_gradients([run, reference], sides, StopWish(), os.environ)
    assert gradient is not None, "nobody listens to signals here"
    return Comparison(steps, sides[0], sides[1], gradient, {})


def audit_cost(rounds: int, threads: int) -> None:
    """Print the audit's share of 100 steps: its looks, and by how much it makes the first step longer."""
    shares = []
    for _ in range(rounds):
        taken = {}
        for name, prelude in (("with", ""), ("without", WITHOUT_AUDIT)):
            with tempfile.TemporaryDirectory() as scratch:
                run = RunDirectory(Path(scratch) / "run")
                train(name, recipe_of(PRECISIONS["bf16"], 256, 4, 256, 100), run, threads, prelude=prelude)
                rows = read_rows(run)
                looks = json.loads(run.attempt(1).audit.read_text())["seconds"] if not prelude else 0.0
                taken[name] = (rows[1]["step_time_s"], looks, sum(row["step_time_s"] for row in rows.values()))
        extra = taken["with"][0] - taken["without"][0] + taken["with"][1]
        shares.append(extra / taken["without"][2])
        print(
            f"looks {taken['with'][1]:.3f} s, first step {taken['with'][0]:.3f} s against {taken['without'][0]:.3f} s, "
            f"100 steps {taken['without'][2]:.1f} s",
            file=sys.stderr,
        )
    print(describe(parse_machine("cpu"), threads))
    print(f"the audit takes {statistics.median(shares):.2%} of a 100-step run ({min(shares):.2%} to {max(shares):.2%})")


def describe(machine: Machine, threads: int) -> str:
    """Name what the numbers hold for.

    A table without its machine is worth nothing: bf16 is faster than fp32 on one CPU and slower on the next.
    """
    native = ", ".join(feature.value for feature in machine.devices[0].native)
    used = f"{threads} thread{'s' * (threads != 1)}"
    return f"{machine.label}, computes natively {native}; {used}; torch {version('torch')}"


def report(
    measured: dict[str, list[dict[str, float]]],
    compared: dict[str, Comparison],
    matmuls: list[float],
    machine: Machine,
) -> None:
    base = [entry["seconds"] for entry in measured["fp32"]]
    print(
        "| precision | s a step | speed-up over fp32 | tokens per CPU-second | peak GiB | loss gap | gradient cosine |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, entries in measured.items():
        ratios = [first / entry["seconds"] for first, entry in zip(base, entries, strict=True)]
        middle = {key: statistics.median(entry[key] for entry in entries) for key in entries[0]}
        is_emulated = name in FEATURES and not machine.all_compute(FEATURES[name])
        print(
            f"| {name}{' (emulated)' * is_emulated} | {middle['seconds']:.3f} | {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f}) | {middle['tokens_per_cpu_s']:.0f} "
            f"| {middle['memory_gib']:.2f} | {numbers(compared.get(name))} |"
        )
    print(f"| torch.mm, bf16 over fp32 (the limit) | | {statistics.median(matmuls):.2f} | | | | |")


def numbers(comparison: Comparison | None) -> str:
    """Write the two cells of a comparison; fp32 has none with itself."""
    if comparison is None:
        return "| "
    gap, cosine = comparison.max_gap, comparison.gradient.cosine
    said = comparison.gradient.reason if cosine is None else f"{cosine:.6f}"
    return f"{'none' if gap is None else f'{gap:.1e}'} | {said}"


if __name__ == "__main__":
    main()
