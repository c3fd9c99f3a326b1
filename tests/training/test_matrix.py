"""Precision x engine x method: what the audit found in each legal cell, and the refusal of each illegal one.

The truths are written out here, not taken from the plan. A group of processes trains all cells of an engine one after
another (`matrix_cells`). Accumulation is held here too, in the same processes: one optimizer step by micro batches
against the same step as one large batch.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.training.tiny_runs import FP16, LLAMA, Run, free_port, tiny_recipe

pytestmark = pytest.mark.slow

ENGINES = ("single", "ddp", "zero1", "zero2", "zero3")
EMULATED = {"allow_emulation": True}
ISLANDS = {"lm_head": "fp32", "model.layers.0.mlp.down_proj": "fp32"}
PRECISIONS: dict[str, Any] = {
    "fp32": "fp32",
    "fp16": FP16,
    "bf16": "bf16",
    "bf16_pure": "bf16_pure",
    "fp8": {"mode": "fp8"} | EMULATED,
    "islands": {"mode": "bf16", "layers": ISLANDS},
}
# 2 blocks of 7 linear layers and the head. fp8 leaves the first, the last and the head in bf16.
MATMULS = {
    "fp32": {"fp32": 15},
    "fp16": {"fp16": 15},
    "bf16": {"bf16": 15},
    "bf16_pure": {"bf16": 15},
    "fp8": {"fp8": 12, "bf16": 3},
    "islands": {"bf16": 13},
}
HALF = {"fp16": "fp16", "bf16": "bf16", "fp8": "bf16", "islands": "bf16"}
EXTRA: dict[str, dict[str, Any]] = {
    "kahan": {"precision": {"mode": "bf16_pure", "rounding": "kahan"}, "training": {"adam_beta2": 0.95}},
    "bf16 sums": {"precision": {"mode": "bf16", "reduce_dtype": "bf16"}},
    "fp32 sums of bf16_pure": {"precision": {"mode": "bf16_pure", "reduce_dtype": "fp32"}},
    "fp32 accumulation of bf16_pure": {"precision": {"mode": "bf16_pure", "grad_accum_dtype": "fp32"}},
    "fp32 copies of bf16_pure": {"precision": {"mode": "bf16_pure", "master_weights": "fp32"}},
    "fp8 islands": {"precision": {"mode": "bf16", "layers": {"*.mlp": "fp8", "lm_head": "fp32"}} | EMULATED},
    "islands in bf16_pure": {"precision": {"mode": "bf16_pure", "layers": ISLANDS}},
    "islands in fp16": {"precision": FP16 | {"layers": ISLANDS}},
    "rowwise_with_gw_hp": {"precision": {"mode": "fp8", "fp8": {"recipe": "rowwise_with_gw_hp"}} | EMULATED},
}
STEP = {"max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 1e9, "save_strategy": "no"}


def expected(precision: str, engine: str, method: str) -> dict[str, Any]:
    """Write out what must be found in a cell."""
    half, is_zero = HALF.get(precision), engine.startswith("zero")
    casts = half is not None and is_zero and precision != "islands"  # DeepSpeed's 16-bit engine
    truth: dict[str, Any] = {
        "distributed.strategy": engine,
        "matrix multiplications": MATMULS[precision],
        "autocast_dtype": None if casts else half,
        "weights_dtype": [half] if casts else ["fp32"],
        "master_weights_dtype": ["fp32"],
        "optimizer_state_dtype": ["fp32"],
        "grad_accum_dtype": "fp32" if is_zero else ["fp32"],
        "attention kernel": ["flash"],
        "tensor alignment": [],
    }
    if engine == "ddp" or is_zero:
        truth["reduce_dtype"] = "fp32"
    if precision == "bf16_pure":
        truth |= {"weights_dtype": ["bf16"], "master_weights_dtype": ["bf16"], "rounding": "stochastic"}
        truth |= {key: "bf16" for key in ("grad_accum_dtype", "reduce_dtype") if key in truth}
        truth["grad_accum_dtype"] = "bf16" if is_zero else ["bf16"]
    if precision == "fp8":
        truth["fp8 modules"] = 12
    if precision == "islands":
        truth |= {"island lm_head": ["fp32"], "island model.layers.0.mlp.down_proj": ["fp32"]}
    if precision == "fp16":
        truth["loss_scale"] = 65536.0
    if method == "lora":
        wide = precision == "islands" and is_zero
        truth["weights_dtype"] = ["fp32"] if wide or half is None else [half]
        truth["adapter_dtype"] = [half] if casts and engine != "zero3" else ["fp32"]
        truth["has adapters"] = True
    return truth


def refusal(precision: str, engine: str, method: str) -> str | None:
    """Say which words the refusal of an illegal cell must have; None for a legal one."""
    if precision == "bf16_pure" and method == "lora":
        return "adapters are small"
    return None


EXTRA_TRUTHS: dict[tuple[str, str], dict[str, Any]] = {
    ("kahan", "single"): {"rounding": "kahan", "optimizer_state_dtype": ["bf16"]},
    ("kahan", "zero2"): {"rounding": "kahan", "optimizer_state_dtype": ["bf16"], "master_weights_dtype": ["bf16"]},
    ("bf16 sums", "ddp"): {"reduce_dtype": "bf16", "grad_accum_dtype": ["fp32"]},
    ("bf16 sums", "zero2"): {"reduce_dtype": "bf16", "grad_accum_dtype": "fp32"},
    ("fp32 sums of bf16_pure", "ddp"): {"reduce_dtype": "fp32", "grad_accum_dtype": ["bf16"]},
    ("fp32 sums of bf16_pure", "zero3"): {"reduce_dtype": "fp32", "grad_accum_dtype": "bf16"},
    ("fp32 accumulation of bf16_pure", "single"): {"grad_accum_dtype": ["fp32"], "weights_dtype": ["bf16"]},
    ("fp32 copies of bf16_pure", "single"): {"master_weights_dtype": ["fp32"], "weights_dtype": ["bf16"]},
    ("fp32 copies of bf16_pure", "ddp"): {"master_weights_dtype": ["fp32"], "weights_dtype": ["bf16"]},
    ("fp8 islands", "single"): {"matrix multiplications": {"bf16": 8, "fp8": 6}, "island lm_head": ["fp32"]},
    ("fp8 islands", "zero2"): {"matrix multiplications": {"bf16": 8, "fp8": 6}, "island lm_head": ["fp32"]},
    ("islands in bf16_pure", "single"): {"island lm_head": ["fp32"], "weights of fp32 islands": ["fp32"]},
    ("islands in fp16", "single"): {"island lm_head": ["fp32"], "matrix multiplications": {"fp16": 13}},
    ("rowwise_with_gw_hp", "single"): {"matrix multiplications": {"fp8": 12, "bf16": 3}},
}
EXTRA_REFUSALS: dict[tuple[str, str], str] = {
    ("bf16 sums", "single"): "one process sums nothing",
    ("fp32 accumulation of bf16_pure", "ddp"): "sums its buckets in the format of the weights",
    ("fp32 accumulation of bf16_pure", "zero1"): "fp32 master weights",
    ("fp32 copies of bf16_pure", "zero2"): "which is what mode bf16 is there",
    ("islands in bf16_pure", "zero2"): "DeepSpeed casts every weight",
    ("islands in fp16", "zero2"): "DeepSpeed casts every weight",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, new_run: Callable[..., Run]) -> Path:
    """A checkpoint to put adapters on."""
    run = new_run(training={"max_steps": 2, "save_strategy": "no"})
    assert run.train() == 0, run.log()
    return run.directory.final


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Callable[[str], dict[str, Any]]:
    """Train every cell of an engine, once."""
    done: dict[str, dict[str, Any]] = {}

    def of(engine: str) -> dict[str, Any]:
        if engine not in done:
            done[engine] = train_cells(engine, base, tmp_path_factory.mktemp(engine))
        return done[engine]

    return of


def train_cells(engine: str, base: Path, folder: Path) -> dict[str, Any]:
    cells = [
        {"name": f"{precision} {method}", "recipe": recipe(engine, base if method == "lora" else None, keys)}
        for precision, block in PRECISIONS.items()
        for method in ("full", "lora")
        for keys in ({"precision": block},)
    ]
    asked = [name for name, where in (*EXTRA_TRUTHS, *EXTRA_REFUSALS) if where == engine]
    cells += [{"name": name, "recipe": recipe(engine, None, EXTRA[name])} for name in asked]
    for precision, block in PRECISIONS.items():
        for name, micro, accumulation in (("whole", 4, 1), ("in parts", 1, 4)):
            keys = {"precision": rounded_to_nearest(block), "training": STEP} | accumulated(micro, accumulation)
            cells.append({"name": f"{precision} {name}", "recipe": recipe(engine, None, keys)})
    (folder / "cells.json").write_text(json.dumps(cells))
    command = [sys.executable]
    if engine != "single":
        command += ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    command += ["-m", "tests.training.matrix_cells", str(folder / "cells.json"), str(folder / "out.json")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path.cwd())}
    run = subprocess.run(command, capture_output=True, text=True, timeout=580, env=environment, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    found: dict[str, Any] = json.loads((folder / "out.json").read_text())
    return found


def recipe(engine: str, base: Path | None, keys: dict[str, Any]) -> dict[str, Any]:
    own = keys | {"training": {"max_steps": 3, "save_strategy": "no"} | keys.get("training", {})}
    batch = {"micro_batch_size": 4, "gradient_accumulation_steps": 2}
    strategy = {} if engine == "single" else {"distributed": {"strategy": engine, "processes_per_node": 2}}
    plain = tiny_recipe(**(batch | own | strategy)).model_dump(mode="json", exclude_unset=True)
    if base is not None:
        plain |= {"model": {"name_or_path": str(base)}, "lora": {"rank": 4}}
        del plain["tokenizer"]
    return plain


def rounded_to_nearest(block: Any) -> Any:
    """SGD has no other rounding, and a step of rate 1 shows the gradient itself."""
    return {"mode": "bf16_pure", "rounding": "nearest"} if block == "bf16_pure" else block


def accumulated(micro: int, accumulation: int) -> dict[str, Any]:
    """Documents of their own lengths, padded and masked: a mean of means would differ from the mean."""
    return {
        "data": {"packing": False, "eval_fraction": 0},
        "micro_batch_size": micro,
        "gradient_accumulation_steps": accumulation,
    }


def fp16_engine_is_missing(engine: str) -> bool:
    """DeepSpeed refuses fp16 on a CPU without AVX512-FP16 or AMX-FP16; torch's autocast emulates it."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return engine.startswith("zero") and "avx512_fp16" not in flags and "amx_fp16" not in flags


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("engine", ENGINES)
def test_the_audit_finds_the_truth_of_each_cell(
    engine: str, precision: str, method: str, results: Callable[[str], dict[str, Any]]
) -> None:
    if precision == "fp16" and fp16_engine_is_missing(engine):
        pytest.skip("DeepSpeed has no fp16 on this CPU (no AVX512-FP16)")
    cell = results(engine)[f"{precision} {method}"]
    words = refusal(precision, engine, method)
    if words is not None:
        assert words in cell["error"]
        return
    assert "error" not in cell, cell["error"]
    truth = expected(precision, engine, method)
    assert {key: cell["audit"].get(key) for key in truth} == truth
    assert cell["passed"]
    assert len(cell["losses"]) == 3


@pytest.mark.parametrize(("name", "engine"), EXTRA_TRUTHS)
def test_every_key_of_the_block_reaches_the_engine(
    name: str, engine: str, results: Callable[[str], dict[str, Any]]
) -> None:
    cell = results(engine)[name]
    assert "error" not in cell, cell["error"]
    truth = EXTRA_TRUTHS[name, engine]
    assert {key: cell["audit"].get(key) for key in truth} == truth


@pytest.mark.parametrize(("name", "engine"), EXTRA_REFUSALS)
def test_what_an_engine_can_not_hold_is_refused_with_the_reason(
    name: str, engine: str, results: Callable[[str], dict[str, Any]]
) -> None:
    assert EXTRA_REFUSALS[name, engine] in results(engine)[name]["error"]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16_pure", "fp8", "islands"])
def test_every_engine_learns_the_same(precision: str, results: Callable[[str], dict[str, Any]]) -> None:
    # The four engines of two processes see the same batches; what differs is the order of sums, and in 16 bits what is
    # rounded when (fp32 weights under autocast, or DeepSpeed's 16-bit copies).
    losses = [results(engine)[f"{precision} full"]["losses"] for engine in ENGINES[1:]]
    tolerance = 1e-5 if precision == "fp32" else 5e-3
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=tolerance)


# By how much the sum over micro batches may differ from the large batch's gradient, as |difference| / |gradient|: fp32
# sums in another order; a 16-bit gradient is rounded once a micro batch, to 2^-9 (bf16) or 2^-12 (fp16), and in
# bf16_pure the sum is too; tensorwise fp8 scales each micro batch by its own maximum (e4m3: 2^-4).
TOLERANCE = {"fp32": 1e-5, "fp16": 5e-3, "bf16": 2e-2, "bf16_pure": 3e-2, "fp8": 1e-1, "islands": 2e-2}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("engine", ENGINES)
def test_accumulated_gradients_equal_those_of_the_large_batch(
    engine: str, precision: str, results: Callable[[str], dict[str, Any]], base: Path
) -> None:
    import torch
    from safetensors.torch import load_file

    if precision == "fp16" and fp16_engine_is_missing(engine):
        pytest.skip("DeepSpeed has no fp16 on this CPU (no AVX512-FP16)")
    cells = [results(engine)[f"{precision} {name}"] for name in ("whole", "in parts")]
    assert [cell.get("error") for cell in cells] == [None, None]
    whole, parts = (load_file(Path(cell["folder"]) / "final" / "model.safetensors") for cell in cells)
    # The other parts of the first step are the same: its batch, its loss, its starting weights.
    assert cells[1]["losses"] == pytest.approx(cells[0]["losses"], rel=1e-6 if precision == "fp32" else 2e-3)
    started = started_from(base)
    difference = torch.cat([(whole[name].double() - parts[name].double()).flatten() for name in whole])
    gradient = torch.cat([(whole[name].double() - started[name].double()).flatten() for name in whole])
    assert gradient.norm() > 0.1
    assert (difference.norm() / gradient.norm()).item() < TOLERANCE[precision]


def started_from(base: Path) -> dict[str, Any]:
    """The tiny Llama as its seed draws it: where every cell without adapters begins."""
    import transformers

    config = transformers.LlamaConfig(vocab_size=512, **{k: v for k, v in LLAMA.items() if k != "model_type"})
    transformers.set_seed(42)
    return {
        name: weight.detach()
        for name, weight in transformers.AutoModelForCausalLM.from_config(config).named_parameters()
    }
