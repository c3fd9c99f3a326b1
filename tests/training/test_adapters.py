"""Adapters of every kind, trained for real: what the audit counts, what plain peft makes of the result, and that an
adapter which nothing reaches ends the run."""

import json
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch

from mpt.running.run_directory import RunDirectory
from tests.training.tiny_runs import FP16, Run, save_base, tiny_recipe

pytestmark = pytest.mark.slow

TWO = {"micro_batch_size": 4}
DDP = TWO | {"distributed": {"strategy": "ddp", "processes_per_node": 2}}
ZERO2 = TWO | {"distributed": {"strategy": "zero2", "processes_per_node": 2}}
ALL = 2 * (4 * 128 + 3 * 192)  # in + out of the 14 layers
CASES: dict[str, dict[str, Any]] = {
    "some": {"lora": {"rank": 4, "target_modules": ["*.v_proj", "mlp"], "layers_to_transform": [1], "rslora": True}},
    "whole modules": {"lora": {"rank": 4, "modules_to_save": ["lm_head", "embed_tokens"]}, "sample": "The ",
                      "precision": "bf16"},
    "whole modules in fp16": {"lora": {"rank": 4, "modules_to_save": ["lm_head"]}, "precision": FP16},
    "whole modules, merged": {"lora": {"rank": 4, "modules_to_save": ["lm_head"], "merge": True}, "sample": "The "},
    "whole modules, zero2": {"lora": {"rank": 4, "modules_to_save": ["lm_head"]}, "precision": "bf16"} | ZERO2,
    "dora": {"lora": {"rank": 4, "dora": True}},
    "dora, merged": {"lora": {"rank": 4, "dora": True, "merge": True}},
    "pissa": {"lora": {"rank": 4, "init": "pissa"}},
    "pissa, merged": {"lora": {"rank": 4, "init": "pissa", "merge": True}},
    "pissa_niter, zero2": {"lora": {"rank": 4, "init": "pissa_niter_4"}} | ZERO2,
    "olora, ddp": {"lora": {"rank": 4, "init": "olora", "rank_pattern": {"down_proj": 8}}} | DDP,
    "orthogonal": {"lora": {"rank": 4, "init": "orthogonal"}},
}  # fmt: skip
FOUND = {
    "some": (4, 4 * (128 + 3 * 192)),
    "whole modules": (14, 4 * ALL + 2 * 512 * 64),
    "whole modules in fp16": (14, 4 * ALL + 512 * 64),
    "whole modules, merged": (14, 4 * ALL + 512 * 64),
    "whole modules, zero2": (14, 4 * ALL + 512 * 64),
    "dora": (14, 4 * ALL + 2 * (4 * 64 + 2 * 128 + 64)),
    "pissa": (14, 4 * ALL),
    "olora, ddp": (14, 4 * ALL + 2 * 4 * 192),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_base(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def new(base: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """Make a run that puts adapters on the base."""

    def make(**keys: Any) -> Run:
        whole = {"model": {"name_or_path": base, "config": None}, "tokenizer": None, "lora": {"rank": 4}} | keys
        return Run(RunDirectory(tmp_path_factory.mktemp("adapted")), tiny_recipe(**whole))

    return make


@pytest.fixture(scope="module")
def run_of(new: Callable[..., Run]) -> Callable[[str], Run]:
    """Train a case to its end, once."""
    done: dict[str, Run] = {}

    def of(name: str) -> Run:
        if name not in done:
            done[name] = new(**CASES[name])
            processes = CASES[name].get("distributed", {}).get("processes_per_node", 1)
            assert done[name].train(processes=processes) == 0, done[name].log()
        return done[name]

    return of


@pytest.mark.parametrize("name", CASES)
def test_adapters_learn_and_the_audit_counts_them(run_of: Callable[[str], Run], name: str) -> None:
    run = run_of(name)
    losses = [row["loss"] for row in run.steps.values()]
    assert losses[-1] < losses[0] - 0.008
    audit = run.audit()
    assert audit["adapters without a gradient"] == []
    assert audit["adapter_dtype"] == ["bf16" if "distributed" in CASES[name] and "precision" in CASES[name] else "fp32"]
    if name in FOUND:
        assert (audit["layers with an adapter"], audit["trainable parameters"]) == FOUND[name]
    if "sample" in CASES[name]:
        assert run.texts("sample", "text")


def logits(model: Any, base: str) -> torch.Tensor:
    from transformers import AutoTokenizer

    text = AutoTokenizer.from_pretrained(base)(topics["import"], return_tensors="pt")["input_ids"][:, :64]
    with torch.no_grad():
        return model.eval()(input_ids=text).logits  # type: ignore[no-any-return]


def load(folder: Path, base: str) -> Any:
    """Load what a run left: an adapter on its base by peft, or a model."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    if not folder.joinpath("adapter_config.json").exists():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(folder))


@pytest.mark.parametrize("name", ["dora", "pissa"])
def test_the_merged_model_is_the_base_with_the_adapter(run_of: Callable[[str], Run], base: str, name: str) -> None:
    adapted = logits(load(run_of(name).directory.final, base), base)
    merged = logits(load(run_of(f"{name}, merged").directory.final, base), base)
    # fp32 sums in another order; the adapters themselves move the logits by half a unit.
    assert torch.allclose(adapted, merged, atol=1e-5)
    assert not torch.allclose(adapted, logits(load(Path(base), base), base), atol=0.05)


def test_what_was_taken_from_the_weights_is_saved_as_a_plain_adapter_of_twice_the_rank(
    run_of: Callable[[str], Run],
) -> None:
    for name in ("pissa", "pissa_niter, zero2", "olora, ddp"):
        config = json.loads((run_of(name).directory.final / "adapter_config.json").read_text())
        assert (config["init_lora_weights"], config["r"]) == (True, 8)
        checkpoint = run_of(name).directory.checkpoints / "checkpoint-8" / "adapter_config.json"
        assert json.loads(checkpoint.read_text())["r"] == 4


def test_a_run_goes_on_bit_for_bit_where_the_weights_were_changed(
    run_of: Callable[[str], Run], new: Callable[..., Run]
) -> None:
    import shutil

    run, resumed = run_of("pissa"), new(**CASES["pissa"])
    shutil.copytree(run.directory.checkpoints / "checkpoint-4", resumed.directory.checkpoints / "checkpoint-4")
    assert resumed.train(2, "checkpoint-4") == 0, resumed.log(2)
    assert resumed.trajectory == {step: row for step, row in run.trajectory.items() if step > 4}


def test_training_goes_on_from_an_adapter_on_disk(run_of: Callable[[str], Run], new: Callable[..., Run]) -> None:
    before = run_of("whole modules, zero2")
    further = new(lora={"adapter": str(before.directory.final)})
    assert further.train() == 0, further.log()
    assert further.steps[1]["loss"] < before.steps[1]["loss"] - 0.2
    assert further.audit()["trainable parameters"] == FOUND["whole modules, zero2"][1]


@pytest.mark.parametrize("strategy", ["single", "zero2"])
def test_an_adapter_that_nothing_reaches_ends_the_run_before_an_update(new: Callable[..., Run], strategy: str) -> None:
    run = new(**(ZERO2 if strategy == "zero2" else {}))
    run.fault = {"detached": "layers.1.mlp"}
    assert run.train(processes=2 if strategy == "zero2" else 1) == 3, run.log()
    problem = run.last_word()["problem"]
    assert "3 of 14 adapters get no gradient, model.layers.1.mlp.gate_proj, model.layers.1.mlp.up_proj" in problem
    assert "cuts the graph" in problem or "exactly 0" in problem
    assert not run.directory.metrics.exists() or not run.steps
    report = json.loads(run.directory.attempt(1).audit.read_text())
    assert not report["passed"]


def test_a_loss_that_hangs_on_no_adapter_is_that_error_and_no_bug(new: Callable[..., Run]) -> None:
    run = new(loss="full")  # a chunked loss does not call the head
    run.fault = {"detached": "lm_head"}
    assert run.train() == 3, run.log()
    assert "14 of 14 adapters get no gradient" in run.last_word()["problem"]
