"""The fp8 layers of a model by torchao: which modules become one, and which of a model's are.

torchao keeps the weights in their own dtype and quantises them, the inputs and the gradients anew in each step. The
conversion comes before the optimizer is made: accelerate converts after it, and with its default configuration
(`enable_fsdp_float8_all_gather`) puts new parameters in the place of those that the optimizer holds; the weights then
never move (accelerate 1.15, `Accelerator._prepare_ao`).
"""

import logging
from dataclasses import replace

import torch
from torch import nn

from mpt.errors import MptError, UnsupportedError
from mpt.planning.float8 import TORCHAO_INSTALL, TORCHAO_RECIPES

# What torchao 0.18 and torch 2.13 log when torchao is imported, which transformers and peft do wherever it is
# installed: kernels that fp8 training does not use, and a deprecation inside torchao.
NOISE = {
    "torchao": "Failed to load ",
    "torch.utils._pytree": "%s is an Enum subclass",
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
}


def convert(model: nn.Module, names: frozenset[str], *, recipe: str, emulate: bool) -> int:
    """Put an fp8 layer in the place of each named `torch.nn.Linear`, with the same parameters; give their number.

    `recipe` is torchao's name; `emulate` computes the fp8 numbers in fp32, on any device.

    Raises MptError for a name that is no linear layer of the model, or a recipe that torchao lacks, and
    UnsupportedError without torchao, and for real fp8 where there is no accelerator: torch would do it, in software,
    about a hundred times slower than emulated (torch 2.13, `torch._scaled_mm` on a CPU).
    """
    if recipe not in TORCHAO_RECIPES:
        raise MptError(f"torchao has no fp8 recipe {recipe}", remedy=f"Ask for one of {', '.join(TORCHAO_RECIPES)}.")
    if not emulate and not torch.accelerator.is_available():
        raise UnsupportedError(
            "fp8 was to be computed by hardware and there is no accelerator here",
            remedy="Ask for `precision: {mode: fp8, allow_emulation: true}`, or for bf16.",
        )
    refuse_others(model, names)
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        from mpt.training.precision.float8_linear import EngineFloat8Linear
    except ImportError as error:
        raise UnsupportedError(f"fp8 needs torchao: {error}", remedy=f"Install it: {TORCHAO_INSTALL}") from error

    # Rows of a micro batch that are no multiple of 16 are padded in the weight gradient, where they are summed over.
    config = replace(Float8LinearConfig.from_recipe_name(recipe), emulate=emulate, pad_inner_dim=True)
    linear = {name: model.get_submodule(name) for name in names}
    # torchao's own entry also mends a wrong fp8 store of the compiler's (triton-lang/triton#11111).
    convert_to_float8_training(model, config=config, module_filter_fn=lambda module, name: name in names)
    for name, module in linear.items():
        ours = EngineFloat8Linear.from_float(module, config).train(module.training)
        ours.name_in_model = name
        model.set_submodule(name, ours)
    return len(names)


def float8_modules(model: nn.Module) -> list[str]:
    """Name the model's fp8 layers, as they were named when converted: before adapters, DDP or a compiler wrapped it."""
    return [name for module in model.modules() if (name := getattr(module, "name_in_model", None)) is not None]


def count_converted(model: nn.Module) -> int:
    """Count the model's fp8 layers."""
    return len(float8_modules(model))


def quiet_torchao() -> None:
    """Drop what torchao logs when it is imported; call it before transformers is."""
    for logger in NOISE:
        logging.getLogger(logger).addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(NOISE[record.name])


def refuse_others(model: nn.Module, names: frozenset[str]) -> None:
    """Raise MptError for a name that is no `torch.nn.Linear` of the model.

    A subclass may do without its own forward pass, as the output projection of `torch.nn.MultiheadAttention` does, and
    would then never compute in fp8.
    """
    modules = dict(model.named_modules())
    for name in sorted(names):
        module = modules.get(name)
        if module is None:
            raise MptError(f"fp8 was planned for {name}, and the model has no such module", remedy="Plan the run anew.")
        if type(module) is not nn.Linear:
            raise MptError(
                f"fp8 was planned for {name}, a {type(module).__name__} and no torch.nn.Linear",
                remedy="Leave it in bf16: name it under precision.fp8.keep_high_precision.",
            )
