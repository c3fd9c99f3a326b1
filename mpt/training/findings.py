"""What really runs, read from the live objects: model, engine, optimizer, scaler, flags. Nothing is judged here:
`mpt.training.audit` compares."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mpt.planning.number_formats import SIXTEEN_BIT
from mpt.planning.plan import Plan
from mpt.terms import Precision, Strategy
from mpt.training.precision.float8 import float8_modules
from mpt.training.precision.loss_scaling import StaticScaler
from mpt.training.precision.watching import DTYPE_NAMES
from mpt.training.regional_compile import repeated_blocks

if TYPE_CHECKING:
    from mpt.training.trainer import PlanTrainer

NAMES = DTYPE_NAMES | {torch.uint8: "uint8", torch.int8: "int8"}
# Where DeepSpeed's optimizers keep the weights that are updated: ZeRO-1 and 2, ZeRO-3, and its bf16 optimizer (0.19.8).
DEEPSPEED_MASTERS = ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups_flat_partition")
PROBE_TOKENS = 16


def name(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else NAMES.get(dtype, str(dtype))


def dtypes(tensors: Iterable[torch.Tensor]) -> list[str]:
    """Name the dtypes among tensors, sorted."""
    return names(tensor.dtype for tensor in tensors)


def names(dtypes: Iterable[torch.dtype]) -> list[str]:
    """Name dtypes, each once, sorted."""
    return sorted({str(name(dtype)) for dtype in dtypes})


def common_dtype(tensors: list[torch.Tensor]) -> torch.dtype | None:
    found = {tensor.dtype for tensor in tensors}
    return found.pop() if len(found) == 1 else None


def plain_model(trainer: "PlanTrainer") -> Any:
    """The model as transformers built it: under peft's wrapper, DDP and the compiler."""
    model = trainer.model
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def planned_modules(trainer: "PlanTrainer") -> dict[str, nn.Module]:
    """Find the modules under the names that the plan has for them: a layer inside an adapter keeps its own name."""
    found: dict[str, nn.Module] = {}
    for path, module in plain_model(trainer).named_modules():
        if not any(part.startswith("lora_") for part in path.split(".")):
            found[path.removesuffix(".base_layer")] = module
    return found


def matmul_modules(modules: Mapping[str, nn.Module], *, but: Iterable[str]) -> dict[str, nn.Module]:
    """Pick the linear layers, whoever made them."""
    left_out = set(but)
    return {
        path: module
        for path, module in modules.items()
        if path not in left_out and (isinstance(module, nn.Linear) or type(module).__name__ in ("Conv1D", "Linear"))
    }


def planned_operands(plan: Plan, names: Iterable[str]) -> dict[str, str]:
    """Say in which format each layer's weight is to reach the multiplication."""
    precision = Precision(plan.value("precision"))
    base = SIXTEEN_BIT.get(precision, "fp32")
    listed = {entry["name"]: entry["precision"] for entry in (plan.value("layers") or {"modules": ()})["modules"]}
    return {path: listed.get(path, base) for path in names}


def multiplied_in(seen: Mapping[str, Mapping[str, str | None]], wanted: Mapping[str, str]) -> dict[str, str | None]:
    """Say in which format each layer multiplies: that of its weight, or where only the input has another, of that.

    >>> multiplied_in({"a": {"input": "fp32", "weight": "fp8"}}, {"a": "fp8"})
    {'a': 'fp32'}
    """
    return {
        path: operands["weight"] if operands["weight"] != wanted[path] else operands["input"]
        for path, operands in seen.items()
    }


def island_weights(trainer: "PlanTrainer", islands: Iterable[str]) -> dict[int, torch.Tensor]:
    """List the parameters of islands by identity."""
    modules = planned_modules(trainer)
    return {id(weight): weight for island in islands for weight in modules[island].parameters()}


def plain_fp8(trainer: "PlanTrainer") -> list[str]:
    return float8_modules(plain_model(trainer))


def rotary_dtypes(model: nn.Module) -> list[str]:
    return dtypes(buffer for path, buffer in model.named_buffers() if path.endswith("inv_freq"))


def misaligned(model: nn.Module, multiple: int) -> list[tuple[str, int, int]]:
    """List the linear layers of which a size is no multiple of `multiple`: (name, rows, columns)."""
    sizes = [
        (path, *_size(module))
        for path, module in model.named_modules()
        if ".lora_" not in path and (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D")
    ]
    return [(path, rows, columns) for path, rows, columns in sizes if rows % multiple or columns % multiple]


def _size(module: Any) -> tuple[int, int]:
    """Rows and columns of a linear layer; GPT-2's Conv1D names them its own way."""
    return (module.out_features, module.in_features) if isinstance(module, nn.Linear) else (module.nf, module.nx)


def output_parameters(model: Any) -> int:
    """Count the parameters of one output of a classifier: of its last linear layer with an output a label."""
    labels = model.config.num_labels
    heads = [module for module in model.modules() if isinstance(module, nn.Linear) and module.out_features == labels]
    if not heads:
        return 0
    return sum(getattr(weight, "ds_numel", weight.numel()) for weight in heads[-1].parameters()) // labels


def strategy(trainer: "PlanTrainer", engine: Any) -> str:
    if engine is not None:
        return f"zero{engine.zero_optimization_stage()}"
    if getattr(trainer, "is_fsdp_enabled", False):
        return Strategy.FSDP2.value
    wrapped = trainer.model_wrapped
    parts = (wrapped, getattr(wrapped, "_orig_mod", None))
    is_ddp = any(isinstance(part, nn.parallel.DistributedDataParallel) for part in parts)
    return Strategy.DDP.value if is_ddp else Strategy.SINGLE.value


def compiled(trainer: "PlanTrainer") -> bool | str:
    """Say what torch.compile compiles: "regional" where it is the repeated blocks alone."""
    wrapped = trainer.model_wrapped
    if trainer.is_deepspeed_enabled:
        return bool(getattr(wrapped, "is_compiled", False))
    parts = [part for part in wrapped.modules() if hasattr(part, "_orig_mod") or part._compiled_call_impl is not None]
    blocks = repeated_blocks(trainer.model)
    return "regional" if parts and {*map(id, parts)} == {*map(id, blocks)} else bool(parts)


def allows_tf32() -> bool:
    """Whether torch lets fp32 matrix multiplications round their factors to TF32."""
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


def innermost(optimizer: Any) -> Any:
    """The optimizer inside accelerate's and DeepSpeed's."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def master_dtypes(trainer: "PlanTrainer", islands: Mapping[int, torch.Tensor]) -> list[str]:
    """Name the dtypes of what the optimizer updates, islands left out."""
    if trainer.is_deepspeed_enabled:
        engine = trainer.model_wrapped
        kept = [getattr(engine.optimizer, key) for key in DEEPSPEED_MASTERS if hasattr(engine.optimizer, key)]
        return dtypes(tensor for tensors in kept[:1] for tensor in tensors)
    made = innermost(trainer.optimizer)
    if getattr(made, "master_weights", False):
        return ["fp32"]
    return dtypes(w for group in made.param_groups for w in group["params"] if id(w) not in islands)


def optimizer_state(trainer: "PlanTrainer", *, islands: Iterable[str]) -> list[torch.Tensor]:
    """List the moments of the optimizer: no step counters, master copies or Kahan's compensation."""
    made = innermost(trainer.model_wrapped.optimizer if trainer.is_deepspeed_enabled else trainer.optimizer)
    left_out = island_weights(trainer, islands)
    return [
        value
        for weight, entry in made.state.items()
        if isinstance(entry, dict) and id(weight) not in left_out
        for key, value in entry.items()
        if key not in ("master", "compensation") and isinstance(value, torch.Tensor) and value.numel() > 1
    ]


def loss_scale(trainer: "PlanTrainer", engine: Any) -> dict[str, Any] | None:
    """Read the loss scaler that is there; None without one. `default_*`: what a scaler of its kind has unasked."""
    if engine is not None:
        if not engine.fp16_enabled():
            return None
        scaler = engine.optimizer.loss_scaler
        factor = float(getattr(scaler, "scale_factor", 2))
        return {
            "is_dynamic": bool(scaler.dynamic),
            "scale": float(scaler.loss_scale),
            "growth_factor": factor,
            "backoff_factor": 1 / factor,
            "growth_interval": float(getattr(scaler, "scale_window", 0)),
            "min": getattr(scaler, "min_scale", None),
            "hysteresis": getattr(scaler, "delayed_shift", None),
            "default_min": 1,
            "default_hysteresis": 2,
        }
    if trainer.scaler is None:
        return None
    return {
        "is_dynamic": not isinstance(trainer.scaler, StaticScaler),
        "scale": float(trainer.scaler.get_scale()),
        "growth_factor": float(trainer.scaler.get_growth_factor()),
        "backoff_factor": float(trainer.scaler.get_backoff_factor()),
        "growth_interval": float(trainer.scaler.get_growth_interval()),
        "min": getattr(trainer.scaler, "minimum", None),
        "hysteresis": getattr(trainer.scaler, "_hysteresis", 1),
        "default_min": None,
        "default_hysteresis": 1,
    }


def loss(trainer: "PlanTrainer") -> str:
    """Name what computes the loss: `chunked` (mpt's), `liger`, or `full`, the model's own."""
    model = plain_model(trainer)
    if hasattr(model, "own_forward"):
        return "chunked"
    forward = inspect.unwrap(getattr(model.forward, "__func__", model.forward))
    return "liger" if str(getattr(forward, "__module__", "")).startswith("liger_kernel") else "full"


def both_losses(trainer: "PlanTrainer") -> tuple[float, float]:
    """Compute the loss of a few tokens as the model does by itself, and in chunks; leave no trace of it."""
    model = plain_model(trainer)
    tokens = torch.arange(2 * PROBE_TOKENS, device=trainer.args.device).reshape(2, PROBE_TOKENS)
    tokens = tokens % model.config.get_text_config().vocab_size
    found = []
    with unseen(trainer), trainer.accelerator.autocast():
        for forward in (model.own_forward, model.forward):
            torch.manual_seed(0)  # the same dropout
            found.append(forward(input_ids=tokens, labels=tokens).loss.item())
    return found[0], found[1]


@contextmanager
def unseen(trainer: "PlanTrainer") -> Iterator[None]:
    """Surround a forward pass that is no part of the training: eager, without gradients, the random state restored."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    with (
        torch.compiler.set_stance("force_eager"),
        torch.random.fork_rng(devices=devices),
        torch.no_grad(),
        trainer.compute_loss_context_manager(),
    ):
        yield


def watch_autocast(trainer: "PlanTrainer", note: Callable[[str | None], None]) -> None:
    """Tell `note` once which dtype autocast has where the first linear layer runs; None: autocast is off there."""
    modules = matmul_modules(planned_modules(trainer), but=())
    layer = next(iter(modules.values()))
    device = trainer.args.device.type

    def look(module: nn.Module, inputs: Any) -> None:
        handle.remove()
        note(name(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None)

    handle = layer.register_forward_pre_hook(look)


def run_eagerly(trainer: "PlanTrainer") -> None:
    """Run one small forward pass with every compiled region left uncompiled, and leave no trace of it."""
    tokens = torch.zeros((1, PROBE_TOKENS), dtype=torch.int64, device=trainer.args.device)
    with unseen(trainer):
        trainer.model_wrapped(input_ids=tokens)
