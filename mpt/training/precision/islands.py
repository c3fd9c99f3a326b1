"""Modules with a precision of their own, whatever the model around them computes in.

An island's `forward` is replaced on the instance, so parameter names, module types, hooks (ZeRO-3 gathers in them),
gradient checkpointing and adapters put around it later stay as they are. Which modules, and why, the plan says. This
file imports torch alone, for generated scripts carry its text.
"""

import types
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

ISLAND_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def install_islands(model: nn.Module, islands: Mapping[str, str]) -> None:
    """Let each module named in `islands` compute in its dtype, "fp32", "bf16" or "fp16"; call once, before adapters.

    An fp32 island keeps its parameters in fp32 and runs without autocast; a bf16 or fp16 one runs in an autocast of its
    own and leaves its parameters alone. What an island hands on: inside autocast its result in that autocast's dtype or
    in fp32, which loses nothing and which autocast casts where it needs to; without autocast in the dtype of the model
    around it, save the logits of an fp32 output head, which stay fp32. Tied weights stay tied: the module at the other
    end of an fp32 weight computes and hands on what it would without the island.

    Raises ValueError for a name that is no module, for another dtype, for a 16-bit island that multiplies no matrix,
    and for weights that can't be cast.
    """
    modules = dict(model.named_modules())
    for name, precision in islands.items():
        _refuse(name, modules.get(name), precision)
    asked = {name: ISLAND_DTYPES[precision] for name, precision in islands.items()}
    wide = [modules[name].float() for name, dtype in asked.items() if dtype is torch.float32]
    # Casting replaced `Parameter.data`: a tied Parameter is still one object.
    kept = {id(weight) for module in wide for weight in module.parameters()}
    around = _dtype_around(model, kept)
    for name, module in modules.items():
        own = {id(weight) for weight in module.parameters(recurse=False)}
        if name in asked:
            is_wide = asked[name] is torch.float32
            stays = is_wide and _is_head(model, name, module)
            _replace_forward(module, asked[name], around if is_wide else None, stays=stays)
        elif around is not torch.float32 and own & kept and not any(name.startswith(f"{island}.") for island in asked):
            _replace_forward(module, None, around, stays=False)


def _refuse(name: str, module: nn.Module | None, precision: str) -> None:
    if module is None:
        raise ValueError(f"the model has no module {name}")
    if precision not in ISLAND_DTYPES:
        raise ValueError(f"{name}: {precision} is none of {', '.join(ISLAND_DTYPES)}")
    weights = list(module.parameters())
    shapes = [getattr(weight, "ds_shape", weight.shape) for weight in weights]  # ZeRO-3 leaves an empty weight behind
    if precision != "fp32" and (isinstance(module, nn.Embedding) or all(len(shape) < 2 for shape in shapes)):
        raise ValueError(f"{name}: autocast lowers matrix multiplications alone, and {type(module).__name__} has none")
    for weight in weights if precision == "fp32" else ():
        if not weight.is_floating_point():
            raise ValueError(f"{name}: its weights are {weight.dtype}, which has no fp32 form")
        if weight.dtype != torch.float32 and hasattr(weight, "ds_tensor"):
            raise ValueError(f"{name}: ZeRO-3 has divided its {weight.dtype} weights; build the model in fp32")


def _dtype_around(model: nn.Module, kept: set[int]) -> torch.dtype:
    """Find what most weights outside fp32 islands are stored in, so what the model's activations are without autocast.

    Counted by elements; fp32 where there is nothing outside.
    """
    elements: Counter[torch.dtype] = Counter()
    for weight in model.parameters():
        if id(weight) not in kept and weight.is_floating_point():
            elements[weight.dtype] += weight.numel()
    return elements.most_common(1)[0][0] if elements else torch.float32


def _is_head(model: nn.Module, name: str, module: nn.Module) -> bool:
    """Whether the loss takes this module's output: the language-modelling head, or a Linear beside the base model."""
    get_head = getattr(model, "get_output_embeddings", None)
    return (get_head is not None and get_head() is module) or ("." not in name and isinstance(module, nn.Linear))


def _replace_forward(module: nn.Module, compute: torch.dtype | None, back: torch.dtype | None, *, stays: bool) -> None:
    """Compute in `compute` and hand on in `back`; None: in what the model around computes in, the input's dtype.

    A bound method, for `copy.deepcopy` binds it to the copy, where a closure would go on using this module's weights.
    """
    inner = module.__dict__.get("forward")  # what another wrapper has put there

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        device = tensors[0].device.type if tensors else "cpu"
        given = next((value.dtype for value in tensors if value.is_floating_point()), None)
        in_autocast = torch.is_autocast_enabled(device)
        dtype = compute
        if dtype is None:  # shares an island's weight
            dtype = torch.get_autocast_dtype(device) if in_autocast else back
        if dtype is torch.float32:
            args, kwargs = _cast(args, dtype), _cast(kwargs, dtype)
        # autocast's cache of lowered weights knows one dtype per weight, and a tied weight may need two.
        with torch.autocast(device, dtype=dtype, enabled=dtype is not torch.float32, cache_enabled=False):
            result = type(self).forward(self, *args, **kwargs) if inner is None else inner(*args, **kwargs)
        if stays:
            return result
        if in_autocast and given is not None:
            # autocast refuses to mix bf16 into fp16, or the other way round, and fp32 holds either whole.
            return result if dtype == torch.get_autocast_dtype(device) else _cast(result, torch.float32)
        return _cast(result, back if back is not None else given)

    module.forward = types.MethodType(forward, module)


def _cast(value: Any, dtype: torch.dtype | None) -> Any:
    """Cast the floating tensors among a module's arguments or results; the rest stays."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if dtype is not None and value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _cast(part, dtype) for key, part in value.items()}
    return type(value)(_cast(part, dtype) for part in value) if type(value) in (tuple, list) else value
