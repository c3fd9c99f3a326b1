"""What is left of two runs whose numbers go bad for real, by `mpt train` and by the plain Trainer of Hugging Face.

fp16: a model whose forward pass leaves fp16's range, as some families' do (here its MLP weights are 300 times too
large). No loss scale helps. On a CPU accelerate takes `fp16=True` and trains in fp32 without a word, so the plain
Trainer gets a real torch.amp.GradScaler and autocast, which its user on a GPU would have.

bf16: a small Llama from scratch whose learning rate is 300 times too high. Its loss climbs by a few per cent a step.

Both programs get the same model, samples, order and arguments. The loss of what they leave is computed in fp32, on
the same samples. A checkpoint is usable if all of it is finite and its loss is below that of the model that the run
began with.
"""

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from mpt.hardware.specs import parse_machine
from mpt.planning.model_facts import learn_model_facts
from mpt.planning.modules import learn_modules
from mpt.planning.plan import resolve
from mpt.planning.repair import with_keys
from mpt.recipe.schema import Recipe
from mpt.running.journal import read_events
from mpt.running.metrics import every_row
from mpt.running.run_directory import RunDirectory

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
TOO_LARGE = 300
DATA = {"source": "builtin:python-reference", "sequence_length": 64, "eval_fraction": 0}
RUNS: dict[str, dict[str, Any]] = {
    "fp16": {
        "model": "./model",
        "data": DATA,
        "precision": {"mode": "fp16", "allow_emulation": True},
        "micro_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "training": {"max_steps": 60, "save_steps": 10, "save_total_limit": 2, "learning_rate": 1e-3},
    },
    "bf16": {
        "model": {"config": LLAMA},
        "tokenizer": {"train": "byte_level_bpe", "vocab_size": 512},
        "data": DATA,
        "precision": {"mode": "bf16", "allow_emulation": True},
        "micro_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "training": {
            "max_steps": 100,
            "save_steps": 10,
            "save_total_limit": 2,
            "learning_rate": 3.0,
            "warmup_steps": 60,
        },
        "recovery": {"learning_rate_factor": 0.003, "rewarm_steps": 10},
    },
}
SAID = {
    "fp16": "overflow in fp16's forward pass",
    "bf16": "learning rate 300 times too high, in bf16",
}
JUDGED = 64  # samples


# --- in processes of their own, with torch


def make_model(folder: Path) -> None:
    """Save a model that computes well in fp32 and leaves fp16's range, with its tokenizer."""
    from pydoc_data.topics import topics

    from transformers import AutoModelForCausalLM, LlamaConfig, set_seed

    from mpt.training.tokenizer import train_tokenizer

    set_seed(42)
    config = LlamaConfig(vocab_size=512, **{key: value for key, value in LLAMA.items() if key != "model_type"})
    model = AutoModelForCausalLM.from_config(config)
    for name in ("gate_proj", "up_proj", "down_proj"):
        getattr(model.model.layers[1].mlp, name).weight.data.mul_(TOO_LARGE)
    model.save_pretrained(folder)
    train_tokenizer((topics[name] for name in sorted(topics)), 512).save_pretrained(folder)


def plan_of(recipe: Recipe) -> Any:
    return resolve(recipe, parse_machine("cpu"), learn_model_facts(recipe), name="plain", modules=learn_modules(recipe))


def prepare(folder: Path, name: str, tokenizer_in: Path) -> tuple[Any, Any, Any, Any]:
    """Give the plan of a run, its tokenizer, its samples, and its model as it begins."""
    from transformers import AutoTokenizer

    from mpt.terms import Task
    from mpt.training.tasks import task_module

    recipe = Recipe.model_validate(yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8")))
    plan, task = plan_of(recipe), task_module(Task.CAUSAL_LM)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_in)
    samples = task.prepare_data(plan, task.read_documents(plan, seed=42), tokenizer)
    return plan, tokenizer, samples.train, task.build_model(plan, tokenizer, seed=42)


def train_plainly(folder: Path, name: str, tokenizer_in: Path) -> None:
    """Train with the Trainer as it comes; say what it logged."""
    import torch
    from transformers import Trainer, TrainingArguments, default_data_collator

    plan, _, samples, model = prepare(folder, name, tokenizer_in)
    keys = plan.recipe.training_keys
    blocks = [list(samples[number]["input_ids"]) for number in range(len(samples))]
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder / f"plain-{name}"),
            per_device_train_batch_size=plan.value("micro_batch_size"),
            logging_steps=1,
            use_cpu=True,
            disable_tqdm=True,
            report_to="none",
            **{name: True},
            **keys,
        ),
        train_dataset=[{"input_ids": block, "labels": block} for block in blocks],
        data_collator=default_data_collator,
    )
    if name == "fp16":
        trainer.accelerator.native_amp = True  # without it accelerate leaves autocast out on a CPU
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    trainer.train()
    trainer.save_model(str(folder / f"plain-{name}/final"))
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    steps = [int(state["step"]) for state in trainer.optimizer.state.values()]
    told = {"logged": logged[-1], "updates": max(steps, default=0)}
    (folder / f"plain-{name}/told.json").write_text(json.dumps(told), encoding="utf-8")


def judge(folder: Path, name: str, tokenizer_in: Path, places: Sequence[Path]) -> None:
    """Print, of the model as it begins and of each in `places`, whether it is finite and its loss in fp32."""
    import torch
    from transformers import AutoModelForCausalLM

    plan, _, samples, _ = prepare(folder, name, tokenizer_in)
    fp32 = plan_of(with_keys(plan.recipe, {"precision": "fp32"}))
    tokens = torch.tensor([list(samples[number]["input_ids"]) for number in range(JUDGED)])
    verdicts = []
    for place in (None, *places):
        if place is None:
            from mpt.terms import Task
            from mpt.training.tasks import task_module

            model = task_module(Task.CAUSAL_LM).build_model(fp32, prepare(folder, name, tokenizer_in)[1], seed=42)
        else:
            model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
        tensors = list(model.state_dict().values())
        if place is not None and (place / "optimizer.pt").exists():
            states = torch.load(place / "optimizer.pt", weights_only=True)["state"].values()
            tensors += [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
        with torch.no_grad():
            loss = float(model(input_ids=tokens, labels=tokens).loss)
        is_finite = all(bool(torch.isfinite(tensor).all()) for tensor in tensors)
        verdicts.append({"finite": is_finite, "loss": loss if math.isfinite(loss) else None})
    print(json.dumps(verdicts))


# --- what is printed


def run(command: Sequence[str], folder: Path) -> tuple["subprocess.CompletedProcess[str]", float]:
    """Carry a command out; give also the CPU seconds of it and its children."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def in_a_process(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    done, _ = run([sys.executable, __file__, "--in", str(folder), *arguments], folder)
    if done.returncode:
        sys.exit(f"{' '.join(arguments)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return done


def compare(name: str, folder: Path) -> list[str]:
    """Make a run go bad with both programs; give the two rows of the table."""
    steps = RUNS[name]["training"]["max_steps"]
    mpt, mpt_cpu = run([sys.executable, "-m", "mpt", "train", f"{name}.yaml"], folder)
    directory = RunDirectory(folder / "runs" / name)
    tokenizer = directory.path / "tokenizer" if name == "bf16" else folder / "model"
    plain, plain_cpu = run([sys.executable, __file__, "--in", str(folder), "plain", name, str(tokenizer)], folder)
    sides = {"mpt": directory.path, "plain": folder / f"plain-{name}"}
    rows = []
    for who, place in sides.items():
        checkpoints = sorted((place / "checkpoints" if who == "mpt" else place).glob("checkpoint-*"))
        final = [place / "final"] if (place / "final").is_dir() else []
        told = in_a_process(folder, "judge", name, str(tokenizer), *(str(path) for path in [*final, *checkpoints]))
        before, *verdicts = json.loads(told.stdout)
        usable = [one for one in verdicts[len(final) :] if one["finite"] and is_below(one["loss"], before["loss"])]
        if who == "mpt":
            made = list(every_row(directory))
            logged, updates = made[-1]["loss"], sum(not row["skipped"] for row in made)
            how = "; ".join(
                said(change) for change in read_events(directory.journal) if change["kind"] == "plan_changed"
            )
            code, cpu, lost = mpt.returncode, mpt_cpu, len(made) - steps
        else:
            if not (place / "told.json").exists():  # it breaks only where this script is wrong
                sys.exit(f"the plain Trainer ended with {plain.returncode}:\n{plain.stderr[-2000:]}")
            learnt = json.loads((place / "told.json").read_text(encoding="utf-8"))
            logged, updates, how = learnt["logged"], learnt["updates"], "nothing was noticed"
            is_better = bool(final) and is_below(verdicts[0]["loss"], before["loss"])
            code, cpu, lost = plain.returncode, plain_cpu, 0 if is_better else steps
        loss = verdicts[0]["loss"] if final else None
        rows.append(
            f"| {SAID[name]} | {who} | {code} | {logged:.4g} | {before['loss']:.4g} -> "
            f"{'not finite' if loss is None else format(loss, '.4g')} "
            f"| {'yes' if final and verdicts[0]['finite'] else 'no'} | {updates} | {lost} "
            f"| {len(usable)} of {len(checkpoints)} | {how} | {cpu:.0f} |"
        )
    return rows


def said(event: dict[str, Any]) -> str:
    """Say in a few words what recovery changed."""
    values = event["repair"]["values"]
    told = {"retry": "trained again", "learning_rate": "learning rate {learning_rate:g}", "precision": "{mode}"}
    return told[event["repair"]["kind"]].format(**values)


def is_below(loss: float | None, bound: float) -> bool:
    return loss is not None and loss < bound


def read_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read and check the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(RUNS), help=f"some of {', '.join(RUNS)}")
    parser.add_argument("--in", dest="folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    asked = [name.strip() for name in given.only.split(",")]
    unknown = [name for name in asked if name not in RUNS]
    if unknown:
        parser.error(f"--only: {', '.join(map(repr, unknown))}; there are {', '.join(RUNS)}")
    given.only = [name for name in RUNS if name in asked]
    return given


def main() -> None:
    given = read_arguments()
    if given.folder:
        what, *rest = given.words
        if what == "model":
            make_model(given.folder / "model")
        elif what == "plain":
            train_plainly(given.folder, rest[0], Path(rest[1]))
        else:
            judge(given.folder, rest[0], Path(rest[1]), [Path(place) for place in rest[2:]])
        return
    with tempfile.TemporaryDirectory(prefix="bench-recovery-") as scratch:
        folder = Path(scratch)
        in_a_process(folder, "model")
        rows = []
        for name in given.only:
            (folder / f"{name}.yaml").write_text(yaml.safe_dump(RUNS[name]), encoding="utf-8")
            rows += compare(name, folder)
    print(f"{parse_machine('cpu').label}; 1 thread; torch {version('torch')}; {time.strftime('%Y-%m-%d')}")
    print()
    heads = ["run", "by", "exit code", "last logged loss", "loss of the model, fp32: began -> ended", "weights finite"]
    heads += ["updates", "steps lost", "usable checkpoints", "what was done", "CPU s"]
    print(f"| {' | '.join(heads)} |")
    print("|" + "---|" * len(heads))
    print("\n".join(rows))


if __name__ == "__main__":
    main()
