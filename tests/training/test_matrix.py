"""Precision x engine x method: what the audit found in each legal cell, and the refusal of each illegal one.

The truths are written out here, not taken from the plan. A group of processes trains all cells of an engine one after
another (`matrix_cells`). Accumulation is held here too, in the same processes: one optimizer step by micro batches
against the same step as one large batch.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest

from mpt.hardware.specs import parse_machine
from mpt.terms import Feature
from tests.training.forks import fork_server
from tests.training.tiny_runs import FP16, LLAMA, save_base, tiny_recipe

pytestmark = pytest.mark.slow

ENGINES = ("single", "ddp", "zero1", "zero2", "zero3")
EMULATED = {"allow_emulation": True}
ISLANDS = {"lm_head": "fp32", "model.layers.0.mlp.down_proj": "fp32"}
LAYERS = {"lm_head": "fp32", "*.mlp.*": "fp8", "model.embed_tokens": "fp32"}
EXAMPLE = {"mode": "bf16", "layers": LAYERS} | EMULATED
TIED = {"tie_word_embeddings": True}
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
ATTENDS_EAGERLY = ("bf16", "bf16_pure", "islands")
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
    "example": {"precision": EXAMPLE},
    "example, tied": {"precision": EXAMPLE, "model": {"config": LLAMA | TIED}},
    "bf16 islands in fp32": {"precision": {"mode": "fp32", "layers": {"*.mlp": "bf16"}} | EMULATED},
    "bf16 islands in fp16": {"precision": FP16 | {"layers": {"*.mlp": "bf16"}}},
    "fp8 layers in bf16_pure": {"precision": {"mode": "bf16_pure", "layers": {"*.mlp": "fp8"}} | EMULATED},
    "tf32": {"precision": "tf32"},
    "mxfp8": {"precision": "mxfp8"},
    "auto": {"precision": "auto"},
    "bf16 accumulation": {"precision": {"mode": "bf16", "grad_accum_dtype": "bf16"}},
    "scale that grows": {"precision": FP16 | {"loss_scale": {"initial": 256.0, "growth_interval": 1}}},
    "static scale": {"precision": FP16 | {"loss_scale": {"static": 512.0}}},
}
# How sums over ranks and over micro batches are rounded. Four micro batches: a sum of two bf16 numbers may be exact.
SUMS: dict[str, dict[str, Any]] = {
    "sums in fp32": {"mode": "bf16"},
    "sums in bf16": {"mode": "bf16", "reduce_dtype": "bf16"},
    "accumulated in bf16": {"mode": "bf16", "grad_accum_dtype": "bf16"},
}
# A run of four steps and its continuation from the second, with rounded weights.
PURE: dict[str, dict[str, Any]] = {
    "stochastic": {"precision": {"mode": "bf16_pure"}},
    "stochastic, bf16 moments": {"precision": {"mode": "bf16_pure"}, "training": {"adam_beta2": 0.95}},
    "kahan": {"precision": {"mode": "bf16_pure", "rounding": "kahan"}, "training": {"adam_beta2": 0.95}},
}
# fp16 from each kind of weights, with a first scale that overflows.
OVERFLOWING = {"precision": FP16 | {"loss_scale": {"initial": 2.0**40, "backoff_factor": 2.0**-12}}}
# Frozen fp8 layers are accumulated around as bf16 ones are: the adapters are in bf16.
ADAPTED = ("fp32", "bf16")
TEXT = "text.jsonl"
STEP = {"max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 1e9, "save_strategy": "no"}


def expected(precision: str, engine: str, method: str) -> dict[str, Any]:
    """Write out what must be found in a cell."""
    half, is_zero = HALF.get(precision), engine.startswith("zero")
    computes_bf16 = parse_machine("cpu").all_compute(Feature.BF16)
    casts = half is not None and is_zero and precision != "islands"  # DeepSpeed's 16-bit engine
    truth: dict[str, Any] = {
        "distributed.strategy": engine,
        "matrix multiplications": MATMULS[precision],
        "autocast_dtype": None if casts else half,
        "weights_dtype": [half] if casts else ["fp32"],
        "master_weights_dtype": ["fp32"],
        "optimizer_state_dtype": ["fp32"],
        "grad_accum_dtype": "fp32" if is_zero else ["fp32"],
        # 64 tokens in bf16 attend eagerly on a CPU that computes bf16 (`mpt.planning.attention`).
        "attention kernel": ["eager" if precision in ATTENDS_EAGERLY and computes_bf16 else "flash"],
        "tensor alignment": [],
    }
    if engine == "ddp" or is_zero:
        truth["reduce_dtype"] = "fp32"
    if is_zero:
        truth |= {"sums over ranks": ["fp32"], "gradient_dtype": [half] if casts else ["fp32"]}
    if precision == "bf16_pure":
        truth |= {"weights_dtype": ["bf16"], "master_weights_dtype": ["bf16"], "rounding": "stochastic"}
        truth |= {key: "bf16" for key in ("grad_accum_dtype", "reduce_dtype") if key in truth}
        truth["grad_accum_dtype"] = "bf16" if is_zero else ["bf16"]
        truth |= {key: ["bf16"] for key in ("sums over ranks", "gradient_dtype") if key in truth}
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
        truth["layers with an adapter"] = 14
        truth |= {"gradient_dtype": truth["adapter_dtype"]} if is_zero else {}
    return truth


def refusal(precision: str, engine: str, method: str) -> str | None:
    """Say which words the refusal of an illegal cell must have; None for a legal one."""
    if precision == "bf16_pure" and method == "lora":
        return "adapters are small"
    if precision == "fp16" and fp16_engine_is_missing(engine):
        return "in fp16, and DeepSpeed has no fp16 on"
    return None


EXAMPLE_TRUTH = {
    "matrix multiplications": {"bf16": 8, "fp8": 6},
    "island lm_head": ["fp32"],
    "island model.embed_tokens": ["fp32"],
}
EXTRA_TRUTHS: dict[tuple[str, str], dict[str, Any]] = {
    ("kahan", "single"): {"rounding": "kahan", "optimizer_state_dtype": ["bf16"]},
    ("bf16 sums", "ddp"): {"reduce_dtype": "bf16", "grad_accum_dtype": ["fp32"]},
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
    **{("example", engine): EXAMPLE_TRUTH for engine in ENGINES},
    ("example, tied", "single"): EXAMPLE_TRUTH,
    ("example, tied", "zero3"): EXAMPLE_TRUTH,
    **{("kahan", engine): {"rounding": "kahan", "optimizer_state_dtype": ["bf16"]} for engine in ENGINES[1:]},
    ("bf16 islands in fp32", "single"): {"matrix multiplications": {"fp32": 9, "bf16": 6}, "weights_dtype": ["fp32"]},
    ("bf16 islands in fp16", "single"): {"matrix multiplications": {"fp16": 9, "bf16": 6}, "loss_scale": 65536.0},
    **{
        ("fp8 layers in bf16_pure", engine): {
            "matrix multiplications": {"bf16": 9, "fp8": 6},
            "weights_dtype": ["bf16"],
        }
        for engine in ("single", "ddp", "zero2")
    },
    ("islands in bf16_pure", "ddp"): {"island lm_head": ["fp32"], "weights of fp32 islands": ["fp32"],
                                      "reduce_dtype": "bf16"},
    **{
        ("bf16 sums", engine): {"reduce_dtype": "bf16", "sums over ranks": ["bf16"], "grad_accum_dtype": "fp32"}
        for engine in ENGINES[2:]
    },
    **{("bf16 accumulation", engine): {"reduce_dtype": "fp32", "grad_accum_dtype": "bf16"} for engine in ENGINES[2:]},
    ("auto", "single"): {},
    ("scale that grows", "ddp"): {"loss_scale": 256.0},
    ("static scale", "ddp"): {"loss_scale": 512.0},
}  # fmt: skip
EXTRA_REFUSALS: dict[tuple[str, str], str] = {
    ("bf16 sums", "single"): "one process sums nothing",
    ("tf32", "single"): "can't compute tf32",
    ("mxfp8", "single"): "can't compute mxfp8",
    ("bf16 accumulation", "single"): "single accumulates gradients in fp32",
    ("bf16 accumulation", "ddp"): "ddp accumulates gradients in fp32",
    ("fp32 accumulation of bf16_pure", "ddp"): "sums its buckets in the format of the weights",
    ("fp32 accumulation of bf16_pure", "zero1"): "fp32 master weights",
    ("fp32 copies of bf16_pure", "zero2"): "which is what mode bf16 is there",
    ("islands in bf16_pure", "zero2"): "DeepSpeed casts every weight",
    ("islands in fp16", "zero2"): "DeepSpeed casts every weight",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model to put adapters on, with the tokenizer of every cell; beside it, the text that they learn."""
    folder = tmp_path_factory.mktemp("start")
    # Paragraphs: a whole topic is longer than a sample, and would leave nothing to pad.
    texts = [text for name in sorted(topics)[:14] for text in topics[name].split("\n\n") if len(text) > 20]
    rows = "\n".join(json.dumps({"text": text}) for text in texts)
    folder.joinpath(TEXT).write_text(rows, encoding="utf-8")
    return Path(save_base(folder / "base"))


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
    cells += [
        cell
        for name, keys in PURE.items()
        if engine != "single"
        for cell in whole_and_continued(f"{name} rounding", recipe(engine, None, four_steps(keys)))
    ]
    if engine == "single":
        for name, (path, keys) in fp16_starts(base).items():
            plain = recipe(engine, path, OVERFLOWING | {"training": {"max_steps": 4}} | keys)
            if "adapters" not in name:
                plain.pop("lora", None)
            cells.append({"name": name, "recipe": plain})
    else:
        for name, block in SUMS.items():
            keys = {"precision": block, "training": STEP, "micro_batch_size": 2, "gradient_accumulation_steps": 4}
            cells.append({"name": name, "recipe": recipe(engine, None, keys)})
        for precision in ("fp32", "bf16"):  # the global batch of a single process's "whole"
            keys = {"precision": precision, "training": STEP} | accumulated(2, 1)
            cells.append({"name": f"{precision} divided", "recipe": recipe(engine, None, keys)})
    for precision in ADAPTED:
        for name, micro, accumulation in (("whole", 4, 1), ("in parts", 1, 4)):
            keys = {"precision": PRECISIONS[precision], "training": STEP} | accumulated(micro, accumulation)
            cells.append({"name": f"{precision} adapters {name}", "recipe": recipe(engine, base, keys)})
    for precision, block in PRECISIONS.items():
        for name, micro, accumulation in (("whole", 4, 1), ("in parts", 1, 4)):
            keys = {"precision": rounded_to_nearest(block), "training": STEP} | accumulated(micro, accumulation)
            cells.append({"name": f"{precision} {name}", "recipe": recipe(engine, None, keys)})
    for cell in cells:
        share_text_and_tokenizer(cell["recipe"], base)
        if not cell["name"].endswith((" full", " lora")):  # those evaluate
            cell["recipe"]["data"]["eval_fraction"] = 0
    (folder / "cells.json").write_text(json.dumps(cells))
    argv = ["cells", str(folder / "cells.json"), str(folder / "out.json")]
    run = fork_server().start(argv, folder / "log", 1 if engine == "single" else 2)
    assert run.wait(timeout=900) == 0, (folder / "log").read_text()[-3000:]
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


def share_text_and_tokenizer(plain: dict[str, Any], base: Path) -> None:
    """Let a cell learn little text with a tokenizer that is there: to prepare its own takes longer than its steps."""
    plain["data"]["source"] = str(base.parent / TEXT)
    if "tokenizer" in plain:
        plain["tokenizer"] = {"name_or_path": str(base)}
        plain["model"]["config"]["vocab_size"] = 512


def four_steps(keys: dict[str, Any]) -> dict[str, Any]:
    return keys | {"training": {"max_steps": 4, "save_strategy": "steps", "save_steps": 2} | keys.get("training", {})}


def whole_and_continued(name: str, plain: dict[str, Any]) -> list[dict[str, Any]]:
    continued = {"name": f"{name}, continued", "recipe": plain, "continues": [name, "checkpoint-2"]}
    return [{"name": name, "recipe": plain}, continued]


def fp16_starts(base: Path) -> dict[str, tuple[Path | None, dict[str, Any]]]:
    """What fp16 may start from: a checkpoint or None, and more keys."""
    return {
        "fp16 from bf16": (stored_in("bfloat16", base), {}),
        "fp16 from fp16": (stored_in("float16", base), {}),
        "fp16 recomputed": (None, {"gradient_checkpointing": True}),
        "fp16 adapters": (base, {}),
        "fp16 adapters on fp16": (stored_in("float16", base), {}),
        "fp16 adapters beyond its range": (stored_in("float32", base, scale=1e8), {}),
    }


def stored_in(dtype: str, base: Path, *, scale: float = 1.0) -> Path:
    """Copy a checkpoint in another format, one of its weights scaled."""
    import torch
    from safetensors.torch import load_file, save_file

    path = base.parent / f"{base.name}-{dtype}-{scale:g}"
    if not path.exists():
        shutil.copytree(base, path)
        weights = load_file(base / "model.safetensors")
        weights["model.layers.1.mlp.up_proj.weight"] *= scale
        weights = {name: weight.to(getattr(torch, dtype)) for name, weight in weights.items()}
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((path / "config.json").read_text()) | {"dtype": dtype}
        (path / "config.json").write_text(json.dumps(config))
    return path


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
    if precision == "fp8" and method == "full":
        assert unmoved(cell, MOVED_IN_FP8) == []


MOVED_IN_FP8 = [
    f"model.layers.{block}.{part}.weight"
    for block in range(2)
    for part in (*(f"self_attn.{letter}_proj" for letter in "qkvo"), "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    if (block, part) not in ((0, "self_attn.q_proj"), (1, "mlp.down_proj"))
]
MLP_IN_FP8 = [f"model.layers.{block}.mlp.{part}_proj.weight" for block in range(2) for part in ("gate", "up", "down")]


def unmoved(cell: dict[str, Any], names: list[str], **config: Any) -> list[str]:
    """Name the fp8 weights that are where they began: replaced after the optimizer was made, they would be frozen."""
    import torch
    from safetensors.torch import load_file

    final, started = load_file(Path(cell["folder"]) / "final" / "model.safetensors"), started_from(**config)
    return [name for name in names if torch.equal(final[name], started[name].to(final[name].dtype))]


@pytest.mark.parametrize(("name", "engine"), EXTRA_TRUTHS)
def test_every_key_of_the_block_reaches_the_engine(
    name: str, engine: str, results: Callable[[str], dict[str, Any]]
) -> None:
    cell = results(engine)[name]
    assert "error" not in cell, cell["error"]
    truth = EXTRA_TRUTHS[name, engine]
    assert {key: cell["audit"].get(key) for key in truth} == truth
    if "fp8" in str(truth):
        names = MOVED_IN_FP8 if name == "rowwise_with_gw_hp" else MLP_IN_FP8
        assert unmoved(cell, names, **(TIED if "tied" in name else {})) == []


@pytest.mark.parametrize(("name", "engine"), EXTRA_REFUSALS)
def test_what_an_engine_can_not_hold_is_refused_with_the_reason(
    name: str, engine: str, results: Callable[[str], dict[str, Any]]
) -> None:
    said = EXTRA_REFUSALS[name, engine]
    if "in fp16" in name and fp16_engine_is_missing(engine):
        said = "DeepSpeed has no fp16 on"  # on a CPU that has none that reason comes first
    assert said in results(engine)[name]["error"]


def test_the_gradients_of_fp32_islands_stay_fp32_on_the_wire(results: Callable[[str], dict[str, Any]]) -> None:
    assert results("ddp")["islands in bf16_pure"]["wire"] == ["bfloat16", "float32"]
    assert results("ddp")["bf16 sums"]["wire"] == ["bfloat16"]


def test_a_loss_scale_moves_as_the_recipe_says_under_ddp(results: Callable[[str], dict[str, Any]]) -> None:
    assert results("ddp")["scale that grows"]["scales"] == [256.0, 512.0, 1024.0]
    assert results("ddp")["static scale"]["scales"] == [512.0] * 3
    assert results("ddp")["static scale"]["skipped"] == [False] * 3


@pytest.mark.parametrize(
    "name", ["fp16 from bf16", "fp16 from fp16", "fp16 recomputed", "fp16 adapters", "fp16 adapters on fp16"]
)
def test_fp16_skips_what_overflows_and_goes_on_whatever_the_weights_were(
    name: str, results: Callable[[str], dict[str, Any]]
) -> None:
    cell = results("single")[name]
    assert "error" not in cell, cell["error"]  # "Attempting to unscale FP16 gradients" would be one
    assert cell["skipped"] == [True, True, False, False]
    assert cell["scales"] == [2.0**40, 2.0**28, 2.0**16, 2.0**16]
    adapts = "adapters" in name
    assert cell["audit"]["weights_dtype"] == (["fp16"] if adapts else ["fp32"])
    assert cell["audit"]["adapter_dtype" if adapts else "master_weights_dtype"] == ["fp32"]
    assert cell["losses"][3] < cell["losses"][2]


def test_a_frozen_weight_beyond_fp16_is_refused_by_name(results: Callable[[str], dict[str, Any]]) -> None:
    error = results("single")["fp16 adapters beyond its range"]["error"]
    assert error == "the weight model.layers.1.mlp.up_proj.weight is not finite in fp16, which ends at 65504"


def tensors(cell: dict[str, Any], file: str = "model.safetensors") -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(Path(cell["folder"]) / "final" / file)


def applied_gradient(cell: dict[str, Any]) -> Any:
    """The gradient of a single step of SGD at a rate of 1, of the matrices, in one row."""
    import torch

    final, started = tensors(cell), started_from()
    names = [name for name in sorted(final) if final[name].dim() == 2]
    return torch.cat([(started[name].double() - final[name].double()).flatten() for name in names])


@pytest.mark.parametrize("name", ["sums in bf16", "accumulated in bf16"])
@pytest.mark.parametrize("engine", ENGINES[1:])
def test_the_format_of_sums_shows_in_the_gradient(
    engine: str, name: str, results: Callable[[str], dict[str, Any]]
) -> None:
    if (engine, name) == ("ddp", "accumulated in bf16"):
        assert "ddp accumulates gradients in fp32" in results(engine)[name]["error"]
        return
    wide, narrow = (applied_gradient(results(engine)[which]) for which in ("sums in fp32", name))
    # One rounding of a sum to bf16 is off by 2^-9 at most, and by 2^-9 / sqrt(3) in the mean of a binade's lower end.
    assert 2.0**-12 < ((wide - narrow).norm() / wide.norm()).item() < 2.0**-6


def test_what_ddp_sums_in_bf16_is_a_bf16_number(results: Callable[[str], dict[str, Any]]) -> None:
    shares = []
    for name in ("sums in fp32", "sums in bf16"):
        gradient = applied_gradient(results("ddp")[name])
        # The step rounds the weight, of at most 0.1, to fp32.
        off = (gradient - gradient.bfloat16().double()).abs()
        shares.append((off <= 2.0**-27).double().mean().item())
    assert shares[1] == 1.0
    assert shares[0] < 0.5


@pytest.mark.parametrize("name", PURE)
@pytest.mark.parametrize("engine", ENGINES[1:])
def test_rounded_weights_resume_bit_for_bit_and_ranks_round_as_they_should(
    engine: str, name: str, results: Callable[[str], dict[str, Any]]
) -> None:
    import torch

    whole, continued = (results(engine)[f"{name} rounding{end}"] for end in ("", ", continued"))
    assert [cell.get("error") for cell in (whole, continued)] == [None, None]
    assert continued["losses"] == whole["losses"][2:]
    first, second = tensors(whole), tensors(continued)
    assert all(torch.equal(first[key], second[key]) for key in first)
    for cell in (whole, continued):
        ranks = cell["ranks"]
        is_divided = engine != "ddp"
        assert [rank["shard"] for rank in ranks] == ([0, 1] if is_divided else [0, 0])
        # ZeRO divides the optimizer's state; DDP's replicas hold the same, and so do ZeRO-1's and 2's weights.
        assert (ranks[0]["moments"] == ranks[1]["moments"]) is not is_divided
        assert engine == "zero3" or ranks[0]["weights"] == ranks[1]["weights"]
    assert whole["ranks"] == continued["ranks"]


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
    engine: str, precision: str, results: Callable[[str], dict[str, Any]]
) -> None:
    import torch
    from safetensors.torch import load_file

    if refusal(precision, engine, "full") is not None:
        pytest.skip("a refused cell trains nothing")
    cells = [results(engine)[f"{precision} {name}"] for name in ("whole", "in parts")]
    assert [cell.get("error") for cell in cells] == [None, None]
    whole, parts = (load_file(Path(cell["folder"]) / "final" / "model.safetensors") for cell in cells)
    # The other parts of the first step are the same: its batch, its loss, its starting weights.
    assert cells[1]["losses"] == pytest.approx(cells[0]["losses"], rel=1e-6 if precision == "fp32" else 2e-3)
    started = started_from()
    difference = torch.cat([(whole[name].double() - parts[name].double()).flatten() for name in whole])
    gradient = torch.cat([(whole[name].double() - started[name].double()).flatten() for name in whole])
    assert gradient.norm() > 0.1
    assert (difference.norm() / gradient.norm()).item() < TOLERANCE[precision]


@pytest.mark.parametrize("precision", ADAPTED)
@pytest.mark.parametrize("engine", ENGINES)
def test_accumulated_gradients_of_adapters_equal_those_of_the_large_batch(
    engine: str, precision: str, results: Callable[[str], dict[str, Any]]
) -> None:
    import torch

    cells = [results(engine)[f"{precision} adapters {name}"] for name in ("whole", "in parts")]
    assert [cell.get("error") for cell in cells] == [None, None]
    # B begins at 0, and A gets its first gradient when B has moved: B after one step of rate 1 is the gradient.
    whole, parts = (
        torch.cat([tensor.flatten().double() for name, tensor in sorted(adapters.items()) if "lora_B" in name])
        for adapters in (tensors(cell, "adapter_model.safetensors") for cell in cells)
    )
    assert whole.norm() > 1e-3
    assert ((whole - parts).norm() / whole.norm()).item() < TOLERANCE[precision]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("engine", ENGINES[1:])
def test_padded_documents_are_averaged_by_token_over_ranks_as_in_one_process(
    engine: str, precision: str, results: Callable[[str], dict[str, Any]]
) -> None:
    alone, divided = (
        applied_gradient(cell)
        for cell in (results("single")[f"{precision} whole"], results(engine)[f"{precision} divided"])
    )
    assert ((alone - divided).norm() / alone.norm()).item() < TOLERANCE[precision]


def started_from(**changes: Any) -> dict[str, Any]:
    """The tiny Llama as its seed draws it: where every cell without adapters begins."""
    import transformers

    keys = {key: value for key, value in (LLAMA | changes).items() if key != "model_type"}
    config = transformers.LlamaConfig(vocab_size=512, **keys)
    transformers.set_seed(42)
    return {
        name: weight.detach()
        for name, weight in transformers.AutoModelForCausalLM.from_config(config).named_parameters()
    }
