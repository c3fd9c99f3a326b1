"""Give a freshly built model the plan's precisions, module by module. Called once, before adapters and the Trainer.

Order matters: islands and fp8 layers are put in while the optimizer, DDP, DeepSpeed and the compiler have not seen the
model yet.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from mpt.planning.layers import island_dtypes
from mpt.planning.plan import Plan
from mpt.terms import FP8_MODES, Precision
from mpt.training.precision import float8, transformer_engine
from mpt.training.precision.islands import install_islands

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def planned_islands(plan: Plan) -> dict[str, str]:
    """Name the modules that compute in another format than the model around them, fp8 ones left out."""
    return island_dtypes(plan.value("layers"), Precision(plan.value("precision")))


def planned_float8(plan: Plan) -> frozenset[str]:
    """Name the modules that compute in fp8 or mxfp8."""
    listed = (plan.value("layers") or {"modules": ()})["modules"]
    return frozenset(entry["name"] for entry in listed if entry["precision"] in FP8_MODES)


def apply_precision(model: nn.Module, plan: Plan) -> None:
    """Install islands, convert fp8 layers, and let bf16 weights accumulate gradients in fp32 where the plan says so."""
    islands, converted = planned_islands(plan), planned_float8(plan)
    if islands:
        install_islands(model, islands)
    if converted:
        fp8 = plan.value("fp8")
        if fp8["backend"] == "torchao":
            float8.convert(model, converted, recipe=fp8["recipe"], emulate=fp8["emulated"])
        else:
            transformer_engine.convert(model, converted, recipe=fp8["recipe"])
    if plan.value("grad_accum_dtype") == "fp32" and plan.deepspeed is None:
        for weight in model.parameters():
            if weight.dtype is torch.bfloat16 and weight.requires_grad:
                weight.grad_dtype = torch.float32


def cast_weights(model: nn.Module, dtype: torch.dtype, *, islands: Mapping[str, str]) -> None:
    """Cast the parameters outside fp32 islands, and no buffer.

    A rotary embedding's frequencies in bf16 are off by 0.4 %, which is whole turns at position 4096.
    """
    modules = dict(model.named_modules())
    kept = {id(weight) for name, kind in islands.items() if kind == "fp32" for weight in modules[name].parameters()}
    for weight in model.parameters():
        if id(weight) not in kept and weight.is_floating_point():
            weight.data = weight.data.to(dtype)


def fp8_context(plan: Plan) -> Callable[[], AbstractContextManager[Any]]:
    """Give what makes the context of a forward pass: Transformer Engine computes fp8 only inside its own autocast."""
    fp8 = plan.value("fp8")
    if fp8 is None or fp8["backend"] != "transformer_engine":
        return nullcontext
    return transformer_engine.autocast(fp8["recipe"])


def fp8_recomputes(plan: Plan) -> bool:
    """Whether activations are computed anew where Transformer Engine's autocast is not around them."""
    fp8 = plan.value("fp8")
    return bool(plan.value("gradient_checkpointing")) and fp8 is not None and fp8["backend"] == "transformer_engine"


def fp32_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copy the fp32 buffers that no checkpoint holds: what `restore_buffers` puts back after an engine cast them."""
    return {
        name: buffer.detach().clone()
        for name, buffer in model.named_buffers()
        if buffer.dtype is torch.float32 and _is_computed(model, name)
    }


def restore_buffers(model: nn.Module, buffers: Mapping[str, torch.Tensor]) -> list[str]:
    """Put buffers back that an engine cast to 16 bits, and name them.

    DeepSpeed's 16-bit engines cast the whole module (`Module.bfloat16`), the rotary frequencies with it; transformers'
    own loading in bf16 leaves those in fp32.
    """
    mended = []
    for name, buffer in model.named_buffers():
        whole = buffers.get(name)
        if whole is not None and buffer.dtype is not torch.float32:
            buffer.data = whole.to(buffer.device)
            mended.append(name)
    return mended


def _is_computed(model: nn.Module, name: str) -> bool:
    owner, _, leaf = name.rpartition(".")
    return leaf in model.get_submodule(owner)._non_persistent_buffers_set


def weights_of(modules: Iterable[nn.Module]) -> list[torch.Tensor]:
    """List the parameters of modules, each once."""
    return list({id(weight): weight for module in modules for weight in module.parameters()}.values())
