"""Frozen weights in 4 or 8 bits, by bitsandbytes through transformers; what is quantised the plan says."""

from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from mpt.planning.peft_keywords import to_bitsandbytes_config
from mpt.planning.plan import Plan

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "uint8": torch.uint8}
QUANTIZED = ("Linear4bit", "Linear8bitLt")


def quantization_config(plan: Plan) -> BitsAndBytesConfig | None:
    """Give what `from_pretrained` quantises by; None where the plan quantises nothing."""
    planned = plan.value("quantization")
    return None if planned is None else BitsAndBytesConfig(**to_bitsandbytes_config(planned))


def prepare_quantized(model: PreTrainedModel, plan: Plan) -> PreTrainedModel:
    """Freeze a quantised model, let what is not quantised be fp32, and keep its layers trainable through.

    Gradient checkpointing is the Trainer's, and not reentrant, so that no input needs a gradient for it.
    """
    from peft import prepare_model_for_kbit_training

    prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    for module in quantized_modules(model).values():
        # On a CPU with AVX512-BF16 the first evaluation would repack 4-bit weights for a kernel that has no backward
        # pass: all that is below the layer would train no more, silently (bitsandbytes 0.50.2, Linear4bit.forward).
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    return model


def quantized_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Find the quantised layers, by name; peft's layers around them are of the same class name and no weights."""
    return {
        name: module
        for name, module in model.named_modules()
        if type(module).__name__ in QUANTIZED and type(module).__module__.startswith("bitsandbytes.")
    }


def describe(module: nn.Module) -> dict[str, Any]:
    """Say how a layer is quantised, in the plan's words, from the layer itself."""
    weight: Any = module.weight
    if type(module).__name__ == "Linear8bitLt":
        return {"bits": 8, "type": "int8", "threshold": float(module.state.threshold)}  # type: ignore[union-attr,arg-type]
    state = weight.quant_state
    names = {dtype: name for name, dtype in DTYPES.items()}
    return {
        "bits": 4,
        "type": state.quant_type,
        "compute_dtype": names.get(module.compute_dtype),  # type: ignore[call-overload]
        "double_quantization": bool(state.nested),
        "storage_dtype": names.get(weight.dtype),
    }
