"""Adapters on weights of 4 and 8 bits, trained for real: what the audit finds, that a run goes on bit for bit, and that
plain peft loads what it leaves."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch

from mpt.running.run_directory import RunDirectory
from tests.training.tiny_runs import FP16, Run, save_base, tiny_recipe

pytestmark = pytest.mark.slow

TWO = {"distributed": {"strategy": "ddp", "processes_per_node": 2}, "micro_batch_size": 4}
EVALUATED = {"training": {"eval_strategy": "steps", "eval_steps": 2}}
NF4 = {"bits": 4, "type": "nf4", "double_quantization": True, "storage_dtype": "uint8"}
CASES: dict[str, dict[str, Any]] = {
    # Evaluations between the steps, and dropout.
    "nf4 in bf16": {"precision": "bf16", "lora": {"rank": 4, "dropout": 0.1}} | EVALUATED,
    "nf4 in fp32, checkpointed": {"gradient_checkpointing": True},
    "fp4 in fp16, in 16-bit storage": {
        "precision": FP16,
        "quantization": {"type": "fp4", "double_quantization": False, "storage_dtype": "bf16"},
    },
    "int8 in bf16": {"precision": "bf16", "quantization": {"bits": 8, "int8_threshold": 4.0}},
    "some layers whole": {"quantization": {"skip_modules": ["down_proj", "model.layers.0.self_attn"]}},
    "nf4 over ddp": {"precision": "bf16"} | TWO,
}
FOUND: dict[str, tuple[dict[str, Any], int, str]] = {
    "nf4 in bf16": (NF4 | {"compute_dtype": "bf16"}, 14, "bf16"),
    "nf4 in fp32, checkpointed": (NF4 | {"compute_dtype": "fp32"}, 14, "fp32"),
    "fp4 in fp16, in 16-bit storage": (
        {"bits": 4, "type": "fp4", "double_quantization": False, "storage_dtype": "bf16", "compute_dtype": "fp16"},
        14,
        "fp16",
    ),
    "int8 in bf16": ({"bits": 8, "type": "int8", "threshold": 4.0}, 14, "bf16"),
    "some layers whole": (NF4 | {"compute_dtype": "fp32"}, 8, "fp32"),
    "nf4 over ddp": (NF4 | {"compute_dtype": "bf16"}, 14, "bf16"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def run_of(base: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """Train a case to its end, once."""
    done: dict[str, Run] = {}

    def of(name: str) -> Run:
        if name not in done:
            keys = {"model": {"name_or_path": base, "config": None}, "tokenizer": None} | {"lora": {"rank": 4}}
            recipe = tiny_recipe(**keys | {"quantization": {}} | CASES[name])
            done[name] = Run(RunDirectory(tmp_path_factory.mktemp("quantized")), recipe)
            assert done[name].train(processes=processes(name)) == 0, done[name].log()
        return done[name]

    return of


def processes(name: str) -> int:
    return int(CASES[name].get("distributed", {}).get("processes_per_node", 1))


@pytest.mark.parametrize("name", CASES)
def test_the_loss_falls_and_the_audit_finds_the_planned_layers(run_of: Callable[[str], Run], name: str) -> None:
    run, (how, layers, computed_in) = run_of(name), FOUND[name]
    losses = [row["loss"] for row in run.steps.values()]
    assert losses[-1] < losses[0] - 0.02
    audit = run.audit()
    assert audit["quantization"] == how
    assert audit["quantized layers"] == layers
    assert audit["weights that are not quantized"] == ["fp32"]
    assert audit["adapter_dtype"] == ["fp32"]
    assert audit["matrix multiplications"] == {computed_in: 15}


@pytest.mark.parametrize("name", ["nf4 in bf16", "fp4 in fp16, in 16-bit storage", "int8 in bf16", "nf4 over ddp"])
def test_a_killed_run_goes_on_bit_for_bit(run_of: Callable[[str], Run], name: str, tmp_path: Path) -> None:
    run, resumed = run_of(name), Run(RunDirectory(tmp_path), run_of(name).recipe)
    shutil.copytree(run.directory.checkpoints / "checkpoint-4", resumed.directory.checkpoints / "checkpoint-4")
    assert resumed.train(2, "checkpoint-4", processes(name)) == 0, resumed.log(2)
    assert resumed.trajectory == {step: row for step, row in run.trajectory.items() if step > 4}
    first, second = (adapter(one) for one in (run, resumed))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_plain_peft_loads_the_final_adapter_on_a_4_bit_base(run_of: Callable[[str], Run], base: str) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    run = run_of("nf4 in fp32, checkpointed")
    quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=quantized, dtype=torch.float32)
    text = AutoTokenizer.from_pretrained(base)(topics["import"], return_tensors="pt")["input_ids"][:, :64]
    plain = model(input_ids=text, labels=text).loss.item()
    model = PeftModel.from_pretrained(model, run.directory.final)
    adapted = model(input_ids=text, labels=text).loss.item()
    assert json.loads((run.directory.final / "adapter_config.json").read_text())["base_model_name_or_path"] == base
    assert adapted < plain


def test_an_evaluation_changes_nothing_that_is_learnt_after_it(run_of: Callable[[str], Run], tmp_path: Path) -> None:
    """bitsandbytes repacks weights in an evaluation on some CPUs, and such a layer gives its input no gradient."""
    run = run_of("nf4 in bf16")
    training = run.recipe.training.model_copy(update={"eval_strategy": "no"})
    silent = Run(RunDirectory(tmp_path), run.recipe.model_copy(update={"training": training}))
    assert silent.train() == 0, silent.log()
    assert run.texts("evaluated", "step") == [2, 4, 6, 8]
    assert silent.trajectory == run.trajectory


def adapter(run: Run, folder: Path | None = None) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file((folder or run.directory.final) / "adapter_model.safetensors")
