"""Step time, tokens per CPU-second and peak memory of each precision, beside a bare matrix multiplication.

Each precision trains the same Llama on the same text through mpt's own worker, in a process of its own. Rounds are
interleaved (fp32, bf16, ..., fp32, bf16, ...), so that a machine that slows down slows all of them; what is printed is
the median over rounds of each round's median step, the first two steps left out. fp32 runs twice a round: the second
is the null control, and differences smaller than its own from the first mean nothing.

The limit is `torch.mm` of the model's largest layer in both formats, timed in between: a step can't gain more from
bf16 than its matrix multiplications do. CPU-seconds are the process's own user time, which other load does not lengthen
as it does the clock.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from mpt.hardware.specs import parse_machine
from mpt.planning.model_facts import learn_model_facts
from mpt.planning.modules import learn_modules
from mpt.planning.plan import resolve
from mpt.recipe.schema import Recipe
from mpt.running.metrics import read_rows
from mpt.running.run_directory import RunDirectory, write_atomically

EMULATED = {"allow_emulation": True}
PRECISIONS: dict[str, Any] = {
    "fp32": "fp32",
    "fp32 again": "fp32",
    "bf16": "bf16",
    "bf16_pure": "bf16_pure",
    "fp16": {"mode": "fp16"} | EMULATED,
    "fp8 (emulated)": {"mode": "fp8", "fp8": {"keep_first": 0, "keep_last": 0}} | EMULATED,
}
WARM_UP = 2
WITHOUT_AUDIT = """
from mpt.training.audit import Audit
for look in ("after_set_up", "before_first_step", "after_first_step"):
    setattr(Audit, look, lambda audit, trainer: None)
"""


def recipe_of(precision: Any, hidden: int, layers: int, length: int, steps: int) -> Recipe:
    config = {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": hidden * 11 // 4 // 16 * 16,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "max_position_embeddings": length,
    }
    return Recipe.model_validate(
        {
            "model": {"config": config},
            "tokenizer": {"train": "byte_level_bpe", "vocab_size": 2048},
            "data": {"source": "builtin:python-reference", "sequence_length": length, "eval_fraction": 0},
            "precision": precision,
            "micro_batch_size": 2,
            "gradient_accumulation_steps": 1,
            "training": {"max_steps": steps, "learning_rate": 1e-4, "save_strategy": "no"},
        }
    )


def train(name: str, recipe: Recipe, folder: Path, threads: int, prelude: str = "") -> dict[str, float]:
    """Train once in a process of its own; give seconds a step, tokens a CPU-second, peak GiB and the audit's time."""
    run = RunDirectory(folder)
    plan = resolve(recipe, parse_machine("cpu"), learn_model_facts(recipe), name="bench", modules=learn_modules(recipe))
    # The final weights are not wanted: what is timed is the steps.
    run.checkpoints.mkdir(parents=True)
    write_atomically(run.attempt(1).plan, json.dumps(plan.to_json()))
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    code = f"{prelude}\nimport sys\nfrom mpt.training.worker import main\nsys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, str(folder), "1"]
    with run.attempt(1).log.open("w") as log:
        status = subprocess.run(command, stdout=log, stderr=log, env=environment, check=False).returncode
    if status:
        sys.exit(f"{name} ended with {status}; see {run.attempt(1).log}")
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--audit", action="store_true", help="what the audit costs of a 100-step run, and nothing else")
    parser.add_argument("--only", default=",".join(PRECISIONS), help="a list of precisions, fp32 among them")
    given = parser.parse_args()
    chosen = [name for name in PRECISIONS if name in given.only.split(",")]
    if given.audit:
        audit_cost(given.rounds, given.threads)
        return
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in chosen}
    matmuls: list[float] = []
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(given.rounds):
            matmuls.append(matmul_ratio(given.hidden, 2 * given.sequence_length, given.threads))
            for name in chosen:
                recipe = recipe_of(PRECISIONS[name], given.hidden, given.layers, given.sequence_length, given.steps)
                folder = Path(scratch) / f"{name.replace(' ', '-')}-{number}"
                measured[name].append(train(name, recipe, folder, given.threads))
                print(f"round {number + 1}: {name}: {measured[name][-1]['seconds']:.3f} s a step", file=sys.stderr)
    report(measured, matmuls)
    print(f"{given.rounds} rounds in {time.monotonic() - began:.0f} s", file=sys.stderr)


def audit_cost(rounds: int, threads: int) -> None:
    """Print the audit's share of 100 steps: its looks, and by how much it makes the first step longer."""
    shares = []
    for _ in range(rounds):
        taken = {}
        for name, prelude in (("with", ""), ("without", WITHOUT_AUDIT)):
            with tempfile.TemporaryDirectory() as scratch:
                folder = Path(scratch) / "run"
                train(name, recipe_of("bf16", 256, 4, 256, 100), folder, threads, prelude)
                rows = read_rows(RunDirectory(folder))
                looks = json.loads((folder / "attempts/001/audit.json").read_text())["seconds"] if not prelude else 0.0
                taken[name] = (rows[1]["step_time_s"], looks, sum(row["step_time_s"] for row in rows.values()))
        extra = taken["with"][0] - taken["without"][0] + taken["with"][1]
        shares.append(extra / taken["without"][2])
        print(
            f"looks {taken['with'][1]:.3f} s, first step {taken['with'][0]:.3f} s against {taken['without'][0]:.3f} s, "
            f"100 steps {taken['without'][2]:.1f} s",
            file=sys.stderr,
        )
    print(f"the audit takes {statistics.median(shares):.2%} of a 100-step run ({min(shares):.2%} to {max(shares):.2%})")


def report(measured: dict[str, list[dict[str, float]]], matmuls: list[float]) -> None:
    base = [entry["seconds"] for entry in measured["fp32"]]
    print("| precision | s a step | speed-up over fp32 | tokens per CPU-second | peak GiB |")
    print("|---|---|---|---|---|")
    for name, entries in measured.items():
        ratios = [first / entry["seconds"] for first, entry in zip(base, entries, strict=True)]
        middle = {key: statistics.median(entry[key] for entry in entries) for key in entries[0]}
        print(
            f"| {name} | {middle['seconds']:.3f} | {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f}) | {middle['tokens_per_cpu_s']:.0f} "
            f"| {middle['memory_gib']:.2f} |"
        )
    print(f"| torch.mm, bf16 over fp32 (the limit) | | {statistics.median(matmuls):.2f} | | |")


if __name__ == "__main__":
    main()
