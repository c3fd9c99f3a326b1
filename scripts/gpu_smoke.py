"""Train the quickstart recipe in every precision and engine that a CUDA machine has, and print what held.

Each case is one `mpt train` of a few steps. It held when the run finished, the audit passed and the loss fell. A
case that this machine can't do must be refused with exit code 3 before anything is trained.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from mpt.hardware.detect import detect_machine
from mpt.hardware.machine import Machine
from mpt.terms import DeviceKind, Feature

ROOT = Path(__file__).resolve().parent.parent
STEPS = 20


@dataclass(frozen=True)
class Case:
    """A set of overrides; `needs` are the features without which the case must be refused."""

    name: str
    overrides: tuple[str, ...]
    needs: tuple[Feature, ...] = field(default=())
    packages: tuple[str, ...] = ()


CASES = (
    Case("auto", ()),
    Case("fp32", ("precision=fp32",)),
    Case("tf32", ("precision=tf32",), (Feature.TF32,)),
    Case("fp16", ("precision=fp16",), (Feature.FP16,)),
    Case("fp16, small first scale", ("precision={mode: fp16, loss_scale: {initial: 128}}",), (Feature.FP16,)),
    Case("bf16", ("precision=bf16",), (Feature.BF16,)),
    Case("bf16, accumulation", ("micro_batch_size=2", "precision=bf16"), (Feature.BF16,)),
    Case("bf16, checkpointing", ("gradient_checkpointing=true", "precision=bf16"), (Feature.BF16,)),
    Case("bf16, compiled", ("training.torch_compile=true", "precision=bf16"), (Feature.BF16,)),
    Case("eager attention", ("attention=eager",)),
    Case("flash_attention_2", ("attention=flash_attention_2",), (Feature.FLASH_ATTENTION_2,), ("flash-attn",)),
    Case("best-fit packing", ("data.packing=best_fit",)),
    Case("best-fit packing, flex_attention", ("data.packing=best_fit", "attention=flex_attention")),
    Case(
        "best-fit packing, flash_attention_2",
        ("data.packing=best_fit", "attention=flash_attention_2"),
        (Feature.FLASH_ATTENTION_2,),
        ("flash-attn",),
    ),
    Case(
        "no padding, flash_attention_2",
        ("data.packing=none", "attention=flash_attention_2"),
        (Feature.FLASH_ATTENTION_2,),
        ("flash-attn",),
    ),
    Case(
        "best-fit packing, a kernel of the hub",
        ("data.packing=best_fit", "attention=kernels-community/flash-attn2"),
        (Feature.FLASH_ATTENTION_2,),
        ("kernels",),
    ),
    Case("zero1 bf16", ("distributed={strategy: zero1}", "precision=bf16"), (Feature.BF16,), ("deepspeed",)),
    Case("zero2 fp16", ("distributed={strategy: zero2}", "precision=fp16"), (Feature.FP16,), ("deepspeed",)),
    Case("zero3 bf16", ("distributed={strategy: zero3}", "precision=bf16"), (Feature.BF16,), ("deepspeed",)),
    Case(
        "zero3 bf16, offload",
        ("distributed={strategy: zero3}", "offload=cpu", "precision=bf16"),
        (Feature.BF16,),
        ("deepspeed",),
    ),
)


def run(case: Case, folder: Path) -> tuple[int, dict[str, object], str]:
    command = [sys.executable, "-m", "mpt", "train", "recipes/quickstart.yaml", "--json", "--runs-dir", str(folder)]
    command += ["--name", case.name.replace(" ", "-").replace(",", ""), f"training.max_steps={STEPS}", *case.overrides]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.returncode, json.loads(done.stdout) if done.stdout else {}, done.stderr


def losses(run_dir: Path) -> list[float]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def judge(case: Case, machine: Machine, folder: Path) -> tuple[str, str]:
    """Run a case and give (verdict, detail)."""
    from mpt.hardware.packages import installed_packages

    missing = [package for package in case.packages if package not in installed_packages()]
    lacking = [feature.value for feature in case.needs if not machine.all_compute(feature)]
    code, summary, stderr = run(case, folder)
    if missing or lacking:
        what = ", ".join(missing + lacking)
        return ("held", f"refused: no {what}") if code == 3 else ("FAILED", f"no {what}, and exit code {code}, not 3")
    if code:
        return "FAILED", f"exit code {code}: {stderr.strip().splitlines()[-1] if stderr.strip() else ''}"
    run_dir = Path(str(summary["run_dir"]))
    audit = json.loads((run_dir / "attempts/001/audit.json").read_text(encoding="utf-8"))
    curve = losses(run_dir)
    if not audit["passed"] or curve[-1] >= curve[0]:
        return "FAILED", f"audit {audit['passed']}, loss {curve[0]:.3f} -> {curve[-1]:.3f}"
    return "held", f"loss {curve[0]:.3f} -> {curve[-1]:.3f}, {len(audit['checks'])} audited facts"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="run the cases whose name contains this")
    only = parser.parse_args().only
    machine = detect_machine(os.environ)
    if machine.kind is not DeviceKind.CUDA:
        print(f"skipped: no CUDA device here ({machine.label}; {'; '.join(machine.notes) or 'no driver'})")
        return 0
    failed = 0
    print(f"| case | on {machine.label} | |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            if only is None or only in case.name:
                verdict, detail = judge(case, machine, Path(folder))
                failed += verdict != "held"
                print(f"| {case.name} | {verdict} | {detail} |", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
